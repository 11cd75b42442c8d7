//! The engine on io_uring, whoever owns the ring.

use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use io_uring::{opcode, squeue, types};
use vdisk_image::{FileId, FileIo, Stored};

use crate::buf::Buf;
use crate::files::FileSet;
use crate::host_file::HostFile;
use crate::transfer::Direction;

/// Where operations are submitted: the queue thread's ring of libublk, or an [`crate::OwnRing`].
///
/// # Safety
///
/// An implementation drops `keep` only after the operation's completion was seen (or the SQE was never submitted), even
/// if the future is dropped before, for the kernel writes to that memory until then. When the ring itself goes first it
/// waits for the operations in flight, or leaks their buffers. [`Buf::get_mut`] depends on it too.
///
/// An SQE that the kernel has not got yet when its future is dropped is better never submitted: its descriptor may be
/// closed by then, and mean another file.
#[expect(unsafe_code, reason = "the kernel writes to buffers for as long as an implementation says")]
pub unsafe trait Ring {
    /// Submits one SQE (its `user_data` is the ring's to set) and gives its CQE's result: bytes or the like, or an errno
    /// negated. `keep` lives until then at least, even if the future is dropped.
    ///
    /// # Safety
    ///
    /// All memory that the SQE points to lies in `keep`, or stays valid until the completion by other means. Its
    /// descriptor is open as long as the future lives (once submitted, the kernel holds the file), or is a slot of the
    /// ring's table of files.
    unsafe fn submit(&self, sqe: squeue::Entry, keep: Option<Buf>) -> impl Future<Output = i32>;
}

/// [`FileIo`] on a ring: one operation of the kernel's for one of ours, more only for what the kernel cuts short.
///
/// # Slots
///
/// A ring may know some of the files by slots of its table (registered files), which saves the kernel a look-up per
/// operation. See [`UringIo::with_fixed`] for the numbering.
#[derive(Debug)]
pub struct UringIo<R: Ring> {
    ring: R,
    files: Arc<FileSet>,
    first_slot: u32,
    count: u32,
}

impl<R: Ring> UringIo<R> {
    /// An engine that addresses every file by its descriptor.
    pub fn new(ring: R, files: Arc<FileSet>) -> Self {
        Self::with_fixed(ring, files, 0, 0)
    }

    /// An engine whose first `count` files were registered with the ring, from `first_slot` of its table on: exactly the
    /// descriptors of [`FileSet::fixed_fds`] with that `count`, in that order. File `n` is in slot `first_slot + n`, its
    /// descriptor for direct I/O in slot `first_slot + count + n`. Other files are addressed by descriptor.
    pub fn with_fixed(ring: R, files: Arc<FileSet>, first_slot: u32, count: u32) -> Self {
        Self { ring, files, first_slot, count }
    }

    /// The ring.
    pub fn ring(&self) -> &R {
        &self.ring
    }

    /// The files.
    pub fn files(&self) -> &Arc<FileSet> {
        &self.files
    }

    async fn transfer(
        &self,
        file: FileId,
        direction: Direction,
        buf: &Buf,
        part: Range<usize>,
        offset: u64,
    ) -> io::Result<()> {
        let host_file = self.files.find(file)?;
        let mut transfer = host_file.transfer(direction, buf, part, offset)?;
        while let Some(piece) = transfer.next_piece() {
            let direct = host_file.is_direct(piece);
            let (fd, flags) = self.address(file, host_file, direct);
            let sqe = match transfer.direction {
                Direction::Read => opcode::Read::new(fd, piece.start, piece.len).offset(piece.offset).build(),
                Direction::Write => opcode::Write::new(fd, piece.start, piece.len).offset(piece.offset).build(),
            };
            #[expect(unsafe_code, reason = "an operation on memory")]
            // SAFETY: the memory lies in `buf` (`Transfer::next_piece`), of which the ring keeps a handle. The descriptor
            // belongs to a file of the set, which `self` keeps and the future borrows.
            let answer = unsafe { self.ring.submit(sqe.flags(flags), Some(buf.clone())) }.await;
            transfer.advance(piece, direct, answer.into()).map_err(|e| host_file.failed(piece, e))?;
        }
        Ok(())
    }

    /// An operation without memory: its errno, if it failed.
    async fn control(&self, file: FileId, f: &HostFile, sqe: impl Fn(types::Fd) -> squeue::Entry) -> Result<(), i32> {
        let (fd, flags) = self.address(file, f, false);
        loop {
            #[expect(unsafe_code, reason = "an operation on a file")]
            // SAFETY: the operation (fsync, fallocate) has no memory; the descriptor as in `transfer`.
            let answer = unsafe { self.ring.submit(sqe(fd).flags(flags), None) }.await;
            match answer {
                0.. => return Ok(()),
                _ if answer == -libc::EINTR => {}
                _ => return Err(-answer),
            }
        }
    }

    async fn fallocate(&self, file: FileId, how: i32, offset: u64, len: u64) -> io::Result<()> {
        let f = self.files.find(file)?;
        let offset = f.locate_change(offset, len)?;
        if len == 0 {
            return Ok(());
        }
        let mode = how | libc::FALLOC_FL_KEEP_SIZE;
        let sqe = |fd| opcode::Fallocate::new(fd, len).offset(offset).mode(mode).build();
        self.control(file, f, sqe).await.map_err(|errno| f.fallocate_error(errno))
    }

