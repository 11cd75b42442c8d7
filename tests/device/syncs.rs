//! How often the host is asked to make the image durable.

use crate::lab::Lab;

/// The kernel's own count, by the tracepoint ext4_sync_file_enter: it sees what io_uring does as well.
struct Syncs<'a> {
    lab: &'a Lab,
    trace: String,
}

impl<'a> Syncs<'a> {
    /// Counts those of one file, from now on. `None`: the file is not on ext4, or this kernel does not tell.
    fn of(lab: &'a Lab, file: &str) -> Option<Self> {
        let tracing = "/sys/kernel/tracing";
        lab.sh(&format!("test -e {tracing}/instances || mount -t tracefs nodev {tracing} || true"));
        let event = "events/ext4/ext4_sync_file_enter";
        let there = lab.try_sh(&format!("test -d {tracing}/{event}; [ $(stat -f -c %T {file}) = ext2/ext3 ]"));
        if !there.status.success() {
            assert!(std::env::var_os("VDISK_VM").is_none(), "no {event}, or not on ext4");
            println!("skipped: no {event}, or not on ext4");
            return None;
        }
        let trace = format!("{tracing}/instances/vdisk{}", std::process::id());
        lab.sh(&format!("mkdir {trace}; echo \"ino == $(stat -c %i {file})\" > {trace}/{event}/filter; echo 1 > {trace}/{event}/enable"));
        let syncs = Self { lab, trace };
        // It is what it says: one sync is counted, and a read is not.
        lab.sh(&format!("cat {file} > /dev/null; sync --data {file}"));
        assert_eq!(syncs.count(), 1);
        Some(syncs)
    }

    /// Since the last call.
    fn count(&self) -> u32 {
        let count =
            self.lab.sh(&format!("grep -c ext4_sync_file_enter {t}/trace || true; echo > {t}/trace", t = self.trace));
        count.parse().unwrap()
    }
}

impl Drop for Syncs<'_> {
    fn drop(&mut self) {
        self.lab.try_sh(&format!("rmdir {}", self.trace));
    }
}

/// Not one for each grain table or grain: the data, the tables, and the mark of the first change.
#[test]
fn writing_64_mib_to_an_empty_image_and_a_flush_take_four_syncs_at_most() {
    let lab = Lab::new();
    lab.vmdk("disk.vmdk", "1G");
    let Some(syncs) = Syncs::of(&lab, "disk.vmdk") else { return };
    let device = lab.attach("disk.vmdk");
    syncs.count();
    lab.sh(&format!("dd if=/dev/urandom of={} bs=1M count=64 oflag=direct conv=fsync,notrunc", device.path));
    let count = syncs.count();
    println!("{count} syncs");
    assert!((1..=4).contains(&count), "{count} syncs");
    device.detach();
}
