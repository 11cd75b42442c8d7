//! Serves a disk as a Linux block device, `/dev/ublkbN`, through the ublk driver. The only home of libublk.
//!
//! [`available`] says whether this kernel can; [`serve`] makes the device and serves it until a [`Stop`] is triggered or
//! somebody else stops the device; [`take_over`] goes on with a device whose server died or let go of it; [`delete`] and
//! [`status`] look after devices without a server.
//!
//! Data goes between the image and the pages of a request without a copy where the kernel can (6.16), else by way of a buffer of this
//! process for each request. One thread for each queue, one task for each tag, the image's own I/O on the same ring as the ublk
//! commands. What the driver does is described in the kernel's Documentation/block/ublk.rst and
//! include/uapi/linux/ublk_cmd.h.

#![warn(missing_docs)]

mod control;
mod device;
mod doors;
mod errno;
mod error;
mod executor;
mod features;
mod kick;
mod node;
mod params;
mod queue;
mod ring;
mod run_dir;
mod server;
mod stop;
mod threads;

pub use control::{State, Status, delete, is_busy, status};
pub use device::{Added, Device, End, Options, ZeroCopy, serve, take_over};
pub use errno::errno;
pub use error::Error;
pub use features::{Features, Unavailable, available};
pub use node::partitions;
pub use stop::Stop;
