//! `vdisk attach`: the command that starts the serving process and waits until it reports.

use std::env;
use std::io::{self, BufRead, BufReader, IsTerminal, Write};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use crate::failure::{Exit, Failure, Result};
use crate::options::ImageOptions;
use crate::report::Report;
use crate::state::StateDir;
use crate::transport::{Choice, DeviceOptions};
use crate::{partitions, server};

/// Serve an image as a block device from a background process, and print the device
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  dev=$(sudo vdisk attach disk.vmdk) && sudo mount \"${dev}p1\" /mnt")]
pub(crate) struct Args {
    #[command(flatten)]
    pub(crate) image: ImageOptions,
    /// ublk makes /dev/ublkbN, nbd /dev/nbdN; auto takes the first of them that this kernel has
    #[arg(long, value_enum, default_value_t = Choice::Auto)]
    pub(crate) transport: Choice,
    /// Queues of the device, each with a thread [default: by the number of processors]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=64))]
    pub(crate) queues: Option<u16>,
    /// Requests in flight per queue (ublk only: nbd has 128)
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=4096))]
    pub(crate) depth: Option<u16>,
    /// Stay in the foreground and log to stderr (for service managers)
    #[arg(long)]
    pub(crate) foreground: bool,
}

impl Args {
    pub(crate) fn device_options(&self) -> DeviceOptions {
        DeviceOptions { queues: self.queues, depth: self.depth }
    }
}

pub(crate) fn run(args: &Args, verbose: bool, ready_pipe: bool) -> Result<()> {
    if !rustix::process::geteuid().is_root() {
        return Err(Failure::new("needs root (to make a block device): use sudo, or vdisk serve"));
    }
    if args.foreground || ready_pipe {
        return server::run(args, verbose, ready_pipe);
    }
    let mut child = spawn().map_err(|e| Failure::doing("start the serving process", &e))?;
    match await_report(&mut child)? {
        Report::Ready { device, notices } => {
            for text in notices {
                crate::notice(&text);
            }
            show(&device)
        }
        Report::Failed { no_transport, text } => {
            // Only when it has gone is nothing left behind.
            let _ = child.wait();
            let exit = if no_transport { Exit::NoTransport } else { Exit::Failed };
            Err(Failure::new(text).with_exit(exit))
        }
    }
}

/// Starts this very program again, which opens everything itself: a process that forked has threads and rings to lose.
fn spawn() -> io::Result<Child> {
    Command::new("/proc/self/exe")
        .arg0("vdisk")
        .arg("--ready-pipe")
        .args(env::args_os().skip(1))
        .stdin(Stdio::null())
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
    let status = child.wait().map_err(|e| Failure::doing("wait for the serving process", &e))?;
    let log = StateDir::host().path().join(format!("{}.log", child.id()));
    let failure = Failure::new(format!("the serving process ended without a word: {status}"));
    Err(match log.exists() {
        true => failure.hint(format_args!("its log: {}", log.display())),
        false => failure.hint(format_args!("its log: journalctl _PID={}", child.id())),
    })
}

fn show(device: &Path) -> Result<()> {
    crate::print(&format!("{}\n", device.display()))?;
    if io::stderr().is_terminal() {
        let name = device.file_name().and_then(|n| n.to_str()).unwrap_or_default();
        let _ = write!(io::stderr(), "{}", partitions::table(&partitions::of(name)));
    }
    Ok(())
}
