//! The file system: one file, the raw bytes of a disk.

use std::cell::RefCell;
use std::ffi::{OsStr, OsString};
use std::io;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};
use std::time::{Duration, SystemTime};

use fuser::{
    Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo, InitFlags, KernelConfig,
    LockOwner, OpenFlags, ReplyAttr, ReplyData, ReplyEmpty, ReplyEntry, ReplyLseek, ReplyOpen, ReplyStatfs, ReplyWrite,
    Request as Caller, TimeOrNow, WriteFlags,
};
use vdisk_image::{Disk, DiskError, ErrorKind, Flags, Op, Request};
use vdisk_io::{BlockingIo, Buf, FileSet, Limited, block_on, chain};

/// The largest read or write in one request, in bytes: what 256 pages hold, the most that the kernel gives
/// (fs/fuse/fuse_i.h, `FUSE_MAX_MAX_PAGES`).
pub(crate) const MAX_TRANSFER: usize = 1 << 20;
/// Asynchronous requests that the kernel may have under way: as many as a loop device has (drivers/block/loop.c, 128).
const MAX_BACKGROUND: u16 = 128;
/// How long the kernel may use attributes without asking: only the space used changes, and the size when the kernel is told.
const ATTRIBUTES_LAST: Duration = Duration::from_secs(1);

/// Requests that failed: a full or poisoned image fails them all.
static FAILURES: Limited = Limited::new();

thread_local! {
    /// Each thread serves one request at a time.
    static BUFFER: RefCell<Buf> = RefCell::new(Buf::new(MAX_TRANSFER));
}

/// Whether requests are let through to the disk. Closing it waits for those that are under way.
#[derive(Clone, Debug)]
pub(crate) struct Gate(Arc<RwLock<bool>>);

impl Gate {
    pub(crate) fn open() -> Self {
        Self(Arc::new(RwLock::new(true)))
    }

    /// Waits for the requests under way and refuses all that follow: then the disk may be closed.
    pub(crate) fn close(&self) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = false;
    }

    fn pass(&self) -> Result<RwLockReadGuard<'_, bool>, Errno> {
        let open = self.0.read().unwrap_or_else(PoisonError::into_inner);
        if *open { Ok(open) } else { Err(Errno::EIO) }
    }
}

/// What the file system looks like.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Shape {
    /// The root is the file: mounted over a file, for anybody to read through the page cache.
    File,
    /// A directory with the file under this name, for a loop device, which has a page cache of its own.
    Behind(OsString),
}

/// The raw view of a disk as a file system.
#[derive(Debug)]
pub struct View {
    disk: Arc<Disk>,
    files: Arc<FileSet>,
    io: BlockingIo,
    shape: Shape,
    gate: Gate,
    since: SystemTime,
    user: (u32, u32),
}

impl View {
    /// A view for the calling process's user.
    pub(crate) fn new(disk: Arc<Disk>, files: Arc<FileSet>, shape: Shape, gate: Gate) -> Self {
        let user = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
        let io = BlockingIo::new(Arc::clone(&files));
        Self { disk, files, io, shape, gate, since: SystemTime::now(), user }
    }

    pub(crate) fn file_inode(&self) -> INodeNo {
        match self.shape {
            Shape::File => INodeNo::ROOT,
            Shape::Behind(_) => INodeNo(INodeNo::ROOT.0 + 1),
        }
    }

    fn size(&self) -> u64 {
        self.disk.geometry().size
    }

    fn attributes(&self, inode: INodeNo) -> FileAttr {
        let is_file = inode == self.file_inode();
        let geometry = self.disk.geometry();
        FileAttr {
            ino: inode,
            size: if is_file { geometry.size } else { 0 },
            blocks: if is_file { self.files.host_space_used().unwrap_or(0) / 512 } else { 0 },
            atime: self.since,
            mtime: self.since,
            ctime: self.since,
            crtime: self.since,
            kind: if is_file { FileType::RegularFile } else { FileType::Directory },
            perm: match (is_file, geometry.read_only) {
                (false, _) => 0o500,
                (true, true) => 0o400,
                (true, false) => 0o600,
            },
            nlink: 1,
            uid: self.user.0,
            gid: self.user.1,
            rdev: 0,
            blksize: geometry.preferred_block,
            flags: 0,
        }
    }

