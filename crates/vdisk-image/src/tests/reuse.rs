//! Whole grains are discarded, and their places are used again.

use super::check::check;
use super::fixtures::{DISK, Shape, content, faults, flush, image, open, read, request, run, run_all, write};
use crate::memory::{Memory, Random};
use crate::{Disk, Op};
use futures_util::future::{join, poll_fn};
use std::cell::RefCell;
use std::rc::Rc;
use std::task::Poll;

const FREEING: [Shape; 4] = [Shape::Sparse, Shape::SparseWithoutCopy, Shape::SparseWithoutTables, Shape::Split];

/// A whole number of grains of every shape.
const UNIT: u64 = 64 << 10;

async fn discard(disk: &Disk, memory: &Memory, offset: u64, len: u64) {
    request(disk, memory, Op::Discard, offset, len, &RefCell::default()).await.unwrap();
}

fn len_of_files(memory: &Memory) -> usize {
    memory.files().iter().map(|(_, bytes)| bytes.len()).sum()
}

/// Discards and reads of the same grains at the same time, while others write and take what was freed: a read sees what was there or
/// zeroes, and never what somebody else wrote.
async fn work(task: u64, tasks: u64, disk: Rc<Disk>, memory: Rc<Memory>, model: Rc<RefCell<Vec<u8>>>, random: Random) {
    for n in 0..60 {
        let offset = (random.below(3) * tasks + task) * UNIT;
        let range = offset as usize..(offset + UNIT) as usize;
        match random.below(8) {
            0..3 => {
                let byte = (task * 60 + n) as u8 | 1;
                let (from, len) = match random.below(2) {
                    0 => (0, UNIT),
                    _ => (random.below(UNIT - 5000), 1 + random.below(5000)),
                };
                let part = (offset + from) as usize..(offset + from + len) as usize;
                write(&disk, &memory, offset + from, &vec![byte; len as usize]).await.unwrap();
                model.borrow_mut()[part].fill(byte);
            }
            3..6 => {
                let op = if random.below(2) == 0 { Op::Discard } else { Op::WriteZeroes };
                let nothing = RefCell::default();
                let old = model.borrow()[range.clone()].to_vec();
                let is_old_or_zero = |at: u64, seen: &[u8]| {
                    old[at as usize..].iter().zip(seen).all(|(old, new)| [*old, 0].contains(new))
                };
                // In small pieces as well, which go through the cache.
                let piece = random.below(100) * 512;
                let small = async {
                    for _ in 0..4 {
                        let seen = read(&disk, &memory, offset + piece, 512).await.unwrap();
                        assert!(is_old_or_zero(piece, &seen), "task {task}, {op:?}");
                    }
                };
                let ((seen, ()), done) = join(
                    join(read(&disk, &memory, offset, UNIT), small),
                    request(&disk, &memory, op, offset, UNIT, &nothing),
                )
                .await;
                done.unwrap();
                assert!(is_old_or_zero(0, &seen.unwrap()), "task {task}, {op:?}");
                let now = read(&disk, &memory, offset, UNIT).await.unwrap();
                assert!(now.iter().zip(&old).all(|(new, old)| *new == 0 || op == Op::Discard && new == old));
                model.borrow_mut()[range].copy_from_slice(&now);
            }
            6 => flush(&disk, &memory).await.unwrap(),
            _ => {
                for piece in range.step_by(2048) {
                    let seen = read(&disk, &memory, piece as u64, 512).await.unwrap();
                    assert!(seen == model.borrow()[piece..piece + 512], "task {task}");
                }
            }
        }
    }
}

#[test]
fn readers_of_a_grain_that_is_discarded_see_it_or_zeroes_and_nothing_else() {
    const TASKS: u64 = 8;
    for shape in FREEING.into_iter().chain([Shape::Child, Shape::Cowd(3)]) {
        for seed in 0..20 {
            let memory = Rc::new(Memory::new(image(shape), seed));
            memory.cannot_punch.set(seed % 3 == 0);
            let disk = Rc::new(open(&memory).unwrap());
            let model = Rc::new(RefCell::new(content(shape)));
            run_all((0..TASKS).map(|task| {
                let random = Random::new(seed * 100 + task);
                work(task, TASKS, Rc::clone(&disk), Rc::clone(&memory), Rc::clone(&model), random)
            }));
            run(disk.close(&*memory)).unwrap();
            assert_eq!(faults(&memory.files(), true), [""; 0], "{shape:?} {seed}");
            assert_eq!(check(&memory.files()).0, [], "{shape:?} {seed}");
            let again = Memory::new(memory.files(), 0);
            let bytes = run(read(&open(&again).unwrap(), &again, 0, DISK)).unwrap();
            assert!(bytes == *model.borrow(), "{shape:?} {seed}: other bytes after a new attach");
        }
    }
}

