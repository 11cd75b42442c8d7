//! `vdisk check` on images that programs which are not ours have written, whole and damaged.

#![allow(clippy::unwrap_used, reason = "a test fails by it")]

use std::path::Path;
use std::process::{Command, Output, Stdio};

fn run(dir: &Path, program: &str, args: &[&str]) -> Output {
    Command::new(program).args(args).current_dir(dir).stdin(Stdio::null()).output().unwrap()
}

fn qemu(dir: &Path, program: &str, args: &[&str]) {
    let output = run(dir, program, args);
    assert!(output.status.success(), "{program} {args:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// Exit status, standard output, standard error.
fn check(dir: &Path, args: &[&str]) -> (i32, String, String) {
    let output = run(dir, env!("CARGO_BIN_EXE_vdisk"), &[&["check"], args].concat());
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
    (output.status.code().unwrap(), text(&output.stdout), text(&output.stderr))
}

fn make(dir: &Path, name: &str, options: &str) {
    qemu(dir, "qemu-img", &["create", "-q", "-f", "vmdk", "-o", options, name, "200M"]);
    qemu(dir, "qemu-io", &["-f", "vmdk", "-c", "write -P 7 100k 300k", "-c", "write -P 9 150M 1M", name]);
}

fn patch(path: &Path, at: u64, bytes: &[u8]) {
    use std::os::unix::fs::FileExt;
    let file = std::fs::File::options().write(true).open(path).unwrap();
    file.write_all_at(bytes, at).unwrap();
}

#[test]
fn every_subformat_that_qemu_writes_is_clean() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    for format in ["monolithicSparse", "monolithicFlat", "twoGbMaxExtentSparse", "twoGbMaxExtentFlat"] {
        make(dir, &format!("{format}.vmdk"), &format!("subformat={format}"));
        let found = check(dir, &[&format!("{format}.vmdk")]);
        assert_eq!(found, (0, "no errors found\n".to_owned(), String::new()), "{format}");
    }
    make(dir, "zeroed.vmdk", "subformat=monolithicSparse,zeroed_grain=on");
    qemu(dir, "qemu-io", &["-f", "vmdk", "-c", "write -z 0 1M", "zeroed.vmdk"]);
    // qemu forgets the grains that it marks as zeroes.
    let (status, out, _) = check(dir, &["zeroed.vmdk"]);
    assert!(status == 0 && out.starts_with("no errors found\n"), "{out}");
    let stream = ["convert", "-O", "vmdk", "-o", "subformat=streamOptimized", "monolithicSparse.vmdk", "stream.vmdk"];
    qemu(dir, "qemu-img", &stream);
    assert_eq!(check(dir, &["stream.vmdk"]).0, 0);
    qemu(dir, "qemu-img", &["create", "-q", "-f", "vmdk", "-b", "monolithicSparse.vmdk", "-F", "vmdk", "child.vmdk"]);
    qemu(dir, "qemu-io", &["-f", "vmdk", "-c", "write 3M 1M", "child.vmdk"]);
    assert_eq!(check(dir, &["child.vmdk"]).0, 0);
}

#[test]
fn a_raw_image_has_nothing_to_check() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("disk.img"), [7; 4096]).unwrap();
    let (status, out, _) = check(dir.path(), &["disk.img"]);
    assert_eq!((status, out.as_str()), (0, "a raw image: there is nothing to check\n"));
}

