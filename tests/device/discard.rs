//! Discard and write zeroes: what the kernel sends, and that space comes back.

use crate::lab::{Lab, transport};

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
        lab.sh("dd if=/dev/urandom of=mnt/file bs=1M count=200 conv=fsync");
        let full = lab.space("disk.vmdk");
        assert!(full > empty + (190 << 20), "{mkfs}: {empty} {full}");
        // Mounted anew: what was freed a moment ago may still be busy.
        lab.sh(&format!("rm mnt/file; umount mnt; mount {disk} mnt; fstrim -v mnt; umount mnt"));
        let trimmed = lab.space("disk.vmdk");
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
