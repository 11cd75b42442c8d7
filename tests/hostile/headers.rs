//! Headers, footers and streams.

use crate::images::{Image, SECTORS, descriptor};
use crate::lab::Lab;
use flate2::{Compression as Level, write::ZlibEncoder};
use std::io::Write;
use vmdk_parse::{Compression, GdOffset, GrainRecord, HeaderFlags, Marker, Sectors, SparseHeader};

fn refused(bytes: &[u8], words: &[&str]) {
    let lab = Lab::new();
    lab.refused(&lab.file("disk.vmdk", bytes), words);
}

#[test]
fn hostile_afl9_is_refused_with_a_reason() {
    // What is wrong with it first of all: a grain directory of 0x20000000 entries, which times 4 is 0 in 32 bits.
    let bytes = Image::new().patched(12, &(0x2000_0000u64 * 512 * 8).to_le_bytes());
    refused(&bytes, &["capacity"]);
    let Some(samples) = std::env::var_os("VDISK_SAMPLES") else {
        println!("skipped: VDISK_SAMPLES is not set, hostile-afl9.vmdk not read");
        return;
    };
    refused(&std::fs::read(std::path::Path::new(&samples).join("hostile-afl9.vmdk")).unwrap(), &["disk.vmdk"]);
}

#[test]
fn a_header_field_that_no_image_has_is_refused() {
    let image = Image::new();
    for (at, value, field) in [
        (4, &[0, 0, 0, 0][..], "version"),
        (4, &[4, 0, 0, 0], "version"),
        (8, &[3, 0, 0, 0x80], "flags"),
        (12, &[0xff; 8], "capacity"),
        (12, &[0, 0, 0, 0, 0, 0, 0, 0x80], "capacity"),
        (20, &[0, 0, 0, 0], "grainSize"),
        (20, &[1, 0, 0, 0], "grainSize"),
        (20, &[100, 0, 0, 0], "grainSize"),
        (20, &[0, 0, 0x40, 0], "grainSize"),
        (28, &[0xff; 8], "descriptorOffset"),
        (36, &[0xff; 8], "descriptorSize"),
        (36, &[0, 0], "descriptorSize"),
        (44, &[0, 0], "numGTEsPerGT"),
        (44, &[1, 2], "numGTEsPerGT"),
        (44, &[0xff, 0xff, 0xff, 0xff], "numGTEsPerGT"),
        (56, &[0; 8], "gdOffset"),
        (64, &[0xff; 8], "overHead"),
        (73, b"\n \n\n", "line"),
    ] {
        let lab = Lab::new();
        let file = lab.file("disk.vmdk", &image.patched(at, value));
        for args in [&["info", &file][..], &["serve", "--socket", "s", &file]] {
            let ran = lab.vdisk(args);
            assert_eq!(ran.status.code(), Some(1), "{field} {value:?}: {ran:?}");
            assert!(ran.err.contains(field), "{field} {value:?}: {ran:?}");
        }
    }
}

#[test]
fn directories_outside_the_file_or_over_one_another_are_refused() {
    let image = Image::new();
    refused(&image.patched(56, &(1u64 << 40).to_le_bytes()), &["the grain directory at sector"]);
    refused(&image.patched(56, &56u64.to_le_bytes()), &["the grain directory at sector"]);
    refused(&image.patched(64, &57u64.to_le_bytes()), &["past the end of the file"]);
    let lab = Lab::new();
    lab.refused_for_writing(&lab.file("a.vmdk", &image.patched(48, &30u64.to_le_bytes())), &["directories"]);
    lab.refused_for_writing(&lab.file("b.vmdk", &image.patched(48, &(1u64 << 50).to_le_bytes())), &["redundant"]);
}

#[test]
fn tables_of_other_than_512_entries_are_only_read() {
    let lab = Lab::new();
    let mut image = Image::new();
    image.header.gtes_per_gt = 256;
    image.header.capacity = Sectors(SECTORS / 2);
    image.bytes[512..1536].fill(0);
    let text = descriptor(&format!("RW {} SPARSE \"disk.vmdk\"", SECTORS / 2));
    image.bytes[512..512 + text.len()].copy_from_slice(text.as_bytes());
    let file = lab.file("disk.vmdk", &image.bytes());
    lab.refused_for_writing(&file, &["512 entries", "--read-only"]);
    lab.serve(&["--read-only", &file], |server| server.try_io("read -P 2 1M 4096").unwrap());
}

