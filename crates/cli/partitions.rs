//! The partitions of a device, as the kernel sees them.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use crate::size;

/// One partition.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Partition {
    number: u32,
    name: String,
    /// In bytes, like `size`.
    start: u64,
    size: u64,
}

/// The partitions of a device such as `ublkb0`, in the order of their numbers.
pub(crate) fn of(device_name: &str) -> Vec<Partition> {
    of_dir(&Path::new("/sys/class/block").join(device_name))
}

fn of_dir(dir: &Path) -> Vec<Partition> {
    let read = |path: &Path| -> Option<u64> { fs::read_to_string(path).ok()?.trim_end().parse().ok() };
    let partition = |path: &Path| {
        Some(Partition {
            number: u32::try_from(read(&path.join("partition"))?).ok()?,
            name: path.file_name()?.to_str()?.to_owned(),
            // sysfs counts in units of 512 bytes whatever the logical block is.
            start: read(&path.join("start"))?.checked_mul(512)?,
            size: read(&path.join("size"))?.checked_mul(512)?,
        })
    };
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    let mut partitions: Vec<_> = entries.filter_map(|entry| partition(&entry.path())).collect();
    partitions.sort_by_key(|p| p.number);
    partitions
}

/// Has partx(8) tell the kernel of partitions where it found none by itself: kernels of containers and microVMs are often built
/// without any partition table's format. Answers with what the user should know.
pub(crate) fn find_missing(device: &Path) -> Option<String> {
    let name = device.file_name()?.to_str()?;
    if of(name).is_empty() {
        match Command::new("partx").arg("--add").arg(device).stdin(Stdio::null()).output() {
            Ok(output) if output.status.success() => tracing::info!("partx --add {}", device.display()),
            // No partition table, mostly.
            Ok(output) => tracing::debug!("partx: {}", String::from_utf8_lossy(&output.stderr).trim_end()),
            Err(e) => tracing::debug!("partx: {e}"),
        }
    }
    let without_node =
        of(name).into_iter().map(|p| format!("/dev/{}", p.name)).find(|node| !Path::new(node).exists())?;
    Some(format!("{without_node} is not there, nor are other partitions' nodes perhaps: is devtmpfs mounted on /dev?"))
}

/// A table for people; empty if there are no partitions.
pub(crate) fn table(partitions: &[Partition]) -> String {
    let mut table = crate::table::Table::new(["PARTITION", "START", "SIZE"]);
    for p in partitions {
        table.row([format!("/dev/{}", p.name), size::human(p.start), size::human(p.size)]);
    }
    table.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn partitions_come_in_the_order_of_their_numbers_and_in_bytes() {
        let temp = tempfile::tempdir().unwrap();
        for (name, number, start, size) in [("x0p10", 10, 4096, 8), ("x0p2", 2, 2048, 2048)] {
            let dir = temp.path().join(name);
            fs::create_dir(&dir).unwrap();
            for (file, value) in [("partition", number), ("start", start), ("size", size)] {
                fs::write(dir.join(file), format!("{value}\n")).unwrap();
            }
        }
        fs::create_dir(temp.path().join("queue")).unwrap();
        let found = of_dir(temp.path());
        assert_eq!(found.iter().map(|p| p.name.as_str()).collect::<Vec<_>>(), ["x0p2", "x0p10"]);
        assert_eq!((found[0].start, found[0].size), (1 << 20, 1 << 20));
        assert!(table(&found).contains("/dev/x0p2"));
        assert_eq!(table(&[]), "");
    }
}
