//! Every call of the engine fails once, in every way that matters.

use super::fixtures::{DISK, SHAPES, Shape, faults, flush, image, open, read, run, write};
use crate::ErrorKind;
use crate::memory::{Memory, Random};

const EIO: i32 = 5;
const ENOSPC: i32 = 28;

/// Writes, flushes, writes more; returns what was promised to be durable: (offset, byte).
async fn session(memory: &Memory) -> Vec<(u64, u8)> {
    let Ok(disk) = crate::Disk::open(memory, crate::FileId(0), &super::fixtures::OPTIONS).await else { return vec![] };
    let mut written = Vec::new();
    for (n, offset) in (1..).zip([0, 5000, 2 << 20, 4 << 20, DISK - 3000]) {
        if write(&disk, memory, offset, &[n; 3000]).await.is_ok() {
            written.push((offset, n));
        }
    }
    let promised = if flush(&disk, memory).await.is_ok() { written } else { Vec::new() };
    let _ = write(&disk, memory, 1 << 20, &[9; 70_000]).await;
    let _ = disk.close(memory).await;
    promised
}

#[test]
fn any_call_may_fail_and_nothing_that_was_flushed_is_lost() {
    for shape in SHAPES {
        let calls = {
            let memory = Memory::new(image(shape), 1);
            run(session(&memory));
            memory.calls()
        };
        for call in 0..calls {
            for errno in [EIO, ENOSPC] {
                let memory = Memory::new(image(shape), 1);
                memory.fail_call.set(Some((call, errno)));
                let promised = run(session(&memory));
                let files = memory.files();
                assert_eq!(faults(&files, false), [""; 0], "{shape:?}, call {call}");
                let after = Memory::new(files, 1);
                let disk = open(&after).unwrap();
                for (offset, byte) in promised {
                    let got = run(read(&disk, &after, offset, 3000)).unwrap();
                    assert!(got.iter().all(|b| *b == byte), "{shape:?}, call {call}: {offset} lost");
                }
            }
        }
    }
}

#[test]
fn a_full_host_fails_the_writer_and_the_image_goes_on_when_there_is_space() {
    for shape in [Shape::Sparse, Shape::SparseWithoutTables, Shape::Split, Shape::Cowd(1), Shape::Cowd(3)] {
        let memory = Memory::new(image(shape), 1);
        let disk = open(&memory).unwrap();
        run(async {
            memory.full_at.set(1 << 19);
            write(&disk, &memory, 0, &[1; 4096]).await.unwrap();
            let e = write(&disk, &memory, 0, &[2; 2 << 20]).await.unwrap_err();
            assert_eq!(e.kind(), ErrorKind::NoSpace, "{shape:?}: {e}");
            flush(&disk, &memory).await.unwrap();
            memory.full_at.set(1 << 30);
            write(&disk, &memory, 0, &[3; 2 << 20]).await.unwrap();
            assert!(read(&disk, &memory, 0, 2 << 20).await.unwrap() == [3; 2 << 20]);
            disk.close(&memory).await.unwrap();
        });
        assert_eq!(faults(&memory.files(), true), [""; 0]);
    }
}

#[test]
fn a_failed_sync_poisons_writes_and_leaves_reads() {
    for shape in SHAPES {
        let memory = Memory::new(image(shape), 1);
        let disk = open(&memory).unwrap();
        run(async {
            write(&disk, &memory, 0, &[1; 4096]).await.unwrap();
            memory.fail_call.set(Some((memory.calls(), EIO)));
            assert_eq!(flush(&disk, &memory).await.unwrap_err().kind(), ErrorKind::HostIo);
            assert!(disk.is_poisoned());
            let why = disk.poisoned().await;
            assert!(why.ends_with("Input/output error (os error 5)"), "{why}");
            assert_eq!(flush(&disk, &memory).await.unwrap_err().kind(), ErrorKind::Poisoned);
            assert_eq!(write(&disk, &memory, 0, &[2; 512]).await.unwrap_err().kind(), ErrorKind::Poisoned);
            assert!(read(&disk, &memory, 0, 4096).await.unwrap() == [1; 4096]);
            assert_eq!(disk.close(&memory).await.unwrap_err().kind(), ErrorKind::Poisoned);
        });
        if shape == Shape::Sparse {
            assert_eq!(memory.files()[0].1[72], 1, "marked clean after a lost write");
        }
    }
}

/// Who serves the disk hears of it when it happens, whatever he was doing.
#[test]
fn who_waits_for_poison_is_woken_by_the_failed_sync() {
    let memory = Memory::new(image(Shape::Sparse), 1);
    let disk = open(&memory).unwrap();
    run(async {
        let fail = async {
            write(&disk, &memory, 0, &[1; 4096]).await.unwrap();
            memory.fail_call.set(Some((memory.calls(), EIO)));
            flush(&disk, &memory).await.unwrap_err();
        };
        let (why, ()) = futures_util::future::join(disk.poisoned(), fail).await;
        assert_eq!(&*why, "sync disk.vmdk: Input/output error (os error 5)");
    });
}

#[test]
fn a_failed_sync_of_the_first_change_poisons_and_no_other_call_of_it_does() {
    let first_write = |fail: Option<u64>| {
        let memory = Memory::new(image(Shape::Sparse), 1);
        let disk = open(&memory).unwrap();
        let calls = memory.calls();
        memory.fail_call.set(fail.map(|n| (calls + n, EIO)));
        let result = run(write(&disk, &memory, 0, &[1; 4096]));
        (memory.calls() - calls, result.is_ok(), disk.is_poisoned())
    };
    let (calls, ..) = first_write(None);
    let poisoned: Vec<_> = (0..calls).map(|n| first_write(Some(n))).filter(|(_, _, poisoned)| *poisoned).collect();
    assert!(matches!(poisoned[..], [(_, false, true)]), "{poisoned:?} of {calls} calls");
}

