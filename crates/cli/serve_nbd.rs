//! The NBD transport: a server for any client.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;

use vdisk_io::{BlockingIo, OwnRing, UringIo};
use vdisk_nbd::{DiskBackend, Export, Server, ServerOptions};

use crate::failure::{Failure, Result, chain};
use crate::open::Opened;
use crate::signals::Stop;

/// Submissions at once; more wait.
const RING_ENTRIES: u32 = 128;

/// Serves clients until `stop` is given. Tells by `listening` when it listens, and on which TCP port.
pub(crate) fn serve(
    image: &Opened,
    unix: Option<PathBuf>,
    tcp: Option<SocketAddr>,
    listening: impl FnOnce(Option<SocketAddr>),
    stop: &Stop,
) -> Result<()> {
    let (stopper, stopped) = vdisk_nbd::stop_channel();
    stop.arm(move || stopper.stop());
    let options = ServerOptions { unix, tcp, ..ServerOptions::default() };
    let server = Server::bind(&options).map_err(|e| Failure::from_error(&e))?;
    listening(server.tcp_address());
    // The empty name, which clients ask for by default.
    let export = Export::new("");
    let served = match Engine::best() {
        Engine::Uring => server.run(&export, make_backend::uring(image), &stopped),
        Engine::Blocking => server.run(&export, make_backend::blocking(image), &stopped),
    };
    served.map_err(|e| Failure::from_error(&e))
}

/// Which engine does the I/O on the image.
pub(crate) enum Engine {
    Uring,
    Blocking,
}

impl Engine {
    /// The best one that this process may use.
    pub(crate) fn best() -> Self {
        match OwnRing::available() {
            Ok(()) => Self::Uring,
            Err(e) => {
                tracing::warn!("no io_uring, one request at a time: {}", chain(&e));
                Self::Blocking
            }
        }
    }
}

/// What makes the backend of a worker thread.
pub(crate) mod make_backend {
    use super::*;

    pub(crate) fn uring(image: &Opened) -> impl Fn() -> io::Result<DiskBackend<UringIo<OwnRing>>> + Send + Sync {
        || {
            let engine = UringIo::new(OwnRing::new(RING_ENTRIES)?, Arc::clone(&image.files));
            Ok(DiskBackend::new(Arc::clone(&image.disk), engine))
        }
    }

    pub(crate) fn blocking(image: &Opened) -> impl Fn() -> io::Result<DiskBackend<BlockingIo>> + Send + Sync {
        || Ok(DiskBackend::new(Arc::clone(&image.disk), BlockingIo::new(Arc::clone(&image.files))))
    }
}
