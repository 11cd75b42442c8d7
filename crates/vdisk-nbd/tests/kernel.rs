//! The kernel's client, on a real kernel: needs root and the nbd module. `tests/vm/run` builds it (feature `device-tests`) and runs it
//! in VMs, one test at a time.
#![allow(clippy::unwrap_used, reason = "a test")]

mod support;

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use support::{Bytes, Memory};
use vdisk_image::Op;
use vdisk_nbd::kernel::{AttachError, AttachOptions, Device, attach, backend_id, disconnect, forget_partitions};
use vdisk_nbd::{Stopper, stop_channel};

/// Set for the process that is to be killed.
const VICTIM: &str = "VDISK_NBD_VICTIM";

struct Attached {
    stopper: Option<Stopper>,
    served: JoinHandle<Result<(), AttachError>>,
    device: Device,
}

/// 1 MiB with a partition of 32 KiB in it.
fn disk() -> Bytes {
    let mut bytes = vec![0; 1 << 20];
    bytes[446..462].copy_from_slice(&[0, 0, 2, 0, 0x83, 0, 3, 0, 64, 0, 0, 0, 64, 0, 0, 0]);
    bytes[510..512].copy_from_slice(&[0x55, 0xaa]);
    Arc::new(Mutex::new(bytes))
}

/// Attaches a disk whose writes take so long.
fn attached(options: AttachOptions, slow: Duration) -> Attached {
    let bytes = disk();
    let backend = move || {
        Ok(Memory::of(Arc::clone(&bytes)).before(move |request| async move {
            if request.op() == Op::Write {
                tokio::time::sleep(slow).await;
            }
            Ok(())
        }))
    };
    let (stopper, stop) = stop_channel();
    let (tell, told): (_, Receiver<Device>) = mpsc::channel();
    let mut first = None;
    let served = thread::spawn(move || {
        let connected = |index: u32, path: &Path| first = Some((index, path.to_owned()));
        let ready = |device: &Device| tell.send(device.clone()).unwrap();
        let served = attach(&options, backend, &stop, connected, ready);
        assert!(first.is_some());
        served
    });
    Attached { stopper: Some(stopper), served, device: told.recv().unwrap() }
}

impl Attached {
    fn end(mut self) -> (Result<(), AttachError>, Duration) {
        drop(self.stopper.take());
        self.wait()
    }

    fn wait(self) -> (Result<(), AttachError>, Duration) {
        let started = Instant::now();
        (self.served.join().unwrap(), started.elapsed())
    }
}

fn size(index: u32) -> String {
    fs::read_to_string(format!("/sys/block/nbd{index}/size")).unwrap().trim().to_owned()
}

fn nodes(index: u32) -> usize {
    (1..16).filter(|p| Path::new(&format!("/dev/nbd{index}p{p}")).exists()).count()
}

#[test]
fn a_detach_waits_for_nobody_who_has_the_device_open() {
    let attached = attached(AttachOptions::new("vdisk test"), Duration::ZERO);
    let index = attached.device.index;
    assert_eq!(attached.device.partitions.len(), 1);
    assert_eq!(nodes(index), 1);
    assert_eq!(fs::read_to_string(format!("/sys/block/nbd{index}/backend")).unwrap().trim(), backend_id("vdisk test"));
    let claim = OpenOptions::new().read(true).custom_flags(nix::libc::O_EXCL).open(&attached.device.path).unwrap();
    let (served, took) = attached.end();
    served.unwrap();
    println!("a held device: {took:?}");
    assert!(took < Duration::from_secs(1), "{took:?}");
    assert_eq!(nodes(index), 0);
    drop(claim);
    assert_eq!((size(index).as_str(), nodes(index)), ("0", 0));

    // Nobody has it open, or a partition of it.
    let attached = self::attached(AttachOptions::new("vdisk test"), Duration::ZERO);
    let index = attached.device.index;
    let part = File::open(format!("/dev/nbd{index}p1")).unwrap();
    drop(part);
    let (served, took) = attached.end();
    served.unwrap();
    println!("a free device: {took:?}");
    assert_eq!((size(index).as_str(), nodes(index)), ("0", 0));
}

