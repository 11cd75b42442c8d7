//! Why a connection or a server ended.

use std::io;
use std::path::PathBuf;

use crate::codec::ProtocolError;

/// Why a connection was cut. Nothing for the other clients to worry about.
#[derive(Debug, thiserror::Error)]
pub enum ConnectionError {
    /// The stream failed, or ended inside a frame.
    #[error("connection: {0}")]
    Stream(#[from] io::Error),
    /// The client broke the protocol in a way that leaves no way on.
    #[error("client: {0}")]
    Protocol(#[from] ProtocolError),
    /// The client did not finish the handshake in time.
    #[error("no finished handshake after {0} s")]
    HandshakeDeadline(u64),
    /// The client asked by EXPORT_NAME, to which no error can be sent, for something that is not here.
    #[error("client: asked for the unknown export {0:?}")]
    UnknownExport(String),
    /// The server is stopping and EXPORT_NAME was asked for, to which no error can be sent.
    #[error("the server is stopping")]
    Stopping,
    /// The server is stopping, and the client did not take its last replies in time.
    #[error("the client did not take its replies for {0} s")]
    Drain(u64),
}

/// Why a server did not start, or ended.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// A listener could not be made.
    #[error("listen on {address}")]
    Listen {
        /// The path or the address.
        address: String,
        /// The host's error.
        source: io::Error,
    },
    /// Somebody serves on that path already.
    #[error("listen on {}: the socket is in use", .0.display())]
    SocketInUse(PathBuf),
    /// The path is something else than a socket, and is left alone.
    #[error("listen on {}: exists and is not a socket", .0.display())]
    NotASocket(PathBuf),
    /// Neither a path nor an address was given.
    #[error("nothing to listen on")]
    NothingToListenOn,
    /// A worker thread, or its engine, could not be started.
    #[error("start a worker")]
    Worker(#[source] io::Error),
}
