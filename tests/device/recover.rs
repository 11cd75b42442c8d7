//! A device of ublk outlives its server: whoever uses it sees a pause and no error.

mod detach;
mod refused;

use crate::lab::{Lab, assert_nothing_left, listed, text, transport, wait_until};

/// A laboratory in which devices wait for another server, or none: those of nbd and fuse end with their servers.
fn lab() -> Option<Lab> {
    (transport() == "ublk").then(Lab::new)
}

impl Lab {
    fn states(&self) -> Vec<serde_json::Value> {
        listed(self).iter().map(|d| d["state"].clone()).collect()
    }

    /// Kills the server of the only device, which then waits.
    fn kill(&self) {
        self.sh("pid=$($vdisk list --json | jq '.[0].pid'); kill -KILL $pid; timeout 60 tail --pid=$pid -f /dev/null");
        wait_until("list says dead", || self.states() == ["dead"]);
    }

    fn recover(&self, what: &str) -> String {
        self.sh(&format!("timeout 150 $vdisk recover {what}"))
    }

    /// The file in the books that is about a device.
    fn books(&self, disk: &str) -> String {
        format!("/run/vdisk/{}.json", disk.trim_start_matches("/dev/"))
    }

    /// Whether the only server has requests served in the kernel's pages: its rings have tables of buffers then.
    fn copies_nothing(&self) -> bool {
        let tables = "cat /proc/$($vdisk list --json | jq '.[0].pid')/fdinfo/* 2>/dev/null";
        self.sh(&format!("{{ {tables} || true; }} | awk '$1 == \"UserBufs:\" {{ n += $2 }} END {{ print n + 0 }}'"))
            != "0"
    }

    fn refused(&self, command: &str) -> String {
        let output = self.vdisk(command);
        let said = text(&output.stderr);
        assert!(!output.status.success(), "{command} did not fail");
        assert_eq!(said.lines().count(), 1, "{said}");
        said
    }

    /// Writes 16 MiB in random order, again and again, and reads them back: `fio.log` and `fio.status` are there in the end.
    fn begin_fio(&self, disk: &str, depth: u32, loops: u32) {
        self.sh(&format!(
            "(set +e; fio --name=v --filename={disk} --size=16m --loops={loops} --rw=randwrite --bs=4k --iodepth={depth} --ioengine=io_uring \
               --allow_file_create=0 --direct=1 --rate_iops=2000 --verify=crc32c --verify_fatal=1 --verify_backlog=512 --randrepeat=0 >fio.log 2>&1; \
               echo $? >fio.status) >/dev/null 2>&1 & "
        ));
    }

    /// Waits until that many requests more were completed by the disk.
    fn progress(&self, disk: &str, requests: u32) {
        self.sh(&format!(
            "completed() {{ awk '{{ print $1 + $5 }}' /sys/block/{}/stat; }}
             before=$(completed); until [ $(completed) -gt $((before + {requests})) ] || [ -e fio.status ]; do sleep 0.02; done",
            disk.trim_start_matches("/dev/")
        ));
    }

    fn runs_fio(&self) -> bool {
        !self.path().join("fio.status").exists()
    }

    fn end_fio(&self) {
        self.sh("until [ -s fio.status ]; do sleep 0.05; done; [ $(cat fio.status) = 0 ] || { cat fio.log; false; }");
    }

    fn assert_clean(&self) {
        assert_eq!(self.sh("$vdisk check disk.vmdk | head -n 1"), "no errors found");
        assert!(self.sh("qemu-img check disk.vmdk").contains("No errors"));
        assert_nothing_left(self);
    }
}

#[test]
fn fio_verifies_through_three_deaths_of_the_server() {
    let Some(lab) = lab() else { return };
    lab.vmdk("disk.vmdk", "256M");
    let device = lab.attach("disk.vmdk");
    let copies_nothing = lab.copies_nothing();
    println!("zero copy: {copies_nothing}");
    if let Ok(series) = std::env::var("VDISK_VM") {
        let wanted = series == "newest" && std::env::var_os("VDISK_MODE").is_none_or(|mode| mode.is_empty());
        assert_eq!(copies_nothing, wanted);
    }
    lab.begin_fio(&device.path, 16, 12);
    for _ in 0..3 {
        lab.progress(&device.path, 1500);
        assert!(lab.runs_fio(), "fio is to be at it: {}", lab.sh("cat fio.log"));
        lab.kill();
        assert_eq!(lab.recover(&device.path), device.path);
        assert_eq!((lab.states(), lab.copies_nothing()), (vec!["live".into()], copies_nothing));
    }
    lab.progress(&device.path, 200);
    lab.end_fio();
    device.detach();
    lab.assert_clean();
}

