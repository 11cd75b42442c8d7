//! The host fails: a disk with bad sectors, files that somebody cuts or replaces. It is said, and nothing is made up.

use std::process::Output;

use crate::lab::{Device, Lab, assert_nothing_left, listed, text, wait_until};

/// A host file system at `host`, on a disk of which parts can be made bad.
pub(crate) struct Host<'a> {
    lab: &'a Lab,
    disk: String,
    sectors: u64,
}

const SECTOR: u64 = 512;

impl<'a> Host<'a> {
    pub(crate) fn new(lab: &'a Lab) -> Option<Self> {
        if !lab.has_device_mapper("error") {
            return None;
        }
        lab.allow_errors();
        lab.sh("mkdir host; truncate -s 256M host.img; mkfs.ext4 -q -b 4096 host.img");
        let disk = lab.sh("losetup --find --show host.img");
        let sectors = lab.sh(&format!("blockdev --getsz {disk}")).parse().unwrap();
        lab.sh(&format!(
            "dmsetup create vdisk-host --table '0 {sectors} linear {disk} 0'; mount /dev/mapper/vdisk-host host"
        ));
        Some(Self { lab, disk, sectors })
    }

    /// Makes the sectors bad that hold these bytes of a file, which has them already; none: makes all good again.
    pub(crate) fn break_at(&self, file: &str, from: u64, len: u64) {
        let bad = if len == 0 { Vec::new() } else { self.places(file, from, len) };
        let mut table = String::new();
        let mut at = 0;
        for (start, end) in bad.into_iter().chain([(self.sectors, self.sectors)]) {
            if at < start {
                table += &format!("{at} {} linear {} {at}\n", start - at, self.disk);
            }
            if start < end {
                table += &format!("{start} {} error\n", end - start);
            }
            at = end;
        }
        self.lab.sh(&format!(
            "printf '%s' '{table}' | dmsetup load vdisk-host; dmsetup suspend --nolockfs vdisk-host; dmsetup resume vdisk-host"
        ));
    }

    pub(crate) fn mend(&self) {
        self.break_at("", 0, 0);
    }

    /// Sectors of the disk, in order: (start, end).
    fn places(&self, file: &str, from: u64, len: u64) -> Vec<(u64, u64)> {
        let (from, end) = (from / SECTOR, (from + len) / SECTOR);
        let extents = self.lab.sh(&format!("sync {file}; filefrag -b512 -v {file}"));
        let mut places = Vec::new();
        for line in extents.lines() {
            // "   0:        0..      63:      34816..     34879:     64:  last"
            let numbers: Vec<u64> = line.split(['.', ':', ' ']).filter_map(|word| word.parse().ok()).collect();
            if let ([_, first, last, physical, ..], true) = (&numbers[..], line.contains("..")) {
                let (start, stop) = (from.max(*first), end.min(last + 1));
                if start < stop {
                    places.push((physical + start - first, physical + stop - first));
                }
            }
        }
        let found: u64 = places.iter().map(|(start, end)| end - start).sum();
        assert_eq!(found, end - from, "the host has not all of it: {extents}");
        places.sort_unstable();
        places
    }

    pub(crate) fn end(self) {
        self.mend();
        self.lab.sh(&format!("umount host; dmsetup remove vdisk-host; losetup -d {}", self.disk));
    }
}

/// What `vdisk list` says of the only device.
fn state(lab: &Lab) -> (String, String) {
    let list = listed(lab);
    let word = |name| list[0][name].as_str().unwrap_or_default().to_owned();
    (word("state"), word("error"))
}

impl Lab {
    /// Reads so many KiB of a device at one of its MiB, around its page cache.
    fn read_at(&self, device: &Device<'_>, mib: u64, kib: u64) -> Output {
        self.try_sh(&format!(
            "dd if={} bs={kib}k count=1 iflag=direct,skip_bytes skip={} status=none",
            device.path,
            mib << 20
        ))
    }

    /// Writes them, from the file `data`, and flushes if that is wanted.
    pub(crate) fn write_at(&self, device: &Device<'_>, mib: u64, kib: u64, flush: bool) -> Output {
        let sync = if flush { ",fsync" } else { "" };
        self.try_sh(&format!(
            "dd if=data of={} bs={kib}k count=1 oflag=direct,seek_bytes conv=notrunc{sync} seek={} status=none",
            device.path,
            mib << 20
        ))
    }

    /// Detaches a poisoned device: it goes, and it is said that the image could not be closed.
    fn detach_poisoned(&self, device: Device<'_>, why: &str) {
        let output = self.vdisk(&format!("detach {}", device.path));
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert!(said.contains("the image could not be closed") && said.contains(why), "{said}");
        assert_eq!(said.lines().count(), 1, "{said}");
        std::mem::forget(device);
        self.remove_log_of(&said);
        assert_nothing_left(self);
    }

