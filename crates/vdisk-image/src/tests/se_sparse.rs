//! seSparse extents, which are only read.

use super::fixtures::{NAME, OPTIONS, descriptor, open, open_with, read, run, write};
use crate::memory::Memory;
use crate::{DiskError, ErrorKind, OpenOptions};
use vmdk_parse::{
    SeArea, SeDirectoryEntry, SeGrainEntry, SeSparseHeader, SeVolatileHeader, Sectors, encode_se_entries,
};

const READ_ONLY: OpenOptions = OpenOptions { read_only: true, ..OPTIONS };

/// Three tables, the last of which has one grain and a half.
const SECTORS: u64 = 2 * 32768 + 12;

/// Bytes that a table covers.
const COVERAGE: u64 = 16 << 20;

/// Byte offsets of what [`extent`] makes.
const VOLATILE: usize = 512;
const DIRECTORY: usize = 8 * 512;
const TABLES: usize = 16 * 512;
const GRAINS: usize = (16 + 3 * 64) * 512;

fn area(start: usize, len: u64) -> SeArea {
    SeArea { start: Sectors(start as u64 / 512), len: Sectors(len) }
}

/// An extent of [`SECTORS`] whose second directory entry is absent and whose tables are in another order than they are named.
/// Grains 0 and 1 of the first table, and 0 and 1 of the last, are filled with 1 to 4, in another order as well.
fn extent() -> Vec<u8> {
    let header = SeSparseHeader {
        capacity: Sectors(SECTORS),
        volatile_header: area(VOLATILE, 1),
        journal_header: area(1024, 1),
        journal: area(1536, 1),
        grain_directory: area(DIRECTORY, 8),
        grain_tables: area(TABLES, 3 * 64),
        free_bitmap: area(0, 0),
        backmap: area(0, 0),
        grains: area(GRAINS, 0),
    };
    let mut file = header.encode().to_vec();
    file.extend(SeVolatileHeader { free_gt_number: 2, next_txn_seq_number: 1 }.encode());
    file.resize(GRAINS, 0);
    let mut entries = |at: usize, entries: &[u64]| {
        file[at..at + entries.len() * 8].copy_from_slice(&encode_se_entries(entries));
    };
    let table = |n| SeDirectoryEntry::Table(n).encode();
    entries(DIRECTORY, &[table(2), 0, table(0)]);
    let start = Sectors(GRAINS as u64 / 512);
    let grain = |n: u64| SeGrainEntry::At(Sectors(start.0 + n * 8)).encode(start).unwrap();
    let other = |e: SeGrainEntry| e.encode(start).unwrap();
    entries(
        TABLES + 2 * (32 << 10),
        &[grain(3), grain(1), other(SeGrainEntry::Unmapped), other(SeGrainEntry::Zero), other(SeGrainEntry::Absent)],
    );
    entries(TABLES, &[grain(0), grain(2)]);
    for byte in [3, 2, 4, 1] {
        file.extend([byte; 4096]);
    }
    file
}

fn image(line: &str, extent: Vec<u8>) -> Memory {
    let text = descriptor(&format!("{line} {SECTORS} SESPARSE \"a-sesparse.vmdk\""));
    Memory::new(vec![(NAME.to_owned(), text.into_bytes()), ("a-sesparse.vmdk".to_owned(), extent)], 0)
}

fn changed(at: usize, value: u64) -> Memory {
    let mut file = extent();
    file[at..at + 8].copy_from_slice(&value.to_le_bytes());
    image("RW", file)
}

fn chain(e: &DiskError) -> String {
    std::iter::successors(Some(e as &dyn std::error::Error), |e| e.source()).map(|e| format!("{e}: ")).collect()
}

/// The whole disk as it must be read.
fn expected() -> Vec<u8> {
    let mut bytes = vec![0; SECTORS as usize * 512];
    bytes[..4096].fill(1);
    bytes[4096..8192].fill(2);
    let last = 2 * COVERAGE as usize;
    bytes[last..last + 4096].fill(3);
    bytes[last + 4096..].fill(4);
    bytes
}

#[test]
fn every_kind_of_entry_is_read() {
    let memory = image("RW", extent());
    let disk = open_with(&memory, &READ_ONLY).unwrap();
    assert_eq!((disk.geometry().size, disk.info().grain_size), (SECTORS * 512, Some(4096)));
    run(async {
        assert!(read(&disk, &memory, 0, SECTORS * 512).await.unwrap() == expected());
        for offset in [4000, 8100, COVERAGE - 50, 2 * COVERAGE - 50, SECTORS * 512 - 100] {
            let got = read(&disk, &memory, offset, 100).await.unwrap();
            assert!(got == expected()[offset as usize..offset as usize + 100], "{offset}");
        }
        disk.close(&memory).await.unwrap();
    });
    assert!(memory.files()[1].1 == extent());
}

#[test]
fn it_is_refused_for_writing_and_left_alone_where_its_line_says_read_only() {
    let e = open(&image("RW", extent())).map(|_| ()).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::Unsupported);
    assert!(e.to_string().contains("use --read-only, or --overlay FILE to write beside it"), "{e}");
    let memory = image("RDONLY", extent());
    let disk = open(&memory).unwrap();
    run(async {
        assert_eq!(write(&disk, &memory, 0, &[9; 512]).await.unwrap_err().kind(), ErrorKind::ReadOnly);
        assert!(read(&disk, &memory, 0, 4096).await.unwrap() == [1; 4096]);
        disk.close(&memory).await.unwrap();
    });
    assert!(memory.files()[1].1 == extent());
}

