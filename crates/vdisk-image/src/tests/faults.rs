//! Every call of the engine fails once, in every way that matters.

use super::fixtures::{DISK, SHAPES, Shape, faults, flush, image, open, read, run, write};
use crate::ErrorKind;
use crate::memory::Memory;

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