/// Who writes into a grain that somebody else discards does not write into the place of the next one.
#[test]
fn a_write_that_a_discard_overtakes_leaves_nothing_in_the_place() {
    let mut overtaken = 0;
    for (shape, op) in FREEING.into_iter().flat_map(|s| [(s, Op::Discard), (s, Op::WriteZeroes)]) {
        for seed in 0..40 {
            let memory = Memory::new(image(shape), seed);
            let disk = open(&memory).unwrap();
            run(async {
                write(&disk, &memory, 0, &vec![1; UNIT as usize]).await.unwrap();
                let nothing = RefCell::default();
                let both = join(write(&disk, &memory, 1000, &[2; 300]), request(&disk, &memory, op, 0, UNIT, &nothing));
                let (written, zeroed) = both.await;
                written.and(zeroed).unwrap();
                let now = read(&disk, &memory, 0, UNIT).await.unwrap();
                overtaken += u32::from(now == vec![0; UNIT as usize]);
                flush(&disk, &memory).await.unwrap();
                // One grain of each shape at least gets a place that was freed.
                for n in 1..33 {
                    write(&disk, &memory, n * UNIT, &[3; 10]).await.unwrap();
                    let rest = read(&disk, &memory, n * UNIT + 10, UNIT - 10).await.unwrap();
                    assert!(rest == vec![0; UNIT as usize - 10], "{shape:?}, {op:?}, seed {seed}, grain {n}");
                }
            });
        }
    }
    assert!(overtaken > 50, "{overtaken}");
}

/// With one session for all rounds, and with one for each: what the last session left is found.
#[test]
fn a_file_does_not_grow_by_what_is_written_and_discarded_in_turn() {
    for (shape, cannot_punch, sessions) in
        FREEING.into_iter().flat_map(|s| [(s, false, false), (s, false, true), (s, true, false), (s, true, true)])
    {
        let memory = Memory::new(image(shape), 1);
        memory.cannot_punch.set(cannot_punch);
        let mut disk = open(&memory).unwrap();
        let mut peak = 0;
        for round in 0..20u64 {
            run(async {
                // Each time somewhere else, so that no entry that stayed would be of use.
                let offset = round % 4 * (1 << 20) + 8192;
                let bytes = vec![round as u8 + 1; 1 << 20];
                write(&disk, &memory, offset, &bytes).await.unwrap();
                flush(&disk, &memory).await.unwrap();
                assert!(read(&disk, &memory, offset, 1 << 20).await.unwrap() == bytes);
                discard(&disk, &memory, offset & !(UNIT - 1), (1 << 20) + UNIT).await;
                flush(&disk, &memory).await.unwrap();
            });
            if sessions {
                run(disk.close(&memory)).unwrap();
                disk = open(&memory).unwrap();
            }
            if round < 4 {
                peak = peak.max(len_of_files(&memory));
            }
            let len = len_of_files(&memory);
            assert!(len <= peak, "{shape:?}, round {round}, {cannot_punch}, {sessions}: {len} bytes after {peak}");
        }
        run(disk.close(&memory)).unwrap();
        assert_eq!(check(&memory.files()).0, []);
    }
}

#[test]
fn closing_cuts_off_what_was_discarded_at_the_end() {
    for shape in FREEING {
        let memory = Memory::new(image(shape), 1);
        let disk = open(&memory).unwrap();
        run(async {
            write(&disk, &memory, 0, &[1; 4096]).await.unwrap();
            write(&disk, &memory, 1 << 20, &vec![2; 1 << 19]).await.unwrap();
            discard(&disk, &memory, 1 << 20, 1 << 19).await;
            disk.close(&memory).await.unwrap();
        });
        let empty: usize = image(shape).iter().map(|(_, bytes)| bytes.len()).sum();
        let len = len_of_files(&memory);
        assert!(len <= empty + 2 * UNIT as usize, "{shape:?}: {len} bytes, {empty} when empty");
        assert_eq!(check(&memory.files()).0, []);
        let again = Memory::new(memory.files(), 0);
        let bytes = run(read(&open(&again).unwrap(), &again, 0, 4097)).unwrap();
        assert!(bytes == [vec![1; 4096], vec![0]].concat());
    }
}

