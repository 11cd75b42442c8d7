//! NBD: a server for any client, and the kernel's own client for `/dev/nbdN`.
//!
//! Three layers. [`codec`] turns bytes into frames and back and does no I/O. [`Server`], [`serve_connection`] and
//! [`serve_transmission`] speak the protocol over any stream, one thread per connection, many requests in flight.
//! [`kernel`] hands the other ends of socket pairs to `drivers/block/nbd.c`.
//!
//! "proto.md" in these pages is `doc/proto.md` of the NetworkBlockDevice/nbd project. What is served is a [`Backend`]:
//! an image disk with an engine ([`DiskBackend`]), or a test's memory.

#![deny(clippy::little_endian_bytes)]

mod backend;
pub mod codec;
mod error;
mod export;
pub mod kernel;
mod server;
mod stop;

pub use backend::{Backend, DiskBackend};
pub use error::{ConnectionError, ServeError};
pub use export::{Export, MAX_NAME};
pub use server::{End, Server, ServerOptions, serve_connection, serve_transmission};
pub use stop::{Stop, Stopper, stop_channel};
