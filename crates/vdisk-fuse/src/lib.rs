//! An image as one raw file in a FUSE file system: for kernels that have neither ublk nor nbd.
//!
//! [`attach`] binds a loop device to that file, which makes it a block device like the others: `/dev/loopN`. [`serve`]
//! mounts the file alone, where no root is needed. Both answer requests from a few threads that block ([`View`] is the
//! file system); the image and the engine below are those of the other transports.
//!
//! The only home of the FUSE crate and of loop ioctls. See `kernel-notes/fuse.md`.

#![cfg_attr(test, allow(clippy::unwrap_used, clippy::panic, reason = "a test that panics has failed, as it should"))]

mod attach;
mod error;
mod loop_device;
mod mount;
mod serve;
mod session;
mod stop;
mod view;

pub use attach::{Options, attach, available, bound_to, remove, unbound};
pub use error::Error;
pub use serve::serve;
pub use stop::{Stop, Stopper, stop_channel};
pub use view::{View, errno};
