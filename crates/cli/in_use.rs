//! Who uses a block device: mounts of any namespace, devices stacked upon it, swap, processes that hold it open.

use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, FileType, StatxFlags, statx};

use crate::process;
use crate::state::State;

/// A device with its partitions.
#[derive(Default)]
pub(crate) struct Tree {
    /// Names and numbers; the whole device comes first.
    nodes: Vec<(String, Number)>,
}

type Number = (u32, u32);

impl Tree {
    /// Reads from sysfs what a device such as `ublkb0` consists of now. Empty if there is no such device.
    pub(crate) fn of(name: &str) -> Self {
        let dir = Path::new("/sys/class/block").join(name);
        let mut partitions = Vec::new();
        for entry in fs::read_dir(&dir).into_iter().flatten().flatten() {
            let path = entry.path();
            if let (true, Some(number)) = (path.join("partition").exists(), number(&path)) {
                partitions.push((entry.file_name().to_string_lossy().into_owned(), number));
            }
        }
        partitions.sort();
        let whole = number(&dir).map(|n| (name.to_owned(), n));
        Self { nodes: whole.into_iter().chain(partitions).collect() }
    }

    /// What is there of a device in the books. If it is gone, what has its name by now is another's.
    pub(crate) fn of_state(state: &State) -> Self {
        if state.device_gone { Self::default() } else { Self::of(state.device_name()) }
    }

    fn name_of(&self, number: Number) -> Option<&str> {
        self.nodes.iter().find(|(_, n)| *n == number).map(|(name, _)| name.as_str())
    }

    fn name_of_path(&self, path: &str) -> Option<&str> {
        let name = path.strip_prefix("/dev/")?;
        self.nodes.iter().find(|(n, _)| n == name).map(|(name, _)| name.as_str())
    }

    /// Uses that last: mounts, holders (dm, md, ...), loop devices, swap. Each is a text for a message.
    pub(crate) fn lasting_users(&self) -> Vec<String> {
        let mut users = self.mounts();
        for (name, _) in &self.nodes {
            let holders = Path::new("/sys/class/block").join(name).join("holders");
            for holder in fs::read_dir(holders).into_iter().flatten().flatten() {
                users.push(format!("{name} is held by {}", holder.file_name().to_string_lossy()));
            }
        }
        users.extend(self.loops(Path::new("/sys/block")));
        let swaps = fs::read_to_string("/proc/swaps").unwrap_or_default();
        for file in swaps.lines().skip(1).filter_map(|line| line.split_ascii_whitespace().next()) {
            let file = unescape(file);
            if let Some(name) = rdev(Path::new(&file)).and_then(|n| self.name_of(n)) {
                users.push(format!("{name} is swap"));
            }
        }
        users
    }

    /// Loop devices: the kernel counts them neither among the holders nor as an exclusive opener.
    fn loops(&self, sys_block: &Path) -> Vec<String> {
        let mut users = Vec::new();
        for entry in fs::read_dir(sys_block).into_iter().flatten().flatten() {
            let Ok(backing) = fs::read_to_string(entry.path().join("loop/backing_file")) else { continue };
            let backing = backing.trim_end_matches('\n');
            let node = rdev(Path::new(backing)).and_then(|n| self.name_of(n));
            if let Some(name) = node.or_else(|| self.name_of_path(backing)) {
                users.push(format!("{name} is held by {}", entry.file_name().to_string_lossy()));
            }
        }
        users
    }

    /// Mounts in every mount namespace, each place once.
    fn mounts(&self) -> Vec<String> {
        let mut namespaces = HashSet::new();
        let mut users = Vec::new();
        let mut places = HashSet::new();
        // Our own first: its places need no explanation.
        for pid in std::iter::once(std::process::id()).chain(pids()) {
            let process = PathBuf::from(format!("/proc/{pid}"));
            let Ok(namespace) = fs::read_link(process.join("ns/mnt")) else { continue };
            let ours = namespaces.is_empty();
            if !namespaces.insert(namespace) {
                continue;
            }
            for mount in fs::read_to_string(process.join("mountinfo")).unwrap_or_default().lines().filter_map(parse) {
                let name = self.name_of(mount.number).or_else(|| self.name_of_path(&mount.source));
                if let Some(name) = name.filter(|_| places.insert(mount.place.clone())) {
                    users.push(match ours {
                        true => format!("{name} is mounted on {}", mount.place),
                        false => format!("{name} is mounted on {} seen by {}", mount.place, describe(pid)),
                    });
                }
            }
        }
        users
    }

    /// Processes other than this one and `server` that have the device or a partition open.
    pub(crate) fn openers(&self, server: u32) -> Vec<String> {
        let mut users = Vec::new();
        for pid in pids().filter(|pid| *pid != server && *pid != std::process::id()) {
            let fds = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
            if let Some(name) = fds.filter_map(|fd| rdev(&fd.path())).find_map(|n| self.name_of(n)) {
                users.push(format!("{name} is open in {}", describe(pid)));
            }
        }
        users
    }
}

