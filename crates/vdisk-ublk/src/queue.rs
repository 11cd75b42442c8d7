//! A queue thread: one task for each tag, which fetches a request, serves it, and commits its result with the next fetch.

use std::cell::RefCell;
use std::fs::File;
use std::io;
use std::os::fd::BorrowedFd;
use std::rc::Rc;
use std::sync::Arc;

use io_uring::{IoUring, squeue};
use libublk::io::{UblkDev, UblkIOCtx, UblkQueue};
use libublk::uring_async::{ublk_reap_io_events_with_update_queue, ublk_wake_task};
use libublk::{BufDesc, UblkError, sys, ublk_init_task_ring, with_task_io_ring_mut};
use vdisk_image::{Disk, DiskError, Flags, Op, Request};
use vdisk_io::{Buf, FileSet, Limited, Pages, RequestBuf, RingBuf, UringIo, chain};

use crate::doors::Doors;
use crate::errno::errno;
use crate::error::{Error, host_error};
use crate::executor::Executor;
use crate::features::ZERO_COPY;
use crate::ring::QueueRing;

/// Requests that failed, on any queue: a full or poisoned image fails them all.
static FAILURES: Limited = Limited::new();

/// What the queues of a device share.
pub(crate) struct Served {
    pub(crate) disk: Arc<Disk>,
    pub(crate) files: Arc<FileSet>,
    /// How many of the files have slots, from slot 1 on (slot 0 is the ublk char device).
    pub(crate) fixed_files: u32,
    pub(crate) doors: Doors,
}

/// Serves one queue until the device stops: the whole life of a queue thread.
///
/// `begin` is called when everything that can fail has been done, before the driver hears of the queue: START_DEV waits
/// for every queue, so that none may fail after that. `false` from it ends the thread. `fault` is told at once when the
/// driver refuses a command; the queue cannot be served in full from then on.
pub(crate) fn serve(
    served: &Served,
    dev: &UblkDev,
    number: u16,
    begin: impl FnOnce() -> bool,
    fault: &dyn Fn(Error),
) -> Result<(), Error> {
    let _guard = AbortOnPanic;
    let depth = dev.dev_info.queue_depth;
    set_up_ring(depth.into()).map_err(Error::queue(number, "set up io_uring"))?;
    let queue = UblkQueue::new(number, dev).map_err(host_error).map_err(Error::queue(number, "open the queue"))?;
    let engine = UringIo::with_fixed(QueueRing, Arc::clone(&served.files), 1, served.fixed_files);
    let pages = zero_copy_file(dev).map_err(Error::queue(number, "duplicate the descriptor of /dev/ublkc"))?;
    let mut executor = Executor::new().map_err(Error::queue(number, "make an eventfd"))?;
    if !begin() {
        return Ok(());
    }

    let kick = executor.kick();
    let tags = Tags { served, queue: &queue, engine: &engine, pages: pages.as_ref(), fault };
    // Its last owner is the last tag's task: then the kick task ends as well, and with it the loop.
    let open = Rc::new(CloseOnDrop(executor.kick()));
    for tag in 0..depth {
        let (tags, open) = (&tags, Rc::clone(&open));
        executor.add(async move {
            tags.serve(tag).await;
            drop(open);
        });
    }
    drop(open);
    executor.add(async move { kick.answer(&QueueRing).await });
    drive(&queue, &mut executor).map_err(|e| {
        // The kernel may go on writing to the buffers of commands and operations that were not seen to complete.
        std::mem::forget(executor);
        Error::queue(number, "wait for requests")(e)
    })
}

/// Runs the tasks until all have finished: one system call for each turn, whatever the number of tags in it.
///
/// Not by libublk's own loop: that spins while the device stops, and leaves as soon as an enter fails.
fn drive(queue: &UblkQueue<'_>, executor: &mut Executor<'_>) -> io::Result<()> {
    executor.run_ready();
    while executor.unfinished() > 0 {
        match with_task_io_ring_mut(|ring| ring.submit_and_wait(1)) {
            Ok(_) => {}
            // A signal; or the kernel is short of memory or of room for completions, which are taken from it now.
            Err(e) if [Some(libc::EINTR), Some(libc::EAGAIN), Some(libc::EBUSY)].contains(&e.raw_os_error()) => {}
            Err(e) => return Err(e),
        }
        ublk_reap_io_events_with_update_queue(queue, false, None, |cqe| ublk_wake_task(cqe.user_data(), cqe))
            .map_err(host_error)?;
        executor.run_ready();
    }
    Ok(())
}

