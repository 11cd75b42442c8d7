//! What sysfs tells about a device.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// A partition of a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Partition {
    /// Its number, from 1.
    pub number: u32,
    /// `/dev/nbdNpM`
    pub path: PathBuf,
    /// First byte on the device.
    pub start: u64,
    /// Bytes.
    pub size: u64,
}

/// The files of one device.
#[derive(Clone, Debug)]
pub(super) struct Sysfs {
    block: PathBuf,
    name: String,
}

impl Sysfs {
    pub(super) fn of(index: u32) -> Self {
        Self::under(Path::new("/sys"), index)
    }

    fn under(root: &Path, index: u32) -> Self {
        let name = format!("nbd{index}");
        Self { block: root.join("block").join(&name), name }
    }

    /// Size in bytes.
    pub(super) fn size(&self) -> Option<u64> {
        sectors(&self.block.join("size"))
    }

    /// The thread that connected the device; none when it is not connected.
    pub(super) fn pid(&self) -> Option<String> {
        read(&self.block.join("pid"))
    }

    pub(super) fn partitions(&self) -> io::Result<Vec<Partition>> {
        let mut found = Vec::new();
        for entry in fs::read_dir(&self.block)? {
            let entry = entry?;
            let name = entry.file_name();
            let Some(name) = name.to_str() else { continue };
            let number = name.strip_prefix(&self.name).and_then(|rest| rest.strip_prefix('p'));
            let Some(number) = number.and_then(|n| n.parse().ok()) else { continue };
            let (start, size) = (sectors(&entry.path().join("start")), sectors(&entry.path().join("size")));
            // One that goes away while we look has neither.
            if let (Some(start), Some(size)) = (start, size) {
                found.push(Partition { number, path: Path::new("/dev").join(name), start, size });
            }
        }
        found.sort_by_key(|partition| partition.number);
        Ok(found)
    }

    /// Sets the queue up for a fast server: requests of up to 1 MiB (older kernels take 128 KiB) and no scheduler.
    pub(super) fn tune(&self) -> io::Result<()> {
        let queue = self.block.join("queue");
        let most = read(&queue.join("max_hw_sectors_kb")).and_then(|kib| kib.parse().ok()).unwrap_or(1024_u32);
        let largest = fs::write(queue.join("max_sectors_kb"), most.min(1024).to_string());
        fs::write(queue.join("scheduler"), "none").and(largest)
    }
}

/// Whether the driver was loaded with partitions switched off.
pub(super) fn partitions_are_off() -> bool {
    read(Path::new("/sys/module/nbd/parameters/max_part")).as_deref() == Some("0")
}

fn read(path: &Path) -> Option<String> {
    fs::read_to_string(path).ok().map(|text| text.trim().to_owned())
}

/// A number of 512-byte sectors, in bytes.
fn sectors(path: &Path) -> Option<u64> {
    read(path)?.parse::<u64>().ok()?.checked_mul(512)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device(files: &[(&str, &str)]) -> (tempfile::TempDir, Sysfs) {
        let root = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = root.path().join("block/nbd1").join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        let sysfs = Sysfs::under(root.path(), 1);
        (root, sysfs)
    }

    #[test]
    fn partitions_are_found_in_order_and_nothing_else_is() {
        let (_root, sysfs) = device(&[
            ("size", "4096\n"),
            ("nbd1p10/start", "64\n"),
            ("nbd1p10/size", "8\n"),
            ("nbd1p2/start", "32\n"),
            ("nbd1p2/size", "16\n"),
            ("nbd1p3/start", "going away"),
            ("nbd10p1/start", "1"),
            ("nbd10p1/size", "1"),
            ("queue/scheduler", ""),
        ]);
        assert_eq!(sysfs.size(), Some(4096 * 512));
        let path = |name: &str| Path::new("/dev").join(name);
        assert_eq!(
            sysfs.partitions().unwrap(),
            [
                Partition { number: 2, path: path("nbd1p2"), start: 32 * 512, size: 16 * 512 },
                Partition { number: 10, path: path("nbd1p10"), start: 64 * 512, size: 8 * 512 },
            ]
        );
    }

    #[test]
    fn the_queue_is_never_set_beyond_what_the_driver_takes() {
        for (most, expected) in [("32768\n", "1024"), ("128\n", "128")] {
            let (_root, sysfs) = device(&[("queue/max_hw_sectors_kb", most)]);
            sysfs.tune().unwrap();
            assert_eq!(read(&sysfs.block.join("queue/max_sectors_kb")).unwrap(), expected);
            assert_eq!(read(&sysfs.block.join("queue/scheduler")).unwrap(), "none");
        }
    }

    #[test]
    fn a_device_that_is_not_connected_has_no_pid() {
        let (_root, sysfs) = device(&[("size", "0")]);
        assert_eq!((sysfs.pid(), sysfs.size()), (None, Some(0)));
    }
}
