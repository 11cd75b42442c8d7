//! Submission and completion on a ring, one turn at a time; knows no runtime.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::task::Waker;

use io_uring::{IoUring, squeue};

use crate::buf::Buf;
use crate::in_flight::InFlight;

/// How well submissions were batched: operations per [`Counts::submits`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Calls of io_uring_enter(2) that submitted something.
    pub submits: u64,
    /// Operations that were submitted.
    pub operations: u64,
}

/// A ring, the operations on it, and those that wait for it.
pub(crate) struct Turns {
    ring: IoUring,
    ops: InFlight,
    /// Not known to the kernel yet.
    queue: VecDeque<squeue::Entry>,
    /// Operations whose completion was not seen; at most as many as the completion queue holds, so that it cannot
    /// overflow.
    submitted: usize,
    /// Set when the ring has failed for good: no further call for submission is made.
    broken: Option<i32>,
    driver: Option<Waker>,
    counts: Counts,
}

impl Turns {
    /// A ring of `entries` submissions, which announces completions by the eventfd.
    pub(crate) fn new(entries: u32, event: BorrowedFd<'_>) -> io::Result<Self> {
        let ring = build(entries)?;
        ring.submitter().register_eventfd(event.as_raw_fd())?;
        Ok(Self {
            ring,
            ops: InFlight::default(),
            queue: VecDeque::new(),
            submitted: 0,
            broken: None,
            driver: None,
            counts: Counts::default(),
        })
    }

    /// From now on wakes this one when there is something to submit.
    pub(crate) fn drive_by(&mut self, waker: &Waker) {
        self.driver = Some(waker.clone());
    }

    /// Takes in an operation for the next turn. `keep` lives until its completion was seen.
    pub(crate) fn push(&mut self, sqe: squeue::Entry, keep: Option<Buf>) -> u64 {
        let key = self.ops.insert(keep);
        self.queue.push_back(sqe.user_data(key));
        // Waking twice is cheap: a task that is to run is not queued again.
        if let Some(driver) = &self.driver {
            driver.wake_by_ref();
        }
        key
    }

    /// The result of an operation, which ends it; or else `waker` is woken when there is one.
    pub(crate) fn poll(&mut self, key: u64, waker: &Waker) -> Option<i32> {
        self.ops.poll(key, waker)
    }

    /// Nobody wants the result any more. What the kernel has not got it does not get: the descriptor in the SQE may be
    /// closed from now on.
    pub(crate) fn abandon(&mut self, key: u64) {
        match self.queue.iter().position(|sqe| sqe.get_user_data() == key) {
            Some(at) => {
                self.queue.remove(at);
                self.ops.forget(key);
            }
            None => self.ops.abandon(key),
        }
    }

    /// Waits for all that was submitted; leaks its buffers if that cannot be.
    pub(crate) fn finish(&mut self) {
        while self.submitted > 0 && self.broken.is_none() {
            match self.ring.submit_and_wait(1) {
                Ok(_) => drop(self.reap()),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => self.broken = e.raw_os_error(),
            }
        }
        if self.submitted > 0 {
            tracing::error!("{} operations of a ring never ended: leaking their buffers", self.submitted);
            std::mem::forget(std::mem::take(&mut self.ops));
        }
    }

    pub(crate) fn counts(&self) -> Counts {
        self.counts
    }

    #[cfg(test)]
    pub(crate) fn ring(&self) -> &IoUring {
        &self.ring
    }

    #[cfg(test)]
    pub(crate) fn break_with(&mut self, errno: i32) {
        self.broken = Some(errno);
    }

    /// Submits what waits, as far as there is room, and takes completions; the wakers of those.
    pub(crate) fn turn(&mut self) -> Vec<Waker> {
        let mut wakers = self.reap();
        loop {
            if let Some(errno) = self.broken {
                wakers.extend(self.queue.drain(..).filter_map(|sqe| self.ops.complete(sqe.get_user_data(), -errno)));
                return wakers;
            }
            let batch = self.fill();
            if batch.is_empty() {
                return wakers;
            }
            self.enter(&batch, &mut wakers);
            wakers.append(&mut self.reap());
        }
    }

    /// Moves operations from our queue into the kernel's, which is empty, while no completion can overflow.
    fn fill(&mut self) -> Vec<u64> {
        let room = (self.ring.params().cq_entries() as usize).saturating_sub(self.submitted);
        let mut submission = self.ring.submission();
        let mut batch = Vec::with_capacity(room.min(self.queue.len()).min(submission.capacity()));
        while batch.len() < room
            && !submission.is_full()
            && let Some(sqe) = self.queue.pop_front()
        {
            #[expect(unsafe_code, reason = "an operation on memory")]
            // SAFETY: the caller of `Ring::submit` answers for the SQE's pointers and its descriptor as long as the future
            // lives: had it gone, the SQE would not be in the queue any more. `ops` keeps the buffer.
            let pushed = unsafe { submission.push(&sqe) };
            pushed.expect("the queue is not full");
            batch.push(sqe.get_user_data());
        }
        self.submitted += batch.len();
        batch
    }

    /// Submits the batch; none of it is left in the kernel's queue that the kernel might still take.
    fn enter(&mut self, batch: &[u64], wakers: &mut Vec<Waker>) {
        self.counts.operations += batch.len() as u64;
        loop {
            let left = self.ring.submission().len();
            if left == 0 {
                return;
            }
            match self.ring.submit() {
                Ok(_) => self.counts.submits += 1,
                Err(e) => match e.raw_os_error().unwrap_or(libc::EIO) {
                    libc::EINTR => {}
                    // No memory for a request, or completions to take first: io_uring_enter(2), ERRORS.
                    libc::EAGAIN | libc::EBUSY => {
                        wakers.append(&mut self.reap());
                        std::thread::yield_now();
                    }
                    errno => {
                        tracing::error!("io_uring_enter: {e}: the ring takes no more");
                        self.broken = Some(errno);
                        let refused = &batch[batch.len() - left..];
                        self.submitted -= refused.len();
                        wakers.extend(refused.iter().filter_map(|key| self.ops.complete(*key, -errno)));
                        return;
                    }
                },
            }
        }
    }

    /// Takes every completion there is.
    fn reap(&mut self) -> Vec<Waker> {
        let Self { ring, ops, submitted, .. } = self;
        let completion = ring.completion();
        *submitted -= completion.len();
        completion.filter_map(|cqe| ops.complete(cqe.user_data(), cqe.result())).collect()
    }
}

/// A ring that only its own thread uses, and that runs completion work when the thread enters the kernel anyway (both
/// since Linux 6.0), or else a plain one.
pub(crate) fn build(entries: u32) -> io::Result<IoUring> {
    IoUring::builder().setup_coop_taskrun().setup_single_issuer().build(entries).or_else(|e| match e.raw_os_error() {
        Some(libc::EINVAL) => IoUring::new(entries),
        _ => Err(e),
    })
}