/// From inside of [`run`].
async fn reopened(memory: &Memory) -> crate::Disk {
    crate::Disk::open(memory, crate::FileId(0), &super::fixtures::OPTIONS).await.unwrap()
}

/// Without space for anything new: data that has a place, and tables that were reserved, can still be written.
#[test]
fn a_full_host_fails_the_write_that_needs_space_and_never_the_flush_of_others() {
    for shape in SHAPES {
        let memory = Memory::new(image(shape), 1);
        let disk = open(&memory).unwrap();
        run(async {
            write(&disk, &memory, 0, &[1; 4096]).await.unwrap();
            memory.full.set(true);
            // What was taken when the file grew is there for writes.
            let mut end = 4096;
            while write(&disk, &memory, end, &[4; 4096]).await.is_ok() {
                end += 4096;
            }
            assert!(end <= 3 * crate::allocate::GROWTH, "{shape:?}: {end}");
            let mut full = 0;
            // Far apart: many tables, whose places are holes.
            for n in 1..6 {
                let result = write(&disk, &memory, n << 20, &[2; 4096]).await;
                full += u32::from(result.is_err_and(|e| e.kind() == ErrorKind::NoSpace));
            }
            assert_eq!(full, 5, "{shape:?}");
            flush(&disk, &memory).await.unwrap();
            assert!(!disk.is_poisoned());
            let cut = Memory::new(memory.after_power_cut(&Random::new(1)), 1);
            let again = reopened(&cut).await;
            assert!(read(&again, &cut, 0, 4096).await.unwrap() == [1; 4096], "{shape:?}");
            assert!(read(&again, &cut, 4096, end - 4096).await.unwrap().iter().all(|b| *b == 4), "{shape:?}");
            memory.full.set(false);
            write(&disk, &memory, 3 << 20, &[3; 4096]).await.unwrap();
            disk.close(&memory).await.unwrap();
            assert!(read(&disk, &memory, 3 << 20, 4096).await.unwrap() == [3; 4096], "{shape:?}");
        });
        assert_eq!(faults(&memory.files(), true), [""; 0], "{shape:?}");
    }
}

/// Some hosts cannot promise space. Then a flush may find none, and must be able to go on later.
#[test]
fn a_flush_that_finds_the_host_full_loses_nothing_and_succeeds_later() {
    for shape in SHAPES {
        let memory = Memory::new(image(shape), 1);
        memory.cannot_reserve.set(true);
        let disk = open(&memory).unwrap();
        run(async {
            write(&disk, &memory, 0, &[1; 4096]).await.unwrap();
            write(&disk, &memory, 3 << 20, &[2; 9000]).await.unwrap();
            memory.full.set(true);
            let has_tables = shape != Shape::Raw;
            for _ in 0..2 {
                let result = flush(&disk, &memory).await;
                assert_eq!(result.err().map(|e| e.kind()), has_tables.then_some(ErrorKind::NoSpace), "{shape:?}");
            }
            assert!(!disk.is_poisoned());
            assert!(read(&disk, &memory, 0, 4096).await.unwrap() == [1; 4096]);
            // In place it goes on, and what is written now counts as well.
            write(&disk, &memory, 100, &[5; 300]).await.unwrap();
            memory.full.set(false);
            flush(&disk, &memory).await.unwrap();
            let cut = Memory::new(memory.after_power_cut(&Random::new(7)), 1);
            let again = reopened(&cut).await;
            let got = read(&again, &cut, 0, 4096).await.unwrap();
            assert!((0..4096).all(|n| got[n] == if (100..400).contains(&n) { 5 } else { 1 }), "{shape:?}");
            assert!(read(&again, &cut, 3 << 20, 9000).await.unwrap() == [2; 9000], "{shape:?}");
            disk.close(&memory).await.unwrap();
        });
        assert_eq!(faults(&memory.files(), true), [""; 0], "{shape:?}");
    }
}

#[test]
fn a_sync_that_says_the_host_is_full_poisons_like_any_other() {
    let memory = Memory::new(image(Shape::Sparse), 1);
    let disk = open(&memory).unwrap();
    run(async {
        write(&disk, &memory, 0, &[1; 4096]).await.unwrap();
        memory.fail_call.set(Some((memory.calls(), ENOSPC)));
        assert_eq!(flush(&disk, &memory).await.unwrap_err().kind(), ErrorKind::NoSpace);
        assert!(disk.is_poisoned());
    });
}

/// The space that is taken for later is nobody's need: where there is none, nothing of it is kept, and writes go on.
#[test]
fn a_host_that_cannot_give_the_generous_step_gives_the_small_one() {
    let memory = Memory::new(image(Shape::Sparse), 1);
    let disk = open(&memory).unwrap();
    let before = memory.files()[0].1.len();
    memory.cannot_reserve.set(true);
    run(async {
        write(&disk, &memory, 0, &[1; 4096]).await.unwrap();
        assert!(memory.files()[0].1.len() as u64 >= before as u64 + crate::allocate::GROWTH);
        disk.close(&memory).await.unwrap();
    });
    memory.cannot_reserve.set(false);
    let small = memory.files()[0].1.len();
    let disk = open(&memory).unwrap();
    run(async {
        memory.reserves_at_most.set(32 << 10);
        write(&disk, &memory, 1 << 20, &[2; 4096]).await.unwrap();
        assert!(memory.files()[0].1.len() < small + (32 << 10));
        disk.close(&memory).await.unwrap();
        assert!(read(&disk, &memory, 1 << 20, 4096).await.unwrap() == [2; 4096]);
    });
    assert_eq!(faults(&memory.files(), true), [""; 0]);
}
