//! A ring of our own, driven by a task of a tokio current-thread runtime.

use std::cell::RefCell;
use std::fmt;
use std::future::poll_fn;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

use io_uring::{Probe, opcode, squeue};
use nix::sys::eventfd::{EfdFlags, EventFd};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::task::JoinHandle;

use crate::buf::Buf;
use crate::turns::{Counts, Turns, build};
use crate::uring::Ring;

/// A [`Ring`] on its own io_uring, for a tokio current-thread runtime.
///
/// A local task drives it: it submits together what the other tasks asked for since its last turn, takes completions,
/// and sleeps on an eventfd that the kernel writes to for each of them. Tokio runs tasks in the order in which they
/// were woken, so a turn comes after every task that was ready when the first of a batch asked.
pub struct OwnRing {
    shared: Rc<RefCell<Turns>>,
    driver: JoinHandle<()>,
}

impl OwnRing {
    /// A ring that takes `entries` operations per system call and has twice as many in flight; any further ones wait.
    ///
    /// # Errors
    ///
    /// The host's; [`OwnRing::available`] has better words for them.
    ///
    /// # Panics
    ///
    /// Outside a [`tokio::task::LocalSet`] on a runtime with I/O enabled.
    pub fn new(entries: u32) -> io::Result<Self> {
        let event = EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)?;
        let shared = Rc::new(RefCell::new(Turns::new(entries, event.as_fd())?));
        #[expect(unsafe_code, reason = "tokio leaves it to us that a descriptor stays open")]
        // SAFETY: an `OwnedFd` names one open descriptor for as long as it exists, and the `AsyncFd` owns it.
        let event = unsafe { AsyncFd::register_with_interest(OwnedFd::from(event), Interest::READABLE) }?;
        let driver = tokio::task::spawn_local(drive(Rc::clone(&shared), event));
        Ok(Self { shared, driver })
    }

    /// Whether this process may use io_uring, with every operation that [`crate::UringIo`] needs.
    ///
    /// # Errors
    ///
    /// Why not: `ENOSYS` (no io_uring in this kernel, or a sandbox), `EPERM` (`kernel.io_uring_disabled`, see
    /// Documentation/admin-guide/sysctl/kernel.rst, or a sandbox), [`io::ErrorKind::Unsupported`] (before Linux 5.6).
    pub fn available() -> io::Result<()> {
        let explain = |e: io::Error| match e.raw_os_error() {
            Some(libc::ENOSYS) => io::Error::new(e.kind(), "this kernel (or sandbox) has no io_uring"),
            Some(libc::EPERM) => {
                io::Error::new(e.kind(), "io_uring is forbidden (kernel.io_uring_disabled, or a sandbox)")
            }
            _ => io::Error::new(e.kind(), format!("io_uring: {e}")),
        };
        let ring = build(2).map_err(explain)?;
        let mut probe = Probe::new();
        // IORING_REGISTER_PROBE is as old as the youngest of the operations.
        let known = ring.submitter().register_probe(&mut probe).is_ok();
        let needed = [opcode::Read::CODE, opcode::Write::CODE, opcode::Fsync::CODE, opcode::Fallocate::CODE];
        if !known || needed.iter().any(|code| !probe.is_supported(*code)) {
            return Err(io::Error::new(io::ErrorKind::Unsupported, "this kernel's io_uring is too old"));
        }
        Ok(())
    }

    /// How well submissions were batched so far.
    pub fn counts(&self) -> Counts {
        self.shared.borrow().counts()
    }
}

impl fmt::Debug for OwnRing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OwnRing").field("counts", &self.counts()).finish_non_exhaustive()
    }
}

#[expect(unsafe_code, reason = "a promise about buffers")]
// SAFETY: `InFlight` holds `keep` until `complete`, which is called when the CQE was seen (or the kernel never took the
// SQE); a dropped future only abandons its operation. When the ring goes first it waits for all of them, or leaks them
// (`Turns::finish`).
unsafe impl Ring for OwnRing {
    #[expect(unsafe_code, reason = "see the trait")]
    unsafe fn submit(&self, sqe: squeue::Entry, keep: Option<Buf>) -> impl Future<Output = i32> {
        let key = self.shared.borrow_mut().push(sqe, keep);
        Operation { shared: &self.shared, key, done: false }
    }
}

impl Drop for OwnRing {
    fn drop(&mut self) {
        self.driver.abort();
        self.shared.borrow_mut().finish();
    }
}

/// One operation; taken from the queue again if it goes before it was submitted.
struct Operation<'a> {
    shared: &'a RefCell<Turns>,
    key: u64,
    done: bool,
}

