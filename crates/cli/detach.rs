//! `vdisk detach`: refuses while somebody uses the device, else waits until its server has flushed and gone.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::OFlags;

use crate::failure::{Failure, Result};
use crate::in_use::Tree;
use crate::location::Location;
use crate::overlay::Overlay;
use crate::process::Process;
use crate::recover;
use crate::state::{Books, State, StateDir};

/// Remove a device once it is flushed and its image closed
///
/// A device that waits for another server, its own having died, is served again first: what was written to it is not lost.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  sudo vdisk detach /dev/ublkb0")]
pub(crate) struct Args {
    /// The device, or the image that it serves
    #[arg(value_name = "DEVICE|IMAGE", required_unless_present = "all", conflicts_with = "all")]
    what: Option<PathBuf>,
    /// Every device of vdisk
    #[arg(long)]
    all: bool,
    /// Even while it is mounted or held; end a server that does not answer, and fail what waits for a dead one
    #[arg(long)]
    force: bool,
}

/// How long udev, blkid and the like may take to look at a device.
const GLANCE: Duration = Duration::from_secs(3);
/// How long a server may take to note that its image is poisoned.
const NOTING: Duration = Duration::from_secs(1);
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
    let (states, unread) = dir.read_all().map_err(about)?;
    if !args.all {
        unread.iter().for_each(|failure| crate::notice(&failure.to_string()));
        return detach(dir, find(what, states).map_err(about)?, args.force).map_err(about);
    }
    let unread = unread.into_iter().map(|failure| about(failure.hint("what it describes may still be attached")));
    let failed = states.into_iter().filter_map(|state| {
        let name = format!("detach {}", state.device.display());
        detach(dir, state, args.force).err().map(|failure| (name, failure))
    });
    let mut last = Ok(());
    for failure in unread.chain(failed) {
        if let Err((name, failure)) = std::mem::replace(&mut last, Err(failure)) {
            crate::complain(&name, &failure);
        }
    }
    last
}

/// Finds what is meant by a device or an image.
pub(crate) fn find(what: &Path, states: Vec<State>) -> Result<State> {
    let real =
        Location::of(what).real_path().or_else(|_| std::path::absolute(what)).unwrap_or_else(|_| what.to_owned());
    let image = real.to_string_lossy();
    let is_meant = |s: &State| s.device == real || s.device.file_name() == Some(what.as_os_str()) || s.image == image;
    let mut found = states.into_iter().filter(is_meant);
    match (found.next(), found.next()) {
        (Some(state), None) => Ok(state),
        (None, _) => Err(match whole_of(&real) {
            Some(whole) => Failure::new(format!("is a partition of {}", whole.display())).hint("name that"),
            None => Failure::new("is not attached").hint("vdisk list shows what is"),
        }),
        (Some(first), Some(second)) => {
            let devices = [first, second].into_iter().chain(found).map(|s| s.device.display().to_string());
            Err(Failure::new(format!("is attached as {}", devices.collect::<Vec<_>>().join(" and ")))
                .hint("name the device"))
        }
    }
}

/// The device that a path is a partition of.
pub(crate) fn whole_of(device: &Path) -> Option<PathBuf> {
    let partition = fs::canonicalize(Path::new("/sys/class/block").join(device.file_name()?)).ok()?;
    let whole = partition.join("partition").exists().then(|| partition.parent()?.file_name().map(PathBuf::from))?;
    Some(Path::new("/dev").join(whole?))
}

fn detach(dir: &StateDir, state: State, force: bool) -> Result<()> {
    let Some(server) = state.process()? else { return detach_dead(dir, &state, force, None) };
    if state.resume.taking_over && !force {
        // Nobody answers yet what would be asked of it here.
        return Err(
            Failure::new(format!("pid {} is taking it over", state.pid)).hint("try again when vdisk list says live")
        );
    }
    // Held until the server has gone, so that nobody mounts it in between.
    let claim = if force { None } else { claim(&state)? };
    // Nobody else has it open: what was written to it and not flushed waits in its page cache. The kernel writes it when a device
    // is closed, or taken away, but a loop device's server would be gone by then. A poisoned image takes none of it, now or later.
    let flushing = claim.map(Flushing::start);
    end(dir, &state, &server, force, flushing)
}

