//! The command line as scripts see it, as far as it goes without a block device.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that fails says so by a panic")]

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

fn vdisk(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_vdisk")).args(args).stdin(Stdio::null()).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

/// Checks exit status, an empty stdout and one line on stderr, which is the answer.
fn failure(args: &[&str], status: i32) -> String {
    let output = vdisk(args);
    let said = text(&output.stderr);
    assert_eq!(output.status.code(), Some(status), "{args:?}: {said}");
    assert_eq!(text(&output.stdout), "", "{args:?}");
    assert_eq!((said.lines().count(), said.ends_with('\n')), (1, true), "{args:?}: {said}");
    assert!(!said.contains("os error"), "{said}");
    said
}

fn is_root() -> bool {
    fs::metadata("/proc/self").is_ok_and(|m| std::os::unix::fs::MetadataExt::uid(&m) == 0)
}

fn has_ublk() -> bool {
    let module = || Command::new("modprobe").args(["--dry-run", "--quiet", "ublk_drv"]).status();
    Path::new("/dev/ublk-control").exists() || module().is_ok_and(|s| s.success())
}

/// Prints why a test is not run; under CI that is a failure.
fn skip(why: &str) {
    assert!(std::env::var_os("CI").is_none(), "{why}");
    eprintln!("skipped: {why}");
}

fn has(tool: &str) -> bool {
    let found = Command::new(tool).arg("--version").output().is_ok();
    if !found {
        skip(&format!("{tool} is missing"));
    }
    found
}

struct Scratch(tempfile::TempDir);

impl Scratch {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> String {
        self.0.path().join(name).to_str().unwrap().to_owned()
    }

    fn file(&self, name: &str, bytes: &[u8]) -> String {
        fs::write(self.path(name), bytes).unwrap();
        self.path(name)
    }

    /// Content of every file.
    fn contents(&self) -> Vec<(PathBuf, Option<Vec<u8>>)> {
        let mut all: Vec<_> = fs::read_dir(self.0.path())
            .unwrap()
            .map(|e| e.unwrap().path())
            .map(|p| (p.clone(), fs::read(p).ok()))
            .collect();
        all.sort();
        all
    }
}

/// A raw disk with something in it.
fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|n| u8::try_from((n / 512 * 7 + n) % 251).unwrap()).collect()
}

/// `vdisk serve`, listening.
struct Serve {
    child: Child,
    uri: String,
}

impl Serve {
    fn start(args: &[&str]) -> Self {
        Self::of(Command::new(env!("CARGO_BIN_EXE_vdisk")).arg("serve").args(args))
    }

    fn of(command: &mut Command) -> Self {
        let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stderr.as_mut().unwrap()).read_line(&mut line).unwrap();
        let uri = line.strip_prefix("vdisk: listening on ").unwrap_or_else(|| panic!("{line}")).trim_end().to_owned();
        Self { child, uri }
    }

    /// Sends a signal and expects a clean end.
    fn stop(mut self, signal: &str) {
        let sent = Command::new("kill").args([signal, &self.child.id().to_string()]).status().unwrap();
        assert!(sent.success());
        assert_eq!(self.child.wait().unwrap().code(), Some(0));
    }
}

