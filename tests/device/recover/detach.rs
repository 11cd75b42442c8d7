//! The end of a device whose server is dead.

use super::lab;
use crate::lab::wait_until;

#[test]
fn detach_of_a_waiting_device_closes_its_image() {
    let Some(lab) = lab() else { return };
    lab.vmdk("disk.vmdk", "64M");
    let device = lab.attach("disk.vmdk");
    lab.sh("head -c 8M /dev/urandom >data");
    lab.sh(&format!(
        "exec 9<{d}; dd if=data of={d} bs=512k oflag=direct conv=notrunc; kill -KILL {pid}; timeout 60 tail --pid={pid} -f /dev/null; exec 9<&-",
        d = device.path,
        pid = device.pid()
    ));
    wait_until("list says dead", || lab.states() == ["dead"]);
    device.detach();
    assert_eq!(lab.sh("$vdisk recover disk.vmdk"), "nothing to recover: the image was closed");
    lab.sh("qemu-img convert -O raw disk.vmdk raw; cmp -n 8388608 raw data");
    lab.assert_clean();
}

#[test]
fn detach_by_force_of_a_waiting_and_mounted_device_fails_what_waits_and_does_not_hang() {
    let Some(lab) = lab() else { return };
    lab.sh(
        "echo 'I/O error|error, dev|EXT4-fs error|lost async page write|Buffer I/O' >> ${VDISK_VM_ALLOW:-/dev/null}",
    );
    lab.vmdk("disk.vmdk", "256M");
    let device = lab.attach("disk.vmdk");
    let disk = device.path.clone();
    lab.sh(&format!(
        "mkfs.ext4 -q {disk}; mkdir mnt; mount {disk} mnt; head -c 4M /dev/urandom >data; cp data mnt/; sync mnt/data"
    ));
    lab.kill();
    lab.sh(
        "(set +e; dd if=/dev/zero of=mnt/more bs=1M count=8 conv=fsync 2>dd.log; echo $? >dd.status) >/dev/null 2>&1 &",
    );
    lab.sh("until [ -e mnt/more ]; do sleep 0.02; done");
    assert!(!lab.path().join("dd.status").exists(), "it waits");
    lab.sh(&format!("timeout 100 $vdisk detach --force {disk}; until [ -s dd.status ]; do sleep 0.05; done; [ $(cat dd.status) != 0 ]"));
    std::mem::forget(device);
    lab.sh("umount mnt");
    wait_until("the node goes", || lab.sh("ls /dev/ublkc* 2>/dev/null || true").is_empty());
    let device = lab.attach("disk.vmdk");
    lab.sh(&format!("mount {disk} mnt; cmp data mnt/data; umount mnt; e2fsck -fn {disk}"));
    device.detach();
    lab.assert_clean();
}

/// Who has written to the page cache of the device and closed it waits in the close, and is not to be seen at the device.
#[test]
fn what_waits_in_the_kernel_is_written_before_detach() {
    let Some(lab) = lab() else { return };
    lab.vmdk("disk.vmdk", "64M");
    let device = lab.attach("disk.vmdk");
    let disk = device.path.clone();
    lab.sh("head -c 8M /dev/urandom >data");
    lab.kill();
    lab.sh(&format!(
        "(set +e; exec 7<>{disk}; cat data >&7; echo $? >status; touch written; exec 7>&-; touch closed) >/dev/null 2>&1 & pid=$!
         until [ -e written ]; do sleep 0.02; done; while [ -e /proc/$pid/fd/7 ]; do sleep 0.02; done"
    ));
    assert!(!lab.path().join("closed").exists(), "it waits");
    device.detach();
    lab.sh("until [ -e closed ]; do sleep 0.05; done; [ $(cat status) = 0 ]");
    lab.sh("qemu-img convert -O raw disk.vmdk raw; cmp -n 8388608 raw data");
    lab.assert_clean();
}

#[test]
fn detach_while_another_server_takes_the_device_over_is_refused() {
    let Some(lab) = lab() else { return };
    lab.vmdk("disk.vmdk", "64M");
    let device = lab.attach("disk.vmdk");
    lab.kill();
    // A process that does not get on with it.
    let books = lab.books(&device.path);
    lab.sh(&format!(
        "sleep 1000 >/dev/null 2>&1 & pid=$!; echo $pid >other; cp {books} books
         jq -c \".pid = $pid | .start_time = $(awk '{{ print $22 }}' /proc/$pid/stat) | .ready = false | .resume.taking_over = true\" \
            books >{books}"
    ));
    assert_eq!(lab.states(), ["recovering"]);
    for command in ["detach", "recover"] {
        let said = lab.refused(&format!("{command} {}", device.path));
        assert!(said.contains(&format!("pid {}", lab.sh("cat other"))), "{said}");
    }
    lab.sh(&format!("kill $(cat other); cp books {books}"));
    device.detach();
    lab.assert_clean();
}
