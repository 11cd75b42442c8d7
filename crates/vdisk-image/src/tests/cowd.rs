//! COWD extents: what only they have, and hostile ones. Their data is tested with that of all shapes.

use super::fixtures::{
    DISK, NAME, OPTIONS, Shape, cowd, descriptor, faults, flush, image, open, open_with, read, run, write,
};
use crate::allocate::Plan;
use crate::image::{Layout, Mapping};
use crate::memory::Memory;
use crate::{DiskError, ErrorKind, OpenOptions};
use vmdk_parse::CowdHeader;

const READ_ONLY: OpenOptions = OpenOptions { read_only: true, ..OPTIONS };

/// Bytes that a grain table describes with grains of a sector.
const COVERAGE: u64 = 4096 * 512;

/// Sector of the directory.
const GD: usize = 4;

fn put(file: &mut [u8], at: usize, value: u64) {
    file[at..at + 4].copy_from_slice(&u32::try_from(value).unwrap().to_le_bytes());
}

fn word(file: &[u8], at: usize) -> usize {
    u32::from_le_bytes(file[at..at + 4].try_into().unwrap()) as usize
}

/// An image with grains of a sector, in every one of whose 3 tables something was written; `change` gets the extent.
fn changed(change: impl FnOnce(&mut Vec<u8>)) -> Memory {
    let memory = Memory::new(image(Shape::Cowd(1)), 1);
    let disk = open(&memory).unwrap();
    run(async {
        for n in 0..3 {
            write(&disk, &memory, n * COVERAGE, &[n as u8 + 1; 4096]).await.unwrap();
        }
        disk.close(&memory).await.unwrap();
    });
    let mut files = memory.files();
    change(&mut files[1].1);
    Memory::new(files, 1)
}

/// The byte at which a table begins.
fn table(file: &[u8], n: usize) -> usize {
    word(file, GD * 512 + n * 4) * 512
}

fn kind_of<T>(result: Result<T, DiskError>) -> Option<ErrorKind> {
    result.err().map(|e| e.kind())
}

#[test]
fn it_is_marked_while_it_is_open_and_says_where_free_space_begins() {
    let memory = Memory::new(image(Shape::Cowd(3)), 1);
    let disk = open(&memory).unwrap();
    run(async {
        write(&disk, &memory, 0, &[1; 4096]).await.unwrap();
        flush(&disk, &memory).await.unwrap();
        let file = memory.files()[1].1.clone();
        assert_eq!((word(&file, 1648), word(&file, 28)), (1, 4 + 1 + 32 + 3 * 3));
        write(&disk, &memory, DISK / 2, &[1; 512]).await.unwrap();
        disk.close(&memory).await.unwrap();
        let file = memory.files()[1].1.clone();
        assert_eq!((word(&file, 1648), word(&file, 28)), (0, 4 + 1 + 32 + 4 * 3));
        assert_eq!(file.len(), word(&file, 28) * 512);
    });
    let text = String::from_utf8(memory.files()[0].1.clone()).unwrap();
    assert!(text.contains("CID=12345678\n"), "{text}");
}

#[test]
fn a_free_sector_that_qemu_left_behind_is_not_believed_and_put_right() {
    let memory = changed(|file| put(file, 28, 5));
    let disk = open(&memory).unwrap();
    run(async {
        // A write in place already, since ESX would hand out what is in use.
        write(&disk, &memory, 0, &[9; 512]).await.unwrap();
        assert_eq!(faults(&memory.files(), false), [""; 0]);
        write(&disk, &memory, 1 << 20, &[8; 100_000]).await.unwrap();
        disk.close(&memory).await.unwrap();
        assert!(read(&disk, &memory, COVERAGE, 4096).await.unwrap() == [2; 4096]);
    });
    assert_eq!(faults(&memory.files(), true), [""; 0]);
}

#[test]
fn space_that_the_header_does_not_call_free_is_left_alone() {
    let mut end = 0;
    let memory = changed(|file| {
        end = file.len() / 512;
        put(file, 28, end as u64 + 1000);
    });
    let disk = open(&memory).unwrap();
    run(async {
        write(&disk, &memory, 1 << 20, &[7; 512]).await.unwrap();
        disk.close(&memory).await.unwrap();
    });
    let file = &memory.files()[1].1;
    assert_eq!(word(file, table(file, 0) + 2048 * 4), end + 1000);
    assert_eq!(faults(&memory.files(), true), [""; 0]);
}

