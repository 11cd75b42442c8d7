//! Images whose metadata is wrong on purpose, and orders of events that only threads can make.

use super::fixtures::{DISK, NAME, Shape, flush, image, open, read, run, sparse, write};
use crate::ErrorKind;
use crate::flush::{FlushPlan, Step};
use crate::memory::Memory;
use vmdk_parse::{GdOffset, SparseHeader};

/// Bytes that a grain table describes with grains of 4 KiB.
const COVERAGE: u64 = 512 * 4096;

/// An empty image in which `change` may do what it likes to (file, byte offset of the directory, of its copy).
fn damaged(change: impl FnOnce(&mut Vec<u8>, usize, usize)) -> Memory {
    let mut files = image(Shape::Sparse);
    let header = SparseHeader::decode(&files[0].1).unwrap();
    let GdOffset::At(gd) = header.gd_offset else { panic!("no directory") };
    change(&mut files[0].1, gd.0 as usize * 512, header.rgd_offset.0 as usize * 512);
    Memory::new(files, 1)
}

fn put(file: &mut [u8], at: usize, sector: usize) {
    file[at..at + 4].copy_from_slice(&(sector as u32).to_le_bytes());
}

#[test]
fn a_write_that_ends_while_a_flush_is_planned_is_not_in_the_plan_without_its_barrier() {
    let memory = Memory::new(image(Shape::Sparse), 1);
    let disk = open(&memory).unwrap();
    run(async {
        write(&disk, &memory, 0, &[1; 4096]).await.unwrap();
        flush(&disk, &memory).await.unwrap();
    });
    // Another thread's write, between the two halves of the planning.
    let plan = FlushPlan::new(disk.chain.top.writable_sparse(), || {
        run(write(&disk, &memory, 8192, &[2; 4096])).unwrap();
        Vec::new()
    });
    assert!(!plan.steps.iter().any(|s| matches!(s, Step::Write { .. })), "{:?}", plan.steps);
}

/// Once the file had grown over it, what is missing would be zeroes, or what a guest has written elsewhere, and nobody would know.
fn is_read_and_not_written(memory: &Memory, reads: Result<(), ErrorKind>) {
    let before = memory.files();
    let disk = open(memory).unwrap();
    run(async {
        for _ in 0..2 {
            let e = write(&disk, memory, COVERAGE, &[0x41; 64 << 10]).await.unwrap_err();
            assert_eq!(e.kind(), ErrorKind::Corrupt);
            assert!(e.to_string().contains("which was cut off: use --read-only"), "{e}");
        }
        assert_eq!(read(&disk, memory, 0, 512).await.map(drop).map_err(|e| e.kind()), reads);
        assert_eq!(read(&disk, memory, COVERAGE, 512).await.unwrap(), [0; 512]);
        disk.close(memory).await.unwrap();
    });
    assert!(memory.files() == before, "a refused image is left as it is");
}

#[test]
fn an_image_with_a_table_past_its_end_does_not_change() {
    let memory = damaged(|file, gd, _| {
        let end = file.len() / 512;
        put(file, gd, end);
    });
    is_read_and_not_written(&memory, Err(ErrorKind::Corrupt));
}

#[test]
fn an_image_with_a_copy_past_its_end_does_not_change() {
    let memory = damaged(|file, _, rgd| {
        let end = file.len() / 512;
        put(file, rgd, end);
    });
    is_read_and_not_written(&memory, Ok(()));
}

#[test]
fn an_image_with_a_grain_past_its_end_does_not_change() {
    for last in [false, true] {
        let memory = damaged(|file, gd, _| {
            let table = u32::from_le_bytes(file[gd..gd + 4].try_into().unwrap()) as usize * 512;
            let end = (file.len() / 512).next_multiple_of(8);
            put(file, table, if last { u32::MAX as usize & !7 } else { end });
        });
        is_read_and_not_written(&memory, Err(ErrorKind::Corrupt));
    }
}

/// A sparse extent that may change, and one that may not.
fn half_read_only() -> Memory {
    let sectors = DISK / 512 / 2;
    let text = format!(
        "# Disk DescriptorFile\nCID=00000001\nparentCID=ffffffff\ncreateType=\"custom\"\n\
         RW {sectors} SPARSE \"a\"\nRDONLY {sectors} SPARSE \"b\"\n"
    );
    let extent = || sparse(sectors, 8, true, true, "");
    Memory::new(vec![(NAME.to_owned(), text.into_bytes()), ("a".to_owned(), extent()), ("b".to_owned(), extent())], 1)
}

#[test]
fn an_extent_that_is_read_only_is_not_touched_and_the_others_are_written() {
    let memory = half_read_only();
    let protected = memory.files()[2].1.clone();
    let disk = open(&memory).unwrap();
    run(async {
        write(&disk, &memory, 0, &[1; 8192]).await.unwrap();
        flush(&disk, &memory).await.unwrap();
        assert_eq!(write(&disk, &memory, DISK / 2, &[1; 512]).await.unwrap_err().kind(), ErrorKind::ReadOnly);
        disk.close(&memory).await.unwrap();
    });
    assert!(memory.files()[2].1 == protected);
}

#[test]
fn a_write_that_is_refused_half_way_leaks_nothing() {
    let memory = half_read_only();
    let disk = open(&memory).unwrap();
    run(async {
        for _ in 0..200 {
            let e = write(&disk, &memory, DISK / 2 - 8192, &[1; 16384]).await.unwrap_err();
            assert_eq!(e.kind(), ErrorKind::ReadOnly);
        }
        disk.close(&memory).await.unwrap();
    });
    let empty = sparse(DISK / 512 / 2, 8, true, true, "").len();
    assert!(memory.files()[1].1.len() <= empty + 8192, "{} bytes", memory.files()[1].1.len());
}

#[test]
fn a_grain_in_which_the_file_ends_is_not_read_past_that() {
    let memory = damaged(|file, gd, _| {
        let table = u32::from_le_bytes(file[gd..gd + 4].try_into().unwrap()) as usize * 512;
        let end = (file.len() / 512).next_multiple_of(8);
        put(file, table, end);
        file.resize(end * 512 + 1000, 7);
    });
    let disk = open(&memory).unwrap();
    run(async {
        read(&disk, &memory, 0, 512).await.unwrap();
        for _ in 0..3 {
            let before = memory.calls();
            assert!(read(&disk, &memory, 0, 512).await.unwrap() == [7; 512]);
            assert_eq!(memory.calls() - before, 1, "more than the read that is needed");
        }
        assert!(read(&disk, &memory, 512, 1024).await.unwrap() == [vec![7; 488], vec![0; 536]].concat());
    });
}
