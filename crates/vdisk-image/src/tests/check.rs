//! What `Disk::check` finds in images that are wrong in one way each, and that it finds nothing in those that are not.

use super::fixtures::{DISK, OPTIONS, SHAPES, Shape, image, open, open_with, run, write};
use crate::memory::Memory;
use crate::{CheckWatch, Fault, FaultKind, Leaks, OpenOptions};
use vmdk_parse::{GdOffset, SparseHeader};

#[derive(Default)]
struct Watch {
    faults: Vec<Fault>,
    progress: Vec<(u64, u64)>,
}

impl CheckWatch for Watch {
    fn fault(&mut self, fault: Fault) {
        self.faults.push(fault);
    }

    fn progress(&mut self, done: u64, total: u64) {
        self.progress.push((done, total));
    }
}

/// Everything that a check finds in these files.
pub(crate) fn check(files: &[(String, Vec<u8>)]) -> (Vec<Fault>, Leaks) {
    let memory = Memory::new(files.to_vec(), 0);
    let options = OpenOptions { read_only: true, examine: true, ..OPTIONS };
    let disk = open_with(&memory, &options).unwrap();
    let mut watch = Watch::default();
    let leaks = run(disk.check(&memory, &mut watch));
    assert!(watch.progress.is_sorted() && watch.progress.iter().all(|(done, total)| done <= total));
    assert!(watch.progress.last().is_none_or(|(done, total)| done == total));
    assert!(memory.files() == files, "a check changes nothing");
    (watch.faults, leaks)
}

fn kinds(files: &[(String, Vec<u8>)]) -> Vec<FaultKind> {
    check(files).0.iter().map(|f| f.kind).collect()
}

/// An image with some data, closed.
pub(crate) fn used(shape: Shape) -> Vec<(String, Vec<u8>)> {
    let memory = Memory::new(image(shape), 1);
    let disk = open(&memory).unwrap();
    run(async {
        write(&disk, &memory, 5000, &[3; 100_000]).await.unwrap();
        write(&disk, &memory, DISK - 70_000, &[4; 60_000]).await.unwrap();
        disk.close(&memory).await.unwrap();
    });
    memory.files()
}

/// Byte offsets of the directory and its copy, of the first table and its copy, of [`Shape::Sparse`].
pub(crate) struct Places {
    pub(crate) gd: usize,
    pub(crate) rgd: usize,
    pub(crate) table: usize,
    pub(crate) copy: usize,
}

pub(crate) fn word(file: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(file[at..at + 4].try_into().unwrap())
}

pub(crate) fn places(file: &[u8]) -> Places {
    let header = SparseHeader::decode(file).unwrap();
    let GdOffset::At(gd) = header.gd_offset else { panic!("no directory") };
    let (gd, rgd) = (gd.0 as usize * 512, header.rgd_offset.0 as usize * 512);
    let copy = if rgd == 0 { 0 } else { word(file, rgd) as usize * 512 };
    Places { gd, rgd, table: word(file, gd) as usize * 512, copy }
}

/// What a check says of [`Shape::Sparse`] after a change of its file: the kind and the place of each fault.
fn after(change: impl FnOnce(&mut Vec<u8>, Places)) -> Vec<(FaultKind, Option<u64>)> {
    let mut files = used(Shape::Sparse);
    let file = &mut files[0].1;
    let places = places(file);
    change(file, places);
    check(&files).0.into_iter().map(|f| (f.kind, f.offset)).collect()
}

pub(crate) fn put(file: &mut [u8], at: usize, value: u32) {
    file[at..at + 4].copy_from_slice(&value.to_le_bytes());
}

/// Changes an entry of the first table and of its copy.
fn put_both(file: &mut [u8], places: &Places, entry: usize, value: u32) {
    put(file, places.table + entry * 4, value);
    put(file, places.copy + entry * 4, value);
}

#[test]
fn an_image_that_was_closed_has_no_faults_and_no_leaks() {
    for shape in SHAPES {
        let (faults, leaks) = check(&used(shape));
        assert_eq!(faults, [], "{shape:?}");
        // A room for grain tables is given out whole.
        let room = if shape == Shape::SparseWithoutTables { 16 } else { 0 };
        assert!(leaks.grains <= room, "{shape:?}: {leaks:?}");
    }
}

#[test]
fn an_image_that_was_not_closed_is_unclean() {
    assert_eq!(after(|file, _| file[72] = 1), [(FaultKind::Unclean, Some(72))]);
    let memory = Memory::new(image(Shape::Cowd(3)), 1);
    let disk = open(&memory).unwrap();
    run(write(&disk, &memory, 0, &[1; 512])).unwrap();
    assert_eq!(kinds(&memory.files()), [FaultKind::Unclean]);
}

