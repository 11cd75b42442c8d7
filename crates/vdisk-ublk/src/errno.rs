//! From the image's errors to what the kernel is told.

use vdisk_image::ErrorKind;

/// The errno with which a request fails.
///
/// Only three are ever given to the kernel, whose table `blk_errors` (block/blk-core.c) knows special meanings for many:
/// EAGAIN and EBUSY would be retried, EOPNOTSUPP would turn a feature off, EINVAL means a badly aligned request.
/// ENOSPC reaches the user as "No space left on device"; EPERM, which has no entry there, as an I/O error.
pub fn errno(kind: ErrorKind) -> i32 {
    match kind {
        ErrorKind::ReadOnly => libc::EPERM,
        ErrorKind::NoSpace => libc::ENOSPC,
        ErrorKind::NotAnImage
        | ErrorKind::Unsupported
        | ErrorKind::Corrupt
        | ErrorKind::NotFound
        | ErrorKind::PermissionDenied
        | ErrorKind::Busy
        // The kernel keeps requests inside the device itself, so these two are faults, not a full disk.
        | ErrorKind::OutOfRange
        | ErrorKind::InvalidRequest
        | ErrorKind::HostIo
        | ErrorKind::Poisoned => libc::EIO,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_has_an_errno_without_a_meaning_of_its_own() {
        for kind in ErrorKind::ALL {
            let expected = match kind {
                ErrorKind::ReadOnly => libc::EPERM,
                ErrorKind::NoSpace => libc::ENOSPC,
                _ => libc::EIO,
            };
            assert_eq!(errno(kind), expected, "{kind:?}");
        }
    }
}