#[test]
fn a_device_that_somebody_disconnects_is_no_failure_even_in_use() {
    for busy in [false, true] {
        let attached = attached(AttachOptions::new("vdisk test"), Duration::from_millis(500));
        let index = attached.device.index;
        let file = OpenOptions::new().write(true).open(&attached.device.path).unwrap();
        let writer = file.try_clone().unwrap();
        let writes = thread::spawn(move || {
            if busy {
                let _ = writer.write_all_at(&[1; 65536], 65536).and_then(|()| writer.sync_all());
            }
        });
        thread::sleep(Duration::from_millis(200));
        disconnect(index).unwrap();
        let (served, took) = attached.wait();
        served.unwrap();
        println!("disconnected, busy {busy}: {took:?}");
        writes.join().unwrap();
        drop(file);
        forget_partitions(index).unwrap();
        assert_eq!((size(index).as_str(), nodes(index)), ("0", 0));
    }
}

#[test]
fn a_device_that_the_kernel_gives_up_is_a_failure() {
    let mut options = AttachOptions::new("vdisk test");
    options.timeout = Duration::from_secs(2);
    options.sockets = 2;
    let attached = attached(options, Duration::from_secs(12));
    let index = attached.device.index;
    let file = OpenOptions::new().write(true).open(&attached.device.path).unwrap();
    file.write_all_at(&[1; 512], 65536).unwrap();
    let started = Instant::now();
    let written = file.sync_all();
    println!("write: {written:?} after {:?}", started.elapsed());
    assert!(written.is_err());
    drop(file);
    let (served, _) = attached.wait();
    let error = served.unwrap_err();
    println!("{error}: {}", std::error::Error::source(&error).unwrap());
    assert_eq!(error.to_string(), format!("serve /dev/nbd{index}"));
    assert_eq!((size(index).as_str(), nodes(index)), ("0", 0));
}

#[test]
fn a_disconnect_frees_everything_at_once_when_the_server_was_killed() {
    let test = std::env::current_exe().unwrap();
    let mut victim = Command::new(test)
        .args(["--exact", "victim", "--nocapture"])
        .env(VICTIM, "1")
        .env("VICTIM", "1")
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut said = String::new();
    let mut stdout = victim.stdout.take().unwrap();
    let index = loop {
        let mut byte = [0];
        stdout.read_exact(&mut byte).unwrap();
        said.push(char::from(byte[0]));
        let index = said.split_once("index=").and_then(|(_, rest)| rest.strip_suffix('.'));
        if let Some(index) = index {
            break index.parse::<u32>().unwrap();
        }
    };
    let file = OpenOptions::new().write(true).open(format!("/dev/nbd{index}")).unwrap();
    let writes = thread::spawn(move || {
        file.write_all_at(&[1; 65536], 65536).unwrap();
        let written = file.sync_all();
        (written, Instant::now())
    });
    thread::sleep(Duration::from_secs(1));
    victim.kill().unwrap();
    victim.wait().unwrap();
    thread::sleep(Duration::from_secs(3));
    assert!(!writes.is_finished(), "a request waits for a new server");
    let started = Instant::now();
    disconnect(index).unwrap();
    let (written, ended) = writes.join().unwrap();
    println!("after kill -9 and a disconnect: {written:?} after {:?}", ended - started);
    assert!(written.is_err());
    assert!(ended - started < Duration::from_secs(1));
    forget_partitions(index).unwrap();
    assert_eq!((size(index).as_str(), nodes(index)), ("0", 0));
}

#[test]
fn victim() {
    // Only as the process that another test starts and kills.
    if std::env::var_os(VICTIM).is_none() {
        return;
    }
    if std::env::var_os("VICTIM").is_some() {
        let attached = attached(AttachOptions::new("victim"), Duration::from_secs(3600));
        let mut stdout = io::stdout();
        write!(stdout, "index={}.", attached.device.index).unwrap();
        stdout.flush().unwrap();
        attached.wait().0.unwrap();
    }
}
