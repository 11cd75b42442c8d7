//! What a peer may use, and what is expected of it.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use tokio::time::timeout;

use super::budget::Budget;
use super::pool::Pool;

/// How long a client may send nothing of a payload, or take nothing of its replies: buffers wait for it.
pub(super) const STALL: Duration = Duration::from_secs(60);

/// The terms of a connection. The kernel's client is trusted: it has no time limit and no budget.
#[derive(Clone, Debug, Default)]
pub(super) struct Terms {
    pub(super) budget: Option<Budget>,
    /// Shared by the connections of a thread, or what idle ones keep would add up.
    pub(super) pool: Rc<Pool>,
    pub(super) stall: Option<Duration>,
    /// The socket, if its other end is the kernel's client.
    pub(super) kernel: Option<Rc<OwnedFd>>,
}

impl Terms {
    /// For a client that may be anybody.
    pub(super) fn stranger(budget: Option<Budget>) -> Self {
        Self { budget, stall: Some(STALL), ..Self::default() }
    }

    pub(super) fn kernel(socket: OwnedFd) -> Self {
        Self { kernel: Some(Rc::new(socket)), ..Self::default() }
    }

    /// Whether the kernel has given this socket up, and so sends its requests again on another.
    pub(super) fn is_given_up(&self) -> bool {
        self.kernel.as_ref().is_some_and(|socket| {
            let mut polled = [PollFd::new(socket.as_fd(), PollFlags::empty())];
            poll(&mut polled, PollTimeout::ZERO).is_ok_and(|n| n > 0)
        })
    }
}

/// Waits for a read or a write of some bytes, for as long as these terms allow.
pub(super) async fn progress<T>(
    stall: Option<Duration>,
    what: &str,
    some: impl Future<Output = io::Result<T>>,
) -> io::Result<T> {
    let Some(stall) = stall else { return some.await };
    timeout(stall, some).await.unwrap_or_else(|_| {
        Err(io::Error::new(io::ErrorKind::TimedOut, format!("the client {what} nothing for {} s", stall.as_secs())))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::net::Shutdown;
    use std::os::unix::net::UnixStream;

    #[test]
    fn a_socket_is_given_up_once_the_other_end_is_shut_whatever_is_in_it() {
        let (ours, mut kernels) = UnixStream::pair().unwrap();
        let terms = Terms::kernel(ours.into());
        assert!(!terms.is_given_up());
        kernels.write_all(b"a request").unwrap();
        assert!(!terms.is_given_up());
        kernels.shutdown(Shutdown::Both).unwrap();
        assert!(terms.is_given_up());
        assert!(!Terms::default().is_given_up());
    }
}
