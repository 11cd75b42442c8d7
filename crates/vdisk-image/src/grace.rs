//! Grace periods: when nobody can be at a place any more that was free to be found before.
//!
//! A request finds where a grain is, and reads or writes there some time later. A place that no entry names any more may be
//! punched, and given to another grain, only when all requests that may have found it before have ended. No request says where it is:
//! it only says that it is under way, in a counter of its thread's, and a place waits for those that were under way when it was freed.
//!
//! Epochs go by one at a time. The next one begins only when no request of the one before the current is left, so that all that are
//! under way belong to two epochs, which an even and an odd counter tell apart.

use crate::wait::{WaitList, locked, wake};
use std::cell::Cell;
use std::future::poll_fn;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::task::Poll;

/// Threads that count for themselves; more of them share.
const SHARDS: usize = 16;

/// Requests that are under way.
#[derive(Debug, Default)]
pub(crate) struct Grace {
    epoch: AtomicU64,
    /// Tasks that wait for an epoch's end. Beside the epoch, which every request looks at too.
    waiting: AtomicUsize,
    waiters: Mutex<WaitList>,
    shards: [Shard; SHARDS],
}

/// A line of the processor's cache of its own: nearly every request changes it.
#[derive(Debug, Default)]
#[repr(align(128))]
struct Shard {
    /// Requests that began in even epochs, and in odd ones.
    under_way: [AtomicU64; 2],
}

/// A request that is under way, until it is dropped.
#[derive(Debug)]
#[must_use]
pub(crate) struct Passage<'a> {
    grace: &'a Grace,
    shard: &'a Shard,
    /// Of the epoch: 0 or 1.
    parity: usize,
}

/// A point in time that requests can be older than.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Epoch(u64);

impl Grace {
    /// A request begins, before it looks where anything is.
    pub(crate) fn enter(&self) -> Passage<'_> {
        let shard = self.shards.get(shard()).unwrap_or(&self.shards[0]);
        loop {
            let epoch = self.epoch.load(Ordering::SeqCst);
            let parity = usize::from(!epoch.is_multiple_of(2));
            shard.under_way[parity].fetch_add(1, Ordering::SeqCst);
            let passage = Passage { grace: self, shard, parity };
            // Counted while the epoch was another one already, it would not be waited for.
            if self.epoch.load(Ordering::SeqCst) == epoch {
                return passage;
            }
        }
    }

    fn leave(&self, shard: &Shard, parity: usize) {
        // Who waits says so before it looks at the counters: either it sees this one, or it is seen here.
        if shard.under_way[parity].fetch_sub(1, Ordering::SeqCst) == 1 && self.waiting.load(Ordering::SeqCst) != 0 {
            // Of the current epoch nobody waits for the end: it has to be the last one first, and who makes it that looks again.
            let epoch = self.epoch.load(Ordering::SeqCst);
            if parity == usize::from(epoch.is_multiple_of(2)) {
                let wakers = locked(&self.waiters).take();
                wake(wakers);
            }
        }
    }

    /// Waits until every request that is under way has ended. Whoever calls this is none, or waits for ever.
    pub(crate) async fn all_left(&self) {
        let now = self.now();
        let has_ended = || self.ended().is_some_and(|ended| ended >= now);
        if has_ended() {
            return;
        }
        self.waiting.fetch_add(1, Ordering::SeqCst);
        let _waiting = Waiting(self);
        poll_fn(|cx| {
            // In the list first: what leaves after the look finds this task there.
            locked(&self.waiters).add(cx);
            if has_ended() { Poll::Ready(()) } else { Poll::Pending }
        })
        .await;
    }

    /// What happened before this call is seen by every request that begins in a later epoch than the answer.
    fn now(&self) -> Epoch {
        // A change, if of nothing, so that whoever begins the next epoch has seen what was before.
        Epoch(self.epoch.fetch_add(0, Ordering::SeqCst))
    }

    /// The newest epoch of which no request is left, nor of any before it; `None` at first.
    fn ended(&self) -> Option<Epoch> {
        self.advance();
        self.advance();
        self.epoch.load(Ordering::SeqCst).checked_sub(2).map(Epoch)
    }

    /// Begins the next epoch if no request of the last one is left.
    fn advance(&self) {
        let epoch = self.epoch.load(Ordering::SeqCst);
        let last = usize::from(epoch.is_multiple_of(2));
        if self.shards.iter().all(|s| s.under_way[last].load(Ordering::SeqCst) == 0) {
            // Somebody else may have begun it.
            let _ = self.epoch.compare_exchange(epoch, epoch + 1, Ordering::SeqCst, Ordering::SeqCst);
        }
    }
}

