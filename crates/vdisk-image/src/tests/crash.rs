//! The power is cut, or the process killed, after any call; then the image is opened again. A ledger outlives the process, and not the
//! power.
//!
//! `VDISK_CRASH_CASES` says how many cases to run, `VDISK_CRASH_SEED` repeats one.

use super::check::check;
use super::fixtures::{
    DISK, OPTIONS, SHAPES, Shape, content, faults, flush, image, open_with, read, request, run, run_all, sector,
    try_run, write,
};
use crate::memory::{Memory, Random};
use crate::{Disk, DiskError, Fault, FaultKind, FileId, LEDGER_WORDS, LedgerMemory, Op, OpenOptions};
use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

const TASKS: u64 = 4;
const SECTORS: usize = (DISK / 512) as usize;

/// What every sector has held: values in the order of their writes, and which of them a flush has made durable.
#[derive(Default)]
struct History {
    values: Vec<u64>,
    /// Index of the last value whose write was answered.
    answered: usize,
    /// Index of the oldest value that may be seen after a power cut.
    floor: usize,
}

type Histories = Rc<RefCell<Vec<History>>>;

/// What tasks have to themselves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Share {
    /// A few sectors, which share their grains with those of others.
    Sectors,
    /// Whole grains: these lose their places, which others get.
    Grains,
}

/// First sector and number of sectors of the next request, and whether it is of all that the task has there.
fn range(share: Share, task: u64, random: &Random) -> (u64, u64, bool) {
    match share {
        // Some that are close together and some that are far apart: shared grains, many tables.
        Share::Sectors => {
            let spread = if random.below(3) == 0 { SECTORS as u64 } else { 512 };
            ((random.below(spread / TASKS / 4) * TASKS + task) * 4, 1 + random.below(4), false)
        }
        Share::Grains => {
            let spread = if random.below(5) == 0 { SECTORS as u64 / 128 } else { 16 };
            let unit = (random.below(spread / TASKS) * TASKS + task) * 128;
            match random.below(2) {
                0 => (unit, 128, true),
                _ => (unit + random.below(120), 1 + random.below(8), false),
            }
        }
    }
}

async fn work(task: u64, disk: Rc<Disk>, memory: Rc<Memory>, all: Histories, random: Random, share: Share) {
    for n in 0..25 {
        let (first, count, is_whole) = range(share, task, &random);
        let range = first as usize..(first + count) as usize;
        if random.below(5) == 0 {
            let before: Vec<usize> = all.borrow().iter().map(|h| h.answered).collect();
            if flush(&disk, &memory).await.is_err() {
                return;
            }
            for (h, answered) in all.borrow_mut().iter_mut().zip(before) {
                h.floor = h.floor.max(answered);
            }
            continue;
        }
        let zero = random.below(if is_whole { 2 } else { 8 }) == 0;
        let op = if is_whole && random.below(2) == 0 { Op::Discard } else { Op::WriteZeroes };
        let value = if zero { 0 } else { (task + 1) << 32 | n << 8 | 1 };
        for h in &mut all.borrow_mut()[range.clone()] {
            h.values.push(value);
        }
        let result = if zero {
            request(&disk, &memory, op, first * 512, count * 512, &RefCell::default()).await
        } else {
            write(&disk, &memory, first * 512, &sector(value).repeat(count as usize)).await
        };
        if result.is_err() {
            return;
        }
        // A discard promises nothing: what was there before may be seen again.
        if zero && op == Op::Discard {
            continue;
        }
        for h in &mut all.borrow_mut()[range] {
            h.answered = h.values.len() - 1;
        }
    }
}

/// How a session ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    PowerCut,
    Kill,
}

/// Memory that outlives a process of a test.
#[derive(Debug)]
struct Survivor(Box<[AtomicU64]>);

impl LedgerMemory for Survivor {
    fn words(&self) -> &[AtomicU64] {
        &self.0
    }
}

fn survivor() -> Arc<dyn LedgerMemory> {
    Arc::new(Survivor((0..LEDGER_WORDS).map(|_| AtomicU64::new(0)).collect()))
}

fn open_with_ledger(memory: &Memory, ledger: &Arc<dyn LedgerMemory>) -> Result<Disk, DiskError> {
    run(opening(memory, ledger))
}

/// Opens the image, and takes over what `ledger` has left of it. Each process gives another content ID.
async fn opening(memory: &Memory, ledger: &Arc<dyn LedgerMemory>) -> Result<Disk, DiskError> {
    static NEXT: AtomicU32 = AtomicU32::new(0x1234_5678);
    let new_content_id = NEXT.fetch_add(1, Ordering::Relaxed);
    let mut disk = Disk::open(memory, FileId(0), &OpenOptions { new_content_id, ..OPTIONS }).await?;
    disk.keep_ledger(memory, Arc::clone(ledger)).await?;
    Ok(disk)
}

