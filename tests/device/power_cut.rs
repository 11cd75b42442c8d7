//! The power goes, and nothing that was synced is lost.

use std::collections::BTreeMap;
use std::fs::{self, OpenOptions};
use std::io::Write;
use std::path::Path;
use std::process::Command;

use crate::lab::{Lab, Random, assert_nothing_left, setting};
use crate::log_writes::Log;

/// On a host file system whose disk logs every write, an image is attached and a file system on the device used: files are written,
/// synced, overwritten, deleted and trimmed. After a power cut at any point of that log, the image holds every file that was synced
/// before the point.
///
/// `VDISK_POWER_CUTS` says how many points, `VDISK_SEED` repeats a run.
#[test]
fn after_a_power_cut_every_file_that_was_synced_has_its_content() {
    let lab = Lab::new();
    if !lab.has_device_mapper("log-writes") {
        return;
    }
    let cuts = setting("VDISK_POWER_CUTS").unwrap_or(4);
    let mut random = Random::seeded();
    lab.sh("mkdir host mnt; truncate -s 512M before.img; mkfs.ext4 -q before.img; mount -o loop before.img host
            qemu-img create -q -f vmdk host/disk.vmdk 512M; umount host");
    lab.sh("cp --sparse=always before.img live.img; truncate -s 2G log.img");
    let disk = lab.sh("losetup --find --show live.img");
    let log = lab.sh("losetup --find --show log.img");
    lab.sh(&format!("dmsetup create vdisk-log --table \"0 $(blockdev --getsz {disk}) log-writes {disk} {log}\""));
    lab.sh("mount /dev/mapper/vdisk-log host");
    use_a_file_system(&lab, &mut random);
    lab.sh(&format!("umount host; dmsetup remove vdisk-log; losetup -d {disk} {log}"));

    let log = Log::read(&lab.path().join("log.img")).unwrap();
    let synced: Vec<usize> =
        (1..).zip(&log.entries).filter(|(_, e)| is_sync(e.mark.as_deref())).map(|(n, _)| n).collect();
    println!("{} entries, {} files synced", log.entries.len(), synced.len());
    assert!(synced.len() > 9 && log.marks(log.entries.len()).last() == Some("dm-log-writes-end"), "the log is cut off");
    let mut checked = 0;
    for n in 0..cuts {
        // Every other point is the hardest one: right after a sync.
        let point = match n % 2 {
            0 => synced[random.below(synced.len() as u64) as usize],
            _ => random.below(log.entries.len() as u64 + 1) as usize,
        };
        // None of what was not flushed, all, or some.
        let odds = [0, 1, 2, 4][random.below(4) as usize];
        println!("cut {n}: after entry {point}, {odds} of 4 unflushed sectors kept");
        lab.sh("cp --sparse=auto before.img cut.img");
        let cut = OpenOptions::new().write(true).open(lab.path().join("cut.img")).unwrap();
        log.replay(&cut, point, || random.below(4) < odds).unwrap();
        drop(cut);
        checked += boot(&lab, &expected(log.marks(point)));
    }
    println!("{checked} files in {cuts} cuts have their content");
    assert_nothing_left(&lab);
}

/// A file that was synced: what is in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Content {
    seed: u64,
    len: u64,
}

impl Content {
    fn bytes(self) -> Vec<u8> {
        let mut random = Random(self.seed);
        let words = std::iter::repeat_with(|| random.next().to_le_bytes());
        words.flatten().take(self.len as usize).collect()
    }
}

/// Marks the log: `made` (the file system), `synced:NAME:SEED:LEN`, and `change:NAME` before the file is overwritten or removed.
fn mark(text: &str) {
    let marked = Command::new("dmsetup").args(["message", "vdisk-log", "0", "mark", text]).status().unwrap();
    assert!(marked.success(), "mark {text}");
}

fn is_sync(mark: Option<&str>) -> bool {
    mark.is_some_and(|text| text.starts_with("synced:"))
}

