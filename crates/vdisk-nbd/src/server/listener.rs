//! Listeners and worker threads.

use std::fs;
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc as std_mpsc;
use std::thread;
use std::time::Duration;

use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, setsockopt, socket, sockopt};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tracing::{debug, info, warn};
use vdisk_io::{Limited, chain};

use super::budget::Budget;
use super::connection::serve_stranger;
use super::terms::Terms;
use super::worker::run_on_this_thread;
use crate::backend::Backend;
use crate::error::ServeError;
use crate::export::Export;
use crate::stop::Stop;

/// What clients do to themselves, and can do as often as they like.
static CLIENTS: Limited = Limited::new();

/// Where to listen, and with how many threads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServerOptions {
    /// Path of a unix socket.
    pub unix: Option<PathBuf>,
    /// Address of a TCP socket; port 0 takes a free one.
    pub tcp: Option<SocketAddr>,
    /// Threads, at least 1; connections are dealt to them in turn.
    pub workers: usize,
    /// Connections at the same time; more are closed at once. qemu allows 100 since CVE-2024-7409.
    pub max_connections: usize,
    /// Bytes of buffers of all requests in flight. Besides, every connection may have one request of up to 4 MiB in
    /// flight, so that none waits for the others for ever.
    pub memory: usize,
}

impl Default for ServerOptions {
    fn default() -> Self {
        let cores = thread::available_parallelism().map_or(1, usize::from);
        Self { unix: None, tcp: None, workers: cores.min(4), max_connections: 100, memory: 512 << 20 }
    }
}

/// A server that listens already: clients can connect, and wait until [`Server::run`].
#[derive(Debug)]
pub struct Server {
    unix: Option<(UnixListener, OwnSocket)>,
    tcp: Option<TcpListener>,
    workers: usize,
    max_connections: usize,
    budget: Budget,
}

impl Server {
    /// Begins to listen. A socket file that nobody listens on is replaced.
    ///
    /// # Errors
    ///
    /// [`ServeError::SocketInUse`], [`ServeError::NotASocket`], [`ServeError::NothingToListenOn`], or the host's.
    pub fn bind(options: &ServerOptions) -> Result<Self, ServeError> {
        if options.unix.is_none() && options.tcp.is_none() {
            return Err(ServeError::NothingToListenOn);
        }
        let unix = options.unix.as_deref().map(bind_unix).transpose()?;
        let tcp = options.tcp.map(bind_tcp).transpose()?;
        let (workers, max_connections) = (options.workers.max(1), options.max_connections);
        Ok(Self { unix, tcp, workers, max_connections, budget: Budget::new(options.memory) })
    }

    /// The TCP address, with the port that was taken.
    pub fn tcp_address(&self) -> Option<SocketAddr> {
        self.tcp.as_ref().and_then(|listener| listener.local_addr().ok())
    }

    /// Serves until the signal to stop, then until everything in flight is answered. The unix socket is removed.
    ///
    /// Each worker thread makes its own backend, on its own runtime.
    ///
    /// # Errors
    ///
    /// [`ServeError::Worker`] if a backend cannot be made; [`ServeError::Listen`].
    pub fn run<B, F>(self, export: &Export, backend: F, stop: &Stop) -> Result<(), ServeError>
    where
        B: Backend,
        F: Fn() -> io::Result<B> + Send + Sync,
    {
        let backend = &backend;
        thread::scope(|scope| {
            let (started, start) = std_mpsc::channel();
            let mut queues = Vec::with_capacity(self.workers);
            for number in 0..self.workers {
                let (queue, incoming) = mpsc::unbounded_channel();
                queues.push(queue);
                let (started, budget) = (started.clone(), self.budget.clone());
                thread::Builder::new()
                    .name(format!("nbd-{number}"))
                    .spawn_scoped(scope, move || {
                        let failed = started.clone();
                        let run = run_on_this_thread(worker(incoming, budget, export, backend, stop, started));
                        if let Err(e) = run.flatten() {
                            let _ = failed.send(Err(e));
                        }
                    })
                    .map_err(ServeError::Worker)?;
            }
            drop(started);
            for _ in 0..self.workers {
                start.recv().unwrap_or_else(|e| Err(io::Error::other(e))).map_err(ServeError::Worker)?;
            }
            // Here the queues are dropped, which ends the workers.
            run_on_this_thread(self.accept(queues, stop)).map_err(ServeError::Worker)?
        })
    }

