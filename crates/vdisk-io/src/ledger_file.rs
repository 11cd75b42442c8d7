//! A ledger in a mapped file: it outlives the process, and on a tmpfs not the power.

use memmap2::{MmapOptions, MmapRaw};
use nix::fcntl::{FallocateFlags, OFlag, fallocate};
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::sync::atomic::AtomicU64;
use vdisk_image::{LEDGER_WORDS, LedgerMemory};

const BYTES: usize = LEDGER_WORDS * size_of::<AtomicU64>();

/// A mapped file of [`LEDGER_WORDS`] words.
#[derive(Debug)]
pub struct LedgerFile(MmapRaw);

impl LedgerFile {
    /// Opens the file, or makes it. Its directory belongs to this user alone, or is writable by nobody else.
    ///
    /// # Errors
    ///
    /// The host's; [`io::ErrorKind::StorageFull`] if the file system has no room for it, and then no file is left that was not there.
    pub fn create(path: &Path) -> io::Result<Self> {
        match Self::options().create_new(true).open(path) {
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Self::open(path),
            Err(e) => Err(e),
            Ok(file) => Self::map(file).inspect_err(|_| {
                let _ = fs::remove_file(path);
            }),
        }
    }

    /// Opens the file if it is there.
    ///
    /// # Errors
    ///
    /// The host's.
    pub fn open(path: &Path) -> io::Result<Self> {
        Self::map(Self::options().open(path)?)
    }

    fn options() -> OpenOptions {
        let mut options = OpenOptions::new();
        options.read(true).write(true).mode(0o600).custom_flags(OFlag::O_NOFOLLOW.bits());
        options
    }

    fn map(file: File) -> io::Result<Self> {
        let data = file.metadata()?;
        if !data.is_file() || data.uid() != nix::unistd::geteuid().as_raw() {
            return Err(io::Error::new(io::ErrorKind::PermissionDenied, "is no file of this user"));
        }
        // All of it at once: a page that the file system had no room for would end the process when it is first touched.
        fallocate(&file, FallocateFlags::empty(), 0, BYTES as i64)?;
        Ok(Self(MmapOptions::new().len(BYTES).map_raw(&file)?))
    }
}

impl LedgerMemory for LedgerFile {
    #[expect(unsafe_code, reason = "shared memory")]
    fn words(&self) -> &[AtomicU64] {
        let start = self.0.as_mut_ptr().cast::<AtomicU64>();
        // SAFETY: the mapping has BYTES bytes as long as `self` is there, begins at a page and so is aligned, and any bits are
        // an AtomicU64. This process looks at it in no other way; others have no business in the file, and what they
        // did there would be no more than stores to atomics. The file is never cut: this user alone can open it.
        unsafe { std::slice::from_raw_parts(start, LEDGER_WORDS) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::Ordering;

    #[test]
    fn what_one_mapping_stores_the_next_one_finds() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ledger");
        assert_eq!(LedgerFile::open(&path).unwrap_err().kind(), io::ErrorKind::NotFound);
        let one = LedgerFile::create(&path).unwrap();
        assert!(one.words().len() == LEDGER_WORDS && one.words().iter().all(|w| w.load(Ordering::Relaxed) == 0));
        one.words()[LEDGER_WORDS - 1].store(7, Ordering::Relaxed);
        drop(one);
        let two = LedgerFile::open(&path).unwrap();
        assert_eq!(two.words()[LEDGER_WORDS - 1].load(Ordering::Relaxed), 7);
        assert_eq!(fs::metadata(&path).unwrap().len(), BYTES as u64);
    }

    #[test]
    fn a_link_is_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        let (path, other) = (dir.path().join("ledger"), dir.path().join("other"));
        fs::write(&other, "mine").unwrap();
        std::os::unix::fs::symlink(&other, &path).unwrap();
        assert!(LedgerFile::create(&path).is_err());
        assert_eq!(fs::read(&other).unwrap(), b"mine");
    }
}
