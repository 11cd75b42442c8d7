//! Where the ledger of an image is: in a directory that a power cut empties.

use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::process::geteuid;
use vdisk_image::{FileId, LedgerMemory};
use vdisk_io::{BlockingIo, FileSet, LedgerFile, block_on};

use crate::failure::{Failure, Result};
use crate::open::Opened;

/// The file of the ledger of an image that is open: named by what the image's first file is, whatever it is called.
fn path(files: &FileSet) -> Option<PathBuf> {
    let (_, first) = files.iter().find(|(id, _)| *id == FileId(0))?;
    let (dev, ino) = first.dev_and_ino()?;
    // What an earlier boot has left is not believed, wherever it lies: its data may be gone.
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
    Some(directory()?.join(format!("{}-{dev:x}-{ino:x}", boot.trim())))
}

/// Of root's images, or of another user's. `None`: there is no place that a power cut empties.
fn directory() -> Option<PathBuf> {
    let above = match geteuid().is_root() {
        true => PathBuf::from("/run/vdisk"),
        false => PathBuf::from(std::env::var_os("XDG_RUNTIME_DIR")?).join("vdisk"),
    };
    Some(above.join("ledgers"))
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
    DirBuilder::new().recursive(true).mode(0o700).create(directory)?;
    let data = fs::symlink_metadata(directory)?;
    match data.is_dir() && data.uid() == geteuid().as_raw() && data.mode() & 0o022 == 0 {
        true => Ok(()),
        false => Err(io::Error::new(io::ErrorKind::PermissionDenied, "is writable by others")),
    }
}

impl Opened {
    /// Takes over what a server that was killed has left of this image, and keeps a ledger from now on. Nothing serves the image
    /// yet. Answers what the user should know.
    pub(crate) fn keep_ledger(&mut self) -> Result<Option<String>> {
        if self.geometry().read_only {
            return Ok(self.left_behind());
        }
        let Some(path) = path(&self.files).filter(|_| self.disk.needs_ledger()) else { return Ok(None) };
        let opened = path.parent().map_or(Ok(()), make).and_then(|()| LedgerFile::create(&path));
        let memory: Arc<dyn LedgerMemory> = match opened {
            Ok(memory) => Arc::new(memory),
            Err(e) => {
                let why = crate::failure::chain(&e);
                return Ok(Some(format!(
                    "no ledger in {}: if this server is killed, what was not flushed is lost: {why}",
                    path.display()
                )));
            }
        };
        let io = BlockingIo::new(Arc::clone(&self.files));
        let Some(disk) = Arc::get_mut(&mut self.disk) else { return Ok(None) };
        let taken = block_on(disk.keep_ledger(&io, memory))
            .map_err(|e| Failure::doing("take over what a killed server has left", &e))?;
        self.ledger = Some(path);
        Ok((taken > 0).then(|| format!("took over {taken} grains that a killed server had not flushed")))
    }

    /// What a killed server has left of this image, which is only read now.
    pub(crate) fn left_behind(&self) -> Option<String> {
        let memory = LedgerFile::open(&path(&self.files)?).ok()?;
        let grains = self.disk.left_in(Arc::new(memory));
        (grains > 0).then(|| {
            format!("a killed server has left {grains} grains that are not in the image yet: run vdisk recover before the host is shut down")
        })
    }

    /// The image was closed: nothing is left.
    pub(crate) fn forget_ledger(&self) {
        if let Some(Err(e)) = self.ledger.as_ref().map(fs::remove_file) {
            tracing::warn!("remove the ledger: {e}");
        }
    }
}
