//! What ends a server: the signal to stop, or the end of its mount.

use std::io;
use std::sync::mpsc;

/// Gives the signal to stop.
#[derive(Clone, Debug)]
pub struct Stopper(mpsc::Sender<End>);

impl Stopper {
    /// Gives the signal; again is nothing.
    pub fn stop(&self) {
        // Nobody waits any more: stopped already.
        let _ = self.0.send(End::Asked);
    }
}

/// Waits for the signal, once.
#[derive(Debug)]
pub struct Stop {
    ends: mpsc::Receiver<End>,
    sender: mpsc::Sender<End>,
}

/// A signal to stop and its receiver.
pub fn stop_channel() -> (Stopper, Stop) {
    let (sender, ends) = mpsc::channel();
    (Stopper(sender.clone()), Stop { ends, sender })
}

/// What came first.
#[derive(Debug)]
pub(crate) enum End {
    /// The signal.
    Asked,
    /// The kernel has let go of the file system, or its requests could not be read any more.
    Unmounted(io::Result<()>),
}

impl Stop {
    /// For the thread that waits for the end of the mount.
    pub(crate) fn sender(&self) -> mpsc::Sender<End> {
        self.sender.clone()
    }

    pub(crate) fn wait(&self) -> End {
        // The sender here keeps the channel open.
        self.ends.recv().unwrap_or(End::Asked)
    }
}
