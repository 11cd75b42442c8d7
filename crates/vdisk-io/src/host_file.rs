//! One open file of the host and the blocking calls on it.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use nix::fcntl::{FallocateFlags, fallocate};
use nix::unistd::{Whence, lseek64};

use vdisk_image::Stored;

use crate::buf::Buf;
use crate::direct::Direct;
use crate::locks::Locked;
use crate::pages::RingBuf;
use crate::transfer::{Direction, Piece, Transfer, check_range};
use crate::window::Window;

/// An open regular file or block device, or a member of an archive, which is a stretch of one. Its locks and descriptors
/// go with it; the members of an archive share theirs.
///
/// Every operation is whole or failed, blocks, and may run on any number of threads at once.
#[derive(Debug)]
pub struct HostFile {
    buffered: Arc<Locked>,
    direct: Option<Direct>,
    path: PathBuf,
    writable: bool,
    identity: Identity,
    /// For a member of an archive: where it is. Offsets of ours count from there.
    window: Option<Window>,
    /// It had a name in some directory when it was opened.
    had_name: bool,
    /// How long it is, if nobody else cuts it: it was opened so, or made so. 0 for what is not looked at.
    made_len: AtomicU64,
    /// Somebody else has cut it: what is missing would be zeroes once a write has made it longer.
    was_cut: AtomicBool,
    /// The kernel, the file system or the disk below has no command for it.
    cannot_write_zeroes: AtomicBool,
}

/// `FALLOC_FL_WRITE_ZEROES` of include/uapi/linux/falloc.h, since Linux 6.17.
const WRITE_ZEROES: i32 = 0x80;

/// What makes two open files the same: device and inode, or the number of the block device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Identity {
    Regular { dev: u64, ino: u64 },
    BlockDevice { rdev: u64 },
}

impl HostFile {
    /// Takes over a file that the gate let through.
    pub(crate) fn new(buffered: File, path: PathBuf, writable: bool, direct_io: bool) -> io::Result<Self> {
        let data = buffered.metadata()?;
        let identity = if data.file_type().is_block_device() {
            Identity::BlockDevice { rdev: data.rdev() }
        } else {
            Identity::Regular { dev: data.dev(), ino: data.ino() }
        };
        let direct = if direct_io { Direct::reopen(&buffered, &path, writable) } else { None };
        let regular = matches!(identity, Identity::Regular { .. });
        Ok(Self {
            buffered: Arc::new(Locked(buffered)),
            direct,
            path,
            writable,
            identity,
            window: None,
            had_name: regular && data.nlink() > 0,
            made_len: AtomicU64::new(if regular { data.len() } else { 0 }),
            was_cut: AtomicBool::new(false),
            cannot_write_zeroes: AtomicBool::new(false),
        })
    }

    /// A stretch of this file as a file of its own, read-only. `path` is what to call it.
    pub(crate) fn member(&self, window: Window, path: PathBuf) -> Self {
        let (buffered, identity) = (Arc::clone(&self.buffered), self.identity);
        let (made_len, was_cut, cannot_write_zeroes) = Default::default();
        Self {
            buffered,
            direct: None,
            path,
            writable: false,
            identity,
            window: Some(window),
            had_name: false,
            made_len,
            was_cut,
            cannot_write_zeroes,
        }
    }

    /// The path by which it was opened (for messages: it may have been renamed since). For a member of an archive the
    /// archive's, a colon and the member's name, which no call of the host understands.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether it was opened for writing.
    pub fn is_writable(&self) -> bool {
        self.writable
    }

