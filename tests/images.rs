//! Images against programs that are not ours, through `vdisk serve`: no device and no root is needed.

#![allow(clippy::unwrap_used, reason = "a test fails by it")]

use std::path::Path;
use std::process::{Command, Stdio};

/// Runs a script in a directory; its standard output. What fails fails the test, what is missing too: scripts/test installs it.
fn sh(dir: &Path, script: &str) -> String {
    let output = Command::new("timeout")
        .args(["300", "bash", "-euo", "pipefail", "-c", &format!("{HELPERS}{script}")])
        .current_dir(dir)
        .env("vdisk", env!("CARGO_BIN_EXE_vdisk"))
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(output.status.success(), "{script}\n{}\n{}{}", output.status, text(&output.stdout), text(&output.stderr));
    text(&output.stdout).trim_end().to_owned()
}

/// `serving IMAGE COMMAND...`: the command runs while the image is served at `$uri`; then the server must end well. `$options` are
/// the server's.
const HELPERS: &str = r#"
serving() {
    local image=$1 server
    shift
    "$vdisk" serve ${options:-} "$image" --socket sock 2>serve.log &
    server=$!
    until [ -S sock ]; do kill -0 $server || { cat serve.log; return 1; }; sleep 0.01; done
    uri='nbd+unix:///?socket=sock' "$@"
    kill $server
    wait $server || { cat serve.log; return 1; }
}
"#;

fn fixtures(dir: &Path, size: &str) -> Vec<String> {
    let make = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/make");
    sh(dir, &format!("{} . {size}", make.display())).lines().map(str::to_owned).collect()
}

/// How qemu-img is to read a fixture. It cannot read this VMFS descriptor, but the extent is the bytes of the disk.
fn for_qemu(image: &str) -> (&str, &str) {
    match image {
        "vmfs.vmdk" => ("vmfs-flat.vmdk", "raw"),
        "raw.img" => (image, "raw"),
        _ => (image, "vmdk"),
    }
}

#[test]
fn what_is_written_over_nbd_qemu_reads() {
    let dir = tempfile::tempdir().unwrap();
    for image in fixtures(dir.path(), "3G") {
        let (file, format) = for_qemu(&image);
        sh(
            dir.path(),
            &format!(
                r#"truncate -s 3G data
                for mib in 0 1 100 2046 2047 2048 3060; do
                    dd if=/dev/urandom of=data bs=1M seek=$mib count=3 conv=notrunc status=none
                done
                serving {image} nbdcopy data "nbd+unix:///?socket=sock"
                qemu-img compare -f raw -F {format} data {file}
                rm data"#
            ),
        );
        if image.contains("Sparse") {
            assert!(sh(dir.path(), &format!("qemu-img check {image}")).contains("No errors"), "{image}");
        }
    }
}

#[test]
fn what_qemu_writes_is_read_over_nbd_and_the_other_way_round_in_turns() {
    let dir = tempfile::tempdir().unwrap();
    for image in fixtures(dir.path(), "64M") {
        let (file, format) = for_qemu(&image);
        let mut io = String::new();
        for n in 0..200u64 {
            // Overlapping ranges of odd sizes all over the disk.
            let at = (n * 7_919_513 % (63 << 20)) & !511;
            let len = ((n * 104_729) % 200_000 + 512) & !511;
            let write = format!("write -P {} {at} {len}", n % 255 + 1);
            if n % 2 == 0 {
                io += &format!("qemu-io -f {format} -c '{write}' {file} >/dev/null\n");
            } else if n % 20 == 1 {
                let zero = if n % 40 == 1 { "write -z -u" } else { "discard" };
                io += &format!(
                    "serving {image} qemu-io -f raw -c '{write}' -c '{zero} {at} 65536' \"nbd+unix:///?socket=sock\" >/dev/null\n"
                );
            }
            if n % 50 == 1 {
                io += &format!(
                    "serving {image} nbdcopy \"nbd+unix:///?socket=sock\" seen; qemu-img compare -f raw -F {format} seen {file} >/dev/null; rm seen\n"
                );
            }
        }
        sh(dir.path(), &io);
    }
}