#[test]
fn what_comes_at_once_after_a_kill_finds_the_device() {
    let Some(lab) = lab() else { return };
    lab.vmdk("disk.vmdk", "64M");
    let device = lab.attach("disk.vmdk");
    lab.sh(&format!("head -c 8M /dev/urandom >data; dd if=data of={} bs=512k oflag=direct conv=notrunc", device.path));
    let by_name = format!("recover {}", device.path);
    for command in ["attach disk.vmdk", "recover disk.vmdk", &by_name, "attach disk.vmdk"] {
        let said = lab.sh(&format!("kill -KILL {}; $vdisk {command}", device.pid()));
        assert_eq!(said, device.path, "{command}");
        lab.sh(&format!("cmp -n 8388608 data {}", device.path));
    }
    lab.sh(&format!("dd if=data of={d} bs=1M seek=8 conv=notrunc; kill -KILL {p}", d = device.path, p = device.pid()));
    device.detach();
    lab.sh("qemu-img convert -O raw disk.vmdk raw; cmp -n 8388608 raw data; cmp -i 8388608:0 -n 8388608 raw data");
    lab.assert_clean();
}

/// Before Linux 6.15 the driver looks after its server when one of its tags is idle, or a request has timed out.
#[test]
fn a_server_that_dies_with_every_tag_of_its_queues_is_missed_too() {
    let Some(lab) = lab() else { return };
    lab.vmdk("disk.vmdk", "256M");
    let device = lab.attach("--queues 1 --depth 2 disk.vmdk");
    lab.begin_fio(&device.path, 16, 2);
    lab.progress(&device.path, 300);
    assert!(lab.runs_fio());
    lab.kill();
    assert_eq!(lab.recover("disk.vmdk"), device.path, "by the name of the image");
    assert_eq!(lab.sh(&format!("ls /sys/block/{}/mq", device.path.trim_start_matches("/dev/"))), "0", "queues");
    lab.end_fio();
    device.detach();
    lab.assert_clean();
}

#[test]
fn a_mounted_file_system_sees_a_pause_and_no_error() {
    let Some(lab) = lab() else { return };
    lab.vmdk("disk.vmdk", "512M");
    let device = lab.attach("disk.vmdk");
    let part = device.part(1);
    lab.partition(&device.path, &format!("sgdisk -n 1:0:0 {}", device.path));
    lab.sh(&format!(
        "mkfs.ext4 -q {part}; mkdir mnt; mount -o errors=remount-ro {part} mnt; head -c 4M /dev/urandom >data"
    ));
    lab.sh("(set +e; n=0; while [ ! -e enough ]; do n=$((n + 1)); cp data mnt/$((n % 20)).part && sync mnt/$((n % 20)).part && \
              mv mnt/$((n % 20)).part mnt/$((n % 20)) && echo $n >written || { echo failed >status; exit; }; done; echo ok >status) \
            >cp.log 2>&1 &");
    for _ in 0..3 {
        lab.sh("before=$(cat written 2>/dev/null || echo 0); until [ $(cat written 2>/dev/null || echo 0) -gt $((before + 2)) ]; do sleep 0.02; done");
        lab.kill();
        let said = lab.refused(&format!("detach {}", device.path));
        assert!(said.contains("is dead, and") && said.contains("mnt") && said.contains("vdisk recover"), "{said}");
        lab.recover(&device.path);
        assert_eq!(lab.sh(&format!("test -b {part} && echo there")), "there");
    }
    lab.sh("touch enough; until [ -s status ]; do sleep 0.05; done; [ $(cat status) = ok ] || { cat cp.log; false; }");
    lab.sh("for n in $(ls mnt | grep -x '[0-9]*'); do cmp data mnt/$n; done; umount mnt");
    lab.sh(&format!("e2fsck -fn {part}"));
    device.detach();
    lab.assert_clean();
}

#[test]
fn fio_verifies_through_two_upgrades_and_one_that_cannot_be_changes_nothing() {
    let Some(lab) = lab() else { return };
    lab.vmdk("disk.vmdk", "256M");
    let device = lab.attach("disk.vmdk");
    let said = lab.refused(&format!("recover {}", device.path));
    assert!(said.contains("is served by pid") && said.contains("--upgrade"), "{said}");
    lab.begin_fio(&device.path, 16, 8);
    for what in [device.path.as_str(), "disk.vmdk"] {
        lab.progress(&device.path, 1500);
        assert!(lab.runs_fio(), "fio is to be at it: {}", lab.sh("cat fio.log"));
        let before = device.pid();
        assert_eq!(lab.recover(&format!("--upgrade {what}")), device.path);
        assert_ne!(device.pid(), before);
        assert_eq!(lab.states(), ["live"]);
    }
    lab.end_fio();
    // The next one cannot begin: the old one stays.
    lab.sh("mv disk.vmdk elsewhere");
    let before = device.pid();
    let said = lab.refused(&format!("recover --upgrade {}", device.path));
    assert!(said.contains("stays with its server") && said.contains("No such file"), "{said}");
    lab.sh("mv elsewhere disk.vmdk");
    assert_eq!((device.pid(), lab.states()), (before, vec!["live".into()]));
    device.detach();
    lab.assert_clean();
}

