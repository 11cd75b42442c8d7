//! `vdisk detach`: refuses while somebody uses the device, else waits until its server has flushed and gone.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::OFlags;

use crate::failure::{Failure, Result};
use crate::in_use::Tree;
use crate::process::Process;
use crate::state::{State, StateDir};

/// Remove a device once it is flushed and its image closed
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  sudo vdisk detach /dev/ublkb0")]
pub(crate) struct Args {
    /// The device, or the image that it serves
    #[arg(value_name = "DEVICE|IMAGE", required_unless_present = "all", conflicts_with = "all")]
    what: Option<PathBuf>,
    /// Every device of vdisk
    #[arg(long)]
    all: bool,
    /// Even while it is mounted or held; end a server that does not answer (what was not flushed is lost)
    #[arg(long)]
    force: bool,
}

/// How long udev, blkid and the like may take to look at a device.
const GLANCE: Duration = Duration::from_secs(3);
/// After this the user is told what is waited for.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long a server that is to be ended by force may take.
const FORCED: Duration = Duration::from_secs(15);

/// A failure comes with what it is about.
pub(crate) fn run(args: &Args, verbose: bool) -> Result<(), (String, Failure)> {
    crate::logging::to_stderr(verbose);
    let what = args.what.as_deref().unwrap_or(Path::new("--all"));
    let about = |failure| (format!("detach {}", what.display()), failure);
    if !rustix::process::geteuid().is_root() {
        return Err(about(Failure::new("needs root: use sudo")));
    }
    let dir = StateDir::host();
    let states = dir.list().map_err(about)?;
    if !args.all {
        return detach(&dir, find(what, states).map_err(about)?, args.force).map_err(about);
    }
    let mut last = Ok(());
    for state in states {
        let name = format!("detach {}", state.device.display());
        let Err(failure) = detach(&dir, state, args.force) else { continue };
        if let Err((name, failure)) = std::mem::replace(&mut last, Err((name, failure))) {
            crate::complain(&name, &failure);
        }
    }
    last
}

/// Finds what is meant by a device or an image.
fn find(what: &Path, states: Vec<State>) -> Result<State> {
    let real = fs::canonicalize(what).or_else(|_| std::path::absolute(what)).unwrap_or_else(|_| what.to_owned());
    let image = real.to_string_lossy();
    let is_meant = |s: &State| s.device == real || s.device.file_name() == Some(what.as_os_str()) || s.image == image;
    let mut found = states.into_iter().filter(is_meant);
    match (found.next(), found.next()) {
        (Some(state), None) => Ok(state),
        (None, _) => Err(Failure::new("is not attached").hint("vdisk list shows what is")),
        (Some(first), Some(second)) => {
            let devices = [first, second].into_iter().chain(found).map(|s| s.device.display().to_string());
            Err(Failure::new(format!("is attached as {}", devices.collect::<Vec<_>>().join(" and ")))
                .hint("name the device"))
        }
    }
}

fn detach(dir: &StateDir, state: State, force: bool) -> Result<()> {
    let Some(server) = state.process()? else { return detach_dead(dir, &state, force) };
    // Held until the server has gone, so that nobody mounts it in between.
    let _claim = if force { None } else { claim(&state)? };
    server.terminate().map_err(|e| Failure::doing(format_args!("stop pid {}", state.pid), &e))?;
    let killed = wait(&server, &state, force).map_err(|e| Failure::doing("wait for the server", &e))?;
    drop(_claim);
    // It takes its state file away as its last step.
    let Some(left) = dir.reread(&state) else { return Ok(()) };
    clear(dir, &left)?;
    match &left.error {
        Some(error) => Err(Failure::new(format!("its server failed: {error}")).hint(log_of(&left))),
        None if force => {
            let end = if killed { "did not answer and was ended" } else { "had died" };
            crate::notice(&format!("pid {} {end}: what was not flushed is lost", left.pid));
            crate::logging::discard(&left.log);
            Ok(())
        }
        None => {
            Err(Failure::new(format!("its server (pid {}) died before it had flushed", left.pid)).hint(log_of(&left)))
        }
    }
}

/// The server is dead, and with it what it had not flushed; the device may still be there.
fn detach_dead(dir: &StateDir, state: &State, force: bool) -> Result<()> {
    // Looked up without opening the device: an open could hang, as nobody answers.
    let users = Tree::of(state.device_name()).lasting_users();
    if !users.is_empty() && !force {
        let text = format!("its server (pid {}) is dead, and {}", state.pid, users.join(", "));
        return Err(Failure::new(text).hint("unmount it, or use --force"));
    }
    clear(dir, state)?;
    match &state.error {
        Some(error) => Err(Failure::new(format!("its server failed: {error}")).hint(log_of(state))),
        None => {
            crate::logging::discard(&state.log);
            Ok(())
        }
    }
}

/// Removes a dead server's device and state file.
pub(crate) fn clear(dir: &StateDir, state: &State) -> Result<()> {
    state.transport.remove(state)?;
    dir.remove(state)
}

fn log_of(state: &State) -> String {
    match state.log.as_str() {
        crate::logging::JOURNAL => format!("its log: journalctl _PID={}", state.pid),
        place => format!("its log: {place}"),
    }
}

/// Opens the device for us alone; `None` if it is gone already. Whether it is busy, the kernel decides.
fn claim(state: &State) -> Result<Option<File>> {
    let exclusive = i32::try_from(OFlags::EXCL.bits()).unwrap_or_default();
    let deadline = Instant::now() + GLANCE;
    loop {
        let claimed = match OpenOptions::new().read(true).custom_flags(exclusive).open(&state.device) {
            Ok(file) => Some(file),
            Err(e) if e.kind() == io::ErrorKind::ResourceBusy => None,
            Err(e) if is_gone(&e) => return Ok(None),
            Err(e) => return Err(Failure::doing(format_args!("open {}", state.device.display()), &e)),
        };
        let tree = Tree::of(state.device_name());
        let mut users = tree.lasting_users();
        let lasting = !users.is_empty();
        if !lasting {
            users = tree.openers(state.pid);
            if users.is_empty() && claimed.is_some() {
                return Ok(claimed);
            }
        }
        if lasting || Instant::now() >= deadline {
            if users.is_empty() {
                users.push("the kernel says that it is busy".to_owned());
            }
            return Err(Failure::new(users.join(", ")).hint("--force detaches it all the same"));
        }
        drop(claimed);
        thread::sleep(Duration::from_millis(100));
    }
}

fn is_gone(e: &io::Error) -> bool {
    use rustix::io::Errno;
    let gone = [Errno::NOENT, Errno::NXIO, Errno::NODEV].map(Errno::raw_os_error);
    e.raw_os_error().is_some_and(|errno| gone.contains(&errno))
}

/// Waits until the server has exited. Whether it had to be killed.
fn wait(server: &Process, state: &State, force: bool) -> io::Result<bool> {
    if server.wait(if force { FORCED } else { PATIENCE })? {
        return Ok(false);
    }
    if force {
        server.kill()?;
    } else {
        crate::notice(&format!("waiting for pid {} to flush {} (--force ends it)", state.pid, state.image));
    }
    while !server.wait(Duration::from_secs(3600))? {}
    Ok(force)
}