#[test]
fn nbdinfo_sees_what_the_server_can() {
    let dir = tempfile::tempdir().unwrap();
    let image = &fixtures(dir.path(), "64M")[0];
    let info = sh(dir.path(), &format!("serving {image} nbdinfo 'nbd+unix:///?socket=sock'"));
    for line in [
        "export-size: 67108864",
        "can_fua: true",
        "can_multi_conn: true",
        "can_trim: true",
        "can_zero: true",
        "block_size_preferred: 65536",
    ] {
        assert!(info.contains(line), "{line} is not in\n{info}");
    }
}

#[test]
fn a_stream_that_qemu_writes_is_read_over_nbd() {
    let dir = tempfile::tempdir().unwrap();
    // Noise, text, zeroes, a hole; a size that is no multiple of the grain; more than one grain table.
    sh(
        dir.path(),
        r#"truncate -s $((70 * 1024 * 1024 + 1536)) data
        dd if=/dev/urandom of=data bs=64k seek=3 count=20 conv=notrunc status=none
        seq 1000000 | dd of=data bs=1M seek=30 conv=notrunc status=none
        dd if=/dev/urandom of=data bs=512 seek=143300 count=63 conv=notrunc status=none
        qemu-img convert -f raw -O vmdk -o subformat=streamOptimized data stream.vmdk
        sha256sum stream.vmdk > before
        options=-r
        serving stream.vmdk nbdcopy "nbd+unix:///?socket=sock" seen
        cmp data seen
        for at in 0 196608 262143 31457281 73369088; do
            serving stream.vmdk qemu-io -r -f raw -c "read $at 512" -c "read $at 100" "nbd+unix:///?socket=sock" >/dev/null
        done
        sha256sum --quiet -c before"#,
    );
    let refused = sh(dir.path(), "\"$vdisk\" serve stream.vmdk --socket sock 2>&1 && exit 1; true");
    assert!(refused.lines().count() == 1 && refused.contains("--read-only"), "{refused}");
}

/// Runs as qemu-img prints them, less what it says otherwise.
fn runs(json: &str, normalise: impl Fn(&mut serde_json::Value)) -> Vec<serde_json::Value> {
    let mut runs: Vec<serde_json::Value> = serde_json::from_str(json).unwrap();
    runs.iter_mut().for_each(normalise);
    // What is the same now may have been printed as several runs.
    runs.dedup_by(|next, run| {
        let end = |field: &str| run[field].as_u64().map(|n| n + run["length"].as_u64().unwrap());
        let goes_on = end("start") == next["start"].as_u64()
            && end("offset") == next["offset"].as_u64()
            && ["depth", "data", "zero", "present", "compressed"].iter().all(|field| run[*field] == next[*field]);
        if goes_on {
            run["length"] = (run["length"].as_u64().unwrap() + next["length"].as_u64().unwrap()).into();
        }
        goes_on
    });
    runs
}

