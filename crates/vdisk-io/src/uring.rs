//! The engine on io_uring, whoever owns the ring.

use std::io;
use std::marker::PhantomData;
use std::ops::Range;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use io_uring::{opcode, squeue, types};
use vdisk_image::{FileId, FileIo, Stored};

use crate::buf::Buf;
use crate::compute::compute;
use crate::files::FileSet;
use crate::host_file::HostFile;
use crate::pages::{Kind, RingBuf};
use crate::transfer::{Direction, Piece};

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
///
/// # Buffers
///
/// Memory ([`Buf`]), or for a queue of ublk also the pages of its requests ([`crate::RequestBuf`]).
#[derive(Debug)]
pub struct UringIo<R: Ring, B: RingBuf = Buf> {
    ring: R,
    files: Arc<FileSet>,
    first_slot: u32,
    count: u32,
    buffers: PhantomData<fn(B)>,
}

impl<R: Ring> UringIo<R> {
    /// An engine that addresses every file by its descriptor.
    pub fn new(ring: R, files: Arc<FileSet>) -> Self {
        Self::with_fixed(ring, files, 0, 0)
    }
}

impl<R: Ring, B: RingBuf> UringIo<R, B> {
    /// An engine whose first `count` files were registered with the ring, from `first_slot` of its table on: exactly the
    /// descriptors of [`FileSet::fixed_fds`] with that `count`, in that order. File `n` is in slot `first_slot + n`, its
    /// descriptor for direct I/O in slot `first_slot + count + n`. Other files are addressed by descriptor.
    pub fn with_fixed(ring: R, files: Arc<FileSet>, first_slot: u32, count: u32) -> Self {
        Self { ring, files, first_slot, count, buffers: PhantomData }
    }

    /// The ring.
    pub fn ring(&self) -> &R {
        &self.ring
    }

    /// The files.
    pub fn files(&self) -> &Arc<FileSet> {
        &self.files
    }

    async fn transfer<T: RingBuf>(
        &self,
        file: FileId,
        direction: Direction,
        buf: &T,
        part: Range<usize>,
        offset: u64,
    ) -> io::Result<()> {
        let host_file = self.files.find(file)?;
        let start = part.start;
        let mut transfer = host_file.transfer(direction, buf, part, offset)?;
        while let Some(piece) = transfer.next_piece() {
            let direct = host_file.is_direct(piece);
            let (fd, flags) = self.address(file, host_file, direct);
            let (sqe, keep) = match buf.kind() {
                Kind::Memory(memory) => (in_memory(direction, fd, piece), Some(memory.clone())),
                Kind::Registered(pages) => (in_pages(direction, fd, piece, pages.index()), None),
            };
            #[expect(unsafe_code, reason = "an operation on memory")]
            // SAFETY: the memory lies in the buffer (`Transfer::next_piece`), of which the ring keeps a handle; of registered
            // pages the kernel itself takes a reference, and the address is an offset that it checks (io_import_fixed). The
            // descriptor belongs to a file of the set, which `self` keeps and the future borrows.
            let answer = unsafe { self.ring.submit(sqe.flags(flags), keep) }.await;
            if answer == -libc::EINVAL && direct && matches!(buf.kind(), Kind::Registered(_)) {
                let rest = transfer.rest();
                let offset = offset + (rest.start - start) as u64;
                return Box::pin(self.bounce(file, direction, buf, rest, offset)).await;
            }
            transfer.advance(piece, direct, answer.into()).map_err(|e| host_file.failed(piece, e))?;
        }
        Ok(())
    }

