//! `vdisk check --repair`, and `--undo`.

use std::fs;
use std::path::{Path, PathBuf};

use vdisk_image::{ErrorKind, Repair, RepairWatch};
use vdisk_io::{BlockingIo, block_on};

use crate::backup::{BackupFile, Undo, Wanted};
use crate::failure::{Failure, Result};
use crate::open::Opened;
use crate::options::LookOptions;
use crate::progress::Progress;

/// What a repair did.
#[derive(Default)]
pub(crate) struct Outcome {
    pub(crate) repaired: Vec<Repair>,
    pub(crate) left: Vec<Repair>,
    pub(crate) backup: Option<PathBuf>,
    /// Why nothing can be repaired in such an image.
    pub(crate) refused: Option<String>,
}

struct Watch {
    repaired: Vec<Repair>,
    left: Vec<Repair>,
    bar: Progress,
}

impl RepairWatch for Watch {
    fn repaired(&mut self, repair: Repair) {
        self.repaired.push(repair);
    }

    fn left(&mut self, repair: Repair) {
        self.left.push(repair);
    }

    fn progress(&mut self, done: u64, total: u64) {
        self.bar.show(done, total);
    }
}

/// Repairs the image. Nobody has it open afterwards, and it can be checked again.
pub(crate) fn run(options: &LookOptions, wanted: Option<Wanted>) -> Result<Outcome> {
    let image = match Opened::open_to_repair(options)? {
        Ok(image) => image,
        // A format that is only read, or so damaged that it cannot be opened: the check says what is wrong with it.
        Err(e) => return Ok(Outcome { refused: Some(crate::failure::chain(&e)), ..Outcome::default() }),
    };
    let changed = options.overlay.as_ref().unwrap_or(&options.image);
    let wanted = wanted.unwrap_or_else(|| Wanted::Beside(changed.clone()));
    let mut backup = BackupFile::new(wanted, &image.files, image.disk.info().content_id);
    let io = BlockingIo::new(image.files.clone());
    let mut watch = Watch { repaired: Vec::new(), left: Vec::new(), bar: Progress::new() };
    let done = block_on(image.disk.repair(&io, &mut backup, &mut watch));
    watch.bar.end();
    let path = backup.path().map(Path::to_owned);
    match done {
        Ok(()) => Ok(Outcome { repaired: watch.repaired, left: watch.left, backup: path, refused: None }),
        Err(e) => {
            let failure = Failure::doing("repair", &e);
            Err(match path {
                Some(path) => {
                    let kept = path.display();
                    failure.hint(format_args!("what was changed until then is kept in {kept}; a second repair goes on"))
                }
                None if e.kind() == ErrorKind::NoSpace => failure.hint("nothing was changed"),
                None => failure,
            })
        }
    }
}

/// Puts back what a repair has changed.
pub(crate) fn undo(options: &LookOptions, backup: &Path) -> Result<()> {
    let undo = Undo::open(backup)?;
    let image = Opened::open_to_repair(options)?.map_err(|e| Failure::from_error(&e))?;
    let bytes = undo.run(&image.files, image.disk.info().content_id)?;
    crate::print(&format!("put back {bytes} bytes: the image is as it was before the repair\n"))
}

/// Which backup the options ask for.
pub(crate) fn wanted(file: Option<&PathBuf>, none: bool) -> Option<Wanted> {
    if none { Some(Wanted::None) } else { file.map(|path| Wanted::File(path.clone())) }
}

/// What to type to undo a repair.
pub(crate) fn how_to_undo(options: &LookOptions, backup: &Path) -> String {
    let quote = |path: &Path| {
        let text = path.display().to_string();
        let plain = text.chars().all(|c| c.is_ascii_alphanumeric() || "/._-+,=@%".contains(c));
        if plain && !text.starts_with('-') { text } else { format!("'{}'", text.replace('\'', "'\\''")) }
    };
    let overlay = options.overlay.as_ref().map_or_else(String::new, |o| format!("--overlay {} ", quote(o)));
    let size = fs::metadata(backup).map_or(0, |data| data.len());
    format!(
        "what was changed is kept in {} ({}): vdisk check --undo {} {overlay}{} puts it back\n",
        backup.display(),
        crate::size::human(size),
        quote(backup),
        quote(&options.image)
    )
}