fn case(shape: Shape, seed: u64, end: End) {
    let random = Random::new(seed);
    let memory = Rc::new(Memory::new(image(shape), seed));
    let share = if random.below(2) == 0 { Share::Sectors } else { Share::Grains };
    memory.cannot_punch.set(random.below(4) == 0);
    let ledger = survivor();
    let disk = Rc::new(open_with_ledger(&memory, &ledger).unwrap());
    memory.dead_from_call.set(memory.calls() + random.below(300));
    let all: Histories = Rc::new(RefCell::new((0..SECTORS).map(|_| History::default()).collect()));
    for (h, before) in all.borrow_mut().iter_mut().zip(content(shape).chunks(512)) {
        h.values.push(before.iter().take(8).rev().fold(0, |value, byte| value << 8 | u64::from(*byte)));
    }
    let tasks = (0..TASKS).map(|t| {
        work(t, Rc::clone(&disk), Rc::clone(&memory), Rc::clone(&all), Random::new(seed ^ (t + 1) << 40), share)
    });
    match end {
        End::PowerCut => run_all(tasks),
        End::Kill => {
            memory.dead_hangs.set(true);
            try_run(futures_util::future::join_all(tasks));
        }
    }
    let files = match end {
        End::PowerCut => memory.after_power_cut(&random),
        // What was acknowledged is there, flushed or not.
        End::Kill => {
            all.borrow_mut().iter_mut().for_each(|h| h.floor = h.answered);
            killed_while_recovering(memory.files(), &ledger, &random)
        }
    };
    assert_eq!(faults(&files, false), [""; 0], "{shape:?}, seed {seed}, {end:?}");
    // A CID and its copy can be torn apart, as can a table and its copy.
    let torn = [FaultKind::Unclean, FaultKind::CopiesDiffer, FaultKind::ContentId];
    let worse: Vec<Fault> = check(&files).0.into_iter().filter(|f| !torn.contains(&f.kind)).collect();
    assert_eq!(worse, [], "{shape:?}, seed {seed}");
    let after = Memory::new(files, seed);
    let ledger = if end == End::Kill { ledger } else { survivor() };
    let disk = open_with_ledger(&after, &ledger).unwrap();
    let bytes = run(read(&disk, &after, 0, DISK)).unwrap_or_else(|e| panic!("{shape:?}, seed {seed}: {e}"));
    for (n, h) in all.borrow().iter().enumerate() {
        let got = &bytes[n * 512..][..512];
        let allowed = h.values[h.floor..].iter().any(|v| got == sector(*v));
        let at = h.values.iter().position(|v| got == sector(*v));
        assert!(
            allowed,
            "{shape:?}, seed {seed}: sector {n} holds value {at:?} of {}, floor {}",
            h.values.len(),
            h.floor
        );
    }
    // And it goes on: whatever the cut left is repaired by the first change and the next flush.
    let survivors = bytes;
    run(async {
        write(&disk, &after, 0, &survivors[..4096]).await.unwrap();
        write(&disk, &after, DISK / 2 + 7, &[9; 9000]).await.unwrap();
        disk.close(&after).await.unwrap();
        let got = read(&disk, &after, 0, DISK / 2).await.unwrap();
        assert!(got == survivors[..(DISK / 2) as usize], "{shape:?}, seed {seed}: changed by a write elsewhere");
    });
    assert_eq!(faults(&after.files(), true), [""; 0], "{shape:?}, seed {seed}, after going on");
    assert_eq!(check(&after.files()).0, [], "{shape:?}, seed {seed}, after going on");
}

/// The next process takes over, and dies as well, once or twice.
fn killed_while_recovering(
    mut files: Vec<(String, Vec<u8>)>,
    ledger: &Arc<dyn LedgerMemory>,
    random: &Random,
) -> Vec<(String, Vec<u8>)> {
    for _ in 0..random.below(3) {
        let memory = Rc::new(Memory::new(files, random.below(1 << 30)));
        memory.dead_from_call.set(random.below(60));
        memory.dead_hangs.set(true);
        let (process, its) = (Rc::clone(&memory), Arc::clone(ledger));
        // It may as well get through.
        try_run(async move { opening(&process, &its).await.map(drop) });
        files = memory.files();
    }
    files
}

#[test]
fn a_killed_process_loses_nothing_that_was_acknowledged() {
    cases(End::Kill);
}

#[test]
fn a_power_cut_loses_nothing_that_was_flushed() {
    cases(End::PowerCut);
}

fn cases(end: End) {
    let number = |name| std::env::var(name).ok().and_then(|v| v.parse::<u64>().ok());
    if let Some(seed) = number("VDISK_CRASH_SEED") {
        return SHAPES.into_iter().for_each(|shape| case(shape, seed, end));
    }
    for seed in 0..number("VDISK_CRASH_CASES").unwrap_or(1000) / SHAPES.len() as u64 {
        SHAPES.into_iter().for_each(|shape| case(shape, seed, end));
    }
}