    /// The log of a server that failed stays, for the user whom `detach` tells of it.
    fn remove_log_of(&self, said: &str) {
        let log = said.trim_end().rsplit_once("its log: ").and_then(|(_, log)| log.strip_suffix(')'));
        self.sh(&format!("rm {}", log.expect(said)));
    }

    /// Where the image has a byte of the disk.
    pub(crate) fn offset_of(&self, image: &str, at: u64) -> u64 {
        let map: Vec<serde_json::Value> =
            serde_json::from_str(&self.sh(&format!("$vdisk map --json {image}"))).unwrap();
        let number = |run: &serde_json::Value, name: &str| run[name].as_u64().unwrap();
        let run =
            map.iter().find(|run| number(run, "start") <= at && at < number(run, "start") + number(run, "length"));
        let run = run.unwrap();
        number(run, "offset") + at - number(run, "start")
    }
}

#[test]
fn bad_sectors_under_data_fail_its_reads_and_writes_and_nothing_else() {
    let lab = Lab::new();
    let Some(host) = Host::new(&lab) else { return };
    lab.vmdk("host/disk.vmdk", "64M");
    lab.sh("head -c 1048576 /dev/urandom > data");
    // Around the page cache, whatever the transport does by itself: else it is the flush that fails.
    let device = lab.attach("--direct-io on host/disk.vmdk");
    assert!(lab.write_at(&device, 0, 1024, true).status.success());
    host.break_at("host/disk.vmdk", lab.offset_of("host/disk.vmdk", 0), 65536);
    assert!(!lab.read_at(&device, 0, 64).status.success(), "bad sectors were read");
    assert!(!lab.write_at(&device, 0, 64, false).status.success(), "bad sectors were written");
    assert!(lab.write_at(&device, 8, 1024, true).status.success());
    assert_eq!(state(&lab), ("live".into(), String::new()));
    host.mend();
    assert!(lab.write_at(&device, 0, 64, true).status.success());
    for mib in [0, 8] {
        lab.sh(&format!("dd if={} bs=1M count=1 iflag=direct skip={mib} | cmp - data", device.path));
    }
    device.detach();
    lab.sh("$vdisk check host/disk.vmdk");
    host.end();
}

#[test]
fn a_sync_that_fails_poisons_the_image_and_list_and_detach_say_so() {
    let lab = Lab::new();
    let Some(host) = Host::new(&lab) else { return };
    lab.vmdk("host/disk.vmdk", "64M");
    lab.sh("head -c 1048576 /dev/urandom > data");
    // Through the page cache of the image: the host takes the data, and fails when it has to keep it.
    let device = lab.attach("--direct-io off host/disk.vmdk");
    assert!(lab.write_at(&device, 0, 1024, true).status.success());
    host.break_at("host/disk.vmdk", lab.offset_of("host/disk.vmdk", 0), 65536);
    assert!(lab.write_at(&device, 0, 64, false).status.success());
    assert!(!lab.write_at(&device, 8, 64, true).status.success(), "a flush of bad sectors succeeded");
    wait_until("list says poisoned", || state(&lab).0 == "poisoned");
    let (_, error) = state(&lab);
    assert!(error.contains("sync ") && error.contains("disk.vmdk") && error.contains("Input/output error"), "{error}");
    assert!(lab.sh("$vdisk list").contains(" poisoned "));
    // Another sync would succeed: the host has forgotten. It must not be believed.
    host.mend();
    assert!(!lab.write_at(&device, 4, 64, false).status.success(), "a poisoned image was written");
    let read = lab.read_at(&device, 0, 1024);
    assert!(read.status.success() && read.stdout[65536..] == std::fs::read(lab.path().join("data")).unwrap()[65536..]);
    lab.detach_poisoned(device, "Input/output error");
    // What was synced before is there, and the image goes on.
    let device = lab.attach("host/disk.vmdk");
    let read = lab.read_at(&device, 0, 1024);
    assert!(read.stdout[65536..] == std::fs::read(lab.path().join("data")).unwrap()[65536..]);
    assert!(lab.write_at(&device, 4, 1024, true).status.success());
    device.detach();
    lab.sh("$vdisk check host/disk.vmdk");
    host.end();
}

