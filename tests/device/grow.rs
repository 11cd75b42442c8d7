//! An image that was made longer, and its device that follows while it is used.

use crate::lab::{Device, Lab, assert_nothing_left, listed, text, transport, wait_until};

impl Lab {
    /// `vdisk grow`; why not, on one line.
    fn not_grown(&self, what: &str) -> String {
        let output = self.vdisk(&format!("grow {what}"));
        let said = text(&output.stderr);
        assert!(!output.status.success() && output.stdout.is_empty(), "grow {what} did not fail");
        assert_eq!(said.lines().count(), 1, "{said}");
        assert!(said.starts_with(&format!("vdisk: grow {what}: ")), "{said}");
        said
    }

    /// Has the file system on a device take it all, mounted on `mnt`.
    fn resize(&self, device: &str) {
        // Some containers' root may not do that to a mounted one.
        self.sh(&format!(
            "resize2fs {device} || {{ [ -z \"${{VDISK_VM:-}}\" ] && umount mnt && e2fsck -fp {device} && resize2fs {device} && mount {device} mnt; }}"
        ));
    }

    /// As the kernel sees it.
    fn size_of(&self, disk: &str) -> u64 {
        self.sh(&format!("blockdev --getsize64 {disk}")).parse().unwrap()
    }
}

/// Whether the driver lets devices grow: ublk's since Linux 6.16. What it says if not is looked at here.
fn grows(lab: &Lab, disk: &str) -> bool {
    if transport() != "ublk" || std::env::var("VDISK_VM").is_ok_and(|series| series == "newest") {
        return true;
    }
    let before = lab.size_of(disk);
    let said = lab.not_grown(disk);
    assert!(said.contains("keeps the size that a device was made with (Linux 6.16 can change it)"), "{said}");
    assert_eq!(lab.size_of(disk), before);
    false
}

const MIB: u64 = 1 << 20;

#[test]
fn a_mounted_file_system_grows_with_its_raw_image() {
    let lab = Lab::new();
    lab.sh("truncate -s 64M disk.raw; mkfs.ext4 -q disk.raw; mkdir mnt");
    let device = lab.attach("disk.raw");
    let disk = &device.path;
    lab.sh(&format!("mount {disk} mnt; head -c 20M /dev/urandom >mnt/a; sha256sum <mnt/a >sum"));
    lab.sh("truncate -s 160M disk.raw");
    if !grows(&lab, &device.path) {
        lab.sh("umount mnt");
        device.detach();
        return;
    }
    let said = lab.sh(&format!("$vdisk grow {disk}"));
    assert_eq!(said, format!("{disk} has 160 MiB (167772160 bytes), it had 64 MiB"));
    assert_eq!((lab.size_of(&device.path), listed(&lab)[0]["size"].as_u64()), (160 * MIB, Some(160 * MIB)));
    lab.resize(disk);
    lab.sh("sync; head -c 80M /dev/urandom >mnt/b; sha256sum <mnt/b >sum.b; sync");
    // Again, by the image's name.
    lab.sh("truncate -s 200M disk.raw; $vdisk grow disk.raw");
    lab.resize(disk);
    lab.sh("cp mnt/a mnt/c; umount mnt");
    device.detach();
    lab.sh("e2fsck -fn disk.raw");
    let device = lab.attach("-r disk.raw");
    lab.sh(&format!(
        "mount -o ro {} mnt; for f in a c; do sha256sum <mnt/$f | cmp - sum; done; sha256sum <mnt/b | cmp - sum.b; umount mnt",
        device.path
    ));
    assert_eq!(lab.size_of(&device.path), 200 * MIB);
    device.detach();
    assert_nothing_left(&lab);
}

#[test]
fn a_flat_extent_grows_once_its_descriptor_says_so() {
    let lab = Lab::new();
    lab.sh("qemu-img create -q -f vmdk -o subformat=monolithicFlat disk.vmdk 64M");
    let device = lab.attach("disk.vmdk");
    let disk = &device.path;
    lab.sh("truncate -s 96M disk-flat.vmdk");
    if !grows_flat(&lab, &device) {
        device.detach();
        return;
    }
    assert_eq!(lab.sh(&format!("$vdisk grow {disk}")), format!("{disk} has 96 MiB (100663296 bytes), it had 64 MiB"));
    lab.sh(&format!(
        "head -c 1M /dev/urandom >data; dd if=data of={disk} bs=1M seek=95 oflag=direct conv=notrunc,fsync
         cmp data <(dd if={disk} bs=1M skip=95 iflag=direct); cmp data <(tail -c 1M disk-flat.vmdk)"
    ));
    device.detach();
    assert_eq!(lab.sh("qemu-img info --output=json disk.vmdk | jq '.\"virtual-size\"'"), "100663296");
    lab.sh("qemu-img convert -O raw disk.vmdk out; cmp data <(tail -c 1M out); $vdisk check disk.vmdk");
    assert_nothing_left(&lab);
}

