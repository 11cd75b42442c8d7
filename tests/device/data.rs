//! The bytes are right, by the word of programs that are not ours.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};

use crate::lab::{Lab, listed, text, transport};

/// Random writes of 4 KiB and of odd sizes on every writable subformat, verified by fio, then compared by qemu-img.
#[test]
fn fio_verifies_every_writable_subformat() {
    let lab = Lab::new();
    for image in lab.fixtures("256M") {
        let device = lab.attach(&image);
        let disk = &device.path;
        // Around the border between the extents of the split ones at 128 MiB, and elsewhere.
        for (name, offset, sizes) in
            [("even", "0", "--bs=4k"), ("odd", "78m", "--bssplit=512/20:1536/20:3584/20:13824/20:66048/10:200192/10")]
        {
            lab.sh(&format!(
                "fio --name={name} --filename={disk} --rw=randwrite {sizes} --offset={offset} --size=100m --io_size=8m \
                 --direct=1 --ioengine=io_uring --iodepth=16 --verify=crc32c --verify_fatal=1 --randseed=7 \
                 --random_generator=lfsr --output-format=terse >fio.log 2>&1 || {{ cat fio.log; exit 1; }}"
            ));
        }
        device.detach();
        // A fresh attach, compared by qemu-img with its own reading of the image.
        let device = lab.attach(&format!("-r {image}"));
        let (other, format) = match image.as_str() {
            // For the type VMFS qemu-img asks for less than is written there; the extent is the bytes of the disk.
            "vmfs.vmdk" => ("vmfs-flat.vmdk", "raw"),
            "raw.img" => ("raw.img", "raw"),
            _ => (image.as_str(), "vmdk"),
        };
        lab.sh(&format!("qemu-img compare -f raw -F {format} {} {other}", device.path));
        device.detach();
        if image.contains("Sparse") {
            lab.sh(&format!("qemu-img check {image}"));
        }
    }
}