/// What must be there after these marks; `None`: there is no file system yet.
fn expected<'a>(marks: impl Iterator<Item = &'a str>) -> Option<BTreeMap<String, Content>> {
    let mut files = None;
    for text in marks {
        let words: Vec<_> = text.split(':').collect();
        match (words[..].split_first().unwrap(), &mut files) {
            ((&"made", []), _) => files = Some(BTreeMap::new()),
            ((&"synced", [name, seed, len]), Some(files)) => {
                files.insert((*name).to_owned(), Content { seed: seed.parse().unwrap(), len: len.parse().unwrap() });
            }
            ((&"change", [name]), Some(files)) => drop(files.remove(*name)),
            ((&"dm-log-writes-end", []), _) => {}
            other => panic!("{other:?}"),
        }
    }
    files
}

/// Two sessions, so that closing and opening the image are in the log too.
fn use_a_file_system(lab: &Lab, random: &mut Random) {
    let mnt = lab.path().join("mnt");
    for session in 0..2 {
        let device = lab.attach("host/disk.vmdk");
        if session == 0 {
            lab.sh(&format!("mkfs.ext4 -q {}; sync {}", device.path, device.path));
            mark("made");
        }
        lab.sh(&format!("mount {} mnt", device.path));
        for n in 0..16 {
            // Meanwhile somebody writes who syncs nothing.
            let mut noise = Command::new("dd")
                .args(["if=/dev/urandom", "bs=68k", "count=6", "oflag=direct", "conv=notrunc", "status=none"])
                .args([format!("of=noise{}", random.below(4)), format!("seek={}", random.below(40))])
                .current_dir(&mnt)
                .spawn()
                .unwrap();
            let name = format!("f{}", random.below(12));
            mark(&format!("change:{name}"));
            match random.below(5) {
                0 => drop(fs::remove_file(mnt.join(&name))),
                1 => write_and_sync(&mnt, &name, random, true),
                _ => write_and_sync(&mnt, &name, random, false),
            }
            assert!(noise.wait().unwrap().success());
            if n % 6 == 5 {
                lab.sh("rm -f mnt/noise1 mnt/noise2; fstrim mnt");
            }
        }
        lab.sh("umount mnt");
        device.detach();
    }
}

/// Writes a file anew, or a new file in its place, and syncs it.
fn write_and_sync(directory: &Path, name: &str, random: &mut Random, anew: bool) {
    let most = [5000, 70_000, 1_500_000][random.below(3) as usize];
    let content = Content { seed: random.next(), len: random.below(most) };
    let path = directory.join(name);
    if anew {
        let _ = fs::remove_file(&path);
    }
    let mut file = OpenOptions::new().write(true).create(true).truncate(false).open(&path).unwrap();
    file.write_all(&content.bytes()).unwrap();
    file.set_len(content.len).unwrap();
    file.sync_all().unwrap();
    mark(&format!("synced:{name}:{}:{}", content.seed, content.len));
}

/// Mounts what the cut has left, looks at the image, and at the files on it. How many there were.
fn boot(lab: &Lab, expected: &Option<BTreeMap<String, Content>>) -> usize {
    // The ledgers are in memory.
    lab.sh("rm -rf /run/vdisk/ledgers; mount -o loop cut.img host");
    let check: serde_json::Value = serde_json::from_slice(&lab.vdisk("check --json host/disk.vmdk").stdout).unwrap();
    for error in check["errors"].as_array().unwrap() {
        assert!(["unclean", "copies_differ"].contains(&error["kind"].as_str().unwrap()), "{check:#}");
    }
    let device = lab.attach("host/disk.vmdk");
    // The image is written to in any case: else it would be left as it is.
    let count = expected.as_ref().map_or(0, BTreeMap::len);
    if let Some(files) = expected {
        lab.sh(&format!("mount {} mnt", device.path));
        for (name, content) in files {
            let found = fs::read(lab.path().join("mnt").join(name));
            let found = found.unwrap_or_else(|e| panic!("{name} was synced: {e}"));
            assert!(found == content.bytes(), "{name} was synced and has other content ({} bytes)", found.len());
        }
        lab.sh(&format!("umount mnt; e2fsck -fn {}", device.path));
    } else {
        lab.sh(&format!("dd if=/dev/urandom of={} bs=4k count=1 oflag=direct", device.path));
    }
    device.detach();
    lab.sh("$vdisk check host/disk.vmdk; umount host; rm cut.img");
    count
}
