//! What `Disk::repair` puts right, what it leaves alone, and that it can be undone and interrupted anywhere.

use super::check::{Places, check, places, put, used, word};
use super::fixtures::{OPTIONS, Shape, run};
use crate::memory::{Memory, Random};
use crate::{
    Backup, Disk, DiskError, Fault, FaultKind, FileId, Flags, Kept, Op, OpenOptions, Repair, RepairWatch, Request,
};
use std::cell::RefCell;
use std::io;
use std::rc::Rc;

type Files = Vec<(String, Vec<u8>)>;

/// A backup in memory, and how much of it is durable.
#[derive(Default)]
struct Kepts {
    bytes: Vec<(FileId, Change)>,
    durable: usize,
    /// Keeping this many fails.
    full_at: Option<usize>,
}

enum Change {
    Bytes(usize, Vec<u8>),
    Len(usize),
}

impl Backup for Kepts {
    fn keep(&mut self, kept: Kept<'_>) -> io::Result<()> {
        if self.full_at.is_some_and(|at| self.bytes.len() >= at) {
            return Err(io::ErrorKind::StorageFull.into());
        }
        self.bytes.push(match kept {
            Kept::Bytes { file, offset, before, after } => {
                assert!(before.len() == after.len() && before != after && offset % 512 == 0);
                (file, Change::Bytes(offset as usize, before.to_vec()))
            }
            Kept::Len { file, before, .. } => (file, Change::Len(before as usize)),
        });
        Ok(())
    }

    fn sync(&mut self) -> io::Result<()> {
        self.durable = self.bytes.len();
        Ok(())
    }
}

impl Kepts {
    /// The files as they were, from files in which any of the changes are done.
    fn undo(&self, mut files: Files) -> Files {
        for (file, change) in self.bytes[..self.durable].iter().rev() {
            let bytes = &mut files[file.0 as usize].1;
            match change {
                Change::Len(len) => bytes.resize(*len, 0),
                Change::Bytes(at, before) => {
                    if bytes.len() < at + before.len() {
                        bytes.resize(at + before.len(), 0);
                    }
                    bytes[*at..at + before.len()].copy_from_slice(before);
                }
            }
        }
        files
    }
}

#[derive(Default)]
struct Watch {
    repaired: Vec<Repair>,
    left: Vec<Repair>,
}

impl RepairWatch for Watch {
    fn repaired(&mut self, repair: Repair) {
        self.repaired.push(repair);
    }

    fn left(&mut self, repair: Repair) {
        self.left.push(repair);
    }

    fn progress(&mut self, done: u64, total: u64) {
        assert!(done <= total);
    }
}

const EXAMINE: OpenOptions = OpenOptions { examine: true, ..OPTIONS };

async fn repair_on(memory: &Memory, kepts: &mut Kepts) -> Result<Watch, DiskError> {
    let disk = Disk::open(memory, FileId(0), &EXAMINE).await?;
    let mut watch = Watch::default();
    disk.repair(memory, kepts, &mut watch).await?;
    Ok(watch)
}

/// Repairs files. Undoing it gives them back, and a second repair finds nothing to do.
fn repair(files: &Files) -> (Files, Watch) {
    let memory = Memory::new(files.clone(), 0);
    let mut kepts = Kepts::default();
    let watch = run(repair_on(&memory, &mut kepts)).unwrap();
    let after = memory.files();
    assert!(kepts.undo(after.clone()) == *files, "undone");
    let again = Memory::new(after.clone(), 0);
    let mut kepts = Kepts::default();
    let second = run(repair_on(&again, &mut kepts)).unwrap();
    assert_eq!((second.repaired, kepts.bytes.len()), (vec![], 0), "the second time");
    assert_eq!(second.left, watch.left);
    assert!(again.files() == after);
    (after, watch)
}

/// What a check says of [`Shape::Sparse`] after a change and a repair, and what the repair says.
fn after(change: impl FnOnce(&mut Vec<u8>, Places)) -> (Vec<FaultKind>, Watch, Vec<u8>, Vec<u8>) {
    let mut files = used(Shape::Sparse);
    let whole = files[0].1.clone();
    let of = places(&files[0].1);
    change(&mut files[0].1, of);
    let (mut after, watch) = repair(&files);
    let kinds = check(&after).0.iter().map(|f| f.kind).collect();
    (kinds, watch, whole, after.remove(0).1)
}