/// A part of a grain in a place that is not zeroes: the rest of it is zeroes all the same.
#[test]
fn what_another_grain_left_in_a_place_is_never_seen() {
    for shape in FREEING {
        let memory = Memory::new(image(shape), 1);
        memory.cannot_punch.set(true);
        let disk = open(&memory).unwrap();
        run(async {
            write(&disk, &memory, 0, &vec![7; 1 << 20]).await.unwrap();
            discard(&disk, &memory, 0, 1 << 20).await;
            flush(&disk, &memory).await.unwrap();
            assert!(read(&disk, &memory, 0, 1 << 20).await.unwrap() == vec![0; 1 << 20], "{shape:?}");
            for n in 0..16 {
                write(&disk, &memory, n * UNIT + 1000, &[9; 10]).await.unwrap();
            }
            let got = read(&disk, &memory, 0, 1 << 20).await.unwrap();
            let is_right = |n: usize| if (1000..1010).contains(&(n % UNIT as usize)) { 9 } else { 0 };
            assert!(got.iter().enumerate().all(|(n, b)| *b == is_right(n)), "{shape:?}");
            disk.close(&memory).await.unwrap();
        });
        let again = Memory::new(memory.files(), 0);
        let got = run(read(&open(&again).unwrap(), &again, 0, 1 << 20)).unwrap();
        assert_eq!(got.iter().filter(|b| **b != 0).count(), 160, "{shape:?}");
    }
}

#[test]
fn a_large_write_takes_a_run_of_free_places_in_one_piece() {
    let memory = Memory::new(image(Shape::Sparse), 1);
    let disk = open(&memory).unwrap();
    run(async {
        write(&disk, &memory, 0, &vec![1; 1 << 20]).await.unwrap();
        discard(&disk, &memory, 0, 1 << 20).await;
        flush(&disk, &memory).await.unwrap();
        let before = memory.calls();
        write(&disk, &memory, 2 << 20, &vec![2; 1 << 20]).await.unwrap();
        let calls = memory.calls() - before;
        assert!(calls < 8, "{calls} calls");
    });
    assert!(memory.files()[0].1.len() < (1 << 20) + (512 << 10), "the file grew");
}

/// In an image that was closed, a table may have lost what its copy still has.
#[test]
fn what_only_the_copy_of_a_table_names_is_not_overwritten() {
    let memory = Memory::new(image(Shape::Sparse), 1);
    let disk = open(&memory).unwrap();
    run(async {
        write(&disk, &memory, 0, &[5; 4 * 4096]).await.unwrap();
        disk.close(&memory).await.unwrap();
    });
    let mut files = memory.files();
    let bytes = &mut files[0].1;
    // The fixture's second directory is the primary one, and its first table follows in the next sector.
    let gd = u64::from(u32::from_le_bytes(bytes[56..60].try_into().unwrap())) as usize * 512;
    let table = u32::from_le_bytes(bytes[gd..gd + 4].try_into().unwrap()) as usize * 512;
    let lost = u32::from_le_bytes(bytes[table + 4..table + 8].try_into().unwrap()) as usize * 512;
    bytes[table + 4..table + 8].fill(0);
    let before = bytes[lost..lost + 4096].to_vec();
    assert_eq!(before, [5; 4096]);
    let memory = Memory::new(files, 1);
    let disk = open(&memory).unwrap();
    run(async {
        write(&disk, &memory, 1 << 20, &[6; 1 << 20]).await.unwrap();
        disk.close(&memory).await.unwrap();
    });
    assert!(memory.files()[0].1[lost..lost + 4096] == before);
}

/// A reader finds a grain, and waits for another table before it reads. Meanwhile the grain is discarded: what the reader then finds
/// must not stay in the cache for the grain that comes to that place next.
#[test]
fn the_cache_forgets_a_place_that_gets_another_grain() {
    let mut overtaken = 0;
    for seed in 0..40 {
        let memory = Memory::new(image(Shape::Sparse), seed);
        // The last grain of the first table and the first one of the next.
        let border = 2 << 20;
        let disk = open(&memory).unwrap();
        run(async {
            // Not in a row in the file: they are read one by one.
            write(&disk, &memory, border, &[1; 4096]).await.unwrap();
            write(&disk, &memory, border - 4096, &[1; 4096]).await.unwrap();
            disk.close(&memory).await.unwrap();
        });
        let disk = open(&memory).unwrap();
        run(async {
            // All but the last of what brings a grain into the cache.
            for n in 1..8 {
                read(&disk, &memory, border - 512 * n, 512).await.unwrap();
            }
            // So that the next change is not the first.
            write(&disk, &memory, 0, &[2; 4096]).await.unwrap();
        });
        run(async {
            let mut reader = Box::pin(read(&disk, &memory, border - 512, 1024));
            let pending = poll_fn(|cx| Poll::Ready(reader.as_mut().poll(cx).is_pending())).await;
            let discarding = discard(&disk, &memory, border - 4096, 4096);
            if pending {
                overtaken += 1;
                join(discarding, reader).await.1.unwrap();
            } else {
                discarding.await;
            }
            for _ in 0..3 {
                flush(&disk, &memory).await.unwrap();
            }
            write(&disk, &memory, 4096, &[3; 4096]).await.unwrap();
            for _ in 0..3 {
                assert_eq!(read(&disk, &memory, 5000, 512).await.unwrap(), [3; 512], "seed {seed}");
            }
        });
    }
    assert!(overtaken > 10, "{overtaken}");
}