    /// How an SQE names the file: a descriptor, or a slot and the flag that says so.
    fn address(&self, file: FileId, f: &HostFile, direct: bool) -> (types::Fd, squeue::Flags) {
        if file.0 < self.count {
            let slot = self.first_slot + file.0 + if direct { self.count } else { 0 };
            // Tables of files are far smaller than 2^31: io_uring/rsrc.c, IORING_MAX_FIXED_FILES.
            return (types::Fd(slot.cast_signed()), squeue::Flags::FIXED_FILE);
        }
        let fd: RawFd = f.direct_fd().filter(|_| direct).unwrap_or(f.buffered_fd()).as_raw_fd();
        (types::Fd(fd), squeue::Flags::empty())
    }
}

impl<R: Ring> FileIo for UringIo<R> {
    type Buf = Buf;

    buf_methods!();

    async fn read_at(&self, file: FileId, buf: &Buf, part: Range<usize>, offset: u64) -> io::Result<()> {
        self.transfer(file, Direction::Read, buf, part, offset).await
    }

    async fn write_at(&self, file: FileId, buf: &Buf, part: Range<usize>, offset: u64) -> io::Result<()> {
        self.transfer(file, Direction::Write, buf, part, offset).await
    }

    async fn sync_data(&self, file: FileId) -> io::Result<()> {
        let f = self.files.find(file)?;
        let sqe = |fd| opcode::Fsync::new(fd).flags(types::FsyncFlags::DATASYNC).build();
        self.control(file, f, sqe).await.map_err(io::Error::from_raw_os_error)?;
        f.check_whole()
    }

    async fn punch_hole(&self, file: FileId, offset: u64, len: u64) -> io::Result<()> {
        self.fallocate(file, libc::FALLOC_FL_PUNCH_HOLE, offset, len).await
    }

    async fn zero_range(&self, file: FileId, offset: u64, len: u64) -> io::Result<()> {
        self.fallocate(file, libc::FALLOC_FL_ZERO_RANGE, offset, len).await
    }

    async fn reserve(&self, file: FileId, offset: u64, len: u64) -> io::Result<()> {
        self.fallocate(file, 0, offset, len).await
    }

    /// A plain lseek(2): io_uring has none, and it waits for no disk but to read the file system's own tables.
    async fn stored_at(&self, file: FileId, offset: u64) -> io::Result<Stored> {
        Ok(self.files.find(file)?.stored_at(offset))
    }

    /// A plain ftruncate(2), which blocks: `IORING_OP_FTRUNCATE` came with Linux 6.9, and a file grows rarely.
    async fn set_len(&self, file: FileId, len: u64) -> io::Result<()> {
        self.files.find(file)?.set_len(len)
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::collections::VecDeque;

    use super::*;
    use crate::{HostFiles, OpenMode, block_on};

    /// Answers as it was told to, without asking the kernel.
    struct Script(RefCell<VecDeque<i32>>);

    #[expect(unsafe_code, reason = "a test")]
    // SAFETY: the kernel gets nothing.
    unsafe impl Ring for Script {
        async unsafe fn submit(&self, _sqe: squeue::Entry, _keep: Option<Buf>) -> i32 {
            self.0.borrow_mut().pop_front().expect("no more operations than answers")
        }
    }

    fn scripted(answers: &[i32]) -> (UringIo<Script>, FileId, tempfile::NamedTempFile) {
        let image = tempfile::NamedTempFile::new().unwrap();
        let (files, id) = HostFiles::open(image.path(), OpenMode::default()).unwrap();
        (UringIo::new(Script(RefCell::new(answers.to_vec().into())), files.into_set()), id, image)
    }

    #[test]
    fn short_transfers_and_interruptions_are_continued() {
        let (io, id, _image) = scripted(&[3, -libc::EINTR, -libc::EAGAIN, 1, 6, 10]);
        let buf = Buf::new(10);
        block_on(io.read_at(id, &buf, 0..10, 0)).unwrap();
        block_on(io.write_at(id, &buf, 0..10, 0)).unwrap();
        assert!(io.ring().0.borrow().is_empty());
    }

    #[test]
    fn what_the_host_cannot_is_unsupported_and_other_errors_are_its_own() {
        let (io, id, _image) =
            scripted(&[-libc::EOPNOTSUPP, -libc::ENOSYS, -libc::EINTR, 0, -libc::EIO, -libc::ENOSPC]);
        assert_eq!(block_on(io.punch_hole(id, 0, 1)).unwrap_err().kind(), io::ErrorKind::Unsupported);
        assert_eq!(block_on(io.zero_range(id, 0, 1)).unwrap_err().kind(), io::ErrorKind::Unsupported);
        block_on(io.sync_data(id)).unwrap();
        assert_eq!(block_on(io.sync_data(id)).unwrap_err().raw_os_error(), Some(libc::EIO));
        assert_eq!(block_on(io.zero_range(id, 0, 1)).unwrap_err().raw_os_error(), Some(libc::ENOSPC));
    }
}
