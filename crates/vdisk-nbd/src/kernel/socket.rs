//! A generic netlink socket: one request, its answer.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, setsockopt, socket, sockopt,
};
use nix::sys::time::{TimeVal, TimeValLike};

use super::error::KernelError;
use super::netlink::{Answer, Message};
use super::sys::want_extended_acks;

/// How long an answer may take in seconds. The kernel works while the request is being sent; this is for one that is
/// lost.
const ANSWER_SECONDS: i64 = 60;

/// The socket, and the number of the last request.
#[derive(Debug)]
pub(super) struct Netlink {
    socket: OwnedFd,
    sequence: u32,
}

impl Netlink {
    pub(super) fn open() -> Result<Self, KernelError> {
        let socket =
            socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::NetlinkGeneric)
                .map_err(refused)?;
        setsockopt(&socket, sockopt::ReceiveTimeout, &TimeVal::seconds(ANSWER_SECONDS)).map_err(refused)?;
        // Without them refusals have a number only.
        let _ = want_extended_acks(&socket);
        Ok(Self { socket, sequence: 0 })
    }

    /// Sends a request to a family and waits for its acknowledgement.
    pub(super) fn request(
        &mut self,
        family: u16,
        command: u8,
        attributes: impl FnOnce(Message) -> Message,
    ) -> Result<Answer, KernelError> {
        self.sequence += 1;
        let message = attributes(Message::new(family, command, self.sequence)).finish();
        retried(|| send(self.socket.as_raw_fd(), &message, MsgFlags::empty()))?;
        let mut answer = Answer::default();
        let mut datagram = vec![0; 32 << 10];
        loop {
            let len = retried(|| recv(self.socket.as_raw_fd(), &mut datagram, MsgFlags::empty()))?;
            answer.take(datagram.get(..len).unwrap_or_default(), self.sequence);
            match answer.result.take() {
                Some(Ok(())) => return Ok(answer),
                Some(Err(e)) => return Err(e),
                None => {}
            }
        }
    }
}

fn retried<T>(mut call: impl FnMut() -> nix::Result<T>) -> Result<T, KernelError> {
    loop {
        match call() {
            Err(nix::Error::EINTR) => {}
            done => return done.map_err(refused),
        }
    }
}

fn refused(errno: nix::Error) -> KernelError {
    let errno = io::Error::from(errno).raw_os_error().unwrap_or(nix::libc::EIO);
    KernelError { errno, text: None }
}
