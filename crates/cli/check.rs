//! `vdisk check`: what contradicts the format in an image.

use serde::Serialize;
use vdisk_image::{CheckWatch, Fault, Format, Leaks};
use vdisk_io::{BlockingIo, block_on};

use crate::failure::{Failure, Result, one_line};
use crate::open::Opened;
use crate::options::LookOptions;
use crate::progress::Progress;
use crate::size;

/// Faults that are listed; the others are only counted.
const LISTED: usize = 1000;

/// Look for what contradicts the format: in headers, descriptors, tables, parents, and in the grains of streams
///
/// A line for each fault: where it is, and what it is. Ends with 1 if there is one. Nothing is changed, and nobody may
/// write to the image meanwhile.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  vdisk check --json disk.vmdk | jq -r '.errors[] | .kind' | sort | uniq -c")]
pub(crate) struct Args {
    #[command(flatten)]
    pub(crate) image: LookOptions,
    /// One JSON document
    #[arg(long)]
    json: bool,
}

/// What was found, as it is printed.
#[derive(Serialize)]
struct Report {
    /// There is no error. What belongs to nothing is none.
    clean: bool,
    errors: Vec<Error>,
    /// What is only worth knowing.
    notes: Vec<Error>,
    /// How many more errors there are than are listed.
    more_errors: u64,
    leaked_grains: u64,
    /// Bytes of them.
    leaked_bytes: u64,
    repaired: u64,
    #[serde(skip)]
    raw: bool,
}

#[derive(Serialize)]
struct Error {
    kind: &'static str,
    file: String,
    offset: Option<u64>,
    detail: String,
}

/// Keeps what a check finds, and shows how far it is.
struct Watch {
    errors: Vec<Error>,
    notes: Vec<Error>,
    more: u64,
    bar: Progress,
}

impl CheckWatch for Watch {
    fn fault(&mut self, fault: Fault) {
        let Fault { kind, file, offset, detail } = fault;
        let list = if kind.is_note() { &mut self.notes } else { &mut self.errors };
        if list.len() < LISTED {
            list.push(Error { kind: kind.name(), file, offset, detail });
        } else if !kind.is_note() {
            self.more += 1;
        }
    }

    fn progress(&mut self, done: u64, total: u64) {
        self.bar.show(done, total);
    }
}

pub(crate) fn run(args: &Args, verbose: bool) -> Result<()> {
    crate::logging::to_stderr(verbose);
    let mut watch = Watch { errors: Vec::new(), notes: Vec::new(), more: 0, bar: Progress::new() };
    let mut raw = false;
    let leaks = match Opened::open_to_check(&args.image)? {
        Ok(image) => {
            raw = image.disk.info().format == Format::Raw;
            let io = BlockingIo::new(image.files.clone());
            block_on(image.disk.check(&io, &mut watch))
        }
        Err(fault) => {
            watch.fault(fault);
            Leaks::default()
        }
    };
    watch.bar.end();
    let report = Report {
        clean: watch.errors.is_empty(),
        errors: watch.errors,
        notes: watch.notes,
        more_errors: watch.more,
        leaked_grains: leaks.grains,
        leaked_bytes: leaks.bytes,
        repaired: 0,
        raw,
    };
    if args.json {
        crate::print_json(&report)?
    } else {
        crate::print(&report.text())?
    }
    match report.errors.len() as u64 + report.more_errors {
        0 => Ok(()),
        1 => Err(Failure::new("1 error found")),
        n => Err(Failure::new(format!("{n} errors found"))),
    }
}

impl Report {
    fn text(&self) -> String {
        let mut text = String::new();
        for Error { kind, file, offset, detail } in self.errors.iter().chain(&self.notes) {
            let offset = offset.map_or_else(String::new, |at| format!("byte {at}: "));
            // What opening says names the file itself.
            let detail = detail.strip_prefix(&format!("{file}: ")).unwrap_or(detail);
            text += &format!("{}: {offset}{} ({kind})\n", one_line(file), one_line(detail));
        }
        if self.more_errors > 0 {
            text += &format!("and {} more\n", self.more_errors);
        }
        if self.clean {
            // Nothing in the bytes of a disk says whether they are the right ones.
            text += if self.raw { "a raw image: there is nothing to check\n" } else { "no errors found\n" };
        }
        if self.leaked_grains > 0 {
            let size = size::human(self.leaked_bytes);
            text +=
                &format!("{} grains ({size}) of the file belong to nothing, which harms nobody\n", self.leaked_grains);
        }
        text
    }
}
