//! Waiting for a condition behind a mutex, on any executor.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

/// Locks a mutex whose holder cannot leave it half-changed: nothing here panics between two stores.
pub(crate) fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Who waits for a condition. Kept beside the condition's state, under the same mutex.
#[derive(Debug, Default)]
pub(crate) struct WaitList(Vec<Waker>);

impl WaitList {
    /// Adds the task that is polling.
    pub(crate) fn add(&mut self, cx: &Context<'_>) {
        if !self.0.iter().any(|w| w.will_wake(cx.waker())) {
            self.0.push(cx.waker().clone());
        }
    }

    /// Takes all wakers out, so that they can be woken after the mutex is released.
    #[must_use]
    pub(crate) fn take(&mut self) -> Vec<Waker> {
        std::mem::take(&mut self.0)
    }
}

/// Wakes all.
pub(crate) fn wake(wakers: Vec<Waker>) {
    for w in wakers {
        w.wake();
    }
}

/// Waits until `ready` gives a value. It is asked under the mutex; while it has none, it names the list to wait on.
pub(crate) async fn until<S, T>(mutex: &Mutex<S>, mut ready: impl FnMut(&mut S) -> Result<T, &mut WaitList>) -> T {
    std::future::poll_fn(|cx| match ready(&mut locked(mutex)) {
        Ok(value) => Poll::Ready(value),
        Err(list) => {
            list.add(cx);
            Poll::Pending
        }
    })
    .await
}
