//! Images made by hand, and a disk that is driven through the same door as a transport's.

use crate::memory::Memory;
use crate::{Disk, DiskError, FileId, Flags, Op, OpenOptions, Request};
use futures_executor::LocalPool;
use futures_util::task::LocalSpawnExt;
use std::cell::RefCell;
use std::rc::Rc;
use vmdk_parse::{CowdHeader, GdOffset, HeaderFlags, Sectors, SparseHeader};

pub(crate) const OPTIONS: OpenOptions = OpenOptions {
    read_only: false,
    format: None,
    cache_bytes: 1 << 20,
    zeroout_unmaps: false,
    ignore_parent_content_id: false,
    examine: false,
    drop_change_tracking: false,
    keep_content_id: false,
    new_content_id: 0x1234_5678,
};

/// The kinds of image that every test runs on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Shape {
    Raw,
    /// One file, both copies of the tables.
    Sparse,
    /// One file, one copy.
    SparseWithoutCopy,
    /// No grain tables at all yet (every GDE is 0), grains of 4 KiB.
    SparseWithoutTables,
    /// A descriptor, two sparse extents and a flat one.
    Split,
    /// An empty child of a parent with larger grains, whose own parent is smaller than the disk and has larger ones still.
    Child,
    /// A descriptor and a COWD extent with grains of this many sectors.
    Cowd(u64),
    /// A descriptor and two COWD extents, with grains of 3 sectors and of 1.
    CowdPair,
    /// As `Child`, with a COWD extent on top, as ESX makes snapshots.
    CowdChild,
}

pub(crate) const SHAPES: [Shape; 11] = [
    Shape::Raw,
    Shape::Sparse,
    Shape::SparseWithoutCopy,
    Shape::SparseWithoutTables,
    Shape::Split,
    Shape::Cowd(1),
    Shape::Cowd(3),
    Shape::Cowd(128),
    Shape::CowdPair,
    Shape::Child,
    Shape::CowdChild,
];

/// Bytes of a disk of any shape: several grain tables even with small grains.
pub(crate) const DISK: u64 = 6 << 20;

/// A file name that the first file of every image has.
pub(crate) const NAME: &str = "disk.vmdk";

pub(crate) fn descriptor(extents: &str) -> String {
    child_descriptor("parentCID=ffffffff", extents)
}

/// A descriptor with these lines about the parent.
pub(crate) fn child_descriptor(parent: &str, extents: &str) -> String {
    format!(
        "# Disk DescriptorFile\nversion=1\nCID=0badcafe\n{parent}\ncreateType=\"custom\"\n\n{extents}\n\n\
         ddb.adapterType = \"ide\"\nddb.longContentID = \"00112233445566778899aabb0badcafe\"\n"
    )
}

/// A sparse extent of `sectors`, empty. `descriptor` goes inside.
pub(crate) fn sparse(sectors: u64, grain: u64, copy: bool, tables: bool, descriptor: &str) -> Vec<u8> {
    let count = sectors.div_ceil(grain * 512);
    let gd_sectors = (count * 4).div_ceil(512);
    let size_of_copy = gd_sectors + if tables { count * 4 } else { 0 };
    let rgd = 21;
    let gd = if copy { rgd + size_of_copy } else { rgd };
    let overhead = (gd + size_of_copy).next_multiple_of(grain);
    let mut flags = HeaderFlags::NEWLINE_TEST;
    if copy {
        flags = flags.with(HeaderFlags::REDUNDANT_TABLES);
    }
    let header = SparseHeader {
        version: 1,
        flags,
        capacity: Sectors(sectors),
        grain_size: Sectors(grain),
        descriptor_offset: Sectors(u64::from(!descriptor.is_empty())),
        descriptor_size: Sectors(if descriptor.is_empty() { 0 } else { 20 }),
        gtes_per_gt: 512,
        rgd_offset: Sectors(if copy { rgd } else { 0 }),
        gd_offset: GdOffset::At(Sectors(gd)),
        overhead: Sectors(overhead),
        unclean_shutdown: false,
        compression: vmdk_parse::Compression::None,
    };
    let mut file = vec![0; overhead as usize * 512];
    file[..512].copy_from_slice(&header.encode());
    file[512..512 + descriptor.len()].copy_from_slice(descriptor.as_bytes());
    if tables {
        for directory in if copy { vec![rgd, gd] } else { vec![gd] } {
            for n in 0..count {
                let at = (directory * 512 + n * 4) as usize;
                let table = (directory + gd_sectors + n * 4) as u32;
                file[at..at + 4].copy_from_slice(&table.to_le_bytes());
            }
        }
    }
    file
}

