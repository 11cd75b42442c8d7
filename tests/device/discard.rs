//! Discard and write zeroes: what the kernel sends, and that space comes back.

use crate::lab::{Lab, setting, transport};

/// What a file extended at once may be longer than what is in it.
const GROWTH: u64 = 16 << 20;

fn mib(default: u64) -> u64 {
    setting("VDISK_DISCARD_MIB").unwrap_or(default)
}

#[test]
fn fstrim_after_deleting_gives_the_space_back() {
    let lab = Lab::new();
    lab.sh("mkdir mnt");
    for (mkfs, check) in [("mkfs.ext4", "e2fsck -fn"), ("mkfs.xfs", "xfs_repair -n"), ("mkfs.btrfs", "btrfs check")] {
        lab.vmdk("disk.vmdk", "1G");
        let device = lab.attach("disk.vmdk");
        let disk = &device.path;
        lab.sh(&format!("{mkfs} -q {disk}; mount {disk} mnt"));
        let empty = lab.space("disk.vmdk");
        let mib = mib(200);
        lab.sh(&format!("dd if=/dev/urandom of=mnt/file bs=1M count={mib} conv=fsync"));
        let full = lab.space("disk.vmdk");
        assert!(full > empty + (mib << 20) / 20 * 19, "{mkfs}: {empty} {full}");
        // Mounted anew: what was freed a moment ago may still be busy.
        lab.sh(&format!("rm mnt/file; umount mnt; mount {disk} mnt; fstrim -v mnt; umount mnt"));
        let trimmed = lab.space("disk.vmdk");
        println!("{mkfs}: {empty} bytes, with {mib} MiB written {full}, trimmed {trimmed}");
        assert!(trimmed < full / 4, "{mkfs}: {full} bytes became {trimmed} only");
        device.detach();
        let checked = lab.sh("qemu-img check disk.vmdk");
        assert!(checked.contains("No errors"), "{mkfs}: {checked}");
        let device = lab.attach("-r disk.vmdk");
        lab.sh(&format!("{check} {}", device.path));
        device.detach();
        lab.sh("rm disk.vmdk");
    }
}

impl Lab {
    /// Writes and deletes and trims in an ext4 on an image: the image's space on the host and its length, after each round's writing.
    fn trim_in_rounds(&self, image: &str) -> Vec<(u64, u64)> {
        let device = self.attach(image);
        // Not lazily: the kernel would write the inode tables while the rounds go on, and over nbd before 6.12 as data.
        let mkfs = "mkfs.ext4 -q -E lazy_itable_init=0,lazy_journal_init=0";
        self.sh(&format!("mkdir -p mnt; {mkfs} {disk}; mount {disk} mnt", disk = device.path));
        let mut sizes = Vec::new();
        for round in 0..setting("VDISK_DISCARD_ROUNDS").unwrap_or(5) {
            let file = format!("mnt/file{round}");
            self.sh(&format!("dd if=/dev/urandom of={file} bs=1M count={} conv=fsync", mib(32)));
            let length = self.sh(&format!("stat -c %s {image}")).parse().unwrap();
            sizes.push((self.space(image), length));
            // What is freed is free when it is flushed; the file system's journal would do it in its own time.
            self.sh(&format!("rm {file}; sync -f mnt; fstrim mnt; sync {}", device.path));
        }
        self.sh("umount mnt");
        device.detach();
        println!("bytes on the host, length: {sizes:?}");
        self.sh(&format!("$vdisk check {image}"));
        sizes
    }
}

/// What a workload frees is used again: after the first rounds the image grows neither on the host nor in length.
#[test]
fn writing_deleting_and_trimming_in_rounds_does_not_grow_the_image() {
    let lab = Lab::new();
    lab.vmdk("disk.vmdk", "2G");
    let sizes = lab.trim_in_rounds("disk.vmdk");
    let peak = |of: &[(u64, u64)], which: fn(&(u64, u64)) -> u64| of.iter().map(which).max().unwrap();
    let (first, later) = sizes.split_at(3);
    let (space, length) = (peak(first, |s| s.0), peak(first, |s| s.1));
    assert!(peak(later, |s| s.0) <= space / 10 * 11, "bytes on the host: {sizes:?}");
    assert!(peak(later, |s| s.1) <= (length / 10 * 11).next_multiple_of(GROWTH), "length: {sizes:?}");
}