/// Gives the calling thread its ring, before libublk would make one that is too small: a request may take several
/// operations at once, and every tag may be at it.
fn set_up_ring(depth: u32) -> io::Result<()> {
    let ring = build_ring(depth, true).or_else(|e| match e.raw_os_error() {
        Some(libc::EINVAL) => build_ring(depth, false),
        _ => Err(e),
    })?;
    ublk_init_task_ring(|cell| {
        cell.set(RefCell::new(ring)).map_err(|_| UblkError::OtherError(-libc::EEXIST))?;
        Ok(())
    })
    .map_err(host_error)
}

/// `defer`: completions are worked off when the thread asks for them (DEFER_TASKRUN, Linux 6.1), not whenever it enters
/// the kernel. TASKRUN_FLAG makes the io-uring crate ask also when it does not wait.
fn build_ring(depth: u32, defer: bool) -> io::Result<IoUring<squeue::Entry>> {
    let mut builder = IoUring::<squeue::Entry>::builder();
    builder.setup_cqsize(depth * 16).setup_submit_all();
    if defer {
        builder.setup_single_issuer().setup_defer_taskrun().setup_taskrun_flag();
    } else {
        builder.setup_coop_taskrun();
    }
    builder.build((depth * 2).max(8))
}

/// What the tags of a queue share.
struct Tags<'a> {
    served: &'a Served,
    queue: &'a UblkQueue<'a>,
    engine: &'a UringIo<QueueRing, RequestBuf>,
    /// With zero copy, the file through which pages of requests are read and written.
    pages: Option<&'a Rc<File>>,
    fault: &'a dyn Fn(Error),
}

impl Tags<'_> {
    /// Serves the requests of one tag, one after the other, until the device stops.
    async fn serve(&self, tag: u16) {
        let buf = self.buffer(tag);
        let memory = || match &buf {
            // The address alone: a slice of memory that the kernel writes to would be a lie, and libublk takes slices of
            // its own buffers only. It is valid until the task ends, which is after the last command with it has completed.
            RequestBuf::Memory(buf) => BufDesc::RawAddress(buf.as_ptr().cast_const()),
            RequestBuf::Pages(pages) => BufDesc::AutoReg(sys::ublk_auto_buf_reg {
                index: pages.index(),
                // Else a request that finds no room in the table fails.
                flags: AUTO_BUF_REG_FALLBACK,
                ..Default::default()
            }),
        };
        let mut answer = self.queue.submit_io_prep_cmd(tag, memory(), 0, None).await;
        loop {
            match answer {
                Ok(0) => {}
                Ok(refusal) => return self.refused(io::Error::from_raw_os_error(refusal.saturating_abs())),
                Err(UblkError::QueueIsDown) => return,
                Err(e) => return self.refused(host_error(e)),
            }
            let result = self.request(tag, &buf).await;
            if self.queue.is_stopping() {
                // libublk submits nothing any more, and its future would never be ready. The driver fails the request.
                return;
            }
            answer = self.queue.submit_io_commit_cmd(tag, memory(), result).await;
        }
    }

    /// What a tag's requests are served in.
    fn buffer(&self, tag: u16) -> RequestBuf {
        let len = self.queue.dev.dev_info.max_io_buf_bytes as usize;
        match self.pages {
            None => RequestBuf::Memory(Buf::new(len)),
            // libublk makes a table of as many entries as there are tags.
            Some(file) => {
                let pos = UblkIOCtx::ublk_user_copy_pos(self.queue.get_qid(), tag, 0);
                RequestBuf::Pages(Pages::new(tag, len, Rc::clone(file), pos))
            }
        }
    }

    fn refused(&self, e: io::Error) {
        (self.fault)(Error::queue(self.queue.get_qid(), "fetch requests")(e));
    }

    /// Serves the tag's request. The result to commit: for a read or write all its bytes (a short count would be taken
    /// for success since Linux 7), 0 for the others, or an errno negated.
    async fn request(&self, tag: u16, buf: &RequestBuf) -> i32 {
        let _inside = self.served.doors.enter(self.queue.get_qid()).await;
        let iod = *self.queue.get_iod(tag);
        let Some((op, flags)) = decode(iod.op_flags) else { return -libc::EOPNOTSUPP };
        let (offset, len) = (iod.start_sector << 9, u64::from(iod.nr_sectors) << 9);
        let answer = match iod.op_flags & sys::UBLK_IO_F_NEED_REG_BUF {
            0 => self.checked(op, offset, len, flags, buf).await,
            _ => self.unregistered(op, offset, len, flags, buf).await,
        };
        match answer {
            Ok(()) if matches!(op, Op::Read | Op::Write) => i32::try_from(len).unwrap_or(-libc::EIO),
            Ok(()) => 0,
            Err(e) => {
                if let Some(left_out) = FAILURES.line() {
                    tracing::error!(offset, len, "{op:?} failed: {}{left_out}", chain(&e));
                }
                -errno(e.kind())
            }
        }
    }

    async fn checked(&self, op: Op, offset: u64, len: u64, flags: Flags, buf: &RequestBuf) -> Result<(), DiskError> {
        let disk = &self.served.disk;
        let request = Request::check(&disk.geometry(), op, offset, len, flags)?;
        // `max_sectors` is the buffer's length: the block layer sends nothing longer.
        disk.serve(self.engine, request, buf).await
    }

    /// Serves a request whose pages the driver could not put into the ring's table (it has no memory, say): by way of memory.
    async fn unregistered(
        &self,
        op: Op,
        offset: u64,
        len: u64,
        flags: Flags,
        pages: &RequestBuf,
    ) -> Result<(), DiskError> {
        let failed = |e| DiskError::host(format!("copy the {len} bytes of a request at {offset}"), e);
        let mut memory = Buf::new(if matches!(op, Op::Read | Op::Write) { size(len) } else { 0 });
        if op == Op::Write {
            pages.copy_out(0, memory.get_mut().expect("no operation is in flight")).map_err(failed)?;
        }
        self.checked(op, offset, len, flags, &RequestBuf::Memory(memory.clone())).await?;
        if op == Op::Read {
            pages.copy_in(0, memory.get_mut().expect("no operation is in flight")).map_err(failed)?;
        }
        Ok(())
    }
}

