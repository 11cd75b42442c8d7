//! Streams: everywhere the directory can be, and everything that can be wrong with them.

use super::fixtures::{NAME, OPTIONS, open, open_with, read, request, run, run_all};
use crate::memory::{Memory, Random};
use crate::{Disk, DiskError, ErrorKind, FileId, Op, OpenOptions, Run, RunKind};
use std::cell::RefCell;
use std::io::Write;
use std::rc::Rc;
use vmdk_parse::{
    Compression, GdOffset, GrainRecord, HeaderFlags, Marker, Sectors, SparseHeader, encode_entries, max_compressed_len,
};

const READ_ONLY: OpenOptions = OpenOptions { read_only: true, ..OPTIONS };

/// Sectors of the usual disk here: two grain tables of 4 KiB grains, and a last grain of 3 sectors.
const SECTORS: u64 = 2 * 4096 + 800 + 3;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Directory {
    /// Before the grains, no markers around it, no footer: qemu.
    Front,
    /// Behind them, and the footer knows.
    End,
    /// Behind them, and the header knows it as well.
    EndKnown,
}

#[derive(Clone, Copy, Debug)]
struct Recipe {
    version: u32,
    flags: u32,
    directory: Directory,
    grain: u64,
    sectors: u64,
    /// The last grains come first.
    backwards: bool,
    /// Type 4 markers here and there.
    progress: bool,
    level: u32,
}

const RECIPE: Recipe = Recipe {
    version: 3,
    flags: 0x30001,
    directory: Directory::End,
    grain: 8,
    sectors: SECTORS,
    backwards: false,
    progress: false,
    level: 6,
};

const QEMU: Recipe = Recipe { flags: 0x30003, directory: Directory::Front, ..RECIPE };

/// A stream being made.
struct Made {
    file: Vec<u8>,
    disk: Vec<u8>,
    header: SparseHeader,
    /// (grain, byte offset of its record).
    records: Vec<(u64, usize)>,
}

/// Bytes of a disk: noise, text and zeroes; the second grain table of the usual one is empty.
fn disk(sectors: u64, grain: u64) -> Vec<u8> {
    let random = Random::new(7);
    let mut disk = vec![0; sectors as usize * 512];
    let count = sectors.div_ceil(grain) as usize;
    for (n, bytes) in disk.chunks_mut(grain as usize * 512).enumerate() {
        match n {
            _ if (512..1024).contains(&n) => {}
            _ if n % 40 == 3 || n == count - 1 => bytes.iter_mut().for_each(|b| *b = random.below(256) as u8),
            _ if n % 40 == 4 => bytes.fill(n as u8 | 1),
            _ => {}
        }
    }
    disk
}

