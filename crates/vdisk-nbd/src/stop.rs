//! The signal to stop, given from outside.

use std::sync::Arc;

use tokio::sync::watch;

/// Gives the signal. Dropping it gives the signal too: nobody could give it any more.
#[derive(Debug)]
pub struct Stopper(watch::Sender<bool>);

impl Stopper {
    /// Gives the signal; again is nothing. Not for a signal handler: it takes a lock.
    pub fn stop(&self) {
        self.0.send_replace(true);
    }
}

/// Waits for the signal. Clones wait for the same one.
#[derive(Clone, Debug)]
pub struct Stop {
    signal: watch::Receiver<bool>,
    /// Of [`Stop::never`]: keeps the other end alive.
    never: Option<Arc<watch::Sender<bool>>>,
}

/// A signal to stop and its receiver.
pub fn stop_channel() -> (Stopper, Stop) {
    let (sender, signal) = watch::channel(false);
    (Stopper(sender), Stop { signal, never: None })
}

impl Stop {
    /// A signal that is never given.
    pub fn never() -> Self {
        let (sender, signal) = watch::channel(false);
        Self { signal, never: Some(Arc::new(sender)) }
    }

    /// Returns once the signal was given.
    pub async fn wait(&self) {
        // An error says that the stopper is gone, which is the signal as well.
        let _ = self.signal.clone().wait_for(|stopped| *stopped).await;
    }

    /// Whether the signal was given.
    pub fn is_stopped(&self) -> bool {
        *self.signal.borrow() || (self.never.is_none() && self.signal.has_changed().is_err())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_signal_reaches_every_clone_and_a_dropped_stopper_is_one() {
        let (stopper, stop) = stop_channel();
        let other = stop.clone();
        assert!(!stop.is_stopped());
        stopper.stop();
        stop.wait().await;
        other.wait().await;
        assert!(other.is_stopped());

        let (stopper, stop) = stop_channel();
        drop(stopper);
        stop.wait().await;
        assert!(stop.is_stopped());
        assert!(!Stop::never().is_stopped());
    }
}