impl Drop for Serve {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn succeed(program: &str, args: &[&str]) -> String {
    let output = Command::new(program).args(args).output().unwrap();
    assert!(output.status.success(), "{program} {args:?}: {}", String::from_utf8_lossy(&output.stderr));
    text(&output.stdout)
}

#[test]
fn every_verb_has_a_help_with_an_example() {
    for verb in ["attach", "detach", "list", "serve", "info", "map"] {
        let output = vdisk(&[verb, "--help"]);
        assert_eq!(output.status.code(), Some(0), "{verb}");
        assert!(text(&output.stdout).contains("Example"), "{verb}");
    }
    let help = text(&vdisk(&["--help"]).stdout);
    assert!(!help.contains("ready-pipe"), "{help}");
}

#[test]
fn usage_errors_exit_2() {
    for args in [
        &[][..],
        &["attach"],
        &["attach", "x", "--cache-size", "64Q"],
        &["attach", "x", "--transport", "iscsi"],
        &["attach", "x", "--ignore-parent-cid"],
        &["serve", "x", "--fuse", "f", "--socket", "s"],
        &["attach", "x", "--queues", "0"],
        &["detach"],
        &["detach", "x", "--all"],
        &["serve", "x"],
        &["serve", "x", "--listen", "127.0.0.1"],
        &["explode", "x"],
    ] {
        assert_eq!(vdisk(args).status.code(), Some(2), "{args:?}");
    }
}

#[test]
fn bad_input_is_one_line_with_the_file_and_what_to_do_and_changes_nothing() {
    let scratch = Scratch::new();
    let descriptor = "# Disk DescriptorFile\nversion=1\nCID=fffffffe\nparentCID=ffffffff\ncreateType=\"monolithicFlat\"\n\
        RW 2048 FLAT \"gone-flat.vmdk\" 0\n";
    let cases = [
        (scratch.path("missing.vmdk"), &["No such file", "check the name"][..]),
        (scratch.path(""), &["is a directory", "name the image file"]),
        (scratch.file("empty.img", b""), &["not an image"]),
        (scratch.file("other.img", &[b"QFI\xfb".as_slice(), &[0; 4092]].concat()), &["qcow2", "--format raw"]),
        (scratch.file("text.vmdk", &[b'x'; 4096]), &["neither a VMDK header nor a descriptor", "--format raw"]),
        (scratch.file("cut.vmdk", &[b"KDMV\x01\0\0\0".as_slice(), &[0; 292]].concat()), &["cut.vmdk"]),
        (scratch.file("gone.vmdk", descriptor.as_bytes()), &["gone-flat.vmdk", "No such file", "every file"]),
    ];
    let before = scratch.contents();
    let socket = scratch.path("s");
    for (image, expected) in &cases {
        let mut verbs = vec![
            vec!["info", image.as_str()],
            vec!["map", "--json", image.as_str()],
            vec!["serve", image, "--socket", &socket],
        ];
        if is_root() {
            verbs.push(vec!["attach", image]);
        }
        for args in verbs {
            let said = failure(&args, 1);
            assert!(said.starts_with(&format!("vdisk: {} {image}: ", args[0])), "{said}");
            for words in *expected {
                assert!(said.contains(words), "{words}: {said}");
            }
        }
    }
    assert_eq!(scratch.contents(), before);
}

#[test]
fn attach_over_a_transport_that_is_not_there_exits_3_and_leaves_nothing() {
    if !is_root() || has_ublk() {
        return skip("for root on a kernel without ublk");
    }
    let scratch = Scratch::new();
    let image = scratch.file("disk.img", &pattern(1 << 20));
    let left = || fs::read_dir("/run/vdisk").map_or(0, Iterator::count);
    let before = (left(), scratch.contents());
    for foreground in [false, true] {
        let mut args = vec!["attach", "--transport", "ublk", image.as_str()];
        args.extend(foreground.then_some("--foreground"));
        let said = failure(&args, 3);
        assert!(said.starts_with(&format!("vdisk: attach {image}: ")), "{said}");
        for words in ["no ublk in this kernel", "vdisk serve", "--transport auto"] {
            assert!(said.contains(words), "{said}");
        }
        assert_eq!((left(), scratch.contents()), before);
    }
}

#[test]
fn what_is_not_attached_cannot_be_detached() {
    if !is_root() {
        return skip("for root");
    }
    for what in ["/dev/null", "disk.vmdk"] {
        let said = failure(&["detach", what], 1);
        assert_eq!(said, format!("vdisk: detach {what}: is not attached (vdisk list shows what is)\n"));
    }
}

#[test]
fn an_empty_list_is_nothing_and_in_json_an_empty_array() {
    let is_state = |file: fs::DirEntry| file.path().extension().is_some_and(|e| e == "json");
    if fs::read_dir("/run/vdisk").is_ok_and(|files| files.flatten().any(is_state)) {
        return skip("vdisk is in use here");
    }
    assert_eq!(text(&vdisk(&["list"]).stdout), "");
    assert_eq!(text(&vdisk(&["list", "--json"]).stdout).trim(), "[]");
}

#[test]
fn info_of_a_raw_image() {
    let scratch = Scratch::new();
    let image = scratch.file("disk.img", &pattern(1 << 20));
    let output = vdisk(&["info", "--json", &image]);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    let info: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((&info["format"], &info["size"], &info["clean"]), (&"raw".into(), &(1 << 20).into(), &true.into()));
    assert_eq!((&info["parents"], info["extents"].as_array().unwrap().len()), (&serde_json::json!([]), 1));
    assert!(info["allocated"].as_u64().unwrap() >= 1 << 20);
    assert!(text(&vdisk(&["info", &image]).stdout).contains("1 MiB (1048576 bytes)"));
}

#[test]
fn info_of_a_vmdk() {
    if !has("qemu-img") {
        return;
    }
    let scratch = Scratch::new();
    let image = scratch.path("disk.vmdk");
    succeed("qemu-img", &["create", "-q", "-f", "vmdk", &image, "10M"]);
    let info: serde_json::Value = serde_json::from_slice(&vdisk(&["info", "--json", &image]).stdout).unwrap();
    for (field, value) in [("format", "vmdk"), ("subformat", "monolithicSparse")] {
        assert_eq!(info[field], value, "{info}");
    }
    assert_eq!((&info["size"], &info["grain_size"]), (&(10 << 20).into(), &(64 << 10).into()));
    assert_eq!((&info["extents"][0]["type"], &info["extents"][0]["access"]), (&"SPARSE".into(), &"RW".into()));
}

#[test]
fn serve_gives_the_bytes_of_a_raw_image_and_ends_with_sigterm() {
    if !has("nbdcopy") || !has("nbdinfo") {
        return;
    }
    let scratch = Scratch::new();
    let bytes = pattern(3 << 20);
    let image = scratch.file("disk.img", &bytes);
    let socket = scratch.path("a b.sock");
    let server = Serve::start(&[&image, "--read-only", "--socket", &socket]);
    assert_eq!(succeed("nbdinfo", &["--size", &server.uri]).trim(), (3 << 20).to_string());
    succeed("nbdcopy", &[&server.uri, &scratch.path("copy.img")]);
    assert!(fs::read(scratch.path("copy.img")).unwrap() == bytes);
    server.stop("-TERM");
    assert!(!Path::new(&socket).exists());
}

#[test]
fn what_is_written_to_a_served_vmdk_is_there_for_qemu_after_sigint() {
    if !has("nbdcopy") || !has("qemu-img") {
        return;
    }
    let scratch = Scratch::new();
    let (image, raw) = (scratch.path("disk.vmdk"), scratch.file("disk.img", &pattern(3 << 20)));
    succeed("qemu-img", &["create", "-q", "-f", "vmdk", &image, "3M"]);
    let server = Serve::start(&[&image, "--listen", "127.0.0.1:0"]);
    assert!(server.uri.starts_with("nbd://127.0.0.1:"), "{}", server.uri);
    succeed("nbdcopy", &[&raw, &server.uri]);
    server.stop("-INT");
    succeed("qemu-img", &["compare", "-f", "raw", "-F", "vmdk", &raw, &image]);
    let info: serde_json::Value = serde_json::from_slice(&vdisk(&["info", "--json", &image]).stdout).unwrap();
    assert_eq!(info["clean"], true);
}

#[test]
fn serve_ends_with_sighup_unless_it_was_started_to_ignore_it() {
    let scratch = Scratch::new();
    let image = scratch.file("disk.img", &pattern(1 << 20));
    // What runs the tests may itself have been started to ignore it.
    let mut plain = Command::new("env");
    plain.args(["--default-signal=HUP", env!("CARGO_BIN_EXE_vdisk"), "serve", &image, "--socket", &scratch.path("s")]);
    Serve::of(&mut plain).stop("-HUP");
    let nohup = format!("trap '' HUP; exec {} \"$@\"", env!("CARGO_BIN_EXE_vdisk"));
    let mut command = Command::new("sh");
    command.args(["-c", &nohup, "sh", "serve", &image, "--socket", &scratch.path("t")]);
    let mut server = Serve::of(&mut command);
    succeed("kill", &["-HUP", &server.child.id().to_string()]);
    std::thread::sleep(std::time::Duration::from_millis(200));
    assert!(server.child.try_wait().unwrap().is_none());
    server.stop("-TERM");
}

#[test]
fn an_image_in_use_is_refused_to_a_second_writer() {
    let scratch = Scratch::new();
    let image = scratch.file("disk.img", &pattern(1 << 20));
    let server = Serve::start(&[&image, "--socket", &scratch.path("s")]);
    let said = failure(&["serve", &image, "--socket", &scratch.path("t")], 1);
    assert!(said.contains("in use by another process") && said.contains("--read-only"), "{said}");
    server.stop("-TERM");
    assert!(!Path::new(&scratch.path("t")).exists());
}

#[test]
fn recover_of_a_device_that_is_not_ours_says_so() {
    let said = failure(&["recover", "/dev/ublkb999"], 1);
    assert!(said.starts_with("vdisk: recover /dev/ublkb999: is no device of vdisk"), "{said}");
}
