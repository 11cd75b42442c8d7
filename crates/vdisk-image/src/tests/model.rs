//! Random requests from several tasks, against an array of bytes.

use super::check::check;
use super::fixtures::{
    DISK, OPTIONS, SHAPES, content, faults, flush, image, open, open_with, read, request, run, run_all, write,
};
use crate::memory::{Memory, Random};
use crate::{Disk, Op, OpenOptions};
use std::cell::RefCell;
use std::rc::Rc;

const TASKS: u64 = 6;

/// Each task owns every sixth piece of 1,536 bytes, so that tasks share grains and never bytes.
const PIECE: u64 = 1536;

async fn work(task: u64, disk: Rc<Disk>, memory: Rc<Memory>, model: Rc<RefCell<Vec<u8>>>, seed: u64) {
    let random = Random::new(seed);
    for _ in 0..60 {
        // A hot region, so that grains are shared and re-read, and now and then anywhere.
        let region = if random.below(4) == 0 { DISK } else { 256 << 10 };
        let slot = random.below(region / PIECE / TASKS);
        let from = random.below(PIECE - 1);
        let offset = (slot * TASKS + task) * PIECE + from;
        let len = 1 + random.below(PIECE - from);
        let range = offset as usize..(offset + len) as usize;
        match random.below(10) {
            0..4 => {
                let bytes: Vec<u8> = (0..len).map(|_| random.below(256) as u8).collect();
                write(&disk, &memory, offset, &bytes).await.unwrap();
                model.borrow_mut()[range].copy_from_slice(&bytes);
            }
            4..8 => {
                let got = read(&disk, &memory, offset, len).await.unwrap();
                assert!(got == model.borrow()[range.clone()], "read of {range:?} by task {task}");
            }
            8 => {
                let op = if random.below(2) == 0 { Op::WriteZeroes } else { Op::Discard };
                request(&disk, &memory, op, offset, len, &RefCell::default()).await.unwrap();
                let zero = vec![0; len as usize];
                let got = if op == Op::Discard { read(&disk, &memory, offset, len).await.unwrap() } else { zero };
                let old_or_zero =
                    model.borrow()[range.clone()].iter().zip(&got).all(|(old, new)| [*old, 0].contains(new));
                assert!(old_or_zero, "{op:?} of {range:?} by task {task}");
                model.borrow_mut()[range].copy_from_slice(&got);
            }
            _ => flush(&disk, &memory).await.unwrap(),
        }
    }
}

fn agrees_with_the_model(cannot_punch: bool, options: &OpenOptions) {
    for shape in SHAPES {
        for seed in 0..12 {
            let memory = Rc::new(Memory::new(image(shape), seed));
            memory.cannot_punch.set(cannot_punch);
            let disk = Rc::new(open_with(&memory, options).unwrap());
            let model = Rc::new(RefCell::new(content(shape)));
            run_all(
                (0..TASKS)
                    .map(|task| work(task, Rc::clone(&disk), Rc::clone(&memory), Rc::clone(&model), seed * 100 + task)),
            );
            // Requests over many grains and extents, by one task.
            let random = Random::new(seed);
            for _ in 0..20 {
                let offset = random.below(DISK);
                let len = 1 + random.below((DISK - offset).min(3 << 20));
                let range = offset as usize..(offset + len) as usize;
                if random.below(2) == 0 {
                    let bytes: Vec<u8> = (0..len).map(|n| (n / 512) as u8 ^ seed as u8).collect();
                    run(write(&disk, &memory, offset, &bytes)).unwrap();
                    model.borrow_mut()[range].copy_from_slice(&bytes);
                } else {
                    assert!(
                        run(read(&disk, &memory, offset, len)).unwrap() == model.borrow()[range],
                        "{shape:?} {seed}"
                    );
                }
            }
            run(disk.close(&*memory)).unwrap();
            assert_eq!(faults(&memory.files(), true), [""; 0], "{shape:?} {seed}");
            assert_eq!(check(&memory.files()).0, [], "{shape:?} {seed}");
            let again = open(&Memory::new(memory.files(), 0)).unwrap();
            assert!(again.info().clean);
            let bytes = run(read(&again, &Memory::new(memory.files(), 0), 0, DISK)).unwrap();
            assert!(bytes == *model.borrow(), "{shape:?} {seed}: other bytes after a new attach");
        }
    }
}

