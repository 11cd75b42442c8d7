//! What the kernel does with a device's requests before they come to us, and what it does with ours below the image.

use crate::lab::{Device, Lab, transport};

/// KiB of the extents that filefrag has listed.
fn listed_kib(extents: &str, which: impl Fn(&str) -> bool) -> u64 {
    let lengths = extents.lines().filter(|line| which(line)).filter_map(|line| line.split(':').nth(3));
    lengths.filter_map(|length| length.trim().parse::<u64>().ok()).sum()
}

impl Lab {
    fn scheduler(&self, device: &Device<'_>) -> String {
        self.sh(&format!("sed 's/.*\\[\\(.*\\)\\].*/\\1/' /sys/block/{}/queue/scheduler", name(device)))
    }
}

fn name<'a>(device: &'a Device<'_>) -> &'a str {
    device.path.trim_start_matches("/dev/")
}

/// The kernel gives one to a device with a single queue.
#[test]
fn a_device_has_no_scheduler() {
    if transport() != "ublk" {
        println!("skipped: nbd's devices are the kernel's, and loop has none by itself");
        return;
    }
    let lab = Lab::new();
    lab.vmdk("disk.vmdk", "64M");
    for options in ["", "--queues 1", "-r --queues 1"] {
        let device = lab.attach(&format!("{options} disk.vmdk"));
        assert_eq!(lab.scheduler(&device), "none", "{options}");
        device.detach();
    }
}

/// A disk that writes zeroes by a command (NVMe and SCSI disks may; `scsi_debug` plays one in memory): since Linux 6.17 the space for
/// new grains comes from it as if it had been written, and not as extents that a file system has to convert at each first write.
#[test]
fn new_grains_are_overwritten_where_the_disk_below_can_write_zeroes() {
    let lab = Lab::new();
    if transport() == "fuse" || std::env::var("VDISK_VM").is_ok_and(|series| series != "newest") {
        println!("skipped: no kernel of a VM, or one before 6.17");
        return;
    }
    lab.sh("modprobe sd_mod; modprobe scsi_debug dev_size_mb=256 lbpu=1 lbpws=1 lbprz=1 delay=0");
    let disk = lab.sh(
        "for n in $(seq 100); do grep -lsx 'scsi_debug *' /sys/block/sd*/device/model && break; sleep 0.1; done | cut -d/ -f4",
    );
    // The host here, so that nothing else is on it.
    lab.sh(&format!("mkdir host; mkfs.ext4 -q -E nodiscard /dev/{disk}; mount /dev/{disk} host"));
    lab.vmdk("host/disk.vmdk", "1G");
    let device = lab.attach("--direct-io on host/disk.vmdk");
    // A block in each of 256 grains: the rest of them was never written.
    lab.sh(&format!(
        "fio --name=w --filename={} --ioengine=libaio --iodepth=16 --direct=1 --rw=write:60k --bs=4k --size=16M --number_ios=256",
        device.path
    ));
    let extents = lab.sh("sync; filefrag -b1024 -v host/disk.vmdk");
    device.detach();
    let checked = lab.sh("qemu-img check host/disk.vmdk");
    lab.sh("umount host; modprobe -r scsi_debug");
    assert!(checked.contains("No errors"), "{checked}");
    // Tables have their space another way, as some of their sectors are in use.
    let unwritten = listed_kib(&extents, |line| line.contains("unwritten"));
    assert!(unwritten < 64 && listed_kib(&extents, |_| true) >= 16 << 10, "{extents}");
}
