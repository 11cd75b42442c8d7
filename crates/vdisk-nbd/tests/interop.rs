//! Programs that are not ours use the server. One that is not installed is a printed skip, and a failure in CI.
#![allow(clippy::unwrap_used, reason = "a test")]

mod support;

use std::path::Path;
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::thread;

use support::{Bytes, Memory};
use vdisk_nbd::{Export, Server, ServerOptions, stop_channel};

const SIZE: usize = 8 << 20;

/// Whether a program is there.
fn have(program: &str) -> bool {
    let there = Command::new(program).arg("--version").output().is_ok();
    assert!(there || std::env::var_os("CI").is_none(), "{program} is not installed");
    if !there {
        println!("skipped: {program} is not installed");
    }
    there
}

/// Serves memory while `client` runs with the export's URI and a directory for its files.
fn serve(bytes: &Bytes, client: impl FnOnce(&str, &Path)) {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("nbd.sock");
    let server = Server::bind(&ServerOptions { unix: Some(socket.clone()), workers: 2, ..Default::default() }).unwrap();
    let (stopper, stop) = stop_channel();
    let backend = || Ok(Memory::of(Arc::clone(bytes)));
    thread::scope(|scope| {
        let served = scope.spawn(|| server.run(&Export::new("disk").described_as("for tests"), backend, &stop));
        // Moved in, so that a failed client stops the server too.
        let stopper = stopper;
        client(&format!("nbd+unix:///disk?socket={}", socket.display()), dir.path());
        stopper.stop();
        served.join().unwrap().unwrap();
    });
    assert!(!socket.exists(), "the socket is removed at the end");
}

fn run(program: &str, args: &[&str]) -> String {
    let output = Command::new(program).args(args).output().unwrap();
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{program} {args:?}: {}\n{out}{err}", output.status);
    format!("{out}{err}")
}

/// Runs of zeroes and of other bytes.
fn pattern() -> Vec<u8> {
    (0..SIZE).map(|at| if at >> 16 & 1 == 0 { 0 } else { (at * 31 + (at >> 9)).to_be_bytes()[7] }).collect()
}

fn shared(bytes: Vec<u8>) -> Bytes {
    Arc::new(Mutex::new(bytes))
}

#[test]
fn nbdinfo_sees_the_export_as_it_is_described() {
    if !have("nbdinfo") {
        return;
    }
    serve(&shared(pattern()), |uri, _| {
        let json = run("nbdinfo", &["--json", uri]);
        for expected in [
            "\"protocol\": \"newstyle-fixed\"",
            "\"structured\": true",
            "\"export-name\": \"disk\"",
            "\"description\": \"for tests\"",
            "\"export-size\": 8388608",
            "\"is_read_only\": false",
            "\"can_df\": true",
            "\"can_flush\": true",
            "\"can_fua\": true",
            "\"can_multi_conn\": true",
            "\"can_trim\": true",
            "\"can_zero\": true",
            "\"block_size_minimum\": 1",
            "\"block_size_preferred\": 65536",
            "\"block_size_maximum\": 33554432",
        ] {
            assert!(json.contains(expected), "{expected} is not in {json}");
        }
        assert!(run("nbdinfo", &["--list", uri]).contains("export=\"disk\""));
        assert_eq!(run("nbdinfo", &["--size", uri]).trim(), SIZE.to_string());
    });
}

#[test]
fn nbdcopy_copies_out_and_in() {
    if !have("nbdcopy") {
        return;
    }
    let source = pattern();
    serve(&shared(source.clone()), |uri, dir| {
        let file = dir.join("out.raw");
        run("nbdcopy", &[uri, file.to_str().unwrap()]);
        assert!(std::fs::read(&file).unwrap() == source, "what came out differs");
        let target = shared(vec![0xff; SIZE]);
        serve(&target, |uri, _| {
            run("nbdcopy", &["--flush", file.to_str().unwrap(), uri]);
        });
        assert!(*target.lock().unwrap() == source, "what went in differs");
    });
}

#[test]
fn qemu_img_reads_converts_and_compares() {
    if !have("qemu-img") {
        return;
    }
    let source = pattern();
    serve(&shared(source.clone()), |uri, dir| {
        let info = run("qemu-img", &["info", "--output=json", "-f", "raw", uri]);
        assert!(info.contains("\"virtual-size\": 8388608"), "{info}");
        let file = dir.join("out.raw");
        let path = file.to_str().unwrap();
        run("qemu-img", &["convert", "-f", "raw", "-O", "raw", uri, path]);
        assert!(std::fs::read(&file).unwrap() == source, "what came out differs");
        let target = shared(vec![0xff; SIZE]);
        serve(&target, |uri, _| {
            run("qemu-img", &["convert", "-n", "-W", "-m", "8", "-f", "raw", "-O", "raw", path, uri]);
            run("qemu-img", &["compare", "-f", "raw", "-F", "raw", path, uri]);
        });
        assert!(*target.lock().unwrap() == source, "what went in differs");
    });
}

#[test]
fn qemu_io_sees_its_own_changes() {
    if !have("qemu-io") {
        return;
    }
    let bytes = shared(vec![0x11; SIZE]);
    serve(&bytes, |uri, _| {
        let told = run(
            "qemu-io",
            &[
                "-f",
                "raw",
                uri,
                "-c",
                "write -P 0x5a 1000 3000",
                "-c",
                "read -P 0x5a 1000 3000",
                "-c",
                "read -P 0x11 0 1000",
                "-c",
                "write -f -P 0x6b 64k 1M",
                "-c",
                "write -z 128k 64k",
                "-c",
                "write -z -u 512k 64k",
                "-c",
                "discard 256k 64k",
                "-c",
                "flush",
                "-c",
                "read -P 0 128k 64k",
                "-c",
                "read -P 0x6b 192k 64k",
            ],
        );
        assert!(!told.contains("failed") && !told.contains("rror"), "{told}");
    });
    let bytes = bytes.lock().unwrap();
    for (range, byte) in [
        (0..1000, 0x11),
        (1000..4000, 0x5a),
        (4000..65536, 0x11),
        (65536..131_072, 0x6b),
        (131_072..196_608, 0),
        (262_144..327_680, 0),
        (524_288..589_824, 0),
        (1_114_112..SIZE, 0x11),
    ] {
        assert!(bytes[range.clone()].iter().all(|b| *b == byte), "{range:?}");
    }
}

#[test]
fn fio_finds_what_it_wrote() {
    if !have("fio") {
        return;
    }
    if !run("fio", &["--enghelp"]).lines().any(|line| line.trim() == "nbd") {
        println!("skipped: this fio has no NBD engine");
        return;
    }
    serve(&shared(vec![0; SIZE]), |uri, dir| {
        let uri = format!("--uri={uri}");
        let aux = format!("--aux-path={}", dir.display());
        let told = run(
            "fio",
            &[
                "--name=verify",
                "--ioengine=nbd",
                &uri,
                &aux,
                "--rw=randwrite",
                "--bsrange=512-128k",
                "--size=8m",
                "--io_size=32m",
                "--iodepth=64",
                "--verify=crc32c",
                "--verify_fatal=1",
                "--randseed=7",
            ],
        );
        assert!(told.contains("err= 0"), "{told}");
    });
}
