//! `vdisk compact`: what an image does not need is given back to the host.

use std::io;

use serde::Serialize;
use vdisk_image::{CompactWatch, Compacted};
use vdisk_io::{BlockingIo, HostFile, block_on};

use crate::failure::{Failure, Result, one_line};
use crate::open::Opened;
use crate::options::LookOptions;
use crate::progress::Progress;
use crate::signals::{self, Stop};
use crate::size::human;

/// Give unused space of an image back to the host, in place
///
/// Grains that are nothing but zeroes lose their place, those at the end of the file are moved to free places in front, and the end is
/// cut off. Flat and raw images keep their length, and get holes where they have zeroes. What the guest has deleted, but neither
/// discarded nor zeroed, stays. The disk reads as before, and its parents are not touched.
///
/// It may be ended at any point, even by a power cut: run it again, and it goes on. Nobody may have the image open meanwhile.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  vdisk compact --dry-run disk.vmdk\n  vdisk compact disk.vmdk")]
pub(crate) struct Args {
    #[command(flatten)]
    pub(crate) image: LookOptions,
    /// Change nothing, and say what would be given back
    #[arg(short = 'n', long)]
    dry_run: bool,
    /// One JSON document
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Report {
    dry_run: bool,
    /// It was ended early.
    stopped: bool,
    /// Grains of zeroes that have no place any more.
    dropped_grains: u64,
    moved_grains: u64,
    files: Vec<FileReport>,
}

/// A file with space that could be given back.
#[derive(Serialize)]
struct FileReport {
    file: String,
    bytes_before: u64,
    bytes_after: u64,
    /// Without its holes.
    host_bytes_before: u64,
    host_bytes_after: u64,
}

struct Watch {
    bar: Progress,
    stop: Stop,
}

impl CompactWatch for Watch {
    fn progress(&mut self, done: u64, total: u64) {
        self.bar.show(done, total);
    }

    fn is_stopped(&self) -> bool {
        self.stop.is_given()
    }
}

pub(crate) fn run(args: &Args, verbose: bool) -> Result<()> {
    crate::logging::to_stderr(verbose);
    let stop = Stop::default();
    if !args.dry_run {
        let held = signals::hold(false).map_err(|e| Failure::doing("hold signals", &e))?;
        held.on_end(stop.clone(), None).map_err(|e| Failure::doing("wait for signals", &e))?;
    }
    let image = Opened::open_to_compact(&args.image)?;
    if let Some((_, device)) = image.files.iter().find(|(_, f)| f.is_writable() && f.dev_and_ino().is_none()) {
        let what = format!("{} is no file, and has nothing to give back", device.path().display());
        return Err(Failure::new(what));
    }
    if !args.dry_run {
        image.forget_stale_ledger()?;
    }
    let failed = |file: &HostFile, e: io::Error| Failure::doing(file.path().display(), &e);
    let measure = || -> Result<Vec<(u64, u64)>> {
        let of = |file: &HostFile| Ok((file.len()?, file.space_used()?));
        image.files.iter().map(|(_, file)| of(file).map_err(|e| failed(file, e))).collect()
    };
    let before = measure()?;
    let io = BlockingIo::new(image.files.clone());
    let mut watch = Watch { bar: Progress::new(), stop };
    let done = block_on(image.disk.compact(&io, args.dry_run, &mut watch));
    watch.bar.end();
    let closed = if args.dry_run { Ok(()) } else { image.close() };
    let done = done.map_err(|e| Failure::from_error(&e))?;
    closed?;
    done.notices.iter().for_each(|notice| crate::notice(notice));
    let report = Report::new(&image, args.dry_run, &done, &before, &measure()?);
    match args.json {
        true => crate::print_json(&report)?,
        false => crate::print(&report.text())?,
    }
    match done.stopped {
        true => Err(Failure::new("ended early: the image is whole and closed").hint("the next vdisk compact goes on")),
        false => Ok(()),
    }
}

impl Report {
    fn new(image: &Opened, dry_run: bool, done: &Compacted, before: &[(u64, u64)], after: &[(u64, u64)]) -> Self {
        let files = done.files.iter().filter_map(|f| {
            let n = usize::try_from(f.file.0).ok()?;
            let (&(len, used), &(len_now, used_now)) = before.get(n).zip(after.get(n))?;
            // An estimate cannot know what the host keeps for itself.
            let (len_after, used_after) = if dry_run { (f.len, f.stored.min(used)) } else { (len_now, used_now) };
            Some(FileReport {
                file: image.files.get(f.file).path().display().to_string(),
                bytes_before: len,
                bytes_after: len_after,
                host_bytes_before: used,
                host_bytes_after: used_after,
            })
        });
        let (dropped_grains, moved_grains) = (done.dropped_grains, done.moved_grains);
        Self { dry_run, stopped: done.stopped, dropped_grains, moved_grains, files: files.collect() }
    }

    fn text(&self) -> String {
        let mut text = String::new();
        let would = if self.dry_run { "would be " } else { "" };
        for f in &self.files {
            text += &format!(
                "{}: {} {would}given back on the host ({} of {} are left), the file {would}{} of {}\n",
                one_line(&f.file),
                human(f.host_bytes_before.saturating_sub(f.host_bytes_after)),
                human(f.host_bytes_after),
                human(f.host_bytes_before),
                human(f.bytes_after),
                human(f.bytes_before),
            );
        }
        text + &format!(
            "{} grains of zeroes {would}dropped, {} grains {would}moved\n",
            self.dropped_grains, self.moved_grains
        )
    }
}
