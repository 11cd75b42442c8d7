//! SIGTERM and SIGINT end a server in an orderly way, and so does SIGHUP one that has no device. With a device, SIGHUP has it look whether
//! the image has grown.

use std::fs;
use std::io;
use std::mem;
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

use nix::sys::signal::{SigSet, Signal};

use crate::failure::{Failure, Result};

/// SIGUSR1 has a device let go of, for another server.
const LET_GO: Signal = Signal::SIGUSR1;
/// Of the terminal, or of somebody who has made the image longer.
const LOOK: Signal = Signal::SIGHUP;

/// The signals are held back from all threads that are started from here on.
pub(crate) struct Held(SigSet);

/// Holds the signals back. To be called before there are other threads. (SIGPIPE is ignored by every Rust program.)
///
/// With a device, SIGHUP is for us whatever nohup(1) has arranged.
pub(crate) fn hold(has_device: bool) -> nix::Result<Held> {
    let mut held = SigSet::from_iter([Signal::SIGTERM, Signal::SIGINT, LOOK, LET_GO]);
    // A limit on the size of files (RLIMIT_FSIZE) is to be an error of the write, not the end of the server.
    SigSet::from_iter([Signal::SIGXFSZ]).thread_block()?;
    held.thread_block()?;
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    if !has_device && ignores(&status, LOOK) {
        held.remove(LOOK);
    }
    Ok(Held(held))
}

/// Whether a /proc/PID/status says that a signal is ignored, as nohup(1) arranges it. Held back it would come all the same.
fn ignores(status: &str, signal: Signal) -> bool {
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let mask = mask.and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok());
    mask.is_some_and(|mask| mask >> (signal as i32 - 1) & 1 == 1)
}

impl Held {
    /// Gives `stop` at the first signal that ends the process, also at one that came before. Later ones are ignored. With a device,
    /// each SIGHUP is a word on `look`.
    pub(crate) fn on_end(self, stop: Stop, look: Option<Sender<()>>) -> io::Result<()> {
        let wait = move || loop {
            match (self.0.wait(), &look) {
                (Ok(LET_GO), _) => stop.let_go(),
                // Nobody hears it who ends already.
                (Ok(LOOK), Some(look)) => drop(look.send(())),
                (Ok(signal), _) => {
                    tracing::info!("{signal}: draining");
                    return stop.give();
                }
                (Err(e), _) => return tracing::error!("waiting for signals: {e}"),
            }
        };
        thread::Builder::new().name("signals".to_owned()).spawn(wait).map(drop)
    }
}

/// The signal to stop, whatever the transport understands by it. Clones give the same one.
#[derive(Clone, Default)]
pub(crate) struct Stop {
    stage: Arc<Mutex<Stage>>,
    let_go: Arc<Mutex<Option<LetGo>>>,
    grow: Arc<Mutex<Option<Grow>>>,
}

type LetGo = Box<dyn Fn() + Send>;
type Grow = Arc<dyn Fn(u64) -> Result<()> + Send + Sync>;

#[derive(Default)]
enum Stage {
    #[default]
    Waiting,
    Armed(Box<dyn FnOnce() + Send>),
    Given,
}

impl Stop {
    /// Gives the signal; again is nothing.
    pub(crate) fn give(&self) {
        let before = mem::replace(&mut *self.stage(), Stage::Given);
        if let Stage::Armed(action) = before {
            action();
        }
    }

    /// What is to be done at the signal; at once if it was given already.
    pub(crate) fn arm(&self, action: impl FnOnce() + Send + 'static) {
        let mut stage = self.stage();
        if let Stage::Given = *stage {
            drop(stage);
            action();
        } else {
            *stage = Stage::Armed(Box::new(action));
        }
    }

    /// What is to be done at the signal to let go of the device.
    pub(crate) fn arm_let_go(&self, action: impl Fn() + Send + 'static) {
        *locked(&self.let_go) = Some(Box::new(action));
    }

    /// How the kernel is told that the device has so many bytes now.
    pub(crate) fn arm_grow(&self, action: impl Fn(u64) -> Result<()> + Send + Sync + 'static) {
        *locked(&self.grow) = Some(Arc::new(action));
    }

    /// Has the kernel told, and waits for that.
    pub(crate) fn grow(&self, size: u64) -> Result<()> {
        let action = locked(&self.grow).clone();
        action.map_or_else(|| Err(Failure::new("there is no device")), |action| action(size))
    }

    fn let_go(&self) {
        match &*locked(&self.let_go) {
            Some(action) => {
                tracing::info!("{LET_GO}: letting go of the device");
                action();
            }
            None => tracing::warn!("{LET_GO}: there is no device that could wait for another server"),
        }
    }

    pub(crate) fn is_given(&self) -> bool {
        matches!(*self.stage(), Stage::Given)
    }

    fn stage(&self) -> MutexGuard<'_, Stage> {
        locked(&self.stage)
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU32, Ordering};

    #[test]
    fn an_ignored_signal_is_read_from_the_status() {
        let status = "Name:\tvdisk\nSigIgn:\t0000000000001001\nSigCgt:\t0000000000000002\n";
        assert!(ignores(status, Signal::SIGHUP) && ignores(status, Signal::SIGPIPE));
        assert!(!ignores(status, Signal::SIGINT) && !ignores("", Signal::SIGHUP));
    }

    #[test]
    fn a_stop_acts_once_whether_it_was_armed_before_or_after() {
        let count = Arc::new(AtomicU32::new(0));
        let act = |count: &Arc<AtomicU32>| {
            let count = Arc::clone(count);
            move || {
                count.fetch_add(1, Ordering::SeqCst);
            }
        };
        let stop = Stop::default();
        stop.arm(act(&count));
        assert_eq!((count.load(Ordering::SeqCst), stop.is_given()), (0, false));
        stop.give();
        stop.give();
        assert_eq!((count.load(Ordering::SeqCst), stop.is_given()), (1, true));
        stop.arm(act(&count));
        assert_eq!(count.load(Ordering::SeqCst), 2);
    }
}
