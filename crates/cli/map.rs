//! `vdisk map`: where the parts of the disk are.

use serde::Serialize;
use std::io::{self, BufWriter, Write};
use vdisk_image::{FileId, Run, RunKind};
use vdisk_io::{BlockingIo, block_on};

use crate::failure::{Failure, Result, one_line};
use crate::open::Opened;
use crate::options::LookOptions;
use crate::table;

/// Show which parts of the disk are data, zeroes or a hole, and where they are
///
/// A line for each run. DEPTH says which file of a chain decides: 0 is the image, 1 its parent. A hole is in none of them; noaccess is what the
/// image says not to read.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  vdisk map --json disk.vmdk | jq '[.[] | select(.data) | .length] | add'")]
pub(crate) struct Args {
    #[command(flatten)]
    pub(crate) image: LookOptions,
    /// One JSON document, as qemu-img map --output=json has it, with the names of the files
    #[arg(long)]
    json: bool,
}

/// A run as it is printed. The fields mean what they mean in qemu-img.
#[derive(Serialize)]
struct Entry<'a> {
    start: u64,
    length: u64,
    depth: usize,
    /// It is in the file. Neither this nor zeroes if it may not be read (NOACCESS).
    data: bool,
    /// It reads as zeroes, whatever it is.
    zero: bool,
    /// A link of the chain has it.
    present: bool,
    compressed: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    file: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    offset: Option<u64>,
}

pub(crate) fn run(args: &Args, verbose: bool) -> Result<()> {
    crate::logging::to_stderr(verbose);
    let image = Opened::open_to_look(&args.image, false)?;
    let io = BlockingIo::new(image.files.clone());
    let size = image.geometry().size;
    let names: Vec<String> = image.files.iter().map(|(_, file)| file.path().display().to_string()).collect();
    let mut out = Output { out: BufWriter::new(io::stdout().lock()), widths: args.widths(size, &names), runs: 0 };
    let mut start = 0;
    // A disk may have any number of runs: none is kept.
    while start < size {
        let run = block_on(image.disk.map(&io, start, size - start)).map_err(|e| Failure::from_error(&e))?;
        if !done(out.entry(&Entry::new(start, run, &names)))? {
            return Ok(());
        }
        start += run.len;
    }
    done(out.end()).map(drop)
}

/// Whether anybody still reads. A reader that has seen enough is no failure.
fn done(written: io::Result<()>) -> Result<bool> {
    match written {
        Ok(()) => Ok(true),
        Err(e) if e.kind() == io::ErrorKind::BrokenPipe => Ok(false),
        Err(e) => Err(Failure::doing("write to stdout", &e)),
    }
}

impl Args {
    /// Widths of the columns of the text, `None` for JSON.
    fn widths(&self, size: u64, names: &[String]) -> Option<[usize; 6]> {
        let number = size.to_string().len().max("LENGTH".len());
        let name = names.iter().map(|name| one_line(name).chars().count()).max().unwrap_or(0);
        (!self.json).then_some([number, number, "DEPTH".len(), "compressed".len(), name.max("FILE".len()), 0])
    }
}

impl<'a> Entry<'a> {
    fn new(start: u64, run: Run, names: &'a [String]) -> Self {
        let name = |file: FileId| names.get(usize::try_from(file.0).ok()?).map(String::as_str);
        let (file, offset) = match run.kind {
            RunKind::Data { file, offset } | RunKind::Zero { place: Some((file, offset)) } => {
                (name(file), Some(offset))
            }
            RunKind::Compressed { file } => (name(file), None),
            RunKind::Zero { place: None } | RunKind::NoAccess | RunKind::Hole => (None, None),
        };
        Self {
            start,
            length: run.len,
            depth: run.depth,
            data: !run.is_hole() && run.kind != RunKind::NoAccess,
            zero: run.is_hole(),
            present: run.kind != RunKind::Hole,
            compressed: matches!(run.kind, RunKind::Compressed { .. }),
            file,
            offset,
        }
    }

    fn word(&self) -> &'static str {
        match self {
            Self { compressed: true, .. } => "compressed",
            Self { data: true, .. } => "data",
            Self { present: true, zero: false, .. } => "noaccess",
            Self { present: true, .. } => "zero",
            _ => "hole",
        }
    }
}

/// What has been printed so far: an array that is not closed yet, or lines.
struct Output<W: Write> {
    out: W,
    widths: Option<[usize; 6]>,
    runs: u64,
}

impl<W: Write> Output<W> {
    fn entry(&mut self, entry: &Entry<'_>) -> io::Result<()> {
        self.runs += 1;
        let Some(widths) = self.widths else {
            self.out.write_all(if self.runs == 1 { b"[" } else { b",\n " })?;
            return serde_json::to_writer(&mut self.out, entry).map_err(io::Error::from);
        };
        if self.runs == 1 {
            let head = ["START", "LENGTH", "DEPTH", "WHAT", "FILE", "OFFSET"].map(str::to_owned);
            writeln!(self.out, "{}", table::line(&head, widths))?;
        }
        let row = [
            entry.start.to_string(),
            entry.length.to_string(),
            entry.depth.to_string(),
            entry.word().to_owned(),
            entry.file.map_or_else(|| "-".to_owned(), one_line),
            entry.offset.map_or_else(|| "-".to_owned(), |offset| offset.to_string()),
        ];
        writeln!(self.out, "{}", table::line(&row, widths))
    }

    fn end(&mut self) -> io::Result<()> {
        if self.widths.is_none() {
            self.out.write_all(if self.runs == 0 { b"[]\n" } else { b"]\n" })?;
        }
        self.out.flush()
    }
}
