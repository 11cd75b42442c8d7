//! What a process that serves a block device enters in the books, from its first look at them to the removal of its state file.

use std::path::Path;
use std::time::Duration;

use crate::attach::Args;
use crate::failure::{Failure, Result};
use crate::options::ZeroCopy;
use crate::overlay::Overlay;
use crate::report::Reporter;
use crate::signals::Stop;
use crate::state::{Books, State, StateDir};
use crate::{in_use, logging, partitions, serve_ublk};

/// What the callbacks of the transport and the end of the process share.
pub(crate) struct Session {
    pub(crate) dir: &'static StateDir,
    pub(crate) reporter: Reporter,
    pub(crate) log: String,
    /// Held from the look for dead servers of the image until the new device is in the books.
    books: Option<Books<'static>>,
    /// As it is on disk.
    pub(crate) state: Option<State>,
    /// What the books said of the device that is being taken over, and say again if that fails.
    pub(crate) taken: Option<State>,
    /// The device waits for another server.
    pub(crate) let_go: bool,
    /// Why the device is to be removed again although it was made.
    pub(crate) failure: Option<Failure>,
    /// There is no device (any more) that `detach` would have to remove.
    pub(crate) device_gone: bool,
}

/// How long a server may take to end whose image was unlocked by its death.
const LAST_BREATH: Duration = Duration::from_secs(5);

impl Session {
    pub(crate) fn new(dir: &'static StateDir, reporter: Reporter, log: String) -> Self {
        Self {
            dir,
            reporter,
            log,
            books: None,
            state: None,
            taken: None,
            let_go: false,
            failure: None,
            device_gone: true,
        }
    }

    /// Takes the books and clears them of what dead servers of the image left, unless a device waits for another server: that is the
    /// answer.
    pub(crate) fn claim_books(&mut self, image: &Path, args: &Args, wanted: Option<&State>) -> Result<Option<State>> {
        let image = image.to_string_lossy();
        // A server that was killed may give up its lock before it is gone. One of an image that is only read may live.
        for state in self.dir.list()?.iter().filter(|state| state.image == image && !args.image.read_only) {
            if let Some(server) = state.process()? {
                server.wait(LAST_BREATH).map_err(|e| Failure::doing(format_args!("wait for pid {}", state.pid), &e))?;
            }
        }
        let books = self.dir.lock()?;
        books.sweep();
        let mut waiting = None;
        for state in self.dir.list()?.into_iter().filter(|state| state.image == image) {
            let is_wanted = wanted.is_none_or(|wanted| wanted.device == state.device);
            if state.process()?.is_none() && state.transport.is_waiting(&state)? {
                // What has an overlay of its own is another disk.
                if is_wanted && waiting.is_none() && args.image.overlay != Some(Overlay::Temporary) {
                    waiting = Some(state);
                }
            } else if wanted.is_none()
                && let Some(notice) = clear_dead(&books, &state)?
            {
                self.reporter.notice(notice);
            }
        }
        if let (Some(wanted), None) = (wanted, &waiting) {
            return Err(Failure::new(format!("{} does not wait for a server any more", wanted.device.display())));
        }
        self.books = Some(books);
        Ok(waiting)
    }

    /// Enters this process in the books as the one that takes a waiting device over.
    pub(crate) fn begin_to_take(&mut self, dead: &State, state: &mut State, args: &Args) -> Result<()> {
        let device = dead.device.display();
        if state.transport != dead.transport {
            return Err(Failure::new(format!("{device} waits for a server of this image"))
                .hint(format_args!("vdisk recover {device} goes on with it, vdisk detach {device} removes it")));
        }
        if let Some(why) = &dead.resume.impossible {
            return Err(Failure::new(why));
        }
        if dead.resume.begun && !serve_ublk::can_begin_again() {
            return Err(Failure::new(
                "an earlier take-over was cut short, and this kernel cannot begin another (Linux 6.16 can)",
            ));
        }
        if args.queues.is_some() || args.depth.is_some() || args.zero_copy == ZeroCopy::Off {
            let what = "its queues, their depth and how it copies";
            self.reporter.notice(format!("{device} was there already, and keeps {what}"));
        }
        state.device.clone_from(&dead.device);
        state.resume = state.resume.clone().take_over(&dead.resume);
        let mut left = dead.clone();
        left.resume = state.resume.clone().left_by(&dead.resume);
        // Should this fail as well, why is what is wanted of the two.
        left.log.clone_from(&state.log);
        self.taken = Some(left);
        self.added(state.clone())?;
        if dead.log != state.log {
            logging::discard(&dead.log);
        }
        Ok(())
    }