#[test]
fn change_tracking_is_only_read() {
    let lab = Lab::new();
    let mut image = Image::new();
    image.header.version = 3;
    let file = lab.file("disk.vmdk", &image.bytes());
    lab.refused_for_writing(&file, &["version 3", "--read-only"]);
    lab.survives(&file);
}

#[test]
fn a_header_smaller_than_its_descriptor_says_is_refused() {
    refused(&Image::new().patched(12, &(SECTORS - 1).to_le_bytes()), &["the header says", "the descriptor"]);
}

#[test]
fn a_header_larger_than_its_descriptor_says_gives_the_disk_of_the_descriptor() {
    let lab = Lab::new();
    let file = lab.file("disk.vmdk", &Image::new().patched(12, &(SECTORS + 1).to_le_bytes()));
    let info = lab.vdisk(&["info", "--json", &file]).out;
    assert!(
        info.contains(&format!("\"size\":{}", SECTORS * 512)) || info.contains(&format!("\"size\": {}", SECTORS * 512))
    );
    lab.survives(&file);
    lab.refused_for_writing(&file, &["the header says", "--read-only"]);
}

#[test]
fn a_file_shorter_than_any_header_is_refused() {
    let lab = Lab::new();
    let whole = Image::new().bytes();
    for len in [0, 1, 3, 4, 5, 8, 79, 511, 512, 600] {
        lab.refused(&lab.file("disk.vmdk", &whole[..len]), &[]);
    }
}

/// A stream: header, grains, and no directory that its header knows of. (lba in grains, zlib stream).
fn stream(grain: u64, capacity: u64, records: &[(u64, Vec<u8>)]) -> Vec<u8> {
    let text = descriptor(&format!("RW {capacity} SPARSE \"disk.vmdk\""));
    let header = SparseHeader {
        version: 3,
        flags: HeaderFlags::NEWLINE_TEST.with(HeaderFlags::COMPRESSED).with(HeaderFlags::MARKERS),
        capacity: Sectors(capacity),
        grain_size: Sectors(grain),
        rgd_offset: Sectors(0),
        gd_offset: GdOffset::AtEnd,
        overhead: Sectors(21),
        compression: Compression::Deflate,
        ..Image::new().header
    };
    let mut bytes = header.encode().to_vec();
    bytes.extend_from_slice(text.as_bytes());
    bytes.resize(21 * 512, 0);
    for (n, data) in records {
        bytes.extend_from_slice(&GrainRecord::encode_with(Sectors(n * grain), data).unwrap());
    }
    bytes.extend_from_slice(&Marker::EndOfStream.encode());
    bytes
}

fn zeroes(len: usize) -> Vec<u8> {
    let mut encoder = ZlibEncoder::new(Vec::new(), Level::best());
    for _ in 0..len >> 16 {
        encoder.write_all(&[0; 1 << 16]).unwrap();
    }
    encoder.finish().unwrap()
}

#[test]
fn a_grain_that_inflates_to_a_gigabyte_is_an_error_and_takes_no_memory() {
    let lab = Lab::new();
    let file =
        lab.file("disk.vmdk", &stream(128, 256, &[(0, zeroes(64 << 20)[..60_000].to_vec()), (1, zeroes(1 << 16))]));
    lab.survives(&file);
    lab.serve(&["--read-only", &file], |server| {
        server.fails("read 0 512");
        server.try_io("read -P 0 64k 64k").unwrap();
    });
}

#[test]
fn grains_of_a_mebibyte_that_are_all_zeroes_are_served_in_little_memory() {
    let lab = Lab::new();
    let records: Vec<_> = (0..128).map(|n| (n, zeroes(1 << 20))).collect();
    let file = lab.file("disk.vmdk", &stream(2048, 128 * 2048, &records));
    lab.vdisk(&["map", &file]);
    lab.serve(&["--read-only", "--cache-size", "16M", &file], |server| {
        for n in 0..64 {
            server.try_io(&format!("read -P 0 {n}M 64k")).unwrap();
        }
    });
}