#[test]
fn a_damaged_image_is_told_in_lines_and_in_json_and_by_the_exit_status() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    make(dir, "d.vmdk", "subformat=monolithicSparse");
    let image = dir.join("d.vmdk");
    // uncleanShutdown; and the first table's entry for the second grain, far past the end.
    let word = |at: u64| {
        use std::os::unix::fs::FileExt;
        let mut bytes = [0; 4];
        std::fs::File::open(&image).unwrap().read_exact_at(&mut bytes, at).unwrap();
        u64::from(u32::from_le_bytes(bytes))
    };
    let table = word(word(56) * 512) * 512;
    patch(&image, 72, &[1]);
    patch(&image, table + 4, &0x7000_0000_u32.to_le_bytes());
    let (status, out, err) = check(dir, &["d.vmdk"]);
    assert_eq!(status, 1, "{out}");
    let lines: Vec<&str> = out.lines().collect();
    assert_eq!(lines.len(), 4, "{out}");
    assert!(lines[0].starts_with("d.vmdk: byte 72: ") && lines[0].ends_with("(unclean)"), "{out}");
    assert!(
        lines[1].starts_with(&format!("d.vmdk: byte {}: ", table + 4)) && lines[1].ends_with("(copies_differ)"),
        "{out}"
    );
    assert!(lines[2].ends_with("past the end of the file (entry_past_end)"), "{out}");
    assert!(lines[3].starts_with("1 grains (64 KiB) of the file belong to nothing"), "{out}");
    assert_eq!(err, "vdisk: check d.vmdk: 3 errors found\n");

    let (status, out, err) = check(dir, &["--json", "d.vmdk"]);
    let report: serde_json::Value = serde_json::from_str(&out).unwrap();
    assert_eq!((status, report["clean"].as_bool(), report["repaired"].as_u64()), (1, Some(false), Some(0)), "{err}");
    let kinds: Vec<&str> = report["errors"].as_array().unwrap().iter().map(|e| e["kind"].as_str().unwrap()).collect();
    assert_eq!(kinds, ["unclean", "copies_differ", "entry_past_end"]);
    assert_eq!((report["leaked_grains"].as_u64(), report["errors"][0]["offset"].as_u64()), (Some(1), Some(72)));
}

#[test]
fn an_image_that_is_too_damaged_to_be_opened_is_one_error() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    make(dir, "d.vmdk", "subformat=monolithicSparse");
    patch(&dir.join("d.vmdk"), 73, b"\r\n");
    let (status, out, _) = check(dir, &["--json", "d.vmdk"]);
    let report: serde_json::Value = serde_json::from_str(&out).unwrap();
    assert_eq!((status, report["errors"][0]["kind"].as_str()), (1, Some("newline_bytes")), "{out}");
    make(dir, "flat.vmdk", "subformat=monolithicFlat");
    std::fs::File::options().write(true).open(dir.join("flat-flat.vmdk")).unwrap().set_len(1 << 20).unwrap();
    let (status, out, _) = check(dir, &["flat.vmdk"]);
    assert!(status == 1 && out.ends_with("(unreadable)\n"), "{out}");
}

#[test]
fn a_damaged_grain_of_a_stream_is_found() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    make(dir, "d.vmdk", "subformat=monolithicSparse");
    qemu(dir, "qemu-img", &["convert", "-O", "vmdk", "-o", "subformat=streamOptimized", "d.vmdk", "s.vmdk"]);
    let bytes = std::fs::read(dir.join("s.vmdk")).unwrap();
    let zlib = bytes.windows(2).position(|w| matches!(w, [0x78, 0x01 | 0x5e | 0x9c | 0xda])).unwrap();
    patch(&dir.join("s.vmdk"), zlib as u64 + 20, &[0x5a; 8]);
    let (status, out, _) = check(dir, &["s.vmdk"]);
    assert!(status == 1 && out.lines().all(|line| line.ends_with("(record)")), "{out}");
}

#[test]
fn what_is_not_there_or_in_use_is_no_matter_of_a_check() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let (status, out, err) = check(dir, &["--json", "no.vmdk"]);
    assert!(status == 1 && out.is_empty() && err.contains("No such file"), "{err}");
    make(dir, "d.vmdk", "subformat=monolithicSparse");
    let mut server = Command::new(env!("CARGO_BIN_EXE_vdisk"))
        .args(["serve", "d.vmdk", "--socket", "sock"])
        .current_dir(dir)
        .spawn()
        .unwrap();
    while !dir.join("sock").exists() {
        assert!(server.try_wait().unwrap().is_none());
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    let (status, out, err) = check(dir, &["d.vmdk"]);
    server.kill().unwrap();
    server.wait().unwrap();
    assert!(status == 1 && out.is_empty() && err.contains("end the other process"), "{out}{err}");
}
