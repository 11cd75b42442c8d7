//! What is in flight on one connection, and the bounds on it.

use std::cell::Cell;
use std::pin::pin;
use std::rc::Rc;

use tokio::sync::Notify;

use super::budget::{Budget, Share};
use crate::codec::MAX_PAYLOAD;

/// Requests that are read and not answered yet: twice the kernel client's 128 per socket.
const MAX_REQUESTS: usize = 256;
/// Bytes of buffers of these requests; the largest request fits alone.
const MAX_BYTES: usize = MAX_PAYLOAD as usize;
/// What a connection may have in flight, as its only request, without asking the common budget: whatever the others do,
/// it goes on. Larger than what clients send by default, and small enough to be granted to all of them.
const OWN_BYTES: usize = 4 << 20;

/// Counts what is in flight. One task waits at a time.
#[derive(Debug, Default)]
pub(super) struct Flight {
    requests: Cell<usize>,
    bytes: Cell<usize>,
    running: Cell<usize>,
    changed: Notify,
    budget: Option<Budget>,
}

/// One request's share. Goes with the reply, and comes back when the reply is written or dropped.
#[derive(Debug)]
pub(super) struct Permit {
    flight: Rc<Flight>,
    bytes: usize,
    _share: Option<Share>,
}

/// One future of the backend that was begun.
#[derive(Debug)]
pub(super) struct Running(Rc<Flight>);

impl Flight {
    pub(super) fn new(budget: Option<Budget>) -> Self {
        Self { budget, ..Self::default() }
    }

    /// Takes a share of `bytes` (at most [`MAX_PAYLOAD`]), when there is one.
    pub(super) async fn permit(self: &Rc<Self>, bytes: usize) -> Permit {
        while self.requests.get() >= MAX_REQUESTS
            || (self.requests.get() > 0 && self.bytes.get().saturating_add(bytes) > MAX_BYTES)
        {
            self.changed.notified().await;
        }
        let share = match &self.budget {
            Some(budget) if bytes > 0 => self.share(budget, bytes).await,
            _ => None,
        };
        self.requests.set(self.requests.get() + 1);
        self.bytes.set(self.bytes.get() + bytes);
        Permit { flight: Rc::clone(self), bytes, _share: share }
    }

    /// A share of the common budget, unless this connection has nothing else in flight and needs none.
    async fn share(&self, budget: &Budget, bytes: usize) -> Option<Share> {
        let mut share = pin!(budget.share(bytes));
        loop {
            if self.bytes.get() == 0 && bytes <= OWN_BYTES {
                return None;
            }
            tokio::select! {
                biased;
                share = share.as_mut() => return share,
                () = self.changed.notified() => {}
            }
        }
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
    fn connections_share_a_budget_and_each_has_one_request_besides() {
        let budget = Budget::new(16 << 20);
        let flight = || Rc::new(Flight::new(Some(budget.clone())));
        let (greedy, other) = (flight(), flight());
        let all = now(greedy.permit(16 << 20)).unwrap();
        assert!(now(other.permit(OWN_BYTES + 1)).is_none());
        let first = now(other.permit(OWN_BYTES)).unwrap();
        assert!(now(other.permit(4096)).is_none());
        assert!(now(other.permit(0)).is_some());
        {
            // One that waits for the budget goes on when its connection has nothing else in flight.
            let mut waiting = pin!(other.permit(4096));
            assert!(now(waiting.as_mut()).is_none());
            drop(first);
            assert!(now(waiting).is_some());
        }
        drop(all);
        assert!(now(greedy.permit(OWN_BYTES + 1)).is_some());
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