#[test]
fn nothing_is_given_out_behind_the_last_sector_and_what_is_there_can_be_changed() {
    let memory = changed(|file| put(file, 28, u64::from(u32::MAX)));
    let disk = open(&memory).unwrap();
    run(async {
        let e = write(&disk, &memory, 1 << 20, &[1; 512]).await.unwrap_err();
        assert_eq!(e.kind(), ErrorKind::NoSpace, "{e}");
        write(&disk, &memory, 0, &[5; 4096]).await.unwrap();
        disk.close(&memory).await.unwrap();
        assert!(read(&disk, &memory, 0, 4096).await.unwrap() == [5; 4096]);
    });
    assert!(memory.files()[1].1.len() < 1 << 20);
}

#[test]
fn neighbouring_grains_are_written_and_read_at_once() {
    let memory = Memory::new(image(Shape::Cowd(1)), 1);
    let disk = open(&memory).unwrap();
    run(async {
        write(&disk, &memory, 4 << 20, &[1; 512]).await.unwrap();
        let before = memory.calls();
        write(&disk, &memory, 0, &[2; 1 << 20]).await.unwrap();
        // Growing, by two calls each time, and some parts between which it grew.
        let growing = 2 * (1 << 20) / crate::allocate::GROWTH;
        assert!(memory.calls() - before < growing + 24, "{} calls", memory.calls() - before);
        let before = memory.calls();
        assert!(read(&disk, &memory, 0, 1 << 20).await.unwrap() == [2; 1 << 20]);
        assert_eq!(memory.calls() - before, 1);
    });
}

#[test]
fn a_hosted_extent_under_a_vmfssparse_line_is_what_it_is() {
    let sectors = DISK / 512;
    let text = descriptor(&format!("RW {sectors} VMFSSPARSE \"a\""));
    let extent = super::fixtures::sparse(sectors, 8, true, true, "");
    let memory = Memory::new(vec![(NAME.to_owned(), text.into_bytes()), ("a".to_owned(), extent)], 1);
    let disk = open(&memory).unwrap();
    run(async {
        write(&disk, &memory, 5000, &[1; 5000]).await.unwrap();
        disk.close(&memory).await.unwrap();
    });
    assert_eq!(faults(&memory.files(), true), [""; 0]);
}

#[test]
fn an_extent_that_calls_itself_inconsistent_is_only_read() {
    let files = changed(|file| put(file, 8, 3 | u64::from(CowdHeader::INCONSISTENT))).files();
    let e = open(&Memory::new(files.clone(), 0)).map(|_| ()).unwrap_err();
    assert!(e.kind() == ErrorKind::Unsupported && e.to_string().contains("--read-only"), "{e}");
    let memory = Memory::new(files, 0);
    let disk = open_with(&memory, &READ_ONLY).unwrap();
    assert!(!disk.info().clean);
    assert!(run(read(&disk, &memory, 0, 4096)).unwrap() == [1; 4096]);
}

#[test]
fn by_itself_it_can_be_read_unless_it_names_a_parent() {
    let alone = |flags: u64| {
        let mut file = changed(|file| put(file, 8, flags)).files().remove(1).1;
        file[32..44].copy_from_slice(b"base\n.vmdk\0\0");
        Memory::new(vec![("disk-delta.vmdk".to_owned(), file)], 0)
    };
    for (flags, options) in [(2, &OPTIONS), (2, &READ_ONLY), (3, &OPTIONS)] {
        let e = open_with(&alone(flags), options).map(|_| ()).unwrap_err();
        assert_eq!(e.kind(), ErrorKind::NotAnImage);
        assert!(e.to_string().contains("open the .vmdk descriptor"), "{e}");
        assert_eq!(e.to_string().contains("\"base\\n.vmdk\""), flags == 2, "{e}");
    }
    let memory = alone(3);
    let disk = open_with(&memory, &READ_ONLY).unwrap();
    assert_eq!((disk.geometry().size, disk.info().notices.len()), (DISK, 1));
    assert!(run(read(&disk, &memory, COVERAGE, 4096)).unwrap() == [2; 4096]);
}

