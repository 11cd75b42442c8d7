//! The process that serves a block device, from its first step to the removal of its state file.

use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::{env, fs, thread};

use vdisk_io::block_on;

use crate::attach::Args;
use crate::failure::{Failure, Result};
use crate::open::{self, Opened};
use crate::options::DirectIo;
use crate::report::Reporter;
use crate::signals::{self, Stop};
use crate::state::{Books, State, StateDir};
use crate::transport::{Callbacks, Transport};
use crate::{hygiene, in_use, logging, partitions};

/// What the callbacks of the transport and the end of the process share.
struct Session {
    dir: &'static StateDir,
    reporter: Reporter,
    log: String,
    /// Held from the look for dead servers of the image until the new device is in the books.
    books: Option<Books<'static>>,
    /// As it is on disk.
    state: Option<State>,
    /// Why the device is to be removed again although it was made.
    failure: Option<Failure>,
    /// There is no device (any more) that `detach` would have to remove.
    device_gone: bool,
}

/// Serves until SIGTERM or SIGINT. In the background, the waiting command gets the report, success or not.
pub(crate) fn run(args: &Args, verbose: bool, background: bool) -> Result<()> {
    if background {
        hygiene::close_inherited();
    }
    let held = signals::hold(background).map_err(|e| Failure::doing("block signals", &e))?;
    let dir = StateDir::host();
    let mut reporter = Reporter::new(background);
    let log = match start_log(verbose, background, dir) {
        Ok(log) => log,
        Err(failure) => {
            let _ = reporter.failed(&failure);
            return Err(failure);
        }
    };
    let session = Session { dir, reporter, log, books: None, state: None, failure: None, device_gone: true };
    let session = Arc::new(Mutex::new(session));
    let served = serve(args, held, &session);
    finish(&mut lock(&session), served)
}

fn lock(session: &Mutex<Session>) -> MutexGuard<'_, Session> {
    session.lock().unwrap_or_else(PoisonError::into_inner)
}

fn start_log(verbose: bool, background: bool, dir: &StateDir) -> Result<String> {
    if !background {
        logging::to_stderr(verbose);
        return Ok("stderr".to_owned());
    }
    // The terminal's Ctrl-C is for the command. Started as `exe`, the process shall have a name in ps.
    rustix::process::setsid().map_err(|e| Failure::doing("setsid", &e))?;
    let _ = fs::write("/proc/self/comm", "vdisk");
    logging::to_background(verbose, dir)
}

fn serve(args: &Args, held: signals::Held, session: &Arc<Mutex<Session>>) -> Result<()> {
    if let Some(notice) = hygiene::guard_against_reclaim() {
        lock(session).reporter.notice(notice);
    }
    let path = open::real_path(&args.image)?;
    // Locked from here on: what the books say of this image is of servers that have died.
    let mut image =
        Opened::open(&args.image, args.direct_io).map_err(|failure| name_holder(failure, &path, session))?;
    let (transport, notice) = Transport::choose(args.transport)?;
    if args.direct_io == DirectIo::Auto && transport.is_faster_through_page_cache() {
        image.forget_direct();
    }
    for notice in image.disk.info().notices.iter().cloned().chain(notice) {
        lock(session).reporter.notice(notice);
    }
    if let Err(e) = hygiene::leave_mounts() {
        lock(session).reporter.notice(format!("no mount namespace of its own: {e}"));
    }
    let _ = env::set_current_dir("/");
    let stop = Stop::default();
    let given = stop.clone();
    held.on_end(move || given.give()).map_err(|e| Failure::doing("start a thread", &e))?;
    lock(session).claim_books(&path)?;
    // Not before it is sure that there will be a device.
    for notice in image.keep_ledger(&args.image)? {
        lock(session).reporter.notice(notice);
    }

    watch_for_poison(&image, session)?;
    let mut served = Ok(());
    let mut may_close = true;
    if !stop.is_given() {
        let state = State::of_this_process(transport, &path, image.geometry(), lock(session).log.clone())?;
        let (server, calls) = (state.clone(), callbacks(session, state, &stop));
        served = transport.serve(&image, &server.server(), args.device_options(), calls, &stop).map_err(|e| {
            may_close = !e.device_may_live;
            lock(session).device_gone = e.device_gone;
            e.failure
        });
    }
    let closed = if may_close { image.close() } else { image.flush() };
    if let (Err(first), Err(also)) = (&served, &closed) {
        // Of a poisoned image the device could not be flushed either: that is the consequence, and not why.
        if image.disk.is_poisoned() {
            tracing::error!("{}: {first}", path.display());
            served = Ok(());
        } else {
            tracing::error!("{}: {also}", path.display());
        }
    }
    let failure = lock(session).failure.take();
    failure.map_or(served, Err).and(closed)
}

