//! The seam to the kernel. Real files, memory, faults and power cuts plug in here; the image knows nothing else.

#![allow(async_fn_in_trait, reason = "the futures stay on the thread that made them: no Send is wanted")]

use std::io;
use std::ops::Range;

/// A file of the image: the descriptor's, an extent's. A number that means something to one [`FileIo`] only.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FileId(pub u32);

/// Positioned I/O on the files of an image, from one thread.
///
/// Every operation is whole or failed: an engine continues short transfers and interrupted calls by itself. Offsets and
/// lengths are in bytes and need no alignment. Errors are the host's own, without context: the caller knows it better.
///
/// An engine's futures must be polled to the end once they were polled at all.
pub trait FileIo {
    /// A buffer. A handle only: it may stand for memory that this process cannot touch (a request's pages in the
    /// kernel), so its bytes go in and out through the engine.
    type Buf;

    /// A zeroed buffer of `len` bytes in this process's own memory, for tables and headers.
    fn alloc(&self, len: usize) -> Self::Buf;

    /// Stores `bytes` in the buffer from byte `at` on. As the next two it takes no longer than a copy; it can only fail for a
    /// buffer that is not this process's own memory.
    fn copy_in(&self, buf: &Self::Buf, at: usize, bytes: &[u8]) -> io::Result<()>;

    /// Reads bytes of the buffer from byte `at` on.
    fn copy_out(&self, buf: &Self::Buf, at: usize, bytes: &mut [u8]) -> io::Result<()>;

    /// Zeroes a part of the buffer.
    fn fill_zero(&self, buf: &Self::Buf, part: Range<usize>) -> io::Result<()>;

    /// Reads into `part` of the buffer. The end of the file is [`io::ErrorKind::UnexpectedEof`].
    async fn read_at(&self, file: FileId, buf: &Self::Buf, part: Range<usize>, offset: u64) -> io::Result<()>;

    /// Writes `part` of the buffer; extends the file if need be. Not durable before [`FileIo::sync_data`].
    async fn write_at(&self, file: FileId, buf: &Self::Buf, part: Range<usize>, offset: u64) -> io::Result<()>;

    /// Makes what was written durable, and the file's length (fdatasync).
    async fn sync_data(&self, file: FileId) -> io::Result<()>;

    /// Gives the host's space back; the range reads as zeroes, the file's length stays.
    /// [`io::ErrorKind::Unsupported`] where the host's file system cannot.
    async fn punch_hole(&self, file: FileId, offset: u64, len: u64) -> io::Result<()>;

    /// The range reads as zeroes and stays allocated; the file's length stays.
    /// [`io::ErrorKind::Unsupported`] where the host's file system cannot.
    async fn zero_range(&self, file: FileId, offset: u64, len: u64) -> io::Result<()>;

    /// Takes the host's space for the range, so that later writes to it cannot find the host full. The bytes and the file's
    /// length stay. [`io::ErrorKind::Unsupported`] where the host's file system cannot.
    async fn reserve(&self, file: FileId, offset: u64, len: u64) -> io::Result<()>;

    /// As [`FileIo::reserve`], for a range at the end of the file that was never written: where the disk below can unmap and promise zeroes
    /// by one command, the file system may take it as written, so that what comes there later costs it less. Bytes that are there would be
    /// lost, and bytes that come there while it runs: the future is not to be dropped before its end.
    async fn reserve_fresh(&self, file: FileId, offset: u64, len: u64) -> io::Result<()> {
        self.reserve(file, offset, len).await
    }

    /// How the host stores what begins at `offset`. A hint: a host that does not tell has data everywhere.
    async fn stored_at(&self, file: FileId, offset: u64) -> io::Result<Stored>;

    /// Cuts or extends (by a hole) the file.
    async fn set_len(&self, file: FileId, len: u64) -> io::Result<()>;

    /// Does work that takes far longer than a copy: on another processor, where the engine has more than this thread.
    async fn compute<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> T {
        work()
    }
}

/// Bytes of a file, through a buffer of its own.
///
/// # Errors
///
/// As of [`FileIo::read_at`].
pub(crate) async fn read_bytes<I: FileIo>(io: &I, file: FileId, at: u64, len: usize) -> io::Result<Vec<u8>> {
    let buf = io.alloc(len);
    io.read_at(file, &buf, 0..len, at).await?;
    let mut bytes = vec![0; len];
    io.copy_out(&buf, 0, &mut bytes)?;
    Ok(bytes)
}

/// A stretch of a file that is all data or all hole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stored {
    /// Takes no space on the host, and reads as zeroes.
    pub hole: bool,
    /// Bytes, at least one. The last stretch of a file may be longer than it.
    pub len: u64,
}

/// The gate through which an image opens the files that it names. Names inside an image are hostile: the gate decides
/// which ones may be followed.
pub trait Files: FileIo {
    /// Opens a file that the file `by` names, as it is written there.
    ///
    /// # Errors
    ///
    /// The host's; [`io::ErrorKind::PermissionDenied`] also for a name that leaves the directory of `by`.
    fn open(&self, by: FileId, name: &str, writable: bool) -> io::Result<FileId>;

    /// Opens the parent of the image whose descriptor is in `by`, to be read. `hint` may be a path of another host or system: what
    /// it ends in is looked for beside `by` too.
    ///
    /// # Errors
    ///
    /// The host's, as of [`Files::open`]; also if the parent is a file of the chain already.
    fn open_parent(&self, by: FileId, hint: &str) -> io::Result<FileId>;

    /// Length in bytes.
    fn len(&self, file: FileId) -> io::Result<u64>;

    /// What to call the file in messages.
    fn name(&self, file: FileId) -> String;
}
