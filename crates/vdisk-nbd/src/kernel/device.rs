//! From a connected index to a device that can be used, and back.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

use tracing::debug;

use super::error::AttachError;
use super::sys::{delete_partition, reread_partitions};
use super::sysfs::{Partition, Sysfs, partitions_are_off};

/// How long a node may take to appear: the kernel makes it at once, udev may rename or chmod it.
const NODE_DEADLINE: Duration = Duration::from_secs(5);
const POLL: Duration = Duration::from_millis(5);

/// A device that can be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Device {
    /// The N of `/dev/nbdN`.
    pub index: u32,
    /// `/dev/nbdN`
    pub path: PathBuf,
    /// What the kernel found in the partition table.
    pub partitions: Vec<Partition>,
    /// What people should be told.
    pub notices: Vec<String>,
}

/// The partitions of `/dev/nbdN` that the kernel knows now.
///
/// # Errors
///
/// There is no such device.
pub fn partitions(index: u32) -> io::Result<Vec<Partition>> {
    Sysfs::of(index).partitions()
}

/// Opens a disconnected device once: until then the kernel keeps the nodes of its old partitions.
///
/// Waits up to 2 s for others to close it: the kernel ends a device with its last user, and would read the partition
/// table of one that is not served any more if it was opened before.
///
/// # Errors
///
/// The host's.
pub fn forget_partitions(index: u32) -> io::Result<()> {
    let sysfs = Sysfs::of(index);
    // The kernel may still be at it.
    poll_until(Duration::from_secs(2), || sysfs.pid().is_none());
    File::open(path_of(index)).map(drop)
}

/// Makes the kernel forget the partitions of a device that is open, which others may have open too: unlike
/// [`forget_partitions`] this waits for nobody. Those that are in use stay.
pub(super) fn delete_partitions(index: u32, device: &File) {
    for partition in partitions(index).unwrap_or_default() {
        if let Err(e) = delete_partition(device, partition.number) {
            debug!("forget {}: {e}", partition.path.display());
        }
    }
}

pub(super) fn path_of(index: u32) -> PathBuf {
    Path::new("/dev").join(format!("nbd{index}"))
}

/// Waits for the node, tunes the queue, and has the partition table read: the kernel does it in the first open.
pub(super) fn make_ready(index: u32, size: u64) -> Result<Device, AttachError> {
    let (sysfs, path) = (Sysfs::of(index), path_of(index));
    let failed = |source: io::Error| AttachError::new(format!("open {}", path.display()), source);
    if !poll_until(NODE_DEADLINE, || sysfs.size() == Some(size)) {
        let seen = sysfs.size().map_or_else(|| "no size".to_owned(), |seen| format!("{seen} bytes"));
        return Err(failed(io::Error::other(format!("the device has {seen} instead of {size} bytes"))));
    }
    if let Err(e) = sysfs.tune() {
        debug!("tune {}: {e}", path.display());
    }
    poll_until(NODE_DEADLINE, || is_block_device(&path));
    let device = File::open(&path).map_err(failed)?;
    let mut notices = Vec::new();
    let mut partitions = sysfs.partitions().map_err(failed)?;
    if partitions_are_off() {
        notices.push("the nbd module was loaded with max_part=0: partitions have no devices".to_owned());
    } else if partitions.is_empty() {
        // Once more, in case that somebody else's open came in between. It would take away nodes that are there.
        if let Err(e) = reread_partitions(&device) {
            debug!("read the partition table of {}: {e}", path.display());
        }
        partitions = sysfs.partitions().map_err(failed)?;
    }
    for partition in &partitions {
        if !poll_until(NODE_DEADLINE, || is_block_device(&partition.path)) {
            notices.push(format!("{} did not appear", partition.path.display()));
        }
    }
    Ok(Device { index, path, partitions, notices })
}

fn is_block_device(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|m| m.file_type().is_block_device())
}

/// Whether `done` came true in time.
pub(super) fn poll_until(deadline: Duration, done: impl Fn() -> bool) -> bool {
    let started = Instant::now();
    while !done() {
        if started.elapsed() >= deadline {
            return false;
        }
        sleep(POLL);
    }
    true
}
