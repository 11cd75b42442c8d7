//! `vdisk check`: what contradicts the format in an image.

use std::path::PathBuf;

use serde::Serialize;
use vdisk_image::{CheckWatch, Fault, Format, Leaks, Repair};
use vdisk_io::{BlockingIo, block_on};

use crate::failure::{Failure, Result, one_line};
use crate::open::Opened;
use crate::options::LookOptions;
use crate::progress::Progress;
use crate::repair::{self, Outcome};
use crate::size;

/// Faults that are listed; the others are only counted.
const LISTED: usize = 1000;

/// Look for what contradicts the format: in headers, descriptors, tables, parents, and in the grains of streams
///
/// A line for each fault: where it is, and what it is. Ends with 1 if there is one. Without --repair nothing is changed. Nobody may
/// write to the image meanwhile.
///
/// --repair puts right what can be put right without guessing: grain tables and their copies that differ, what nothing names, the mark
/// of an image that was not closed. What it leaves alone it says; parents are never changed. Everything that it changes is kept in
/// a file beside the image first.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  \
    vdisk check --json disk.vmdk | jq -r '.errors[] | .kind' | sort | uniq -c\n  \
    vdisk check --repair disk.vmdk\n  \
    vdisk check --undo disk.vmdk.repair-1 disk.vmdk")]
pub(crate) struct Args {
    #[command(flatten)]
    pub(crate) image: LookOptions,
    /// One JSON document
    #[arg(long, conflicts_with = "undo")]
    json: bool,
    /// Put right what can be put right without guessing
    #[arg(long)]
    repair: bool,
    /// Keep what is changed in this file, which is not there yet, instead of IMAGE.repair-1, -2 and so on
    #[arg(long, value_name = "FILE", requires = "repair")]
    backup: Option<PathBuf>,
    /// Keep nothing of what is changed
    #[arg(long, requires = "repair", conflicts_with = "backup")]
    no_backup: bool,
    /// Put back what a repair has changed, from the file that it kept it in
    #[arg(long, value_name = "FILE", conflicts_with = "repair")]
    undo: Option<PathBuf>,
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
    /// What was put right, and what was not and why.
    repairs: Vec<Repaired>,
    left_alone: Vec<Repaired>,
    /// What was changed is kept there.
    backup: Option<PathBuf>,
    #[serde(skip)]
    raw: bool,
    #[serde(skip)]
    undo: Option<String>,
}

#[derive(Serialize)]
struct Repaired {
    file: String,
    offset: Option<u64>,
    detail: String,
}

impl From<Repair> for Repaired {
    fn from(Repair { file, offset, detail }: Repair) -> Self {
        Self { file, offset, detail }
    }
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
    if let Some(backup) = &args.undo {
        return repair::undo(&args.image, backup);
    }
    let mut outcome = Outcome::default();
    if args.repair {
        outcome = repair::run(&args.image, repair::wanted(args.backup.as_ref(), args.no_backup))?;
    }
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
        repaired: outcome.repaired.len() as u64,
        repairs: outcome.repaired.into_iter().map(Repaired::from).collect(),
        left_alone: outcome.left.into_iter().map(Repaired::from).collect(),
        undo: outcome.backup.as_ref().map(|path| repair::how_to_undo(&args.image, path)),
        backup: outcome.backup,
        raw,
    };
    if args.json {
        crate::print_json(&report)?
    } else {
        crate::print(&report.text())?
    }
    let found = match report.errors.len() as u64 + report.more_errors {
        0 => return Ok(()),
        1 => "1 error".to_owned(),
        n => format!("{n} errors"),
    };
    Err(match outcome.refused {
        Some(why) => Failure::new(format!("{found} found, and it cannot be repaired: {why}")),
        None if args.repair => Failure::new(format!("{found} left")),
        None => Failure::new(format!("{found} found")),
    })
}

impl Report {
    fn text(&self) -> String {
        let mut text = String::new();
        for (what, repairs) in [("repaired", &self.repairs), ("left alone", &self.left_alone)] {
            for Repaired { file, offset, detail } in repairs {
                let offset = offset.map_or_else(String::new, |at| format!("byte {at}: "));
                text += &format!("{}: {offset}{} ({what})\n", one_line(file), one_line(detail));
            }
        }
        text += self.undo.as_deref().unwrap_or_default();
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
