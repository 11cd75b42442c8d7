//! From the backend's errors to the wire's, and the errors that no reply can tell.

use vdisk_image::{ErrorKind, Op};

/// An error value of a reply (proto.md, "Error values"). The host's errno never goes on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum NbdError {
    /// EPERM: a change to a read-only export.
    Perm = 1,
    /// EIO.
    Io = 5,
    /// EINVAL: a request that makes no sense, or a read past the end.
    Inval = 22,
    /// ENOSPC: a write past the end, or the host is full.
    NoSpace = 28,
    /// ESHUTDOWN: the server is stopping.
    Shutdown = 108,
}

impl NbdError {
    /// The value on the wire.
    pub fn wire(self) -> u32 {
        self as u32
    }
}

/// What a client is told about an error of the backend; `op` is what it had asked for.
///
/// ENOTSUP is for FAST_ZERO alone (proto.md, "Error values"), which is not offered.
pub fn nbd_error(kind: ErrorKind, op: Op) -> NbdError {
    match kind {
        ErrorKind::ReadOnly | ErrorKind::PermissionDenied => NbdError::Perm,
        ErrorKind::OutOfRange => match op {
            Op::Write | Op::WriteZeroes => NbdError::NoSpace,
            Op::Read | Op::Flush | Op::Discard => NbdError::Inval,
        },
        ErrorKind::NoSpace => NbdError::NoSpace,
        ErrorKind::InvalidRequest | ErrorKind::Unsupported => NbdError::Inval,
        ErrorKind::Corrupt
        | ErrorKind::HostIo
        | ErrorKind::Poisoned
        | ErrorKind::NotAnImage
        | ErrorKind::NotFound
        | ErrorKind::Busy => NbdError::Io,
    }
}

/// The client sent something after which its bytes have no meaning: the connection is cut.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ProtocolError {
    /// Client flags that do not exist or were not offered (proto.md, "Client flags": MUST drop).
    #[error("unknown client flags {0:#010x}")]
    UnknownClientFlags(u32),
    /// An option does not begin with IHAVEOPT.
    #[error("option magic {0:#018x}")]
    BadOptionMagic(u64),
    /// An option announces more data than any option has.
    #[error("option {option} with {len} bytes of data")]
    OptionTooLong {
        /// The option.
        option: u32,
        /// Bytes of data announced.
        len: u32,
    },
    /// A request does not begin with its magic.
    #[error("request magic {0:#010x}")]
    BadRequestMagic(u32),
    /// A write announces more payload than is accepted.
    #[error("write of {0} bytes")]
    WriteTooLong(u32),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_has_its_error_for_every_operation() {
        for op in [Op::Read, Op::Write, Op::Flush, Op::Discard, Op::WriteZeroes] {
            for kind in ErrorKind::ALL {
                let expected = match (kind, op) {
                    (ErrorKind::ReadOnly | ErrorKind::PermissionDenied, _) => 1,
                    (ErrorKind::OutOfRange, Op::Write | Op::WriteZeroes) | (ErrorKind::NoSpace, _) => 28,
                    (ErrorKind::OutOfRange | ErrorKind::InvalidRequest | ErrorKind::Unsupported, _) => 22,
                    _ => 5,
                };
                assert_eq!(nbd_error(kind, op).wire(), expected, "{kind:?} of {op:?}");
            }
        }
        assert_eq!(NbdError::Shutdown.wire(), 108);
    }
}