    /// The device that waits on if this process has failed: what it has not taken over, unless somebody else has.
    pub(crate) fn left_waiting(&self, wanted: Option<&State>) -> Option<State> {
        let untouched = wanted.filter(|_| !self.reporter.is_done()).and_then(|wanted| {
            let all = self.dir.list().unwrap_or_default();
            all.into_iter().find(|s| s.device == wanted.device && !s.is_live())
        });
        self.taken.clone().or(untouched)
    }

    /// The device has a name: enters it in the books. Then others may make devices.
    pub(crate) fn added(&mut self, state: State) -> Result<()> {
        self.dir.create()?;
        let books = self.books.take().map_or_else(|| self.dir.lock(), Ok)?;
        books.write(&state)?;
        self.state = Some(state);
        Ok(())
    }

    /// A sync has failed. There is no state any more once the process ends.
    pub(crate) fn poisoned(&mut self, why: &str) -> Result<()> {
        let Some(state) = &mut self.state else { return Ok(()) };
        state.poisoned = Some(why.to_owned());
        self.dir.lock()?.update(state)
    }

    /// The device can be used: reports it.
    pub(crate) fn ready(&mut self, device: &Path, notices: Vec<String>, stop: &Stop) -> Result<()> {
        for notice in notices {
            self.reporter.notice(notice);
        }
        // Something else may have made a plain file of that name.
        if in_use::rdev(device).is_none() {
            return Err(Failure::new(format!("{} is not a block device", device.display()))
                .hint("is devtmpfs mounted on /dev, or is a plain file in the way?"));
        }
        if let Some(notice) = partitions::find_missing(device) {
            self.reporter.notice(notice);
        }
        if let Some(state) = &mut self.state {
            state.ready = true;
            (state.resume.taking_over, state.resume.begun) = (false, false);
            self.taken = None;
            self.dir.lock()?.write(state)?;
            tracing::info!("{}: served as {}", state.image, device.display());
        }
        self.reporter.ready(device, stop)
    }

    /// Leaves nothing behind but a device that could not be removed and, after a failure that nobody was told, the reason.
    pub(crate) fn finish(&mut self, served: Result<()>) -> Result<()> {
        self.books = None;
        let (reported, background) = (self.reporter.is_done(), self.reporter.is_background());
        let failed = served.as_ref().err();
        if let Some(failure) = failed.filter(|_| background) {
            tracing::error!("{failure}");
        }
        if let (Some(mut state), false) = (self.state.take(), self.let_go) {
            // For `detach`.
            let kept = failed.filter(|_| self.taken.is_some() || !self.device_gone || reported && background);
            let left = self.dir.lock().and_then(|books| match kept {
                // It waits on.
                Some(_) if self.taken.is_some() => match (&self.taken, books.reread(&state)) {
                    (Some(dead), Some(_)) => books.write(dead),
                    _ => Ok(()),
                },
                Some(failure) => {
                    state.error = Some(failure.to_string());
                    state.device_gone = self.device_gone;
                    books.update(&state)
                }
                None => books.remove(&state),
            });
            if let Err(failure) = left {
                tracing::error!("{failure}");
            }
        }
        if !reported {
            let stopped = Failure::new("stopped before the device was there");
            let _ = self.reporter.failed(failed.unwrap_or(&stopped));
        }
        if failed.is_none() || !reported && self.device_gone && self.taken.is_none() {
            logging::discard(&self.log);
        }
        served
    }
}

/// Removes what a server of this image left that has died, if nothing uses it any more. Tells what was removed.
fn clear_dead(books: &Books<'_>, state: &State) -> Result<Option<String>> {
    // One that failed and is about to exit, or that serves the image to be read like us.
    if state.process()?.is_some() {
        return Ok(None);
    }
    let tree = in_use::Tree::of_state(state);
    let users = [tree.lasting_users(), tree.openers(state.pid)].concat();
    let device = state.device.display();
    if !users.is_empty() {
        let text = format!("its earlier server (pid {}) is dead and {}", state.pid, users.join(", "));
        return Err(Failure::new(text).hint(format_args!("vdisk detach --force {device}")));
    }
    crate::detach::clear(books, state)?;
    logging::discard(&state.log);
    Ok(Some(format!("removed {device}, whose server (pid {}) was dead", state.pid)))
}