#[test]
fn a_grain_in_the_metadata_or_past_the_end_fails_only_where_it_is() {
    for sector in [1, 3, 4, 1 << 20, u64::from(u32::MAX)] {
        let memory = changed(|file| {
            let at = table(file, 0);
            put(file, at, sector);
        });
        let before = memory.files()[1].1.clone();
        let disk = open(&memory).unwrap();
        run(async {
            assert_eq!(kind_of(read(&disk, &memory, 0, 512).await), Some(ErrorKind::Corrupt), "{sector}");
            assert_eq!(kind_of(write(&disk, &memory, 0, &[6; 512]).await), Some(ErrorKind::Corrupt), "{sector}");
            assert!(read(&disk, &memory, 512, 3584).await.unwrap() == [1; 3584]);
            let _ = write(&disk, &memory, 1 << 20, &[6; 70_000]).await;
            disk.close(&memory).await.unwrap();
            assert_eq!(kind_of(read(&disk, &memory, 0, 512).await), Some(ErrorKind::Corrupt), "{sector}");
        });
        let after = &memory.files()[1].1;
        assert!(
            after[..28] == before[..28]
                && after[32..1648] == before[32..1648]
                && after[1652..2048] == before[1652..2048]
        );
    }
}

#[test]
fn a_table_in_the_metadata_or_past_the_end_fails_only_where_it_is() {
    let end = changed(|_| ()).files()[1].1.len() as u64 / 512;
    for sector in [1, 3, 4, end - 31, end, u64::from(u32::MAX)] {
        let memory = changed(|file| put(file, GD * 512 + 4, sector));
        let disk = open(&memory).unwrap();
        run(async {
            let _ = write(&disk, &memory, 1 << 20, &[6; 70_000]).await;
            assert_eq!(kind_of(read(&disk, &memory, COVERAGE, 512).await), Some(ErrorKind::Corrupt), "{sector}");
            let result = write(&disk, &memory, COVERAGE, &[6; 512]).await;
            assert_eq!(kind_of(result), Some(ErrorKind::Corrupt), "{sector}");
            assert!(read(&disk, &memory, 2 * COVERAGE, 4096).await.unwrap() == [3; 4096]);
            disk.close(&memory).await.unwrap();
        });
    }
}

#[test]
fn tables_that_overlap_are_read_and_not_written() {
    for shift in [0, 1, 31] {
        let memory = changed(|file| {
            let first = table(file, 0) as u64 / 512;
            put(file, GD * 512 + 4, first + shift);
        });
        let before = memory.files();
        let disk = open(&memory).unwrap();
        run(async {
            let e = write(&disk, &memory, 2 * COVERAGE, &[9; 512]).await.unwrap_err();
            assert!(e.kind() == ErrorKind::Corrupt && e.to_string().contains("overlaps another one"), "{e}");
            assert!(read(&disk, &memory, 0, 4096).await.unwrap() == [1; 4096]);
            disk.close(&memory).await.unwrap();
        });
        assert!(memory.files() == before);
    }
}

#[test]
fn a_guest_cannot_write_its_own_grain_tables() {
    let memory = changed(|file| {
        let victim = table(file, 1) as u64 / 512;
        let at = table(file, 2) + 100 * 4;
        put(file, at, victim + 31);
    });
    let before = memory.files();
    let disk = open(&memory).unwrap();
    let e = run(write(&disk, &memory, 2 * COVERAGE + 100 * 512, &[9; 512])).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::Corrupt);
    assert!(e.to_string().contains("entry 100 of grain table 2"), "{e}");
    assert!(memory.files() == before);
}

