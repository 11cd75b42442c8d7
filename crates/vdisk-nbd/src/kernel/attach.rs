//! Attach from start to end: socket pairs, worker threads, the device, and everything down again.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::rc::Rc;
use std::sync::mpsc as std_mpsc;
use std::thread;
use std::time::Duration;

use tokio::sync::mpsc;
use tracing::{debug, info, warn};
use vdisk_image::Geometry;

use super::device::{Device, forget_partitions, make_ready, path_of};
use super::error::AttachError;
use super::family::{Connect, connect, disconnect};
use super::sysfs::Sysfs;
use crate::backend::Backend;
use crate::codec::TransmissionFlags;
use crate::server::{run_on_this_thread, serve_transmission};
use crate::stop::{Stop, stop_channel};

/// How to attach.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AttachOptions {
    /// Which `/dev/nbdN`; any free one by default.
    pub index: Option<u32>,
    /// Sockets, and as many worker threads: 1 to 64. Each has a hardware queue of 128 requests; each makes connecting
    /// slower.
    pub sockets: usize,
    /// Who serves the device: to be given again to take it over. See [`Connect::backend_id`].
    pub backend_id: String,
    /// See [`Connect::timeout`].
    pub timeout: Duration,
    /// See [`Connect::dead_connection_timeout`].
    pub dead_connection_timeout: Duration,
}

impl AttachOptions {
    /// The defaults.
    ///
    /// The timeout is 30 s, the kernel's own for a fresh device. It does not detect a killed server (the closed sockets
    /// do that at once) but a stuck one; a shorter one would take a slow image for a dead server, a longer one delays
    /// the requests that a recovery sends again. The device then waits 60 s, longer than the timeout so that
    /// those requests find it alive, for a new server before they fail. A [`disconnect`] ends every such wait at once.
    pub fn new(backend_id: impl Into<String>) -> Self {
        let cores = thread::available_parallelism().map_or(1, usize::from);
        Self {
            index: None,
            sockets: cores.min(4),
            backend_id: backend_id.into(),
            timeout: Duration::from_secs(30),
            dead_connection_timeout: Duration::from_secs(60),
        }
    }
}

/// Attaches what `backend` makes, calls `ready` once the device and its partitions can be used, and serves it until the
/// signal to stop or until somebody disconnects the device.
///
/// Each worker thread makes its own backend, on its own runtime. At the signal the device's page cache is written
/// back before the device is taken down; whether somebody still uses it is for the caller to check. Returns
/// after everything in flight has finished: the disk may be closed then.
///
/// # Errors
///
/// The step that failed; nothing is left attached then, unless taking it down is what failed.
pub fn attach<B, F>(
    options: &AttachOptions,
    backend: F,
    stop: &Stop,
    ready: impl FnOnce(&Device),
) -> Result<(), AttachError>
where
    B: Backend,
    F: Fn() -> io::Result<B> + Send + Sync,
{
    let backend = &backend;
    thread::scope(|scope| {
        // Dropped on every way out, which ends the workers.
        let (quit, quitting) = stop_channel();
        let (started, start) = std_mpsc::channel();
        let (running, mut ended) = mpsc::unbounded_channel::<std::convert::Infallible>();
        let mut kernel_ends = Vec::new();
        for number in 0..options.sockets.clamp(1, 64) {
            let (ours, kernels) = UnixStream::pair().map_err(|e| AttachError::new("make a socket pair", e))?;
            kernel_ends.push(kernels);
            let (started, running, quitting) = (started.clone(), running.clone(), quitting.clone());
            thread::Builder::new()
                .name(format!("nbd-{number}"))
                .spawn_scoped(scope, move || {
                    work(ours, backend, &quitting, &started);
                    drop(running);
                })
                .map_err(|e| AttachError::new("start a worker", e))?;
        }
        drop((running, started));
        let mut geometry = None;
        for _ in &kernel_ends {
            let answer = start.recv().unwrap_or_else(|e| Err(io::Error::other(e)));
            geometry = Some(answer.map_err(|e| AttachError::new("start a worker", e))?);
        }
        let geometry = geometry.ok_or_else(|| AttachError::new("start a worker", "there is none"))?;
        if stop.is_stopped() {
            return Ok(());
        }

        let index = connect(&Connect {
            index: options.index,
            size: geometry.size,
            flags: TransmissionFlags::of(&geometry, false),
            timeout: options.timeout,
            dead_connection_timeout: options.dead_connection_timeout,
            backend_id: &options.backend_id,
            sockets: kernel_ends.iter().map(AsFd::as_fd).collect(),
        })?;
        drop(kernel_ends);
        let attached = Attached { index, pid: Sysfs::of(index).pid(), writable: !geometry.read_only };
        match make_ready(index, geometry.size) {
            Ok(device) => ready(&device),
            Err(e) => {
                attached.take_down(false).unwrap_or_else(|e| warn!("{e}"));
                return Err(e);
            }
        }
        let all_ended = run_on_this_thread(async {
            tokio::select! {
                () = stop.wait() => false,
                _ = ended.recv() => true,
            }
        });
        let all_ended = all_ended.unwrap_or_else(|e| {
            warn!("wait for the signal to stop: {e}");
            false
        });
        let down = attached.take_down(!all_ended);
        quit.stop();
        down
    })
}

/// A device that this process connected.
struct Attached {
    index: u32,
    /// The thread that connected it, as the kernel tells it.
    pid: Option<String>,
    writable: bool,
}

impl Attached {
    /// Disconnects the device, if it is still ours: it may have been taken down, and connected by others, since.
    fn take_down(&self, served: bool) -> Result<(), AttachError> {
        if served && self.writable {
            let written = File::open(path_of(self.index)).and_then(|device| device.sync_all());
            written.unwrap_or_else(|e| warn!("write back {}: {e}", path_of(self.index).display()));
        }
        let now = Sysfs::of(self.index).pid();
        let ours = now == self.pid || self.pid.is_none();
        let down = if ours { disconnect(self.index) } else { Ok(()) };
        forget_partitions(self.index).unwrap_or_else(|e| debug!("open {}: {e}", path_of(self.index).display()));
        down
    }
}

/// One worker thread, until the kernel closes its socket.
fn work<B: Backend>(
    socket: UnixStream,
    backend: &impl Fn() -> io::Result<B>,
    quitting: &Stop,
    started: &std_mpsc::Sender<io::Result<Geometry>>,
) {
    let ran = run_on_this_thread(async {
        socket.set_nonblocking(true)?;
        let socket = tokio::net::UnixStream::from_std(socket)?;
        let backend = Rc::new(backend()?);
        let _ = started.send(Ok(backend.geometry()));
        match serve_transmission(socket, backend, quitting).await {
            Ok(end) => debug!(?end, "a socket ended"),
            Err(e) => info!("a socket was cut: {e}"),
        }
        Ok(())
    });
    if let Err(e) = ran.flatten() {
        let _ = started.send(Err(e));
    }
}
