//! What opens and what is refused.

use super::fixtures::{DISK, NAME, OPTIONS, SHAPES, Shape, image, open, open_with, read, request, run, sparse, write};
use crate::memory::Memory;
use crate::{ErrorKind, Format, Op, OpenOptions};
use std::cell::RefCell;

fn refused(files: Vec<(String, Vec<u8>)>) -> (ErrorKind, String) {
    let e = open(&Memory::new(files, 0)).map(|_| ()).unwrap_err();
    (
        e.kind(),
        std::iter::successors(Some(&e as &dyn std::error::Error), |e| e.source()).map(|e| format!("{e}: ")).collect(),
    )
}

#[test]
fn every_shape_opens_with_its_size() {
    for shape in SHAPES {
        let disk = open(&Memory::new(image(shape), 0)).unwrap();
        assert_eq!(disk.geometry().size, DISK, "{shape:?}");
        assert_eq!(disk.info().format, if shape == Shape::Raw { Format::Raw } else { Format::Vmdk });
    }
}

#[test]
fn every_truncation_of_an_image_is_refused_or_reads_without_panic() {
    let whole = image(Shape::Sparse).remove(0).1;
    for len in (0..whole.len()).step_by(97) {
        let memory = Memory::new(vec![(NAME.to_owned(), whole[..len].to_vec())], 0);
        if let Ok(disk) = open(&memory) {
            let _ = run(read(&disk, &memory, 0, 64 << 10));
            let _ = run(read(&disk, &memory, DISK - 4096, 4096));
        }
    }
}

#[test]
fn every_damaged_byte_of_the_header_is_refused_or_reads_without_panic() {
    let whole = image(Shape::Sparse).remove(0).1;
    for at in 0..80 {
        for value in [0, 1, 0x7f, 0xff] {
            let mut bytes = whole.clone();
            bytes[at] = value;
            let memory = Memory::new(vec![(NAME.to_owned(), bytes)], 0);
            if let Ok(disk) = open(&memory) {
                for offset in [0, DISK / 2, disk.geometry().size.saturating_sub(4096)] {
                    let _ = run(read(&disk, &memory, offset, 4096));
                }
                let _ = run(write(&disk, &memory, 0, &[1; 512]));
            }
        }
    }
}

#[test]
fn a_missing_extent_is_named() {
    let mut files = image(Shape::Split);
    files.remove(1);
    let (kind, text) = refused(files);
    assert_eq!(kind, ErrorKind::NotFound);
    assert!(text.contains("extent 1: open \"s1.vmdk\""), "{text}");
}

#[test]
fn a_flat_extent_that_is_too_short_is_refused_not_read_as_zeroes() {
    let mut files = image(Shape::Split);
    files[2].1.pop();
    let (kind, text) = refused(files);
    assert_eq!(kind, ErrorKind::Corrupt);
    assert!(text.contains("f2.vmdk"), "{text}");
}

#[test]
fn an_extent_of_a_split_image_is_not_an_image() {
    let (kind, text) = refused(vec![("d-s001.vmdk".to_owned(), sparse(2048, 8, true, true, ""))]);
    assert_eq!(kind, ErrorKind::NotAnImage);
    assert!(text.contains("descriptor"), "{text}");
}

#[test]
fn zero_extents_keep_their_place_between_the_others() {
    let text = "# Disk DescriptorFile\nCID=00000001\nparentCID=ffffffff\ncreateType=\"custom\"\n\
                RW 8 FLAT \"a\" 0\n\nRW 8 ZERO\n\nRDONLY 8 FLAT \"b\" 0\n";
    let files = vec![
        (NAME.to_owned(), text.as_bytes().to_vec()),
        ("a".to_owned(), vec![1; 4096]),
        ("b".to_owned(), vec![2; 4096]),
    ];
    let memory = Memory::new(files, 0);
    let disk = open(&memory).unwrap();
    let got = run(read(&disk, &memory, 0, 3 * 4096)).unwrap();
    assert!(got == [[1; 4096], [0; 4096], [2; 4096]].concat());
    for offset in [4096, 8192] {
        assert_eq!(run(write(&disk, &memory, offset, &[9; 512])).unwrap_err().kind(), ErrorKind::ReadOnly);
    }
    // Of zeroes there is nothing to give back.
    let discard = |offset| run(request(&disk, &memory, Op::Discard, offset, 512, &RefCell::default()));
    assert!(discard(4096).is_ok());
    assert_eq!(discard(8192).unwrap_err().kind(), ErrorKind::ReadOnly);
    assert!(run(read(&disk, &memory, 8192, 4096)).unwrap() == [2; 4096]);
}