#[test]
fn bad_sectors_under_a_grain_table_are_an_error_and_never_zeroes() {
    let lab = Lab::new();
    let Some(host) = Host::new(&lab) else { return };
    lab.vmdk("host/disk.vmdk", "1G");
    lab.sh("head -c 1048576 /dev/urandom > data");
    let device = lab.attach("host/disk.vmdk");
    for mib in [0, 640] {
        assert!(lab.write_at(&device, mib, 1024, true).status.success());
    }
    device.detach();
    // Grain table 20, by the directory: no other sector of its block is read when the image is opened.
    let word = |at: u64, bytes: u32| {
        lab.sh(&format!("od -An -tu{bytes} -j{at} -N{bytes} host/disk.vmdk")).trim().parse::<u64>().unwrap()
    };
    let table = word(word(56, 8) * SECTOR + 20 * 4, 4) * SECTOR;
    let block = table / 4096 * 4096;
    host.break_at("host/disk.vmdk", block, 4096);
    lab.sh("echo 3 > /proc/sys/vm/drop_caches");
    let device = lab.attach("host/disk.vmdk");
    assert!(!lab.read_at(&device, 640, 64).status.success(), "what no table says was read");
    assert!(!lab.write_at(&device, 640, 64, false).status.success());
    let first = lab.read_at(&device, 0, 1024);
    assert!(first.status.success() && first.stdout == std::fs::read(lab.path().join("data")).unwrap());
    assert_eq!(state(&lab).0, "live");
    host.mend();
    let other = lab.read_at(&device, 640, 1024);
    assert!(other.status.success() && other.stdout == std::fs::read(lab.path().join("data")).unwrap());
    assert!(lab.write_at(&device, 641, 64, true).status.success());
    // It is known now, and cannot be written: nobody knows any more what is durable.
    host.break_at("host/disk.vmdk", block, 4096);
    assert!(!lab.write_at(&device, 642, 64, true).status.success(), "a flush without its table succeeded");
    wait_until("list says poisoned", || state(&lab).0 == "poisoned");
    host.mend();
    lab.detach_poisoned(device, "Input/output error");
    let device = lab.attach("host/disk.vmdk");
    for mib in [0, 640] {
        assert!(lab.read_at(&device, mib, 1024).stdout == std::fs::read(lab.path().join("data")).unwrap());
    }
    assert!(lab.write_at(&device, 642, 64, true).status.success());
    device.detach();
    lab.sh("$vdisk check host/disk.vmdk");
    host.end();
}

/// What is written to a file that has no name any more would be gone when it is closed.
#[test]
fn an_image_that_another_file_was_renamed_over_takes_no_flush() {
    let lab = Lab::new();
    lab.allow_errors();
    lab.vmdk("disk.vmdk", "64M");
    lab.vmdk("other.vmdk", "64M");
    lab.sh("head -c 1048576 /dev/urandom > data; cp other.vmdk other");
    let device = lab.attach("disk.vmdk");
    assert!(lab.write_at(&device, 0, 1024, true).status.success());
    lab.sh("mv other.vmdk disk.vmdk");
    assert!(!lab.write_at(&device, 8, 1024, true).status.success(), "a flush to a file without a name succeeded");
    wait_until("list says poisoned", || state(&lab).0 == "poisoned");
    assert!(state(&lab).1.contains("another one took its name"), "{:?}", state(&lab));
    let read = lab.read_at(&device, 0, 1024);
    assert!(read.stdout == std::fs::read(lab.path().join("data")).unwrap(), "it can still be saved");
    lab.detach_poisoned(device, "another one took its name");
    lab.sh("cmp disk.vmdk other; $vdisk check disk.vmdk");
}

#[test]
fn an_image_that_was_cut_is_an_error_and_never_zeroes() {
    let lab = Lab::new();
    lab.allow_errors();
    lab.vmdk("disk.vmdk", "64M");
    lab.sh("head -c 8388608 /dev/urandom > data");
    let device = lab.attach("disk.vmdk");
    // The MiB that begins first in the file, and last: requests of a large write may be placed in any order.
    let first_and_last = || {
        let mut places: Vec<(u64, u64)> = (0..8).map(|mib| (lab.offset_of("disk.vmdk", mib << 20), mib)).collect();
        places.sort_unstable();
        (places[0].1, places[7].1, places[7].0)
    };
    assert!(lab.write_at(&device, 0, 8192, true).status.success());
    let (first, last, offset) = first_and_last();
    lab.sh(&format!("truncate -s {} disk.vmdk", offset - 65536));
    // This makes the file long again.
    assert!(!lab.write_at(&device, last, 64, true).status.success(), "a flush of a file that was cut succeeded");
    wait_until("list says poisoned", || state(&lab).0 == "poisoned");
    assert!(state(&lab).1.contains("was cut"), "{:?}", state(&lab));
    for mib in [first, last] {
        assert!(!lab.read_at(&device, mib, 64).status.success(), "read at {mib} MiB of a file that was cut");
    }
    lab.detach_poisoned(device, "was cut");

    // Found by a read.
    lab.sh("rm disk.vmdk");
    lab.vmdk("disk.vmdk", "64M");
    let device = lab.attach("disk.vmdk");
    assert!(lab.write_at(&device, 0, 8192, true).status.success());
    let (_, last, offset) = first_and_last();
    lab.sh(&format!("truncate -s {offset} disk.vmdk"));
    assert!(!lab.read_at(&device, last, 64).status.success());
    assert!(!lab.write_at(&device, last, 64, false).status.success());
    assert_eq!(lab.sh("stat -c %s disk.vmdk").parse::<u64>().unwrap(), offset);
    lab.detach_poisoned(device, "was cut");
}