fn describe(pid: u32) -> String {
    format!("{} (pid {pid})", process::name(pid))
}

fn pids() -> impl Iterator<Item = u32> {
    fs::read_dir("/proc").into_iter().flatten().flatten().filter_map(|e| e.file_name().to_str()?.parse().ok())
}

fn number(sysfs: &Path) -> Option<Number> {
    let text = fs::read_to_string(sysfs.join("dev")).ok()?;
    parse_number(text.trim_end())
}

fn parse_number(text: &str) -> Option<Number> {
    let (major, minor) = text.split_once(':')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

/// The number of a block device's node. Asks no network file system for it, which could hang.
pub(crate) fn rdev(path: &Path) -> Option<Number> {
    let stat = statx(CWD, path, AtFlags::STATX_DONT_SYNC, StatxFlags::TYPE).ok()?;
    let block = FileType::from_raw_mode(stat.stx_mode.into()) == FileType::BlockDevice;
    block.then_some((stat.stx_rdev_major, stat.stx_rdev_minor))
}

/// A line of mountinfo.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Mount {
    number: Number,
    pub(crate) place: String,
    /// Names the device where `number` does not (btrfs).
    source: String,
}

/// Parses a line of /proc/PID/mountinfo, see proc(5).
pub(crate) fn parse(line: &str) -> Option<Mount> {
    let (before, after) = line.split_once(" - ")?;
    let mut fields = before.split(' ').skip(2);
    let number = parse_number(fields.next()?)?;
    let place = unescape(fields.nth(1)?);
    let source = unescape(after.split(' ').nth(1)?);
    Some(Mount { number, place, source })
}

/// Undoes the kernel's octal escapes: `\040` is a space. Bytes that are no UTF-8 then are replaced.
fn unescape(field: &str) -> String {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field.as_bytes();
    while let Some((&first, tail)) = rest.split_first() {
        let octal = (first == b'\\').then(|| tail.get(..3)).flatten();
        let code = octal.and_then(|o| str::from_utf8(o).ok()).and_then(|o| u8::from_str_radix(o, 8).ok());
        match code {
            Some(code) => {
                bytes.push(code);
                rest = &tail[3..];
            }
            None => {
                bytes.push(first);
                rest = tail;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_a_mount_with_escaped_names_and_optional_fields() {
        let line =
            r"36 35 259:2 / /mnt/a\040b\134c rw,noatime master:1 shared:2 - ext4 /dev/ublkb0p1 rw,errors=continue";
        let mount = Mount { number: (259, 2), place: r"/mnt/a b\c".into(), source: "/dev/ublkb0p1".into() };
        assert_eq!(parse(line), Some(mount));
    }

    #[test]
    fn reads_a_mount_without_optional_fields_and_with_an_anonymous_number() {
        let mount = parse("40 35 0:45 /@ /data rw - btrfs /dev/nbd0 rw").unwrap();
        assert_eq!((mount.number, mount.source.as_str()), ((0, 45), "/dev/nbd0"));
    }

    #[test]
    fn a_line_that_is_no_mount_is_none() {
        for line in ["", "36 35", "36 35 259:2 / /mnt rw", "36 35 259 / /mnt rw - ext4 /dev/x rw"] {
            assert_eq!(parse(line), None, "{line}");
        }
    }

    #[test]
    fn unescapes_newlines_and_leaves_stray_backslashes() {
        assert_eq!(unescape(r"a\012b\011\04"), "a\nb\t\\04");
        assert_eq!(unescape(r"\777"), r"\777");
    }

    #[test]
    fn finds_a_device_by_its_source_when_the_number_is_anonymous() {
        let tree = Tree { nodes: vec![("nbd0".into(), (43, 0)), ("nbd0p1".into(), (43, 1))] };
        assert_eq!(tree.name_of_path("/dev/nbd0p1"), Some("nbd0p1"));
        assert_eq!(tree.name_of_path("/dev/nbd0p2"), None);
        assert_eq!(tree.name_of((43, 0)), Some("nbd0"));
    }

    #[test]
    fn names_loop_devices_on_the_device_or_its_partitions() {
        let temp = tempfile::tempdir().unwrap();
        for (name, backing) in [("loop0", "/dev/nbd0p1\n"), ("loop1", "/tmp/nbd0\n"), ("loop2", "/dev/nbd00\n")] {
            fs::create_dir_all(temp.path().join(name).join("loop")).unwrap();
            fs::write(temp.path().join(name).join("loop/backing_file"), backing).unwrap();
        }
        fs::create_dir(temp.path().join("loop3")).unwrap();
        let tree = Tree { nodes: vec![("nbd0".into(), (43, 0)), ("nbd0p1".into(), (43, 1))] };
        assert_eq!(tree.loops(temp.path()), ["nbd0p1 is held by loop0"]);
    }

    #[test]
    fn a_device_that_is_not_there_has_no_users() {
        let tree = Tree::of("vdisk-none0");
        assert!(tree.nodes.is_empty());
        assert!(tree.lasting_users().is_empty() && tree.openers(0).is_empty());
    }
}