#[test]
fn the_vmware_sample_reads_as_it_should() {
    const SUM: &str = "a3bcf05f07a1c06a3380eeca8571f0efb2b85afafa1e21662b8cad436d1f7727  -";
    let Some(samples) = std::env::var_os("VDISK_SAMPLES") else {
        eprintln!("skipped: VDISK_SAMPLES does not say where the samples are");
        return;
    };
    let lab = Lab::new();
    lab.sh(&format!("cp {}/vmware-monolithicSparse.vmdk sample.vmdk; chmod 644 sample.vmdk", samples.display()));
    let device = lab.attach("-r sample.vmdk");
    assert_eq!(lab.sha256(&device.path), SUM);
    device.detach();
    let got = lab.sh("$vdisk serve -r sample.vmdk --socket sock 2>/dev/null & server=$!
         for n in {1..500}; do test -S sock && break; sleep 0.02; done
         nbdcopy 'nbd+unix:///?socket=sock' copy.raw; kill $server; wait $server
         sha256sum < copy.raw");
    assert_eq!(got, SUM);
}

/// Large and unaligned copies through the page cache of the device, in both directions.
#[test]
fn a_copy_in_equals_the_copy_out() {
    let lab = Lab::new();
    lab.vmdk("disk.vmdk", "128M");
    let device = lab.attach("disk.vmdk");
    let disk = &device.path;
    lab.sh(&format!("dd if=/dev/urandom of=data bs=1M count=100; dd if=data of={disk} bs=999424 conv=fsync,notrunc"));
    lab.sh(&format!("blockdev --flushbufs {disk}; cmp -n 104857600 data {disk}"));
    lab.sh(&format!("dd if={disk} bs=1M count=100 iflag=direct | cmp - data"));
    device.detach();
    lab.sh("qemu-img check disk.vmdk; qemu-img convert -O raw disk.vmdk raw; cmp -n 104857600 data raw");
}

/// The host's file system is full: the writer is told, what was written stays, and it goes on when there is space.
#[test]
fn a_full_host_is_an_error_and_not_a_broken_image() {
    let lab = Lab::new();
    lab.sh("mkdir small; mount -t tmpfs -o size=24M tmpfs small; qemu-img create -q -f vmdk small/disk.vmdk 256M");
    let device = lab.attach("small/disk.vmdk");
    let disk = &device.path;
    lab.sh(&format!(
        "dd if=/dev/urandom of=data bs=1M count=8; dd if=data of={disk} bs=1M oflag=direct conv=fsync,notrunc"
    ));
    lab.sh("echo 'I/O error, dev (nbd|ublkb)|Other side returned error|critical (space allocation|target) error' >> ${VDISK_VM_ALLOW:-/dev/null}");
    let full = lab.try_sh(&format!("dd if=/dev/urandom of={disk} bs=1M seek=16 count=64 oflag=direct"));
    assert!(!full.status.success(), "64 MiB fit into 24");
    // The kernel's nbd and loop drivers make EIO of every error.
    let said = text(&full.stderr);
    assert!(transport() != "ublk" || said.contains("No space left on device"), "{said}");
    assert_eq!(listed(&lab)[0]["state"], "live");
    lab.sh(&format!("dd if={disk} bs=1M count=8 iflag=direct | cmp - data"));
    lab.sh("mount -o remount,size=200M small");
    lab.sh(&format!("dd if=data of={disk} bs=1M seek=100 oflag=direct conv=fsync,notrunc"));
    device.detach();
    let check =
        lab.sh("qemu-img check small/disk.vmdk; qemu-img convert -O raw small/disk.vmdk raw; cmp -n 8388608 data raw");
    assert!(check.contains("No errors"), "{check}");
    lab.sh("umount small");
}

/// Whoever goes around the device's page cache lends it memory of any alignment that the device takes. What lies below may want a
/// larger one: a disk of sectors 512 bytes, a page cache none.
#[test]
fn memory_of_any_alignment_is_read_to_and_written_from() {
    let lab = Lab::new();
    for options in ["--direct-io on", "--direct-io off"] {
        lab.sh("rm -f disk.vmdk");
        lab.vmdk("disk.vmdk", "64M");
        let device = lab.attach(&format!("{options} disk.vmdk"));
        let disk = direct(&device.path);
        let wanted = lab.sh(&format!("cat /sys/block/{}/queue/dma_alignment", device.path.trim_start_matches("/dev/")));
        let wanted = wanted.parse::<usize>().unwrap() + 1;
        let mut expected = vec![0; 4 << 20];
        // Whole grains and parts of them, over the border of one; first into new grains, then into those.
        for (n, (offset, len)) in
            [(0, 4096), (61440, 8192), (1 << 20, 300 << 10), (0, 512), (512, 65536)].into_iter().enumerate()
        {
            for align in [4096, 512, 4].into_iter().filter(|align| *align >= wanted) {
                let bytes: Vec<u8> = (0..len).map(|at| (at / 512 * 3 + at + n + align) as u8).collect();
                let mut memory = Aligned::new(len, align);
                memory.bytes().copy_from_slice(&bytes);
                disk.write_all_at(memory.bytes(), offset as u64).unwrap();
                expected[offset..offset + len].copy_from_slice(&bytes);
                let mut memory = Aligned::new(expected.len(), align);
                disk.read_exact_at(memory.bytes(), 0).unwrap();
                assert!(memory.bytes() == expected, "{options}, {len} bytes at {offset}, memory aligned to {align}");
            }
        }
        println!("{options}: the device takes memory aligned to {wanted}");
        drop(disk);
        device.detach();
        lab.sh("qemu-img check disk.vmdk; qemu-img convert -O raw disk.vmdk raw");
        assert!(std::fs::read(lab.path().join("raw")).unwrap()[..expected.len()] == expected, "{options}");
    }
}

/// Grains in the cache, compressed ones, and holes are in no file as they are.
#[test]
fn what_is_in_no_file_reads_as_it_should() {
    let lab = Lab::new();
    lab.sh("dd if=/dev/urandom bs=1M count=6 of=raw; truncate -s 64M raw; dd if=raw bs=64K count=32 of=raw seek=500 conv=notrunc");
    lab.sh("qemu-img convert -O vmdk raw sparse.vmdk; qemu-img convert -O vmdk -o subformat=streamOptimized raw stream.vmdk");
    let sum = lab.sha256("raw");
    let raw = std::fs::read(lab.path().join("raw")).unwrap();
    for args in ["sparse.vmdk", "-r stream.vmdk", "--overlay over.vmdk stream.vmdk"] {
        let device = lab.attach(args);
        assert_eq!(lab.sha256(&device.path), sum, "{args}");
        let name = device.path.trim_start_matches("/dev/");
        let ahead: u32 = lab.sh(&format!("cat /sys/class/block/{name}/queue/read_ahead_kb")).trim().parse().unwrap();
        // What is compressed is read faster many grains at a time.
        assert!(ahead >= 1024 || !args.contains("stream"), "{args}: {ahead} KiB ahead");
        let disk = direct(&device.path);
        // Each grain again and again, as small as can be: it comes into the cache on the way.
        let mut memory = Aligned::new(4096, 512);
        for at in (0..40).flat_map(|_| ((6 << 20) - (256 << 10)..(6 << 20) + (64 << 10)).step_by(4096)) {
            disk.read_exact_at(memory.bytes(), at as u64).unwrap();
            assert!(memory.bytes() == &raw[at..at + 4096], "{args}: byte {at}");
        }
        // Requests in which all of them meet.
        let mut memory = Aligned::new(1 << 20, 512);
        disk.read_exact_at(memory.bytes(), (6 << 20) - (300 << 10)).unwrap();
        assert!(memory.bytes() == &raw[(6 << 20) - (300 << 10)..][..1 << 20], "{args}: a long request");
        drop(disk);
        device.detach();
    }
}

/// A device around its page cache.
fn direct(path: &str) -> File {
    OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_DIRECT)
        .open(path)
        .or_else(|_| OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(path))
        .unwrap()
}

/// Memory whose address is a multiple of `align` and of no more.
struct Aligned {
    memory: Vec<u8>,
    start: usize,
    len: usize,
}

impl Aligned {
    fn new(len: usize, align: usize) -> Self {
        let memory = vec![0; len + 4 * 4096];
        let start = memory.as_ptr().align_offset(8192) % 8192 + align;
        Self { memory, start, len }
    }

    fn bytes(&mut self) -> &mut [u8] {
        &mut self.memory[self.start..self.start + self.len]
    }
}