#[test]
fn a_map_says_what_qemu_img_says() {
    let dir = tempfile::tempdir().unwrap();
    let images = fixtures(dir.path(), "96M");
    // Whole grains, so that the host has no hole in one: near the ends, on both sides of the middle, in and out of order.
    let mut written = String::new();
    for image in images.iter().filter(|image| *image != "vmfs.vmdk") {
        let (file, format) = for_qemu(image);
        written += &format!(
            "qemu-io -f {format} -c 'write 0 64k' -c 'write -P 3 40M 16M' -c 'write 20M 128k' -c 'write 19M 1M' \
                -c 'write 100597760 64k' {file} >/dev/null\n"
        );
    }
    sh(
        dir.path(),
        &format!(
            r#"{written}
            qemu-img create -q -f vmdk -b monolithicSparse.vmdk -F vmdk middle.vmdk
            qemu-io -f vmdk -c 'write -P 7 41M 192k' -c 'write 60M 64k' middle.vmdk >/dev/null
            qemu-img create -q -f vmdk -b middle.vmdk -F vmdk top.vmdk
            qemu-io -f vmdk -c 'write -P 9 42991616 64k' -c 'write 70M 1M' top.vmdk >/dev/null
            qemu-img create -q -f vmdk -o zeroed_grain=on,backing_file=middle.vmdk,backing_fmt=vmdk zeroed.vmdk
            qemu-io -f vmdk -c 'write -z 41M 128k' -c 'write 50M 64k' zeroed.vmdk >/dev/null
            qemu-img convert -O vmdk -o subformat=streamOptimized monolithicSparse.vmdk stream.vmdk"#
        ),
    );
    let made = ["middle.vmdk", "top.vmdk", "zeroed.vmdk", "stream.vmdk"].map(str::to_owned);
    for image in images.iter().chain(&made).filter(|image| *image != "vmfs.vmdk") {
        let (file, format) = for_qemu(image);
        let theirs = sh(dir.path(), &format!("qemu-img map --output=json -U -f {format} {file}"));
        let theirs = runs(&theirs, |_| {});
        let ours = sh(dir.path(), &format!("\"$vdisk\" map --json {image}"));
        let ours = runs(&ours, |run| {
            // Older versions of qemu-img name no files, and the path is ours.
            run.as_object_mut().unwrap().remove("file");
            // A hole of the host in a flat extent: qemu-img has it as data and zero at once, in a raw image as we do.
            if format == "vmdk" && run["zero"] == true && run["offset"].is_u64() {
                run["data"] = true.into();
            }
        });
        assert_eq!(ours, theirs, "{image}");
    }
    let flat = sh(dir.path(), "\"$vdisk\" map monolithicFlat.vmdk");
    let words = |line: &str| line.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
    let lines: Vec<_> = flat.lines().map(words).collect();
    assert_eq!(lines[0], ["START", "LENGTH", "DEPTH", "WHAT", "FILE", "OFFSET"]);
    assert_eq!(lines[1][..4], ["0", "65536", "0", "data"]);
    assert!(lines[1][4].ends_with("/monolithicFlat-flat.vmdk") && lines[1][5] == "0", "{flat}");
    assert_eq!(lines[2][3], "zero");
    let widths: Vec<_> = flat.lines().map(|line| line.find("monolithic")).skip(1).collect();
    assert!(widths.iter().all(|at| *at == widths[0]), "{flat}");
}

#[test]
fn a_map_of_64_tib_is_there_at_once_and_its_reader_may_go() {
    let dir = tempfile::tempdir().unwrap();
    let map = sh(
        dir.path(),
        r#"qemu-img create -q -f vmdk disk.vmdk 64T
        qemu-io -f vmdk -c 'write 40T 64k' disk.vmdk >/dev/null
        timeout 60 "$vdisk" map disk.vmdk"#,
    );
    let starts: Vec<_> = map.lines().map(|line| line.split_whitespace().next().unwrap()).collect();
    assert_eq!(starts, ["START", "0", "43980465111040", "43980465176576"]);
    // More than a pipe holds.
    let left = sh(
        dir.path(),
        r#"truncate -s 64M raw
        for ((n = 0; n < 64 << 20; n += 8192)); do echo "write $n 4096"; done | qemu-io -f raw raw >/dev/null
        [ "$("$vdisk" map --format raw --json raw | wc -l)" = 16384 ]
        { "$vdisk" map --format raw --json raw; echo "status $?" >status; } 2>&1 | head -c 1
        cat status"#,
    );
    assert_eq!(left, "[status 0");
}

/// A stream that VMware wrote, read over NBD; `VDISK_SAMPLES` names the folder.
fn sample_reads_as(name: &str, sum: &str) {
    let Some(folder) = std::env::var_os("VDISK_SAMPLES") else {
        println!("skipped: VDISK_SAMPLES is not set, {name} not read");
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    std::fs::copy(Path::new(&folder).join(name), dir.path().join(name)).unwrap();
    let read = format!("options=-r; serving {name} nbdcopy 'nbd+unix:///?socket=sock' - | sha256sum");
    assert_eq!(sh(dir.path(), &read), format!("{sum}  -"), "{name}");
}

#[test]
fn a_stream_that_vmware_wrote_reads_as_its_disk() {
    let sum = "a3bcf05f07a1c06a3380eeca8571f0efb2b85afafa1e21662b8cad436d1f7727";
    sample_reads_as("vmware-streamOptimized.vmdk", sum);
}

#[test]
#[ignore = "16 GiB through sha256sum: cargo test --release --test images -- --ignored"]
fn a_stream_of_16_gib_that_vmware_wrote_reads_as_its_disk() {
    let sum = "0859bb3397bc1d30fa979c80a289ce98bfd6c1141a64594d6f3cc8cd68218faf";
    sample_reads_as("vmware-streamOptimized-v3.vmdk", sum);
}