#[test]
fn a_record_of_another_grain_is_an_error() {
    let lab = Lab::new();
    // A directory behind the grains that gives the record of grain 1 to grain 0.
    let mut bytes = stream(128, 256, &[(1, zeroes(1 << 16))]);
    let table = (bytes.len() / 512) as u32;
    bytes.resize(bytes.len() + 5 * 512, 0);
    let at = table as usize * 512;
    bytes[at..at + 4].copy_from_slice(&21u32.to_le_bytes());
    let gd = table + 4;
    bytes[gd as usize * 512..][..4].copy_from_slice(&table.to_le_bytes());
    bytes[56..64].copy_from_slice(&u64::from(gd).to_le_bytes());
    let file = lab.file("disk.vmdk", &bytes);
    lab.survives(&file);
    lab.serve(&["--read-only", &file], |server| server.fails("read 0 512"));
}

#[test]
fn a_walk_over_endless_markers_ends() {
    let lab = Lab::new();
    // Nothing but progress markers, and the record of one grain over and over: 20 MiB and more of each.
    let mut bytes = stream(128, 256, &[]);
    bytes.truncate(21 * 512);
    let progress = Marker::Progress { lba: Sectors(0) }.encode();
    let file = lab.file("progress.vmdk", &bytes);
    lab.append(&file, &progress, 40_000);
    for verb in ["info", "map"] {
        let ran = lab.vdisk(&[verb, &file]);
        assert!(ran.status.code() == Some(1) && ran.err.contains("no grain is found"), "{ran:?}");
    }
    let record = GrainRecord::encode_with(Sectors(0), &zeroes(1 << 16)).unwrap();
    let file = lab.file("again.vmdk", &bytes);
    lab.append(&file, &record, 60_000);
    lab.survives(&file);
    // A hole of a tebibyte behind the last record.
    let hole = lab.large_file("hole.vmdk", 1 << 40, &[(0, &[bytes, record].concat())]);
    lab.survives(&hole);
}

#[test]
fn a_footer_of_another_disk_is_refused() {
    let lab = Lab::new();
    let bytes = stream(128, 256, &[(0, zeroes(1 << 16))]);
    for (at, value, field) in [(4, 1u8, "version"), (13, 7, "capacity"), (20, 64, "grainSize"), (44, 1, "numGTEsPerGT")]
    {
        let mut footer = bytes[..512].to_vec();
        footer[at] = value;
        let end = [&Marker::Footer { sectors: Sectors(1) }.encode()[..], &footer, &[0; 512]].concat();
        let file = lab.file("disk.vmdk", &[&bytes[..bytes.len() - 512], &end].concat());
        let ran = lab.vdisk(&["info", &file]);
        if field != "numGTEsPerGT" {
            assert!(ran.status.code() == Some(1) && ran.err.contains(field), "{field}: {ran:?}");
        }
    }
}

/// The inspectors of image services look at the front of a file: a descriptor behind them would be one that nobody looked at.
#[test]
fn a_descriptor_that_only_the_footer_names_is_not_read() {
    let lab = Lab::new();
    let bytes = stream(128, 256, &[(0, zeroes(1 << 16))]);
    let evil = descriptor("RW 1 FLAT \"/etc/hostname\" 0");
    let mut footer = bytes[..512].to_vec();
    let at = bytes.len() / 512 - 1;
    footer[28..36].copy_from_slice(&(at as u64).to_le_bytes());
    let mut text = evil.into_bytes();
    text.resize(20 * 512, 0);
    let end = [&text[..], &Marker::Footer { sectors: Sectors(1) }.encode(), &footer, &[0; 512]].concat();
    let file = lab.file("disk.vmdk", &[&bytes[..bytes.len() - 512], &end].concat());
    let info = lab.vdisk(&["info", &file]);
    assert!(info.status.success() && !info.out.contains("hostname"), "{info:?}");
}

#[test]
fn a_stream_is_not_written() {
    let lab = Lab::new();
    let file = lab.file("disk.vmdk", &stream(128, 256, &[(0, zeroes(1 << 16))]));
    lab.refused_for_writing(&file, &["cannot be written", "--overlay"]);
}
