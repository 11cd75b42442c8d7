//! Images made from a few bytes: sound ones first, so that requests get behind the headers, and then changed at will.
//!
//! The tape has: the number of links, and each from the top down: a byte for its layout, one for what its extents have, two for
//! its size. Then patches follow to the end: a file, a place in it, bytes.

use crate::engine::HoleyFile;
use crate::tape::Tape;
use vmdk_parse::{
    Compression, CowdHeader, GTE_SIZE, GdOffset, HeaderFlags, SeArea, SeSparseHeader, SeVolatileHeader, Sectors,
    SparseHeader,
};

/// Names of the links, from the top down.
const LINKS: [&str; 4] = ["disk.vmdk", "one.vmdk", "two.vmdk", "three.vmdk"];

const SECTOR: u64 = 512;

/// The layout that can only be read.
const SE_SPARSE: u8 = 5;

/// The layout of which not all can be written, or read.
const PARTLY: u8 = 6;

/// The files of an image, its own first.
#[derive(Debug)]
pub struct Built {
    /// See there.
    pub files: Vec<HoleyFile>,
    /// Nothing was changed behind the builder's back: every request must succeed where it is allowed.
    pub sound: bool,
    /// Can only be read.
    pub read_only: bool,
}

/// What the extents of a link have.
#[derive(Clone, Copy)]
struct Shape {
    grain: u64,
    copy: bool,
    tables: bool,
    zeroed_grains: bool,
    /// Grains that hold data.
    filled: u32,
}

/// Makes an image of what the tape has.
pub fn build(tape: &mut Tape<'_>) -> Built {
    let count = usize::from(tape.byte() % 4) + 1;
    let (mut files, mut read_only, mut sound) = (Vec::new(), false, true);
    for depth in 0..count {
        let (layout, kind, size) = (tape.byte(), tape.byte(), tape.u16());
        let parent = LINKS.get(depth + 1).filter(|_| depth + 1 < count);
        link(&mut files, depth, parent, layout, kind, size);
        read_only |= depth == 0 && layout % 7 == SE_SPARSE;
        sound &= layout % 7 != PARTLY;
    }
    sound &= tape.is_empty();
    while !tape.is_empty() {
        patch(&mut files, tape);
    }
    Built { files, sound, read_only }
}

/// Changes a file: a byte says which and how, two where, one how much.
fn patch(files: &mut [HoleyFile], tape: &mut Tape<'_>) {
    let (how, at, len) = (tape.byte(), u64::from(tape.u16()), tape.byte());
    let n = usize::from(how >> 3) % files.len();
    let file = &mut files[n];
    match how & 7 {
        // Up to 2 TiB, by a hole.
        0 => file.set_len(at << (len % 26)),
        1 | 2 => file.put(at * SECTOR, tape.bytes(len.into())),
        _ => file.put(at, tape.bytes(len.into())),
    }
}

