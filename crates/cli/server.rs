//! The process that serves a block device, from its first step to its end.

use std::path::Path;
use std::sync::mpsc;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use std::{env, fs, thread};

use vdisk_io::block_on;

use crate::attach::Args;
use crate::failure::{Failure, Result};
use crate::identity::Identity;
use crate::open::{self, Opened};
use crate::options::DirectIo;
use crate::process::Process;
use crate::report::Reporter;
use crate::resume::{self, Resume};
use crate::session::Session;
use crate::signals::{self, Stop};
use crate::state::{State, StateDir};
use crate::transport::{Callbacks, End, Transport};
use crate::{block_queue, grow, hygiene, logging};

/// How long the end of a server may take that was killed just now.
const LAST_BREATH: Duration = Duration::from_secs(3);
/// How often it is tried to enter in the books that a device was taken over.
const AGAIN: Duration = Duration::from_secs(1);

/// Serves until SIGTERM or SIGINT: a new device, or one of the image that waits for a server, which may be `wanted`. In the background,
/// the waiting command gets the report, success or not.
pub(crate) fn run(args: &Args, wanted: Option<&State>, verbose: bool, background: bool) -> Result<()> {
    if background {
        hygiene::close_inherited();
    }
    let held = signals::hold(true).map_err(|e| Failure::doing("block signals", &e))?;
    let dir = StateDir::host();
    let mut reporter = Reporter::new(background);
    let log = match start_log(verbose, background, dir) {
        Ok(log) => log,
        Err(failure) => {
            let _ = reporter.failed(&failure);
            return Err(failure);
        }
    };
    let session = Arc::new(Mutex::new(Session::new(dir, reporter, log)));
    let served = serve(args, wanted, held, &session);
    let mut session = lock(&session);
    let served = match (served, session.left_waiting(wanted)) {
        (Err(failure), Some(State { device, image, .. })) => {
            let device = device.display();
            // Of a device, the line does not name the image at its beginning.
            let failure = if wanted.is_some() { Failure::new(format!("{image}: {failure}")) } else { failure };
            Err(failure.hint(format_args!(
                "{device} waits on: vdisk recover {device} when that is put right; vdisk detach --force gives it up"
            )))
        }
        (served, _) => served,
    };
    session.finish(served)
}

pub(crate) fn lock(session: &Mutex<Session>) -> MutexGuard<'_, Session> {
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

fn serve(args: &Args, wanted: Option<&State>, held: signals::Held, session: &Arc<Mutex<Session>>) -> Result<()> {
    if let Some(notice) = hygiene::guard_against_reclaim() {
        lock(session).reporter.notice(notice);
    }
    let path = open::real_path(&args.image)?;
    let kept = resume::anywhere(&args.image)?;
    // Locked from here on: what the books say of this image is of servers that have died.
    let mut image = open(args, &path, session)?;
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
    let (look, asked) = mpsc::channel();
    held.on_end(stop.clone(), Some(look)).map_err(|e| Failure::doing("start a thread", &e))?;
    let waiting = lock(session).claim_books(&Identity::of(&path, &image), args, wanted)?;
    let (log, resume) = (lock(session).log.clone(), Resume::new(kept, args.direct_io, &image));
    let mut state = State::of_this_process(transport, &path, image.geometry(), log, resume)?;
    if let Some(dead) = &waiting {
        dead.check_fits(&image)?;
        lock(session).begin_to_take(dead, &mut state, args)?;
    }
    // Not before it is sure that there will be a device.
    for notice in image.keep_ledger(&args.image)? {
        lock(session).reporter.notice(notice);
    }
    state.resume = state.resume.with_ledger_of(&image);

    watch_for_poison(&image, &state, session)?;
    grow::watch(&image, session, &stop, asked)?;
    let mut served = Ok(End::Gone);
    let mut may_close = true;
    // One that waits is served first, and its requests with it, whatever is to become of it.
    if !stop.is_given() || waiting.is_some() {
        let (server, options) = (state.clone(), args.device_options(&state.resume));
        let calls = callbacks(&image, session, state, &stop);
        let ended = match &waiting {
            Some(dead) => transport.take_over(&image, dead, calls, &stop),
            None => transport.serve(&image, &server.server(), options, calls, &stop),
        };
        served = ended.map_err(|e| {
            may_close = !e.device_may_live;
            lock(session).device_gone = e.device_gone;
            e.failure
        });
    }
    if let Ok(End::LetGo) = served {
        lock(session).let_go();
    }
    let closed = if may_close { image.close() } else { image.flush() };
    if let (Err(first), Err(also)) = (&served, &closed) {
        // Of a poisoned image the device could not be flushed either: that is the consequence, and not why.
        if image.disk.is_poisoned() {
            tracing::error!("{}: {first}", path.display());
            served = Ok(End::Gone);
        } else {
            tracing::error!("{}: {also}", path.display());
        }
    }
    let mut session = lock(session);
    let failure = session.failure.take();
    match failure.map_or(served, Err)? {
        End::Gone => closed,
        End::LetGo => {
            // What is not in the image is in the ledger, for the next one.
            if let Err(failure) = closed {
                tracing::error!("{}: {failure}", path.display());
            }
            let device = session.state.as_ref().map_or_else(String::new, |s| s.device.display().to_string());
            Err(Failure::new(format!("let go of {device}, which waits for its next server"))
                .hint(format_args!("vdisk recover {device}")))
        }
    }
}