    /// The descriptor for I/O through the page cache; it carries the locks. A member of an archive does not begin at its
    /// offset 0: only the engines here know where.
    pub fn buffered_fd(&self) -> BorrowedFd<'_> {
        self.file().as_fd()
    }

    pub(crate) fn file(&self) -> &File {
        &self.buffered.0
    }

    /// The descriptor for I/O around the page cache, if that was wanted and the file system can.
    pub fn direct_fd(&self) -> Option<BorrowedFd<'_>> {
        self.direct.as_ref().map(Direct::fd)
    }

    pub(crate) fn forget_direct(&mut self) {
        self.direct = None;
    }

    /// Equal for two that are the same file, and the same stretch of it.
    /// Device and inode; `None` for a block device, and for a member of an archive.
    pub fn dev_and_ino(&self) -> Option<(u64, u64)> {
        match (self.identity, self.window) {
            (Identity::Regular { dev, ino }, None) => Some((dev, ino)),
            _ => None,
        }
    }

    pub(crate) fn identity(&self) -> (Identity, Option<Window>) {
        (self.identity, self.window)
    }

    /// Length in bytes.
    ///
    /// # Errors
    ///
    /// The host's.
    pub fn len(&self) -> io::Result<u64> {
        match (self.window, self.identity) {
            (Some(window), _) => Ok(window.len()),
            (None, Identity::Regular { .. }) => Ok(self.file().metadata()?.len()),
            (None, Identity::BlockDevice { .. }) => Ok(lseek64(self.file(), 0, Whence::SeekEnd)?.cast_unsigned()),
        }
    }

    /// Length in bytes, of a file that somebody may have made longer on purpose: it counts as cut when it is shorter again.
    ///
    /// # Errors
    ///
    /// The host's.
    pub fn len_again(&self) -> io::Result<u64> {
        let len = self.len()?;
        if self.made_len.load(Ordering::Acquire) > 0 {
            self.made_len.fetch_max(len, Ordering::AcqRel);
        }
        Ok(len)
    }

    /// Whether the length is 0.
    ///
    /// # Errors
    ///
    /// The host's.
    pub fn is_empty(&self) -> io::Result<bool> {
        Ok(self.len()? == 0)
    }

    /// Bytes that the file takes on the host: what is allocated, holes left out. 0 for a block device. A member of an
    /// archive takes its length, for archives rarely have holes.
    ///
    /// # Errors
    ///
    /// The host's.
    pub fn space_used(&self) -> io::Result<u64> {
        // st_blocks counts 512 bytes whatever the block size: stat(3type).
        let all = self.file().metadata()?.blocks() * 512;
        Ok(self.window.map_or(all, |window| window.len().min(all)))
    }

    /// Reads into `part` of the buffer; see [`vdisk_image::FileIo::read_at`].
    ///
    /// # Errors
    ///
    /// The host's; [`io::ErrorKind::UnexpectedEof`] at the end of the file, [`io::ErrorKind::InvalidInput`] for a
    /// range that no file has.
    pub fn read_exact_at(&self, buf: &Buf, part: Range<usize>, offset: u64) -> io::Result<()> {
        self.run(self.transfer(Direction::Read, buf, part, offset)?)
    }

    /// Writes `part` of the buffer; see [`vdisk_image::FileIo::write_at`].
    ///
    /// # Errors
    ///
    /// The host's; [`io::ErrorKind::InvalidInput`] for a range that no file has.
    pub fn write_all_at(&self, buf: &Buf, part: Range<usize>, offset: u64) -> io::Result<()> {
        self.run(self.transfer(Direction::Write, buf, part, offset)?)
    }

    /// Makes what was written durable, and the length: fdatasync(2), which is also what makes a block device empty its
    /// write cache.
    ///
    /// # Errors
    ///
    /// The host's. A second call may then succeed although the data is lost (fsync(2), the note on errors). And if somebody
    /// else has cut the file, or nobody could find it any more once it is closed: nothing is durable then.
    pub fn sync_data(&self) -> io::Result<()> {
        self.file().sync_data()?;
        self.check_whole()
    }

    /// # Errors
    ///
    /// As of [`HostFile::sync_data`], beside the host's.
    pub(crate) fn check_whole(&self) -> io::Result<()> {
        if self.had_name || self.made_len.load(Ordering::Acquire) > 0 {
            let now = self.file().metadata()?;
            if now.len() < self.made_len.load(Ordering::Acquire) {
                self.was_cut.store(true, Ordering::Release);
            }
            if self.had_name && now.nlink() == 0 {
                let what = "the file was deleted, or another one took its name: what is written to it is lost when it is closed";
                return Err(io::Error::other(what));
            }
        }
        self.check_cut()
    }

    fn check_cut(&self) -> io::Result<()> {
        match self.was_cut.load(Ordering::Acquire) {
            false => Ok(()),
            true => Err(io::Error::other("the file was cut by another program: a part of it is missing")),
        }
    }

    /// The error of a transfer that failed at a piece. An end of the file where there was none says that it was cut.
    pub(crate) fn failed(&self, piece: Piece, e: io::Error) -> io::Error {
        if e.kind() == io::ErrorKind::UnexpectedEof && piece.offset < self.made_len.load(Ordering::Acquire) {
            self.was_cut.store(true, Ordering::Release);
            return self.check_cut().err().unwrap_or(e);
        }
        e
    }

    /// Frees the space; the range reads as zeroes: fallocate(2), `FALLOC_FL_PUNCH_HOLE`.
    ///
    /// # Errors
    ///
    /// [`io::ErrorKind::Unsupported`] where the file system (or the block device, for this range) cannot.
    pub fn punch_hole(&self, offset: u64, len: u64) -> io::Result<()> {
        self.fallocate(FallocateFlags::FALLOC_FL_PUNCH_HOLE, offset, len)
    }

    /// Zeroes the range, which stays allocated: fallocate(2), `FALLOC_FL_ZERO_RANGE`.
    ///
    /// # Errors
    ///
    /// [`io::ErrorKind::Unsupported`] where the file system (or the block device, for this range) cannot.
    pub fn zero_range(&self, offset: u64, len: u64) -> io::Result<()> {
        self.fallocate(FallocateFlags::FALLOC_FL_ZERO_RANGE, offset, len)
    }

    /// Takes space for the range, whose bytes stay: fallocate(2).
    ///
    /// # Errors
    ///
    /// [`io::ErrorKind::Unsupported`] where the file system cannot.
    pub fn reserve(&self, offset: u64, len: u64) -> io::Result<()> {
        self.fallocate(FallocateFlags::empty(), offset, len)
    }

    /// As [`vdisk_image::FileIo::reserve_fresh`].
    ///
    /// # Errors
    ///
    /// The host's.
    pub fn reserve_fresh(&self, offset: u64, len: u64) -> io::Result<()> {
        if let Some(how) = self.write_zeroes_mode(len) {
            match self.fallocate_as(FallocateFlags::from_bits_retain(how), offset, len)? {
                Ok(()) => return Ok(()),
                Err(errno) => self.write_zeroes_failed(errno)?,
            }
        }
        self.reserve(offset, len)
    }

    /// The mode of a fallocate(2) that writes zeroes to a part of the file by a command of the disk, if that may be tried.
    pub(crate) fn write_zeroes_mode(&self, len: u64) -> Option<i32> {
        (len > 0 && !self.cannot_write_zeroes.load(Ordering::Relaxed)).then_some(WRITE_ZEROES)
    }

    /// What to make of its failure. `Ok`: the kernel, the file system or the disk cannot do it, or not well, and is not asked again.
    pub(crate) fn write_zeroes_failed(&self, errno: i32) -> io::Result<()> {
        let e = self.fallocate_error(errno);
        if matches!(e.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded) {
            return Err(e);
        }
        if e.kind() != io::ErrorKind::Unsupported {
            tracing::info!("{}: zeroes are not written by the disk itself: {e}", self.path.display());
        }
        self.cannot_write_zeroes.store(true, Ordering::Relaxed);
        Ok(())
    }

    /// Where data and holes are: lseek(2), `SEEK_DATA` and `SEEK_HOLE`. All is data where the host does not tell.
    pub fn stored_at(&self, offset: u64) -> Stored {
        match self.window {
            Some(window) => window.stored_at(offset, |offset| self.stored_in_file_at(offset)),
            None => self.stored_in_file_at(offset),
        }
    }

    /// As [`HostFile::stored_at`], but the offset is the host's.
    fn stored_in_file_at(&self, offset: u64) -> Stored {
        let seek = |whence| lseek64(self.file(), offset.cast_signed(), whence).map(i64::cast_unsigned);
        match seek(Whence::SeekData) {
            Ok(data) if data > offset => Stored { hole: true, len: data - offset },
            Ok(_) => match seek(Whence::SeekHole) {
                Ok(hole) if hole > offset => Stored { hole: false, len: hole - offset },
                _ => Stored { hole: false, len: u64::MAX - offset },
            },
            // Past the last data.
            Err(nix::errno::Errno::ENXIO) => Stored { hole: true, len: u64::MAX - offset },
            Err(_) => Stored { hole: false, len: u64::MAX - offset },
        }
    }

    /// Cuts or extends the file: ftruncate(2).
    ///
    /// # Errors
    ///
    /// The host's; a block device refuses, and so does a member of an archive.
    pub fn set_len(&self, len: u64) -> io::Result<()> {
        self.locate_change(0, len)?;
        self.file().set_len(len)?;
        self.made_len.store(len, Ordering::Release);
        Ok(())
    }

    /// What to do for a read or write. Here, and in [`HostFile::locate_change`], an offset of ours becomes one of the
    /// host's, for every engine.
    ///
    /// # Errors
    ///
    /// As of [`HostFile::read_exact_at`] and [`HostFile::write_all_at`], as far as they can be known before.
    pub(crate) fn transfer<'a, B: RingBuf>(
        &self,
        direction: Direction,
        buf: &'a B,
        part: Range<usize>,
        offset: u64,
    ) -> io::Result<Transfer<'a, B>> {
        let len = part.len() as u64;
        // A file that is only read is not made longer by us: what is still there is as it was.
        if self.writable {
            self.check_cut()?;
        }
        let offset = match direction {
            Direction::Read => self.locate(offset, len)?,
            Direction::Write => self.locate_change(offset, len)?,
        };
        Transfer::new(direction, buf, part, offset)
    }

    fn locate(&self, offset: u64, len: u64) -> io::Result<u64> {
        check_range(offset, len)?;
        self.window.map_or(Ok(offset), |window| window.locate(offset, len))
    }

    /// The host's offset of bytes that are to be changed.
    ///
    /// # Errors
    ///
    /// [`io::ErrorKind::InvalidInput`] for a range that no file has, [`io::ErrorKind::ReadOnlyFilesystem`] for a member
    /// of an archive: changed bytes would make its checksums wrong, and another length the whole archive.
    pub(crate) fn locate_change(&self, offset: u64, len: u64) -> io::Result<u64> {
        check_range(offset, len)?;
        match self.window {
            None => Ok(offset),
            Some(_) => Err(io::Error::new(
                io::ErrorKind::ReadOnlyFilesystem,
                format!("{}: a member of an archive is not written to", self.path.display()),
            )),
        }
    }

    /// The descriptor to use for a piece: the direct one if there is one and the piece is aligned as it wants.
    pub(crate) fn is_direct(&self, piece: Piece) -> bool {
        piece.may_be_direct && self.direct.as_ref().is_some_and(|d| d.accepts(piece))
    }

    /// The error of a failed fallocate(2).
    pub(crate) fn fallocate_error(&self, errno: i32) -> io::Error {
        let block_device = matches!(self.identity, Identity::BlockDevice { .. });
        match errno {
            libc::EOPNOTSUPP | libc::ENOSYS | libc::ENODEV => io::ErrorKind::Unsupported.into(),
            // blkdev_fallocate (block/fops.c) refuses what is not aligned to logical blocks.
            libc::EINVAL if block_device => io::ErrorKind::Unsupported.into(),
            _ => io::Error::from_raw_os_error(errno),
        }
    }

    fn fallocate(&self, how: FallocateFlags, offset: u64, len: u64) -> io::Result<()> {
        if len == 0 {
            return self.locate_change(offset, len).map(drop);
        }
        let answer = self.fallocate_as(how | FallocateFlags::FALLOC_FL_KEEP_SIZE, offset, len)?;
        answer.map_err(|errno| self.fallocate_error(errno))
    }

    /// One fallocate(2): its errno, if it failed.
    fn fallocate_as(&self, how: FallocateFlags, offset: u64, len: u64) -> io::Result<Result<(), i32>> {
        let offset = self.locate_change(offset, len)?;
        loop {
            match fallocate(self.file(), how, offset.cast_signed(), len.cast_signed()) {
                Err(nix::errno::Errno::EINTR) => {}
                answer => return Ok(answer.map_err(|e| e as i32)),
            }
        }
    }

    fn run(&self, transfer: Transfer<'_>) -> io::Result<()> {
        self.run_by(transfer, call)
    }

    fn run_by(
        &self,
        mut transfer: Transfer<'_>,
        mut call: impl FnMut(Direction, BorrowedFd<'_>, Piece) -> i64,
    ) -> io::Result<()> {
        while let Some(piece) = transfer.next_piece() {
            let direct = self.is_direct(piece);
            let fd = self.direct_fd().filter(|_| direct).unwrap_or(self.buffered_fd());
            transfer.advance(piece, direct, call(transfer.direction, fd, piece)).map_err(|e| self.failed(piece, e))?;
        }
        Ok(())
    }
}