fn zlib(bytes: &[u8], level: u32) -> Vec<u8> {
    let mut encoder = flate2::write::ZlibEncoder::new(Vec::new(), flate2::Compression::new(level));
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

fn pad(file: &mut Vec<u8>) {
    file.resize(file.len().next_multiple_of(512), 0);
}

fn make(recipe: Recipe) -> Made {
    let disk = disk(recipe.sectors, recipe.grain);
    let text = format!(
        "# Disk DescriptorFile\nversion=1\nCID=0badcafe\nparentCID=ffffffff\ncreateType=\"streamOptimized\"\n\n\
         RDONLY {} SPARSE \"call-me-stream.vmdk\"\n",
        recipe.sectors
    );
    let grains = recipe.sectors.div_ceil(recipe.grain);
    let tables = grains.div_ceil(512);
    let mut header = SparseHeader {
        version: recipe.version,
        flags: HeaderFlags(recipe.flags),
        capacity: Sectors(recipe.sectors),
        grain_size: Sectors(recipe.grain),
        descriptor_offset: Sectors(1),
        descriptor_size: Sectors(1),
        gtes_per_gt: 512,
        rgd_offset: Sectors(0),
        gd_offset: GdOffset::AtEnd,
        overhead: Sectors(8),
        unclean_shutdown: false,
        compression: Compression::Deflate,
    };
    let mut file = vec![0; 512];
    file.extend_from_slice(text.as_bytes());
    pad(&mut file);
    let gd_front = 2;
    let gt_front = gd_front + (tables * 4).div_ceil(512);
    if recipe.directory == Directory::Front {
        header.overhead = Sectors(gt_front + tables * 4);
        header.gd_offset = GdOffset::At(Sectors(gd_front));
    }
    file.resize(header.overhead.0 as usize * 512, 0);
    let mut entries = vec![0u32; tables as usize * 512];
    let mut records = Vec::new();
    let mut order: Vec<(usize, &[u8])> = disk.chunks(recipe.grain as usize * 512).enumerate().collect();
    if recipe.backwards {
        order.reverse();
    }
    for (n, bytes) in order {
        if bytes.iter().all(|b| *b == 0) {
            continue;
        }
        if recipe.progress && n % 3 == 0 {
            file.extend_from_slice(&Marker::Progress { lba: Sectors(n as u64) }.encode().repeat(4));
        }
        entries[n] = (file.len() / 512) as u32;
        records.push((n as u64, file.len()));
        let lba = Sectors(n as u64 * recipe.grain);
        file.extend_from_slice(&GrainRecord::encode_with(lba, &zlib(bytes, recipe.level)).unwrap());
    }
    let mut directory = vec![0u32; tables as usize];
    for (n, table) in entries.chunks(512).enumerate().filter(|(_, t)| t.iter().any(|e| *e != 0)) {
        let bytes = encode_entries(table);
        if recipe.directory == Directory::Front {
            let sector = gt_front + n as u64 * 4;
            directory[n] = sector as u32;
            file[sector as usize * 512..][..2048].copy_from_slice(&bytes);
        } else {
            file.extend_from_slice(&Marker::Table { sectors: Sectors(4) }.encode());
            directory[n] = (file.len() / 512) as u32;
            file.extend_from_slice(&bytes);
        }
    }
    let bytes = encode_entries(&directory);
    if recipe.directory == Directory::Front {
        file[gd_front as usize * 512..][..bytes.len()].copy_from_slice(&bytes);
        file[..512].copy_from_slice(&header.encode());
        return Made { file, disk, header, records };
    }
    file.extend_from_slice(&Marker::Directory { sectors: Sectors(1) }.encode());
    let at = GdOffset::At(Sectors(file.len() as u64 / 512));
    file.extend_from_slice(&bytes);
    pad(&mut file);
    let footer = SparseHeader { gd_offset: at, ..header.clone() };
    if recipe.directory == Directory::EndKnown {
        header.gd_offset = at;
    }
    file[..512].copy_from_slice(&header.encode());
    file.extend_from_slice(&Marker::Footer { sectors: Sectors(1) }.encode());
    file.extend_from_slice(&footer.encode());
    file.extend_from_slice(&Marker::EndOfStream.encode());
    Made { file, disk, header, records }
}

fn memory(file: &[u8]) -> Memory {
    Memory::new(vec![(NAME.to_owned(), file.to_vec())], 3)
}

/// Opens it read-only and reads all of it.
fn all(file: &[u8]) -> Result<(Vec<u8>, Vec<String>), DiskError> {
    let memory = memory(file);
    let disk = open_with(&memory, &READ_ONLY)?;
    let bytes = run(read(&disk, &memory, 0, disk.geometry().size))?;
    Ok((bytes, disk.info().notices.clone()))
}

/// The texts of an error and its causes.
fn texts(e: &DiskError) -> String {
    std::iter::successors(Some(e as &dyn std::error::Error), |e| e.source()).map(|e| format!("{e}: ")).collect()
}

#[track_caller]
fn assert_reads(made: &Made, file: &[u8]) -> Vec<String> {
    let (bytes, notices) = all(file).unwrap_or_else(|e| panic!("{}", texts(&e)));
    assert!(bytes == made.disk, "other bytes");
    notices
}

/// The error of reading the first grain that has a record, in a file that was changed after it was made.
#[track_caller]
fn first_grain_fails(recipe: Recipe, change: impl FnOnce(&mut Vec<u8>, usize)) -> String {
    let mut made = make(recipe);
    let (grain, at) = made.records[0];
    change(&mut made.file, at);
    let memory = memory(&made.file);
    let disk = open_with(&memory, &READ_ONLY).unwrap();
    let offset = grain * recipe.grain * 512;
    let e = run(read(&disk, &memory, offset, 512)).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::Corrupt, "{}", texts(&e));
    let text = texts(&e);
    for part in [NAME, &format!("sector {}", grain * recipe.grain), &format!("byte {at}")] {
        assert!(text.contains(part), "{text} does not name {part}");
    }
    // What is wrong with one grain is no reason not to read another, and a failed one is no cached one.
    let (other, _) = made.records[1];
    let offset = other * recipe.grain * 512;
    assert!(run(read(&disk, &memory, offset, 512)).unwrap() == made.disk[offset as usize..][..512]);
    assert!(run(read(&disk, &memory, grain * recipe.grain * 512, 512)).is_err());
    text
}

/// Puts a whole record in the place of one, at the end of the file, and has the entry name it.
fn replace_record(file: &mut Vec<u8>, header: &SparseHeader, grain: u64, record: &[u8]) {
    let GdOffset::At(gd) = header.gd_offset else { panic!("needs the directory in front") };
    let gde_at = (gd.0 * 512 + grain / 512 * 4) as usize;
    let gt = u32::from_le_bytes(file[gde_at..gde_at + 4].try_into().unwrap());
    let gte_at = gt as usize * 512 + (grain % 512) as usize * 4;
    let sector = (file.len() / 512) as u32;
    file[gte_at..gte_at + 4].copy_from_slice(&sector.to_le_bytes());
    file.extend_from_slice(record);
    pad(file);
}

#[test]
fn a_stream_reads_the_same_wherever_its_directory_is() {
    for directory in [Directory::Front, Directory::End, Directory::EndKnown] {
        for (version, flags) in [(1, 0x30001), (3, 0x30001), (3, 0x30003), (2, 0x30005)] {
            for (backwards, progress, level) in [(false, false, 6), (true, false, 1), (false, true, 0)] {
                let recipe = Recipe { version, flags, directory, backwards, progress, level, ..RECIPE };
                let made = make(recipe);
                assert!(assert_reads(&made, &made.file).is_empty(), "{recipe:?}");
            }
        }
    }
}

#[test]
fn grains_of_every_size_are_read() {
    for grain in [8, 128, 2048, 4096] {
        for level in [0, 6] {
            let made = make(Recipe { grain, sectors: 5 * grain + 3, level, ..RECIPE });
            assert_reads(&made, &made.file);
        }
    }
}

