//! What is not taken over, and what is said then.

use super::lab;
use crate::faults::Host;
use crate::lab::{assert_nothing_left, wait_until};

#[test]
fn a_device_whose_image_is_away_waits_until_it_is_back() {
    let Some(lab) = lab() else { return };
    lab.vmdk("disk.vmdk", "64M");
    let device = lab.attach("disk.vmdk");
    lab.sh("head -c 8M /dev/urandom >data");
    lab.sh(&format!("dd if=data of={} bs=512k oflag=direct conv=notrunc", device.path));
    lab.kill();
    lab.sh("mv disk.vmdk elsewhere");
    for _ in 0..2 {
        let said = lab.refused(&format!("recover {}", device.path));
        assert!(said.contains("disk.vmdk") && said.contains("No such file") && said.contains("waits on"), "{said}");
        assert_eq!(lab.states(), ["dead"]);
    }
    lab.sh("mv elsewhere disk.vmdk");
    lab.recover(&device.path);
    lab.sh(&format!("cmp -n 8388608 data {}", device.path));
    device.detach();
    lab.assert_clean();
}

#[test]
fn an_image_that_was_changed_meanwhile_is_not_taken_for_the_same() {
    let Some(lab) = lab() else { return };
    lab.vmdk("disk.vmdk", "64M");
    let device = lab.attach("disk.vmdk");
    lab.sh(&format!(
        "exec 9<{d}; dd if=/dev/urandom of={d} bs=512k count=4 oflag=direct conv=notrunc; exec 9<&-",
        d = device.path
    ));
    lab.kill();
    lab.sh("qemu-io -f vmdk -c 'write -P 7 30M 64k' disk.vmdk");
    for _ in 0..2 {
        let said = lab.refused(&format!("recover {}", device.path));
        assert!(said.contains("changed by another program"), "{said}");
        assert_eq!(lab.states(), ["dead"]);
    }
    drop(device);
    assert_nothing_left(&lab);
}

#[test]
fn a_temporary_overlay_is_gone_with_its_server_and_its_device() {
    let Some(lab) = lab() else { return };
    lab.vmdk("disk.vmdk", "64M");
    let device = lab.attach("--overlay temporary disk.vmdk");
    lab.kill();
    let said = lab.refused(&format!("recover {}", device.path));
    assert!(said.contains("temporary overlay"), "{said}");
    wait_until("the device goes", || !std::path::Path::new(&device.path).exists());
    device.detach();
    assert_nothing_left(&lab);
}

#[test]
fn a_device_of_another_program_or_user_is_refused_and_left_as_it_is() {
    let Some(lab) = lab() else { return };
    lab.vmdk("disk.vmdk", "64M");
    let device = lab.attach("disk.vmdk");
    lab.kill();
    let (disk, books) = (&device.path, lab.books(&device.path));
    let said = lab.sh(&format!("! setpriv --reuid 65534 --regid 65534 --clear-groups $vdisk recover {disk} 2>&1"));
    assert!(said.contains("needs root"), "{said}");
    // Of ublk, but in no books of ours.
    lab.sh(&format!("mv {books} books"));
    for other in [disk.as_str(), "/dev/vda", "/dev/ublkb77"] {
        let said = lab.refused(&format!("recover {other}"));
        assert!(said.contains("is no device of vdisk"), "{said}");
    }
    // Ours is gone, and another program's has its number.
    lab.sh(&format!("jq -c '.resume.cookie = 1' books >{books}"));
    assert!(!lab.vdisk(&format!("recover --upgrade {disk}")).status.success());
    lab.sh(&format!("$vdisk detach {disk}; [ ! -e {books} ]; test -b {disk}; mv books {books}"));
    lab.recover(disk);
    device.detach();
    lab.assert_clean();
}