/// An image whose grains are not flushed, and its ledger.
fn killed(shape: Shape) -> (Memory, Arc<dyn LedgerMemory>) {
    let (memory, ledger) = (Memory::new(image(shape), 1), survivor());
    let disk = open_with_ledger(&memory, &ledger).unwrap();
    run(async {
        write(&disk, &memory, 0, &[1; 4096]).await.unwrap();
        flush(&disk, &memory).await.unwrap();
        write(&disk, &memory, 1 << 20, &[2; 4096]).await.unwrap();
    });
    (Memory::new(memory.files(), 1), ledger)
}

#[test]
fn a_ledger_is_not_believed_after_a_sync_that_failed() {
    let (memory, ledger) = (Memory::new(image(Shape::Sparse), 1), survivor());
    let disk = open_with_ledger(&memory, &ledger).unwrap();
    run(async {
        write(&disk, &memory, 0, &[1; 4096]).await.unwrap();
        memory.fail_call.set(Some((memory.calls(), 5)));
        flush(&disk, &memory).await.unwrap_err();
    });
    let again = open_with(&Memory::new(memory.files(), 1), &OPTIONS).unwrap();
    assert_eq!((again.left_in(Arc::clone(&ledger)), again.is_lost(ledger)), (0, true));
    // Nor one whose data the host says to have lost, when it is to be taken over.
    let (memory, ledger) = killed(Shape::Sparse);
    memory.fail_call.set(Some((2, 5)));
    let calls = (0..20).find(|n| {
        memory.fail_call.set(Some((memory.calls() + n, 5)));
        open_with_ledger(&memory, &ledger).is_err_and(|e| e.to_string().contains("is lost"))
    });
    assert!(calls.is_some());
    let again = open_with(&memory, &OPTIONS).unwrap();
    assert_eq!((again.left_in(Arc::clone(&ledger)), again.is_lost(Arc::clone(&ledger))), (0, true));
    drop(again);
    // A session that begins anew has nothing to do with it.
    assert!(!open_with_ledger(&memory, &ledger).unwrap().is_lost(ledger));
}

/// A ledger is found by its file's inode, which a deleted file leaves to the next one.
#[test]
fn an_image_that_keeps_no_ledger_has_lost_nothing_by_one_that_is_there() {
    let raw = open_with(&Memory::new(image(Shape::Raw), 1), &OPTIONS).unwrap();
    let (_, with_entries) = killed(Shape::Sparse);
    assert!(!raw.is_lost(with_entries));
    let (memory, void) = (Memory::new(image(Shape::Sparse), 1), survivor());
    let disk = open_with_ledger(&memory, &void).unwrap();
    run(async {
        write(&disk, &memory, 0, &[1; 4096]).await.unwrap();
        memory.fail_call.set(Some((memory.calls(), 5)));
        flush(&disk, &memory).await.unwrap_err();
    });
    assert!(!raw.is_lost(void));
}

#[test]
fn a_ledger_does_not_count_for_an_image_that_somebody_else_has_changed() {
    let (memory, ledger) = killed(Shape::Sparse);
    let before = open_with(&memory, &OPTIONS).unwrap();
    assert_eq!((before.left_in(Arc::clone(&ledger)), before.is_lost(Arc::clone(&ledger))), (1, false));
    drop(before);
    // Without the ledger: as any other program.
    let other = open_with(&memory, &OpenOptions { new_content_id: 77, ..OPTIONS }).unwrap();
    run(async {
        write(&other, &memory, 3 << 20, &[3; 512]).await.unwrap();
        other.close(&memory).await.unwrap();
    });
    let mut disk = open_with(&memory, &OPTIONS).unwrap();
    assert!(disk.is_lost(Arc::clone(&ledger)));
    let taken = run(disk.keep_ledger(&memory, ledger)).unwrap();
    assert_eq!((taken.grains, taken.others), (0, true));
    assert_eq!(run(read(&disk, &memory, 1 << 20, 512)).unwrap(), [0; 512]);
}

/// Promises that fill the ledger are no work for a flush: who waits for them must let them go on.
#[test]
fn a_writer_that_finds_the_ledger_promised_to_others_waits_for_them() {
    for shape in [Shape::Cowd(1), Shape::Sparse] {
        let memory = Rc::new(Memory::new(image(shape), 3));
        let disk = Rc::new(open_with_ledger(&memory, &survivor()).unwrap());
        run(async {
            write(&disk, &memory, 0, &[1; 512]).await.unwrap();
            flush(&disk, &memory).await.unwrap();
        });
        run_all((0..12).map(|n| {
            let (disk, memory) = (Rc::clone(&disk), Rc::clone(&memory));
            async move {
                let len = if shape == Shape::Sparse { 128 << 10 } else { 16 << 10 };
                write(&disk, &memory, 65536 + n * len, &vec![n as u8; len as usize]).await.unwrap();
            }
        }));
    }
}