#[test]
fn small_reads_anywhere_agree_with_the_disk_with_and_without_a_cache() {
    for grain in [8, 128, 4096] {
        let recipe = Recipe { grain, sectors: 8 * grain + 5, ..RECIPE };
        let made = make(recipe);
        for cache_bytes in [0, 1 << 20, 64 << 20] {
            let memory = memory(&made.file);
            let disk = open_with(&memory, &OpenOptions { cache_bytes, ..READ_ONLY }).unwrap();
            let random = Random::new(grain);
            for _ in 0..60 {
                let at = random.below(made.disk.len() as u64);
                let len = (random.below(3 * grain * 512) + 1).min(made.disk.len() as u64 - at);
                let got = run(read(&disk, &memory, at, len)).unwrap();
                assert!(got == made.disk[at as usize..(at + len) as usize], "{len} bytes at {at}, grain {grain}");
            }
        }
    }
}

#[test]
fn small_reads_in_a_row_inflate_each_grain_once() {
    let made = make(Recipe { grain: 128, sectors: 16 * 128, ..QEMU });
    let memory = memory(&made.file);
    let disk = open_with(&memory, &OpenOptions { cache_bytes: 8 << 20, ..READ_ONLY }).unwrap();
    let read_all = || {
        let before = memory.calls();
        for at in (0..made.disk.len()).step_by(4096) {
            assert!(run(read(&disk, &memory, at as u64, 4096)).unwrap() == made.disk[at..at + 4096]);
        }
        memory.calls() - before
    };
    // A page of the directory and one table.
    assert_eq!(read_all(), 2 + made.records.len() as u64);
    assert_eq!(read_all(), 0);
}

#[test]
fn many_readers_of_a_grain_at_once_inflate_it_once() {
    let made = Rc::new(make(Recipe { grain: 128, sectors: 16 * 128, ..RECIPE }));
    for cache_bytes in [0, 64 << 10, 8 << 20] {
        let memory = Rc::new(memory(&made.file));
        let disk = Rc::new(open_with(&memory, &OpenOptions { cache_bytes, ..READ_ONLY }).unwrap());
        let before = memory.calls();
        run_all((0..200u64).map(|n| {
            let (made, memory, disk) = (Rc::clone(&made), Rc::clone(&memory), Rc::clone(&disk));
            async move {
                let at = 2 * 65536 + n % 70 * 4096;
                let len = if n % 3 == 0 { 100_000 } else { 4096 };
                let got = read(&disk, &memory, at, len).await.unwrap();
                assert!(got == made.disk[at as usize..][..len as usize]);
            }
        }));
        if cache_bytes == 8 << 20 {
            // A page of the directory, a table, and grains 3 and 4.
            assert_eq!(memory.calls() - before, 4);
        }
    }
}

#[test]
fn a_reader_that_is_dropped_leaves_the_grain_to_the_next() {
    let made = make(RECIPE);
    let memory = memory(&made.file);
    let disk = open_with(&memory, &READ_ONLY).unwrap();
    for _ in 0..20 {
        // Polled a few times only.
        let mut reading = Box::pin(read(&disk, &memory, 3 * 4096, 4096));
        let mut cx = std::task::Context::from_waker(std::task::Waker::noop());
        for _ in 0..3 {
            if reading.as_mut().poll(&mut cx).is_ready() {
                break;
            }
        }
        drop(reading);
    }
    assert!(run(read(&disk, &memory, 3 * 4096, 4096)).unwrap() == made.disk[3 * 4096..4 * 4096]);
}

#[test]
fn compressed_grains_are_data_and_absent_ones_are_holes() {
    let made = make(RECIPE);
    let memory = memory(&made.file);
    let disk = open_with(&memory, &READ_ONLY).unwrap();
    let spans: Vec<(bool, u64)> = [0, 3 * 4096, 5 * 4096]
        .map(|at| run(disk.span(&memory, at, disk.geometry().size - at)).map(|s| (s.hole, s.len)).unwrap())
        .to_vec();
    assert_eq!(spans, [(true, 3 * 4096), (false, 2 * 4096), (true, 38 * 4096)]);
    // Wherever the grains are: one run.
    let packed = run(disk.map(&memory, 3 * 4096, disk.geometry().size - 3 * 4096)).unwrap();
    assert_eq!(packed, Run { len: 2 * 4096, depth: 0, kind: RunKind::Compressed { file: FileId(0) } });
}

#[test]
fn a_stream_is_refused_for_writing_by_what_to_do_instead() {
    for recipe in [RECIPE, QEMU] {
        let e = open(&memory(&make(recipe).file)).unwrap_err();
        assert_eq!(e.kind(), ErrorKind::Unsupported);
        for part in ["streamOptimized", "use --read-only, or --overlay FILE to write beside it", NAME] {
            assert!(e.to_string().contains(part), "{e}");
        }
    }
}

#[test]
fn a_read_only_disk_of_a_stream_refuses_changes() {
    let memory = memory(&make(RECIPE).file);
    let disk = open_with(&memory, &READ_ONLY).unwrap();
    for op in [Op::Write, Op::Discard, Op::WriteZeroes] {
        let result = run(request(&disk, &memory, op, 0, 4096, &RefCell::new(vec![1; 4096])));
        assert_eq!(result.unwrap_err().kind(), ErrorKind::ReadOnly);
    }
    run(disk.close(&memory)).unwrap();
}

