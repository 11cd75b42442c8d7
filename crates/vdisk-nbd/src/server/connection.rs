//! One connection from the first byte to the last.

use std::os::fd::AsFd;
use std::rc::Rc;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::timeout;
use tracing::debug;

use super::handshake::{Agreed, handshake};
use super::reader::Reader;
use super::terms::Terms;
use super::transmission::transmission;
use crate::backend::Backend;
use crate::error::ConnectionError;
use crate::export::Export;
use crate::stop::Stop;

/// How long a client may take for the whole handshake: as long as qemu grants since CVE-2024-7409.
const HANDSHAKE_DEADLINE: Duration = Duration::from_secs(10);

/// How a connection ended in good order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// The client left during the handshake.
    Aborted,
    /// The client said DISC.
    Disconnected,
    /// The client closed the stream between two requests.
    Closed,
    /// The signal to stop was given, and everything in flight is answered.
    Stopped,
}

/// Serves one client: handshake, option haggling, transmission.
///
/// To be called inside a `LocalSet`. Returns after everything that was in flight has finished. After the signal to
/// stop new requests get ESHUTDOWN, and the connection is closed once what was in flight is answered.
///
/// # Errors
///
/// Why the connection was cut.
pub async fn serve_connection<S, B>(
    stream: S,
    backend: Rc<B>,
    export: &Export,
    stop: &Stop,
) -> Result<End, ConnectionError>
where
    S: AsyncRead + AsyncWrite + 'static,
    B: Backend,
{
    serve_stranger(stream, Terms::stranger(None), backend, export, stop).await
}

/// [`serve_connection`] on these terms.
pub(super) async fn serve_stranger<S, B>(
    stream: S,
    terms: Terms,
    backend: Rc<B>,
    export: &Export,
    stop: &Stop,
) -> Result<End, ConnectionError>
where
    S: AsyncRead + AsyncWrite + 'static,
    B: Backend,
{
    let (read, mut write) = tokio::io::split(stream);
    let mut reader = Reader::new(read, terms.stall);
    let agreed = timeout(HANDSHAKE_DEADLINE, handshake(&mut reader, &mut write, &backend.geometry(), export, stop))
        .await
        .map_err(|_| ConnectionError::HandshakeDeadline(HANDSHAKE_DEADLINE.as_secs()))??;
    match agreed {
        Agreed::Transmission { structured } => {
            debug!(structured, "transmission begins");
            transmission(reader, write, terms, backend, structured, stop).await
        }
        Agreed::Leave => Ok(End::Aborted),
    }
}

/// Serves the kernel's client: transmission without a handshake before it, and simple replies only.
///
/// The kernel may take any time to send and to read. It shuts a socket that it gives up, and sends what was in flight
/// again on another: changes that have not begun by then never begin, or they could undo newer ones.
/// [`End::Disconnected`] says that the device was disconnected, [`End::Closed`] that the socket was given up.
///
/// As [`serve_connection`] otherwise.
///
/// # Errors
///
/// Why the connection was cut.
pub async fn serve_transmission<B: Backend>(
    stream: tokio::net::UnixStream,
    backend: Rc<B>,
    stop: &Stop,
) -> Result<End, ConnectionError> {
    let terms = Terms::kernel(stream.as_fd().try_clone_to_owned()?);
    let (read, write) = tokio::io::split(stream);
    transmission(Reader::new(read, terms.stall), write, terms, backend, false, stop).await
}
