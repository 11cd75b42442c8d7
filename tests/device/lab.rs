//! What the tests share: a scratch directory, a shell, and devices that are gone when the test is.

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

pub(crate) const VDISK: &str = env!("CARGO_BIN_EXE_vdisk");

/// The transport under test: `ublk`, `nbd` or `fuse`.
pub(crate) fn transport() -> String {
    std::env::var("VDISK_TRANSPORT")
        .expect("VDISK_TRANSPORT names the transport to test: see tests/vm/run and tests/device/native")
}

/// Options of attach that make up the mode under test, if it is not the default one.
fn mode() -> String {
    std::env::var("VDISK_MODE").unwrap_or_default()
}

/// A directory of the test's own on a file system that punches holes.
pub(crate) struct Lab(tempfile::TempDir, Instant);

impl Lab {
    pub(crate) fn new() -> Self {
        let scratch = std::env::var_os("VDISK_SCRATCH").map_or_else(std::env::temp_dir, PathBuf::from);
        Self(tempfile::tempdir_in(scratch).unwrap(), Instant::now())
    }

    pub(crate) fn path(&self) -> &Path {
        self.0.path()
    }

    /// Runs a script in the directory; its standard output. A command that fails fails the test.
    pub(crate) fn sh(&self, script: &str) -> String {
        let output = self.try_sh(script);
        let (out, err) = (text(&output.stdout), text(&output.stderr));
        assert!(output.status.success(), "{script}\n{}\nstdout: {out}\nstderr: {err}", output.status);
        out.trim_end().to_owned()
    }

    /// As [`Lab::sh`], but it may fail.
    pub(crate) fn try_sh(&self, script: &str) -> Output {
        // What hangs fails, and says where: a hung task's trace is in the kernel's log by then.
        let mut bash = Command::new("timeout");
        bash.args(["--kill-after=5", "300", "bash", "-euo", "pipefail", "-c", script])
            .current_dir(self.path())
            .env("vdisk", VDISK)
            // There is no udev in a VM: dmsetup makes the nodes itself.
            .env("DM_DISABLE_UDEV", "1")
            .stdin(Stdio::null());
        bash.output().unwrap()
    }

    /// Makes the images of `fixtures/make`; their names.
    pub(crate) fn fixtures(&self, size: &str) -> Vec<String> {
        let make = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/make");
        self.sh(&format!("{} . {size}", make.display())).lines().map(str::to_owned).collect()
    }

    /// Makes an empty monolithicSparse image.
    pub(crate) fn vmdk(&self, name: &str, size: &str) {
        self.sh(&format!("qemu-img create -q -f vmdk {name} {size}"));
    }

    /// `vdisk ARGS` in the directory.
    pub(crate) fn vdisk(&self, args: &str) -> Output {
        self.try_sh(&format!("$vdisk {args}"))
    }

    /// Attaches over the transport under test, in the mode under test.
    pub(crate) fn attach(&self, args: &str) -> Device<'_> {
        self.attach_as(&format!("--transport {} {} {args}", transport(), mode()))
    }

    /// Attaches with just these arguments.
    pub(crate) fn attach_as(&self, args: &str) -> Device<'_> {
        self.attach_in("", args)
    }

    /// Attaches over the transport under test, and has every request logged.
    pub(crate) fn attach_traced(&self, args: &str) -> Device<'_> {
        self.attach_in("VDISK_LOG=trace", &format!("--transport {} {} {args}", transport(), mode()))
    }

    fn attach_in(&self, environment: &str, args: &str) -> Device<'_> {
        let output = self.try_sh(&format!("{environment} $vdisk attach {args}"));
        let (path, said) = (text(&output.stdout), text(&output.stderr));
        assert!(output.status.success(), "attach {args}: {said}");
        assert_eq!(path.lines().count(), 1, "the device path alone on stdout: {path:?}");
        Device { lab: self, path: path.trim_end().to_owned(), said, attached: true }
    }

    /// Partitions a disk by a script. A kernel without the format of the table is told of the partitions by partx.
    pub(crate) fn partition(&self, disk: &str, script: &str) {
        self.sh(&format!("{script}; test -b {disk}p1 || partx --add {disk}; udevadm settle 2>/dev/null || true"));
    }

    /// Whether this kernel mounts a file system.
    pub(crate) fn mounts(&self, file_system: &str) -> bool {
        self.try_sh(&format!("modprobe -q {file_system}; grep -qw {file_system} /proc/filesystems")).status.success()
    }

    /// Bytes that the image's files take on the host.
    pub(crate) fn space(&self, files: &str) -> u64 {
        let kib = self.sh(&format!("sync; du -ck {files} | tail -n1 | cut -f1"));
        kib.parse::<u64>().unwrap() * 1024
    }

    /// Whether the device mapper and one of its targets are there. In a VM they have to be.
    pub(crate) fn has_device_mapper(&self, target: &str) -> bool {
        let there = self
            .try_sh(&format!("modprobe -aq dm-mod dm-{target} || true; dmsetup targets | grep -qw ^{target}"))
            .status
            .success();
        assert!(there || std::env::var_os("VDISK_VM").is_none(), "no dm-{target}, or no dmsetup");
        if !there {
            println!("skipped: this kernel has no dm-{target}");
        }
        there
    }

    /// Says that the kernel will speak of failed I/O, on purpose.
    pub(crate) fn allow_errors(&self) {
        self.sh("echo 'I/O error|lost async page write|Other side returned error|critical .* error|EXT4-fs warning' >> ${VDISK_VM_ALLOW:-/dev/null}");
    }

    pub(crate) fn sha256(&self, file: &str) -> String {
        self.sh(&format!("sha256sum < {file}"))
    }

    /// What `qemu-img convert` makes of an image.
    pub(crate) fn qemu_sha256(&self, image: &str) -> String {
        self.sh(&format!("qemu-img convert -U -O raw {image} qemu.raw"));
        let sum = self.sha256("qemu.raw");
        self.sh("rm qemu.raw");
        sum
    }
}