/// Has the books say when a sync has failed, from a thread of its own: whoever serves must not wait for the books.
fn watch_for_poison(image: &Opened, session: &Arc<Mutex<Session>>) -> Result<()> {
    let (disk, session) = (Arc::clone(&image.disk), Arc::clone(session));
    let watch = move || {
        let why = block_on(disk.poisoned());
        tracing::error!("nothing more is written to the image until it is attached again: {why}");
        if let Err(failure) = lock(&session).poisoned(&why) {
            tracing::error!("{failure}");
        }
    };
    let started = thread::Builder::new().name("poison".to_owned()).spawn(watch);
    started.map(drop).map_err(|e| Failure::doing("start a thread", &e))
}

/// What enters a device in the books and reports it; on a failure, the device is not wanted any more.
fn callbacks(session: &Arc<Mutex<Session>>, mut state: State, stop: &Stop) -> Callbacks {
    let (adding, adding_stop) = (Arc::clone(session), stop.clone());
    let (making, making_stop) = (Arc::clone(session), stop.clone());
    let give_up = |session: &mut Session, failure, stop: &Stop| {
        session.failure = Some(failure);
        stop.give();
    };
    Callbacks {
        added: Box::new(move |device: &Path| {
            let mut session = lock(&adding);
            state.device = device.to_owned();
            if let Err(failure) = session.added(state) {
                give_up(&mut session, failure, &adding_stop);
            }
        }),
        ready: Box::new(move |device: &Path, notices| {
            let mut session = lock(&making);
            // Given up already, or stopped.
            if making_stop.is_given() {
                return;
            }
            if let Err(failure) = session.ready(device, notices, &making_stop) {
                give_up(&mut session, failure, &making_stop);
            }
        }),
    }
}

impl Session {
    /// Takes the books and clears them of what dead servers of the image left.
    fn claim_books(&mut self, image: &Path) -> Result<()> {
        let books = self.dir.lock()?;
        books.sweep();
        let image = image.to_string_lossy();
        let states = self.dir.list()?.into_iter().filter(|state| state.image == image);
        for state in states {
            if let Some(notice) = clear_dead(&books, &state)? {
                self.reporter.notice(notice);
            }
        }
        self.books = Some(books);
        Ok(())
    }

    /// The device has a name: enters it in the books. Then others may make devices.
    fn added(&mut self, state: State) -> Result<()> {
        self.dir.create()?;
        let books = self.books.take().map_or_else(|| self.dir.lock(), Ok)?;
        books.write(&state)?;
        self.state = Some(state);
        Ok(())
    }

    /// A sync has failed. There is no state any more once the process ends.
    fn poisoned(&mut self, why: &str) -> Result<()> {
        let Some(state) = &mut self.state else { return Ok(()) };
        state.poisoned = Some(why.to_owned());
        self.dir.lock()?.update(state)
    }

    /// The device can be used: reports it.
    fn ready(&mut self, device: &Path, notices: Vec<String>, stop: &Stop) -> Result<()> {
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
            self.dir.lock()?.write(state)?;
            tracing::info!("{}: attached as {}", state.image, device.display());
        }
        self.reporter.ready(device, stop)
    }
}

/// Leaves nothing behind but a device that could not be removed and, after a failure that nobody was told, the reason.
fn finish(session: &mut Session, served: Result<()>) -> Result<()> {
    session.books = None;
    let (reported, background) = (session.reporter.is_done(), session.reporter.is_background());
    let failed = served.as_ref().err();
    if let Some(failure) = failed.filter(|_| background) {
        tracing::error!("{failure}");
    }
    if let Some(mut state) = session.state.take() {
        // For `detach`.
        let kept = failed.filter(|_| !session.device_gone || reported && background);
        let left = session.dir.lock().and_then(|books| match kept {
            Some(failure) => {
                state.error = Some(failure.to_string());
                state.device_gone = session.device_gone;
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
        let _ = session.reporter.failed(failed.unwrap_or(&stopped));
    }
    if failed.is_none() || !reported && session.device_gone {
        logging::discard(&session.log);
    }
    served
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

/// Says which device holds the image, if it is one of ours.
fn name_holder(failure: open::OpenFailure, path: &Path, session: &Mutex<Session>) -> Failure {
    let states = lock(session).dir.list().unwrap_or_default();
    failure.naming(&states, path, ", or attach both with --read-only")
}