#[test]
fn an_image_in_which_nothing_is_wrong_is_left_as_it_is() {
    for shape in super::fixtures::SHAPES {
        let files = used(shape);
        let (after, watch) = repair(&files);
        assert_eq!(watch.left, [], "{shape:?}");
        // A room for grain tables is given out whole: what is left of it is a hole already, or the end of the file.
        if shape != Shape::SparseWithoutTables {
            assert_eq!(watch.repaired, [], "{shape:?}");
            assert!(after == files, "{shape:?}");
        }
    }
}

#[test]
fn an_image_that_was_only_not_closed_is_closed() {
    let (faults, watch, whole, bytes) = after(|file, _| file[72] = 1);
    assert_eq!((faults, watch.left.len(), watch.repaired.len()), (vec![], 0, 1));
    assert!(bytes == whole);
}

#[test]
fn a_zeroed_sector_of_a_closed_image_is_taken_from_the_other_table() {
    for side in [0, 1] {
        let (faults, watch, whole, bytes) = after(|file, places| {
            let at = if side == 0 { places.table } else { places.copy };
            file[at..at + 512].fill(0);
        });
        assert_eq!((faults, watch.left, watch.repaired.len()), (vec![], vec![], 1), "{side}");
        assert!(bytes == whole, "{side}");
    }
}

#[test]
fn garbage_in_a_table_of_a_closed_image_is_taken_from_the_other_one() {
    for value in [1, 9, 0x7000_0000] {
        for side in [0, 1] {
            let (faults, watch, whole, bytes) = after(|file, places| {
                let at = if side == 0 { places.table } else { places.copy };
                put(file, at + 2 * 4, value);
            });
            assert_eq!((faults, watch.left), (vec![], vec![]), "{value} {side}");
            assert!(bytes == whole, "{value} {side}");
        }
    }
}

#[test]
fn tables_of_a_closed_image_of_which_each_has_something_are_left_alone() {
    let (faults, watch, _, _) = after(|file, places| {
        put(file, places.table + 2 * 4, 0);
        put(file, places.copy + 3 * 4, 0);
    });
    assert_eq!((faults, watch.repaired), (vec![FaultKind::CopiesDiffer], vec![]));
    // And so is what both seem to have leaked.
    assert!(watch.left[0].detail.contains("2 entries differ"), "{:?}", watch.left);
    // Of one that was not closed, an entry that is there is not given up.
    let (faults, watch, whole, bytes) = after(|file, places| {
        put(file, places.table + 2 * 4, 0);
        put(file, places.copy + 3 * 4, 0);
        file[72] = 1;
    });
    assert_eq!((faults, watch.left), (vec![], vec![]));
    assert!(bytes == whole);
}

#[test]
fn of_two_places_the_primary_one_counts_if_the_image_was_not_closed() {
    let change = |unclean| {
        move |file: &mut Vec<u8>, places: Places| {
            let end = file.len();
            file.resize(end + 4096, 7);
            put(file, places.copy + 2 * 4, end as u32 / 512);
            file[72] = unclean;
        }
    };
    let (faults, watch, whole, bytes) = after(change(1));
    assert_eq!((faults, watch.left), (vec![], vec![]));
    assert!(bytes == whole, "and the other place is cut off");
    let (faults, watch, ..) = after(change(0));
    assert_eq!((faults, watch.repaired), (vec![FaultKind::CopiesDiffer], vec![]));
    // What only the copy names may be all that is left of something: it is not given back.
    assert_eq!(watch.left.len(), 1);
}

#[test]
fn what_was_cut_off_is_not_made_zeroes() {
    // The copy is kept by nobody, as other programs do it, and the file was cut off.
    let (faults, watch, ..) = after(|file, places| {
        let (table, len) = (places.table, file.len() as u32 / 512);
        put(file, table + 4, len);
        put(file, places.copy + 4, 0);
    });
    assert_eq!((faults, watch.repaired), (vec![FaultKind::CopiesDiffer, FaultKind::EntryPastEnd], vec![]));
}