/// `UBLK_AUTO_BUF_REG_FALLBACK`, in the type of its field.
const AUTO_BUF_REG_FALLBACK: u8 = 1;

/// The char device once more, for a device that was granted zero copy.
fn zero_copy_file(dev: &UblkDev) -> io::Result<Option<Rc<File>>> {
    if dev.dev_info.flags & ZERO_COPY != ZERO_COPY {
        return Ok(None);
    }
    let fd = dev.tgt.fds[0];
    #[expect(unsafe_code, reason = "libublk has only the number")]
    // SAFETY: libublk's first file is the char device, which it opened and keeps open as long as `dev` lives.
    let device = unsafe { BorrowedFd::borrow_raw(fd) };
    Ok(Some(Rc::new(File::from(device.try_clone_to_owned()?))))
}

/// A length of a request: 32 bits of sectors.
fn size(len: u64) -> usize {
    usize::try_from(len).unwrap_or(usize::MAX)
}

/// What a descriptor's `op_flags` ask for: the operation in the low 8 bits, flags in place above them.
fn decode(op_flags: u32) -> Option<(Op, Flags)> {
    let op = match op_flags & 0xff {
        sys::UBLK_IO_OP_READ => Op::Read,
        sys::UBLK_IO_OP_WRITE => Op::Write,
        sys::UBLK_IO_OP_FLUSH => Op::Flush,
        sys::UBLK_IO_OP_DISCARD => Op::Discard,
        sys::UBLK_IO_OP_WRITE_ZEROES => Op::WriteZeroes,
        _ => return None,
    };
    let fua = op_flags & sys::UBLK_IO_F_FUA != 0;
    let no_unmap = op == Op::WriteZeroes && op_flags & sys::UBLK_IO_F_NOUNMAP != 0;
    Some((op, Flags { fua, no_unmap }))
}

struct CloseOnDrop(Arc<crate::kick::Kick>);

impl Drop for CloseOnDrop {
    fn drop(&mut self) {
        self.0.close();
    }
}

/// A panic of a queue thread ends the process, in builds that unwind too: unwinding would free buffers that the kernel
/// writes to, and the device would hang for ever instead of failing.
struct AbortOnPanic;

impl Drop for AbortOnPanic {
    fn drop(&mut self) {
        if std::thread::panicking() {
            std::process::abort();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn operations_and_flags_are_read_in_place() {
        let plain = Flags::default();
        assert_eq!(decode(0), Some((Op::Read, plain)));
        assert_eq!(decode(1), Some((Op::Write, plain)));
        assert_eq!(decode(2), Some((Op::Flush, plain)));
        assert_eq!(decode(3), Some((Op::Discard, plain)));
        assert_eq!(decode(5), Some((Op::WriteZeroes, plain)));
        assert_eq!(decode(1 | 1 << 13), Some((Op::Write, Flags { fua: true, ..plain })));
        assert_eq!(decode(5 | 1 << 15), Some((Op::WriteZeroes, Flags { no_unmap: true, ..plain })));
        // The same number shifted, and NOUNMAP on what is no write zeroes.
        assert_eq!(decode(5 | 1 << 23), Some((Op::WriteZeroes, plain)));
        assert_eq!(decode(3 | 1 << 15), Some((Op::Discard, plain)));
        assert_eq!(decode(4), None);
        assert_eq!(decode(13), None);
    }

    #[test]
    fn a_ring_has_room_for_two_operations_of_each_tag() {
        for defer in [true, false] {
            let Ok(ring) = build_ring(64, defer) else { continue };
            assert!(ring.params().sq_entries() >= 128 && ring.params().cq_entries() >= 1024);
        }
    }
}
