//! `vdisk serve --fuse`: the disk as a plain file, judged by programs that know nothing of vdisk.

#![allow(clippy::unwrap_used, reason = "a test fails by it")]

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::{Command, Output, Stdio};

/// A directory, and a shell that runs in it as a user who is not root.
struct Lab(tempfile::TempDir);

impl Lab {
    /// `None` where there is no FUSE.
    fn new() -> Option<Self> {
        if !Path::new("/dev/fuse").exists() {
            eprintln!("skipped: this machine has no /dev/fuse");
            return None;
        }
        let lab = Self(tempfile::tempdir().unwrap());
        // Where the user of the tests has no home to go through.
        std::fs::copy(env!("CARGO_BIN_EXE_vdisk"), lab.0.path().join("vdisk")).unwrap();
        if is_root() {
            succeed(Command::new("chmod").arg("777").arg(lab.0.path()));
        }
        Some(lab)
    }

    fn command(&self, script: &str) -> Command {
        let mut command = Command::new("timeout");
        command.args(["--kill-after=5", "120"]);
        if is_root() {
            command.args(["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]);
        }
        command.args(["bash", "-euo", "pipefail", "-c", script]).current_dir(self.0.path()).stdin(Stdio::null());
        // Functions that every script may use.
        command.env("BASH_ENV", self.0.path().join("functions"));
        command
    }

    fn try_sh(&self, script: &str) -> Output {
        let functions = "serve() { ./vdisk serve \"$@\" 2>serve.log & server=$!
                for n in {1..500}; do grep -q '^vdisk: serving' serve.log && return; kill -0 $server || break; sleep 0.02; done
                cat serve.log >&2; return 1; }
            finish() { kill $server; wait $server; }
            fails() { if \"$@\"; then echo \"did not fail: $*\" >&2; return 1; fi; }";
        std::fs::write(self.0.path().join("functions"), functions).unwrap();
        self.command(script).output().unwrap()
    }

    fn sh(&self, script: &str) -> String {
        let output = self.try_sh(script);
        let (out, err) = (text(&output.stdout), text(&output.stderr));
        assert!(output.status.success(), "{script}\n{}\nstdout: {out}\nstderr: {err}", output.status);
        out.trim_end().to_owned()
    }
}

fn is_root() -> bool {
    std::fs::metadata("/proc/self").is_ok_and(|m| m.uid() == 0)
}

fn succeed(command: &mut Command) {
    assert!(command.status().unwrap().success(), "{command:?}");
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
fn without_root_the_file_is_the_disk_byte_for_byte_and_goes_when_the_server_does() {
    let Some(lab) = Lab::new() else { return };
    lab.sh("qemu-img create -q -f vmdk disk.vmdk 100M
            qemu-io -c 'write -P 1 0 64k' -c 'write -P 2 30M 3M' -c 'write -P 3 104857088 512' disk.vmdk >/dev/null
            qemu-img convert -O raw disk.vmdk raw
            serve disk.vmdk --fuse view
            cmp view raw && test $(sha256sum <view | cut -c-64) = $(sha256sum <raw | cut -c-64)
            test $(stat -c %s:%a:%u view) = 104857600:600:$(id -u)
            finish; test ! -e view; qemu-img check disk.vmdk");
}

#[test]
fn what_is_written_to_the_file_is_in_the_image_and_holes_give_space_back() {
    let Some(lab) = Lab::new() else { return };
    lab.sh("qemu-img create -q -f vmdk disk.vmdk 64M; serve disk.vmdk --fuse view
            head -c 20000000 /dev/urandom >data; dd if=data of=view bs=100003 seek=1 conv=notrunc,fsync status=none
            test $(du -k disk.vmdk | cut -f1) -gt 19000; test $(du -k view | cut -f1) -gt 19000
            fallocate -p -o 0 -l 10M view; sync view; test $(du -k disk.vmdk | cut -f1) -lt 10500
            cmp -n 10485760 view /dev/zero; fallocate -z -o 12M -l 1M view; cmp -i 12582912 -n 1048576 view /dev/zero
            finish; qemu-img check -q disk.vmdk; qemu-img convert -O raw disk.vmdk raw
            (head -c 100003 /dev/zero; cat data) >expected
            cmp -i 10485760 -n 2097152 expected raw; cmp -i 13631488 -n 6468515 expected raw
            cmp -n 10485760 raw /dev/zero");
}

#[test]
fn holes_are_told_from_data() {
    let Some(lab) = Lab::new() else { return };
    let map = lab.sh("qemu-img create -q -f vmdk disk.vmdk 64M
            qemu-io -c 'write -P 1 1M 1M' -c 'write -P 2 40M 64k' disk.vmdk >/dev/null
            serve disk.vmdk --fuse view; qemu-img map --output=json -f raw view; finish");
    let map: serde_json::Value = serde_json::from_str(&map).unwrap();
    let data = map.as_array().unwrap().iter().filter(|run| run["data"] == true);
    let data: Vec<_> = data.map(|run| (run["start"].as_u64().unwrap(), run["length"].as_u64().unwrap())).collect();
    assert_eq!(data, [(1 << 20, 1 << 20), (40 << 20, 64 << 10)]);
}

#[test]
fn the_size_is_fixed_and_the_end_is_the_end() {
    let Some(lab) = Lab::new() else { return };
    lab.sh("truncate -s 1M disk.img; serve disk.img --fuse view
            fails truncate -s 2M view 2>said; grep -q 'not permitted' said
            fails dd if=/dev/zero of=view bs=64k seek=15 count=2 conv=notrunc 2>said; grep -q 'No space left' said
            test $(stat -c %s view) = 1048576; touch view; finish");
}

#[test]
fn a_read_only_view_refuses_writes() {
    let Some(lab) = Lab::new() else { return };
    lab.sh("truncate -s 1M disk.img; serve -r disk.img --fuse view
            fails dd if=vdisk of=view bs=512 count=1 conv=notrunc 2>/dev/null; test $(stat -c %a view) = 400; cmp view disk.img; finish");
}

#[test]
fn many_readers_and_writers_at_once_get_their_own_bytes() {
    let Some(lab) = Lab::new() else { return };
    lab.sh("qemu-img create -q -f vmdk disk.vmdk 256M; serve disk.vmdk --fuse view
            for direct in 0 1; do
                fio --name=v --filename=view --rw=randrw --bs=4k --size=64m --offset_increment=64m --numjobs=4 --ioengine=io_uring \\
                    --iodepth=16 --direct=$direct --io_size=8m --verify=crc32c --verify_fatal=1 >fio.log 2>&1 || { cat fio.log; exit 1; }
            done
            finish; qemu-img check disk.vmdk");
}

#[test]
fn sigterm_while_the_file_is_open_flushes_and_ends() {
    let Some(lab) = Lab::new() else { return };
    lab.sh("qemu-img create -q -f vmdk disk.vmdk 64M; serve disk.vmdk --fuse view
            exec 7<>view; head -c 1048576 /dev/urandom >data; cat data >&7
            finish; fails head -c 1 <&7 >/dev/null 2>&1
            qemu-img check -q disk.vmdk; qemu-img convert -O raw disk.vmdk raw; cmp -n 1048576 raw data
            test $(od -An -tu1 -j72 -N1 disk.vmdk) = 0; test ! -e view");
}

#[test]
fn unmounting_the_file_ends_the_server() {
    let Some(lab) = Lab::new() else { return };
    lab.sh("truncate -s 1M disk.img; serve disk.img --fuse view; fusermount3 -u view; wait $server; test ! -e view");
}

#[test]
fn a_killed_server_leaves_a_mount_of_which_the_next_one_says_what_to_do() {
    let Some(lab) = Lab::new() else { return };
    lab.sh("truncate -s 1M disk.img; serve disk.img --fuse view; kill -KILL $server; wait $server || true
            fails ./vdisk serve disk.img --fuse view 2>said; grep -q 'fusermount3 -u' said; test $(wc -l <said) = 1
            fusermount3 -u view; serve disk.img --fuse view; cmp view disk.img; finish");
}

#[test]
fn what_is_mapped_and_changed_is_written_before_the_file_goes() {
    let Some(lab) = Lab::new() else { return };
    lab.sh("qemu-img create -q -f vmdk disk.vmdk 64M; serve disk.vmdk --fuse view
            python3 -c '
import mmap, os, sys
m = mmap.mmap(os.open(\"view\", os.O_RDWR), 32 << 20)
for n in range(0, 32 << 20, 4096): m[n:n + 8] = n.to_bytes(8, \"little\")
os.kill(int(sys.argv[1]), 15)
' $server; wait $server
            qemu-img convert -O raw disk.vmdk raw; python3 -c '
bytes = open(\"raw\", \"rb\").read()
assert all(bytes[n:n + 8] == n.to_bytes(8, \"little\") for n in range(0, 32 << 20, 4096))'");
}

#[test]
fn a_file_that_is_not_the_servers_is_not_removed_and_a_mount_is_not_stacked() {
    let Some(lab) = Lab::new() else { return };
    lab.sh("truncate -s 1M disk.img other.img; serve disk.img --fuse view; first=$server
            fails ./vdisk serve other.img --fuse view 2>said; grep -q 'mount point already' said
            kill -STOP $first; fusermount3 -uz view; rm view; echo mine >view; kill -CONT $first; wait $first
            test $(cat view) = mine");
}

#[test]
fn a_hole_behind_the_end_is_nothing() {
    let Some(lab) = Lab::new() else { return };
    lab.sh("truncate -s 1M disk.img; serve disk.img --fuse view; fallocate -p -o 2M -l 1M view; fallocate -p -o 1020K -l 8K view
            fails fallocate -z -o 1020K -l 8K view 2>/dev/null; finish");
}

#[test]
fn a_bad_place_gets_one_line_and_leaves_nothing() {
    let Some(lab) = Lab::new() else { return };
    lab.sh("truncate -s 1M disk.img; mkdir dir; mkfifo fifo; echo mine >file");
    let own = ("disk.img", "is a file of the image");
    for (place, expected) in
        [("dir", "is a directory"), ("fifo", "no regular file"), ("nowhere/view", "No such file"), own]
    {
        let output = lab.try_sh(&format!("./vdisk serve disk.img --fuse {place}"));
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert!(said.lines().count() == 1 && said.contains(place) && said.contains(expected), "{said}");
    }
    // What was there before is there afterwards.
    lab.sh("serve disk.img --fuse file; cmp file disk.img; finish; test $(cat file) = mine");
}