#[test]
fn compression_without_markers_and_markers_without_compression_are_refused() {
    for (flags, expected) in [(0x10001, "without markers"), (0x20001, "without compressed grains")] {
        let mut made = make(RECIPE);
        made.header.flags = HeaderFlags(flags);
        made.file[..512].copy_from_slice(&made.header.encode());
        let e = all(&made.file).unwrap_err();
        assert!(e.kind() == ErrorKind::Unsupported && e.to_string().contains(expected), "{e}");
    }
    let mut made = make(RECIPE);
    made.file[77] = 0;
    assert!(all(&made.file).unwrap_err().to_string().contains("compressAlgorithm"));
}

#[test]
fn the_footer_wins_over_the_header() {
    let mut made = make(Recipe { directory: Directory::EndKnown, ..RECIPE });
    // The descriptor's sector: a directory that lies in the file and is none.
    made.header.gd_offset = GdOffset::At(Sectors(1));
    made.file[..512].copy_from_slice(&made.header.encode());
    assert!(assert_reads(&made, &made.file).is_empty());
}

#[test]
fn the_footer_is_found_before_what_padded_the_file() {
    let made = make(RECIPE);
    for more in [1, 511, 512, 1024, 5000, (1 << 20) - 1536] {
        for byte in [0, 0xff] {
            let mut file = made.file.clone();
            file.resize(file.len() + more, byte);
            assert!(assert_reads(&made, &file).is_empty(), "{more} bytes of {byte}");
        }
    }
}

#[test]
fn a_footer_too_far_from_the_end_is_replaced_by_a_walk() {
    let made = make(RECIPE);
    let mut file = made.file.clone();
    file.resize(file.len() + (2 << 20), 0);
    let notices = assert_reads(&made, &file);
    assert!(
        notices[0].contains(&format!("found by walking over the records instead: {}", made.records.len())),
        "{notices:?}"
    );
    assert!(!notices[0].contains("breaks off"), "{notices:?}");
}

#[test]
fn a_footer_of_another_disk_is_refused() {
    let made = make(RECIPE);
    let at = made.file.len() - 1024;
    let footer = SparseHeader::decode(&made.file[at..]).unwrap();
    for (field, other) in [
        ("version", SparseHeader { version: 1, ..footer.clone() }),
        ("capacity", SparseHeader { capacity: Sectors(SECTORS - 1), ..footer.clone() }),
        ("grainSize", SparseHeader { grain_size: Sectors(16), ..footer.clone() }),
        ("numGTEsPerGT", SparseHeader { gtes_per_gt: 256, ..footer.clone() }),
    ] {
        let mut file = made.file.clone();
        file[at..at + 512].copy_from_slice(&other.encode());
        let e = all(&file).unwrap_err();
        assert!(e.kind() == ErrorKind::Corrupt && e.to_string().contains(field), "{e}");
    }
}

#[test]
fn without_a_usable_directory_the_records_are_walked_over() {
    for recipe in [
        RECIPE,
        Recipe { backwards: true, ..RECIPE },
        Recipe { progress: true, ..RECIPE },
        Recipe { level: 0, ..RECIPE },
    ] {
        let made = make(recipe);
        let at = made.file.len() - 1024;
        let footer = SparseHeader::decode(&made.file[at..]).unwrap();
        let with = |gd_offset| SparseHeader { gd_offset, ..footer.clone() }.encode();
        let outside = Sectors(made.file.len() as u64 / 512);
        for footer in
            [with(GdOffset::AtEnd), with(GdOffset::At(outside)), with(GdOffset::At(Sectors(1 << 40))), [7; 512]]
        {
            let mut file = made.file.clone();
            file[at..at + 512].copy_from_slice(&footer);
            let notices = assert_reads(&made, &file);
            assert_eq!(notices.len(), 1);
            for part in [NAME, &format!("found by walking over the records instead: {}", made.records.len())] {
                assert!(notices[0].contains(part), "{notices:?}");
            }
        }
    }
}

#[test]
fn of_two_records_for_a_grain_the_later_one_counts() {
    let made = make(RECIPE);
    let (grain, _) = made.records[2];
    let end = made.file.len() - 1536;
    let tables =
        made.file.windows(512).step_by(512).position(|s| matches!(Marker::decode(s), Ok(Marker::Table { .. })));
    let mut file = made.file[..tables.unwrap() * 512].to_vec();
    assert!(file.len() < end);
    file.extend_from_slice(&GrainRecord::encode_with(Sectors(grain * 8), &zlib(&[9; 4096], 6)).unwrap());
    file.extend_from_slice(&Marker::EndOfStream.encode());
    let mut expected = made.disk.clone();
    expected[grain as usize * 4096..][..4096].fill(9);
    let (bytes, notices) = all(&file).unwrap();
    assert!(bytes == expected);
    assert!(!notices[0].contains("breaks off"), "{notices:?}");
}

