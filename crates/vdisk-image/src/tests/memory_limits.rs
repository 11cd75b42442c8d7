//! Tables and pages of the directory that have to leave memory for others.

use super::fixtures::{NAME, descriptor, faults, flush, open, read, run, run_all, sparse, write};
use crate::image::Layout;
use crate::memory::Memory;
use crate::table::PAGE_ENTRIES;
use crate::{Disk, ErrorKind};
use std::rc::Rc;

/// Bytes that a grain table describes with grains of 4 KiB.
const COVERAGE: u64 = 512 * 4096;
const PAGES: u64 = 5;

fn large(tables: bool) -> Memory {
    let sectors = PAGES * PAGE_ENTRIES * COVERAGE / 512;
    let text = descriptor(&format!("RW {sectors} SPARSE \"{NAME}\""));
    Memory::new(vec![(NAME.to_owned(), sparse(sectors, 8, true, tables, &text))], 0)
}

/// Bytes of memory that tables and pages take.
fn taken(disk: &Disk) -> (usize, usize) {
    let Layout::Sparse(s) = &disk.chain.top.extents[0].layout else { panic!("not sparse") };
    let state = s.state.lock().unwrap();
    assert!(state.clock.len() <= 4 && state.page_clock.len() <= PAGES as usize);
    (state.table_bytes, state.page_bytes)
}

/// Where the n-th write goes: from page to page, and to several tables of each.
fn place(n: u64) -> u64 {
    (n % PAGES * PAGE_ENTRIES + n * 7 % 90) * COVERAGE + n % 500 * 4096
}

#[test]
fn with_memory_for_one_page_and_one_table_nothing_is_lost() {
    let memory = large(true);
    let mut disk = open(&memory).unwrap();
    disk.chain.share_memory(1);
    run(async {
        for n in 0..200 {
            write(&disk, &memory, place(n), &[n as u8 + 1; 4096]).await.unwrap();
            if n % 3 == 2 {
                flush(&disk, &memory).await.unwrap();
                assert!(read(&disk, &memory, place(n / 2), 4096).await.unwrap() == [n as u8 / 2 + 1; 4096]);
                let (tables, pages) = taken(&disk);
                // One that was loaded, and those that were dirty when it was.
                assert!(tables <= 4 * 2200 && pages <= 3 * 17_000, "{tables} {pages}");
            }
        }
        disk.close(&memory).await.unwrap();
    });
    let again = open(&memory).unwrap();
    for n in 0..200 {
        assert!(run(read(&again, &memory, place(n), 4096)).unwrap() == [n as u8 + 1; 4096], "{n}");
    }
    assert_eq!(faults(&memory.files(), true), [""; 0]);
}

#[test]
fn a_directory_that_changed_stays_until_the_end() {
    let memory = large(false);
    let mut disk = open(&memory).unwrap();
    disk.chain.share_memory(1);
    run(async {
        for n in 0..100 {
            write(&disk, &memory, place(n), &[n as u8 + 1; 4096]).await.unwrap();
            assert!(read(&disk, &memory, place(n / 2), 4096).await.unwrap() == [n as u8 / 2 + 1; 4096]);
        }
        disk.close(&memory).await.unwrap();
    });
    let again = open(&memory).unwrap();
    for n in 0..100 {
        assert!(run(read(&again, &memory, place(n), 4096)).unwrap() == [n as u8 + 1; 4096], "{n}");
    }
    assert_eq!(faults(&memory.files(), true), [""; 0]);
}

#[test]
fn requests_that_push_one_another_out_of_memory_all_end() {
    let memory = Rc::new(large(true));
    let mut disk = open(&memory).unwrap();
    disk.chain.share_memory(1);
    let disk = Rc::new(disk);
    run_all((0..64).map(|n| {
        let (disk, memory) = (Rc::clone(&disk), Rc::clone(&memory));
        async move {
            write(&disk, &memory, place(n), &[n as u8 + 1; 4096]).await.unwrap();
            flush(&disk, &memory).await.unwrap();
            assert!(read(&disk, &memory, place(n), 4096).await.unwrap() == [n as u8 + 1; 4096]);
        }
    }));
}

#[test]
fn a_chain_of_more_tables_than_anybody_has_is_refused() {
    // 64 TiB with grains of 4 KiB, whose directory is a hole of 128 MiB: one file is enough, for it is only read.
    let sectors = 64u64 << 31;
    let one = |n: u64| format!("RDONLY {n} SPARSE \"big.vmdk\"\n").repeat(33);
    let mut big = sparse(1 << 20, 8, false, false, "");
    big[12..20].copy_from_slice(&sectors.to_le_bytes());
    let gd = 21 * 512;
    big.resize(gd + (128 << 20), 0);
    let files =
        |lines: String| vec![(NAME.to_owned(), descriptor(&lines).into_bytes()), ("big.vmdk".to_owned(), big.clone())];
    let e = open(&Memory::new(files(one(sectors)), 0)).map(drop).unwrap_err();
    assert!(e.kind() == ErrorKind::Unsupported && e.to_string().contains("grain tables"), "{e}");
    assert!(open(&Memory::new(files(one(sectors / 64)), 0)).is_ok());
}