    /// Serves one request on the calling thread. `buf` as for [`Disk::serve`].
    fn request(&self, op: Op, offset: u64, len: u64, flags: Flags, buf: &Buf) -> Result<(), Errno> {
        let _pass = self.gate.pass()?;
        let request = Request::check(&self.disk.geometry(), op, offset, len, flags);
        let served = request.and_then(|request| block_on(self.disk.serve(&self.io, request, buf)));
        served.map_err(|e| failed(op, offset, len, &e))
    }

    /// The bytes of the range that are inside the disk.
    fn inside(&self, offset: u64, len: u64) -> u64 {
        len.min(self.size().saturating_sub(offset))
    }

    fn fallocated(&self, offset: u64, len: u64, mode: i32) -> Result<(), Errno> {
        let keeps_size = mode & libc::FALLOC_FL_KEEP_SIZE != 0;
        let no_unmap = match mode & !libc::FALLOC_FL_KEEP_SIZE {
            // Loop sends this for a discard as well as for write zeroes that may unmap: it has to read as zeroes.
            libc::FALLOC_FL_PUNCH_HOLE if keeps_size => false,
            libc::FALLOC_FL_ZERO_RANGE => true,
            _ => return Err(Errno::EOPNOTSUPP),
        };
        let inside = self.inside(offset, len);
        if inside < len && !keeps_size {
            return Err(Errno::ENOSPC);
        }
        if inside == 0 {
            return Ok(());
        }
        let flags = Flags { no_unmap, ..Flags::default() };
        self.request(Op::WriteZeroes, offset, inside, flags, &Buf::new(0))
    }

    /// lseek(2) with `SEEK_DATA` or `SEEK_HOLE`; the end of the file counts as a hole.
    fn sought(&self, offset: u64, hole: bool) -> Result<u64, Errno> {
        let _pass = self.gate.pass()?;
        let mut at = offset;
        while at < self.size() {
            let span = block_on(self.disk.span(&self.io, at, self.size() - at));
            let span = span.map_err(|e| failed(Op::Read, at, 0, &e))?;
            if span.hole == hole {
                return Ok(at);
            }
            at += span.len;
        }
        if hole && offset < self.size() { Ok(self.size()) } else { Err(Errno::ENXIO) }
    }
}

/// Logs the failure of a request; the errno it fails with.
fn failed(op: Op, offset: u64, len: u64, e: &DiskError) -> Errno {
    if let Some(left_out) = FAILURES.line() {
        tracing::error!(offset, len, "{op:?} failed: {}{left_out}", chain(e));
    }
    Errno::from_i32(errno(e.kind()))
}

/// The errno with which a request fails. Programs and the loop driver see it: EAGAIN, EOPNOTSUPP and the like would mean
/// something else to them than that this request failed.
pub fn errno(kind: ErrorKind) -> i32 {
    match kind {
        ErrorKind::ReadOnly => libc::EROFS,
        ErrorKind::NoSpace | ErrorKind::OutOfRange => libc::ENOSPC,
        ErrorKind::NotAnImage
        | ErrorKind::Unsupported
        | ErrorKind::Corrupt
        | ErrorKind::NotFound
        | ErrorKind::PermissionDenied
        | ErrorKind::Busy
        | ErrorKind::InvalidRequest
        | ErrorKind::HostIo
        | ErrorKind::Poisoned => libc::EIO,
    }
}

/// A length of the kernel's, as ours.
fn length(bytes: u64) -> usize {
    usize::try_from(bytes).unwrap_or(usize::MAX)
}

fn answer(done: Result<(), Errno>, reply: ReplyEmpty) {
    match done {
        Ok(()) => reply.ok(),
        Err(e) => reply.error(e),
    }
}

impl Filesystem for View {
    fn init(&mut self, _: &Caller, config: &mut KernelConfig) -> io::Result<()> {
        let max_write = u32::try_from(MAX_TRANSFER).unwrap_or(u32::MAX);
        // Each answers with what was set before, or with what it allows: there is nothing to do about it.
        let _ = config.set_max_write(max_write);
        let _ = config.set_max_background(MAX_BACKGROUND);
        let _ = config.set_congestion_threshold(MAX_BACKGROUND);
        let _ = config.add_capabilities(InitFlags::FUSE_ASYNC_DIO);
        Ok(())
    }

    fn lookup(&self, _: &Caller, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        match &self.shape {
            Shape::Behind(file) if parent == INodeNo::ROOT && name == file => {
                reply.entry(&ATTRIBUTES_LAST, &self.attributes(self.file_inode()), Generation(0));
            }
            _ => reply.error(Errno::ENOENT),
        }
    }