/// A host that cannot punch holes gets no space back, but the image does not grow for ever.
#[test]
fn where_no_hole_can_be_punched_what_was_freed_is_used_again() {
    let lab = Lab::new();
    if !lab.mounts("vfat") {
        println!("skipped: this kernel has no vfat");
        return;
    }
    lab.sh("mkdir host; truncate -s 2G host.img; mkfs.vfat host.img; mount -o loop host.img host");
    lab.vmdk("host/disk.vmdk", "2G");
    let sizes = lab.trim_in_rounds("host/disk.vmdk");
    let (first, later) = sizes.split_at(3);
    let length = first.iter().map(|s| s.1).max().unwrap();
    assert!(later.iter().all(|s| s.1 <= (length / 10 * 11).next_multiple_of(GROWTH)), "length: {sizes:?}");
    lab.sh("umount host");
}

/// The request that one call makes, as the server saw it. The claims of kernel-notes/discard.md.
#[test]
fn each_way_to_discard_or_zero_arrives_as_the_notes_say() {
    let lab = Lab::new();
    lab.vmdk("disk.vmdk", "64M");
    lab.sh("echo 'operation not supported|unsupported' >> ${VDISK_VM_ALLOW:-/dev/null}");
    let device = lab.attach_traced("disk.vmdk");
    let disk = &device.path;
    let log = lab.sh("$vdisk list --json | sed -n 's/.*\"log\": *\"\\([^\"]*\\)\".*/\\1/p'");
    let kernel = lab.sh("uname -r | cut -d. -f1,2");
    println!("kernel {kernel}, {}:", transport());
    // Without the write-zeroes operation (nbd before 6.12) the kernel writes pages of zeroes.
    let zeroes_are_writes = lab.sh(&format!("cat /sys/block/{}/queue/write_zeroes_max_bytes", &disk[5..])) == "0";
    let mut seen = Vec::new();
    for (call, at) in [
        ("blkdiscard -f -o 1M -l 1M", "1M"),
        ("blkdiscard -f -z -o 2M -l 1M", "2M"),
        ("fallocate -z -o 3M -l 1M", "3M"),
        ("fallocate -p -o 4M -l 1M", "4M"),
        ("blkdiscard -f -s -o 5M -l 1M", "5M"),
    ] {
        lab.sh(&format!("dd if=/dev/urandom of={disk} bs=1M seek={} count=1 oflag=direct", &at[..1]));
        let before = lab.sh(&format!("wc -l < {log}")).parse::<usize>().unwrap();
        let did = lab.try_sh(&format!("{call} {disk}"));
        let requests = lab.sh(&format!(
            "tail -n +{} {log} | grep -oE 'op=(Discard|WriteZeroes|Write) .*' | sed -E 's/ *(offset|len)=[0-9]+//g' | sort | uniq -c || true",
            before + 1
        ));
        println!(
            "  {call}: {} -> {}",
            if did.status.success() { "ok" } else { "refused" },
            requests.replace('\n', "; ")
        );
        let zero = lab
            .try_sh(&format!("dd if={disk} bs=1M skip={} count=1 iflag=direct | cmp -n 1048576 - /dev/zero", &at[..1]));
        seen.push((did.status.success(), requests, zero.status.success()));
    }
    let says = |n: usize, what: &str| seen[n].1.contains(what);
    // Loop punches a hole for it as for write zeroes that may unmap: the server cannot tell them apart.
    let discard = if transport() == "fuse" { "op=WriteZeroes fua=false no_unmap=false" } else { "op=Discard" };
    assert!(seen[0].0 && says(0, discard) && seen[0].2, "BLKDISCARD: {seen:?}");
    if zeroes_are_writes {
        assert!(says(1, "Write ") && says(2, "Write "), "{seen:?}");
    } else {
        assert!(says(1, "WriteZeroes") && says(1, "no_unmap=true"), "BLKZEROOUT: {seen:?}");
        assert!(says(2, "WriteZeroes") && says(2, "no_unmap=true"), "fallocate -z: {seen:?}");
        assert!(says(3, "WriteZeroes") && says(3, "no_unmap=false"), "fallocate -p: {seen:?}");
    }
    assert!(seen[1].2 && seen[2].2, "zeroout must read as zeroes: {seen:?}");
    assert!(!seen[4].0, "BLKSECDISCARD is not offered: {seen:?}");
    device.detach();
}