/// Adds the files of a link.
fn link(files: &mut Vec<HoleyFile>, depth: usize, parent: Option<&&str>, layout: u8, kind: u8, size: u16) {
    // From a few sectors to 128 GiB, each order of size as likely as the others.
    let sectors = (u64::from(size >> 4) + 8) << ((size & 15) + (size & 1));
    let shape = Shape {
        grain: 8 << (kind & 3),
        copy: kind & 4 != 0,
        tables: kind & 8 != 0,
        zeroed_grains: kind & 16 != 0,
        filled: u32::from(kind >> 5) % 5,
    };
    let name = LINKS[depth];
    let about = match parent {
        Some(parent) => format!("parentCID=0badcafe\nparentFileNameHint=\"{parent}\""),
        None => "parentCID=ffffffff".to_owned(),
    };
    let text = |extents: &str| {
        format!(
            "# Disk DescriptorFile\nversion=1\nCID=0badcafe\n{about}\ncreateType=\"custom\"\n\n{extents}\n\n\
             ddb.adapterType = \"ide\"\nddb.longContentID = \"00112233445566778899aabb0badcafe\"\n"
        )
    };
    let half = sectors / 2;
    let part = |n: u32| format!("e{depth}{n}.vmdk");
    let descriptor = |extents: String| HoleyFile::new(name, text(&extents).as_bytes());
    match layout % 7 {
        0 => {
            let inside = text(&format!("RW {sectors} SPARSE \"{name}\""));
            files.push(hosted(name, sectors, shape, &inside));
        }
        1 => {
            files.push(descriptor(format!("RW {half} SPARSE \"{}\"\nRW {half} SPARSE \"{}\"", part(0), part(1))));
            files.push(hosted(&part(0), half, shape, ""));
            files.push(hosted(&part(1), half, Shape { grain: 128, copy: !shape.copy, ..shape }, ""));
        }
        2 => {
            files.push(descriptor(format!("RW {sectors} VMFSSPARSE \"{}\"", part(0))));
            files.push(cowd(&part(0), sectors, shape));
        }
        3 => {
            files.push(descriptor(format!("RW {sectors} FLAT \"{}\" 3", part(0))));
            files.push(flat(&part(0), sectors + 3));
        }
        4 => {
            files.push(descriptor(format!(
                "RW {half} VMFSSPARSE \"{}\"\nRW {half} SPARSE \"{}\"\nRW 9 FLAT \"{}\" 0",
                part(0),
                part(1),
                part(2)
            )));
            files.push(cowd(&part(0), half, Shape { grain: 1 + shape.grain / 3, ..shape }));
            files.push(hosted(&part(1), half, shape, ""));
            files.push(flat(&part(2), 9));
        }
        SE_SPARSE => {
            files.push(descriptor(format!("RW {sectors} SESPARSE \"{}\"", part(0))));
            files.push(se_sparse(&part(0), sectors, shape));
        }
        _ => {
            files.push(descriptor(format!(
                "RW {half} SPARSE \"{}\"\nRW 3 ZERO\nRDONLY {half} VMFSSPARSE \"{}\"\nNOACCESS 9 FLAT \"{}\" 0",
                part(0),
                part(1),
                part(2)
            )));
            files.push(hosted(&part(0), half, shape, ""));
            files.push(cowd(&part(1), half, shape));
            files.push(flat(&part(2), 9));
        }
    }
}

/// Bytes of a grain in a base, no two sectors of it alike.
fn data(grain: u64, sectors: u64) -> Vec<u8> {
    (0..sectors).flat_map(|n| (grain << 20 | n << 4 | 1).to_le_bytes().repeat(64)).collect()
}

fn words(numbers: impl Iterator<Item = u64>) -> Vec<u8> {
    numbers.flat_map(|n| u32::try_from(n).unwrap_or(0).to_le_bytes()).collect()
}

fn flat(name: &str, sectors: u64) -> HoleyFile {
    let mut file = HoleyFile::new(name, &data(99, sectors.min(40)));
    file.set_len(sectors * SECTOR);
    file
}

