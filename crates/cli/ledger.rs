//! Where the ledger of an image is: in a directory that a power cut empties.

use std::fs::{self, DirBuilder, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::process::geteuid;
use vdisk_image::{FileId, LedgerMemory, is_ledger_empty};
use vdisk_io::{BlockingIo, FileSet, HostFile, LedgerFile, block_on};

use crate::failure::{Failure, Result};
use crate::open::Opened;
use crate::options::ImageOptions;
use crate::overlay::Overlay;

/// The file of the ledger of an image that is open: named by what the image's first file is, whatever it is called.
fn path(files: &FileSet) -> Option<PathBuf> {
    let (_, first) = files.iter().find(|(id, _)| *id == FileId(0))?;
    Some(directory()?.join(ledger_name(first)?))
}

fn ledger_name(file: &HostFile) -> Option<String> {
    let (dev, ino) = file.dev_and_ino()?;
    // What an earlier boot has left is not believed, wherever it lies: its data may be gone.
    Some(format!("{}-{dev:x}-{ino:x}", boot()?))
}

fn boot() -> Option<String> {
    Some(fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?.trim().to_owned())
}

/// Where the ledgers of root's servers are.
const ROOTS: &str = "/run/vdisk/ledgers";

/// Of root's images, or of another user's. `None`: there is no place that a power cut empties.
fn directory() -> Option<PathBuf> {
    match geteuid().is_root() {
        true => Some(PathBuf::from(ROOTS)),
        false => Some(PathBuf::from(std::env::var_os("XDG_RUNTIME_DIR")?).join("vdisk/ledgers")),
    }
}

/// Makes the directory for this user alone.
fn make(directory: &Path) -> io::Result<()> {
    if let Some(above) = directory.parent() {
        // Of the books, which all may read.
        if geteuid().is_root() {
            crate::state::StateDir::host().create().map_err(|e| io::Error::other(e.to_string()))?;
        } else {
            DirBuilder::new().recursive(true).mode(0o700).create(above)?;
        }
    }
    // Others may ask whether one is there, and no more.
    DirBuilder::new().recursive(true).mode(0o711).create(directory)?;
    fs::set_permissions(directory, Permissions::from_mode(0o711))?;
    let data = fs::symlink_metadata(directory)?;
    match data.is_dir() && data.uid() == geteuid().as_raw() && data.mode() & 0o022 == 0 {
        true => {
            sweep(directory);
            Ok(())
        }
        false => Err(io::Error::new(io::ErrorKind::PermissionDenied, "is writable by others")),
    }
}

/// Removes the ledgers of earlier boots, where the directory has outlived one.
fn sweep(directory: &Path) {
    let Some(boot) = boot() else { return };
    for file in fs::read_dir(directory).into_iter().flatten().flatten() {
        if !file.file_name().to_string_lossy().starts_with(&boot) {
            let _ = fs::remove_file(file.path());
        }
    }
}

/// A ledger that is there, of whatever server.
fn existing(path: &Path) -> Option<Arc<dyn LedgerMemory>> {
    LedgerFile::open(path).ok().map(|memory| Arc::new(memory) as Arc<dyn LedgerMemory>)
}

impl Opened {
    /// Takes over what a server that was killed has left of this image, and keeps a ledger from now on. Nothing serves the image
    /// yet. Answers what the user should know.
    pub(crate) fn keep_ledger(&mut self, options: &ImageOptions) -> Result<Vec<String>> {
        self.check_others()?;
        if self.geometry().read_only {
            return Ok(self.left_behind().into_iter().collect());
        }
        // A temporary overlay is gone with its server.
        if !self.disk.needs_ledger() || options.overlay == Some(Overlay::Temporary) {
            return Ok(Vec::new());
        }
        let no_ledger =
            |why: String| Ok(vec![format!("if this server is killed, what was not flushed is lost: {why}")]);
        let Some(path) = path(&self.files) else {
            return no_ledger("XDG_RUNTIME_DIR is not set, where the ledger would be".to_owned());
        };
        let memory: Arc<dyn LedgerMemory> =
            match path.parent().map_or(Ok(()), make).and_then(|()| LedgerFile::create(&path)) {
                Ok(memory) => Arc::new(memory),
                // What it holds would be lost by the first change.
                Err(e) if path.exists() => return Err(Failure::doing(format_args!("ledger {}", path.display()), &e)),
                Err(e) => return no_ledger(format!("{}: {}", path.display(), crate::failure::chain(&e))),
            };
        let io = BlockingIo::new(Arc::clone(&self.files));
        let Some(disk) = Arc::get_mut(&mut self.disk) else { return Ok(Vec::new()) };
        let taken = block_on(disk.keep_ledger(&io, memory))
            .map_err(|e| Failure::doing("take over what a killed server has left", &e))?;
        self.ledger = Some(path);
        let mut told = Vec::new();
        if taken.grains > 0 {
            told.push(format!("took over {} grains that a killed server had not flushed", taken.grains));
        }
        if taken.others {
            let why = "the image was closed or changed by another program since";
            told.push(format!("what a killed server had not flushed is lost: {why}"));
        }
        Ok(told)
    }

    /// Refuses to go on while acknowledged writes wait that this process cannot put into the image: those of a file that is only
    /// read here, and those of root's servers.
    fn check_others(&self) -> Result<()> {
        for (id, file) in self.files.iter() {
            let Some(name) = ledger_name(file) else { continue };
            let roots = Path::new(ROOTS).join(&name);
            let waits = match (id == FileId(0), geteuid().is_root()) {
                (true, true) => false,
                (false, _) => directory().and_then(|d| existing(&d.join(&name))).is_some_and(|m| !is_ledger_empty(m)),
                // Only whether it is there can be seen.
                (true, false) => !self.disk.info().clean && roots.exists(),
            };
            if waits {
                let what = format!(
                    "{}: was served by a process that was killed, and not all of it is in the file",
                    file.path().display()
                );
                let hint = if id == FileId(0) { "run vdisk recover as root" } else { "run vdisk recover on it" };
                return Err(Failure::new(what).hint(hint));
            }
        }
        Ok(())
    }

    /// Whether what a killed server has left does not fit this image any more.
    pub(crate) fn is_ledger_lost(&self) -> bool {
        path(&self.files).and_then(|path| existing(&path)).is_some_and(|memory| self.disk.is_lost(memory))
    }

    /// Refuses what is not to happen before everything that was acknowledged is in the image.
    pub(crate) fn check_recovered(&self) -> Result<()> {
        self.check_others()?;
        match self.left_behind() {
            Some(left) => Err(Failure::new(left)),
            None => Ok(()),
        }
    }

    /// Removes what an earlier server has left that does not count any more: with the same content ID it could count again, once the
    /// image is marked as open.
    pub(crate) fn forget_stale_ledger(&self) -> Result<()> {
        let name = self.files.iter().next().and_then(|(_, first)| ledger_name(first));
        if let Some(name) = name.filter(|name| !geteuid().is_root() && Path::new(ROOTS).join(name).exists()) {
            let what = format!("root's server of the image was killed, and has left {ROOTS}/{name}");
            return Err(Failure::new(what).hint("run vdisk recover as root"));
        }
        let Some(path) = path(&self.files).filter(|path| path.exists()) else { return Ok(()) };
        fs::remove_file(&path).map_err(|e| Failure::doing(format_args!("remove {}", path.display()), &e))
    }

    /// What a killed server has left of this image, which is only read now.
    pub(crate) fn left_behind(&self) -> Option<String> {
        let grains = self.disk.left_in(existing(&path(&self.files)?)?);
        (grains > 0).then(|| {
            format!("a killed server has left {grains} grains that are not in the image yet, and are not read here: run vdisk recover first, and before the host is shut down")
        })
    }

    /// The image was closed: nothing is left.
    pub(crate) fn forget_ledger(&self) {
        if let Some(Err(e)) = self.ledger.as_ref().map(fs::remove_file) {
            tracing::warn!("remove the ledger: {e}");
        }
    }
}