/// A COWD extent of `sectors`, empty.
pub(crate) fn cowd(sectors: u64, grain: u64) -> Vec<u8> {
    let header = CowdHeader::new(Sectors(sectors), Sectors(grain)).unwrap();
    let mut file = header.encode().unwrap().to_vec();
    file.resize(header.free_sector.0 as usize * 512, 0);
    file
}

/// An empty image of [`DISK`] bytes.
pub(crate) fn image(shape: Shape) -> Vec<(String, Vec<u8>)> {
    let sectors = DISK / 512;
    let one = |grain, copy, tables| {
        let text = descriptor(&format!("RW {sectors} SPARSE \"{NAME}\""));
        vec![(NAME.to_owned(), sparse(sectors, grain, copy, tables, &text))]
    };
    match shape {
        Shape::Raw => vec![("disk.raw".to_owned(), vec![0; DISK as usize])],
        Shape::Sparse => one(8, true, true),
        Shape::SparseWithoutCopy => one(16, false, true),
        Shape::SparseWithoutTables => one(8, true, false),
        Shape::Split => {
            let third = sectors / 3;
            let text = descriptor(&format!(
                "RW {third} SPARSE \"s1.vmdk\"\nRW {third} FLAT \"f2.vmdk\" 3\nRW {third} SPARSE \"s3.vmdk\""
            ));
            vec![
                (NAME.to_owned(), text.into_bytes()),
                ("s1.vmdk".to_owned(), sparse(third, 8, true, true, "")),
                ("f2.vmdk".to_owned(), vec![0; (third as usize + 3) * 512]),
                ("s3.vmdk".to_owned(), sparse(third, 128, true, true, "")),
            ]
        }
        Shape::Cowd(grain) => {
            let text = descriptor(&format!("RW {sectors} VMFSSPARSE \"delta.vmdk\""));
            vec![(NAME.to_owned(), text.into_bytes()), ("delta.vmdk".to_owned(), cowd(sectors, grain))]
        }
        Shape::CowdPair => {
            let half = sectors / 2;
            let text = descriptor(&format!("RW {half} VMFSSPARSE \"s1.vmdk\"\nRW {half} SPARSE \"s2.vmdk\""));
            vec![
                (NAME.to_owned(), text.into_bytes()),
                ("s1.vmdk".to_owned(), cowd(half, 3)),
                ("s2.vmdk".to_owned(), cowd(half, 1)),
            ]
        }
        Shape::Child | Shape::CowdChild => {
            let link = |name: &str, parent: &str, sectors: u64, grain| {
                let text = child_descriptor(parent, &format!("RW {sectors} SPARSE \"{name}\""));
                (name.to_owned(), sparse(sectors, grain, true, name != NAME, &text))
            };
            let of = |name: &str| format!("parentCID=12345678\nparentFileNameHint=\"{name}\"");
            let base = filled(vec![link("base.vmdk", "parentCID=ffffffff", sectors * 2 / 3, 128)], 0, BASE_DATA);
            let parent = link("parent.vmdk", &of("base.vmdk"), sectors, 16);
            let parent = filled([vec![parent], base].concat(), 1, PARENT_DATA);
            if shape == Shape::CowdChild {
                let text = child_descriptor(&of("parent.vmdk"), &format!("RW {sectors} VMFSSPARSE \"delta.vmdk\""));
                let top = vec![(NAME.to_owned(), text.into_bytes()), ("delta.vmdk".to_owned(), cowd(sectors, 5))];
                return [top, parent].concat();
            }
            [vec![link(NAME, &of("parent.vmdk"), sectors, 8)], parent].concat()
        }
    }
}

