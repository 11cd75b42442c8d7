//! Maps: what a link of a chain has and where, over the whole disk.

use super::fixtures::{
    DISK, NAME, OPTIONS, SHAPES, Shape, child_descriptor, content, image, open, open_with, read, request, run, sector,
    sparse, write,
};
use crate::memory::{Memory, Random};
use crate::{Disk, FileId, Op, OpenOptions, Run, RunKind};
use std::cell::RefCell;
use vmdk_parse::{GdOffset, HeaderFlags, SparseHeader};

/// The runs of a disk with where they begin.
fn map(disk: &Disk, memory: &Memory) -> Vec<(u64, Run)> {
    let size = disk.geometry().size;
    let mut runs = Vec::new();
    let mut at = 0;
    while at < size {
        let next = run(disk.map(memory, at, size - at)).unwrap();
        assert!(next.len > 0);
        runs.push((at, next));
        at += next.len;
    }
    assert_eq!(at, size);
    runs
}

/// Checks that every run is where it is said to be, and reads as it says.
fn check(disk: &Disk, memory: &Memory, expected: &[u8]) -> Vec<(u64, Run)> {
    let files = memory.files();
    let runs = map(disk, memory);
    for &(start, run) in &runs {
        let bytes = &expected[start as usize..][..run.len as usize];
        match run.kind {
            RunKind::Data { file, offset } => {
                assert!(bytes == &files[file.0 as usize].1[offset as usize..][..bytes.len()], "{start}: {run:?}");
            }
            RunKind::Zero { .. } | RunKind::Hole => assert!(bytes.iter().all(|b| *b == 0), "{start}: {run:?}"),
            RunKind::Compressed { .. } | RunKind::NoAccess => panic!("{run:?}"),
        }
    }
    runs
}

#[test]
fn data_is_where_the_map_says_in_every_kind_of_image() {
    for shape in SHAPES {
        let memory = Memory::new(image(shape), 3);
        let disk = open(&memory).unwrap();
        let mut expected = content(shape);
        let random = Random::new(7);
        check(&disk, &memory, &expected);
        for n in 0..60 {
            let at = random.below(DISK / 512 - 400) * 512;
            let len = (random.below(if n % 10 == 0 { 300 } else { 30 }) + 1) * 512;
            let range = at as usize..(at + len) as usize;
            if n % 4 == 3 {
                run(request(&disk, &memory, Op::WriteZeroes, at, len, &RefCell::default())).unwrap();
                expected[range].fill(0);
            } else {
                let bytes: Vec<u8> = (0..len / 512).flat_map(|s| sector((n << 32) + s + 1)).collect();
                run(write(&disk, &memory, at, &bytes)).unwrap();
                expected[range].copy_from_slice(&bytes);
            }
        }
        let before = check(&disk, &memory, &expected);
        run(disk.close(&memory)).unwrap();
        // Also from the file, and beginning anywhere.
        let again = Memory::new(memory.files(), 0);
        let disk = open(&again).unwrap();
        assert_eq!(check(&disk, &again, &expected), before, "{shape:?}");
        for (start, whole) in before {
            for at in [start + 1, start + whole.len - 1] {
                let part = run(disk.map(&again, at, DISK - at)).unwrap();
                assert_eq!((at + part.len, part.depth), (start + whole.len, whole.depth), "{shape:?}");
            }
            assert_eq!(run(disk.map(&again, start, 1)).unwrap().len, 1);
            let span = run(disk.span(&again, start, DISK - start)).unwrap();
            assert!(span.hole == whole.is_hole() && span.len >= whole.len);
        }
    }
}

#[test]
fn the_depth_is_that_of_the_link_that_has_it() {
    let memory = Memory::new(image(Shape::Child), 0);
    let disk = open(&memory).unwrap();
    run(write(&disk, &memory, 296 * 512, &[1; 4096])).unwrap();
    let at = |sector: u64| run(disk.map(&memory, sector * 512, DISK - sector * 512)).unwrap();
    // The first sector of the base is stored, as zeroes.
    let RunKind::Zero { place: Some((FileId(2), _)) } = at(0).kind else { panic!("{:?}", at(0)) };
    assert_eq!((at(0).depth, at(0).len), (2, 512));
    for (sector, depth, file, sectors) in
        [(1, 2, 2, 95), (96, 1, 1, 32), (128, 2, 2, 160), (288, 1, 1, 8), (296, 0, 0, 8)]
    {
        let run = at(sector);
        assert!(matches!(run.kind, RunKind::Data { file: FileId(n), .. } if n == file), "{sector}: {run:?}");
        assert_eq!((run.depth, run.len), (depth, sectors * 512), "{sector}");
    }
    // Past the end of the base, which is shorter.
    assert_eq!((at(8200).depth, at(8200).kind), (1, RunKind::Hole));
}

