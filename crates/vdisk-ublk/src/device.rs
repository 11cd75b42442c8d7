//! Serving a disk as a device: what the outside sees of it.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use vdisk_image::Disk;
use vdisk_io::FileSet;

use crate::error::Error;
use crate::features::available;
use crate::server::{Event, Origin, Plan};
use crate::stop::Stop;
use crate::{control, node, run_dir};

/// How to serve. What is `None` is chosen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// Queues, one thread each; as many as there are processors, but at most 4. More than there are processors are cut
    /// down by the driver.
    pub queues: Option<u16>,
    /// Requests under way in one queue, 1 to 4096; 64.
    pub depth: Option<u16>,
    /// Longest request in bytes, a multiple of 4096 up to 32 MiB; 512 KiB. Each of the `queues * depth` requests has a
    /// buffer of this size, but with zero copy.
    pub io_buf_bytes: Option<u32>,
    /// Whether requests are served in the kernel's own pages.
    pub zero_copy: ZeroCopy,
    /// Whether the device is to wait for another server when this one dies, and its requests with it, if the driver can. Every
    /// write that was answered has to be found again by the next one.
    pub recoverable: bool,
    /// Kept by the driver for as long as the device exists: by it a device is known again ([`crate::Status::cookie`]).
    pub cookie: u64,
}

/// Whether the kernel's pages of a request go straight to and from the image's files, or are copied to this process.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ZeroCopy {
    /// Where the driver can (Linux 6.16).
    #[default]
    Auto,
    /// Never.
    Off,
}

/// How the serving of a device ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// The device was deleted.
    Gone,
    /// It waits for another server, and will be seen to do so when this process has ended. Requests are served no more, and the
    /// threads that hold them end with the process.
    LetGo,
}

/// A device that the driver has made, and that does not answer yet.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Added {
    /// Its number: the N of `/dev/ublkbN`.
    pub id: u32,
    /// Where the block device will be.
    pub path: PathBuf,
}

/// A device that is there and answers.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Device {
    /// Its number: the N of `/dev/ublkbN`.
    pub id: u32,
    /// The block device.
    pub path: PathBuf,
    /// The block devices of its partitions, as the kernel found them.
    pub partitions: Vec<PathBuf>,
}

/// How long the driver may take to add a device. Linux 6.17 on some clouds never comes back.
const ADD: Duration = Duration::from_secs(30);
/// How long it may take to start one, in which it reads the partition table.
const START: Duration = Duration::from_secs(120);
/// How long a device that failed may take to end.
const END: Duration = Duration::from_secs(10);

/// Serves `disk` as a block device until it is stopped, by `stop` or by another process.
///
/// Two calls on the calling thread: `added` when the device has its number but was not started, for the books, so that
/// whatever happens next the device is known; `ready` when it and its partitions exist and answer. Neither comes after a
/// stop.
///
/// `files` are those of the disk's image. Needs root. The caller flushes and closes the disk afterwards: nothing of it is
/// held here then.
///
/// The process must not share a mount namespace that dies with it with users of the device (its end would unmount a file
/// system whose last writes it has to serve).
///
/// # Errors
///
/// Whatever kept the device from being made, or ended it before it was stopped. The device is deleted in any case, unless
/// the driver does not do it ([`Error::device_may_exist`]): then the process should end, and [`crate::delete`] be called by
/// another. It may even be served still ([`Error::device_may_live`]).
pub fn serve(
    disk: Arc<Disk>,
    files: Arc<FileSet>,
    options: &Options,
    added: impl FnOnce(&Added),
    ready: impl FnOnce(&Device),
    stop: Stop,
) -> Result<End, Error> {
    let (queues, depth, io_buf_bytes) = options.resolve()?;
    let features = available()?;
    let zero_copy = if options.zero_copy == ZeroCopy::Auto { features.zero_copy() } else { 0 };
    let recovery = if options.recoverable { features.recovery() } else { 0 };
    let flags = zero_copy | recovery;
    let origin = Origin::New { queues, depth, io_buf_bytes, flags, cookie: options.cookie };
    run(Plan { disk, files, origin, stop }, added, ready)
}

/// Goes on with a device that waits for a server ([`crate::State::Quiesced`]), as [`serve`] would: that the disk is the one that was
/// served is the caller's to know. A stop that is triggered before it is served takes effect then.
///
/// `begin` is called when the driver is about to be told. What waits until the dead server's last I/O is over is this call.
///
/// # Errors
///
/// As of [`serve`]; but as long as `ready` was not called, and no stop triggered, the device waits on. The process should end then.
pub fn take_over(
    disk: Arc<Disk>,
    files: Arc<FileSet>,
    id: u32,
    begin: impl FnOnce(&Added),
    ready: impl FnOnce(&Device),
    stop: Stop,
) -> Result<End, Error> {
    available()?;
    run(Plan { disk, files, origin: Origin::Waiting(id), stop }, begin, ready)
}