impl Future for Operation<'_> {
    type Output = i32;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<i32> {
        let answer = self.shared.borrow_mut().poll(self.key, context.waker());
        match answer {
            Some(result) => {
                self.done = true;
                Poll::Ready(result)
            }
            None => Poll::Pending,
        }
    }
}

impl Drop for Operation<'_> {
    fn drop(&mut self) {
        if !self.done {
            self.shared.borrow_mut().abandon(self.key);
        }
    }
}

/// The driver: ends with the ring.
async fn drive(shared: Rc<RefCell<Turns>>, event: AsyncFd<OwnedFd>) {
    poll_fn(|context| {
        shared.borrow_mut().drive_by(context.waker());
        loop {
            let wakers = shared.borrow_mut().turn();
            wakers.into_iter().for_each(Waker::wake);
            match event.poll_read_ready(context) {
                Poll::Ready(Ok(mut ready)) => {
                    // Reset first and look for completions afterwards: none is missed.
                    let _ = nix::unistd::read(&event, &mut [0; 8]);
                    ready.clear_ready();
                }
                // The runtime ends.
                Poll::Ready(Err(_)) => return Poll::Ready(()),
                Poll::Pending => return Poll::Pending,
            }
        }
    })
    .await;
}

#[cfg(test)]
pub(crate) mod tests {
    use std::fs::File;
    use std::os::fd::{AsRawFd, RawFd};
    use std::time::Instant;

    use io_uring::types;
    use tokio::task::LocalSet;

    use super::*;

    impl OwnRing {
        /// Registers files from a slot on.
        pub(crate) fn register_files_at(&self, first_slot: usize, fds: &[RawFd]) {
            let table = [vec![-1; first_slot], fds.to_vec()].concat();
            self.shared.borrow().ring().submitter().register_files(&table).unwrap();
        }
    }

    /// Runs a future that is given a ring, as a server's thread would.
    pub(crate) fn with_ring<T>(entries: u32, f: impl AsyncFnOnce(OwnRing) -> T) -> T {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build().unwrap();
        LocalSet::new().block_on(&runtime, async { f(OwnRing::new(entries).unwrap()).await })
    }

    fn skipped() -> bool {
        let available = OwnRing::available();
        assert!(available.is_ok() || std::env::var_os("CI").is_none(), "{available:?}");
        available.inspect_err(|e| println!("skipped: {e}")).is_err()
    }

    /// A file whose block `n` begins with the bytes of `n`.
    fn numbered(blocks: u64) -> File {
        let file = tempfile::tempfile().unwrap();
        for n in 0..blocks {
            std::os::unix::fs::FileExt::write_all_at(&file, &n.to_le_bytes(), n * 4096).unwrap();
        }
        file.set_len(blocks * 4096).unwrap();
        file
    }

    /// The number of a block.
    async fn number(ring: &OwnRing, file: &File, n: u64) -> u64 {
        let buf = Buf::new(4096);
        let sqe = opcode::Read::new(types::Fd(file.as_raw_fd()), buf.as_ptr(), 4096).offset(n * 4096).build();
        #[expect(unsafe_code, reason = "a test")]
        // SAFETY: the memory is the buffer's, the file outlives the future.
        let answer = unsafe { ring.submit(sqe, Some(buf.clone())) }.await;
        assert_eq!(answer, 4096);
        let mut bytes = [0; 8];
        buf.copy_out(0, &mut bytes);
        u64::from_le_bytes(bytes)
    }