/// Ends a server, when the device is flushed.
fn end(dir: &StateDir, state: &State, server: &Process, force: bool, flushing: Option<Flushing>) -> Result<()> {
    let claim = match flushing.map(|flushing| flushing.wait(server)).transpose() {
        Ok(flushed) => flushed,
        Err(Unflushed::Dead(flushing)) => return detach_dead(dir, state, force, Some(flushing)),
        Err(Unflushed::Failed(claim, _)) if is_poisoned(dir, state) => Some(claim),
        Err(Unflushed::Failed(_, e)) => {
            let failure = Failure::doing(format_args!("flush {}", state.device.display()), &e);
            return Err(failure.hint(format_args!("{}; --force detaches it all the same", log_of(state))));
        }
    };
    server.terminate().map_err(|e| Failure::doing(format_args!("stop pid {}", state.pid), &e))?;
    let end = wait(server, state, force).map_err(|e| Failure::doing("wait for the server", &e))?;
    drop(claim);
    // It takes its state file away as its last step.
    let books = dir.lock()?;
    let Some(left) = books.reread(state) else {
        return match state.transport.wait_until_gone(state) {
            Err(failure) if force => {
                crate::notice(&failure.to_string());
                Ok(())
            }
            gone => gone,
        };
    };
    let cleared = clear(&books, &left);
    if end == End::Never {
        let text = format!("pid {} does not end", left.pid);
        return Err(match cleared {
            Ok(()) => Failure::new(text).hint("its device was removed all the same"),
            Err(failure) => Failure::new(format!("{text}: {failure}")),
        });
    }
    cleared?;
    match &left.error {
        Some(error) => Err(Failure::new(format!("its server failed: {error}")).hint(log_of(&left))),
        None if force => {
            let how = if end == End::Killed { "did not answer and was ended" } else { "had died" };
            crate::notice(&format!(
                "pid {} {how}: vdisk recover {} puts what was not flushed into it",
                left.pid, left.image
            ));
            crate::logging::discard(&left.log);
            Ok(())
        }
        None => {
            let text = format!("its server (pid {}) died before it had flushed", left.pid);
            Err(Failure::new(text).hint(format_args!("vdisk recover {}; {}", left.image, log_of(&left))))
        }
    }
}

/// Why what was written to a device is not flushed.
enum Unflushed {
    Failed(File, io::Error),
    /// Its server has died meanwhile.
    Dead(Flushing),
}

/// A flush of a device, which holds the device for itself meanwhile.
struct Flushing(Receiver<(File, io::Result<()>)>);

impl Flushing {
    fn start(device: File) -> Self {
        let (tell, told) = mpsc::channel();
        thread::spawn(move || {
            let flushed = device.sync_all();
            let _ = tell.send((device, flushed));
        });
        Self(told)
    }

    /// Waits for the flush for as long as there is a server: without one it waits for the next, and nobody else may be about to start
    /// that.
    fn wait(self, server: &Process) -> std::result::Result<File, Unflushed> {
        loop {
            match self.0.recv_timeout(Duration::from_millis(50)) {
                Ok((device, Ok(()))) => return Ok(device),
                Ok((device, Err(e))) => return Err(Unflushed::Failed(device, e)),
                Err(RecvTimeoutError::Timeout) if !server.wait(Duration::ZERO).unwrap_or(false) => {}
                Err(_) => return Err(Unflushed::Dead(self)),
            }
        }
    }
}

/// Whether the image is poisoned, now that a flush of the device has failed. Its server enters that in the books a moment after it has
/// answered the flush.
fn is_poisoned(dir: &StateDir, state: &State) -> bool {
    let deadline = Instant::now() + NOTING;
    loop {
        let now = dir.lock().ok().and_then(|books| books.reread(state));
        if now.is_some_and(|now| now.poisoned.is_some()) {
            return true;
        }
        if Instant::now() >= deadline {
            return false;
        }
        thread::sleep(NOTING / 50);
    }
}