#[test]
fn concurrent_requests_agree_with_an_array_of_bytes() {
    agrees_with_the_model(false, &OPTIONS);
}

#[test]
fn so_they_do_without_a_grain_cache() {
    agrees_with_the_model(false, &OpenOptions { cache_bytes: 0, ..OPTIONS });
}

/// Without hole punching a discard may keep the old data, so only write zeroes are checked here.
#[test]
fn zeroes_are_written_where_the_host_cannot_punch() {
    for shape in SHAPES {
        let memory = Memory::new(image(shape), 1);
        memory.cannot_punch.set(true);
        let disk = open(&memory).unwrap();
        run(async {
            write(&disk, &memory, 1000, &[7; 700_000]).await.unwrap();
            request(&disk, &memory, Op::Discard, 2000, 300_000, &RefCell::default()).await.unwrap();
            request(&disk, &memory, Op::WriteZeroes, 2000, 600_000, &RefCell::default()).await.unwrap();
            let got = read(&disk, &memory, 0, 800_000).await.unwrap();
            let before = content(shape);
            let expected = |n: usize| match n {
                2000..602_000 => 0,
                1000..701_000 => 7,
                _ => before[n],
            };
            assert!(got.iter().enumerate().all(|(n, b)| *b == expected(n)), "{shape:?}");
        });
    }
}

#[test]
fn an_image_that_is_only_read_is_not_touched() {
    for shape in SHAPES {
        let memory = Memory::new(image(shape), 2);
        let disk = open(&memory).unwrap();
        run(async {
            read(&disk, &memory, 0, DISK).await.unwrap();
            flush(&disk, &memory).await.unwrap();
            disk.close(&memory).await.unwrap();
        });
        assert!(memory.files() == image(shape), "{shape:?}");
    }
}

#[test]
fn the_first_write_changes_the_content_id_and_both_places_of_it() {
    let memory = Memory::new(image(super::fixtures::Shape::Sparse), 3);
    let disk = open(&memory).unwrap();
    run(write(&disk, &memory, 0, &[1; 512])).unwrap();
    let bytes = &memory.files()[0].1;
    assert_eq!(bytes[72], 1, "uncleanShutdown while open");
    let text = String::from_utf8_lossy(&bytes[512..2048]).into_owned();
    assert!(text.contains("CID=12345678\n") && text.contains("8899aabb12345678\""), "{text}");
    run(disk.close(&memory)).unwrap();
    assert_eq!(memory.files()[0].1[72], 0);
}

#[test]
fn sixty_four_megabytes_make_few_syncs() {
    let memory = Memory::new(image(super::fixtures::Shape::Sparse), 4);
    let disk = open(&memory).unwrap();
    run(async {
        for n in 0..DISK / (64 << 10) {
            write(&disk, &memory, n * (64 << 10), &[5; 64 << 10]).await.unwrap();
        }
        flush(&disk, &memory).await.unwrap();
    });
    assert!(memory.syncs() <= 4, "{} syncs", memory.syncs());
}

/// QEMU leaves out the leading zeroes of a CID.
#[test]
fn a_short_content_id_is_replaced_by_one_as_short() {
    let mut files = image(super::fixtures::Shape::Split);
    let text = String::from_utf8(files[0].1.clone()).unwrap().replace("CID=0badcafe", "CID=badcafe");
    files[0].1 = text.into_bytes();
    let memory = Memory::new(files, 3);
    let disk = open(&memory).unwrap();
    run(write(&disk, &memory, 0, &[1; 512])).unwrap();
    let text = String::from_utf8(memory.files()[0].1.clone()).unwrap();
    assert!(text.contains("CID=2345678\n") && text.contains("8899aabb02345678\""), "{text}");
}
