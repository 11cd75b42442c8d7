//! `vdisk attach`: the command that starts the serving process and waits until it reports.

use std::env;
use std::ffi::OsString;
use std::io::{self, BufRead, BufReader, IsTerminal, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use crate::failure::{Exit, Failure, Result};
use crate::options::{DirectIo, ImageOptions, ZeroCopy};
use crate::report::{RECEIPT, Report};
use crate::resume::Resume;
use crate::state::StateDir;
use crate::transport::{Choice, DeviceOptions};
use crate::{partitions, server};

/// Serve an image as a block device from a background process, and print the device
///
/// If a device of this image waits for another server, its own having died, that device is taken over with these options: started again
/// by a service manager, the same command goes on where it was killed.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "Example:\n  dev=$(sudo vdisk attach disk.vmdk) && sudo mount \"${dev}p1\" /mnt")]
pub(crate) struct Args {
    #[command(flatten)]
    pub(crate) image: ImageOptions,
    /// Go around the host's page cache (auto: where the file can, except with fuse). `vdisk serve` never does: its clients may ask for single
    /// bytes, and direct and cached I/O in one page do not mix
    #[arg(long, value_enum, value_name = "WHEN", default_value_t = DirectIo::Auto)]
    pub(crate) direct_io: DirectIo,
    /// ublk makes /dev/ublkbN, nbd /dev/nbdN, fuse /dev/loopN; auto takes the first of them that this kernel has
    #[arg(long, value_enum, default_value_t = Choice::Auto)]
    pub(crate) transport: Choice,
    /// Queues of the device, each with a thread [default: by the number of processors]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=64))]
    pub(crate) queues: Option<u16>,
    /// Requests in flight per queue (ublk only: nbd and loop devices have 128)
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=4096))]
    pub(crate) depth: Option<u16>,
    /// Serve requests in the kernel's own pages instead of copying them (ublk only; auto: where the kernel can, Linux 6.16)
    #[arg(long, value_enum, value_name = "WHEN", default_value_t = ZeroCopy::Auto)]
    pub(crate) zero_copy: ZeroCopy,
    /// Stay in the foreground and log to stderr (for service managers)
    #[arg(long)]
    pub(crate) foreground: bool,
}

impl Args {
    pub(crate) fn device_options(&self, resume: &Resume) -> DeviceOptions {
        DeviceOptions {
            queues: self.queues,
            depth: self.depth,
            zero_copy: self.zero_copy,
            recoverable: resume.impossible.is_none(),
            cookie: resume.cookie,
        }
    }
}

pub(crate) fn run(args: &Args, verbose: bool, ready_pipe: bool) -> Result<()> {
    if !rustix::process::geteuid().is_root() {
        return Err(Failure::new("needs root (to make a block device): use sudo, or vdisk serve"));
    }
    if args.foreground || ready_pipe {
        return server::run(args, None, verbose, ready_pipe);
    }
    in_background()
}

/// Has this very command run again as the background process, and prints the device that it serves.
pub(crate) fn in_background() -> Result<()> {
    let device = background(env::args_os().skip(1), |device, notices| {
        notices.iter().for_each(|text| crate::notice(text));
        crate::print_all(&format!("{}\n", device.display()))
    })?;
    show_partitions(&device);
    Ok(())
}

/// Has a command run as a background process that serves a device, and waits for that. `tell` makes the device known.
pub(crate) fn background(
    command: impl IntoIterator<Item = OsString>,
    tell: impl FnOnce(&Path, &[String]) -> Result<()>,
) -> Result<PathBuf> {
    let mut child = spawn(command).map_err(|e| Failure::doing("start the serving process", &e))?;
    match await_report(&mut child)? {
        Report::Ready { device, notices } => {
            let receipt = child.stdin.take();
            if let Err(failure) = tell(&device, &notices) {
                // Without the receipt the process takes the device away.
                drop(receipt);
                return Err(after_end(&mut child, failure));
            }
            if let Some(mut pipe) = receipt {
                // Fails if the process was ended already: `list` tells.
                let _ = pipe.write_all(RECEIPT);
            }
            Ok(device)
        }
        Report::Failed { no_transport, text } => {
            let exit = if no_transport { Exit::NoTransport } else { Exit::Failed };
            Err(after_end(&mut child, Failure::new(text).with_exit(exit)))
        }
    }
}

/// How long a process may take to end that has nothing to serve.
const END: Duration = Duration::from_secs(15);

/// A failure that is told when the process has ended: only then is nothing left behind.
fn after_end(child: &mut Child, failure: Failure) -> Failure {
    match ended(child, END) {
        Some(_) => failure,
        None => failure.hint(format_args!("pid {} does not end", child.id())),
    }
}

/// Waits for the end of a process.
fn ended(child: &mut Child, limit: Duration) -> Option<ExitStatus> {
    let deadline = Instant::now() + limit;
    loop {
        match child.try_wait() {
            Ok(Some(status)) => return Some(status),
            Ok(None) if Instant::now() < deadline => thread::sleep(Duration::from_millis(10)),
            Ok(None) | Err(_) => return None,
        }
    }
}

/// Starts this very program again, which opens everything itself: a process that forked has threads and rings to lose.
fn spawn(command: impl IntoIterator<Item = OsString>) -> io::Result<Child> {
    Command::new("/proc/self/exe")
        .arg0("vdisk")
        .arg("--ready-pipe")
        .args(command)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
}

fn await_report(child: &mut Child) -> Result<Report> {
    let mut line = String::new();
    let read = child.stdout.take().map(|pipe| BufReader::new(pipe).read_line(&mut line));
    if let Ok(report) = serde_json::from_str(&line) {
        return Ok(report);
    }
    if let Some(Err(e)) = read {
        tracing::debug!("reading the report: {e}");
    }
    let status = ended(child, END);
    let log = StateDir::host().path().join(format!("{}.log", child.id()));
    let failure = Failure::new(match status {
        Some(status) => format!("the serving process ended without a word: {status}"),
        None => format!("the serving process says nothing, and pid {} does not end", child.id()),
    });
    Err(match log.exists() {
        true => failure.hint(format_args!("its log: {}", log.display())),
        false => failure.hint(format_args!("its log: journalctl _PID={}", child.id())),
    })
}

/// For people at a terminal.
fn show_partitions(device: &Path) {
    if io::stderr().is_terminal() {
        let name = device.file_name().and_then(|n| n.to_str()).unwrap_or_default();
        let _ = write!(io::stderr(), "{}", partitions::table(&partitions::of(name)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_that_does_not_end_is_given_up_and_named() {
        let mut child = Command::new("sleep").arg("1000").spawn().unwrap();
        assert_eq!(ended(&mut child, Duration::from_millis(20)), None);
        child.kill().unwrap();
        let failure = after_end(&mut child, Failure::new("why"));
        assert_eq!(failure.to_string(), "why");
        assert!(ended(&mut child, Duration::ZERO).is_some());
    }
}