/// Opens and locks the image.
fn open(args: &Args, path: &Path, session: &Mutex<Session>) -> Result<Opened> {
    let states = || lock(session).dir.read_all().unwrap_or_default().0;
    let holder = Identity::at(path);
    let patience = Instant::now() + LAST_BREATH;
    // One that was killed this moment counts as live until its threads have ended.
    let is_dying = |state: &State| {
        let ended = |server: Process| server.wait(patience.saturating_duration_since(Instant::now())).unwrap_or(false);
        !state.is_live() || state.process().ok().flatten().is_none_or(ended)
    };
    let opened =
        Opened::open_after(&args.image, args.direct_io, || states().iter().any(|s| holder.is_of(s) && is_dying(s)));
    opened.map_err(|failure| failure.naming(&states(), &holder, ", or attach both with --read-only"))
}

/// Has the books say when a sync has failed, from a thread of its own: whoever serves must not wait for the books.
fn watch_for_poison(image: &Opened, state: &State, session: &Arc<Mutex<Session>>) -> Result<()> {
    let (dir, cookie) = (lock(session).dir, state.resume.cookie);
    image.disk.on_poison(move |why| {
        // Without the books' lock, which others may hold for long.
        if let Err(failure) = dir.mark_poisoned(cookie, why) {
            tracing::error!("{failure}");
        }
    });
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

/// Enters in the books that the device was taken over as soon as they can be written: until then `detach` waits for that.
fn enter_later(session: &Arc<Mutex<Session>>) {
    let session = Arc::clone(session);
    let again = move || {
        loop {
            thread::sleep(AGAIN);
            match lock(&session).enter() {
                Ok(()) => return tracing::info!("the device is in the books"),
                Err(failure) => tracing::debug!("{failure}"),
            }
        }
    };
    if let Err(e) = thread::Builder::new().name("books".to_owned()).spawn(again) {
        tracing::error!("start a thread: {e}");
    }
}

/// What enters a device in the books and reports it; on a failure, the device is not wanted any more.
fn callbacks(image: &Opened, session: &Arc<Mutex<Session>>, mut state: State, stop: &Stop) -> Callbacks {
    let (disk, impossible) = (Arc::clone(&image.disk), state.resume.impossible.clone());
    let has_compressed = disk.has_compressed();
    let (is_ublk, state_is_taken) = (state.transport == Transport::Ublk, state.resume.taking_over);
    let (adding, adding_stop) = (Arc::clone(session), stop.clone());
    let (making, making_stop) = (Arc::clone(session), stop.clone());
    let give_up = move |session: &mut Session, failure: Failure, stop: &Stop| {
        // Others use it since before this process: it is served, whoever is to hear of it.
        if state_is_taken {
            tracing::error!("{failure}");
            return;
        }
        session.failure = Some(failure);
        stop.give();
    };
    Callbacks {
        added: Box::new(move |device: &Path| {
            let mut session = lock(&adding);
            state.device = device.to_owned();
            // Not known to the driver before.
            state.resume.begun = state_is_taken;
            if let Some(taken) = &mut session.taken {
                taken.resume.begun = true;
            }
            if let Err(failure) = session.added(state) {
                give_up(&mut session, failure, &adding_stop);
            }
        }),
        ready: Box::new(move |device: &Path, notices| {
            if has_compressed {
                block_queue::widen_read_ahead(device);
            }
            // Later it is for whoever runs the device to say; and a device of nbd outlives us.
            if is_ublk && !state_is_taken {
                block_queue::drop_scheduler(device);
            }
            let mut session = lock(&making);
            // Given up already, or stopped.
            if making_stop.is_given() {
                return;
            }
            match session.ready(device, notices, &making_stop) {
                Ok(true) => {}
                Ok(false) => enter_later(&making),
                Err(failure) => give_up(&mut session, failure, &making_stop),
            }
        }),
        kept: Box::new(move || {
            let poisoned = disk.is_poisoned().then(|| "a sync of the image has failed".to_owned());
            poisoned.or_else(|| impossible.clone())
        }),
    }
}