/// One pread(2) or pwrite(2): bytes, or an errno negated.
fn call(direction: Direction, fd: BorrowedFd<'_>, piece: Piece) -> i64 {
    let fd = fd.as_raw_fd();
    let Piece { start, len, offset, .. } = piece;
    // `Transfer::new` saw to it that the offset is below 2^63.
    let (len, offset) = (len as usize, offset.cast_signed());
    #[expect(unsafe_code, reason = "no reference to the memory of a buffer may exist: no slice to give to nix")]
    // SAFETY: `len` bytes from `start` on lie inside the buffer (`Transfer::next_piece`), which is valid for reads and
    // writes and is kept alive by the handle that the transfer borrows. `fd` is open: it is borrowed.
    let answer = unsafe {
        match direction {
            Direction::Read => libc::pread64(fd, start.cast(), len, offset),
            Direction::Write => libc::pwrite64(fd, start.cast_const().cast(), len, offset),
        }
    };
    if answer < 0 { -i64::from(io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO)) } else { answer as i64 }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A kernel that is interrupted, busy, and then does a few bytes of what it is asked for.
    #[test]
    fn a_blocking_transfer_that_is_interrupted_and_cut_short_ends_whole() {
        let place = tempfile::NamedTempFile::new().unwrap();
        let file = HostFile::new(place.reopen().unwrap(), place.path().to_owned(), true, false).unwrap();
        let content: Vec<u8> = (0..100).collect();
        let buf = Buf::new(100);
        buf.copy_in(0, &content);
        let mut calls = 0;
        let mut unreliable = |direction, fd: BorrowedFd<'_>, piece: Piece| {
            calls += 1;
            match calls % 3 {
                0 => -i64::from(libc::EINTR),
                1 => -i64::from(libc::EAGAIN),
                _ => call(direction, fd, Piece { len: piece.len.min(7), ..piece }),
            }
        };
        file.run_by(file.transfer(Direction::Write, &buf, 0..100, 3).unwrap(), &mut unreliable).unwrap();
        assert_eq!(std::fs::read(place.path()).unwrap()[3..], content);
        buf.fill_zero(0..100);
        file.run_by(file.transfer(Direction::Read, &buf, 0..100, 3).unwrap(), &mut unreliable).unwrap();
        let mut read = vec![0; 100];
        buf.copy_out(0, &mut read);
        assert_eq!(read, content);
        assert!(calls > 80, "{calls}");
    }
}