    /// Moves a part of a request's pages by way of memory. The pages are those of whoever made the request (O_DIRECT), who may align
    /// them to 4 bytes; the file's device may want more. Not through the page cache: see `Direct::reopen`.
    async fn bounce<T: RingBuf>(
        &self,
        file: FileId,
        direction: Direction,
        buf: &T,
        part: Range<usize>,
        offset: u64,
    ) -> io::Result<()> {
        let mut memory = Buf::new(part.len());
        let all = 0..part.len();
        if direction == Direction::Write {
            buf.copy_out(part.start, memory.get_mut().expect("no operation is in flight"))?;
        }
        self.transfer(file, direction, &memory, all, offset).await?;
        if direction == Direction::Read {
            buf.copy_in(part.start, memory.get_mut().expect("no operation is in flight"))?;
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

fn in_memory(direction: Direction, fd: types::Fd, piece: Piece) -> squeue::Entry {
    let Piece { start, len, offset, .. } = piece;
    match direction {
        Direction::Read => opcode::Read::new(fd, start, len).offset(offset).build(),
        Direction::Write => opcode::Write::new(fd, start, len).offset(offset).build(),
    }
}

fn in_pages(direction: Direction, fd: types::Fd, piece: Piece, index: u16) -> squeue::Entry {
    let Piece { start, len, offset, .. } = piece;
    match direction {
        Direction::Read => opcode::ReadFixed::new(fd, start, len, index).offset(offset).build(),
        Direction::Write => opcode::WriteFixed::new(fd, start, len, index).offset(offset).build(),
    }
}

impl<R: Ring, B: RingBuf> FileIo for UringIo<R, B> {
    type Buf = B;

    fn alloc(&self, len: usize) -> B {
        B::alloc(len)
    }

    fn copy_in(&self, buf: &B, at: usize, bytes: &[u8]) -> io::Result<()> {
        buf.copy_in(at, bytes)
    }

    fn copy_out(&self, buf: &B, at: usize, bytes: &mut [u8]) -> io::Result<()> {
        buf.copy_out(at, bytes)
    }

    fn fill_zero(&self, buf: &B, part: Range<usize>) -> io::Result<()> {
        buf.fill_zero(part)
    }

    async fn read_at(&self, file: FileId, buf: &B, part: Range<usize>, offset: u64) -> io::Result<()> {
        self.transfer(file, Direction::Read, buf, part, offset).await
    }

    async fn write_at(&self, file: FileId, buf: &B, part: Range<usize>, offset: u64) -> io::Result<()> {
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

    async fn reserve_fresh(&self, file: FileId, offset: u64, len: u64) -> io::Result<()> {
        let f = self.files.find(file)?;
        if let Some(how) = f.write_zeroes_mode(len) {
            let at = f.locate_change(offset, len)?;
            let sqe = |fd| opcode::Fallocate::new(fd, len).offset(at).mode(how).build();
            match self.control(file, f, sqe).await {
                Ok(()) => return Ok(()),
                Err(errno) => f.write_zeroes_failed(errno)?,
            }
        }
        self.reserve(file, offset, len).await
    }

    /// A plain lseek(2): io_uring has none, and it waits for no disk but to read the file system's own tables.
    async fn stored_at(&self, file: FileId, offset: u64) -> io::Result<Stored> {
        Ok(self.files.find(file)?.stored_at(offset))
    }

    /// A plain ftruncate(2), which blocks: `IORING_OP_FTRUNCATE` came with Linux 6.9, and a file grows rarely.
    async fn set_len(&self, file: FileId, len: u64) -> io::Result<()> {
        self.files.find(file)?.set_len(len)
    }

    async fn compute<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> T {
        compute(work).await
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::collections::VecDeque;

    use std::os::unix::fs::FileExt;
    use std::rc::Rc;

    use super::*;
    use crate::{HostFiles, OpenMode, Pages, RequestBuf, block_on};

    /// Answers as it was told to, without asking the kernel. Keeps which operations came, and with what in their memory.
    struct Script(RefCell<VecDeque<i32>>, RefCell<Vec<(u32, Vec<u8>)>>);

    #[expect(unsafe_code, reason = "a test")]
    // SAFETY: the kernel gets nothing.
    unsafe impl Ring for Script {
        async unsafe fn submit(&self, sqe: squeue::Entry, keep: Option<Buf>) -> i32 {
            let mut bytes = vec![0; keep.as_ref().map_or(0, Buf::len)];
            if let Some(buf) = keep {
                buf.copy_out(0, &mut bytes);
            }
            self.1.borrow_mut().push((sqe.get_opcode(), bytes));
            self.0.borrow_mut().pop_front().expect("no more operations than answers")
        }
    }

    /// The file is there as long as its handle: the engine does not write to one that was removed.
    fn scripted<B: RingBuf>(answers: &[i32], direct_io: bool) -> (UringIo<Script, B>, FileId, tempfile::NamedTempFile) {
        let image = tempfile::NamedTempFile::new().unwrap();
        let (files, id) = HostFiles::open(image.path(), OpenMode { direct_io, ..OpenMode::default() }).unwrap();
        let script = Script(RefCell::new(answers.to_vec().into()), RefCell::default());
        (UringIo::with_fixed(script, files.into_set(), 0, 0), id, image)
    }

    /// The pages of a request of these bytes, and the file through which they are seen.
    fn pages(bytes: &[u8]) -> (RequestBuf, Rc<std::fs::File>) {
        let file = Rc::new(tempfile::tempfile().unwrap());
        file.write_all_at(bytes, 0).unwrap();
        (RequestBuf::Pages(Pages::new(0, bytes.len(), Rc::clone(&file), 0)), file)
    }

    #[test]
    fn pages_are_moved_where_they_are_and_what_is_short_is_continued() {
        let (io, id, _image) = scripted(&[512, -libc::EINTR, 3584, 4096], false);
        let (buf, _) = pages(&[7; 4096]);
        block_on(io.read_at(id, &buf, 0..4096, 0)).unwrap();
        block_on(io.write_at(id, &buf, 0..4096, 0)).unwrap();
        let operations = io.ring().1.borrow();
        let codes: Vec<u8> = operations.iter().map(|(code, _)| u8::try_from(*code).unwrap()).collect();
        let (read, write) = (opcode::ReadFixed::CODE, opcode::WriteFixed::CODE);
        assert_eq!(codes, [read, read, read, write]);
    }

    #[test]
    fn pages_that_direct_io_refuses_are_moved_by_way_of_memory() {
        let (io, id, _image) = scripted(&[512, -libc::EINVAL, 3584, -libc::EINVAL, 4096], true);
        if io.files().get(id).direct_fd().is_none() {
            println!("skipped: no direct I/O here");
            return;
        }
        let (buf, file) = pages(&[7; 4096]);
        // The script's memory is zeroes.
        block_on(io.read_at(id, &buf, 0..4096, 0)).unwrap();
        let mut bytes = [1; 4096];
        file.read_exact_at(&mut bytes, 0).unwrap();
        assert!(bytes[..512].iter().all(|b| *b == 7) && bytes[512..].iter().all(|b| *b == 0));
        file.write_all_at(&[9; 4096], 0).unwrap();
        block_on(io.write_at(id, &buf, 0..4096, 0)).unwrap();
        let operations = io.ring().1.borrow();
        let codes: Vec<u8> = operations.iter().map(|(code, _)| u8::try_from(*code).unwrap()).collect();
        let (fixed_read, fixed_write) = (opcode::ReadFixed::CODE, opcode::WriteFixed::CODE);
        assert_eq!(codes, [fixed_read, fixed_read, opcode::Read::CODE, fixed_write, opcode::Write::CODE]);
        assert_eq!(operations[4].1, [9; 4096], "what was written is the pages'");
    }

    #[test]
    fn pages_refused_by_a_cached_file_are_an_error() {
        let (io, id, _image) = scripted(&[-libc::EINVAL], false);
        let (buf, _) = pages(&[7; 512]);
        let e = block_on(io.read_at(id, &buf, 0..512, 0)).unwrap_err();
        assert_eq!(e.raw_os_error(), Some(libc::EINVAL));
    }

    #[test]
    fn short_transfers_and_interruptions_are_continued() {
        let (io, id, _image) = scripted::<Buf>(&[3, -libc::EINTR, -libc::EAGAIN, 1, 6, 10], false);
        let buf = Buf::new(10);
        block_on(io.read_at(id, &buf, 0..10, 0)).unwrap();
        block_on(io.write_at(id, &buf, 0..10, 0)).unwrap();
        assert!(io.ring().0.borrow().is_empty());
    }

    #[test]
    fn what_the_host_cannot_is_unsupported_and_other_errors_are_its_own() {
        let answers = [-libc::EOPNOTSUPP, -libc::ENOSYS, -libc::EINTR, 0, -libc::EIO, -libc::ENOSPC];
        let (io, id, _image) = scripted::<Buf>(&answers, false);
        assert_eq!(block_on(io.punch_hole(id, 0, 1)).unwrap_err().kind(), io::ErrorKind::Unsupported);
        assert_eq!(block_on(io.zero_range(id, 0, 1)).unwrap_err().kind(), io::ErrorKind::Unsupported);
        block_on(io.sync_data(id)).unwrap();
        assert_eq!(block_on(io.sync_data(id)).unwrap_err().raw_os_error(), Some(libc::EIO));
        assert_eq!(block_on(io.zero_range(id, 0, 1)).unwrap_err().raw_os_error(), Some(libc::ENOSPC));
    }
}
