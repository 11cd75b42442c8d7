//! The process that serves a block device, from its first step to the removal of its state file.

use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::{env, fs};

use crate::attach::Args;
use crate::failure::{Failure, Result};
use crate::open::{self, Opened};
use crate::report::Reporter;
use crate::signals::{self, Stop};
use crate::state::{State, StateDir};
use crate::transport::Transport;
use crate::{hygiene, in_use, logging};

/// What the callback of the transport and the end of the process share.
struct Session {
    dir: StateDir,
    reporter: Reporter,
    log: String,
    /// As it is on disk.
    state: Option<State>,
    /// Why the device is to be removed again although it was made.
    failure: Option<Failure>,
}

/// Serves until SIGTERM or SIGINT. In the background, the waiting command gets the report, success or not.
pub(crate) fn run(args: &Args, verbose: bool, background: bool) -> Result<()> {
    let held = signals::hold().map_err(|e| Failure::doing("block signals", &e))?;
    let dir = StateDir::host();
    let mut reporter = Reporter::new(background);
    let log = match start_log(verbose, background, &dir) {
        Ok(log) => log,
        Err(failure) => {
            let _ = reporter.failed(&failure);
            return Err(failure);
        }
    };
    let session = Arc::new(Mutex::new(Session { dir, reporter, log, state: None, failure: None }));
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
    let path = open::real_path(&args.image.image)?;
    clear_dead(&path, session)?;
    let image = Opened::open(&args.image, true).map_err(|failure| name_holder(failure, &path, session))?;
    let (transport, notice) = Transport::choose(args.transport)?;
    for notice in &image.disk.info().notices {
        lock(session).reporter.notice(notice.clone());
    }
    if let Some(notice) = notice {
        lock(session).reporter.notice(notice);
    }
    if let Err(e) = hygiene::leave_mounts() {
        lock(session).reporter.notice(format!("no mount namespace of its own: {e}"));
    }
    let _ = env::set_current_dir("/");
    let stop = Stop::default();
    let given = stop.clone();
    held.on_end(move || given.give()).map_err(|e| Failure::doing("start a thread", &e))?;

    let mut served = Ok(());
    let mut may_close = true;
    if !stop.is_given() {
        let ready = {
            let (session, stop, path, geometry) = (Arc::clone(session), stop.clone(), path.clone(), image.geometry());
            Box::new(move |device: &Path, notices| {
                let mut session = lock(&session);
                if let Err(failure) = session.ready(device, transport, &path, geometry, notices) {
                    session.failure = Some(failure);
                    stop.give();
                }
            })
        };
        served = transport.serve(&image, &path.to_string_lossy(), args.device_options(), ready, &stop).map_err(|e| {
            may_close = !e.device_may_live;
            e.failure
        });
    }
    let closed = if may_close { image.close() } else { image.flush() };
    if let (Err(_), Err(also)) = (&served, &closed) {
        tracing::error!("{}: {also}", path.display());
    }
    let failure = lock(session).failure.take();
    failure.map_or(served, Err).and(closed)
}

impl Session {
    /// The device is there: enters it in the books, then reports it.
    fn ready(
        &mut self,
        device: &Path,
        transport: Transport,
        image: &Path,
        geometry: vdisk_image::Geometry,
        notices: Vec<String>,
    ) -> Result<()> {
        for notice in notices {
            self.reporter.notice(notice);
        }
        // Something else may have made a plain file of that name.
        if in_use::rdev(device).is_none() {
            return Err(Failure::new(format!("{} is not a block device", device.display()))
                .hint("is devtmpfs mounted on /dev, or is a plain file in the way?"));
        }
        self.dir.create()?;
        let mut state = State::of_this_process(device.to_owned(), transport, image, self.log.clone())?;
        state.size = geometry.size;
        state.read_only = geometry.read_only;
        self.dir.write(&state)?;
        self.state = Some(state);
        self.reporter.ready(device).map_err(|e| Failure::doing("nobody waits for the device any more", &e))?;
        tracing::info!("{}: attached as {}", image.display(), device.display());
        Ok(())
    }
}

/// Leaves nothing behind but, after a failure that nobody waits for, the reason.
fn finish(session: &mut Session, served: Result<()>) -> Result<()> {
    let reported = session.reporter.is_done();
    let failed = served.as_ref().err();
    if let Some(failure) = failed.filter(|_| session.reporter.is_background()) {
        tracing::error!("{failure}");
    }
    if let Some(mut state) = session.state.take() {
        // `detach` finds the reason there.
        let left = match failed.filter(|_| reported) {
            Some(failure) => {
                state.error = Some(failure.to_string());
                if session.dir.reread(&state).is_some() { session.dir.write(&state) } else { Ok(()) }
            }
            None => session.dir.remove(&state),
        };
        if let Err(failure) = left {
            tracing::error!("{failure}");
        }
    }
    if !reported {
        let stopped = Failure::new("stopped before the device was there");
        let _ = session.reporter.failed(failed.unwrap_or(&stopped));
    }
    if failed.is_none() || !reported {
        logging::discard(&session.log);
    }
    served
}

/// Removes what servers of this image left that have died, where nothing uses it any more.
fn clear_dead(path: &Path, session: &Mutex<Session>) -> Result<()> {
    let mut session = lock(session);
    let image = path.to_string_lossy();
    let dead: Vec<_> = session.dir.list()?.into_iter().filter(|s| s.image == image && !s.is_live()).collect();
    for state in dead {
        if state.process()?.is_some() {
            continue; // It failed and is about to exit; it still holds the image.
        }
        let tree = in_use::Tree::of(state.device_name());
        let users = [tree.lasting_users(), tree.openers(state.pid)].concat();
        let device = state.device.display();
        if !users.is_empty() {
            let text = format!("its earlier server (pid {}) is dead and {}", state.pid, users.join(", "));
            return Err(Failure::new(text).hint(format_args!("vdisk detach --force {device}")));
        }
        crate::detach::clear(&session.dir, &state)?;
        logging::discard(&state.log);
        session.reporter.notice(format!("removed {device}, whose server (pid {}) was dead", state.pid));
    }
    Ok(())
}

/// Says which device holds the image, if it is one of ours.
fn name_holder(failure: open::OpenFailure, path: &Path, session: &Mutex<Session>) -> Failure {
    let image = path.to_string_lossy();
    let states = lock(session).dir.list().unwrap_or_default();
    let holder = states.into_iter().find(|s| s.image == image && s.is_live()).filter(|_| failure.busy);
    match holder {
        Some(state) => failure.plain.hint(format_args!(
            "attached as {} by pid {}: vdisk detach it first, or attach both with --read-only",
            state.device.display(),
            state.pid
        )),
        None => failure.hinted(),
    }
}
