//! What every transport says of failed requests: lines that a peer or a broken image could ask for without end.

use std::sync::Mutex;
use std::time::{Duration, Instant};

/// Lets some lines through and counts the others.
#[derive(Debug)]
pub struct Limited(Mutex<Option<Window>>);

#[derive(Debug)]
struct Window {
    start: Instant,
    seen: u64,
}

impl Limited {
    /// Length of a window.
    const WINDOW: Duration = Duration::from_secs(5);
    /// Lines in a window.
    const LINES: u64 = 10;

    /// Nothing was left out yet.
    #[expect(clippy::new_without_default, reason = "for statics")]
    pub const fn new() -> Self {
        Self(Mutex::new(None))
    }

    /// Whether a line may be written now, and how many of the window before were not.
    pub fn line(&self) -> Option<LeftOut> {
        self.at(Instant::now())
    }

    fn at(&self, now: Instant) -> Option<LeftOut> {
        let mut window = self.0.lock().unwrap_or_else(|e| e.into_inner());
        let last = window.take().unwrap_or(Window { start: now, seen: 0 });
        let over = now.saturating_duration_since(last.start) >= Self::WINDOW;
        let left_out = if over { last.seen.saturating_sub(Self::LINES) } else { 0 };
        let (start, seen) = if over { (now, 1) } else { (last.start, last.seen + 1) };
        *window = Some(Window { start, seen });
        (seen <= Self::LINES).then_some(LeftOut(left_out))
    }
}

/// Says how many lines are missing, if any are.
#[derive(Debug, PartialEq, Eq)]
pub struct LeftOut(u64);

impl std::fmt::Display for LeftOut {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0 {
            0 => Ok(()),
            n => write!(f, " (before it, {n} more such lines were left out)"),
        }
    }
}

/// An error and its causes in one line.
pub fn chain(error: &dyn std::error::Error) -> String {
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
    fn a_line_names_every_cause() {
        let host = std::io::Error::from_raw_os_error(libc::EIO);
        let e = vdisk_image::DiskError::host("write 512 bytes at 0 of \"a\"", host);
        assert_eq!(chain(&e), "write 512 bytes at 0 of \"a\": Input/output error (os error 5)");
    }

    #[test]
    fn many_make_few_lines_and_a_count() {
        let (lines, t) = (Limited::new(), Instant::now());
        assert_eq!((0..100).filter(|_| lines.at(t).is_some()).count(), 10);
        let later = lines.at(t + Limited::WINDOW).unwrap();
        assert_eq!(later.to_string(), " (before it, 90 more such lines were left out)");
        assert_eq!(lines.at(t + Limited::WINDOW).unwrap().to_string(), "");
    }
}
