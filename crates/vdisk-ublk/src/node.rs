//! The device's nodes below /dev and what the kernel says of it below /sys.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

/// How long to wait for a node, and for the partition scan.
const PATIENCE: Duration = Duration::from_secs(10);
const STEP: Duration = Duration::from_millis(10);

/// Path of the block device with the number `id`.
pub(crate) fn path(id: u32) -> PathBuf {
    PathBuf::from(format!("/dev/ublkb{id}"))
}

/// Waits until the node exists and is the device: somebody may have made a plain file by that name meanwhile.
pub(crate) fn wait_for_device(id: u32) -> bool {
    wait(|| is_device(&path(id), Path::new(&format!("/sys/block/ublkb{id}/dev"))))
}

/// Waits until the kernel has looked for partitions.
///
/// Linux before 6.19 does so before START_DEV returns, later ones at leisure. BLKRRPART is refused (EINVAL) until then;
/// when it is not, the scan has been done. No partitions are taken away by it: it is only asked for while there are none.
/// Reports nothing: a device whose partitions cannot be found is a device all the same.
pub(crate) fn wait_for_partition_scan(id: u32) {
    let scanned = wait(|| {
        // An open waits for a scan that is under way (both hold the disk's open_mutex).
        let Ok(device) = File::open(path(id)) else { return false };
        !numbers(id).is_empty() || reread_partitions(&device).err() != Some(libc::EINVAL)
    });
    if !scanned {
        tracing::warn!(device = id, "the kernel did not look for partitions");
    }
    for node in partitions(id) {
        let name = node.file_name().unwrap_or_default().to_owned();
        if !wait(|| is_device(&node, &sys_block(id).join(&name).join("dev"))) {
            tracing::warn!(device = id, "{} did not appear", node.display());
        }
    }
}

/// Paths of the device's partitions, in the order of their numbers. None for a device that does not exist.
pub fn partitions(id: u32) -> Vec<PathBuf> {
    numbers(id).into_iter().map(|n| PathBuf::from(format!("/dev/ublkb{id}p{n}"))).collect()
}

fn numbers(id: u32) -> Vec<u32> {
    let Ok(entries) = fs::read_dir(sys_block(id)) else { return Vec::new() };
    let names = entries.filter_map(|e| e.ok()?.file_name().into_string().ok());
    let mut numbers: Vec<u32> = names.filter_map(|name| number(&name, id)).collect();
    numbers.sort_unstable();
    numbers
}

/// The partition's number in a name below /sys/block/ublkbN, if it is one.
fn number(name: &str, id: u32) -> Option<u32> {
    name.strip_prefix(&format!("ublkb{id}p"))?.parse().ok()
}

fn sys_block(id: u32) -> PathBuf {
    PathBuf::from(format!("/sys/block/ublkb{id}"))
}

/// Whether `node` is the block device whose numbers stand in the file `dev`.
fn is_device(node: &Path, dev: &Path) -> bool {
    let Ok(data) = fs::metadata(node) else { return false };
    let Ok(numbers) = fs::read_to_string(dev) else { return false };
    let here = format!("{}:{}", libc::major(data.rdev()), libc::minor(data.rdev()));
    data.file_type().is_block_device() && numbers.trim() == here
}

fn wait(mut done: impl FnMut() -> bool) -> bool {
    let start = Instant::now();
    loop {
        if done() {
            return true;
        }
        if start.elapsed() > PATIENCE {
            return false;
        }
        thread::sleep(STEP);
    }
}

/// Has everything written that waits in the page cache of the device or of a file system on it, as the driver's end of the
/// device does for one that cannot be recovered. Queues are served meanwhile.
pub(crate) fn write_back(id: u32) {
    for node in std::iter::once(path(id)).chain(partitions(id)) {
        if let Err(e) = File::open(&node).and_then(|device| flush_buffers(&device)) {
            tracing::error!(device = id, "write back {}: {e}", node.display());
        }
    }
}

/// BLKFLSBUF (include/uapi/linux/fs.h) syncs the file system on the block device too.
fn flush_buffers(device: &File) -> io::Result<()> {
    const BLKFLSBUF: libc::Ioctl = 0x1261;
    #[expect(unsafe_code, reason = "an ioctl")]
    // SAFETY: BLKFLSBUF takes no argument; the descriptor is open for the length of the call.
    let answer = unsafe { libc::ioctl(device.as_raw_fd(), BLKFLSBUF) };
    if answer < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Has the driver look early whether its server is dead: before Linux 6.15 it sees that by a request's timeout only, if the server
/// died with every tag of a queue. A server that is slow has no other trouble by it.
pub(crate) fn shorten_timeout(id: u32) {
    const MILLISECONDS: &str = "3000";
    if let Err(e) = fs::write(sys_block(id).join("queue/io_timeout"), MILLISECONDS) {
        tracing::debug!(device = id, "queue/io_timeout: {e}");
    }
}

/// Asks the kernel to look for partitions (include/uapi/linux/fs.h): an errno if it will not.
fn reread_partitions(device: &File) -> Result<(), i32> {
    const BLKRRPART: libc::Ioctl = 0x125f;
    #[expect(unsafe_code, reason = "an ioctl")]
    // SAFETY: BLKRRPART takes no argument; the descriptor is open for the length of the call.
    let answer = unsafe { libc::ioctl(device.as_raw_fd(), BLKRRPART) };
    if answer < 0 { Err(io::Error::last_os_error().raw_os_error().unwrap_or(0)) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_partition_is_known_by_its_name() {
        assert_eq!(number("ublkb1p2", 1), Some(2));
        assert_eq!(number("ublkb1p128", 1), Some(128));
        for other in ["ublkb12p2", "ublkb1", "queue", "ublkb1px"] {
            assert_eq!(number(other, 1), None, "{other}");
        }
    }

    #[test]
    fn a_plain_file_is_no_device() {
        assert!(!is_device(Path::new("/proc/self/status"), Path::new("/proc/self/status")));
        assert!(!is_device(Path::new("/dev/null"), Path::new("/sys/class/mem/null/dev")));
    }

    #[test]
    fn a_device_that_does_not_exist_has_no_partitions() {
        assert!(partitions(u32::MAX).is_empty());
    }
}
