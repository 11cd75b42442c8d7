//! Streams (streamOptimized images) made from a few bytes, sound ones and others.
//!
//! The tape has: a byte for how the grains are found, one for the size of a grain, two for that of the disk, the number of
//! records, and the records: a byte for what it is, and what belongs to it.

use crate::engine::HoleyFile;
use crate::model::Model;
use crate::tape::Tape;
use flate2::write::ZlibEncoder;
use std::collections::BTreeMap;
use std::io::Write;
use vmdk_parse::{Compression, GdOffset, GrainRecord, HeaderFlags, Marker, Sectors, SparseHeader};

/// Grains that are known of a sound stream, present or not.
const KNOWN: u64 = 32;

const SECTOR: u64 = 512;

/// A stream.
#[derive(Debug)]
pub struct Built {
    /// The whole image.
    pub file: HoleyFile,
    /// It has to be opened, and read as the model says.
    pub sound: bool,
    /// What a sound one holds, as far as it is known.
    pub model: Model,
}

/// Makes a stream of what the tape has.
pub fn build(tape: &mut Tape<'_>) -> Built {
    let (how, shift, size) = (tape.byte(), tape.byte(), tape.u16());
    // Past 1 MiB a grain is not kept as a whole.
    let grain = if shift & 0x80 == 0 { 8u64 << (shift & 3) } else { 8 << (shift % 19) };
    let sectors = (u64::from(size >> 4) + 8) << (size & 15);
    let text = format!(
        "# Disk DescriptorFile\nversion=1\nCID=0badcafe\nparentCID=ffffffff\ncreateType=\"streamOptimized\"\n\
         RDONLY {sectors} SPARSE \"stream.vmdk\"\n"
    );
    let mut header = SparseHeader {
        version: 3,
        flags: HeaderFlags::NEWLINE_TEST.with(HeaderFlags::COMPRESSED).with(HeaderFlags::MARKERS),
        capacity: Sectors(sectors),
        grain_size: Sectors(grain),
        descriptor_offset: Sectors(1),
        descriptor_size: Sectors(1),
        gtes_per_gt: 512,
        rgd_offset: Sectors(0),
        gd_offset: GdOffset::AtEnd,
        overhead: Sectors(2),
        unclean_shutdown: false,
        compression: Compression::Deflate,
    };
    let mut file = vec![0; 1024];
    file[512..512 + text.len()].copy_from_slice(text.as_bytes());
    let mut grains = BTreeMap::new();
    let mut sound = true;
    for _ in 0..tape.byte() % 33 {
        sound &= record(tape, &mut file, &mut grains, grain, sectors);
        file.resize(file.len().next_multiple_of(512), 0);
    }
    match how & 3 {
        // Found by walking over the records.
        0 => file.extend(Marker::EndOfStream.encode()),
        1 => {}
        // By the footer, or by the header as qemu has it.
        with => {
            let directory = tables(&mut file, &grains, grain, sectors);
            header.gd_offset = GdOffset::At(Sectors(directory));
            if with == 2 {
                file.extend(Marker::Footer { sectors: Sectors(1) }.encode());
                file.extend(header.encode());
                header.gd_offset = GdOffset::AtEnd;
            }
            file.extend(Marker::EndOfStream.encode());
        }
    }
    file[..512].copy_from_slice(&header.encode());
    sound &= (how & 2 != 0 || !grains.is_empty()) && grain <= 64;
    let mut model = Model::default();
    if sound {
        for n in 0..KNOWN.min(sectors / grain) {
            let content =
                grains.get(&n).map_or_else(|| vec![0; (grain * SECTOR) as usize], |(_, seed)| bytes(*seed, grain));
            model.wrote(n * grain * SECTOR, &content);
        }
    }
    Built { file: HoleyFile::new("stream.vmdk", &file), sound, model }
}

/// Adds a record. Whether it is one that belongs there. `grains` gets the sector of each, and what it is filled with.
fn record(
    tape: &mut Tape<'_>,
    file: &mut Vec<u8>,
    grains: &mut BTreeMap<u64, (u64, u8)>,
    grain: u64,
    sectors: u64,
) -> bool {
    let (kind, n) = (tape.byte(), u64::from(tape.byte()));
    let lba = n * grain;
    let place = file.len() as u64 / SECTOR;
    match kind % 8 {
        0..=3 => {
            let seed = tape.byte();
            if lba >= sectors || grain > 64 {
                return true;
            }
            file.extend(GrainRecord::encode_with(Sectors(lba), &deflated(&bytes(seed, grain))).unwrap_or_default());
            grains.insert(n, (place, seed));
            true
        }
        4 => {
            // Of another length than a grain has: zeroes, which take next to nothing.
            let len = u64::from(tape.u16()) * 64;
            file.extend(GrainRecord::encode_with(Sectors(lba), &deflated(&vec![0; len as usize])).unwrap_or_default());
            grains.insert(n, (place, 0));
            false
        }
        5 => {
            let (len, given) = (tape.u32(), tape.byte());
            file.extend(GrainRecord { lba: Sectors(lba), len }.encode());
            file.extend(tape.bytes(given.into()));
            grains.insert(n, (place, 0));
            false
        }
        6 => {
            let val = Sectors(u64::from(tape.u16()));
            let marker = match n % 5 {
                0 => Marker::EndOfStream,
                1 => Marker::Table { sectors: val },
                2 => Marker::Directory { sectors: val },
                3 => Marker::Footer { sectors: val },
                _ => Marker::Progress { lba: val },
            };
            file.extend(marker.encode());
            false
        }
        _ => {
            file.extend(tape.bytes(n as usize));
            false
        }
    }
}

/// Adds the tables of the grains and the directory, which is at the sector that this answers.
fn tables(file: &mut Vec<u8>, grains: &BTreeMap<u64, (u64, u8)>, grain: u64, sectors: u64) -> u64 {
    let mut directory = vec![0u8; sectors.div_ceil(grain * 512).div_ceil(128) as usize * 512];
    let sector_of = |n: u64| u32::try_from(n).unwrap_or(u32::MAX).to_le_bytes();
    // A byte numbers the grains: all are in the first table.
    if !grains.is_empty() {
        file.extend(Marker::Table { sectors: Sectors(4) }.encode());
        directory[..4].copy_from_slice(&sector_of(file.len() as u64 / SECTOR));
        let entry = |n: u64| sector_of(grains.get(&n).map_or(0, |(place, _)| *place));
        file.extend((0..512).flat_map(entry));
    }
    file.extend(Marker::Directory { sectors: Sectors(directory.len() as u64 / SECTOR) }.encode());
    let at = file.len() as u64 / SECTOR;
    file.extend(directory);
    at
}

/// What a grain holds; every second kind cannot be compressed well.
fn bytes(seed: u8, grain: u64) -> Vec<u8> {
    let mut x = u32::from(seed) << 8 | 1;
    (0..grain * SECTOR)
        .map(|n| {
            if seed & 1 == 0 {
                return seed ^ (n / 512) as u8;
            }
            x = x.wrapping_mul(0x0019_660d).wrapping_add(0x3c6e_f35f);
            (x >> 24) as u8
        })
        .collect()
}

fn deflated(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = ZlibEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).expect("memory");
    encoder.finish().expect("memory")
}