/// The server is dead; the device may still be there, and wait for another server.
/// Of a device that this process is flushing since before, `flushing` is the flush.
fn detach_dead(dir: &StateDir, state: &State, force: bool, flushing: Option<Flushing>) -> Result<()> {
    // The driver may take long to notice the death: not under the books' lock, where everybody would wait.
    if let Some(state) = dir.list()?.into_iter().find(|s| s.device == state.device && s.pid == state.pid) {
        state.transport.is_waiting(&state)?;
    }
    let books = dir.lock()?;
    let Some(state) = books.reread(state) else {
        drop(books);
        // Somebody else was faster: the device is gone, and its number may be another's, or it has another server.
        let next = dir.list()?.into_iter().find(|s| s.device == state.device && s.resume.cookie == state.resume.cookie);
        return next.map_or(Ok(()), |state| detach_next(dir, state, force, flushing));
    };
    let waits = state.transport.is_waiting(&state)?;
    // Looked up without opening the device: an open could hang, as nobody answers.
    let tree = Tree::of_state(&state);
    let mut users = tree.lasting_users();
    if waits {
        users.extend(tree.openers(state.pid));
    }
    if !users.is_empty() && !force {
        let text = format!("its server (pid {}) is dead, and {}", state.pid, users.join(", "));
        let device = state.device.display();
        return Err(match waits {
            true => Failure::new(text)
                .hint(format_args!("vdisk recover {device} lets whoever uses it go on; --force has what waits fail")),
            false => {
                Failure::new(text).hint("unmount it, or use --force, also where an unmount hangs since nobody answers")
            }
        });
    }
    if waits && !force {
        // What is written to it may wait in the kernel, for somebody who has closed it already.
        drop(books);
        return detach_served(dir, &recover::go_on(&state)?, flushing);
    }
    clear(&books, &state)?;
    drop(books);
    close_image(&state);
    match &state.error {
        Some(error) => Err(Failure::new(format!("its server failed: {error}")).hint(log_of(&state))),
        None => {
            crate::logging::discard(&state.log);
            Ok(())
        }
    }
}

/// Detaches a device that was dead and is served now.
fn detach_served(dir: &StateDir, device: &Path, flushing: Option<Flushing>) -> Result<()> {
    let served = dir.list()?.into_iter().find(|state| state.device == device);
    match served {
        Some(state) if state.process()?.is_some() => detach_next(dir, state, false, flushing),
        _ => Err(Failure::new("its next server died as well").hint("try again, or use --force")),
    }
}

/// Detaches what has another server by now.
fn detach_next(dir: &StateDir, state: State, force: bool, flushing: Option<Flushing>) -> Result<()> {
    match (flushing, state.process()?) {
        // Another claim would find this one in its way.
        (Some(flushing), Some(server)) => end(dir, &state, &server, force, Some(flushing)),
        (Some(flushing), None) => detach_dead(dir, &state, force, Some(flushing)),
        (None, _) => detach(dir, state, force),
    }
}

/// Puts into the image what its dead server has left. The device is gone, whether that succeeds or not.
fn close_image(state: &State) {
    let options = &state.resume.image;
    if state.read_only || options.overlay == Some(Overlay::Temporary) {
        return;
    }
    if let Err(failure) = recover::close_image(options, true) {
        let image = &state.image;
        crate::notice(&format!("{image}: what was not flushed is not in it yet: {failure}: vdisk recover {image}"));
    }
}

/// Removes a dead server's device and state file, unless they are another's by now.
pub(crate) fn clear(books: &Books<'_>, state: &State) -> Result<()> {
    let Some(state) = books.reread(state) else { return Ok(()) };
    if !state.device_gone {
        state.transport.remove(&state)?;
    }
    books.remove(&state)
}

pub(crate) fn log_of(state: &State) -> String {
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

/// How a server ended.
#[derive(Clone, Copy, PartialEq, Eq)]
enum End {
    Itself,
    Killed,
    /// Not even when it was killed.
    Never,
}

/// Waits until the server has exited, by force in bounded time.
fn wait(server: &Process, state: &State, force: bool) -> io::Result<End> {
    if server.wait(if force { FORCED } else { PATIENCE })? {
        return Ok(End::Itself);
    }
    if force {
        server.kill()?;
        return Ok(if server.wait(FORCED)? { End::Killed } else { End::Never });
    }
    crate::notice(&format!("waiting for pid {} to flush {} (--force ends it)", state.pid, state.image));
    while !server.wait(Duration::from_secs(3600))? {}
    Ok(End::Itself)
}
