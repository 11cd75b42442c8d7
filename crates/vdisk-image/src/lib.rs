//! The image backend: VMDK and raw images as disks of bytes.
//!
//! A format maps (says where data is) and never does I/O itself; [`Disk::serve`] is the one place that turns a checked
//! [`Request`] into I/O through the [`FileIo`] it is given. The crate knows no runtime, no transport and no clock.
//!
//! Lock order: an extent's lock, a shard of the grain cache, the lists of loads and of grains that are inflated, the flush
//! rounds and the first change
//! have one mutex each; none is held while another is taken, and none across an await.

#![forbid(unsafe_code)]
#![deny(clippy::big_endian_bytes)]

mod allocate;
mod cache;
mod change;
mod check;
mod coding;
mod compact;
mod cowd;
mod create;
mod disk;
mod error;
mod file_io;
mod flush;
mod free;
mod grace;
mod grow;
mod image;
mod inflate;
mod info;
mod ledger;
mod link;
#[cfg(any(test, feature = "memory"))]
pub mod memory;
mod open;
mod probe;
mod read;
mod recover;
mod request;
mod resident;
mod scan;
mod se_sparse;
mod span;
mod sparse;
mod stream;
mod table;
mod usage;
mod wait;
mod write;
mod zero;

#[cfg(test)]
mod tests;

pub use check::{Backup, CheckWatch, Fault, FaultKind, Kept, Leaks, Repair, RepairWatch};
pub use compact::{CompactWatch, Compacted, CompactedFile};
pub use create::NewImage;
pub use disk::Disk;
pub use error::{DiskError, ErrorKind};
pub use file_io::{FileId, FileIo, Files, Stored};
pub use info::{ExtentInfo, Format, Info};
pub use ledger::{LEDGER_WORDS, LedgerMemory};
pub use open::{NO_CONTENT_ID, OpenOptions};
pub use recover::{TakenOver, is_ledger_empty};
pub use request::{Flags, Geometry, Op, Request};
pub use span::{Run, RunKind, Span};
pub use vmdk_parse::{Access, ContentId, ExtentKind};
