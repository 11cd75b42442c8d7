//! Metadata that names a place twice, or a place that belongs to something else: it is read as far as it makes sense, and nothing
//! is written.

use super::fixtures::{DISK, Shape, image, open, read, run, write};
use crate::ErrorKind;
use crate::memory::Memory;
use vmdk_parse::{GdOffset, SparseHeader};

/// Bytes that a grain table describes with grains of 4 KiB.
const COVERAGE: u64 = 512 * 4096;

/// Byte offsets in a file.
struct Places {
    gd: usize,
    rgd: usize,
}

impl Places {
    fn table(&self, file: &[u8], table: usize) -> usize {
        word(file, self.gd + table * 4) as usize * 512
    }
}

fn word(file: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(file[at..at + 4].try_into().unwrap())
}

fn put(file: &mut [u8], at: usize, sector: u32) {
    file[at..at + 4].copy_from_slice(&sector.to_le_bytes());
}

/// An image with a grain of ones at 0, one of twos at 4096, and one of threes at [`COVERAGE`], after `change`.
fn damaged(change: impl FnOnce(&mut Vec<u8>, &Places)) -> Memory {
    let memory = Memory::new(image(Shape::Sparse), 0);
    let disk = open(&memory).unwrap();
    run(async {
        for (offset, value) in [(0, 1), (4096, 2), (COVERAGE, 3)] {
            write(&disk, &memory, offset, &[value; 4096]).await.unwrap();
        }
        disk.close(&memory).await.unwrap();
    });
    let mut files = memory.files();
    let header = SparseHeader::decode(&files[0].1).unwrap();
    let GdOffset::At(gd) = header.gd_offset else { panic!("no directory") };
    let places = Places { gd: gd.0 as usize * 512, rgd: header.rgd_offset.0 as usize * 512 };
    change(&mut files[0].1, &places);
    Memory::new(files, 0)
}

/// The first change fails with these words, wherever it is; nothing in the file differs; reads go on.
fn nothing_changes(memory: &Memory, words: &str) {
    let before = memory.files();
    let disk = open(memory).unwrap();
    run(async {
        for offset in [0, 8192, DISK - 4096] {
            let e = write(&disk, memory, offset, &[9; 512]).await.unwrap_err();
            assert!(e.kind() == ErrorKind::Corrupt && e.to_string().contains(words), "{e}");
        }
        assert!(read(&disk, memory, 0, 4096).await.unwrap() == [1; 4096]);
        disk.close(memory).await.unwrap();
    });
    assert!(memory.files() == before);
}

#[test]
fn a_grain_that_two_entries_of_a_table_name_is_read_and_not_written() {
    let memory = damaged(|file, places| {
        let table = places.table(file, 0);
        let first = word(file, table);
        put(file, table + 7 * 4, first);
    });
    nothing_changes(&memory, "entry 7 of grain table 0 points to sector");
}

#[test]
fn a_grain_that_two_tables_name_is_read_and_not_written() {
    let memory = damaged(|file, places| {
        let first = word(file, places.table(file, 0));
        let other = places.table(file, 2);
        put(file, other + 511 * 4, first);
    });
    nothing_changes(&memory, "entry 511 of grain table 2 points to sector");
}

#[test]
fn grains_that_overlap_in_part_are_read_and_not_written() {
    for shift in [-7, -1, 1, 7] {
        let memory = damaged(|file, places| {
            let other = places.table(file, 2);
            let second = word(file, places.table(file, 0) + 4);
            put(file, other, second.strict_add_signed(shift));
        });
        nothing_changes(&memory, "entry 0 of grain table 2 points to sector");
    }
}

#[test]
fn a_table_that_two_directory_entries_name_is_read_and_not_written() {
    let memory = damaged(|file, places| {
        let first = word(file, places.gd);
        put(file, places.gd + 4, first);
    });
    nothing_changes(&memory, "grain table 1 at sector");
}

#[test]
fn a_table_that_is_its_own_copy_is_read_and_not_written() {
    let memory = damaged(|file, places| {
        let first = word(file, places.gd);
        put(file, places.rgd, first);
    });
    nothing_changes(&memory, "grain table 0 at sector");
}

#[test]
fn a_grain_where_a_table_is_is_read_and_not_written() {
    // A table behind the overhead, as one has that was made later.
    let memory = damaged(|file, places| {
        let from = places.table(file, 2);
        let (table, to) = (file[from..from + 2048].to_vec(), file.len().next_multiple_of(4096));
        file.resize(to + 8192, 0);
        file[to..to + 2048].copy_from_slice(&table);
        put(file, places.gd + 2 * 4, (to / 512) as u32);
        let first = places.table(file, 0);
        put(file, first + 9 * 4, (to / 512) as u32);
    });
    nothing_changes(&memory, "entry 9 of grain table 0 points to sector");
}

#[test]
fn a_grain_in_the_header_the_descriptor_or_a_directory_is_corrupt_whatever_the_overhead_says() {
    let memory = |sector: u32| {
        damaged(|file, places| {
            let table = places.table(file, 0);
            put(file, table + 4, sector);
            // overHead
            file[64..72].copy_from_slice(&1u64.to_le_bytes());
        })
    };
    let places = damaged(|_, _| {}).files()[0].1.clone();
    let header = SparseHeader::decode(&places).unwrap();
    let GdOffset::At(gd) = header.gd_offset else { panic!("no directory") };
    for sector in [1, 20, header.rgd_offset.0 as u32, header.rgd_offset.0 as u32 - 7, gd.0 as u32] {
        let memory = memory(sector);
        let disk = open(&memory).unwrap();
        let e = run(read(&disk, &memory, 4096, 512)).unwrap_err();
        assert!(e.kind() == ErrorKind::Corrupt && e.to_string().contains("in the metadata"), "sector {sector}: {e}");
        let e = run(write(&disk, &memory, 4096, &[9; 512])).unwrap_err();
        assert_eq!(e.kind(), ErrorKind::Corrupt, "sector {sector}: {e}");
    }
}

#[test]
fn a_table_in_the_header_the_descriptor_or_a_directory_is_corrupt() {
    for sector in [0u32, 1, 20, 21] {
        let memory = damaged(|file, places| put(file, places.gd + 4, sector));
        let disk = open(&memory).unwrap();
        if sector == 0 {
            // That is how an absent one is written.
            assert!(run(read(&disk, &memory, COVERAGE, 4096)).unwrap() == [0; 4096]);
            continue;
        }
        assert_eq!(run(read(&disk, &memory, COVERAGE, 512)).unwrap_err().kind(), ErrorKind::Corrupt, "{sector}");
        assert_eq!(run(write(&disk, &memory, COVERAGE, &[9; 512])).unwrap_err().kind(), ErrorKind::Corrupt, "{sector}");
        assert!(run(read(&disk, &memory, 0, 4096)).unwrap() == [1; 4096]);
    }
}

#[test]
fn directories_that_overlap_are_refused_for_writing() {
    let mut files = damaged(|_, _| {}).files();
    let gd = SparseHeader::decode(&files[0].1).unwrap();
    let GdOffset::At(gd) = gd.gd_offset else { panic!("no directory") };
    files[0].1[48..56].copy_from_slice(&gd.0.to_le_bytes());
    let e = open(&Memory::new(files, 0)).map(drop).unwrap_err();
    assert!(e.kind() == ErrorKind::Corrupt && e.to_string().contains("directories"), "{e}");
}
