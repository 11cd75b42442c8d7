//! What is in flight on one connection, and the bounds on it.

use std::cell::Cell;
use std::rc::Rc;

use tokio::sync::Notify;

use crate::codec::MAX_PAYLOAD;

/// Requests that are read and not answered yet: twice the kernel client's 128 per socket.
const MAX_REQUESTS: usize = 256;
/// Bytes of buffers of these requests; the largest request fits alone.
const MAX_BYTES: usize = MAX_PAYLOAD as usize;

/// Counts what is in flight. One task waits at a time.
#[derive(Debug, Default)]
pub(super) struct Flight {
    requests: Cell<usize>,
    bytes: Cell<usize>,
    running: Cell<usize>,
    changed: Notify,
}

/// One request's share. Goes with the reply, and comes back when the reply is written or dropped.
#[derive(Debug)]
pub(super) struct Permit {
    flight: Rc<Flight>,
    bytes: usize,
}

/// One future of the backend that was begun.
#[derive(Debug)]
pub(super) struct Running(Rc<Flight>);

impl Flight {
    /// Takes a share of `bytes` (at most [`MAX_PAYLOAD`]), when there is one.
    pub(super) async fn permit(self: &Rc<Self>, bytes: usize) -> Permit {
        while self.requests.get() >= MAX_REQUESTS
            || (self.requests.get() > 0 && self.bytes.get().saturating_add(bytes) > MAX_BYTES)
        {
            self.changed.notified().await;
        }
        self.requests.set(self.requests.get() + 1);
        self.bytes.set(self.bytes.get() + bytes);
        Permit { flight: Rc::clone(self), bytes }
    }

    pub(super) fn run(self: &Rc<Self>) -> Running {
        self.running.set(self.running.get() + 1);
        Running(Rc::clone(self))
    }

    /// Returns when every request is answered.
    pub(super) async fn all_answered(&self) {
        while self.requests.get() > 0 {
            self.changed.notified().await;
        }
    }

    /// Returns when no future of the backend is left.
    pub(super) async fn none_running(&self) {
        while self.running.get() > 0 {
            self.changed.notified().await;
        }
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.flight.requests.set(self.flight.requests.get() - 1);
        self.flight.bytes.set(self.flight.bytes.get() - self.bytes);
        self.flight.changed.notify_one();
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.0.running.set(self.0.running.get() - 1);
        self.0.changed.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::now;

    /// Polls once.
    mod futures {
        use std::future::Future;
        use std::pin::pin;
        use std::task::{Context, Poll, Waker};

        pub(super) fn now<T>(future: impl Future<Output = T>) -> Option<T> {
            match pin!(future).poll(&mut Context::from_waker(Waker::noop())) {
                Poll::Ready(value) => Some(value),
                Poll::Pending => None,
            }
        }
    }

    #[test]
    fn the_bytes_are_bounded_and_the_largest_request_fits_alone() {
        let flight = Rc::new(Flight::default());
        let large = now(flight.permit(MAX_BYTES)).unwrap();
        assert!(now(flight.permit(1)).is_none());
        let nothing = now(flight.permit(0)).unwrap();
        drop(large);
        assert!(now(flight.permit(MAX_BYTES)).is_some());
        assert!(now(flight.all_answered()).is_none());
        drop(nothing);
        assert!(now(flight.all_answered()).is_some());
    }

    #[test]
    fn the_number_of_requests_is_bounded() {
        let flight = Rc::new(Flight::default());
        let mut permits: Vec<_> = (0..MAX_REQUESTS).map(|_| now(flight.permit(0)).unwrap()).collect();
        assert!(now(flight.permit(0)).is_none());
        permits.pop();
        assert!(now(flight.permit(0)).is_some());
    }
}
