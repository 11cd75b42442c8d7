//! From the image's errors to what the kernel is told, and one line in the log for each.

use std::error::Error as _;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use vdisk_image::{DiskError, ErrorKind};

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

/// Logs failed requests: every one, unless there are so many that they hide everything else.
#[derive(Debug)]
pub(crate) struct FailureLog {
    window: Mutex<Window>,
}

#[derive(Debug)]
struct Window {
    start: Instant,
    seen: u64,
}

impl FailureLog {
    /// Length of a window.
    const WINDOW: Duration = Duration::from_secs(5);
    /// Lines in a window.
    const LINES: u64 = 10;

    pub(crate) fn new() -> Self {
        Self { window: Mutex::new(Window { start: Instant::now(), seen: 0 }) }
    }

    /// Logs one failure with everything that caused it.
    pub(crate) fn failed(&self, device: u32, error: &DiskError) {
        let (show, hidden) = self.count(Instant::now());
        if hidden > 0 {
            tracing::error!(device, hidden, "more requests failed");
        }
        if show {
            tracing::error!(device, "{}", chain(error));
        }
    }

    /// Counts a failure: whether to show it, and how many of the window before were not shown.
    fn count(&self, now: Instant) -> (bool, u64) {
        let mut window = self.window.lock().unwrap_or_else(|e| e.into_inner());
        let mut hidden = 0;
        if now.saturating_duration_since(window.start) >= Self::WINDOW {
            hidden = window.seen.saturating_sub(Self::LINES);
            *window = Window { start: now, seen: 0 };
        }
        window.seen += 1;
        (window.seen <= Self::LINES, hidden)
    }
}

/// The error and its causes in one line.
fn chain(error: &DiskError) -> String {
    let mut line = error.to_string();
    let mut cause = error.source();
    while let Some(e) = cause {
        line.push_str(": ");
        line.push_str(&e.to_string());
        cause = e.source();
    }
    line
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

    #[test]
    fn a_line_names_every_cause() {
        let e = DiskError::host("write 512 bytes at 0 of \"a\"", std::io::Error::from_raw_os_error(libc::EIO));
        assert_eq!(chain(&e), "write 512 bytes at 0 of \"a\": Input/output error (os error 5)");
    }

    #[test]
    fn many_failures_make_few_lines_and_a_count() {
        let log = FailureLog::new();
        let t = Instant::now();
        assert_eq!((0..100).filter(|_| log.count(t).0).count(), 10);
        assert_eq!(log.count(t + FailureLog::WINDOW), (true, 90));
        assert_eq!(log.count(t + FailureLog::WINDOW), (true, 0));
    }
}