impl Drop for Passage<'_> {
    fn drop(&mut self) {
        self.grace.leave(self.shard, self.parity);
    }
}

/// A task that waits, until it is dropped.
struct Waiting<'a>(&'a Grace);

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.waiting.fetch_sub(1, Ordering::SeqCst);
    }
}

/// The calling thread's shard.
fn shard() -> usize {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    thread_local!(static MINE: Cell<Option<usize>> = const { Cell::new(None) });
    MINE.with(|mine| {
        mine.get().unwrap_or_else(|| {
            let new = NEXT.fetch_add(1, Ordering::Relaxed) % SHARDS;
            mine.set(Some(new));
            new
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicBool;

    fn has_ended(grace: &Grace, epoch: Epoch) -> bool {
        grace.ended().is_some_and(|ended| ended >= epoch)
    }

    #[test]
    fn without_requests_every_epoch_ends() {
        let grace = Grace::default();
        for _ in 0..5 {
            let now = grace.now();
            assert!(has_ended(&grace, now) || has_ended(&grace, now));
        }
    }

    #[test]
    fn an_epoch_lasts_until_the_last_request_that_began_in_it_or_before() {
        let grace = Grace::default();
        let old = grace.enter();
        let freed = grace.now();
        for _ in 0..10 {
            // Those that begin later do not make it longer, nor shorter.
            let _new = grace.enter();
            assert!(!has_ended(&grace, freed));
        }
        let new = grace.enter();
        drop(old);
        let ends = (0..3).any(|_| has_ended(&grace, freed));
        drop(new);
        assert!(ends || has_ended(&grace, freed));
    }

    struct Parked(std::thread::Thread);

    impl std::task::Wake for Parked {
        fn wake(self: std::sync::Arc<Self>) {
            self.0.unpark();
        }
    }

    fn block_on(future: impl Future<Output = ()>) {
        let waker = std::sync::Arc::new(Parked(std::thread::current())).into();
        let mut future = std::pin::pin!(future);
        while future.as_mut().poll(&mut std::task::Context::from_waker(&waker)).is_pending() {
            std::thread::park();
        }
    }

    /// Readers look at what a place says while a writer frees and uses it again, as soon as it may.
    #[test]
    fn no_thread_sees_what_took_the_place_of_what_it_found() {
        const PLACES: u64 = 1 << 18;
        let grace = Grace::default();
        // Each place is used once; the one that is named now, and for each whether it is used by somebody else.
        let named = AtomicU64::new(0);
        let reused: Vec<AtomicBool> = (0..PLACES).map(|_| AtomicBool::new(false)).collect();
        std::thread::scope(|s| {
            for _ in 0..3 {
                s.spawn(|| {
                    loop {
                        let _passage = grace.enter();
                        let place = named.load(Ordering::Acquire);
                        if place + 1 == PLACES {
                            return;
                        }
                        for _ in 0..20 {
                            assert!(!reused[usize::try_from(place).unwrap()].load(Ordering::Acquire));
                        }
                    }
                });
            }
            for next in 1..PLACES {
                named.store(next, Ordering::Release);
                block_on(grace.all_left());
                reused[usize::try_from(next - 1).unwrap()].store(true, Ordering::Release);
            }
        });
    }
}
