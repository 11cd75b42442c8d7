//! Streams: what they are made of here, and what is read of sound ones. What can be wrong with them is in the modules below.

use super::fixtures::{NAME, OPTIONS, open, open_with, read, request, run, run_all};
use crate::memory::{Memory, Random};
use crate::{Disk, DiskError, ErrorKind, FileId, Op, OpenOptions, Run, RunKind};
use std::cell::RefCell;
use std::io::Write;
use std::rc::Rc;
use vmdk_parse::{
    Compression, GdOffset, GrainRecord, HeaderFlags, Marker, Sectors, SparseHeader, encode_entries, max_compressed_len,
};

mod damage;
mod directory;
mod large;
mod samples;

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
