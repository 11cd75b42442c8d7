//! Images that are made longer while they are served.

use super::fixtures::{DISK, NAME, OPTIONS, Shape, flush, image, open, open_with, read, run, write};
use crate::memory::Memory;
use crate::{Disk, DiskError, ErrorKind, FileId, FileIo, Files, OpenOptions};

const FLAT: &str = "d-flat.vmdk";

/// A descriptor whose last extent is flat and has so many sectors, from sector 2 of its file on.
fn descriptor(sectors: u64) -> String {
    format!(
        "# Disk DescriptorFile\nversion=1\nCID=fffffffe\nparentCID=ffffffff\ncreateType=\"monolithicFlat\"\n\
         RW 8 ZERO\nRW {sectors} FLAT \"{FLAT}\" 2\nddb.longContentID = \"000102030405060708090a0bfffffffe\"\n"
    )
}

/// Eight sectors of zeroes and eight of a file.
fn flat() -> Memory {
    Memory::new(vec![(NAME.to_owned(), descriptor(8).into_bytes()), (FLAT.to_owned(), vec![1; 10 * 512])], 0)
}

/// Puts a text into the descriptor, in place.
fn edit(memory: &Memory, text: &str) {
    let bytes = std::cell::RefCell::new(text.as_bytes().to_vec());
    run(memory.set_len(FileId(0), text.len() as u64)).unwrap();
    run(memory.write_at(FileId(0), &bytes, 0..text.len(), 0)).unwrap();
}

fn find(disk: &Disk, memory: &Memory) -> Result<u64, DiskError> {
    run(disk.find_growth(memory, |file| Files::len(memory, file))).map(|(size, _)| size)
}

fn refused(disk: &Disk, memory: &Memory) -> (ErrorKind, String) {
    let e = find(disk, memory).unwrap_err();
    (e.kind(), e.to_string())
}

#[test]
fn a_raw_image_that_grew_is_served_to_its_new_end_and_not_beyond() {
    for read_only in [false, true] {
        let memory = Memory::new(image(Shape::Raw), 0);
        let disk = open_with(&memory, &OpenOptions { read_only, ..OPTIONS }).unwrap();
        assert_eq!((disk.can_grow(), find(&disk, &memory).unwrap()), (true, DISK));
        assert_eq!(run(read(&disk, &memory, DISK, 512)).unwrap_err().kind(), ErrorKind::OutOfRange);
        // What is less than a sector is not part of the disk.
        run(memory.set_len(FileId(0), DISK + 8192 + 511)).unwrap();
        assert_eq!(run(read(&disk, &memory, DISK, 512)).unwrap_err().kind(), ErrorKind::OutOfRange);
        assert_eq!(find(&disk, &memory).unwrap(), DISK + 8192);
        assert_eq!(disk.geometry().size, DISK + 8192);
        assert_eq!(run(read(&disk, &memory, DISK - 512, 1024)).unwrap()[512..], [0; 512]);
        assert_eq!(run(read(&disk, &memory, DISK + 8192, 1)).unwrap_err().kind(), ErrorKind::OutOfRange);
        if !read_only {
            run(write(&disk, &memory, DISK + 8192 - 512, &[7; 512])).unwrap();
            run(flush(&disk, &memory)).unwrap();
            assert_eq!(memory.files()[0].1[DISK as usize + 8192 - 512..][..512], [7; 512]);
        }
    }
}

#[test]
fn a_disk_never_shrinks() {
    let memory = Memory::new(image(Shape::Raw), 0);
    let disk = open(&memory).unwrap();
    run(memory.set_len(FileId(0), DISK + 4096)).unwrap();
    assert_eq!(find(&disk, &memory).unwrap(), DISK + 4096);
    run(memory.set_len(FileId(0), DISK)).unwrap();
    let (kind, text) = refused(&disk, &memory);
    assert!(kind == ErrorKind::Corrupt && text.contains("has shrunk"), "{text}");
    assert_eq!(disk.geometry().size, DISK + 4096);
    assert!(run(read(&disk, &memory, DISK, 512)).is_err());
    assert!(run(read(&disk, &memory, DISK - 512, 512)).is_ok());
}