#[test]
fn a_place_that_two_entries_name_is_left_alone() {
    let (faults, watch, ..) = after(|file, places| {
        let other = word(file, places.table + 2 * 4);
        put(file, places.table + 9 * 4, other);
        put(file, places.copy + 9 * 4, other);
        file[72] = 1;
    });
    assert_eq!((faults, watch.repaired), (vec![FaultKind::Unclean, FaultKind::EntryUsedTwice], vec![]));
    assert!(watch.left[0].detail.contains("stays marked"), "{:?}", watch.left);
}

#[test]
fn a_table_that_one_directory_does_not_have_is_made_from_the_other() {
    for value in [0, 2, u32::MAX] {
        for primary in [true, false] {
            let (faults, watch, whole, bytes) =
                after(|file, places| put(file, if primary { places.gd } else { places.rgd }, value));
            assert_eq!((faults, watch.left.len(), watch.repaired.len()), (vec![], 0, 1), "{value} {primary}");
            let (before, now) = (places(&whole), places(&bytes));
            assert_eq!(bytes[now.table..now.table + 2048], whole[before.table..before.table + 2048]);
            assert_eq!(bytes[now.copy..now.copy + 2048], whole[before.table..before.table + 2048]);
            assert_eq!(if primary { now.table } else { now.copy }, whole.len());
        }
    }
    // Both directories name the same table: it gets a copy.
    let (faults, watch, ..) = after(|file, places| {
        let first = word(file, places.gd);
        put(file, places.rgd, first);
    });
    assert_eq!((faults, watch.left.len(), watch.repaired.len()), (vec![], 0, 1));
}

#[test]
fn the_file_does_not_grow_over_what_an_entry_names_past_its_end() {
    let (faults, watch, ..) = after(|file, places| {
        put(file, places.rgd, 0);
        let end = file.len() as u32 / 512;
        put(file, places.table + 9 * 4, end);
    });
    assert_eq!((faults, watch.repaired), (vec![FaultKind::CopiesDiffer, FaultKind::EntryPastEnd], vec![]));
    assert!(watch.left[0].detail.contains("cannot grow"), "{:?}", watch.left);
}

#[test]
fn nothing_is_written_over_a_grain_that_a_directory_entry_takes_for_a_table() {
    let (_, watch, whole, bytes) = after(|file, places| {
        // The place of the last grain that the first table names, which is not the first one's own.
        let grain = word(file, places.table + 2 * 4);
        put(file, places.gd + 4, grain);
    });
    assert!(watch.repaired.is_empty() && !watch.left.is_empty(), "{:?}", watch.repaired);
    let gd = places(&whole).gd;
    assert!(bytes[..gd + 4] == whole[..gd + 4] && bytes[gd + 8..] == whole[gd + 8..]);
}

#[test]
fn what_nothing_names_is_given_back_and_kept_in_the_backup() {
    let mut hole = 0..0;
    let (faults, watch, _, bytes) = after(|file, places| {
        let grain = word(file, places.table + 2 * 4) as usize * 512;
        hole = grain..grain + 4096;
        assert!(file[hole.clone()].iter().any(|b| *b != 0));
        put(file, places.table + 2 * 4, 0);
        put(file, places.copy + 2 * 4, 0);
        file.resize(file.len() + 10_000, 3);
    });
    assert_eq!((faults, watch.left), (vec![], vec![]));
    assert!(watch.repaired[0].detail.starts_with(&format!("{} bytes", 4096 + 10_000)), "{:?}", watch.repaired);
    assert!(bytes[hole].iter().all(|b| *b == 0));
    assert_eq!(bytes.len(), used(Shape::Sparse)[0].1.len());
}

#[test]
fn a_host_that_cannot_punch_keeps_what_nothing_names() {
    let mut files = used(Shape::Sparse);
    let of = places(&files[0].1);
    for at in [of.table, of.copy] {
        put(&mut files[0].1, at + 2 * 4, 0);
    }
    let memory = Memory::new(files.clone(), 0);
    memory.cannot_punch.set(true);
    let watch = run(repair_on(&memory, &mut Kepts::default())).unwrap();
    assert_eq!(watch.repaired, []);
    assert!(memory.files() == files);
}