#[test]
fn a_stream_cut_at_any_sector_is_refused_or_reads_what_is_left() {
    for recipe in [RECIPE, QEMU, Recipe { directory: Directory::EndKnown, ..RECIPE }] {
        let made = make(recipe);
        for len in (0..made.file.len()).step_by(512).chain((0..made.file.len()).step_by(4999)) {
            let memory = memory(&made.file[..len]);
            let Ok(disk) = open_with(&memory, &READ_ONLY) else { continue };
            let walked = !disk.info().notices.is_empty();
            let mut lost = 0;
            for (n, expected) in made.disk.chunks(4096).enumerate() {
                match run(read(&disk, &memory, n as u64 * 4096, expected.len() as u64)) {
                    Ok(bytes) if bytes == expected => {}
                    // A grain that the walk did not find reads as zeroes, and the notice says so.
                    Ok(bytes) => {
                        assert!(walked && bytes.iter().all(|b| *b == 0), "{recipe:?} cut at {len}: grain {n}");
                        lost += 1;
                    }
                    Err(e) => {
                        assert_eq!(e.kind(), ErrorKind::Corrupt);
                        lost += 1;
                    }
                }
            }
            let whole = made.records.iter().filter(|(_, at)| {
                let record = GrainRecord::decode(&made.file[*at..]).unwrap();
                at + 12 + record.len as usize <= len
            });
            assert_eq!(lost, made.records.len() - whole.count(), "{recipe:?} cut at {len}");
            if walked && lost > 0 {
                assert!(disk.info().notices[0].contains("breaks off at byte"), "{:?}", disk.info().notices);
            }
        }
    }
}

#[test]
fn the_last_record_of_a_file_need_not_be_padded() {
    let mut made = make(QEMU);
    let at = made.records.last().unwrap().1;
    let record = GrainRecord::decode(&made.file[at..]).unwrap();
    made.file.truncate(at + 12 + record.len as usize);
    assert!(!made.file.len().is_multiple_of(512));
    assert_reads(&made, &made.file);
}

#[test]
fn every_wrong_byte_of_a_record_is_noticed_or_harmless() {
    let made = make(QEMU);
    let (grain, at) = made.records[1];
    let len = GrainRecord::decode(&made.file[at..]).unwrap().len as usize;
    for n in 0..12 + len {
        for flip in [1, 0x80] {
            let mut file = made.file.clone();
            file[at + n] ^= flip;
            let memory = memory(&file);
            let disk = open_with(&memory, &READ_ONLY).unwrap();
            match run(read(&disk, &memory, grain * 4096, 4096)) {
                Ok(bytes) => assert!(bytes == made.disk[grain as usize * 4096..][..4096], "byte {n}"),
                Err(e) => assert_eq!(e.kind(), ErrorKind::Corrupt, "byte {n}: {e}"),
            }
        }
    }
}

#[test]
fn a_record_of_another_grain_is_refused() {
    let text = first_grain_fails(QEMU, |file, at| file[at..at + 8].copy_from_slice(&80u64.to_le_bytes()));
    assert!(text.contains("sector 80"), "{text}");
    first_grain_fails(QEMU, |file, at| file[at..at + 8].copy_from_slice(&25u64.to_le_bytes()));
    first_grain_fails(QEMU, |file, at| file[at..at + 8].copy_from_slice(&u64::MAX.to_le_bytes()));
}

#[test]
fn an_entry_that_names_the_record_of_another_grain_fails_whatever_was_read_before() {
    let made = make(QEMU);
    let ((first, at), (second, _)) = (made.records[0], made.records[1]);
    let GdOffset::At(gd) = made.header.gd_offset else { panic!() };
    let mut file = made.file.clone();
    let gt = u32::from_le_bytes(file[gd.0 as usize * 512..][..4].try_into().unwrap()) as usize * 512;
    file[gt + second as usize * 4..][..4].copy_from_slice(&((at / 512) as u32).to_le_bytes());
    let memory = memory(&file);
    let disk = open_with(&memory, &READ_ONLY).unwrap();
    for _ in 0..3 {
        assert!(run(read(&disk, &memory, first * 4096, 4096)).unwrap() == made.disk[first as usize * 4096..][..4096]);
        assert_eq!(run(read(&disk, &memory, second * 4096, 4096)).unwrap_err().kind(), ErrorKind::Corrupt);
    }
}

#[test]
fn every_damaged_byte_of_a_header_or_footer_is_refused_or_reads_without_panic() {
    for (recipe, footer) in [(QEMU, false), (RECIPE, false), (RECIPE, true)] {
        let made = make(recipe);
        let start = if footer { made.file.len() - 1024 } else { 0 };
        for at in 0..80 {
            for value in [0, 1, 0x7f, 0xff] {
                let mut file = made.file.clone();
                file[start + at] = value;
                let memory = memory(&file);
                let Ok(disk) = open_with(&memory, &READ_ONLY) else { continue };
                for offset in [0, 3 * 4096, disk.geometry().size / 2, disk.geometry().size.saturating_sub(4096)] {
                    let _ = run(read(&disk, &memory, offset, 4096));
                }
            }
        }
    }
}