/// Where the links of [`Shape::Child`] have data: runs of sectors. In the parent they begin and end inside grains of the base.
const BASE_DATA: &[(u64, u64)] = &[(0, 300), (1000, 64), (5000, 2000)];
const PARENT_DATA: &[(u64, u64)] = &[(100, 17), (290, 30), (1063, 3), (9000, 500), (DISK / 512 - 9, 9)];

/// A sector that holds one value. The values that tests write are all larger than a sector's number.
pub(crate) fn sector(value: u64) -> Vec<u8> {
    value.to_le_bytes().repeat(64)
}

fn filled(files: Vec<(String, Vec<u8>)>, link: u64, runs: &[(u64, u64)]) -> Vec<(String, Vec<u8>)> {
    let memory = Memory::new(files, 0);
    let disk = open(&memory).unwrap();
    run(async {
        for &(first, count) in runs {
            let bytes: Vec<u8> = (first..first + count).flat_map(|n| sector(n << 1 | link)).collect();
            write(&disk, &memory, first * 512, &bytes).await.unwrap();
        }
        disk.close(&memory).await.unwrap();
    });
    memory.files()
}

/// What an image of [`image`] holds.
pub(crate) fn content(shape: Shape) -> Vec<u8> {
    let mut bytes = vec![0; DISK as usize];
    if matches!(shape, Shape::Child | Shape::CowdChild) {
        for (link, runs) in [(0, BASE_DATA), (1, PARENT_DATA)] {
            for n in runs.iter().flat_map(|(first, count)| *first..first + count) {
                bytes[n as usize * 512..][..512].copy_from_slice(&sector(n << 1 | link));
            }
        }
    }
    bytes
}

/// Runs a task that may never end; its answer if it does.
pub(crate) fn try_run<T: 'static>(future: impl Future<Output = T> + 'static) -> Option<T> {
    let mut pool = LocalPool::new();
    let answer = Rc::new(RefCell::new(None));
    let place = Rc::clone(&answer);
    pool.spawner().spawn_local(async move { *place.borrow_mut() = Some(future.await) }).unwrap();
    pool.run_until_stalled();
    answer.take()
}

/// Runs tasks on one thread until all are done. A task that nobody wakes fails the test instead of hanging it.
pub(crate) fn run_all<F: Future<Output = ()> + 'static>(tasks: impl IntoIterator<Item = F>) {
    let mut pool = LocalPool::new();
    let left = Rc::new(std::cell::Cell::new(0));
    for task in tasks {
        left.set(left.get() + 1);
        let left = Rc::clone(&left);
        let task = async move {
            task.await;
            left.set(left.get() - 1);
        };
        pool.spawner().spawn_local(task).unwrap();
    }
    pool.run_until_stalled();
    assert_eq!(left.get(), 0, "tasks that nobody wakes");
}

/// Runs one future that may wait for itself only.
pub(crate) fn run<T>(future: impl Future<Output = T>) -> T {
    futures_executor::block_on(future)
}

pub(crate) fn open(memory: &Memory) -> Result<Disk, DiskError> {
    open_with(memory, &OPTIONS)
}

pub(crate) fn open_with(memory: &Memory, options: &OpenOptions) -> Result<Disk, DiskError> {
    run(Disk::open(memory, FileId(0), options))
}

pub(crate) async fn request(
    disk: &Disk,
    memory: &Memory,
    op: Op,
    offset: u64,
    len: u64,
    buf: &RefCell<Vec<u8>>,
) -> Result<(), DiskError> {
    disk.serve(memory, Request::check(&disk.geometry(), op, offset, len, Flags::default())?, buf).await
}

pub(crate) async fn write(disk: &Disk, memory: &Memory, offset: u64, bytes: &[u8]) -> Result<(), DiskError> {
    request(disk, memory, Op::Write, offset, bytes.len() as u64, &RefCell::new(bytes.to_vec())).await
}

pub(crate) async fn read(disk: &Disk, memory: &Memory, offset: u64, len: u64) -> Result<Vec<u8>, DiskError> {
    // Not zeroes: a part that is not filled must be noticed.
    let buf = RefCell::new(vec![0xee; len as usize]);
    request(disk, memory, Op::Read, offset, len, &buf).await?;
    Ok(buf.into_inner())
}