#[test]
fn free_sector_and_long_content_id_are_put_right() {
    let mut files = used(Shape::Cowd(3));
    let n = files.iter().position(|(name, _)| name == "delta.vmdk").unwrap();
    let whole = files.clone();
    put(&mut files[n].1, 28, 100);
    put(&mut files[n].1, 1648, 1);
    let text = String::from_utf8(files[0].1.clone()).unwrap();
    let tail = text.find("8899aabb12345678").unwrap() + 8;
    files[0].1[tail..tail + 8].copy_from_slice(b"0badcafe");
    let (after, watch) = repair(&files);
    assert_eq!((watch.repaired.len(), watch.left), (3, vec![]));
    assert!(after == whole);
}

#[test]
fn the_links_below_are_not_touched() {
    let mut files = used(Shape::Child);
    let n = files.iter().position(|(name, _)| name == "base.vmdk").unwrap();
    files[n].1[72] = 1;
    files[0].1[72] = 1;
    let (after, watch) = repair(&files);
    assert_eq!((watch.repaired.len(), watch.left), (1, vec![]));
    assert!(after[n] == files[n] && after[0].1[72] == 0);
}

#[test]
fn without_its_parent_an_image_is_repaired_all_the_same() {
    let mut files = used(Shape::Child);
    files.truncate(1);
    files[0].1[72] = 1;
    assert_eq!(repair(&files).1.repaired.len(), 1);
}

#[test]
fn a_backup_that_is_full_keeps_everything_from_changing() {
    let mut files = used(Shape::Sparse);
    let of = places(&files[0].1);
    files[0].1[of.table..of.table + 512].fill(0);
    files[0].1[72] = 1;
    let memory = Memory::new(files.clone(), 0);
    let mut kepts = Kepts { full_at: Some(0), ..Kepts::default() };
    let e = run(repair_on(&memory, &mut kepts)).err().unwrap();
    assert_eq!(e.kind(), crate::ErrorKind::NoSpace);
    assert!(memory.files() == files);
}

/// Sectors of the disk that a grain of the primary tables holds, as far as it can be read; `None` for the others.
fn readable(files: &Files) -> Vec<Option<Vec<u8>>> {
    let parents = ["base.vmdk", "parent.vmdk"];
    let top = files.iter().filter(|(name, _)| !parents.contains(&name.as_str()));
    let memory = Memory::new(top.cloned().collect(), 0);
    let disk = run(Disk::open(&memory, FileId(0), &OpenOptions { read_only: true, ..EXAMINE })).unwrap();
    let read = |n: u64| {
        let buf = RefCell::new(vec![0xee; 4096]);
        let request = Request::check(&disk.geometry(), Op::Read, n * 4096, 4096, Flags::default()).unwrap();
        run(disk.serve(&memory, request, &buf)).ok().map(|()| buf.into_inner())
    };
    // What is absent may turn out to be in the copy: only what is there is to stay.
    (0..disk.geometry().size / 4096).map(|n| read(n).filter(|bytes| bytes.iter().any(|b| *b != 0))).collect()
}

/// Breaks an image in a few places: entries of directories and tables, and of their copies, flags, the end of the file.
fn break_it(files: &mut Files, random: &Random) {
    for (name, file) in files.iter_mut().filter(|(name, _)| !["base.vmdk", "parent.vmdk"].contains(&name.as_str())) {
        if file.starts_with(b"COWD") {
            match random.below(3) {
                0 => put(file, 28, random.below(100) as u32),
                1 => put(file, 1648, 1),
                _ => {}
            }
        }
        if !file.starts_with(b"KDMV") {
            continue;
        }
        let of = places(file);
        let copies = of.rgd != 0;
        file[72] = random.below(2) as u8;
        for _ in 0..1 + random.below(4) {
            let len = file.len() as u64 / 512;
            let entry = random.below(40) as usize * 4;
            let value = match random.below(6) {
                0 | 1 => 0,
                2 => random.below(len) as u32,
                3 => (len + random.below(64)) as u32,
                4 => word(file, of.table + random.below(30) as usize * 4),
                _ => random.below(u64::from(u32::MAX)) as u32,
            };
            let side = random.below(2) == 0 || !copies;
            match random.below(8) {
                0 => put(file, if side { of.gd } else { of.rgd } + random.below(2) as usize * 4, value),
                1 => {
                    let at = if side { of.table } else { of.copy };
                    file[at..at + 512].fill(random.below(2) as u8 * 0x5a);
                }
                2 if random.below(4) == 0 => file.truncate(file.len() - 4096),
                3 if copies => {
                    put(file, of.table + entry, value);
                    put(file, of.copy + entry, value);
                }
                4 => file.resize(file.len() + random.below(3) as usize * 2048, 9),
                _ => put(file, if side { of.table } else { of.copy } + entry, value),
            }
            if of.table + 2048 > file.len() || of.copy + 2048 > file.len() {
                panic!("{name}: the metadata was cut off");
            }
        }
    }
}

