//! How a serving process tells the command that waits for it that the device is there, or why not.

use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde::{Deserialize, Serialize};

use crate::failure::{Exit, Failure, Result};
use crate::signals::Stop;

/// One line of JSON over the pipe that is the background process's stdout. A device is answered by [`RECEIPT`] over the pipe
/// that is its stdin, once it was printed.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Report {
    Ready { device: PathBuf, notices: Vec<String> },
    Failed { no_transport: bool, text: String },
}

/// Without it nobody knows of the device, and it is taken away again.
pub(crate) const RECEIPT: &[u8] = b"\n";

/// The serving process's end.
pub(crate) struct Reporter {
    background: bool,
    notices: Vec<String>,
    reported: bool,
}

impl Reporter {
    pub(crate) fn new(background: bool) -> Self {
        Self { background, notices: Vec::new(), reported: false }
    }

    /// Something that the user should know once the device is there. A failure is told alone.
    pub(crate) fn notice(&mut self, text: String) {
        if self.background {
            tracing::warn!("{text}");
        }
        self.notices.push(text);
    }

    /// Whether a command waits for the report, and the log is the only other place for words.
    pub(crate) fn is_background(&self) -> bool {
        self.background
    }

    /// Whether the device was reported.
    pub(crate) fn is_done(&self) -> bool {
        self.reported
    }

    /// The device can be used. In the background, waits until it was printed, or `stop` is given.
    ///
    /// # Errors
    ///
    /// It could not be printed, or nobody is waiting any more.
    pub(crate) fn ready(&mut self, device: &Path, stop: &Stop) -> Result<()> {
        if self.background {
            let report = Report::Ready { device: device.to_owned(), notices: self.notices.clone() };
            let told = self.send(&report).and_then(|()| await_receipt(stop));
            told.map_err(|e| Failure::doing("nobody waits for the device any more", &e))?;
        } else {
            for text in &self.notices {
                crate::notice(text);
            }
            crate::print_all(&format!("{}\n", device.display()))?;
            crate::service::tell_ready();
        }
        self.reported = true;
        Ok(())
    }

    /// As [`Self::ready`], of a device that is served whether anybody hears of it or not.
    pub(crate) fn ready_anyway(&mut self, device: &Path, stop: &Stop) {
        if let Err(failure) = self.ready(device, stop) {
            tracing::error!("{failure}");
            if !self.background {
                crate::service::tell_ready();
            }
            self.reported = true;
        }
    }

    /// The device could not be made: to be told by the waiting command. In the foreground, `main` tells it.
    pub(crate) fn failed(&mut self, failure: &Failure) -> io::Result<()> {
        let (no_transport, text) = (failure.exit == Exit::NoTransport, failure.to_string());
        if !self.background {
            return Ok(());
        }
        self.send(&Report::Failed { no_transport, text })
    }

    fn send(&self, report: &Report) -> io::Result<()> {
        let mut line = serde_json::to_vec(report)?;
        line.push(b'\n');
        let mut pipe = io::stdout();
        pipe.write_all(&line).and_then(|()| pipe.flush())?;
        // The pipe ends here, for the command to see.
        let null = std::fs::OpenOptions::new().write(true).open("/dev/null")?;
        Ok(rustix::stdio::dup2_stdout(null)?)
    }
}

/// Waits for the command's word that it has printed the device.
fn await_receipt(stop: &Stop) -> io::Result<()> {
    let often = Timespec { tv_sec: 0, tv_nsec: 200_000_000 };
    let mut stdin = io::stdin();
    while !stop.is_given() {
        match poll(&mut [PollFd::new(&stdin.as_fd(), PollFlags::IN)], Some(&often)) {
            Ok(0) | Err(rustix::io::Errno::INTR) => {}
            Ok(_) => {
                stdin.read_exact(&mut [0; RECEIPT.len()])?;
                break;
            }
            Err(e) => return Err(e.into()),
        }
    }
    let null = std::fs::File::open("/dev/null")?;
    Ok(rustix::stdio::dup2_stdin(null)?)
}
