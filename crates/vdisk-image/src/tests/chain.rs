//! Chains: how a parent is found and checked, and that it is never touched.

use super::fixtures::{
    DISK, NAME, OPTIONS, Shape, child_descriptor, content, image, open, open_with, read, request, run, sector, sparse,
    write,
};
use crate::memory::Memory;
use crate::{ErrorKind, Op, OpenOptions};
use std::cell::RefCell;

const SECTORS: u64 = DISK / 512;

/// A link with these lines about its parent.
fn link(name: &str, parent: &str) -> (String, Vec<u8>) {
    let text = child_descriptor(parent, &format!("RW {SECTORS} SPARSE \"{name}\""));
    (name.to_owned(), sparse(SECTORS, 128, true, true, &text))
}

fn refused(files: Vec<(String, Vec<u8>)>) -> (ErrorKind, String) {
    let e = open(&Memory::new(files, 0)).unwrap_err();
    (e.kind(), e.to_string())
}

#[test]
fn a_read_goes_down_the_chain_to_the_first_link_that_has_something() {
    let memory = Memory::new(image(Shape::Child), 0);
    let disk = open(&memory).unwrap();
    assert_eq!(disk.info().parents, ["parent.vmdk", "base.vmdk"]);
    assert!(run(read(&disk, &memory, 0, DISK)).unwrap() == content(Shape::Child));
}

#[test]
fn a_write_copies_what_is_around_it_and_leaves_the_parents_alone() {
    let before = image(Shape::Child);
    let memory = Memory::new(before.clone(), 0);
    let disk = open(&memory).unwrap();
    // Inside a grain of 4 KiB: on both sides something of the parent and of the base.
    run(write(&disk, &memory, 290 * 512 + 100, &[1; 200])).unwrap();
    run(disk.close(&memory)).unwrap();
    let after = memory.files();
    assert!(after[1..] == before[1..], "a parent was changed");
    assert!(after[0] != before[0]);
    let mut expected = content(Shape::Child);
    expected[290 * 512 + 100..][..200].fill(1);
    let again = Memory::new(after, 0);
    let disk = open(&again).unwrap();
    assert!(run(read(&disk, &again, 0, DISK)).unwrap() == expected);
}

#[test]
fn zeroes_over_a_parent_stay_zeroes_after_a_new_attach_and_take_no_space() {
    let memory = Memory::new(image(Shape::Child), 0);
    let disk = open(&memory).unwrap();
    // From the middle of a grain to the middle of another; far more is absent in every link behind it.
    let (from, to) = (150 * 512 + 7, 5100 * 512 + 9);
    run(request(&disk, &memory, Op::WriteZeroes, from, to - from, &RefCell::default())).unwrap();
    run(disk.close(&memory)).unwrap();
    let mut expected = content(Shape::Child);
    expected[from as usize..to as usize].fill(0);
    let again = Memory::new(memory.files(), 0);
    let disk = open(&again).unwrap();
    assert!(run(read(&disk, &again, 0, DISK)).unwrap() == expected);
    let span = run(disk.span(&again, 5001 * 512, 4096)).unwrap();
    assert!(span.hole, "{span:?}");
}

#[test]
fn a_discard_promises_nothing_where_only_the_parent_has_something() {
    let memory = Memory::new(image(Shape::Child), 0);
    let disk = open(&memory).unwrap();
    run(request(&disk, &memory, Op::Discard, 0, DISK, &RefCell::default())).unwrap();
    assert!(run(read(&disk, &memory, 0, DISK)).unwrap() == content(Shape::Child));
}

/// A grain that is marked as zeroes (version 2) hides the parent, and the rest of it stays zero when it is written.
#[test]
fn a_zeroed_grain_takes_nothing_of_the_parent_when_it_is_written() {
    let mut files = image(Shape::Child);
    let mut header = vmdk_parse::SparseHeader::decode(&files[0].1).unwrap();
    header.version = 2;
    header.flags = header.flags.with(vmdk_parse::HeaderFlags::ZEROED_GRAIN);
    files[0].1[..512].copy_from_slice(&header.encode());
    // The child has no tables: gives it one by a write, and marks its neighbour.
    let memory = Memory::new(files, 0);
    let disk = open(&memory).unwrap();
    run(write(&disk, &memory, 8 * 512, &[1; 4096])).unwrap();
    run(disk.close(&memory)).unwrap();
    let mut files = memory.files();
    let vmdk_parse::GdOffset::At(gd) = header.gd_offset else { panic!() };
    let word = |bytes: &[u8], at: u64| u32::from_le_bytes(bytes[at as usize..][..4].try_into().unwrap());
    for directory in [gd, header.redundant().unwrap()] {
        let table = u64::from(word(&files[0].1, directory.0 * 512)) * 512;
        files[0].1[table as usize..][..4].copy_from_slice(&1u32.to_le_bytes());
    }
    let memory = Memory::new(files, 0);
    let disk = open(&memory).unwrap();
    assert_eq!(run(read(&disk, &memory, 0, 4096)).unwrap(), [0; 4096]);
    run(write(&disk, &memory, 1024, &[7; 512])).unwrap();
    let mut expected = [0; 4096];
    expected[1024..1536].fill(7);
    assert!(run(read(&disk, &memory, 0, 4096)).unwrap() == expected);
}

