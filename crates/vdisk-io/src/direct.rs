//! I/O around the page cache: a second descriptor of a file, and what it demands.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::path::Path;

use nix::fcntl::{OFlag, open};
use nix::sys::stat::Mode;

use crate::buf::BUF_ALIGN;
use crate::transfer::Piece;

/// A descriptor opened with `O_DIRECT`. The locks stay with the buffered one.
#[derive(Debug)]
pub(crate) struct Direct {
    file: File,
    memory_align: u64,
    file_align: u64,
}

/// The smallest unit of requests in bytes.
const SECTOR: u64 = 512;

impl Direct {
    /// Opens the file of `buffered` once more; `None`, with a warning, where that cannot be done, or not for every sector.
    ///
    /// Requests come in sectors. Were some of them direct and their neighbours in the same page not, the page cache could not be
    /// kept in step: the kernel then fails the next fsync (seen on ext4: "Page cache invalidation failure on direct I/O").
    pub(crate) fn reopen(buffered: &File, path: &Path, writable: bool) -> Option<Self> {
        let access = if writable { OFlag::O_RDWR } else { OFlag::O_RDONLY };
        // The link leads to the very file, whatever its name has come to mean: proc_pid_fd(5).
        let link = format!("/proc/self/fd/{}", buffered.as_raw_fd());
        let flags = access | OFlag::O_DIRECT | OFlag::O_CLOEXEC;
        match open(link.as_str(), flags, Mode::empty()) {
            Ok(fd) => {
                let file = File::from(fd);
                let (memory_align, file_align) = alignment(&file);
                if file_align > SECTOR {
                    tracing::warn!(
                        "{}: direct I/O takes units of {file_align} bytes: using the page cache",
                        path.display()
                    );
                    return None;
                }
                Some(Self { file, memory_align, file_align })
            }
            Err(e) => {
                tracing::warn!("{}: no direct I/O, using the page cache: {e}", path.display());
                None
            }
        }
    }

    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// Whether memory, offset and length are aligned as the file wants.
    pub(crate) fn accepts(&self, piece: Piece) -> bool {
        (piece.start.addr() as u64).is_multiple_of(self.memory_align)
            && piece.offset.is_multiple_of(self.file_align)
            && u64::from(piece.len).is_multiple_of(self.file_align)
    }
}

/// Alignment in bytes of memory, and of offset and length: `STATX_DIOALIGN` (statx(2), since Linux 6.1), or else 4096,
/// the most that a file system is known to want.
fn alignment(file: &File) -> (u64, u64) {
    const SAFE: (u64, u64) = (BUF_ALIGN as u64, 4096);
    #[expect(unsafe_code, reason = "statx is not in nix")]
    // SAFETY: `statx` is a structure of integers: all zeroes is a value of it.
    let mut answer: libc::statx = unsafe { std::mem::zeroed() };
    #[expect(unsafe_code, reason = "statx is not in nix")]
    // SAFETY: the descriptor is open, the path a string ending in NUL, and `answer` a structure that may be written.
    let status = unsafe {
        libc::statx(file.as_raw_fd(), c"".as_ptr(), libc::AT_EMPTY_PATH, libc::STATX_DIOALIGN, &raw mut answer)
    };
    let told = status == 0 && answer.stx_mask & libc::STATX_DIOALIGN != 0;
    match (answer.stx_dio_mem_align, answer.stx_dio_offset_align) {
        (memory, file) if told && memory != 0 && file != 0 => (memory.into(), file.into()),
        _ => SAFE,
    }
}