/// An image of one file, with these entries in its first grain table (in the first sector of it).
fn with_entries(parent: &str, entries: &[u32]) -> (String, Vec<u8>) {
    let text = child_descriptor(parent, &format!("RW {} SPARSE \"{NAME}\"", DISK / 512));
    let mut file = sparse(DISK / 512, 8, false, true, &text);
    let mut header = SparseHeader::decode(&file).unwrap();
    header.version = 2;
    header.flags = header.flags.with(HeaderFlags::ZEROED_GRAIN);
    file[..512].copy_from_slice(&header.encode());
    let at = first_table(&file);
    for (n, entry) in entries.iter().enumerate() {
        file[at + n * 4..][..4].copy_from_slice(&entry.to_le_bytes());
    }
    (NAME.to_owned(), file)
}

fn first_table(file: &[u8]) -> usize {
    let GdOffset::At(gd) = SparseHeader::decode(file).unwrap().gd_offset else { panic!("no directory") };
    u32::from_le_bytes(file[gd.0 as usize * 512..][..4].try_into().unwrap()) as usize * 512
}

#[test]
fn a_zeroed_grain_is_present_and_has_no_place_and_an_absent_one_is_the_parents() {
    let of_parent = "parentCID=12345678\nparentFileNameHint=\"parent.vmdk\"";
    let mut files = image(Shape::Child);
    files[0] = with_entries(of_parent, &[1, 1, 0, 1]);
    let memory = Memory::new(files, 0);
    let disk = open(&memory).unwrap();
    let runs = map(&disk, &memory);
    assert_eq!(runs[0].1, Run { len: 8192, depth: 0, kind: RunKind::Zero { place: None } });
    assert_eq!((runs[1].1.depth, runs[1].1.len), (2, 4096));
    assert_eq!(runs[2].1, Run { len: 4096, depth: 0, kind: RunKind::Zero { place: None } });
    let alone = Memory::new(vec![with_entries("parentCID=ffffffff", &[0, 1])], 0);
    let disk = open(&alone).unwrap();
    let kinds: Vec<_> = map(&disk, &alone).iter().map(|(at, run)| (*at, run.depth, run.kind)).collect();
    assert_eq!(kinds, [(0, 0, RunKind::Hole), (4096, 0, RunKind::Zero { place: None }), (8192, 0, RunKind::Hole)]);
}

#[test]
fn grains_that_follow_one_another_in_the_file_are_one_run_and_others_are_not() {
    let (name, mut file) = with_entries("parentCID=ffffffff", &[]);
    let first = (file.len() / 512) as u32;
    let (_, with) = with_entries("parentCID=ffffffff", &[first, first + 8, first + 24, first + 16]);
    file = with;
    file.extend((0..32).flat_map(|n| sector(n + 1)));
    let memory = Memory::new(vec![(name, file)], 0);
    let disk = open(&memory).unwrap();
    let lens: Vec<_> = map(&disk, &memory).iter().map(|(_, run)| (run.len, run.is_hole())).collect();
    assert_eq!(lens, [(8192, false), (4096, false), (4096, false), (DISK - 16384, true)]);
}

#[test]
fn what_is_wrong_in_a_table_is_an_error_and_not_a_hole() {
    let memory = Memory::new(vec![with_entries("parentCID=ffffffff", &[0, 1 << 30])], 0);
    let disk = open(&memory).unwrap();
    let e = run(disk.map(&memory, 0, DISK)).unwrap_err();
    assert!(e.to_string().contains("past the end of the file"), "{e}");
}

/// qemu-img makes all tables with the image, as a hole of the file; others make none.
#[test]
fn the_empty_tables_of_a_large_image_are_not_read() {
    let sectors = (128 << 30) / 512;
    for tables in [true, false] {
        let text = child_descriptor("parentCID=ffffffff", &format!("RW {sectors} SPARSE \"{NAME}\""));
        let mut file = sparse(sectors, 128, false, tables, &text);
        let read_only = OpenOptions { read_only: true, ..OPTIONS };
        let memory = Memory::new(vec![(NAME.to_owned(), file.clone())], 0);
        let disk = open_with(&memory, &read_only).unwrap();
        let before = memory.calls();
        assert_eq!(map(&disk, &memory), [(0, Run { len: 128 << 30, depth: 0, kind: RunKind::Hole })]);
        // Four pages of the directory, and a look at each of them and at the first table of each at most.
        assert!(memory.calls() - before <= 12, "{}", memory.calls() - before);
        if tables {
            // One grain, in the last entry of table 1500.
            let place = (file.len() / 512) as u32;
            let entry = first_table(&file) + 1500 * 2048 + 511 * 4;
            file[entry..][..4].copy_from_slice(&place.to_le_bytes());
            file.extend((0..128).flat_map(|n| sector(n + 1)));
            let memory = Memory::new(vec![(NAME.to_owned(), file)], 0);
            let disk = open_with(&memory, &read_only).unwrap();
            let before = memory.calls();
            let runs = map(&disk, &memory);
            assert!(memory.calls() - before < 40, "{}", memory.calls() - before);
            let start = 1501 * 512 * 65536 - 65536;
            assert_eq!(runs.iter().map(|r| r.0).collect::<Vec<_>>(), [0, start, start + 65536]);
            assert_eq!(run(read(&disk, &memory, start, 512)).unwrap(), sector(1));
        }
    }
}
