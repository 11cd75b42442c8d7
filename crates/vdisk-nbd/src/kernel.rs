//! The kernel's own client: attaches a disk as `/dev/nbdN` (`drivers/block/nbd.c`, by generic netlink).
//!
//! Each of a few socket pairs has a worker thread at one end and a hardware queue of the device at the other. There is
//! no handshake between them: netlink tells the kernel what a handshake would have.

mod attach;
mod device;
mod error;
mod family;
mod netlink;
mod socket;
mod sys;
mod sysfs;

pub use attach::{AttachOptions, attach};
pub use device::{Device, forget_partitions, partitions};
pub use error::{AttachError, KernelError};
pub use family::{Connect, available, backend_id, connect, disconnect, grow};
pub use sysfs::Partition;
