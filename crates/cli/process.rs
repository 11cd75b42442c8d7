//! Serving processes: told apart from later ones with the same number, signalled and waited for without a race.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

/// When a running process was started, in clock ticks since boot; `None` if there is none, or only its zombie.
pub(crate) fn start_time(pid: u32) -> Option<u64> {
    match parse_stat(&fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)? {
        (b'Z' | b'X', _) => None,
        (_, start_time) => Some(start_time),
    }
}

/// The name of a process, for messages.
pub(crate) fn name(pid: u32) -> String {
    fs::read_to_string(format!("/proc/{pid}/comm")).map_or_else(|_| "?".to_owned(), |n| n.trim_end().to_owned())
}

/// State and start time (fields 3 and 22 of proc(5)). The name, field 2, may hold spaces and parentheses.
fn parse_stat(stat: &str) -> Option<(u8, u64)> {
    let (_, after_name) = stat.rsplit_once(')')?;
    let mut fields = after_name.split_ascii_whitespace();
    let state = *fields.next()?.as_bytes().first()?;
    Some((state, fields.nth(18)?.parse().ok()?))
}

/// A running process that was started at a known time.
pub(crate) struct Process {
    pidfd: OwnedFd,
}

impl Process {
    /// `None` if it has ended.
    pub(crate) fn find(pid: u32, started: u64) -> io::Result<Option<Self>> {
        let Some(number) = i32::try_from(pid).ok().and_then(Pid::from_raw) else { return Ok(None) };
        let pidfd = match pidfd_open(number, PidfdFlags::empty()) {
            Ok(pidfd) => pidfd,
            // The latter two: it has been the leader of a session that still has a child of its.
            Err(rustix::io::Errno::SRCH | rustix::io::Errno::INVAL | rustix::io::Errno::NOENT) => return Ok(None),
            Err(e) => return Err(e.into()),
        };
        // The number cannot be given to another process any more: now look whose it is.
        Ok((start_time(pid) == Some(started)).then_some(Self { pidfd }))
    }

    /// Asks it to drain, flush and exit.
    pub(crate) fn terminate(&self) -> io::Result<()> {
        self.signal(Signal::TERM)
    }

    /// Asks it to let go of its device, flush and exit.
    pub(crate) fn let_go(&self) -> io::Result<()> {
        self.signal(Signal::USR1)
    }

    /// Asks it to look how large its image is.
    pub(crate) fn look_again(&self) -> io::Result<()> {
        self.signal(Signal::HUP)
    }

    /// Ends it at once.
    pub(crate) fn kill(&self) -> io::Result<()> {
        self.signal(Signal::KILL)
    }

    fn signal(&self, signal: Signal) -> io::Result<()> {
        match pidfd_send_signal(&self.pidfd, signal) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
            Err(e) => Err(e.into()),
        }
    }

    /// Waits until it has exited; `false` if it still runs after `limit`.
    pub(crate) fn wait(&self, limit: Duration) -> io::Result<bool> {
        let deadline = Instant::now() + limit;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let left = Timespec::try_from(left).map_err(io::Error::other)?;
            match poll(&mut [PollFd::new(&self.pidfd, PollFlags::IN)], Some(&left)) {
                Ok(0) => return Ok(false),
                Ok(_) => return Ok(true),
                Err(rustix::io::Errno::INTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn reads_a_stat_line_whose_name_has_spaces_and_parentheses() {
        let stat = "42 (a) b (c) S 1 42 42 0 -1 4194560 1 0 0 0 2 3 0 0 20 0 1 0 98765 1 2 3 18446744073709551615 1";
        assert_eq!(parse_stat(stat), Some((b'S', 98765)));
        assert_eq!(parse_stat("42 (cut) S 1 2"), None);
        assert_eq!(parse_stat(""), None);
    }

    #[test]
    fn a_process_is_itself_only_with_its_start_time() {
        let me = std::process::id();
        let started = start_time(me).unwrap();
        assert!(Process::find(me, started).unwrap().is_some());
        assert!(Process::find(me, started + 1).unwrap().is_none());
    }

    #[test]
    fn a_terminated_process_is_seen_to_end_even_as_a_zombie() {
        let mut child = Command::new("sleep").arg("1000").spawn().unwrap();
        let started = start_time(child.id()).unwrap();
        let process = Process::find(child.id(), started).unwrap().unwrap();
        assert!(!process.wait(Duration::ZERO).unwrap());
        process.terminate().unwrap();
        assert!(process.wait(Duration::from_secs(60)).unwrap());
        assert_eq!(start_time(child.id()), None);
        assert!(Process::find(child.id(), started).unwrap().is_none());
        child.wait().unwrap();
    }
}