    async fn accept(self, queues: Vec<mpsc::UnboundedSender<Accepted>>, stop: &Stop) -> Result<(), ServeError> {
        let listen = |address: &str| {
            let address = address.to_owned();
            move |source| ServeError::Listen { address, source }
        };
        let (unix, _own_socket) = self.unix.unzip();
        let unix = unix.map(tokio::net::UnixListener::from_std).transpose().map_err(listen("unix socket"))?;
        let tcp = self.tcp.map(tokio::net::TcpListener::from_std).transpose().map_err(listen("TCP"))?;
        let open = Arc::new(AtomicUsize::new(0));
        for queue in queues.iter().cycle() {
            let stream = tokio::select! {
                biased;
                () = stop.wait() => return Ok(()),
                stream = next_stream(unix.as_ref(), tcp.as_ref(), &open, self.max_connections) => stream,
            };
            // A worker ends only after its queue.
            let _ = queue.send(stream);
        }
        Ok(())
    }
}

/// A connection on its way to a worker.
struct Accepted {
    stream: Stream,
    _place: Place,
}

enum Stream {
    Unix(UnixStream),
    Tcp(std::net::TcpStream),
}

/// One of the places for connections.
struct Place(Arc<AtomicUsize>);

impl Drop for Place {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Accepts until there is a connection that can be served.
async fn next_stream(
    unix: Option<&tokio::net::UnixListener>,
    tcp: Option<&tokio::net::TcpListener>,
    open: &Arc<AtomicUsize>,
    max: usize,
) -> Accepted {
    loop {
        let accepted = tokio::select! {
            stream = accept_unix(unix) => stream,
            stream = accept_tcp(tcp) => stream,
        };
        let place = Place(Arc::clone(open));
        let before = open.fetch_add(1, Ordering::Relaxed);
        match accepted {
            Ok(_) if before >= max => {
                if let Some(left_out) = CLIENTS.line() {
                    warn!("a connection is closed: there are {max} already{left_out}");
                }
            }
            Ok(stream) => return Accepted { stream, _place: place },
            Err(e) => {
                // Out of file descriptors, most likely: the connection stays in the backlog.
                if let Some(left_out) = CLIENTS.line() {
                    warn!("accept a connection: {e}{left_out}");
                }
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

async fn accept_unix(listener: Option<&tokio::net::UnixListener>) -> io::Result<Stream> {
    match listener {
        Some(listener) => Ok(Stream::Unix(listener.accept().await?.0.into_std()?)),
        None => std::future::pending().await,
    }
}

async fn accept_tcp(listener: Option<&tokio::net::TcpListener>) -> io::Result<Stream> {
    match listener {
        Some(listener) => {
            let (stream, from) = listener.accept().await?;
            debug!(%from, "connection");
            stream.set_nodelay(true)?;
            keep_alive(&stream).unwrap_or_else(|e| debug!("keep-alive: {e}"));
            Ok(Stream::Tcp(stream.into_std()?))
        }
        None => std::future::pending().await,
    }
}

/// Lets a client whose machine has vanished be noticed, after two minutes.
fn keep_alive(stream: &tokio::net::TcpStream) -> io::Result<()> {
    setsockopt(stream, sockopt::KeepAlive, &true)?;
    setsockopt(stream, sockopt::TcpKeepIdle, &60)?;
    setsockopt(stream, sockopt::TcpKeepInterval, &15)?;
    setsockopt(stream, sockopt::TcpKeepCount, &4)?;
    Ok(())
}

async fn worker<B: Backend>(
    mut incoming: mpsc::UnboundedReceiver<Accepted>,
    budget: Budget,
    export: &Export,
    backend: &impl Fn() -> io::Result<B>,
    stop: &Stop,
    started: std_mpsc::Sender<io::Result<()>>,
) -> io::Result<()> {
    let backend = Rc::new(backend()?);
    let terms = Terms::stranger(Some(budget));
    let _ = started.send(Ok(()));
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            accepted = incoming.recv() => match accepted {
                Some(accepted) => {
                    let (backend, terms, export, stop) = (Rc::clone(&backend), terms.clone(), export.clone(), stop.clone());
                    connections.spawn_local(async move {
                        let Accepted { stream, _place } = accepted;
                        let served = match stream {
                            Stream::Unix(stream) => tokio::net::UnixStream::from_std(stream)
                                .map(|stream| one(stream, terms, backend, export, stop).boxed()),
                            Stream::Tcp(stream) => tokio::net::TcpStream::from_std(stream)
                                .map(|stream| one(stream, terms, backend, export, stop).boxed()),
                        };
                        match served {
                            Ok(served) => served.await,
                            Err(e) => warn!("serve a connection: {e}"),
                        }
                    });
                }
                None => break,
            },
            Some(_) = connections.join_next() => {}
        }
    }
    while connections.join_next().await.is_some() {}
    Ok(())
}

/// Hides the type of a connection.
trait Boxed: Future<Output = ()> + Sized + 'static {
    fn boxed(self) -> std::pin::Pin<Box<dyn Future<Output = ()>>> {
        Box::pin(self)
    }
}
impl<F: Future<Output = ()> + 'static> Boxed for F {}

async fn one<S, B>(stream: S, terms: Terms, backend: Rc<B>, export: Export, stop: Stop)
where
    S: AsyncRead + AsyncWrite + 'static,
    B: Backend,
{
    match serve_stranger(stream, terms, backend, &export, &stop).await {
        Ok(end) => debug!(?end, "connection ended"),
        Err(e) => {
            if let Some(left_out) = CLIENTS.line() {
                info!("connection cut: {}{left_out}", chain(&e));
            }
        }
    }
}

/// Removes the socket file that this process made, unless somebody has replaced it.
#[derive(Debug)]
struct OwnSocket {
    path: PathBuf,
    id: (u64, u64),
}

impl Drop for OwnSocket {
    fn drop(&mut self) {
        if fs::symlink_metadata(&self.path).is_ok_and(|m| (m.dev(), m.ino()) == self.id) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn bind_unix(path: &Path) -> Result<(UnixListener, OwnSocket), ServeError> {
    let failed = |source| ServeError::Listen { address: path.display().to_string(), source };
    if let Ok(metadata) = fs::symlink_metadata(path) {
        if !metadata.file_type().is_socket() {
            return Err(ServeError::NotASocket(path.to_owned()));
        }
        if is_listened_on(path).map_err(failed)? {
            return Err(ServeError::SocketInUse(path.to_owned()));
        }
        fs::remove_file(path).map_err(failed)?;
    }
    let listener = UnixListener::bind(path).map_err(failed)?;
    listener.set_nonblocking(true).map_err(failed)?;
    let metadata = fs::symlink_metadata(path).map_err(failed)?;
    Ok((listener, OwnSocket { path: path.to_owned(), id: (metadata.dev(), metadata.ino()) }))
}

/// Whether somebody listens on a socket file. Does not wait for one whose backlog is full.
fn is_listened_on(path: &Path) -> io::Result<bool> {
    let address = UnixAddr::new(path)?;
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let socket = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    match connect(socket.as_raw_fd(), &address) {
        Ok(()) | Err(nix::Error::EAGAIN) => Ok(true),
        Err(nix::Error::ECONNREFUSED) => Ok(false),
        Err(e) => Err(e.into()),
    }
}

fn bind_tcp(address: SocketAddr) -> Result<TcpListener, ServeError> {
    let failed = |source| ServeError::Listen { address: address.to_string(), source };
    let listener = TcpListener::bind(address).map_err(failed)?;
    listener.set_nonblocking(true).map_err(failed)?;
    Ok(listener)
}
