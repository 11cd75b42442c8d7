//! The threads that serve a file system.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::mpsc;
use std::thread;

use fuser::{Config, INodeNo, Notifier, Session, SessionACL};
use nix::sched::{CloneFlags, unshare};

use crate::error::Error;
use crate::stop::{End, Stop, Word};
use crate::view::View;

/// Threads that serve requests, each one at a time: docs/measurements.md.
pub(crate) const THREADS: usize = 8;

pub(crate) fn config(threads: usize) -> Config {
    let mut config = Config::default();
    config.n_threads = Some(threads);
    config.clone_fd = true;
    config
}

/// Starts to serve what `prepare` makes, which runs on the first of the serving threads.
///
/// These have a table of descriptors of their own, and nobody else has `/dev/fuse` open. Else a process that is killed while
/// one of its threads waits for its own file system would wait for ever: the serving threads are dead, but the kernel would
/// see the device open as long as the waiting one lives.
pub(crate) fn start(
    stop: &Stop,
    prepare: impl FnOnce() -> Result<Session<View>, Error> + Send + 'static,
) -> Result<(), Error> {
    let ends = stop.sender();
    let (tell, told) = mpsc::channel();
    let run = move || match own_descriptors().map_err(Error::step("unshare descriptors")).and_then(|()| prepare()) {
        Ok(session) => {
            // A failed send here and below: nobody waits any more, the server was stopped.
            let _ = tell.send(Ok(()));
            let _ = ends.send(Word::End(End::Unmounted(session.run())));
        }
        Err(e) => drop(tell.send(Err(e))),
    };
    thread::Builder::new().name("fuse".to_owned()).spawn(run).map_err(Error::step("start a thread"))?;
    told.recv().unwrap_or_else(|e| Err(Error::step("start a thread")(io::Error::other(e))))
}

/// Gives the calling thread, and those that it will start, a table of descriptors of their own.
fn own_descriptors() -> io::Result<()> {
    unshare(CloneFlags::CLONE_FILES)?;
    // Pipes by which whoever started the process learns that it is done with them.
    let null = || std::fs::File::options().read(true).write(true).open("/dev/null");
    rustix::stdio::dup2_stdin(null()?)?;
    Ok(rustix::stdio::dup2_stdout(null()?)?)
}

/// Tells the kernel that the file has become larger.
#[derive(Debug)]
pub(crate) struct Grower(mpsc::Sender<(u64, mpsc::Sender<io::Result<()>>)>);

impl Grower {
    /// On a thread of its own, started by one that serves: it has to have the descriptors that they have.
    fn start(notifier: Notifier, file: INodeNo) -> io::Result<Self> {
        let (ask, asked) = mpsc::channel::<(u64, mpsc::Sender<_>)>();
        let answer = move || {
            for (size, tell) in asked {
                // Nothing is stored, and what ends behind the file makes it longer for the kernel (fs/fuse/dev.c, fuse_notify_store).
                let _ = tell.send(notifier.store(file, size, &[]));
            }
        };
        thread::Builder::new().name("fuse-grow".to_owned()).spawn(answer)?;
        Ok(Self(ask))
    }

    pub(crate) fn grow(&self, size: u64) -> io::Result<()> {
        let (tell, told) = mpsc::channel();
        let gone = || io::Error::other("its thread has ended");
        self.0.send((size, tell)).map_err(|_| gone())?;
        told.recv().unwrap_or_else(|_| Err(gone()))
    }
}

/// Serves the mount behind `kernel`, which goes over to the serving threads for good; `mount` stays with the caller alone.
pub(crate) fn serve_detached(
    view: View,
    mount: &OwnedFd,
    kernel: OwnedFd,
    threads: usize,
    stop: &Stop,
) -> Result<Grower, Error> {
    let (mount, copy, file) = (mount.as_raw_fd(), kernel.as_raw_fd(), view.file_inode());
    let (tell, told) = mpsc::channel();
    start(stop, move || {
        close_copy(mount);
        // The loop driver asks as the kernel, and nobody else finds the mount.
        let session = Session::from_fd(view, kernel, SessionACL::All, config(threads));
        let session = session.map_err(Error::step("talk to /dev/fuse"))?;
        let _ = tell.send(Grower::start(session.notifier(), file).map_err(Error::step("start a thread"))?);
        Ok(session)
    })?;
    // The thread has closed it in its own table only, or will.
    close_copy(copy);
    told.recv().map_err(|e| Error::step("start a thread")(io::Error::other(e)))
}

/// Closes a descriptor in this thread's table whose owner lives in another one.
fn close_copy(fd: i32) {
    if let Err(e) = nix::unistd::close(fd) {
        tracing::warn!("close the copy of a descriptor: {e}");
    }
}
