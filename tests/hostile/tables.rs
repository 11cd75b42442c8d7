//! Grain directories, grain tables and grains that are where they cannot be.

use crate::images::{COVERAGE, GRAIN, Image, SECTORS, descriptor};
use crate::lab::Lab;
use std::fs::File;

/// The grain at byte 0 of the disk cannot be read or written; the rest can be read.
fn first_grain_is_corrupt(bytes: &[u8]) {
    let lab = Lab::new();
    let image = lab.file("disk.vmdk", bytes);
    lab.survives(&image);
    lab.serve(&[&image], |server| {
        server.fails("read 0 512");
        server.try_io(&format!("read -P 2 {COVERAGE} 4096")).unwrap();
        server.fails("write -P 9 0 512");
        server.fails("read 0 512");
    });
}

/// Reads work as far as they make sense; a write fails wherever it goes, and the file stays as it is.
fn nothing_is_written(bytes: &[u8]) {
    let lab = Lab::new();
    let image = lab.file("disk.vmdk", bytes);
    lab.survives(&image);
    lab.serve(&[&image], |server| {
        server.try_io("read -P 1 0 4096").unwrap();
        for at in [0, 8192, COVERAGE, SECTORS * 512 - 512] {
            server.fails(&format!("write -P 9 {at} 512"));
        }
        server.fails("discard 0 4096");
    });
    assert!(std::fs::read(&image).unwrap() == bytes, "the file differs");
}

#[test]
fn a_grain_entry_past_the_end_of_the_file_is_an_error_and_not_zeroes() {
    for sector in [56, 64, 1 << 30, u32::MAX] {
        first_grain_is_corrupt(&Image::new().entry(0, 0, sector).bytes());
    }
}

#[test]
fn a_grain_entry_of_one_without_the_flag_is_corrupt() {
    first_grain_is_corrupt(&Image::new().entry(0, 0, 1).bytes());
}

#[test]
fn a_grain_entry_into_the_metadata_is_corrupt() {
    for sector in [2, 20, 21, 22, 30, 31, 39] {
        first_grain_is_corrupt(&Image::new().entry(0, 0, sector).bytes());
    }
}

#[test]
fn a_grain_entry_into_the_directory_is_corrupt_even_if_the_overhead_is_too_small() {
    let mut image = Image::new();
    image.header.overhead = vmdk_parse::Sectors(1);
    // Into the descriptor, and across the beginning of either directory.
    for sector in [1, 14, 23, 30] {
        first_grain_is_corrupt(&image.entry(0, 0, sector).bytes());
    }
}

#[test]
fn a_grain_entry_of_odd_alignment_is_served_if_nothing_overlaps() {
    let lab = Lab::new();
    let mut image = Image::new();
    image.bytes.resize(72 * 512, 0);
    image.bytes[57 * 512..65 * 512].fill(7);
    let file = lab.file("disk.vmdk", &image.entry(0, 0, 57).bytes());
    lab.serve(&[&file], |server| {
        server.try_io("read -P 7 0 4096").unwrap();
        server.try_io(&format!("write -P 8 {GRAIN} 8192")).unwrap();
        server.try_io("read -P 7 0 4096").unwrap();
    });
    nothing_is_written(&image.entry(0, 0, 40).entry(0, 5, 41).bytes());
}

#[test]
fn a_grain_that_two_entries_name_is_not_written() {
    nothing_is_written(&Image::new().entry(0, 5, 40).bytes());
    nothing_is_written(&Image::new().entry(1, 511, 40).bytes());
}

#[test]
fn a_table_that_two_directory_entries_name_is_not_written() {
    let mut image = Image::new();
    let (gd, rgd) = (image.gd, image.rgd);
    nothing_is_written(&image.put(gd + 4, 31).put(rgd + 4, 22).bytes());
}

#[test]
fn tables_that_overlap_are_not_written() {
    let mut image = Image::new();
    let gd = image.gd;
    nothing_is_written(&image.put(gd + 4, 33).bytes());
}

#[test]
fn a_grain_where_a_table_is_is_not_written() {
    let mut image = Image::new();
    image.header.overhead = vmdk_parse::Sectors(31);
    nothing_is_written(&image.entry(1, 3, 34).bytes());
}

