//! The power is cut, or the process killed, after any call; then the image is opened again. A ledger outlives the process, and not the
//! power.
//!
//! `VDISK_CRASH_CASES` says how many cases to run, `VDISK_CRASH_SEED` repeats one.

use super::check::check;
use super::fixtures::{
    DISK, SHAPES, Shape, content, faults, flush, image, open, read, request, run, run_all, sector, write,
};
use crate::memory::{Memory, Random};
use crate::{Disk, DiskError, Fault, FaultKind, LEDGER_WORDS, LedgerMemory, Op};
use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

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

async fn work(task: u64, disk: Rc<Disk>, memory: Rc<Memory>, all: Histories, random: Random) {
    for n in 0..25 {
        // A few sectors that are close together and some that are far apart: shared grains, many tables.
        let spread = if random.below(3) == 0 { SECTORS as u64 } else { 512 };
        let first = (random.below(spread / TASKS / 4) * TASKS + task) * 4;
        let count = 1 + random.below(4);
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
        let zero = random.below(8) == 0;
        let value = if zero { 0 } else { (task + 1) << 32 | n << 8 | 1 };
        for h in &mut all.borrow_mut()[range.clone()] {
            h.values.push(value);
        }
        let result = if zero {
            request(&disk, &memory, Op::WriteZeroes, first * 512, count * 512, &RefCell::default()).await
        } else {
            write(&disk, &memory, first * 512, &sector(value).repeat(count as usize)).await
        };
        if result.is_err() {
            return;
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

/// Opens the image, and takes over what `ledger` has left of it.
fn open_with_ledger(memory: &Memory, ledger: &Arc<dyn LedgerMemory>) -> Result<Disk, DiskError> {
    let mut disk = open(memory)?;
    run(disk.keep_ledger(memory, Arc::clone(ledger)))?;
    Ok(disk)
}

fn case(shape: Shape, seed: u64, end: End) {
    let random = Random::new(seed);
    let memory = Rc::new(Memory::new(image(shape), seed));
    let ledger = survivor();
    let disk = Rc::new(open_with_ledger(&memory, &ledger).unwrap());
    memory.dead_from_call.set(memory.calls() + random.below(300));
    let all: Histories = Rc::new(RefCell::new((0..SECTORS).map(|_| History::default()).collect()));
    for (h, before) in all.borrow_mut().iter_mut().zip(content(shape).chunks(512)) {
        h.values.push(before.iter().take(8).rev().fold(0, |value, byte| value << 8 | u64::from(*byte)));
    }
    run_all(
        (0..TASKS)
            .map(|t| work(t, Rc::clone(&disk), Rc::clone(&memory), Rc::clone(&all), Random::new(seed ^ (t + 1) << 40))),
    );
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
        let memory = Memory::new(files, random.below(1 << 30));
        memory.dead_from_call.set(random.below(60));
        // It may as well get through.
        let _ = open_with_ledger(&memory, ledger);
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
