//! What a process that serves a block device enters in the books, from its first look at them to the removal of its state file.

use std::path::Path;
use std::time::Duration;

use crate::attach::Args;
use crate::failure::{Failure, Result};
use crate::identity::Identity;
use crate::options::{ImageOptions, ZeroCopy};
use crate::overlay::Overlay;
use crate::report::Reporter;
use crate::signals::Stop;
use crate::state::{Books, State, StateDir};
use crate::{grow, in_use, logging, partitions, serve_ublk};

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
    pub(crate) fn claim_books(
        &mut self,
        image: &Identity,
        args: &Args,
        wanted: Option<&State>,
    ) -> Result<Option<State>> {
        // What has an overlay of its own is another disk.
        let is_apart = args.image.overlay == Some(Overlay::Temporary);
        let (books, found) = self.lock_when_all_is_noticed(image, args)?;
        books.sweep();
        let (mut waiting, mut namesake) = (None, None);
        for (state, standing) in found {
            match standing {
                Standing::Served if must_end(&state, image, args) => return Err(still_ending(&state)),
                // One that failed and is about to exit, or that serves the image to be read like us.
                Standing::Served => {}
                Standing::Waits if wanted.is_some_and(|wanted| wanted.device != state.device) => {}
                // By another name only if it was asked for: of an image that was deleted, another one may have the inode.
                Standing::Waits if wanted.is_none() && !image.is_named_by(&state) => namesake = Some(state),
                Standing::Waits if is_apart => {}
                Standing::Waits => waiting = waiting.or(Some(state)),
                Standing::Over if wanted.is_some() || !image.is_named_by(&state) => {}
                Standing::Over => {
                    if let Some(notice) = clear_dead(&books, &state)? {
                        self.reporter.notice(notice);
                    }
                }
            }
        }
        match (wanted, &waiting, namesake) {
            (Some(wanted), None, _) => {
                Err(Failure::new(format!("{} does not wait for a server any more", wanted.device.display())))
            }
            (None, None, Some(State { device, image, .. })) => {
                let device = device.display();
                Err(Failure::new(format!(
                    "{device} waits for its next server, and this file belongs to its image, {image}"
                ))
                .hint(format_args!("vdisk recover {device} goes on with it, vdisk detach {device} removes it")))
            }
            _ => {
                self.books = Some(books);
                Ok(waiting)
            }
        }
    }

    /// Takes the books once the driver knows of every dead server of the image. While it does not, others may have them.
    fn lock_when_all_is_noticed(
        &self,
        image: &Identity,
        args: &Args,
    ) -> Result<(Books<'static>, Vec<(State, Standing)>)> {
        let states = || self.dir.list().map(|all| all.into_iter().filter(|state| image.is_of(state)));
        loop {
            for state in states()? {
                if let Some(server) = state.process()?.filter(|_| must_end(&state, image, args)) {
                    let ended = server.wait(LAST_BREATH);
                    if !ended.map_err(|e| Failure::doing(format_args!("wait for pid {}", state.pid), &e))? {
                        return Err(still_ending(&state));
                    }
                }
                if state.process()?.is_none() {
                    state.transport.is_waiting(&state)?;
                }
            }
            let books = self.dir.lock()?;
            let standing = |state: State| Ok(Standing::of(&state)?.map(|standing| (state, standing)));
            if let Some(found) = states()?.map(standing).collect::<Result<Option<Vec<_>>>>()? {
                return Ok((books, found));
            }
        }
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
        // It keeps its size until it is told otherwise.
        let image_size = std::mem::replace(&mut state.size, grow::size_of(dead));
        if state.size < image_size {
            self.reporter.notice(format!("the image has grown: vdisk grow {device} has the device follow"));
        }
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
        self.enter()
    }

    /// How large the device is, once it can be used.
    pub(crate) fn size(&self) -> Option<u64> {
        self.state.as_ref().filter(|state| state.ready).map(|state| state.size)
    }

    /// The device has grown to this size, or why not.
    pub(crate) fn answer(&mut self, grown: Result<u64>) -> Result<()> {
        let Some(state) = &mut self.state else { return Ok(()) };
        state.answers = state.answers.map(|answers| answers + 1);
        state.not_grown = grown.as_ref().err().map(ToString::to_string);
        match grown {
            Ok(size) => {
                tracing::info!("{} has grown from {} to {size} bytes", state.device.display(), state.size);
                state.size = size;
            }
            Err(failure) => tracing::warn!("{}: {failure}", state.image),
        }
        self.enter()
    }

    /// The device can be used: reports it. Answers whether the books say so too: one that was taken over is used by others already, and
    /// served whatever happens here.
    pub(crate) fn ready(&mut self, device: &Path, notices: Vec<String>, stop: &Stop) -> Result<bool> {
        let is_taken = self.taken.take().is_some();
        for notice in notices {
            self.reporter.notice(notice);
        }
        // Something else may have made a plain file of that name.
        if in_use::rdev(device).is_none() {
            let text = format!("{} is not a block device", device.display());
            let failure = Failure::new(text).hint("is devtmpfs mounted on /dev, or is a plain file in the way?");
            if !is_taken {
                return Err(failure);
            }
            self.reporter.notice(failure.to_string());
        }
        if let Some(notice) = partitions::find_missing(device) {
            self.reporter.notice(notice);
        }
        let mut entered = Ok(());
        if let Some(state) = &mut self.state {
            state.ready = true;
            (state.resume.taking_over, state.resume.begun) = (false, false);
            entered = self.dir.lock().and_then(|books| books.write(state));
            tracing::info!("{}: served as {}", state.image, device.display());
        }
        if !is_taken {
            entered?;
            self.reporter.ready(device, stop)?;
            return Ok(true);
        }
        if let Err(failure) = &entered {
            self.reporter.notice(format!("vdisk list says recovering until this is put right: {failure}"));
        }
        self.reporter.ready_anyway(device, stop);
        Ok(entered.is_ok())
    }

    /// Has the books say what this process knows of its device, if they still have it.
    pub(crate) fn enter(&self) -> Result<()> {
        self.state.as_ref().map_or(Ok(()), |state| self.dir.lock()?.update(state))
    }

    /// The device goes to another server as soon as this process has ended. Whoever waits for that need not fear any more that it
    /// does not happen.
    pub(crate) fn let_go(&mut self) {
        self.let_go = true;
        let Some(state) = &mut self.state else { return };
        state.resume.letting_go = true;
        if let Err(failure) = self.enter() {
            tracing::error!("{failure}");
        }
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

/// What has become of a device in the books.
enum Standing {
    /// Its process runs.
    Served,
    /// It waits for another server.
    Waits,
    Over,
}

impl Standing {
    /// `None`: that cannot be said yet.
    fn of(state: &State) -> Result<Option<Self>> {
        if state.process()?.is_some() {
            return Ok(Some(Self::Served));
        }
        let waits = state.transport.waits(state)?;
        Ok(waits.map(|waits| if waits { Self::Waits } else { Self::Over }))
    }
}

/// Whether a server of the image that still runs is about to end, now that this process has it locked. Of what is only read there may be
/// many.
fn must_end(state: &State, image: &Identity, args: &Args) -> bool {
    let shares = |options: &ImageOptions| options.read_only || options.overlay == Some(Overlay::Temporary);
    image.is_shared_with(state) && !(shares(&args.image) && shares(&state.resume.image))
}

fn still_ending(state: &State) -> Failure {
    Failure::new(format!("pid {}, the server of {}, is still ending", state.pid, state.device.display()))
        .hint("try again")
}

/// Removes what a server of this image left that has died, if nothing uses it any more. Tells what was removed.
fn clear_dead(books: &Books<'_>, state: &State) -> Result<Option<String>> {
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::options::DirectIo;
    use crate::resume::Resume;
    use crate::transport::Transport;
    use std::fs;
    use vdisk_image::Geometry;

    /// What the books have of a device that this process is taking over.
    fn taken_over(image: &Path) -> State {
        let geometry = Geometry { size: 10 << 20, read_only: false, preferred_block: 4096 };
        let mut resume = Resume::of_path(image.to_owned());
        resume.taking_over = true;
        let mut state = State::of_this_process(Transport::Ublk, image, geometry, "stderr".to_owned(), resume).unwrap();
        state.device = "/dev/ublkb4321".into();
        state
    }

    #[test]
    fn what_was_taken_over_is_reported_when_the_books_cannot_be_written_and_entered_when_they_can() {
        let temp = tempfile::tempdir().unwrap();
        let dir: &'static StateDir = Box::leak(Box::new(StateDir::at(temp.path().join("vdisk"))));
        let mut session = Session::new(dir, Reporter::new(false), "stderr".to_owned());
        let state = taken_over(Path::new("/a.vmdk"));
        session.taken = Some(state.clone());
        session.added(state.clone()).unwrap();
        let in_the_way = dir.path().join(format!(".ublkb4321.{}", state.pid));
        fs::create_dir(&in_the_way).unwrap();
        // There is no such device either.
        assert!(!session.ready(&state.device, Vec::new(), &Stop::default()).unwrap());
        assert!(session.reporter.is_done() && session.taken.is_none());
        assert_eq!(dir.list().unwrap()[0].word(), "recovering");
        session.enter().unwrap_err();
        fs::remove_dir(&in_the_way).unwrap();
        session.enter().unwrap();
        assert_eq!(dir.list().unwrap()[0].word(), "live");
        // A new one would be removed.
        session.ready(&state.device, Vec::new(), &Stop::default()).unwrap_err();
        session.let_go();
        assert!(dir.list().unwrap()[0].resume.letting_go);
    }

    #[test]
    fn only_servers_that_read_the_image_may_live_beside_another() {
        let temp = tempfile::tempdir().unwrap();
        let image = temp.path().join("a");
        fs::write(&image, "").unwrap();
        let identity = Identity::at(&image);
        let mut state = taken_over(&image);
        state.resume.files = vec![identity.first().unwrap()];
        let reads = ImageOptions { read_only: true, ..ImageOptions::of(image.clone()) };
        let writes = ImageOptions::of(image.clone());
        let drops = ImageOptions { overlay: Some(Overlay::Temporary), ..writes.clone() };
        let mut must = |theirs: &ImageOptions, ours: &ImageOptions| {
            state.resume.image = theirs.clone();
            let args = Args { image: ours.clone(), direct_io: DirectIo::Auto, ..state.resume.args() };
            must_end(&state, &identity, &args)
        };
        for other in [&reads, &drops, &writes] {
            assert!(must(other, &writes) && must(&writes, other));
        }
        assert!(!must(&reads, &reads) && !must(&drops, &reads));
    }

    #[test]
    fn a_device_without_a_process_is_over_unless_its_driver_has_it_wait() {
        let mut state = taken_over(Path::new("/a.vmdk"));
        assert!(matches!(Standing::of(&state).unwrap(), Some(Standing::Served)));
        (state.start_time, state.transport, state.device) = (1, Transport::Nbd, "/dev/nbd3".into());
        assert!(matches!(Standing::of(&state).unwrap(), Some(Standing::Over)));
    }
}