fn kinds(faults: &[Fault]) -> Vec<(FaultKind, &str)> {
    let mut kinds: Vec<_> = faults.iter().map(|f| (f.kind, f.file.as_str())).collect();
    kinds.sort_unstable();
    kinds
}

const BREAKABLE: [Shape; 6] =
    [Shape::Sparse, Shape::SparseWithoutCopy, Shape::SparseWithoutTables, Shape::Split, Shape::Child, Shape::CowdPair];

fn broken(shape: Shape, seed: u64) -> (Files, Random) {
    let random = Random::new(seed);
    let mut files = used(shape);
    break_it(&mut files, &random);
    (files, random)
}

fn cases(case: impl Fn(Shape, u64)) {
    let number = |name| std::env::var(name).ok().and_then(|v| v.parse::<u64>().ok());
    if let Some(seed) = number("VDISK_CRASH_SEED") {
        return BREAKABLE.into_iter().for_each(|shape| case(shape, seed));
    }
    for seed in 0..number("VDISK_CRASH_CASES").unwrap_or(300) / BREAKABLE.len() as u64 {
        BREAKABLE.into_iter().for_each(|shape| case(shape, seed));
    }
}

/// Every kind of fault is at most as often there as before, and all that could be read can be read.
fn assert_no_worse(before: &Files, after: &Files, what: &str) {
    let (old, new) = (check(before).0, check(after).0);
    // An entry that names a table among the grains can be read, and is wrong all the same.
    let named = |f: &Fault| f.detail.split("names sector ").nth(1)?.split(',').next()?.parse::<usize>().ok();
    let in_metadata = old.iter().filter(|f| f.kind == FaultKind::EntryInMetadata);
    let tables: Vec<Vec<u8>> = in_metadata
        .filter_map(|f| {
            let file = before.iter().find(|(name, _)| *name == f.file)?;
            Some(file.1.get(named(f)? * 512..)?.get(..4096)?.to_vec())
        })
        .collect();
    let (old, new) = (kinds(&old), kinds(&new));
    for kind in &new {
        let count = |kinds: &[(FaultKind, &str)]| kinds.iter().filter(|k| *k == kind).count();
        assert!(count(&new) <= count(&old), "{what}: {kind:?}\n{old:?}\n{new:?}");
    }
    for (n, (was, is)) in readable(before).into_iter().zip(readable(after)).enumerate() {
        let table = || tables.iter().any(|bytes| was.as_ref() == Some(bytes));
        assert!(was.is_none() || was == is || table(), "{what}: block {n}");
    }
}

#[test]
fn a_repair_makes_no_fault_and_changes_nothing_that_could_be_read() {
    cases(|shape, seed| {
        let (files, _) = broken(shape, seed);
        let (after, _) = repair(&files);
        assert_no_worse(&files, &after, &format!("{shape:?}, seed {seed}"));
    });
}

#[test]
fn a_repair_that_is_cut_off_anywhere_can_be_undone_and_goes_on() {
    cases(|shape, seed| {
        let what = format!("{shape:?}, seed {seed}");
        let (files, random) = broken(shape, seed);
        let (whole, _) = repair(&files);
        let memory = Rc::new(Memory::new(files.clone(), seed));
        let mut kepts = Kepts::default();
        let disk = run(Disk::open(&*memory, FileId(0), &EXAMINE)).unwrap();
        memory.dead_from_call.set(memory.calls() + random.below(120));
        let _ = run(disk.repair(&*memory, &mut kepts, &mut Watch::default()));
        let cut = memory.after_power_cut(&random);
        assert!(kepts.undo(cut.clone()) == files, "{what}: undone");
        assert_no_worse(&files, &cut, &what);
        let (after, _) = repair(&cut);
        assert_no_worse(&cut, &after, &what);
        let (once, twice) = (check(&whole).0, check(&after).0);
        assert_eq!(kinds(&once), kinds(&twice), "{what}: in two goes");
    });
}