    fn getattr(&self, _: &Caller, inode: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        reply.attr(&ATTRIBUTES_LAST, &self.attributes(inode));
    }

    /// Times are accepted and forgotten; nothing else can be changed.
    fn setattr(
        &self,
        _: &Caller,
        inode: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        _: Option<TimeOrNow>,
        _: Option<TimeOrNow>,
        _: Option<SystemTime>,
        _: Option<FileHandle>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<fuser::BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let same_size = size.is_none_or(|size| size == self.size());
        if mode.is_some() || uid.is_some() || gid.is_some() || !same_size {
            return reply.error(Errno::EPERM);
        }
        reply.attr(&ATTRIBUTES_LAST, &self.attributes(inode));
    }

    fn open(&self, _: &Caller, _: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        let flags = match self.shape {
            // Nobody but this mount changes the bytes: what is cached stays true.
            Shape::File => FopenFlags::FOPEN_KEEP_CACHE,
            Shape::Behind(_) => FopenFlags::FOPEN_DIRECT_IO | FopenFlags::FOPEN_PARALLEL_DIRECT_WRITES,
        };
        reply.opened(FileHandle(0), flags);
    }

    fn read(
        &self,
        _: &Caller,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let len = self.inside(offset, size.into());
        if len == 0 {
            return reply.data(&[]);
        }
        BUFFER.with_borrow_mut(|buf| {
            if length(len) > buf.len() {
                *buf = Buf::new(length(len));
            }
            let read = self.request(Op::Read, offset, len, Flags::default(), buf);
            // No operation holds the buffer any more: the request has ended.
            match read.and_then(|()| buf.get_mut().and_then(|b| b.get(..length(len))).ok_or(Errno::EIO)) {
                Ok(bytes) => reply.data(bytes),
                Err(e) => reply.error(e),
            }
        });
    }

    fn write(
        &self,
        _: &Caller,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        data: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let len = self.inside(offset, data.len() as u64);
        if len == 0 && !data.is_empty() {
            return reply.error(Errno::ENOSPC);
        }
        let written = BUFFER.with_borrow_mut(|buf| {
            if data.len() > buf.len() {
                *buf = Buf::new(data.len());
            }
            buf.copy_in(0, &data[..length(len)]);
            self.request(Op::Write, offset, len, Flags::default(), buf)
        });
        match written {
            // Past the end of the disk it is a short write, and the caller's next one has no space.
            Ok(()) => reply.written(u32::try_from(len).unwrap_or(u32::MAX)),
            Err(e) => reply.error(e),
        }
    }

    /// Every close(2) ends here: there is nothing to do, writes have reached the disk. ENOSYS would spare the kernel the
    /// question, and `fsync` would be the only place where data waits.
    fn flush(&self, _: &Caller, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        reply.error(Errno::ENOSYS);
    }

    fn fsync(&self, _: &Caller, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        answer(self.request(Op::Flush, 0, 0, Flags::default(), &Buf::new(0)), reply);
    }

    /// The host's: space may run out there, and a loop device takes the block size for the unit of discards.
    fn statfs(&self, _: &Caller, _: INodeNo, reply: ReplyStatfs) {
        let file = self.files.iter().next().map(|(_, file)| rustix::fs::fstatvfs(file.buffered_fd()));
        match file {
            Some(Ok(host)) => {
                let block = u32::try_from(host.f_frsize).unwrap_or(4096);
                reply.statfs(host.f_blocks, host.f_bfree, host.f_bavail, 1, 0, block, 255, block);
            }
            _ => reply.error(Errno::EIO),
        }
    }

    fn fallocate(&self, _: &Caller, _: INodeNo, _: FileHandle, offset: u64, len: u64, mode: i32, reply: ReplyEmpty) {
        answer(self.fallocated(offset, len, mode), reply);
    }

    fn lseek(&self, _: &Caller, _: INodeNo, _: FileHandle, offset: i64, whence: i32, reply: ReplyLseek) {
        let hole = match whence {
            libc::SEEK_DATA => false,
            libc::SEEK_HOLE => true,
            _ => return reply.error(Errno::EINVAL),
        };
        let found = u64::try_from(offset).map_err(|_| Errno::ENXIO).and_then(|offset| self.sought(offset, hole));
        match found.and_then(|at| i64::try_from(at).map_err(|_| Errno::EOVERFLOW)) {
            Ok(at) => reply.offset(at),
            Err(e) => reply.error(e),
        }
    }
}