#[test]
fn an_entry_past_the_end_is_found() {
    let mut at = 0;
    let found = after(|file, places| {
        at = places.table + 7 * 4;
        let end = file.len() as u32 / 512;
        put_both(file, &places, 7, end);
    });
    assert_eq!(found, [(FaultKind::EntryPastEnd, Some(at as u64))]);
}

#[test]
fn an_entry_in_the_metadata_is_found_in_the_header_and_in_a_table() {
    for sector in [1, 8] {
        let found = after(|file, places| put_both(file, &places, 7, sector));
        assert_eq!(found.iter().map(|f| f.0).collect::<Vec<_>>(), [FaultKind::EntryInMetadata], "{sector}");
    }
    // A table that lies among the grains, and a grain there.
    let mut files = used(Shape::SparseWithoutTables);
    let file = &mut files[0].1;
    let header = SparseHeader::decode(file).unwrap();
    let GdOffset::At(gd) = header.gd_offset else { panic!("no directory") };
    let table = word(file, gd.0 as usize * 512);
    let at = table as usize * 512 + 500 * 4;
    put(file, at, table);
    assert!(check(&files).0.iter().any(|f| (f.kind, f.offset) == (FaultKind::EntryInMetadata, Some(at as u64))));
}

#[test]
fn a_misaligned_entry_is_found() {
    let found = after(|file, places| {
        // The last grain of the file, so that there is room behind and nothing overlaps.
        let last = file.len() as u32 / 512;
        file.resize(file.len() + 8192, 0);
        put_both(file, &places, 7, last + 3);
    });
    assert_eq!(found.iter().map(|f| f.0).collect::<Vec<_>>(), [FaultKind::EntryMisaligned]);
}

#[test]
fn a_place_that_two_entries_name_is_found() {
    let mut at = 0;
    let found = after(|file, places| {
        at = places.table + 9 * 4;
        let other = word(file, places.table + 2 * 4);
        assert!(other != 0);
        put_both(file, &places, 9, other);
    });
    // What was at 9 before belongs to nothing now, which is no fault.
    assert_eq!(found, [(FaultKind::EntryUsedTwice, Some(at as u64))]);
}

#[test]
fn a_table_that_two_directory_entries_name_is_found() {
    let mut at = 0;
    let found = after(|file, places| {
        at = places.gd + 4;
        let first = word(file, places.gd);
        put(file, places.gd + 4, first);
    });
    assert!(found.contains(&(FaultKind::EntryUsedTwice, Some(at as u64))), "{found:?}");
    // The redundant directory that is not one.
    let found = after(|file, places| {
        let first = word(file, places.gd);
        put(file, places.rgd, first);
    });
    assert_eq!(found.iter().map(|f| f.0).collect::<Vec<_>>(), [FaultKind::EntryUsedTwice]);
}

#[test]
fn tables_that_differ_from_their_copies_are_found_once_each() {
    let mut at = 0;
    let found = after(|file, places| {
        at = places.table + 2 * 4;
        put(file, places.copy + 2 * 4, 0);
        put(file, places.copy + 3 * 4, 0);
    });
    assert_eq!(found, [(FaultKind::CopiesDiffer, Some(at as u64))]);
    let found = after(|file, places| put(file, places.rgd, 0));
    assert_eq!(found.iter().map(|f| f.0).collect::<Vec<_>>(), [FaultKind::CopiesDiffer]);
}

#[test]
fn a_directory_entry_that_names_no_place_for_a_table_is_found() {
    let found = after(|file, places| put(file, places.rgd, u32::MAX));
    assert_eq!(found.iter().map(|f| f.0).collect::<Vec<_>>(), [FaultKind::EntryPastEnd]);
    for sector in [0, 2] {
        let found = after(|file, places| {
            let at = places.gd as u32 / 512;
            put(file, places.rgd, if sector == 0 { at } else { sector });
        });
        assert_eq!(found.iter().map(|f| f.0).collect::<Vec<_>>(), [FaultKind::EntryInMetadata], "{sector}");
    }
    let found = after(|file, _| file[48..56].copy_from_slice(&(1u64 << 40).to_le_bytes()));
    assert_eq!(found, [(FaultKind::EntryPastEnd, Some(48))]);
}

