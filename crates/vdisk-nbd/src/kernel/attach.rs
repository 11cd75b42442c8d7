//! Attach from start to end: socket pairs, worker threads, the device, and everything down again.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::rc::Rc;
use std::sync::mpsc as std_mpsc;
use std::thread;
use std::time::Duration;

use tokio::sync::mpsc;
use tracing::{debug, warn};
use vdisk_image::Geometry;

use super::device::{Device, delete_partitions, forget_partitions, make_ready, path_of, poll_until};
use super::error::AttachError;
use super::family::{Connect, connect, disconnect};
use super::sysfs::Sysfs;
use crate::backend::Backend;
use crate::codec::TransmissionFlags;
use crate::server::{End, run_on_this_thread, serve_transmission};
use crate::stop::{Stop, stop_channel};

/// How long the kernel waits for a reply before it gives its socket up.
///
/// Long, because a server that is only slow (a large flush, a network file system that stalls) would be taken for a dead
/// one: every timeout costs the device a socket, for good, and the last one the device. And because of what happens
/// then: the request is sent again on another socket while the first is still being served here. If that is an old
/// write it may end after a newer one of the same place, and put old data over new; this crate can hold back what
/// has not begun, but not what has.
///
/// Not needed to notice a killed server: its sockets are closed, which the kernel sees at once. Requests that it had not
/// answered wait until this time is over, or until a [`disconnect`], at which they fail at once.
///
/// Never 0: that is no "never", but what the device had before, or 30 s.
const TIMEOUT: Duration = Duration::from_secs(3600);

/// How long new requests wait for a new server after the last socket was closed, before they fail.
const DEAD_CONNECTION_TIMEOUT: Duration = Duration::from_secs(60);

/// How long a device that was disconnected on purpose may take to show it.
const DISCONNECTING: Duration = Duration::from_secs(1);

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
    /// The defaults: a reply may take an hour, and new requests wait a minute for a new server once the old one is
    /// dead. A [`disconnect`] ends every such wait at once.
    pub fn new(backend_id: impl Into<String>) -> Self {
        let cores = thread::available_parallelism().map_or(1, usize::from);
        Self {
            index: None,
            sockets: cores.min(4),
            backend_id: backend_id.into(),
            timeout: TIMEOUT,
            dead_connection_timeout: DEAD_CONNECTION_TIMEOUT,
        }
    }
}

/// Attaches what `backend` makes, and serves it until the signal to stop or until somebody disconnects the device.
///
/// Calls `connected` with the N of `/dev/nbdN` and its path as soon as there is a device, and `ready` once it and its
/// partitions can be used.
///
/// Each worker thread makes its own backend, on its own runtime. At the signal the device's page cache is written
/// back before the device is taken down; whether somebody still uses it is for the caller to check. Returns
/// after everything in flight has finished: the disk may be closed then.
///
/// # Errors
///
/// The step that failed, which may be serving: the kernel may give the device up. Nothing is left attached then,
/// unless taking it down is what failed.
pub fn attach<B, F>(
    options: &AttachOptions,
    backend: F,
    stop: &Stop,
    connected: impl FnOnce(u32, &Path),
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
        let (running, mut ended) = mpsc::unbounded_channel();
        let mut kernel_ends = Vec::new();
        for number in 0..options.sockets.clamp(1, 64) {
            let (ours, kernels) = UnixStream::pair().map_err(|e| AttachError::new("make a socket pair", e))?;
            kernel_ends.push(kernels);
            let (started, running, quitting) = (started.clone(), running.clone(), quitting.clone());
            thread::Builder::new()
                .name(format!("nbd-{number}"))
                .spawn_scoped(scope, move || {
                    let _ = running.send(work(ours, backend, &quitting, &started));
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
        connected(index, &path_of(index));
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
                () = stop.wait() => None,
                on_purpose = all_ended(&mut ended) => Some(on_purpose),
            }
        });
        let all_ended = all_ended.unwrap_or_else(|e| {
            warn!("wait for the signal to stop: {e}");
            None
        });
        let lost = all_ended == Some(false) && !poll_until(DISCONNECTING, || !attached.is_connected());
        let down = attached.take_down(all_ended.is_none());
        quit.stop();
        if lost {
            down.unwrap_or_else(|e| warn!("{e}"));
            let limit = options.timeout.as_secs();
            let reason =
                format!("the kernel gave up every connection to it, as it does after {limit} s without a reply");
            return Err(AttachError::new(format!("serve {}", path_of(index).display()), reason));
        }
        down
    })
}

/// Waits until the last socket has ended. Whether the device was disconnected on purpose.
async fn all_ended(ended: &mut mpsc::UnboundedReceiver<bool>) -> bool {
    let mut on_purpose = false;
    while let Some(disconnected) = ended.recv().await {
        on_purpose |= disconnected;
    }
    on_purpose
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
        let path = path_of(self.index);
        // Opened before it is disconnected, or the kernel would read the partition table of a device without a server.
        let device = if served && self.is_connected() {
            File::open(&path).map_err(|e| warn!("open {}: {e}", path.display())).ok()
        } else {
            None
        };
        if let Some(device) = &device {
            if self.writable {
                device.sync_all().unwrap_or_else(|e| warn!("write back {}: {e}", path.display()));
            }
            delete_partitions(self.index, device);
        }
        let down = if self.is_connected() { disconnect(self.index) } else { Ok(()) };
        match device {
            // Those that somebody had open a moment ago, or that somebody made the kernel look for.
            Some(device) => delete_partitions(self.index, &device),
            None => forget_partitions(self.index).unwrap_or_else(|e| debug!("open {}: {e}", path.display())),
        }
        down
    }

    /// Whether it is still the device that this process connected. Also after a disconnect, until nobody has it open.
    fn is_connected(&self) -> bool {
        let now = Sysfs::of(self.index).pid();
        now == self.pid || self.pid.is_none()
    }
}

/// One worker thread, until the kernel closes its socket. Whether it said before that the device is disconnected.
fn work<B: Backend>(
    socket: UnixStream,
    backend: &impl Fn() -> io::Result<B>,
    quitting: &Stop,
    started: &std_mpsc::Sender<io::Result<Geometry>>,
) -> bool {
    let ran = run_on_this_thread(async {
        socket.set_nonblocking(true)?;
        let socket = tokio::net::UnixStream::from_std(socket)?;
        let backend = Rc::new(backend()?);
        let _ = started.send(Ok(backend.geometry()));
        match serve_transmission(socket, backend, quitting).await {
            Ok(End::Disconnected) => return Ok(true),
            _ if quitting.is_stopped() => {}
            Ok(_) => warn!("the kernel gave a connection up: its requests took too long, or the device was cleared"),
            Err(e) => warn!("a connection to the kernel was cut: {e}"),
        }
        Ok(false)
    });
    ran.flatten().unwrap_or_else(|e| {
        let _ = started.send(Err(e));
        false
    })
}