#[test]
fn of_two_recoveries_at_once_one_takes_the_device_over() {
    let Some(lab) = lab() else { return };
    lab.vmdk("disk.vmdk", "64M");
    let device = lab.attach("disk.vmdk");
    for _ in 0..5 {
        lab.kill();
        lab.sh(&format!(
            "for n in 1 2; do (set +e; $vdisk recover {} >device.$n 2>said.$n; echo $? >status.$n) >/dev/null 2>&1 & done; wait",
            device.path
        ));
        let status = lab.sh("cat status.1 status.2");
        let lost = match status.as_str() {
            "0\n1" => 2,
            "1\n0" => 1,
            _ => panic!("{status}: {}", lab.sh("cat said.1 said.2")),
        };
        let said = lab.sh(&format!("cat said.{lost}"));
        assert!(said.lines().count() == 1 && !said.contains("waits on"), "{said}");
        assert_eq!(lab.states(), ["live"]);
        lab.sh(&format!("dd if=/dev/zero of={} bs=64k count=1 oflag=direct conv=notrunc", device.path));
    }
    device.detach();
    lab.assert_clean();
}

#[test]
fn nothing_changes_an_image_under_a_device_that_waits() {
    let Some(lab) = lab() else { return };
    lab.vmdk("disk.vmdk", "64M");
    let device = lab.attach("disk.vmdk");
    lab.kill();
    for command in ["serve disk.vmdk --socket s", "compact disk.vmdk", "check --repair disk.vmdk"] {
        let said = lab.refused(command);
        assert!(said.contains("waits for its next server"), "{said}");
    }
    // By another name it is the same.
    lab.sh("ln disk.vmdk other.vmdk");
    for command in
        ["serve other.vmdk --socket s", "compact other.vmdk", "check --repair other.vmdk", "attach other.vmdk"]
    {
        let said = lab.refused(command);
        assert!(said.contains("waits for its next server") && said.contains(&device.path), "{said}");
    }
    lab.sh("rm other.vmdk");
    // A copy has its content ID, and is another file.
    lab.sh("mv disk.vmdk served; cp served disk.vmdk");
    let said = lab.refused(&format!("recover {}", device.path));
    assert!(said.contains("is another file than the one that was served"), "{said}");
    lab.sh("mv served disk.vmdk");
    lab.recover(&device.path);
    device.detach();
    lab.assert_clean();
}

/// As a server does whose last I/O is over, and whose memory takes its time to be given back.
#[test]
fn no_second_device_is_made_beside_one_whose_server_still_ends() {
    let Some(lab) = lab() else { return };
    lab.vmdk("disk.vmdk", "64M");
    let device = lab.attach("disk.vmdk");
    lab.kill();
    let books = lab.books(&device.path);
    lab.sh(&format!(
        "sleep 1000 >/dev/null 2>&1 & pid=$!; echo $pid >other; cp {books} books
         jq -c \".pid = $pid | .start_time = $(awk '{{ print $22 }}' /proc/$pid/stat)\" books >{books}"
    ));
    let said = lab.refused("attach disk.vmdk");
    assert!(said.contains(&format!("pid {}", lab.sh("cat other"))) && said.contains("is still ending"), "{said}");
    lab.sh(&format!("kill $(cat other); cp books {books}"));
    assert_eq!(lab.sh("$vdisk attach disk.vmdk"), device.path);
    device.detach();
    lab.assert_clean();
}

#[test]
fn another_file_of_the_same_size_is_not_taken_for_a_raw_image_that_was_only_read() {
    let Some(lab) = lab() else { return };
    lab.sh("head -c 8M /dev/urandom >disk.raw");
    let device = lab.attach("-r disk.raw");
    lab.kill();
    lab.sh("mv disk.raw served; head -c 8M /dev/urandom >disk.raw");
    for command in [format!("recover {}", device.path), "attach -r disk.raw".to_owned()] {
        let said = lab.refused(&command);
        assert!(said.contains("is another file than the one that was served"), "{said}");
        assert_eq!(lab.states(), ["dead"]);
    }
    lab.sh("mv served disk.raw");
    lab.recover(&device.path);
    lab.sh(&format!("cmp disk.raw {}", device.path));
    device.detach();
    assert_nothing_left(&lab);
}

