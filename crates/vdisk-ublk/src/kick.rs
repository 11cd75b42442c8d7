//! How other threads wake a queue thread that sleeps in its ring.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};

use io_uring::{opcode, types};
use nix::sys::eventfd::{EfdFlags, EventFd};
use vdisk_io::Ring;

/// An eventfd. The queue thread has a poll of it on its ring all the time ([`Kick::answer`]), so that a write to it ends
/// the thread's sleep as a request would. Without that, a wake from another thread waits for the next request: 19 seconds
/// were seen.
#[derive(Debug)]
pub(crate) struct Kick {
    eventfd: EventFd,
    closed: AtomicBool,
}

impl Kick {
    pub(crate) fn new() -> io::Result<Self> {
        let eventfd = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        Ok(Self { eventfd, closed: AtomicBool::new(false) })
    }

    /// Ends the thread's sleep, or keeps it from falling asleep. From any thread.
    pub(crate) fn kick(&self) {
        // Fails only when the counter is full: then it is not zero, which is all that is wanted.
        let _ = self.eventfd.write(1);
    }

    /// Lets [`Kick::answer`] end.
    pub(crate) fn close(&self) {
        self.closed.store(true, Ordering::Release);
        self.kick();
    }

    /// Forgets the kicks so far. What they announced must be looked at after this.
    pub(crate) fn drain(&self) {
        // EAGAIN: there were none.
        let _ = self.eventfd.read();
    }

    /// The task that keeps the poll on the ring, until [`Kick::close`].
    pub(crate) async fn answer(&self, ring: &impl Ring) {
        // A poll and then a read, not a read: no memory is lent to the kernel.
        let mask = u32::from(libc::POLLIN.unsigned_abs());
        while !self.closed.load(Ordering::Acquire) {
            let poll = opcode::PollAdd::new(types::Fd(self.eventfd.as_raw_fd()), mask).build();
            #[expect(unsafe_code, reason = "an operation on a descriptor")]
            // SAFETY: a poll has no memory. `self` keeps the descriptor open, and the future borrows `self`.
            let result = unsafe { ring.submit(poll, None) }.await;
            self.drain();
            if result < 0 && result != -libc::EINTR {
                tracing::error!(errno = -result, "poll of a queue's eventfd");
                return;
            }
        }
    }
}

#[cfg(test)]
impl Kick {
    /// Whether a kick waits to be answered; answers it.
    pub(crate) fn was_kicked(&self) -> bool {
        self.eventfd.read().is_ok()
    }

    /// Sleeps until there is a kick, ten seconds at most.
    pub(crate) fn wait(&self) {
        use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
        use std::os::fd::AsFd;
        let mut fds = [PollFd::new(self.eventfd.as_fd(), PollFlags::POLLIN)];
        assert_eq!(poll(&mut fds, PollTimeout::from(10_000u16)), Ok(1), "nobody kicked");
    }
}