impl Drop for Lab {
    /// Under an emulated processor it matters where the time goes.
    fn drop(&mut self) {
        println!("took {:.1} s", self.1.elapsed().as_secs_f32());
    }
}

/// An attached image.
pub(crate) struct Device<'a> {
    lab: &'a Lab,
    pub(crate) path: String,
    /// What `attach` said on stderr.
    pub(crate) said: String,
    attached: bool,
}

impl Device<'_> {
    /// `/dev/ublkb0p1`, `/dev/nbd0p1`, `/dev/loop0p1`
    pub(crate) fn part(&self, n: u32) -> String {
        format!("{}p{n}", self.path)
    }

    pub(crate) fn detach(mut self) {
        self.attached = false;
        let output = self.lab.vdisk(&format!("detach {}", self.path));
        assert!(output.status.success(), "detach {}: {}", self.path, text(&output.stderr));
        assert_eq!(text(&output.stdout) + &text(&output.stderr), "", "detach says nothing when it succeeds");
    }

    /// The pid of the serving process.
    pub(crate) fn pid(&self) -> u32 {
        listed(self.lab).iter().find(|d| d["device"] == *self.path).expect("listed")["pid"].as_u64().unwrap() as u32
    }
}

impl Drop for Device<'_> {
    fn drop(&mut self) {
        if self.attached {
            let output = self.lab.vdisk(&format!("detach --force {}", self.path));
            eprintln!("{}", text(&output.stderr));
        }
    }
}

/// A number that an environment variable sets.
pub(crate) fn setting(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|e| panic!("{name}: {e}")))
}

/// Numbers that look random: splitmix64.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    /// From `VDISK_SEED`, or the time; printed.
    pub(crate) fn seeded() -> Self {
        let now = || std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_nanos() as u64;
        let seed = setting("VDISK_SEED").unwrap_or_else(now);
        println!("VDISK_SEED={seed}");
        Self(seed)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    pub(crate) fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }
}

/// `vdisk list --json`
pub(crate) fn listed(lab: &Lab) -> Vec<serde_json::Value> {
    serde_json::from_str(&lab.sh("$vdisk list --json")).expect("one JSON document")
}

/// Checks that nothing is left: no state file, no serving process, no block device with something behind it.
pub(crate) fn assert_nothing_left(lab: &Lab) {
    assert_eq!(listed(lab), [serde_json::Value::Null; 0]);
    assert_eq!(lab.sh("ls -A --ignore ledgers /run/vdisk 2>/dev/null || true"), "", "state files");
    assert_eq!(lab.sh(&format!("pgrep -fa '^({VDISK}|vdisk --ready-pipe) (attach|recover)' || true")), "", "processes");
    assert_eq!(lab.sh("ls -d /dev/ublkb* /dev/ublkc* 2>/dev/null || true"), "", "nodes");
    assert_eq!(lab.sh("cat /sys/block/nbd*/size 2>/dev/null | grep -v '^0$' || true"), "", "nbd devices in use");
    assert_eq!(lab.sh("ls -d /dev/nbd*p* 2>/dev/null || true"), "", "nbd partitions");
    assert_eq!(lab.sh("grep -H '/vdisk ' /sys/block/loop*/loop/backing_file || true"), "", "loop devices");
}

/// Waits for something that another process does, and fails after a while.
pub(crate) fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(60);
    while !done() {
        assert!(Instant::now() < end, "waited in vain: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

pub(crate) fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}