#[test]
fn a_flat_extent_grows_when_its_file_and_its_line_have_both() {
    let memory = flat();
    let disk = open(&memory).unwrap();
    assert_eq!(find(&disk, &memory).unwrap(), 16 * 512);
    run(memory.set_len(FileId(1), 14 * 512)).unwrap();
    assert_eq!(find(&disk, &memory).unwrap(), 16 * 512, "the descriptor says how long it is");
    edit(&memory, &descriptor(9));
    run(memory.set_len(FileId(1), 11 * 512 - 1)).unwrap();
    let (kind, text) = refused(&disk, &memory);
    assert!(kind == ErrorKind::Corrupt && text.contains("make it longer first"), "{text}");
    run(memory.set_len(FileId(1), 15 * 512)).unwrap();
    // One digit more: the first write would put the end of the longContentID where it was.
    edit(&memory, &descriptor(13));
    let (_, text) = refused(&disk, &memory);
    assert!(text.contains("at another place"), "{text}");
    edit(&memory, &descriptor(9));
    assert_eq!(find(&disk, &memory).unwrap(), 17 * 512);
    run(write(&disk, &memory, 16 * 512, &[7; 512])).unwrap();
    run(flush(&disk, &memory)).unwrap();
    let files = memory.files();
    assert_eq!(files[1].1[10 * 512..11 * 512], [7; 512]);
    let text = String::from_utf8(files[0].1.clone()).unwrap();
    assert!(text.contains("CID=12345678\n") && text.contains("0a0b12345678\""), "{text}");
    // From the first write on, the places do not matter, and the CID does.
    edit(&memory, &text.replace("RW 9 ", "RW 13 "));
    assert_eq!(find(&disk, &memory).unwrap(), 21 * 512);
    edit(&memory, &descriptor(13));
    let (_, text) = refused(&disk, &memory);
    assert!(text.contains("CID is fffffffe, and has to be 12345678"), "{text}");
}

#[test]
fn what_the_first_write_changes_in_a_descriptor_is_no_news() {
    let tracked = |sectors| descriptor(sectors).replace("version=1", "version=3") + "changeTrackPath=\"d-ctk.vmdk\"\n";
    let memory = Memory::new(vec![(NAME.to_owned(), tracked(8).into_bytes()), (FLAT.to_owned(), vec![1; 15 * 512])], 0);
    let disk = open_with(&memory, &OpenOptions { drop_change_tracking: true, ..OPTIONS }).unwrap();
    assert_eq!(find(&disk, &memory).unwrap(), 16 * 512);
    run(write(&disk, &memory, 8 * 512, &[7; 512])).unwrap();
    let text = String::from_utf8(memory.files()[0].1.clone()).unwrap();
    assert!(text.contains("version=1") && text.contains("#hangeTrackPath"), "{text}");
    edit(&memory, &text.replace("RW 8 FLAT", "RW 13 FLAT"));
    assert_eq!(find(&disk, &memory).unwrap(), 21 * 512);
}

#[test]
fn nothing_else_in_a_descriptor_may_be_new() {
    for (from, to, said) in [
        ("RW 8 ZERO", "RW 9 ZERO", "differs in more"),
        ("FLAT \"d-flat.vmdk\" 2", "FLAT \"d-flat.vmdk\" 1", "differs in more"),
        ("\"d-flat.vmdk\"", "\"e-flat.vmdk\"", "differs in more"),
        ("RW 8 ZERO", "RW 4 ZERO\nRW 4 ZERO", "differs in more"),
        ("RW 8 FLAT", "RW 7 FLAT", "has shrunk"),
        ("RW 8 FLAT", "RW 0 FLAT", "no sectors"),
        ("RW 8 FLAT", "RW 18446744073709551615 FLAT", "descriptor"),
        ("CID=fffffffe", "CID=00000001", "CID is 00000001"),
        ("version=1", "version=x", "descriptor"),
        ("RW 8 ZERO\n", "", "shorter than it was"),
    ] {
        let memory = flat();
        let disk = open(&memory).unwrap();
        edit(&memory, &descriptor(8).replacen(from, to, 1));
        let (kind, text) = refused(&disk, &memory);
        assert!(kind == ErrorKind::Corrupt && text.contains(said), "{from} -> {to}: {text}");
        assert_eq!(disk.geometry().size, 16 * 512);
    }
}

#[test]
fn what_says_in_a_header_how_large_it_is_does_not_grow() {
    for (shape, said) in
        [(Shape::Sparse, "in its header"), (Shape::Cowd(1), "in its header"), (Shape::Child, "below it")]
    {
        let memory = Memory::new(image(shape), 0);
        let disk = open(&memory).unwrap();
        let (kind, text) = refused(&disk, &memory);
        assert!(!disk.can_grow() && kind == ErrorKind::Unsupported && text.contains(said), "{shape:?}: {text}");
    }
}