#[test]
fn damage_anywhere_is_no_panic() {
    let made = make(Recipe { progress: true, ..RECIPE });
    for seed in 0..300 {
        let random = Random::new(seed);
        let mut file = made.file.clone();
        for _ in 0..=random.below(20) {
            // Mostly the first bytes of a sector, where the markers are.
            let at = random.below(file.len() as u64 / 512) * 512 + random.below(if seed % 2 == 0 { 24 } else { 512 });
            file[at as usize] = random.below(256) as u8;
        }
        file.truncate(file.len() - random.below(4096) as usize);
        let memory = memory(&file);
        let Ok(disk) = open_with(&memory, &READ_ONLY) else { continue };
        for at in (0..disk.geometry().size.min(made.disk.len() as u64)).step_by(1 << 20) {
            let len = (1 << 20).min(disk.geometry().size - at);
            let _ = run(read(&disk, &memory, at, len));
        }
    }
}

#[test]
fn a_record_that_lies_about_its_size_is_refused() {
    let max = max_compressed_len(Sectors(8)).unwrap();
    for size in [0, 1, 100, max + 1, u32::MAX] {
        first_grain_fails(QEMU, |file, at| file[at + 8..at + 12].copy_from_slice(&size.to_le_bytes()));
    }
    // One that could be, but not in this file.
    let made = make(Recipe { grain: 128, sectors: 4 * 128, ..QEMU });
    let (grain, at) = *made.records.last().unwrap();
    let mut file = made.file.clone();
    file[at + 8..at + 12].copy_from_slice(&max_compressed_len(Sectors(128)).unwrap().to_le_bytes());
    let memory = memory(&file);
    let disk = open_with(&memory, &READ_ONLY).unwrap();
    let e = run(read(&disk, &memory, grain * 65536, 512)).unwrap_err();
    assert!(e.to_string().contains("past the end of the file"), "{e}");
}

#[test]
fn a_grain_that_inflates_to_another_size_is_refused() {
    for (bytes, expected) in [
        (zlib(&[1; 4097], 6), "more than"),
        (zlib(&vec![0; 4 << 20], 9), "more than"),
        (zlib(&[1; 4095], 6), "4095 bytes instead of 4096"),
        (zlib(&[], 6), "0 bytes instead of 4096"),
        (zlib(&[1; 4096], 6)[..10].to_vec(), "ends after"),
        (zlib(&[1; 4096], 6)[2..].to_vec(), "cannot be inflated"),
    ] {
        let header = make(QEMU).header;
        let mut at = 0;
        let made = make(QEMU);
        let grain = made.records[0].0;
        let mut file = made.file.clone();
        let record = GrainRecord::encode_with(Sectors(grain * 8), &bytes).unwrap();
        at += file.len();
        replace_record(&mut file, &header, grain, &record);
        let memory = memory(&file);
        let disk = open_with(&memory, &READ_ONLY).unwrap();
        let e = run(read(&disk, &memory, grain * 4096, 512)).unwrap_err();
        let text = texts(&e);
        assert_eq!(e.kind(), ErrorKind::Corrupt);
        assert!(text.contains(expected) && text.contains(&format!("byte {at}")), "{text}");
    }
}

#[test]
fn only_the_last_grain_may_be_stored_short_and_the_rest_of_it_is_zeroes() {
    let made = make(QEMU);
    let last = SECTORS / 8;
    let mut file = made.file.clone();
    let record = GrainRecord::encode_with(Sectors(last * 8), &zlib(&[5; 700], 6)).unwrap();
    replace_record(&mut file, &made.header, last, &record);
    let memory = memory(&file);
    let disk = open_with(&memory, &READ_ONLY).unwrap();
    let got = run(read(&disk, &memory, last * 4096, 3 * 512)).unwrap();
    assert!(got == [vec![5; 700], vec![0; 3 * 512 - 700]].concat());
}

#[test]
fn what_stands_behind_the_end_of_a_zlib_stream_does_not_matter() {
    let made = make(QEMU);
    let (grain, _) = made.records[0];
    let bytes = &made.disk[grain as usize * 4096..][..4096];
    let mut file = made.file.clone();
    let record = GrainRecord::encode_with(Sectors(grain * 8), &[zlib(bytes, 6), vec![3; 40]].concat()).unwrap();
    replace_record(&mut file, &made.header, grain, &record);
    assert_reads(&made, &file);
}

#[test]
fn an_entry_outside_the_grains_fails_the_read_only_there() {
    for (sector, expected) in [(1, "in the metadata"), (1 << 30, "past the end")] {
        let made = make(QEMU);
        let (grain, _) = made.records[0];
        let GdOffset::At(gd) = made.header.gd_offset else { panic!() };
        let mut file = made.file.clone();
        let gt = u32::from_le_bytes(file[gd.0 as usize * 512..][..4].try_into().unwrap()) as usize * 512;
        file[gt + grain as usize * 4..][..4].copy_from_slice(&u32::to_le_bytes(sector));
        let memory = memory(&file);
        let disk = open_with(&memory, &READ_ONLY).unwrap();
        let e = run(read(&disk, &memory, grain * 4096, 512)).unwrap_err();
        assert!(e.kind() == ErrorKind::Corrupt && e.to_string().contains(expected), "{e}");
        assert!(run(read(&disk, &memory, (grain + 1) * 4096, 512)).is_ok());
    }
}