pub(crate) async fn flush(disk: &Disk, memory: &Memory) -> Result<(), DiskError> {
    request(disk, memory, Op::Flush, 0, 0, &RefCell::default()).await
}

/// What is wrong with the tables of the sparse extents: entries outside the file or misaligned, and two grains with one
/// place. With `copies`, also tables that differ from their redundant copy.
pub(crate) fn faults(files: &[(String, Vec<u8>)], copies: bool) -> Vec<String> {
    let mut found = Vec::new();
    for (name, bytes) in files {
        cowd_faults(name, bytes, copies, &mut found);
        let Ok(header) = SparseHeader::decode(bytes) else { continue };
        let GdOffset::At(gd) = header.gd_offset else { continue };
        let word = |at: u64| u64::from(u32::from_le_bytes(bytes[at as usize..at as usize + 4].try_into().unwrap()));
        let mut places = std::collections::HashMap::new();
        for table in 0..header.directory_len() {
            let gde = word(gd.0 * 512 + table * 4);
            let rgde = header.redundant().map(|r| word(r.0 * 512 + table * 4));
            if gde == 0 {
                if copies && rgde.is_some_and(|r| r != 0) {
                    found.push(format!("{name}: table {table} only in the copy"));
                }
                continue;
            }
            for entry in 0..512 {
                let gte = word(gde * 512 + entry * 4);
                if copies
                    && let Some(r) = rgde
                    && word(r * 512 + entry * 4) != gte
                {
                    found.push(format!("{name}: entry {table}/{entry} differs from its copy"));
                }
                if gte == 0 {
                    continue;
                }
                if gte < header.overhead.0 || gte % header.grain_size.0 != 0 || gte * 512 >= bytes.len() as u64 {
                    found.push(format!("{name}: entry {table}/{entry} points to sector {gte}"));
                }
                if let Some(other) = places.insert(gte, (table, entry)) {
                    found.push(format!("{name}: entries {other:?} and {:?} share sector {gte}", (table, entry)));
                }
            }
        }
    }
    found
}

/// The same for a COWD extent: its tables and grains must lie beside each other and in front of what the header calls free.
/// With `closed`, it must say so.
fn cowd_faults(name: &str, bytes: &[u8], closed: bool, found: &mut Vec<String>) {
    let Ok(header) = CowdHeader::decode(bytes) else { return };
    let word = |at: u64| u64::from(u32::from_le_bytes(bytes[at as usize..at as usize + 4].try_into().unwrap()));
    let geometry = header.geometry().unwrap();
    let mut areas = vec![(0, 4 + header.directory_sectors().0, "header and directory".to_owned())];
    for table in 0..u64::from(geometry.directory_len()) {
        let gde = word(header.gd_offset.0 * 512 + table * 4);
        if gde == 0 {
            continue;
        }
        areas.push((gde, gde + 32, format!("table {table}")));
        if (gde + 32) * 512 > bytes.len() as u64 {
            found.push(format!("{name}: table {table} at sector {gde} is past the end"));
            continue;
        }
        for entry in 0..4096 {
            let gte = word(gde * 512 + entry * 4);
            if gte != 0 {
                areas.push((gte, gte + header.grain_size.0, format!("grain {table}/{entry}")));
                if gte * 512 >= bytes.len() as u64 {
                    found.push(format!("{name}: grain {table}/{entry} at sector {gte} is past the end"));
                }
            }
        }
    }
    areas.sort_unstable();
    for [(_, end, a), (start, _, b)] in areas.array_windows() {
        if end > start {
            found.push(format!("{name}: {a} and {b} overlap at sector {start}"));
        }
    }
    let end = areas.last().unwrap().1;
    if header.free_sector.0 < end {
        found.push(format!("{name}: sector {} is free, and the last one used is {end}", header.free_sector.0));
    }
    // After a power cut the header may be newer than the length of the file: then it calls less free than there is.
    if closed && (header.unclean_shutdown != 0 || header.free_sector.0 * 512 < bytes.len() as u64) {
        found.push(format!("{name}: free sector {}, unclean {}", header.free_sector.0, header.unclean_shutdown));
    }
}
