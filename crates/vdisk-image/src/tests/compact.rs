//! `Disk::compact`: the disk reads as before, the file is as short as it can be, and it may end anywhere.

use super::check::check;
use super::fixtures::{
    DISK, OPTIONS, SHAPES, Shape, content, faults, flush, image, open, open_with, read, request, run, write,
};
use crate::memory::{Memory, Random};
use crate::{CompactWatch, Compacted, Disk, DiskError, FaultKind, FileId, Op, OpenOptions};
use std::cell::RefCell;

type Files = Vec<(String, Vec<u8>)>;

#[derive(Default)]
struct Watch {
    steps: u64,
    stop_at: Option<u64>,
    last: u64,
}

impl CompactWatch for Watch {
    fn progress(&mut self, done: u64, total: u64) {
        assert!(done <= total && done >= self.last);
        (self.steps, self.last) = (self.steps + 1, done);
    }

    fn is_stopped(&self) -> bool {
        self.stop_at.is_some_and(|at| self.steps >= at)
    }
}

const COMPACT: OpenOptions = OpenOptions { keep_content_id: true, ..OPTIONS };

async fn compact_on(memory: &Memory, dry_run: bool, watch: &mut Watch) -> Result<Compacted, DiskError> {
    let disk = Disk::open(memory, FileId(0), &COMPACT).await?;
    let done = disk.compact(memory, dry_run, watch).await?;
    if !dry_run {
        disk.close(memory).await?;
    }
    Ok(done)
}

fn compact(files: &Files) -> (Files, Compacted) {
    let memory = Memory::new(files.clone(), 0);
    let done = run(compact_on(&memory, false, &mut Watch::default())).unwrap();
    (memory.files(), done)
}

fn bytes_of(files: &Files) -> Vec<u8> {
    let memory = Memory::new(files.clone(), 0);
    let disk = open_with(&memory, &OpenOptions { read_only: true, ..OPTIONS }).unwrap();
    run(read(&disk, &memory, 0, DISK)).unwrap()
}

/// An image with data, zeroes that were written, and places that were freed, by several sessions.
fn used(shape: Shape, seed: u64) -> Files {
    let random = Random::new(seed);
    let memory = Memory::new(image(shape), seed);
    for _ in 0..1 + random.below(3) {
        let disk = open(&memory).unwrap();
        run(async {
            for _ in 0..random.below(40) {
                let offset = random.below(DISK / 512) * 512;
                let len = (512 << random.below(9)).min(DISK - offset);
                match random.below(5) {
                    0 => request(&disk, &memory, Op::Discard, offset, len, &RefCell::default()).await.unwrap(),
                    1 => write(&disk, &memory, offset, &vec![0; len as usize]).await.unwrap(),
                    2 => flush(&disk, &memory).await.unwrap(),
                    _ => write(&disk, &memory, offset, &vec![random.below(255) as u8 + 1; len as usize]).await.unwrap(),
                }
            }
            // COWD extents are left as they are, closed or not.
            if random.below(4) > 0 || matches!(shape, Shape::Cowd(_) | Shape::CowdPair | Shape::CowdChild) {
                disk.close(&memory).await.unwrap();
            } else {
                // Not closed: the next session finds it as it is.
                flush(&disk, &memory).await.unwrap();
            }
        });
    }
    memory.files()
}

fn lens(files: &Files) -> Vec<usize> {
    files.iter().map(|(_, bytes)| bytes.len()).collect()
}

/// Bytes that a host with holes of single sectors stores, as files in memory are.
fn stored(bytes: &[u8]) -> u64 {
    bytes.chunks(512).filter(|b| b.iter().any(|b| *b != 0)).map(|b| b.len() as u64).sum()
}

fn cases(case: impl Fn(Shape, u64)) {
    let number = |name| std::env::var(name).ok().and_then(|v| v.parse::<u64>().ok());
    if let Some(seed) = number("VDISK_CRASH_SEED") {
        return SHAPES.into_iter().for_each(|shape| case(shape, seed));
    }
    for seed in 0..number("VDISK_CRASH_CASES").unwrap_or(165) / SHAPES.len() as u64 {
        SHAPES.into_iter().for_each(|shape| case(shape, seed));
    }
}

#[test]
fn the_disk_reads_as_before_and_nothing_is_left_to_do() {
    cases(|shape, seed| {
        let what = format!("{shape:?}, seed {seed}");
        let files = used(shape, seed);
        let memory = Memory::new(files.clone(), 0);
        let planned = run(compact_on(&memory, true, &mut Watch::default())).unwrap();
        assert!(memory.files() == files, "{what}: a dry run changes nothing");
        let (after, done) = compact(&files);
        assert!(bytes_of(&after) == bytes_of(&files), "{what}: the bytes");
        assert_eq!(faults(&after, true), [""; 0], "{what}");
        assert_eq!(check(&after).0, [], "{what}");
        assert_eq!(done, planned, "{what}");
        for f in &planned.files {
            let (name, bytes) = &after[f.file.0 as usize];
            assert_eq!(f.len, bytes.len() as u64, "{what}: {name}");
            // The tables themselves change, and have fewer zeroes or more.
            assert!(stored(bytes).abs_diff(f.stored) <= 16 << 10, "{what}: {name} {} {}", stored(bytes), f.stored);
        }
        let (again, nothing) = compact(&after);
        assert!(again == after, "{what}: the second time");
        assert_eq!((nothing.dropped_grains, nothing.moved_grains), (0, 0), "{what}");
    });
}