#[test]
fn a_table_past_the_end_fails_the_read_only_there() {
    let made = make(QEMU);
    let GdOffset::At(gd) = made.header.gd_offset else { panic!() };
    let mut file = made.file.clone();
    file[gd.0 as usize * 512..][..4].copy_from_slice(&u32::MAX.to_le_bytes());
    let memory = memory(&file);
    let disk = open_with(&memory, &READ_ONLY).unwrap();
    assert_eq!(run(read(&disk, &memory, 0, 512)).unwrap_err().kind(), ErrorKind::Corrupt);
    let third = 1024 * 4096;
    assert!(run(read(&disk, &memory, third, 64 << 10)).unwrap() == made.disk[third as usize..][..64 << 10]);
}

#[test]
fn a_directory_of_32_mi_entries_in_a_tiny_file_is_refused_at_once() {
    for gd_offset in [GdOffset::At(Sectors(2)), GdOffset::At(Sectors(1 << 50)), GdOffset::AtEnd] {
        let mut made = make(Recipe { sectors: 64, ..RECIPE });
        made.header.capacity = Sectors((32 << 20) * 4096);
        made.header.gd_offset = gd_offset;
        made.file[..512].copy_from_slice(&made.header.encode());
        made.file.truncate(8 * 512);
        let memory = memory(&made.file);
        let e = open_with(&memory, &READ_ONLY).unwrap_err();
        assert!(e.kind() == ErrorKind::Corrupt && e.to_string().contains("no grain"), "{e}");
        assert!(memory.calls() < 10);
    }
}

#[test]
fn a_walk_ends_whatever_the_markers_say() {
    let table = |n| Marker::Table { sectors: Sectors(n) }.encode().to_vec();
    let mut unknown = [0; 512];
    unknown[12] = 9;
    let mut wild_table = [0xff; 512];
    wild_table[8..16].copy_from_slice(&[0, 0, 0, 0, 1, 0, 0, 0]);
    for tail in [
        table(4),
        table(1).repeat(9),
        Marker::Progress { lba: Sectors(0) }.encode().repeat(1000),
        Marker::Directory { sectors: Sectors(262_144) }.encode().to_vec(),
        unknown.to_vec(),
        wild_table.to_vec(),
        vec![0xff; 512],
        vec![0xff; 7],
        GrainRecord { lba: Sectors(0), len: u32::MAX }.encode().to_vec(),
        GrainRecord { lba: Sectors(1 << 60), len: 5 }.encode().to_vec(),
        vec![],
    ] {
        let made = make(RECIPE);
        let (grain, at) = made.records[0];
        let end = made.records[1].1;
        let mut file = made.file[..end].to_vec();
        file.extend_from_slice(&tail);
        let memory = memory(&file);
        let disk = open_with(&memory, &READ_ONLY).unwrap();
        assert!(disk.info().notices[0].contains("instead: 1"), "{:?}", disk.info().notices);
        assert!(disk.info().notices[0].contains("breaks off"), "{:?}", disk.info().notices);
        assert!(
            at < end
                && run(read(&disk, &memory, grain * 4096, 4096)).unwrap() == made.disk[grain as usize * 4096..][..4096]
        );
    }
}

/// A disk of one grain of 1 GiB in a tiny file; `inflated` is what the grain begins with.
fn huge(inflated: &[u8]) -> Vec<u8> {
    let made = make(Recipe { sectors: 64, ..QEMU });
    let grain = vmdk_parse::MAX_GRAIN_SECTORS;
    let header = SparseHeader {
        capacity: Sectors(4 * grain),
        grain_size: Sectors(grain),
        gd_offset: GdOffset::At(Sectors(2)),
        overhead: Sectors(7),
        ..made.header
    };
    let mut file = made.file[..7 * 512].to_vec();
    file[..512].copy_from_slice(&header.encode());
    let text = String::from_utf8(file[512..1024].to_vec()).unwrap().replace(" 64 ", &format!(" {} ", 4 * grain));
    file[512..1024].copy_from_slice(&text.as_bytes()[..512]);
    file[1024..].fill(0);
    file[1024..1028].copy_from_slice(&3u32.to_le_bytes());
    file[3 * 512..3 * 512 + 4].copy_from_slice(&7u32.to_le_bytes());
    file.extend_from_slice(&GrainRecord::encode_with(Sectors(0), &zlib(inflated, 9)).unwrap());
    file
}

#[test]
fn a_grain_of_a_gibibyte_in_a_tiny_file_is_read_through_a_small_window() {
    let mut start = vec![7; 300_000];
    start[200_000..].fill(8);
    let file = huge(&start);
    assert!(file.len() < 8192);
    let memory = memory(&file);
    let disk = open_with(&memory, &OpenOptions { cache_bytes: 64 << 20, ..READ_ONLY }).unwrap();
    assert_eq!(disk.info().grain_size, Some(1 << 30));
    let got = run(read(&disk, &memory, 199_000, 2000)).unwrap();
    assert!(got == start[199_000..201_000]);
    // It ends long before it should.
    for at in [299_000, 500_000, (1 << 30) - 4096] {
        let e = run(read(&disk, &memory, at, 4096)).unwrap_err();
        assert!(e.to_string().contains("inflates to 300000 bytes"), "{e}");
    }
    assert!(run(read(&disk, &memory, 1 << 30, 4096)).unwrap() == [0; 4096]);
}

