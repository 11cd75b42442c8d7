//! The serving process dies.

use crate::lab::{Lab, assert_nothing_left, listed, transport, wait_until};

#[test]
fn after_kill_9_detach_leaves_nothing() {
    let lab = Lab::new();
    lab.vmdk("disk.vmdk", "64M");
    let device = lab.attach("disk.vmdk");
    lab.sh("echo 'I/O error, dev (nbd|ublkb)|Receive control failed|Connection timed out|shutting down sockets|Attempted send on invalid socket' >> ${VDISK_VM_ALLOW:-/dev/null}");
    lab.sh(&format!("dd if=/dev/urandom of={} bs=1M count=8 oflag=direct conv=fsync", device.path));
    lab.sh(&format!("kill -KILL {}", device.pid()));
    wait_until("list says dead", || listed(&lab)[0]["state"] == "dead");
    device.detach();
    assert_nothing_left(&lab);
    assert!(lab.sh("qemu-img check disk.vmdk").contains("No errors"));
    // And the image can be attached again.
    lab.attach("disk.vmdk").detach();
    assert_nothing_left(&lab);
}

#[test]
fn kill_9_while_it_is_written_leaves_nothing_and_what_was_synced_is_there() {
    let lab = Lab::new();
    lab.vmdk("disk.vmdk", "256M");
    let device = lab.attach("disk.vmdk");
    let disk = device.path.clone();
    lab.sh("echo 'I/O error|Receive control failed|Connection timed out|shutting down sockets|Attempted send on invalid socket|lost async page write' >> ${VDISK_VM_ALLOW:-/dev/null}");
    lab.sh(&format!("dd if=/dev/urandom of=data bs=1M count=16; dd if=data of={disk} bs=1M oflag=direct conv=fsync"));
    lab.sh(&format!(
        "written() {{ awk '{{ print $7 }}' /sys/block/${{1##*/}}/stat; }}
         before=$(written {disk})
         fio --name=w --filename={disk} --offset=64m --size=128m --rw=randwrite --bs=4k --iodepth=16 --ioengine=io_uring \
           --direct=1 --time_based --runtime=60 >fio.log 2>&1 & fio=$!
         until [ $(written {disk}) -gt $((before + 4096)) ]; do sleep 0.02; done
         kill -KILL {}; $vdisk detach --force {disk}; ! wait $fio",
        device.pid()
    ));
    std::mem::forget(device);
    // fio had it open until a moment ago: the kernel deletes a device when the last opener is gone, and not before.
    wait_until("the node goes", || lab.sh("ls /dev/ublkc* 2>/dev/null || true").is_empty());
    assert_nothing_left(&lab);
    let check = lab.sh("qemu-img check disk.vmdk; qemu-img convert -O raw disk.vmdk raw; cmp -n 16777216 raw data");
    assert!(check.contains("No errors"), "{check}");
}

/// No flush: the entries that name the data are only in the server's ledger.
#[test]
fn what_was_written_and_not_flushed_is_there_after_kill_9_and_a_new_attach() {
    let lab = Lab::new();
    lab.vmdk("disk.vmdk", "1G");
    lab.sh("head -c 8388608 /dev/urandom > data");
    lab.sh("echo 'I/O error|Receive control failed|Connection timed out|shutting down sockets|Attempted send on invalid socket' >> ${VDISK_VM_ALLOW:-/dev/null}");
    let same = |of: &str, rounds: u32| {
        for round in 0..rounds {
            lab.sh(&format!("cmp -i {}:0 -n 8388608 {of} data", round * 100 * 524_288));
        }
    };
    for round in 0..3 {
        // Over ublk, the device that waits.
        let device = lab.attach("disk.vmdk");
        same(&device.path, round);
        lab.sh(&format!(
            "dd if=data of={} bs=512k seek={} oflag=direct conv=notrunc; pid={}; kill -KILL $pid; timeout 60 tail --pid=$pid -f /dev/null",
            device.path,
            round * 100,
            device.pid()
        ));
        wait_until("list says dead", || listed(&lab)[0]["state"] == "dead");
        if round == 0 {
            let info = lab.vdisk("info disk.vmdk");
            assert!(String::from_utf8_lossy(&info.stderr).contains("run vdisk recover"), "{info:?}");
        }
        std::mem::forget(device);
    }
    let recovered = lab.sh("$vdisk recover disk.vmdk");
    let expected = if transport() == "ublk" { "/dev/ublkb" } else { "took over " };
    assert!(recovered.starts_with(expected), "{recovered}");
    lab.sh("$vdisk detach disk.vmdk");
    assert_eq!(lab.sh("$vdisk check disk.vmdk | head -n 1"), "no errors found");
    lab.sh("qemu-img convert -O raw disk.vmdk raw");
    same("raw", 3);
    assert!(lab.sh("qemu-img check disk.vmdk").contains("No errors"));
    assert_nothing_left(&lab);
}

/// Data that waits in the page cache of the device, because somebody keeps it open, is written before the server goes.
#[test]
fn what_was_written_and_not_flushed_is_there_after_sigterm_and_detach() {
    let lab = Lab::new();
    lab.vmdk("disk.vmdk", "64M");
    lab.sh("head -c 8388608 /dev/urandom > data");
    let device = lab.attach("disk.vmdk");
    let (disk, pid) = (device.path.clone(), device.pid());
    lab.sh("echo 'I/O error|lost async page write' >> ${VDISK_VM_ALLOW:-/dev/null}");
    lab.sh(&format!(
        "exec 9<{disk}; dd if=data of={disk} bs=1M conv=notrunc; kill -TERM {pid}; timeout 60 tail --pid={pid} -f /dev/null; exec 9<&-"
    ));
    assert_nothing_left(&lab);
    lab.sh("qemu-img convert -O raw disk.vmdk raw; cmp -n 8388608 raw data");
    let device = lab.attach("disk.vmdk");
    lab.sh(&format!("head -c 8388608 /dev/urandom > other; dd if=other of={} bs=1M conv=notrunc", device.path));
    device.detach();
    lab.sh("qemu-img convert -O raw disk.vmdk raw; cmp -n 8388608 raw other");
}

/// Otherwise a server that is killed while it waits for its own file system could not die.
#[test]
fn only_the_serving_threads_of_fuse_have_it_open() {
    if transport() != "fuse" {
        return;
    }
    let lab = Lab::new();
    lab.vmdk("disk.vmdk", "64M");
    let device = lab.attach("disk.vmdk");
    let count = |of: String| lab.sh(&format!("ls -l {of} | grep -c /dev/fuse || true")).parse::<u32>().unwrap();
    assert_eq!(count(format!("/proc/{}/fd", device.pid())), 0);
    assert!(count(format!("/proc/{}/task/*/fd", device.pid())) > 0);
    device.detach();
}
