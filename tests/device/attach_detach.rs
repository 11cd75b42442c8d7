//! The main job: attach, partition, make a file system, write, detach; others read the same bytes.

use crate::lab::{Lab, assert_nothing_left, listed, text, transport};

#[test]
fn a_partitioned_disk_lives_through_attach_and_detach() {
    let lab = Lab::new();
    // Of images whose servers were killed.
    let ledgers = || lab.sh("ls -A /run/vdisk/ledgers 2>/dev/null || true");
    let before = ledgers();
    lab.ext4_session();
    assert_eq!(ledgers(), before);
    assert!(lab.sh("qemu-img check disk.vmdk").contains("No errors"));
    let qemu = lab.qemu_sha256("disk.vmdk");
    let again = lab.attach("-r disk.vmdk");
    assert_eq!(lab.sha256(&again.path), qemu, "qemu-img and a fresh attach read other bytes");
    lab.sh(&format!("e2fsck -fn {}", again.part(1)));
    again.detach();
    assert_nothing_left(&lab);
}

/// A block device's server must not be what its users' memory is taken from. A container may forbid it, a VM does not.
#[test]
fn the_server_is_neither_swapped_out_nor_killed_for_its_memory() {
    if std::env::var_os("VDISK_VM").is_none() {
        println!("skipped: this may not be allowed here");
        return;
    }
    let lab = Lab::new();
    lab.vmdk("disk.vmdk", "64M");
    let device = lab.attach("disk.vmdk");
    let pid = device.pid();
    let of = |field: &str| -> u64 {
        lab.sh(&format!("awk '/^{field}:/ {{ print $2 }}' /proc/{pid}/status")).trim().parse().unwrap()
    };
    assert!(of("VmLck") >= of("VmRSS"), "{} of {} KiB are locked", of("VmLck"), of("VmRSS"));
    assert_eq!(lab.sh(&format!("cat /proc/{pid}/oom_score_adj")).trim(), "-1000");
    device.detach();
}

impl Lab {
    /// The session of the README: 40 MiB on ext4 in a GPT partition, and a refusal to detach while it is mounted.
    fn ext4_session(&self) {
        self.vmdk_of("512M");
        let device = self.attach("disk.vmdk");
        let (disk, part) = (&device.path, device.part(1));
        self.partition(disk, &format!("sgdisk -n 1:0:0 {disk}"));
        self.sh(&format!("test -b {part} && mkfs.ext4 -q {part}"));
        self.sh(&format!("mkdir mnt; mount {part} mnt; dd if=/dev/urandom of=mnt/file bs=1M count=40 conv=fsync"));
        let refused = self.vdisk(&format!("detach {disk}"));
        let said = text(&refused.stderr);
        assert_eq!(refused.status.code(), Some(1));
        assert!(said.contains(&*self.path().join("mnt").to_string_lossy()), "the mount point is named: {said}");
        assert_eq!(said.lines().count(), 1);
        self.sh("sha256sum < mnt/file > sum; umount mnt");
        device.detach();
        assert!(self.sh("od -An -tu1 -j72 -N1 disk.vmdk").trim() == "0", "marked as not closed");
        let device = self.attach("disk.vmdk");
        self.sh(&format!("mount {} mnt; sha256sum < mnt/file | cmp - sum; umount mnt", device.part(1)));
        device.detach();
    }

    fn vmdk_of(&self, size: &str) {
        self.vmdk("disk.vmdk", size);
    }
}

#[test]
fn the_transport_is_chosen_by_itself_and_said_when_it_is_not_the_first() {
    let lab = Lab::new();
    lab.vmdk("disk.vmdk", "64M");
    let device = lab.attach_as("disk.vmdk");
    let has = |module| lab.try_sh(&format!("modinfo {module}")).status.success();
    let (path, said) = (&device.path, &device.said);
    if has("ublk_drv") {
        assert!(path.starts_with("/dev/ublkb"), "{path}");
        assert_eq!(said, "");
    } else if has("nbd") {
        assert!(path.starts_with("/dev/nbd"), "{path}");
        assert!(said.contains("no ublk in this kernel") && said.contains("using nbd"), "{said}");
    } else {
        assert!(path.starts_with("/dev/loop"), "{path}");
        assert!(said.contains("no nbd in this kernel") && said.contains("using fuse"), "{said}");
    }
    device.detach();
    assert_nothing_left(&lab);
}

