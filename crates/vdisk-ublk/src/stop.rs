//! How a device is stopped by another thread of its server.

use std::sync::mpsc::{self, Sender};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use crate::error::Error;

/// A handle by which another thread (one that waits for signals) stops the device that [`crate::serve`] serves.
///
/// Clones are handles to the same device. One handle serves for one call of [`crate::serve`].
#[derive(Clone, Debug, Default)]
pub struct Stop(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    requested: bool,
    let_go: bool,
    queues: usize,
    growth: Option<Growth>,
    /// The control thread waits no more.
    ended: bool,
}

/// Somebody waits for the device to have so many bytes.
#[derive(Debug)]
pub(crate) struct Growth {
    pub(crate) size: u64,
    pub(crate) tell: Sender<Result<(), Error>>,
}

/// What the control thread is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Word {
    Stop,
    LetGo,
    /// The device is to be made larger: [`Stop::growth`].
    Grow,
    /// No queue thread is left.
    NobodyLeft,
}

impl Stop {
    /// A handle that was not triggered.
    pub fn new() -> Self {
        Self::default()
    }

    /// Stops the device, after which [`crate::serve`] returns; before the device is there, as soon as it is. Returns at
    /// once and cannot fail. Not for a signal handler.
    ///
    /// Requests under way are finished. A mounted file system is written back first and then shut down, so the stop can
    /// take as long as that does; whether to refuse is the caller's to decide ([`crate::is_busy`]).
    pub fn trigger(&self) {
        self.lock().requested = true;
        self.0.changed.notify_all();
    }

    /// Has the device let go of, after which [`crate::serve`] returns: requests under way are finished, and later ones wait for the
    /// next server. If requests do not end, it is served on. Returns at once and cannot fail. Not for a signal handler.
    ///
    /// Only of a device that was made to wait ([`crate::Options::recoverable`]): the others' requests fail.
    pub fn let_go(&self) {
        self.lock().let_go = true;
        self.0.changed.notify_all();
    }

    /// Has the kernel told that the device has so many bytes now, all of which requests may ask for already. Waits for that.
    ///
    /// # Errors
    ///
    /// [`Error::CannotGrow`], the driver's, or [`Error::Ended`].
    pub fn grow(&self, size: u64) -> Result<(), Error> {
        let (tell, told) = mpsc::channel();
        let mut state = self.lock();
        // Dropped if there is nobody to take it: the wait below ends by that.
        let growth = Growth { size, tell };
        state.growth = (!state.ended).then_some(growth);
        drop(state);
        self.0.changed.notify_all();
        told.recv().unwrap_or(Err(Error::Ended))
    }

    /// What [`Word::Grow`] is about.
    pub(crate) fn growth(&self) -> Option<Growth> {
        self.lock().growth.take()
    }

    /// The control thread waits no more.
    pub(crate) fn end(&self) {
        let mut state = self.lock();
        state.ended = true;
        state.growth = None;
    }

    /// Whether it was triggered.
    pub fn is_triggered(&self) -> bool {
        self.lock().requested
    }

    /// Counts a queue thread in; it is counted out when the token is dropped.
    pub(crate) fn queue(&self) -> RunningQueue {
        self.lock().queues += 1;
        RunningQueue(self.clone())
    }

    /// Waits until it is triggered, or told to let go or to grow (once for each time), or no queue thread is left.
    ///
    /// The control thread waits here and then stops the device itself: libublk's ring for control commands belongs to a
    /// thread (its own control panics elsewhere), and a control made for the purpose needs file descriptors, which may
    /// be used up. A queue thread must not give the command: it has to serve the last requests.
    pub(crate) fn wait(&self) -> Word {
        let waiting = |s: &mut State| !s.requested && !s.let_go && s.growth.is_none() && s.queues > 0;
        let mut state = self.0.changed.wait_while(self.lock(), waiting).unwrap_or_else(PoisonError::into_inner);
        if state.requested {
            return Word::Stop;
        }
        match std::mem::take(&mut state.let_go) {
            true => Word::LetGo,
            false if state.growth.is_some() => Word::Grow,
            false => Word::NobodyLeft,
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A queue thread that runs.
#[derive(Debug)]
pub(crate) struct RunningQueue(Stop);

impl Drop for RunningQueue {
    fn drop(&mut self) {
        self.0.lock().queues -= 1;
        self.0.0.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::thread;

    #[test]
    fn a_stop_before_the_device_is_remembered() {
        let stop = Stop::new();
        stop.clone().trigger();
        let _queue = stop.queue();
        assert!(stop.wait() == Word::Stop && stop.is_triggered());
    }

    #[test]
    fn a_trigger_ends_the_wait_of_another_thread() {
        let stop = Stop::new();
        let _queue = stop.queue();
        let other = stop.clone();
        let waiting = thread::spawn(move || other.wait());
        stop.trigger();
        assert_eq!(waiting.join().unwrap(), Word::Stop);
    }

    #[test]
    fn each_word_to_let_go_is_heard_once_and_a_stop_before_it() {
        let stop = Stop::new();
        let queue = stop.queue();
        stop.let_go();
        assert_eq!(stop.wait(), Word::LetGo);
        stop.let_go();
        stop.trigger();
        assert_eq!([stop.wait(), stop.wait()], [Word::Stop, Word::Stop]);
        drop(queue);
    }

    #[test]
    fn who_wants_it_to_grow_gets_an_answer_whatever_becomes_of_the_device() {
        let stop = Stop::new();
        let _queue = stop.queue();
        let other = stop.clone();
        let growing = thread::spawn(move || other.grow(1024));
        assert_eq!(stop.wait(), Word::Grow);
        let growth = stop.growth().unwrap();
        assert_eq!(growth.size, 1024);
        growth.tell.send(Ok(())).unwrap();
        growing.join().unwrap().unwrap();
        let other = stop.clone();
        let growing = thread::spawn(move || other.grow(2048));
        assert_eq!(stop.wait(), Word::Grow);
        stop.end();
        assert!(matches!(growing.join().unwrap(), Err(Error::Ended)));
        assert!(matches!(stop.grow(4096), Err(Error::Ended)));
    }

    #[test]
    fn the_end_of_the_last_queue_ends_the_wait() {
        let stop = Stop::new();
        let queues = [stop.queue(), stop.queue()];
        let other = stop.clone();
        let waiting = thread::spawn(move || other.wait());
        drop(queues);
        assert_eq!(waiting.join().unwrap(), Word::NobodyLeft);
    }
}
