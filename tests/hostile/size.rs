//! Images of many tebibytes: what is not looked at costs nothing.

use crate::images::{Image, descriptor};
use crate::lab::{Lab, Ran};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::Duration;
use vmdk_parse::{GdOffset, Sectors};

const TIB: u64 = 1 << 40;

/// An image with both directories and all of their tables, as VMware and qemu make them: nothing but directories is in the file.
fn large(lab: &Lab, bytes: u64, grain: u64) -> String {
    let sectors = bytes / 512;
    let tables = sectors / (512 * grain);
    let directory = (tables * 4).div_ceil(512);
    let (rgd, gd) = (21, 21 + directory + tables * 4);
    let overhead = (gd + directory + tables * 4).next_multiple_of(grain);
    let mut image = Image::with(&descriptor(&format!("RW {sectors} SPARSE \"disk.vmdk\"")));
    image.header.capacity = Sectors(sectors);
    image.header.grain_size = Sectors(grain);
    image.header.rgd_offset = Sectors(rgd);
    image.header.gd_offset = GdOffset::At(Sectors(gd));
    image.header.overhead = Sectors(overhead);
    let path = lab.large_file("disk.vmdk", overhead * 512, &[(0, &image.bytes()[..21 * 512])]);
    let file = File::options().write(true).open(&path).unwrap();
    for at in [rgd, gd] {
        // In pieces, for the sake of the memory of this process.
        for first in (0..tables).step_by(1024) {
            let entries =
                (first..tables.min(first + 1024)).flat_map(|n| ((at + directory + n * 4) as u32).to_le_bytes());
            file.write_all_at(&entries.collect::<Vec<u8>>(), at * 512 + first * 4).unwrap();
        }
    }
    path
}

/// The figures of the issue are those of a release build on a quiet machine (docs/measurements.md); processor time does not
/// depend on what else the machine does.
fn is_cheap(ran: &Ran) {
    ran.check_memory(32 << 20);
    assert!(ran.time < Duration::from_millis(50), "{:?}", ran.time);
}

#[test]
fn info_on_2_tib_and_on_64_tib_is_cheap() {
    for bytes in [2 * TIB, 64 * TIB] {
        let lab = Lab::new();
        let ran = lab.vdisk(&["info", &large(&lab, bytes, 128)]);
        assert!(ran.status.success(), "{ran:?}");
        is_cheap(&ran);
    }
}

#[test]
fn serving_2_tib_and_64_tib_is_cheap() {
    for bytes in [2 * TIB, 64 * TIB] {
        let lab = Lab::new();
        let image = large(&lab, bytes, 128);
        let (_, ran) = lab.serve_measured(&[&image], |_| ());
        is_cheap(&ran);
        // At both ends and in the middle, where other pages of the directory are.
        lab.serve(&["--read-only", &image], |server| {
            for at in [0, bytes / 2, bytes - 4096] {
                server.try_io(&format!("read -P 0 {at} 4096")).unwrap();
            }
        });
    }
}

#[test]
fn the_first_write_to_64_tib_stays_inside_the_limits() {
    let lab = Lab::new();
    let image = large(&lab, 64 * TIB, 128);
    lab.serve(&[&image], |server| {
        server.try_io(&format!("write -P 1 {} 4096", 40 * TIB)).unwrap();
        server.try_io(&format!("read -P 1 {} 4096", 40 * TIB)).unwrap();
    });
}

/// The largest directory that there is, in grains of 4 KiB: 128 MiB of it. All of it is a hole.
#[test]
fn a_map_of_the_largest_directory_stays_inside_the_limits() {
    let lab = Lab::new();
    let sectors = 64 * TIB / 512;
    let mut image = Image::with(&descriptor(&format!("RW {sectors} SPARSE \"disk.vmdk\"")));
    image.header.capacity = Sectors(sectors);
    image.header.flags = vmdk_parse::HeaderFlags::NEWLINE_TEST;
    let end = 40 * 512 + (128 << 20);
    image.header.gd_offset = GdOffset::At(Sectors(40));
    let file = lab.large_file("disk.vmdk", end, &[(0, &image.bytes()[..21 * 512])]);
    let map = lab.vdisk(&["map", &file]);
    assert!(map.status.success() && map.out.lines().count() == 2, "{map:?}");
    // Each page of it is looked at.
    lab.serve(&[&file], |server| server.try_io("write -P 1 0 512").unwrap());
}