#[test]
fn detach_takes_the_image_for_the_device() {
    let lab = Lab::new();
    lab.vmdk("disk.vmdk", "64M");
    let device = lab.attach("disk.vmdk");
    let entry = &listed(&lab)[0];
    assert_eq!(entry["transport"], transport());
    assert_eq!(entry["state"], "live");
    assert_eq!(entry["size"], 64 << 20);
    assert_eq!(entry["read_only"], false);
    assert_eq!(entry["image"], *lab.path().join("disk.vmdk").to_string_lossy());
    lab.sh("$vdisk detach ./disk.vmdk");
    assert_nothing_left(&lab);
    drop(device);
}

#[test]
fn a_file_system_without_a_partition_table_mounts() {
    let lab = Lab::new();
    lab.sh("truncate -s 100M disk.img; mkfs.ext4 -q disk.img; mkdir mnt");
    let device = lab.attach("disk.img");
    lab.sh(&format!("mount {} mnt; cp -a /usr/share/doc/bash mnt/; umount mnt", device.path));
    device.detach();
    lab.sh("e2fsck -fn disk.img");
}

#[test]
fn mbr_partitions_and_other_file_systems_work() {
    let lab = Lab::new();
    lab.vmdk("disk.vmdk", "2G");
    let device = lab.attach("disk.vmdk");
    let disk = &device.path;
    lab.partition(disk, &format!("printf ',600M,83\\n,600M,83\\n,600M,c\\n' | sfdisk -q {disk}; mkdir mnt"));
    for (n, mkfs, check) in
        [(1, "mkfs.xfs -q", "xfs_repair -n"), (2, "mkfs.btrfs -q", "btrfs check"), (3, "mkfs.vfat", "fsck.vfat -n")]
    {
        let part = device.part(n);
        if mkfs == "mkfs.vfat" && !lab.mounts("vfat") {
            println!("this kernel does not mount vfat: mtools writes it");
            lab.sh(&format!(
                "{mkfs} {part}; dd if=/dev/urandom of=f bs=1M count=20; mcopy -i {part} f ::f; sync
                 mcopy -i {part} ::f - | cmp - f; {check} {part}"
            ));
            continue;
        }
        lab.sh(&format!(
            "{mkfs} {part}; mount {part} mnt; dd if=/dev/urandom of=mnt/f bs=1M count=20 conv=fsync; sha256sum < mnt/f > sum
             umount mnt; mount {part} mnt; sha256sum < mnt/f | cmp - sum; umount mnt; {check} {part}"
        ));
    }
    device.detach();
    assert!(lab.sh("qemu-img check disk.vmdk").contains("No errors"));
}

#[test]
fn a_read_only_attach_refuses_writes_and_leaves_the_image_as_it_was() {
    let lab = Lab::new();
    lab.vmdk("disk.vmdk", "64M");
    lab.sh("qemu-io -c 'write -P 7 1M 1M' disk.vmdk; chmod 444 disk.vmdk");
    let before = lab.sha256("disk.vmdk");
    let device = lab.attach("-r disk.vmdk");
    assert_eq!(lab.sh(&format!("blockdev --getro {}", device.path)), "1");
    assert!(!lab.try_sh(&format!("dd if=/dev/zero of={} bs=4k count=1 oflag=direct", device.path)).status.success());
    assert_eq!(lab.sha256(&device.path), lab.qemu_sha256("disk.vmdk"));
    device.detach();
    assert_eq!(lab.sha256("disk.vmdk"), before);
}

#[test]
fn sigterm_flushes_and_leaves_nothing() {
    let lab = Lab::new();
    lab.vmdk("disk.vmdk", "64M");
    let device = lab.attach("disk.vmdk");
    // Not flushed by the writer: the server has to do it.
    lab.sh(&format!("dd if=/dev/urandom of=data bs=1M count=8; dd if=data of={} bs=1M oflag=direct", device.path));
    let pid = device.pid();
    lab.sh(&format!("kill -TERM {pid}; timeout 60 tail --pid={pid} -f /dev/null"));
    assert_nothing_left(&lab);
    lab.sh("qemu-img check disk.vmdk; qemu-img convert -O raw disk.vmdk disk.raw; cmp -n 8388608 disk.raw data");
    drop(device);
}
