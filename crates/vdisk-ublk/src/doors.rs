//! The door of each queue, which a server closes that lets go of its device: requests that came through are served to their end,
//! later ones stay outside, for the next server.

use std::future::poll_fn;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Mutex, PoisonError};
use std::task::{Poll, Waker};
use std::thread;
use std::time::{Duration, Instant};

/// One for each queue of a device.
#[derive(Debug)]
pub(crate) struct Doors {
    closed: AtomicBool,
    inside: Vec<Inside>,
    outside: Mutex<Vec<Waker>>,
}

/// Requests of a queue that are being served. Of the queue's thread alone, but for a look from elsewhere: no cache line is
/// shared by two queues.
#[derive(Debug, Default)]
#[repr(align(128))]
struct Inside(AtomicU32);

/// How often the doors are looked at that are being closed.
const STEP: Duration = Duration::from_millis(2);

impl Doors {
    pub(crate) fn new(queues: u16) -> Self {
        let inside = (0..queues).map(|_| Inside::default()).collect();
        Self { closed: AtomicBool::new(false), inside, outside: Mutex::default() }
    }

    /// Waits outside while the door is closed. The request is inside until the answer is dropped.
    pub(crate) async fn enter(&self, queue: u16) -> Guest<'_> {
        poll_fn(|cx| match self.try_enter(queue) {
            Some(guest) => Poll::Ready(guest),
            None => {
                let mut outside = self.outside.lock().unwrap_or_else(PoisonError::into_inner);
                if let (false, Some(guest)) = (self.closed.load(Ordering::SeqCst), self.try_enter(queue)) {
                    return Poll::Ready(guest);
                }
                outside.push(cx.waker().clone());
                Poll::Pending
            }
        })
        .await
    }

    fn try_enter(&self, queue: u16) -> Option<Guest<'_>> {
        let guest = Guest(self.inside.get(usize::from(queue)).map(|Inside(count)| count));
        // Before the look at the door, as `close` looks at the count after it has closed: one of the two sees the other.
        if let Some(count) = guest.0 {
            count.fetch_add(1, Ordering::SeqCst);
        }
        (!self.closed.load(Ordering::SeqCst)).then_some(guest)
    }

    /// Closes the doors and waits until nobody is inside. If that does not come about within `limit`, or `hurry` says that there
    /// is no time, they are open again.
    pub(crate) fn close(&self, limit: Duration, mut hurry: impl FnMut() -> bool) -> bool {
        let deadline = Instant::now() + limit;
        self.closed.store(true, Ordering::SeqCst);
        while self.inside.iter().any(|Inside(count)| count.load(Ordering::SeqCst) > 0) {
            if Instant::now() >= deadline || hurry() {
                self.open();
                return false;
            }
            thread::sleep(STEP);
        }
        true
    }

    fn open(&self) {
        let mut outside = self.outside.lock().unwrap_or_else(PoisonError::into_inner);
        self.closed.store(false, Ordering::SeqCst);
        let waiting = std::mem::take(&mut *outside);
        drop(outside);
        waiting.into_iter().for_each(Waker::wake);
    }
}

/// A request that is being served.
#[derive(Debug)]
pub(crate) struct Guest<'a>(Option<&'a AtomicU32>);

impl Drop for Guest<'_> {
    fn drop(&mut self) {
        if let Some(count) = self.0 {
            count.fetch_sub(1, Ordering::SeqCst);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::pin::pin;
    use std::task::Context;

    fn poll<F: Future>(future: std::pin::Pin<&mut F>) -> Poll<F::Output> {
        future.poll(&mut Context::from_waker(Waker::noop()))
    }

    #[test]
    fn who_is_inside_is_waited_for_and_who_comes_later_stays_outside() {
        let doors = Doors::new(2);
        let Poll::Ready(guest) = poll(pin!(doors.enter(1))) else { unreachable!("it is open") };
        assert!(!doors.close(Duration::from_millis(20), || false), "one is inside");
        let Poll::Ready(second) = poll(pin!(doors.enter(0))) else { unreachable!("it is open again") };
        thread::scope(|scope| {
            let closing = scope.spawn(|| doors.close(Duration::from_secs(60), || false));
            while !doors.closed.load(Ordering::SeqCst) {
                thread::yield_now();
            }
            let mut third = pin!(doors.enter(0));
            assert!(poll(third.as_mut()).is_pending());
            drop((guest, second));
            assert!(closing.join().unwrap());
            assert!(poll(third.as_mut()).is_pending(), "left to the next server");
        });
    }

    #[test]
    fn who_waits_outside_is_served_when_the_doors_open_again() {
        let doors = Doors::new(1);
        let Poll::Ready(_guest) = poll(pin!(doors.enter(0))) else { unreachable!("it is open") };
        let mut waiting = pin!(doors.enter(0));
        let came = AtomicBool::new(false);
        let closed = doors.close(Duration::from_secs(60), || {
            assert!(poll(waiting.as_mut()).is_pending());
            came.swap(true, Ordering::SeqCst)
        });
        assert!(!closed && came.load(Ordering::SeqCst));
        assert!(poll(waiting.as_mut()).is_ready());
    }
}