/// Edits the descriptor, by steps that are refused until it is right.
fn grows_flat(lab: &Lab, device: &Device<'_>) -> bool {
    let said = lab.not_grown(&device.path);
    assert!(said.contains("has not grown"), "the descriptor says how large it is: {said}");
    // In place: another file of the name would not be the one that is served.
    let edit = |script: &str| lab.sh(&format!("sed '{script}' disk.vmdk >edited; cat edited >disk.vmdk"));
    edit("s/^RW 131072 /RW 262144 /");
    let said = lab.not_grown(&device.path);
    assert!(said.contains("disk-flat.vmdk") && said.contains("make it longer first"), "{said}");
    edit("s/^RW 262144 /RW 196608 /; s/disk-flat/other-flat/");
    let said = lab.not_grown(&device.path);
    assert!(said.contains("differs in more than the size of its last extent"), "{said}");
    assert_eq!(lab.size_of(&device.path), 64 * MIB);
    edit("s/other-flat/disk-flat/");
    grows(lab, &device.path)
}

#[test]
fn a_device_that_is_only_read_grows_as_well() {
    let lab = Lab::new();
    lab.sh("truncate -s 8M disk.raw");
    let device = lab.attach("-r disk.raw");
    lab.sh("truncate -s 16M disk.raw; printf end | dd of=disk.raw bs=1 seek=$((16 * 1024 * 1024 - 3)) conv=notrunc");
    if grows(&lab, &device.path) {
        lab.sh(&format!("$vdisk grow {d}; [ \"$(tail -c 3 {d})\" = end ]", d = device.path));
        assert_eq!(
            (lab.size_of(&device.path), lab.sh(&format!("blockdev --getro {}", device.path))),
            (16 * MIB, "1".into())
        );
    }
    device.detach();
}

#[test]
fn partitions_stay_while_the_disk_grows_under_them() {
    let lab = Lab::new();
    lab.sh("truncate -s 64M disk.raw; mkdir mnt");
    let device = lab.attach("disk.raw");
    let (disk, part) = (&device.path, device.part(1));
    lab.partition(disk, &format!("printf ',32M,83\\n' | sfdisk -q {disk}"));
    lab.sh(&format!("mkfs.ext4 -q {part}; mount {part} mnt; echo a >mnt/a; truncate -s 128M disk.raw"));
    if grows(&lab, &device.path) {
        lab.sh(&format!(
            "$vdisk grow {disk}; echo ', +' | sfdisk -q --no-reread --force -N 1 {disk}; partx -u {disk}
             [ $(blockdev --getsize64 {part}) -gt 120000000 ]"
        ));
        lab.resize(&part);
        lab.sh("head -c 70M /dev/zero >mnt/b; grep -qx a mnt/a");
    }
    lab.sh(&format!("umount mnt; e2fsck -fn {part}"));
    device.detach();
    assert_nothing_left(&lab);
}

#[test]
fn what_does_not_grow_is_told_apart() {
    let lab = Lab::new();
    let said = lab.not_grown("/dev/null");
    assert!(said.contains("is not attached"), "{said}");
    if lab.try_sh("setpriv --version").status.success() {
        let said = lab.try_sh("setpriv --reuid 65534 --regid 65534 --clear-groups $vdisk grow /dev/null");
        assert!(text(&said.stderr).contains("needs root"));
    }

    lab.vmdk("disk.vmdk", "64M");
    let device = lab.attach("disk.vmdk");
    lab.sh("truncate -s +1M disk.vmdk");
    let said = lab.not_grown(&device.path);
    assert!(said.contains("a sparse VMDK says in its header how large it is"), "{said}");
    device.detach();

    lab.sh("truncate -s 8M disk.raw");
    let device = lab.attach("--overlay child.vmdk disk.raw");
    lab.sh("truncate -s 16M disk.raw");
    let said = lab.not_grown(&device.path);
    assert!(said.contains("that of the child or overlay"), "{said}");
    lab.sh("truncate -s 8M disk.raw");
    device.detach();

    let device = lab.attach("disk.raw");
    let said = lab.not_grown(&device.path);
    assert!(said.contains("has not grown: the image has 8388608 bytes, as the device"), "{said}");
    lab.sh("truncate -s 8389119 disk.raw");
    assert!(lab.not_grown(&device.path).contains("has not grown"), "less than a sector");
    lab.allow_errors();
    lab.sh("truncate -s 4M disk.raw");
    let said = lab.not_grown(&device.path);
    assert!(said.contains("has shrunk to 4194304 bytes") && said.contains("what is behind its end fails"), "{said}");
    assert_eq!(lab.size_of(&device.path), 8 * MIB);
    assert!(
        !lab.try_sh(&format!("dd if={} of=/dev/null bs=4k skip=1500 count=1 iflag=direct", device.path))
            .status
            .success()
    );
    lab.sh("truncate -s 8M disk.raw");
    drop(device);
    assert_nothing_left(&lab);
}