#[test]
fn a_large_grain_that_comes_in_many_pieces_is_read() {
    // 2 MiB of noise: the record is read in pieces, and the whole is never in memory.
    let made = make(Recipe { grain: 4096, sectors: 5 * 4096 + 7, level: 0, ..RECIPE });
    let memory = memory(&made.file);
    let disk = open_with(&memory, &READ_ONLY).unwrap();
    let grain = 4096 * 512;
    for at in [3 * grain, 3 * grain + 1, 4 * grain - 4096, 4 * grain - 1, 5 * grain - 700, 5 * grain, 5 * grain + 3000]
    {
        let len = 500;
        let got = run(read(&disk, &memory, at, len)).unwrap();
        assert!(got == made.disk[at as usize..(at + len) as usize], "at {at}");
    }
}

#[test]
fn a_large_bomb_ends_at_the_size_of_its_grain() {
    let made = make(Recipe { grain: 4096, sectors: 5 * 4096 + 7, ..QEMU });
    let (grain, _) = made.records[0];
    let mut file = made.file.clone();
    let record = GrainRecord::encode_with(Sectors(grain * 4096), &zlib(&vec![0; 64 << 20], 9)).unwrap();
    replace_record(&mut file, &made.header, grain, &record);
    let memory = memory(&file);
    let disk = open_with(&memory, &READ_ONLY).unwrap();
    let e = run(read(&disk, &memory, (grain + 1) * (2 << 20) - 512, 512)).unwrap_err();
    assert!(e.to_string().contains("more than"), "{e}");
}

#[test]
fn a_host_that_fails_a_read_fails_that_read_only() {
    let made = make(RECIPE);
    for n in 0..40 {
        let memory = memory(&made.file);
        memory.fail_call.set(Some((n, 5)));
        let Ok(disk) = open_with(&memory, &READ_ONLY) else { continue };
        let _ = run(read(&disk, &memory, 0, disk.geometry().size));
        memory.fail_call.set(None);
        assert!(run(read(&disk, &memory, 0, disk.geometry().size)).unwrap() == made.disk, "call {n}");
    }
}

#[test]
fn an_extent_of_a_split_image_may_be_a_stream() {
    let made = make(RECIPE);
    let text = format!(
        "# Disk DescriptorFile\nCID=00000001\nparentCID=ffffffff\ncreateType=\"custom\"\n\n\
         RW 8 FLAT \"flat\" 0\nRDONLY {SECTORS} SPARSE \"stream\"\n"
    );
    let files = vec![
        (NAME.to_owned(), text.into_bytes()),
        ("flat".to_owned(), vec![1; 4096]),
        ("stream".to_owned(), made.file.clone()),
    ];
    let memory = Memory::new(files, 0);
    let disk = open(&memory).unwrap();
    let got = run(read(&disk, &memory, 0, disk.geometry().size)).unwrap();
    assert!(got == [&[1; 4096], made.disk.as_slice()].concat());
    for op in [Op::Write, Op::Discard, Op::WriteZeroes] {
        let result = run(request(&disk, &memory, op, 5 * 4096, 4096, &RefCell::new(vec![1; 4096])));
        assert_eq!(result.unwrap_err().kind(), ErrorKind::ReadOnly);
    }
    assert!(memory.files()[2].1 == made.file);
}

/// The sample's file; `None`, and a line that says so, where `VDISK_SAMPLES` does not name their folder.
fn sample(name: &str) -> Option<Vec<u8>> {
    let Some(folder) = std::env::var_os("VDISK_SAMPLES") else {
        println!("skipped: VDISK_SAMPLES is not set, {name} not read");
        return None;
    };
    Some(std::fs::read(std::path::Path::new(&folder).join(name)).unwrap())
}

/// Sums up what the spans say is data, and every byte of it.
fn data_of(disk: &Disk, memory: &Memory) -> Vec<(u64, Vec<u8>)> {
    let size = disk.geometry().size;
    let mut at = 0;
    let mut data = Vec::new();
    while at < size {
        let span = run(disk.span(memory, at, size - at)).unwrap();
        if !span.hole {
            data.push((at, run(read(disk, memory, at, span.len)).unwrap()));
        }
        at += span.len;
    }
    data
}

#[test]
fn the_streams_that_vmware_wrote_read_the_same_by_their_tables_and_by_a_walk() {
    for (name, size, grains) in
        [("vmware-streamOptimized.vmdk", 10 << 20, 52), ("vmware-streamOptimized-v3.vmdk", 16 << 30, 151)]
    {
        let Some(file) = sample(name) else { return };
        let open = |file: Vec<u8>| {
            let memory = Memory::new(vec![(name.to_owned(), file)], 1);
            let disk = run(Disk::open(&memory, FileId(0), &READ_ONLY)).unwrap();
            (disk, memory)
        };
        let (disk, memory) = open(file.clone());
        assert_eq!((disk.geometry().size, disk.info().notices.len()), (size, 0), "{name}");
        let data = data_of(&disk, &memory);
        assert_eq!(data.iter().map(|d| d.1.len() as u64).sum::<u64>(), grains * 65536);
        // Without any directory.
        let mut walked = file;
        let end = walked.len() - 1024;
        walked[56..64].fill(0xff);
        if walked[end..].starts_with(b"KDMV") {
            walked.truncate(end);
        }
        let (disk, memory) = open(walked);
        assert!(disk.info().notices[0].contains(&format!("instead: {grains}")), "{:?}", disk.info().notices);
        assert!(data_of(&disk, &memory) == data, "{name}");
    }
}
