//! What can go wrong with a device, apart from the requests that it serves.

use std::io;

use libublk::UblkError;

use crate::features::Unavailable;

/// Why a device was not made, or came to an end.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// This kernel, or this process, has no ublk.
    #[error(transparent)]
    Unavailable(#[from] Unavailable),
    /// An option that no device can have.
    #[error("{0}")]
    Option(String),
    /// libublk's directory for running devices cannot be used.
    #[error("{path}: {source}", path = crate::run_dir::PATH)]
    RunDir {
        /// The host's error.
        source: io::Error,
    },
    /// A control command to the driver failed.
    #[error("ublk {command}: {source}")]
    Control {
        /// Its name in include/uapi/linux/ublk_cmd.h, without the prefix.
        command: &'static str,
        /// The driver's answer.
        source: io::Error,
    },
    /// A queue could not be set up, or ended before the device did.
    #[error("ublk queue {queue}: {what}: {source}")]
    Queue {
        /// Number of the queue, from 0.
        queue: u16,
        /// What was being done.
        what: &'static str,
        /// The host's error.
        source: io::Error,
    },
    /// No thread could be started.
    #[error("start a thread: {0}")]
    Thread(#[source] io::Error),
    /// The driver did not answer in time. It may never do: end the process.
    #[error("ublk {what}: no answer within {seconds} s")]
    TimedOut {
        /// What was being waited for.
        what: &'static str,
        /// For how long.
        seconds: u64,
    },
    /// The driver says that the device was started, but its node is not there, or something else is in its place.
    #[error("{path} is not the new device (remove it if it is a plain file)")]
    NotLive {
        /// Path of the block device.
        path: String,
    },
    /// What began with `why` could not be ended: the driver may still send requests, and queue threads serve them. The disk
    /// must not be closed, and the process should end.
    #[error("{why} (and the device does not end)")]
    MayLive {
        /// The failure that it began with.
        why: Box<Error>,
    },
    /// There is no such device, or it does not wait for a server.
    #[error("/dev/ublkb{id} does not wait for a server")]
    NotWaiting {
        /// Number of the device.
        id: u32,
    },
    /// The driver has devices of one size only.
    #[error(
        "the ublk driver of this kernel keeps the size that a device was made with (Linux 6.16 can change it): detach and attach it"
    )]
    CannotGrow,
    /// The device is going away, or to another server.
    #[error("the device is not served any more")]
    Ended,
    /// The device is being served, or just being made, by a living process.
    #[error("/dev/ublkb{id} is being served by process {pid}")]
    Served {
        /// Number of the device.
        id: u32,
        /// The process.
        pid: i32,
    },
}

impl Error {
    /// Whether requests may still be sent, and served by this process: then the disk must not be closed.
    pub fn device_may_live(&self) -> bool {
        matches!(self, Self::MayLive { .. })
    }

    /// Whether the driver may still have the device: then [`crate::delete`] it once this process has ended.
    pub fn device_may_exist(&self) -> bool {
        self.device_may_live() || matches!(self, Self::Control { command: "DEL_DEV", .. })
    }

    /// A failure of a device that could not be ended.
    pub(crate) fn may_live(self) -> Self {
        match self {
            Self::MayLive { .. } => self,
            why => Self::MayLive { why: Box::new(why) },
        }
    }

    /// A failed control command.
    pub(crate) fn control(command: &'static str) -> impl FnOnce(UblkError) -> Self {
        move |e| Self::Control { command, source: host_error(e) }
    }

    /// A failed queue.
    pub(crate) fn queue(queue: u16, what: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Queue { queue, what, source }
    }
}

/// libublk's error without its wrapping, which hides the errno.
pub(crate) fn host_error(e: UblkError) -> io::Error {
    match e {
        UblkError::UringIOError(r) | UblkError::OtherError(r) => io::Error::from_raw_os_error(r.saturating_abs()),
        UblkError::IOError(e) => e,
        UblkError::InvalidVal => io::Error::from_raw_os_error(libc::EINVAL),
        UblkError::QueueIsDown => io::Error::from_raw_os_error(libc::ENODEV),
        e @ (UblkError::UringTimeout | UblkError::UringIoQueued | UblkError::JsonError(_)) => io::Error::other(e),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_that_does_not_end_is_told_after_what_it_began_with_and_once() {
        let e = Error::NotLive { path: "/dev/ublkb0".to_owned() }.may_live().may_live();
        assert!(e.device_may_live() && e.device_may_exist());
        assert_eq!(e.to_string().matches("does not end").count(), 1);
        assert!(e.to_string().starts_with("/dev/ublkb0 is not the new device"), "{e}");
        let e = Error::control("DEL_DEV")(UblkError::UringIOError(-libc::EIO));
        assert!(!e.device_may_live() && e.device_may_exist());
        assert!(!Error::control("START_DEV")(UblkError::UringIOError(-libc::EIO)).device_may_exist());
    }

    #[test]
    fn the_errno_of_a_control_command_is_kept() {
        assert_eq!(host_error(UblkError::UringIOError(-libc::EACCES)).raw_os_error(), Some(libc::EACCES));
        let e = Error::control("ADD_DEV")(UblkError::UringIOError(-libc::EACCES));
        assert_eq!(e.to_string(), "ublk ADD_DEV: Permission denied (os error 13)");
    }
}