#[test]
fn an_extent_marked_noaccess_is_neither_read_nor_written_and_its_neighbours_are() {
    let text = "# Disk DescriptorFile\nCID=00000001\nparentCID=ffffffff\ncreateType=\"custom\"\n\
                RW 8 FLAT \"a\" 0\nNOACCESS 8 FLAT \"b\" 0\nRW 8 FLAT \"c\" 0\n";
    let mut files = vec![(NAME.to_owned(), text.as_bytes().to_vec())];
    files.extend(["a", "b", "c"].map(|name| (name.to_owned(), vec![1; 4096])));
    let memory = Memory::new(files, 0);
    let disk = open(&memory).unwrap();
    for offset in [4096, 8191] {
        assert_eq!(run(read(&disk, &memory, offset, 1)).unwrap_err().kind(), ErrorKind::PermissionDenied);
        assert_eq!(run(write(&disk, &memory, offset, &[9])).unwrap_err().kind(), ErrorKind::ReadOnly);
    }
    for offset in [4095, 8192] {
        assert_eq!(run(read(&disk, &memory, offset, 1)).unwrap(), [1]);
        run(write(&disk, &memory, offset, &[9])).unwrap();
    }
    run(disk.close(&memory)).unwrap();
    assert!(memory.files()[2].1 == [1; 4096]);
}

#[test]
fn a_raw_device_of_vmfs_is_refused_with_what_to_do() {
    for kind in ["VMFSRDM", "VMFSRAW"] {
        let text = format!("# Disk DescriptorFile\nCID=00000001\nparentCID=ffffffff\nRW 8 {kind} \"a\"\n");
        let files = vec![(NAME.to_owned(), text.into_bytes()), ("a".to_owned(), vec![1; 4096])];
        let (kind, text) = refused(files);
        assert_eq!(kind, ErrorKind::Unsupported);
        assert!(text.contains("qemu-img convert"), "{text}");
    }
}

#[test]
fn an_entry_that_points_into_the_metadata_or_past_the_end_fails_the_read_only_there() {
    for sector in [1u32, 127, 1 << 30] {
        let mut files = image(Shape::Sparse);
        // The tables begin in the sector behind the directory, at sector 22; the copy comes first.
        let header = vmdk_parse::SparseHeader::decode(&files[0].1).unwrap();
        let vmdk_parse::GdOffset::At(gd) = header.gd_offset else { panic!() };
        let table = (gd.0 as usize + 1) * 512;
        files[0].1[table..table + 4].copy_from_slice(&sector.to_le_bytes());
        let memory = Memory::new(files, 0);
        let disk = open(&memory).unwrap();
        assert_eq!(run(read(&disk, &memory, 0, 512)).unwrap_err().kind(), ErrorKind::Corrupt, "sector {sector}");
        assert!(run(read(&disk, &memory, 4096, 512)).is_ok());
    }
}

#[test]
fn the_wanted_format_overrules_what_the_bytes_look_like() {
    let options = OpenOptions { format: Some(Format::Raw), ..OPTIONS };
    let disk = open_with(&Memory::new(image(Shape::Sparse), 0), &options).unwrap();
    assert_eq!(disk.info().format, Format::Raw);
}

/// An image whose changes a backup program tracks.
fn tracked() -> Vec<(String, Vec<u8>)> {
    let mut files = image(Shape::Sparse);
    let file = &mut files[0].1;
    file[4] = 3;
    let text = String::from_utf8_lossy(&file[512..10_752]).replace("version=1", "version=3");
    let text = text.replace("\nCID=", "\nchangeTrackPath=\"disk-ctk.vmdk\"\nCID=");
    file[512..10_752].copy_from_slice(&text.as_bytes()[..10_240]);
    files
}

#[test]
fn change_tracking_is_refused_for_writing_and_read_without_a_word() {
    let memory = Memory::new(tracked(), 1);
    let e = open(&memory).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::Unsupported);
    assert!(e.to_string().contains("--drop-change-tracking"), "{e}");
    let disk = open_with(&memory, &OpenOptions { read_only: true, ..OPTIONS }).unwrap();
    assert_eq!(run(read(&disk, &memory, 0, 512)).unwrap(), [0; 512]);
}

#[test]
fn change_tracking_is_dropped_by_the_first_write_and_not_before() {
    let memory = Memory::new(tracked(), 1);
    let dropping = OpenOptions { drop_change_tracking: true, ..OPTIONS };
    let disk = open_with(&memory, &dropping).unwrap();
    run(disk.close(&memory)).unwrap();
    assert!(memory.files() == tracked());
    let disk = open_with(&memory, &dropping).unwrap();
    run(async {
        write(&disk, &memory, 0, &[7; 512]).await.unwrap();
        disk.close(&memory).await.unwrap();
    });
    let bytes = &memory.files()[0].1;
    let text = String::from_utf8_lossy(&bytes[512..2048]).into_owned();
    assert_eq!(bytes[4], 1);
    assert!(text.contains("version=1\n#hangeTrackPath=\"disk-ctk.vmdk\"\nCID=12345678\n"), "{text}");
    let disk = open(&Memory::new(memory.files(), 1)).unwrap();
    assert_eq!(run(read(&disk, &memory, 0, 512)).unwrap(), [7; 512]);
}