/// The host says once that it has lost something.
#[test]
fn what_a_failed_sync_has_lost_is_not_forgotten_by_the_second_recovery() {
    let Some(lab) = lab() else { return };
    let Some(host) = Host::new(&lab) else { return };
    lab.sh("head -c 1048576 /dev/urandom > data");
    for poisoned in [false, true] {
        lab.vmdk("host/disk.vmdk", "64M");
        let device = lab.attach("--direct-io off host/disk.vmdk");
        assert!(lab.write_at(&device, 0, 1024, true).status.success());
        host.break_at("host/disk.vmdk", lab.offset_of("host/disk.vmdk", 0), 65536);
        // A new grain, which the ledger alone knows, and one that the host cannot keep.
        for mib in [8, 0] {
            assert!(lab.write_at(&device, mib, 64, false).status.success());
        }
        if poisoned {
            assert!(!lab.write_at(&device, 4, 64, true).status.success(), "a flush of bad sectors succeeded");
            wait_until("list says poisoned", || lab.states() == ["poisoned"]);
            // Reads go on only as long as it has this server.
            lab.sh(
                "log=$($vdisk list --json | jq -r '.[0].log'); pid=$($vdisk list --json | jq '.[0].pid'); kill -USR1 $pid
                 said() { if [ $log = journal ]; then journalctl -q _PID=$pid; else cat $log; fi; }
                 until said | grep 'is not let go of' >let_go; do sleep 0.05; done",
            );
            assert_eq!(lab.states(), ["poisoned"]);
        }
        lab.kill();
        let first = lab.refused(&format!("recover {}", device.path));
        assert!(first.contains(if poisoned { "a sync had failed" } else { "is lost" }), "{first}");
        host.mend();
        for command in ["recover", "detach"] {
            let said = lab.refused(&format!("{command} {}", device.path));
            assert!(said.contains("sync") && said.contains("detach --force"), "{said}");
            assert_eq!(lab.states(), ["dead"]);
        }
        lab.sh(&format!("$vdisk detach --force {}", device.path));
        std::mem::forget(device);
        assert_nothing_left(&lab);
        lab.sh("$vdisk check host/disk.vmdk; rm host/disk.vmdk");
    }
    host.end();
}

/// An image without tables has no ledger that would say so, and the books are in somebody else's hands for as long as the server lives.
#[test]
fn a_failed_sync_of_a_raw_image_is_known_whenever_the_server_dies() {
    let Some(lab) = lab() else { return };
    let Some(host) = Host::new(&lab) else { return };
    lab.sh("head -c 1M /dev/urandom > data; head -c 16M /dev/urandom > host/disk.img; sync host/disk.img");
    let device = lab.attach("--direct-io off host/disk.img");
    host.break_at("host/disk.img", 4 << 20, 65536);
    lab.sh(
        "(set +e; flock -o /run/vdisk.lock sh -c 'touch locked; exec sleep 1000' & echo $! > locker) >/dev/null 2>&1",
    );
    wait_until("the books are locked", || lab.try_sh("[ -e locked ]").status.success());
    assert!(!lab.write_at(&device, 4, 64, true).status.success(), "a flush of bad sectors succeeded");
    lab.kill();
    lab.sh("pkill -P $(cat locker); rm locked");
    host.mend();
    let said = lab.refused(&format!("recover {}", device.path));
    assert!(said.contains("a sync had failed"), "{said}");
    lab.sh(&format!("$vdisk detach --force {}", device.path));
    std::mem::forget(device);
    assert_nothing_left(&lab);
    lab.sh("rm host/disk.img");
    host.end();
}