fn hosted(name: &str, sectors: u64, shape: Shape, descriptor: &str) -> HoleyFile {
    let Shape { grain, copy, .. } = shape;
    let count = sectors.div_ceil(grain * 512);
    let filled = u64::from(shape.filled).min(sectors / grain);
    // Where there are many, they come into being when they are needed.
    let tables = (shape.tables && count <= 64) || filled > 0;
    let made = if shape.tables && count <= 64 { count } else { u64::from(filled > 0) };
    let gd_sectors = (count * GTE_SIZE).div_ceil(SECTOR);
    let size_of_copy = gd_sectors + made * 4;
    let gd = if copy { 21 + size_of_copy } else { 21 };
    let overhead = (gd + size_of_copy).next_multiple_of(grain);
    let mut flags = HeaderFlags::NEWLINE_TEST;
    if copy {
        flags = flags.with(HeaderFlags::REDUNDANT_TABLES);
    }
    if shape.zeroed_grains {
        flags = flags.with(HeaderFlags::ZEROED_GRAIN);
    }
    let header = SparseHeader {
        version: if shape.zeroed_grains { 2 } else { 1 },
        flags,
        capacity: Sectors(sectors),
        grain_size: Sectors(grain),
        descriptor_offset: Sectors(u64::from(!descriptor.is_empty())),
        descriptor_size: Sectors(if descriptor.is_empty() { 0 } else { 20 }),
        gtes_per_gt: 512,
        rgd_offset: Sectors(if copy { 21 } else { 0 }),
        gd_offset: GdOffset::At(Sectors(gd)),
        overhead: Sectors(overhead),
        unclean_shutdown: false,
        compression: Compression::None,
    };
    let mut file = HoleyFile::new(name, &header.encode());
    file.put(SECTOR, descriptor.as_bytes());
    file.set_len(overhead * SECTOR);
    if tables {
        for directory in if copy { vec![21, gd] } else { vec![gd] } {
            let first = directory + gd_sectors;
            file.put(directory * SECTOR, &words((0..made).map(|n| first + n * 4)));
            // Every second grain; the first absent one is marked as zeroes where that is possible.
            let places = (0..filled * 2).map(|n| if n % 2 == 0 { overhead + n / 2 * grain } else { 0 });
            file.put(first * SECTOR, &words(places));
            if shape.zeroed_grains {
                file.put(first * SECTOR + 4, &words(std::iter::once(1)));
            }
        }
    }
    for n in 0..filled {
        file.put((overhead + n * grain) * SECTOR, &data(n, grain));
    }
    file
}

fn cowd(name: &str, sectors: u64, shape: Shape) -> HoleyFile {
    let grain = shape.grain;
    let mut header = CowdHeader::new(Sectors(sectors), Sectors(grain)).expect("sizes that fit");
    let table = header.free_sector.0;
    let filled = u64::from(shape.filled).min(sectors / grain);
    if filled > 0 {
        header.free_sector = Sectors(table + 32 + filled * grain);
    }
    let mut file = HoleyFile::new(name, &header.encode().expect("a sound header"));
    file.set_len(header.free_sector.0 * SECTOR);
    if filled > 0 {
        file.put(header.gd_offset.0 * SECTOR, &words(std::iter::once(table)));
        let place = |n: u64| table + 32 + n * grain;
        file.put(table * SECTOR, &words((0..filled * 2).map(|n| if n % 2 == 0 { place(n / 2) } else { 0 })));
        for n in 0..filled {
            file.put(place(n) * SECTOR, &data(n, grain));
        }
    }
    file
}

fn se_sparse(name: &str, sectors: u64, shape: Shape) -> HoleyFile {
    let directory = (sectors.div_ceil(8 * 4096) * 8).div_ceil(SECTOR);
    let (tables, grains) = (2 + directory, (2 + directory + 64).next_multiple_of(8));
    let area = |start, len| SeArea { start: Sectors(start), len: Sectors(len) };
    let header = SeSparseHeader {
        capacity: Sectors(sectors),
        volatile_header: area(1, 1),
        journal_header: SeArea::default(),
        journal: SeArea::default(),
        grain_directory: area(2, directory),
        grain_tables: area(tables, 64),
        free_bitmap: SeArea::default(),
        backmap: SeArea::default(),
        grains: area(grains, 64),
    };
    let mut file = HoleyFile::new(name, &header.encode());
    let volatile = SeVolatileHeader { free_gt_number: 1, next_txn_seq_number: 0 };
    file.put(SECTOR, &volatile.encode());
    file.put(2 * SECTOR, &(1u64 << 60).to_le_bytes());
    for n in 0..u64::from(shape.filled) {
        // The number of a grain has its high bits in front.
        file.put(tables * SECTOR + n * 16, &(3u64 << 60 | n << 48).to_le_bytes());
        file.put((grains + n * 8) * SECTOR, &data(n, 8));
    }
    file.put(tables * SECTOR + 8, &(2u64 << 60).to_le_bytes());
    file.set_len((grains + 64) * SECTOR);
    file
}