    /// A read of a pipe, which lasts until somebody writes to it.
    fn pipe_read<'a>(ring: &'a OwnRing, pipe: &io::PipeReader, buf: &Buf) -> Pin<Box<dyn Future<Output = i32> + 'a>> {
        let sqe = opcode::Read::new(types::Fd(pipe.as_raw_fd()), buf.as_ptr(), 4).offset(u64::MAX).build();
        #[expect(unsafe_code, reason = "a test")]
        // SAFETY: the memory is the buffer's, the pipe outlives the future in every test.
        Box::pin(unsafe { ring.submit(sqe, Some(buf.clone())) })
    }

    #[test]
    fn a_thousand_reads_at_once_are_answered_and_batched() {
        if skipped() {
            return;
        }
        with_ring(128, async |ring| {
            let (ring, file) = (Rc::new(ring), Rc::new(numbered(1000)));
            let start = Instant::now();
            let tasks: Vec<_> = (0..1000)
                .map(|n| {
                    let (ring, file) = (Rc::clone(&ring), Rc::clone(&file));
                    tokio::task::spawn_local(async move { number(&ring, &file, n).await })
                })
                .collect();
            for (n, task) in tasks.into_iter().enumerate() {
                assert_eq!(task.await.unwrap(), n as u64);
            }
            let Counts { submits, operations } = ring.counts();
            println!("{operations} reads in {submits} submits, {:?}", start.elapsed());
            assert_eq!(operations, 1000);
            assert!(submits <= 40, "{submits}");
        });
    }

    #[test]
    fn more_operations_than_the_ring_holds_wait_for_room() {
        if skipped() {
            return;
        }
        let file = numbered(300);
        with_ring(1, async |ring| {
            let reads: Vec<_> = (0..300).map(|n| number(&ring, &file, n)).collect();
            let mut reads: Vec<_> = reads.into_iter().map(Box::pin).collect();
            // All are under way before the first one is waited for.
            poll_fn(|context| {
                reads.iter_mut().for_each(|r| assert!(r.as_mut().poll(context).is_pending()));
                Poll::Ready(())
            })
            .await;
            for (n, read) in reads.into_iter().enumerate().rev() {
                assert_eq!(read.await, n as u64);
            }
        });
    }

    #[test]
    fn an_operation_that_sleeps_wakes_its_task_later() {
        if skipped() {
            return;
        }
        with_ring(4, async |ring| {
            let (reader, mut writer) = io::pipe().unwrap();
            let buf = Buf::new(4);
            let read = pipe_read(&ring, &reader, &buf);
            let ring_turns = async { tokio::task::yield_now().await };
            ring_turns.await;
            let thread = std::thread::spawn(move || io::Write::write_all(&mut writer, b"late"));
            assert_eq!(read.await, 4);
            thread.join().unwrap().unwrap();
            let mut bytes = [0; 4];
            buf.copy_out(0, &mut bytes);
            assert_eq!(&bytes, b"late");
        });
    }

    #[test]
    fn a_future_dropped_in_flight_leaves_its_buffer_to_the_kernel() {
        if skipped() {
            return;
        }
        with_ring(4, async |ring| {
            let (reader, mut writer) = io::pipe().unwrap();
            let mut buf = Buf::new(4);
            let read = pipe_read(&ring, &reader, &buf);
            while ring.counts().operations == 0 {
                tokio::task::yield_now().await;
            }
            drop(read);
            assert!(buf.get_mut().is_none(), "the kernel may still write to it");
            io::Write::write_all(&mut writer, b"abcd").unwrap();
            // The kernel takes another operation after it: when that ends, this one has too.
            while buf.get_mut().is_none() {
                tokio::task::yield_now().await;
            }
            assert_eq!(buf.get_mut().unwrap(), b"abcd");
        });
    }

    #[test]
    fn a_future_dropped_before_its_turn_is_never_submitted() {
        if skipped() {
            return;
        }
        with_ring(4, async |ring| {
            let (reader, _writer) = io::pipe().unwrap();
            let mut buf = Buf::new(4);
            drop(pipe_read(&ring, &reader, &buf));
            assert!(buf.get_mut().is_some());
            let file = numbered(1);
            assert_eq!(number(&ring, &file, 0).await, 0);
            assert_eq!(ring.counts().operations, 1);
        });
    }

    #[test]
    fn a_dropped_ring_waits_for_what_is_in_flight() {
        if skipped() {
            return;
        }
        let mut buf = Buf::new(4);
        let (reader, mut writer) = io::pipe().unwrap();
        let thread = with_ring(4, async |ring| {
            let read = pipe_read(&ring, &reader, &buf);
            while ring.counts().operations == 0 {
                tokio::task::yield_now().await;
            }
            drop(read);
            std::thread::spawn(move || io::Write::write_all(&mut writer, b"last"))
        });
        assert_eq!(buf.get_mut().unwrap(), b"last");
        thread.join().unwrap().unwrap();
    }

    #[test]
    fn a_ring_that_broke_refuses_what_comes() {
        if skipped() {
            return;
        }
        with_ring(4, async |ring| {
            ring.shared.borrow_mut().break_with(libc::EBADF);
            let file = numbered(1);
            let buf = Buf::new(4);
            let sqe = opcode::Read::new(types::Fd(file.as_raw_fd()), buf.as_ptr(), 4).build();
            #[expect(unsafe_code, reason = "a test")]
            // SAFETY: the memory is the buffer's, the file outlives the future.
            let answer = unsafe { ring.submit(sqe, Some(buf.clone())) }.await;
            assert_eq!(answer, -libc::EBADF);
        });
    }
}