#[test]
fn grains_lie_side_by_side_afterwards() {
    let files = used(Shape::Sparse, 5);
    let (after, done) = compact(&files);
    assert!(done.dropped_grains > 0 && done.moved_grains > 0, "{done:?}");
    let (_, leaks) = check(&after);
    assert_eq!(leaks.grains, 0);
    assert!(after[0].1.len() < files[0].1.len());
}

#[test]
fn the_content_id_stays_so_that_children_still_fit() {
    let parent = image(Shape::Child).remove(1);
    let base = image(Shape::Child).remove(2);
    let files = vec![parent, base];
    let memory = Memory::new(files.clone(), 0);
    // Something to compact: a grain of zeroes at the front.
    let disk = run(Disk::open(&memory, FileId(0), &COMPACT)).unwrap();
    run(async {
        write(&disk, &memory, 4096 * 512, &vec![0; 8192]).await.unwrap();
        disk.close(&memory).await.unwrap();
    });
    let (after, done) = compact(&memory.files());
    assert!(done.dropped_grains > 0);
    let id = |files: &Files| String::from_utf8_lossy(&files[0].1[512..2048]).into_owned();
    assert_eq!(id(&after), id(&files));
}

#[test]
fn zeroes_that_hide_a_parent_stay() {
    let memory = Memory::new(image(Shape::Child), 0);
    let disk = open(&memory).unwrap();
    let before = content(Shape::Child);
    run(async {
        // All of both: where the parents have something, and where they have nothing.
        write(&disk, &memory, 0, &vec![0; DISK as usize]).await.unwrap();
        disk.close(&memory).await.unwrap();
    });
    let (after, done) = compact(&memory.files());
    assert!(bytes_of(&after).iter().all(|b| *b == 0));
    let hiding = before.chunks(4096).filter(|grain| grain.iter().any(|b| *b != 0)).count() as u64;
    assert_eq!(done.dropped_grains, DISK / 4096 - hiding);
}

#[test]
fn a_host_that_cannot_punch_gets_the_end_back_all_the_same() {
    for seed in 0..20 {
        let files = used(Shape::Sparse, seed);
        let memory = Memory::new(files.clone(), 0);
        memory.cannot_punch.set(true);
        run(compact_on(&memory, false, &mut Watch::default())).unwrap();
        let after = memory.files();
        assert!(bytes_of(&after) == bytes_of(&files), "seed {seed}");
        assert_eq!(lens(&after), lens(&compact(&files).0), "seed {seed}");
    }
}

#[test]
fn an_image_in_which_something_is_wrong_is_left_as_it_is() {
    let mut files = used(Shape::Sparse, 5);
    let places = super::check::places(&files[0].1);
    let end = files[0].1.len() as u32 / 512;
    for at in [places.table, places.copy] {
        super::check::put(&mut files[0].1, at + 4, end);
    }
    for dry_run in [true, false] {
        let memory = Memory::new(files.clone(), 0);
        let e = run(compact_on(&memory, dry_run, &mut Watch::default())).unwrap_err();
        assert_eq!(e.kind(), crate::ErrorKind::Corrupt);
        assert!(memory.files() == files);
    }
}

#[test]
fn it_may_be_ended_after_any_step_and_goes_on() {
    cases(|shape, seed| {
        let what = format!("{shape:?}, seed {seed}");
        let files = used(shape, seed);
        let memory = Memory::new(files.clone(), seed);
        let mut watch = Watch { stop_at: Some(1 + Random::new(seed).below(60)), ..Watch::default() };
        run(compact_on(&memory, false, &mut watch)).unwrap();
        let stopped = memory.files();
        assert!(bytes_of(&stopped) == bytes_of(&files), "{what}");
        assert_eq!(check(&stopped).0, [], "{what}");
        let (after, _) = compact(&stopped);
        assert_eq!(lens(&after), lens(&compact(&files).0), "{what}");
    });
}

#[test]
fn a_power_cut_or_a_kill_at_any_point_loses_nothing() {
    cases(|shape, seed| {
        let what = format!("{shape:?}, seed {seed}");
        let random = Random::new(seed);
        let files = used(shape, seed);
        let memory = Memory::new(files.clone(), seed);
        run(compact_on(&memory, false, &mut Watch::default())).unwrap();
        let (expected, whole, calls) = (bytes_of(&files), lens(&memory.files()), memory.calls());
        let mut cut = files;
        // It goes on, and is cut off again.
        for _ in 0..1 + random.below(3) {
            let memory = Memory::new(cut, seed);
            memory.dead_from_call.set(random.below(calls));
            let _ = run(compact_on(&memory, false, &mut Watch::default()));
            cut = match random.below(2) {
                0 => memory.after_power_cut(&random),
                _ => memory.files(),
            };
            assert!(bytes_of(&cut) == expected, "{what}");
            assert_eq!(faults(&cut, false), [""; 0], "{what}");
            let torn = [FaultKind::Unclean, FaultKind::CopiesDiffer];
            let worse: Vec<_> = check(&cut).0.into_iter().filter(|f| !torn.contains(&f.kind)).collect();
            assert_eq!(worse, [], "{what}");
        }
        let (after, _) = compact(&cut);
        assert!(bytes_of(&after) == expected, "{what}");
        assert_eq!(check(&after).0, [], "{what}");
        assert_eq!(lens(&after), whole, "{what}");
    });
}