#[test]
fn a_missing_parent_is_named() {
    let (kind, text) = refused(vec![link(NAME, "parentCID=00000007\nparentFileNameHint=\"base.vmdk\"")]);
    assert_eq!(kind, ErrorKind::NotFound);
    assert!(text.contains("disk.vmdk") && text.contains("\"base.vmdk\""), "{text}");
}

#[test]
fn a_parent_that_changed_is_refused_with_both_ids_unless_told_otherwise() {
    let files = vec![
        link(NAME, "parentCID=00000007\nparentFileNameHint=\"base.vmdk\""),
        link("base.vmdk", "parentCID=ffffffff"),
    ];
    let (kind, text) = refused(files.clone());
    assert_eq!(kind, ErrorKind::Corrupt);
    assert!(text.contains("00000007") && text.contains("0badcafe") && text.contains("--ignore-parent-cid"), "{text}");
    let ignoring = OpenOptions { ignore_parent_content_id: true, ..OPTIONS };
    assert!(open_with(&Memory::new(files.clone(), 0), &ignoring).is_err(), "for writing");
    let disk = open_with(&Memory::new(files, 0), &OpenOptions { read_only: true, ..ignoring }).unwrap();
    assert!(disk.info().notices[0].contains("00000007"), "{:?}", disk.info().notices);
}

#[test]
fn chains_that_contradict_themselves_are_refused() {
    for (parent, expected) in [
        ("parentCID=00000007", "does not say where"),
        ("parentCID=00000007\nparentFileNameHint=\"\"", "does not say where"),
        ("parentCID=ffffffff\nparentFileNameHint=\"base.vmdk\"", "no parentCID"),
    ] {
        let (kind, text) = refused(vec![link(NAME, parent), link("base.vmdk", "parentCID=ffffffff")]);
        assert_eq!(kind, ErrorKind::Corrupt, "{text}");
        assert!(text.contains(expected), "{text}");
    }
}

#[test]
fn circles_and_endless_chains_end() {
    let of = |name: &str| format!("parentCID=0badcafe\nparentFileNameHint=\"{name}\"");
    assert!(open(&Memory::new(vec![link(NAME, &of(NAME))], 0)).is_err());
    let (kind, text) = refused(vec![link(NAME, &of("b.vmdk")), link("b.vmdk", &of(NAME))]);
    assert_eq!(kind, ErrorKind::Unsupported, "{text}");
    assert!(text.contains("64 links"), "{text}");
    let long: Vec<_> = (0..64).map(|n| link(&format!("{n}.vmdk"), &of(&format!("{}.vmdk", n + 1)))).collect();
    let last = link("64.vmdk", "parentCID=ffffffff");
    let (_, text) = refused([long.clone(), vec![last.clone()]].concat());
    assert!(text.contains("64 links"), "{text}");
    let disk = open(&Memory::new([long[1..].to_vec(), vec![last]].concat(), 0)).unwrap();
    assert_eq!(disk.info().parents.len(), 63);
}

/// A raw disk could begin like anything: a parent is a VMDK.
#[test]
fn a_raw_parent_is_refused() {
    let files = vec![
        link(NAME, "parentCID=0badcafe\nparentFileNameHint=\"base.img\""),
        ("base.img".to_owned(), sector(7).repeat(SECTORS as usize)),
    ];
    assert_eq!(refused(files).0, ErrorKind::NotAnImage);
}

/// A parent that cannot be read fails the write, as often as it is tried, and takes no space each time.
#[test]
fn a_write_that_needs_what_cannot_be_read_leaks_nothing() {
    let mut files = image(Shape::Child);
    // The first entry of the base's first table leads far away.
    let header = vmdk_parse::SparseHeader::decode(&files[2].1).unwrap();
    let vmdk_parse::GdOffset::At(gd) = header.gd_offset else { panic!() };
    let table = u32::from_le_bytes(files[2].1[gd.0 as usize * 512..][..4].try_into().unwrap()) as usize * 512;
    files[2].1[table..table + 4].copy_from_slice(&0x00ff_ff80_u32.to_le_bytes());
    let memory = Memory::new(files, 0);
    let disk = open(&memory).unwrap();
    run(async {
        let e = write(&disk, &memory, 1000, &[1; 512]).await.unwrap_err();
        assert_eq!(e.kind(), ErrorKind::Corrupt, "{e}");
        let len = memory.files()[0].1.len();
        for _ in 0..1000 {
            write(&disk, &memory, 1000, &[1; 512]).await.unwrap_err();
        }
        assert_eq!(memory.files()[0].1.len(), len);
        // Zeroes over it need nothing of it, and then there is something to write to.
        request(&disk, &memory, Op::WriteZeroes, 0, 4096, &RefCell::default()).await.unwrap();
        write(&disk, &memory, 1000, &[1; 512]).await.unwrap();
        let got = read(&disk, &memory, 0, 4096).await.unwrap();
        assert!(got.iter().enumerate().all(|(n, b)| *b == u8::from((1000..1512).contains(&n))));
    });
}
