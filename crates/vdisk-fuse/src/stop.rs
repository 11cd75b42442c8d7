//! What ends a server: the signal to stop, or the end of its mount.

use std::io;
use std::sync::mpsc;

use crate::error::Error;

/// Gives the signal to stop, and other orders.
#[derive(Clone, Debug)]
pub struct Stopper(mpsc::Sender<Word>);

impl Stopper {
    /// Gives the signal; again is nothing.
    pub fn stop(&self) {
        // Nobody waits any more: stopped already.
        let _ = self.0.send(Word::End(End::Asked));
    }

    /// Has the kernel told that the disk has so many bytes now, all of which requests may ask for already. Waits for that.
    ///
    /// # Errors
    ///
    /// The host's; [`Error::Ended`] if the device is not served any more.
    pub fn grow(&self, size: u64) -> Result<(), Error> {
        let (tell, told) = mpsc::channel();
        self.0.send(Word::Grow { size, tell }).map_err(|_| Error::Ended)?;
        told.recv().unwrap_or(Err(Error::Ended))
    }
}

/// Waits for the signal, once.
#[derive(Debug)]
pub struct Stop {
    words: mpsc::Receiver<Word>,
    sender: mpsc::Sender<Word>,
}

/// A signal to stop and its receiver.
pub fn stop_channel() -> (Stopper, Stop) {
    let (sender, words) = mpsc::channel();
    (Stopper(sender.clone()), Stop { words, sender })
}

/// What the thread that serves hears.
#[derive(Debug)]
pub(crate) enum Word {
    End(End),
    /// The disk has so many bytes now.
    Grow {
        size: u64,
        tell: mpsc::Sender<Result<(), Error>>,
    },
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
    pub(crate) fn sender(&self) -> mpsc::Sender<Word> {
        self.sender.clone()
    }

    /// Waits for the end, and has `grow` tell the kernel of a larger size meanwhile.
    pub(crate) fn wait(&self, mut grow: impl FnMut(u64) -> Result<(), Error>) -> End {
        loop {
            match self.words.recv() {
                Ok(Word::End(end)) => return end,
                // Whoever asked may not wait any more.
                Ok(Word::Grow { size, tell }) => drop(tell.send(grow(size))),
                // The sender here keeps the channel open.
                Err(_) => return End::Asked,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_grows_until_the_end_and_not_after() {
        let (stopper, stop) = stop_channel();
        let other = stopper.clone();
        let growing = std::thread::spawn(move || {
            let grown = other.grow(1024);
            other.stop();
            grown
        });
        let mut sizes = Vec::new();
        let end = stop.wait(|size| {
            sizes.push(size);
            Ok(())
        });
        assert!(matches!(end, End::Asked) && sizes == [1024]);
        growing.join().unwrap().unwrap();
        drop(stop);
        assert!(matches!(stopper.grow(2048), Err(Error::Ended)));
    }
}