#[test]
fn a_service_manager_has_it_grow_by_sighup() {
    let lab = Lab::new();
    lab.sh("truncate -s 8M disk.raw");
    let attach = format!("attach --foreground --transport {} disk.raw", transport());
    lab.sh(&format!("(set +e; $vdisk {attach} >device 2>said; echo $? >status) >/dev/null 2>&1 &"));
    wait_until("it is served", || listed(&lab).first().is_some_and(|d| d["state"] == "live"));
    let (disk, pid) = (lab.sh("cat device"), listed(&lab)[0]["pid"].clone());
    lab.sh("truncate -s 16M disk.raw");
    if grows(&lab, &disk) {
        lab.sh(&format!("kill -HUP {pid}"));
        wait_until("the device has grown", || listed(&lab)[0]["size"] == 16 * MIB);
        assert_eq!(lab.size_of(&disk), 16 * MIB);
    }
    // It serves on, and says in its log why it did nothing.
    let refusals = || lab.sh("grep -cE 'has not grown|keeps the size' said || true").parse::<u32>().unwrap();
    let before = refusals();
    lab.sh(&format!("kill -HUP {pid}"));
    wait_until("the log says so", || refusals() > before);
    lab.sh(&format!(
        "kill -TERM {pid}; until [ -s status ]; do sleep 0.05; done; [ $(cat status) = 0 ] || {{ cat said; false; }}"
    ));
    assert_nothing_left(&lab);
}

#[test]
fn a_device_that_grew_is_recovered_as_large_as_it_was() {
    if transport() != "ublk" {
        return;
    }
    let lab = Lab::new();
    lab.sh("truncate -s 64M disk.raw; mkfs.ext4 -q disk.raw; mkdir mnt");
    let device = lab.attach("disk.raw");
    let disk = &device.path;
    lab.sh(&format!("mount {disk} mnt; truncate -s 128M disk.raw"));
    let has_grown = grows(&lab, &device.path);
    let kill = || {
        lab.sh(&format!("kill -KILL {}", device.pid()));
        wait_until("list says dead", || listed(&lab)[0]["state"] == "dead");
    };
    let mut size = 64 * MIB;
    if has_grown {
        lab.sh(&format!("$vdisk grow {disk}"));
        size = 128 * MIB;
    }
    // The image grows, and its server dies before the device has heard of it.
    lab.sh("truncate -s 192M disk.raw");
    kill();
    let said = lab.not_grown(disk);
    assert!(said.contains("is dead") && said.contains(&format!("vdisk recover {disk} first")), "{said}");
    let said = lab.sh(&format!("timeout 150 $vdisk recover {disk} 2>&1"));
    assert!(said.contains("the image has grown: vdisk grow"), "{said}");
    assert_eq!((lab.size_of(&device.path), listed(&lab)[0]["size"].as_u64()), (size, Some(size)));
    lab.sh("head -c 10M /dev/urandom >mnt/a; sha256sum <mnt/a >sum; sync");
    if has_grown {
        lab.sh(&format!("$vdisk grow {disk}"));
        lab.resize(disk);
        lab.sh("head -c 120M /dev/zero >mnt/b; sync");
        size = 192 * MIB;
    }
    lab.sh(&format!("timeout 150 $vdisk recover --upgrade {disk}"));
    assert_eq!((lab.size_of(&device.path), listed(&lab)[0]["size"].as_u64()), (size, Some(size)));
    lab.sh("sha256sum <mnt/a | cmp - sum");
    lab.sh("umount mnt");
    device.detach();
    lab.sh("e2fsck -fn disk.raw");
    assert_nothing_left(&lab);
}

#[test]
fn a_block_device_that_is_an_image_grows() {
    let lab = Lab::new();
    if !lab.try_sh("modprobe -q loop || true; test -e /dev/loop-control").status.success() {
        assert!(std::env::var_os("VDISK_VM").is_none(), "no loop devices");
        println!("skipped: this kernel has no loop devices");
        return;
    }
    lab.sh("truncate -s 8M below");
    let image = lab.sh("losetup -f --show below");
    let device = lab.attach(&image);
    // It goes when the server closes it.
    lab.sh(&format!("losetup -d {image}; truncate -s 16M below; losetup -c {image}"));
    if grows(&lab, &device.path) {
        lab.sh(&format!(
            "$vdisk grow {d}; printf end | dd of={d} bs=1 seek=$((16 * 1024 * 1024 - 3)) conv=notrunc,fsync",
            d = device.path
        ));
        assert_eq!((lab.size_of(&device.path), lab.sh("tail -c 3 below")), (16 * MIB, "end".to_owned()));
    }
    device.detach();
    assert_nothing_left(&lab);
}