/// What a service manager does with Restart=on-failure.
#[test]
fn the_same_attach_again_goes_on_with_the_device() {
    let Some(lab) = lab() else { return };
    lab.vmdk("disk.vmdk", "64M");
    let device = lab.attach("disk.vmdk");
    lab.begin_fio(&device.path, 4, 6);
    lab.progress(&device.path, 200);
    lab.kill();
    let said = lab.refused("attach -r disk.vmdk");
    assert!(said.contains("read-only") && said.contains("vdisk recover"), "{said}");
    let said = lab.refused("serve disk.vmdk --socket s");
    assert!(said.contains("waits for its next server"), "{said}");
    lab.sh("(set +e; $vdisk attach --foreground disk.vmdk >device 2>said; echo $? >status) >/dev/null 2>&1 &");
    lab.sh("until [ -s device ]; do sleep 0.02; done");
    assert_eq!(lab.sh("cat device"), device.path);
    lab.progress(&device.path, 200);
    // As `systemctl kill -s USR1` would.
    let said = lab.refused(&format!("recover --upgrade {}", device.path));
    assert!(said.contains("kill -USR1"), "{said}");
    lab.sh(&format!("kill -USR1 {}; until [ -s status ]; do sleep 0.02; done; [ $(cat status) = 1 ]", device.pid()));
    assert!(lab.sh("cat said").contains("let go of"), "{}", lab.sh("cat said"));
    assert_eq!(lab.states(), ["dead"]);
    assert_eq!(lab.sh("$vdisk attach --cache-size 1M disk.vmdk"), device.path);
    lab.end_fio();
    device.detach();
    lab.assert_clean();
}

/// One queue: Linux before 6.15 oopses at a second take-over when some of several queues were there.
#[test]
fn a_take_over_that_is_cut_short_can_be_done_again_where_the_kernel_can() {
    let Some(lab) = lab() else { return };
    lab.vmdk("disk.vmdk", "64M");
    let device = lab.attach("--queues 1 disk.vmdk");
    lab.sh("head -c 8M /dev/urandom >data");
    lab.sh(&format!("dd if=data of={} bs=512k oflag=direct conv=notrunc", device.path));
    lab.kill();
    let books = lab.books(&device.path);
    let begun = || lab.sh(&format!("jq .resume.begun {books}")) == "true";
    // Once before the driver is told, then after. By nothing but bash itself: the moment is short.
    for moment in ["taking_over", "begun", "begun", "begun", "begun", "begun"] {
        lab.sh(&format!(
            r#"old=$(jq .pid {books}); $vdisk recover {} >/dev/null 2>&1 & recover=$!
             pid=$old text=
             until [[ $pid != $old && $text = *'"{moment}":true'* ]]; do
                 kill -0 $recover 2>/dev/null || break
                 read -r text <{books} || true
                 [[ $text =~ \"pid\":([0-9]+) ]] && pid=${{BASH_REMATCH[1]}}
             done
             kill -KILL $pid 2>/dev/null || true; wait $recover || true"#,
            device.path
        ));
        wait_until("it is dead again", || lab.states() == ["dead"]);
        println!("{moment}: begun: {}", begun());
        if begun() {
            break;
        }
    }
    assert!(begun(), "no take-over was cut short when the driver knew of it");
    // Before Linux 6.15 an earlier one was the last, if the driver had been told of it.
    let last = lab.vdisk(&format!("recover {}", device.path));
    if last.status.success() {
        lab.sh(&format!("cmp -n 8388608 data {}", device.path));
    } else {
        let said = text(&last.stderr);
        assert!(begun() && said.contains("was cut short") && said.contains("detach"), "{said}");
    }
    drop(device);
    lab.sh("$vdisk recover disk.vmdk; qemu-img convert -O raw disk.vmdk raw; cmp -n 8388608 raw data");
    lab.assert_clean();
}

#[test]
fn sigterm_writes_back_and_removes_a_mounted_device_that_was_taken_over() {
    let Some(lab) = lab() else { return };
    lab.sh("echo 'I/O error|error, dev|EXT4-fs|lost async page write|Buffer I/O' >> ${VDISK_VM_ALLOW:-/dev/null}");
    lab.vmdk("disk.vmdk", "256M");
    let device = lab.attach("disk.vmdk");
    let disk = device.path.clone();
    lab.sh(&format!("mkfs.ext4 -q {disk}; mkdir mnt; mount {disk} mnt"));
    lab.kill();
    lab.recover(&disk);
    // Not synced: the end of the device does that.
    lab.sh("head -c 8M /dev/urandom >data; cp data mnt/data");
    lab.sh(&format!("pid={}; kill -TERM $pid; timeout 60 tail --pid=$pid -f /dev/null; umount mnt", device.pid()));
    wait_until("the node goes", || lab.sh("ls /dev/ublkc* 2>/dev/null || true").is_empty());
    drop(device);
    let device = lab.attach("disk.vmdk");
    lab.sh(&format!("mount {disk} mnt; cmp data mnt/data; umount mnt; e2fsck -fn {disk}"));
    device.detach();
    lab.assert_clean();
}