#[test]
fn the_largest_directory_is_refused_in_a_tiny_file_and_read_in_pages_otherwise() {
    let largest = cowd(u64::from(u32::MAX), 1);
    assert_eq!(largest.len(), 2048 + (4 << 20));
    let text = descriptor(&format!("RW {} VMFSSPARSE \"a\"", u32::MAX));
    for len in [2047, 2048, 4096, largest.len() - 1, largest.len()] {
        let files = vec![(NAME.to_owned(), text.clone().into_bytes()), ("a".to_owned(), largest[..len].to_vec())];
        let memory = Memory::new(files, 0);
        match open(&memory) {
            Err(e) => assert!(e.kind() == ErrorKind::Corrupt && len < largest.len(), "{len}: {e}"),
            Ok(disk) => {
                assert_eq!(len, largest.len());
                let last = u64::from(u32::MAX) * 512 - 512;
                run(async {
                    assert!(read(&disk, &memory, last, 512).await.unwrap() == [0; 512]);
                    assert!(memory.calls() < 10, "{} calls", memory.calls());
                    write(&disk, &memory, last, &[4; 512]).await.unwrap();
                    disk.close(&memory).await.unwrap();
                });
                assert_eq!(faults(&memory.files(), true), [""; 0]);
            }
        }
    }
}

#[test]
fn every_field_at_its_limits_is_refused_or_served_without_panic() {
    for at in (0..48).step_by(4).chain([1056, 1648, GD * 512]) {
        for value in [0, 1, 2, 3, 4, 5, 127, 2048, 2049, 1 << 20, 1 << 31, u64::from(u32::MAX) - 1, u64::from(u32::MAX)]
        {
            let memory = changed(|file| put(file, at, value));
            for options in [&OPTIONS, &READ_ONLY] {
                let Ok(disk) = open_with(&memory, options) else { continue };
                for offset in [0, 513, COVERAGE, DISK - 4096] {
                    let _ = run(read(&disk, &memory, offset, 4096));
                    let _ = run(write(&disk, &memory, offset, &[1; 4096]));
                }
                let _ = run(disk.close(&memory));
            }
        }
    }
}

#[test]
fn every_truncation_is_refused_or_read_without_panic() {
    let whole = changed(|_| ()).files();
    for len in (0..whole[1].1.len()).step_by(331) {
        let files = vec![whole[0].clone(), (whole[1].0.clone(), whole[1].1[..len].to_vec())];
        let memory = Memory::new(files, 0);
        let Ok(disk) = open(&memory) else { continue };
        for offset in [0, COVERAGE, DISK - 4096] {
            let _ = run(read(&disk, &memory, offset, 4096));
            let _ = run(write(&disk, &memory, offset, &[1; 4096]));
        }
    }
}

/// A reader that finds no table and counts how far there is none, while a writer makes it.
#[test]
fn a_table_that_is_made_during_a_look_up_is_no_empty_answer() {
    use std::sync::atomic::{AtomicU64, Ordering};
    const TABLES: u64 = 1000;
    let sectors = 4096 * (TABLES + 1);
    let text = descriptor(&format!("RW {sectors} VMFSSPARSE \"delta.vmdk\""));
    let files = vec![(NAME.to_owned(), text.into_bytes()), ("delta.vmdk".to_owned(), cowd(sectors, 1))];
    let memory = Memory::new(files, 0);
    let disk = open(&memory).unwrap();
    run(async { write(&disk, &memory, 0, &[5; 512]).await.unwrap() });
    let Layout::Sparse(extent) = &disk.chain.top.extents[0].layout else { panic!() };
    extent.grown(Some(1 << 30));
    let next = AtomicU64::new(1);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            loop {
                let table = next.load(Ordering::Relaxed);
                if table == TABLES {
                    return;
                }
                let found = extent.map(table * 4096 * 512 + 100, 50).unwrap();
                assert!(!matches!(found, Mapping::Parent { len: 0 }));
            }
        });
        for table in 1..TABLES {
            next.store(table, Ordering::Relaxed);
            for _ in 0..200 {
                std::hint::spin_loop();
            }
            loop {
                match extent.plan_write(table * 4096 * 512, 512) {
                    Ok(Plan::Write { ticket: Some(ticket), .. }) => break ticket.publish(),
                    Ok(Plan::Need(meta)) => run(disk.load(&memory, extent, meta)).unwrap(),
                    Ok(Plan::Reserve(room)) => extent.reserved(&room),
                    other => {
                        next.store(TABLES, Ordering::Relaxed);
                        panic!("{other:?}");
                    }
                }
            }
        }
        next.store(TABLES, Ordering::Relaxed);
    });
}