#[test]
fn a_directory_entry_that_equals_its_copy_is_not_written() {
    let mut image = Image::new();
    let (gd, rgd) = (image.gd, image.rgd);
    nothing_is_written(&image.put(rgd, 31).bytes());
    nothing_is_written(&Image::new().put(gd, 22).bytes());
}

#[test]
fn a_directory_entry_past_the_end_or_into_the_metadata_is_corrupt() {
    for sector in [1, 20, 21, 30, 53, 1 << 20, u32::MAX] {
        let mut image = Image::new();
        let gd = image.gd;
        first_grain_is_corrupt(&image.put(gd, sector).bytes());
    }
}

#[test]
fn a_table_that_differs_from_its_copy_is_the_primary_one_and_is_mended_if_it_was_not_closed() {
    let lab = Lab::new();
    for unclean in [false, true] {
        let mut image = Image::new();
        image.header.unclean_shutdown = unclean;
        // The first entry of the copy only.
        let copy = 22 * 512;
        let file = lab.file("disk.vmdk", &image.put(copy, 48).bytes());
        lab.survives(&file);
        lab.serve(&[&file], |server| {
            server.try_io("read -P 1 0 4096").unwrap();
            server.try_io(&format!("write -P 9 {} 512", COVERAGE + GRAIN)).unwrap();
        });
        let found = std::fs::read(&file).unwrap()[copy];
        assert_eq!(found, if unclean { 40 } else { 48 });
    }
}

/// qemu 10.0.2 writes over the header instead.
#[test]
fn a_write_where_the_directory_names_no_table_makes_one_and_keeps_the_header() {
    let lab = Lab::new();
    let mut image = Image::new();
    let (gd, rgd) = (image.gd, image.rgd);
    let file = lab.file("disk.vmdk", &image.put(gd + 4, 0).put(rgd + 4, 0).bytes());
    lab.serve(&[&file], |server| {
        server.try_io(&format!("read -P 0 {COVERAGE} 4096")).unwrap();
        server.try_io(&format!("write -P 5 {COVERAGE} 512")).unwrap();
    });
    assert!(std::fs::read(&file).unwrap()[..72] == image.bytes()[..72]);
    lab.serve(&["--read-only", &file], |server| {
        server.try_io(&format!("read -P 5 {COVERAGE} 512")).unwrap();
        server.try_io("read -P 1 0 4096").unwrap();
    });
}

/// Such places are not computed with 32 bits, and their sectors not either.
#[test]
fn the_last_grain_that_an_entry_can_name_is_read() {
    let lab = Lab::new();
    let sector = u32::MAX - 7;
    let image = Image::new().entry(0, 0, sector).bytes();
    let at = u64::from(sector) * 512;
    let file = lab.large_file("disk.vmdk", at + GRAIN, &[(0, &image), (at, &[6; 4096])]);
    lab.serve(&["--read-only", &file], |server| server.try_io("read -P 6 0 4096").unwrap());
}

#[test]
fn a_file_that_shrinks_while_it_is_served_is_an_error() {
    let lab = Lab::new();
    let file = lab.file("disk.vmdk", &Image::new().bytes());
    for (len, options) in [(48, &["--read-only", &file][..]), (31, &[&file]), (0, &["--read-only", &file])] {
        let file = lab.file("disk.vmdk", &Image::new().bytes());
        lab.serve(options, |server| {
            server.try_io("read -P 1 0 4096").unwrap();
            File::options().write(true).open(&file).unwrap().set_len(len * 512).unwrap();
            server.fails(&format!("read {COVERAGE} 4096"));
        });
    }
}

#[test]
fn a_flat_file_that_shrinks_while_it_is_served_is_an_error() {
    let lab = Lab::new();
    let flat = lab.file("flat", &[3; 1 << 20]);
    let file = lab.file("disk.vmdk", descriptor("RW 2048 FLAT \"flat\" 0").as_bytes());
    lab.serve(&["--read-only", &file], |server| {
        File::options().write(true).open(&flat).unwrap().set_len(1 << 19).unwrap();
        server.fails("read 1044480 4096");
        server.try_io("read -P 3 0 4096").unwrap();
    });
}