#[test]
fn a_journal_that_was_not_replayed_is_refused_with_what_to_do() {
    let e = open_with(&changed(VOLATILE + 24, 1), &READ_ONLY).map(|_| ()).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::Unsupported);
    assert!(e.to_string().contains("open it once with the ESX host"), "{e}");
    let e = open_with(&changed(VOLATILE, 1), &READ_ONLY).map(|_| ()).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::Corrupt);
    let e = open_with(&changed(24, 16), &READ_ONLY).map(|_| ()).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::Unsupported, "{e}");
}

#[test]
fn a_bad_entry_fails_only_where_it_is_and_says_which_it_is() {
    let first_table = TABLES + 2 * (32 << 10);
    for (at, value, text) in [
        (first_table, 1, "a-sesparse.vmdk: entry 0 of grain table 0 is 0x1: "),
        (first_table, 4 << 60, "0x4000000000000000"),
        (first_table, u64::MAX, "entry 0 of grain table 0"),
        // The fifth grain of a file that has four, and one whose index needs more than 32 bits.
        (first_table, 3 << 60 | 4 << 48, "sector 240, past the end"),
        (first_table, 3 << 60 | 1 << 24, "sector 549755814096, past the end"),
        (first_table, 3 << 60 | 0xffff_ffff_ffff, "is 0x3000ffffffffffff: grain table entry is too large"),
        (DIRECTORY, 5, "grain table 0 has the directory entry 0x5: "),
        (DIRECTORY, 0x1000_0000 << 32 | 3, "entry 0x1000000000000003: grain directory entry 3 is outside 0 to 2"),
        (DIRECTORY, u64::MAX, "the directory entry 0xffffffffffffffff"),
        // The area of the tables may reach past the end of the file.
        (152, u64::MAX >> 10, "grain table 0 at sector 64016 does not lie in the file of 122880 bytes"),
    ] {
        let mut memory = changed(at, value);
        if at == 152 {
            let mut file = memory.files().remove(1).1;
            file[DIRECTORY..DIRECTORY + 8].copy_from_slice(&SeDirectoryEntry::Table(1000).encode().to_le_bytes());
            memory = image("RW", file);
        }
        let disk = open_with(&memory, &READ_ONLY).unwrap();
        run(async {
            let e = read(&disk, &memory, 0, 512).await.unwrap_err();
            assert_eq!(e.kind(), ErrorKind::Corrupt, "{value:x}");
            assert!(chain(&e).contains(text), "{value:x}: {}", chain(&e));
            assert!(read(&disk, &memory, 2 * COVERAGE, 4096).await.unwrap() == [3; 4096]);
        });
    }
}

#[test]
fn the_largest_directory_is_refused_in_a_tiny_file_and_read_in_pages_otherwise() {
    const LARGEST: u64 = 1 << 37;
    let directory = 32 << 20;
    let header = SeSparseHeader {
        capacity: Sectors(LARGEST),
        grain_directory: area(DIRECTORY, directory / 512),
        grain_tables: area(DIRECTORY + directory as usize, 64),
        grains: area(DIRECTORY + directory as usize + (32 << 10), 0),
        ..SeSparseHeader::decode(&extent()).unwrap()
    };
    let mut file = extent();
    file[..512].copy_from_slice(&header.encode());
    let text = descriptor(&format!("RW {LARGEST} SESPARSE \"a\""));
    let files = |file: &[u8]| vec![(NAME.to_owned(), text.clone().into_bytes()), ("a".to_owned(), file.to_vec())];
    let e = open_with(&Memory::new(files(&file), 0), &READ_ONLY).map(|_| ()).unwrap_err();
    assert!(e.kind() == ErrorKind::Corrupt && e.to_string().contains("grain directory"), "{e}");
    file.truncate(DIRECTORY);
    file.resize(DIRECTORY + directory as usize - 8, 0);
    file.extend(SeDirectoryEntry::Table(0).encode().to_le_bytes());
    file.resize(file.len() + (32 << 10) - 8, 0);
    file.extend((3u64 << 60).to_le_bytes());
    file.extend([6; 4096]);
    let memory = Memory::new(files(&file), 0);
    let disk = open_with(&memory, &READ_ONLY).unwrap();
    assert!(run(read(&disk, &memory, LARGEST * 512 - 4096, 4096)).unwrap() == [6; 4096]);
    assert!(memory.calls() < 10, "{} calls", memory.calls());
}

#[test]
fn every_field_at_its_limits_is_refused_or_read_without_panic() {
    let fields = (0..224).chain(VOLATILE..VOLATILE + 40).chain(DIRECTORY..DIRECTORY + 24).step_by(8);
    let big = u64::MAX / 512;
    for at in fields {
        for value in [0, 1, 7, 8, 64, 1 << 31, 1 << 37, (1 << 37) + 1, big - 65, big - 1, big, 1 << 60, u64::MAX] {
            let memory = changed(at, value);
            let Ok(disk) = open_with(&memory, &READ_ONLY) else { continue };
            for offset in [0, 4096, COVERAGE, 2 * COVERAGE, SECTORS * 512 - 512] {
                let _ = run(read(&disk, &memory, offset, 512));
            }
        }
    }
}

#[test]
fn every_truncation_is_refused_or_read_without_panic() {
    let whole = extent();
    let disk_bytes = expected();
    for len in (0..whole.len()).step_by(257) {
        let memory = image("RW", whole[..len].to_vec());
        let Ok(disk) = open_with(&memory, &READ_ONLY) else { continue };
        for offset in [0, 4096, COVERAGE, 2 * COVERAGE, SECTORS * 512 - 512] {
            if let Ok(bytes) = run(read(&disk, &memory, offset, 512)) {
                // What is missing of a grain was never written.
                let expected = &disk_bytes[offset as usize..offset as usize + 512];
                assert!(bytes.iter().zip(expected).all(|(got, e)| got == e || *got == 0), "{len}, {offset}");
            }
        }
    }
}