#[test]
fn grains_that_no_entry_names_are_leaks_and_no_fault() {
    let mut files = used(Shape::Sparse);
    let before = files.clone();
    files[0].1.resize(before[0].1.len() + 3 * 4096, 0);
    assert_eq!(check(&files), (vec![], Leaks { grains: 3, bytes: 3 * 4096 }));
}

#[test]
fn a_content_id_that_only_one_writer_changed_is_found() {
    let mut files = used(Shape::Split);
    let text = String::from_utf8(files[0].1.clone()).unwrap();
    files[0].1 = text.replace("CID=1234", "CID=4321").into_bytes();
    let (faults, _) = check(&files);
    assert_eq!(faults.iter().map(|f| f.kind).collect::<Vec<_>>(), [FaultKind::ContentId]);
    let at = faults[0].offset.unwrap() as usize;
    assert_eq!(&files[0].1[at..at + 8], b"12345678");
}

#[test]
fn header_and_descriptor_may_differ_by_less_than_a_grain() {
    let with = |sectors: u64| after(move |file, _| file[12..20].copy_from_slice(&sectors.to_le_bytes()));
    assert_eq!(with(DISK / 512), []);
    // DISK is whole grains: one sector more is another grain.
    assert_eq!(with(DISK / 512 + 1), [(FaultKind::Capacity, Some(12))]);
}

#[test]
fn a_parent_that_changed_or_is_not_there_is_found() {
    let mut files = used(Shape::Child);
    let text = |files: &[(String, Vec<u8>)], n: usize| String::from_utf8_lossy(&files[n].1[512..2048]).into_owned();
    assert!(text(&files, 1).contains("CID=12345678"));
    let at = 512 + text(&files, 1).find("CID=1234").unwrap() + 4;
    files[1].1[at] = b'f';
    let found = kinds(&files);
    assert!(found.contains(&FaultKind::Parent), "{found:?}");
    files.remove(1);
    let (faults, _) = check(&files);
    assert_eq!(faults.iter().map(|f| f.kind).collect::<Vec<_>>(), [FaultKind::Parent]);
    assert!(faults[0].detail.contains("parent.vmdk"), "{}", faults[0].detail);
}

#[test]
fn the_links_below_are_checked_too() {
    let mut files = used(Shape::Child);
    let n = files.iter().position(|(name, _)| name == "base.vmdk").unwrap();
    files[n].1[72] = 1;
    let (faults, _) = check(&files);
    assert_eq!(
        faults.iter().map(|f| (f.kind, f.file.as_str())).collect::<Vec<_>>(),
        [(FaultKind::Unclean, "base.vmdk")]
    );
}

#[test]
fn a_free_sector_that_is_used_is_found() {
    let mut files = used(Shape::Cowd(3));
    let n = files.iter().position(|(name, _)| name == "delta.vmdk").unwrap();
    let free = word(&files[n].1, 28);
    put(&mut files[n].1, 28, free - 1);
    let (faults, _) = check(&files);
    assert_eq!(faults.iter().map(|f| (f.kind, f.offset)).collect::<Vec<_>>(), [(FaultKind::FreeSector, Some(28))]);
}

#[test]
fn tables_and_grains_of_a_cowd_extent_that_overlap_are_found() {
    let mut files = used(Shape::Cowd(3));
    let n = files.iter().position(|(name, _)| name == "delta.vmdk").unwrap();
    let table = word(&files[n].1, 4 * 512);
    let entries = table as usize * 512;
    let used: Vec<usize> = (0..4096).filter(|n_| word(&files[n].1, entries + n_ * 4) != 0).collect();
    let second = word(&files[n].1, entries + used[1] * 4);
    put(&mut files[n].1, entries + used[0] * 4, second - 1);
    put(&mut files[n].1, entries + used[3] * 4, table + 5);
    let found = kinds(&files);
    assert_eq!(found, [FaultKind::EntryUsedTwice, FaultKind::EntryInMetadata]);
}

#[test]
fn a_table_that_cannot_be_read_is_a_fault_and_no_end() {
    let files = used(Shape::Split);
    let memory = Memory::new(files, 0);
    let disk = open_with(&memory, &OpenOptions { read_only: true, examine: true, ..OPTIONS }).unwrap();
    memory.fail_call.set(Some((memory.calls(), 5)));
    let mut watch = Watch::default();
    run(disk.check(&memory, &mut watch));
    assert_eq!(
        watch.faults.iter().map(|f| (f.kind, f.file.as_str())).collect::<Vec<_>>(),
        [(FaultKind::Unreadable, "s1.vmdk")]
    );
}