fn run(plan: Plan, added: impl FnOnce(&Added), ready: impl FnOnce(&Device)) -> Result<End, Error> {
    run_dir::prepare().map_err(|source| Error::RunDir { source })?;
    let (tell, events) = mpsc::channel();
    let stop = plan.stop.clone();
    let is_new = matches!(plan.origin, Origin::New { .. });
    thread::Builder::new().name("ublk-control".to_owned()).spawn(move || plan.run(tell)).map_err(Error::Thread)?;

    // Without an answer: the driver may still make it.
    let (id, go) = match next(&events, ADD, "ADD_DEV").map_err(Error::may_live)? {
        Event::Added(id, go) => (id, go),
        Event::Fault(e) => return Err(e),
        Event::Ended(result) => return result,
        Event::Live => return Err(ended_early()),
    };
    if !stop.is_triggered() || !is_new {
        added(&Added { id, path: node::path(id) });
    }
    // Looked at again: `added` may have found that there is no use in starting it. One that waits is served first, and its
    // requests, whatever is to become of it.
    if stop.is_triggered() && is_new {
        drop(go);
    } else {
        let _ = go.send(());
    }
    match next(&events, START, "START_DEV") {
        Ok(Event::Live) => {}
        Ok(Event::Ended(result)) => return result,
        // It waits on when this process has ended.
        Ok(Event::Fault(e)) | Err(e) if !is_new => return Err(e.may_live()),
        Ok(Event::Fault(e)) | Err(e) => {
            wake_start(id);
            return Err(abandon(id, &stop, &events, e));
        }
        Ok(Event::Added(..)) => return Err(abandon(id, &stop, &events, ended_early())),
    }
    if !stop.is_triggered() {
        ready(&Device { id, path: node::path(id), partitions: node::partitions(id) });
    }
    match events.recv() {
        Ok(Event::Ended(result)) => result,
        // To have it written back, or stopped, takes a queue that is served. The next server has no such trouble, perhaps.
        Ok(Event::Fault(e)) if control::status(id).is_ok_and(|s| s.is_some_and(|s| s.recoverable)) => {
            tracing::error!(device = id, "{e}: the device is left to its next server");
            Err(e.may_live())
        }
        Ok(Event::Fault(e)) => Err(abandon(id, &stop, &events, e)),
        Ok(Event::Added(..) | Event::Live) | Err(_) => Err(abandon(id, &stop, &events, ended_early())),
    }
}

impl Options {
    fn resolve(&self) -> Result<(u16, u16, u32), Error> {
        let processors = thread::available_parallelism().map_or(1, usize::from);
        let queues = self.queues.unwrap_or_else(|| u16::try_from(processors.min(4)).unwrap_or(1));
        let depth = self.depth.unwrap_or(64);
        let io_buf_bytes = self.io_buf_bytes.unwrap_or(512 << 10);
        if queues == 0 {
            return Err(Error::Option("a device has at least one queue".to_owned()));
        }
        if !(1..=4096).contains(&depth) {
            return Err(Error::Option(format!("depth {depth}: a queue has 1 to 4096 tags")));
        }
        if !(4096..=32 << 20).contains(&io_buf_bytes) || !io_buf_bytes.is_multiple_of(4096) {
            return Err(Error::Option(format!(
                "requests of {io_buf_bytes} bytes: not a multiple of 4096 from 4 KiB to 32 MiB"
            )));
        }
        Ok((queues, depth, io_buf_bytes))
    }
}

fn next(events: &Receiver<Event>, limit: Duration, what: &'static str) -> Result<Event, Error> {
    events.recv_timeout(limit).map_err(|e| match e {
        RecvTimeoutError::Timeout => Error::TimedOut { what, seconds: limit.as_secs() },
        RecvTimeoutError::Disconnected => ended_early(),
    })
}

fn ended_early() -> Error {
    Error::Thread(std::io::Error::other("the control thread ended early"))
}

/// Stops a device while the control thread waits for it to start, which it never may: for a queue that nobody serves.
/// From a thread of its own, for the stop may hang too.
fn wake_start(id: u32) {
    thread::spawn(move || {
        if let Err(e) = control::stop_anyway(id) {
            tracing::error!(device = id, "{e}");
        }
    });
}

/// Ends a device that failed, in bounded time, and gives back why it did.
fn abandon(id: u32, stop: &Stop, events: &Receiver<Event>, why: Error) -> Error {
    tracing::error!(device = id, "{why}: stopping the device");
    stop.trigger();
    let deadline = Instant::now() + END;
    loop {
        match events.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(Event::Ended(Err(e))) if e.device_may_exist() => return why.may_live(),
            Ok(Event::Ended(_)) => return why,
            Ok(_) => {}
            Err(_) => break,
        }
    }
    // Deleted when this process has ended, at the latest.
    let (tell, told) = mpsc::channel();
    thread::spawn(move || tell.send(control::delete_anyway(id)));
    if let Ok(Err(e)) = told.recv_timeout(END / 5) {
        tracing::error!(device = id, "{e}");
    }
    why.may_live()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_have_defaults_and_limits() {
        let (queues, depth, bytes) = Options::default().resolve().unwrap();
        assert!((1..=4).contains(&queues));
        assert_eq!((depth, bytes), (64, 512 << 10));
        let bad = [
            Options { queues: Some(0), ..Options::default() },
            Options { depth: Some(0), ..Options::default() },
            Options { depth: Some(4097), ..Options::default() },
            Options { io_buf_bytes: Some(4095), ..Options::default() },
            Options { io_buf_bytes: Some(4097), ..Options::default() },
            Options { io_buf_bytes: Some((32 << 20) + 4096), ..Options::default() },
        ];
        for options in bad {
            assert!(matches!(options.resolve(), Err(Error::Option(_))), "{options:?}");
        }
        let good = Options { queues: Some(1), depth: Some(4096), io_buf_bytes: Some(32 << 20), ..Options::default() };
        assert_eq!(good.resolve().unwrap(), (1, 4096, 32 << 20));
    }

    #[test]
    fn a_driver_that_does_not_answer_is_reported() {
        let (_tell, events) = mpsc::channel();
        let e = next(&events, Duration::ZERO, "ADD_DEV").err().unwrap();
        assert_eq!(e.to_string(), "ublk ADD_DEV: no answer within 0 s");
    }
}
