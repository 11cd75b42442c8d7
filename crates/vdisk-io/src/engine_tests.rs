//! What every engine must do, on real files: one function of tests for all of them.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use vdisk_image::{FileId, FileIo, Files};

use crate::own_ring::tests::with_ring;
use crate::{BlockingIo, Buf, FileSet, HostFiles, OpenMode, UringIo, block_on};

/// The file under test, in a directory of its own.
struct Place {
    _directory: tempfile::TempDir,
    path: PathBuf,
}

/// The bytes of a file with no two neighbours alike.
fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|n| (n % 251) as u8 ^ (n / 4096) as u8).collect()
}

impl Place {
    fn new(parent: &Path, content: &[u8]) -> Self {
        let directory = tempfile::tempdir_in(parent).unwrap();
        let path = directory.path().join("disk.img");
        fs::write(&path, content).unwrap();
        Self { _directory: directory, path }
    }

    fn open(&self, direct_io: bool) -> (Arc<FileSet>, FileId) {
        let (files, id) =
            HostFiles::open(&self.path, OpenMode { writable: true, trust_paths: false, direct_io, unlocked: false })
                .unwrap();
        (files.into_set(), id)
    }
}

/// Which engine, on which file.
#[derive(Clone, Copy, Debug)]
enum Engine {
    Opening,
    Blocking { direct_io: bool },
    Uring { direct_io: bool, fixed: bool },
}

/// Runs `test` for every engine on a disk's file system and on tmpfs.
fn on_every_engine(content: &[u8], test: impl AsyncFn(&Path, FileId, &AnyIo) + Copy) {
    let mut engines = vec![Engine::Opening];
    for direct_io in [false, true] {
        engines.push(Engine::Blocking { direct_io });
        if crate::OwnRing::available().is_ok() {
            engines.extend([false, true].map(|fixed| Engine::Uring { direct_io, fixed }));
        } else {
            assert!(std::env::var_os("CI").is_none(), "no io_uring");
            println!("skipped: no io_uring");
        }
    }
    for parent in [std::env::temp_dir(), "/dev/shm".into()] {
        for engine in &engines {
            println!("{engine:?} in {}", parent.display());
            let place = Place::new(&parent, content);
            match *engine {
                Engine::Opening => {
                    let mode = OpenMode { writable: true, ..OpenMode::default() };
                    let (files, id) = HostFiles::open(&place.path, mode).unwrap();
                    block_on(test(&place.path, id, &AnyIo::Opening(files)));
                }
                Engine::Blocking { direct_io } => {
                    let (set, id) = place.open(direct_io);
                    block_on(test(&place.path, id, &AnyIo::Blocking(BlockingIo::new(set))));
                }
                Engine::Uring { direct_io, fixed } => with_ring(8, async |ring| {
                    let (set, id) = place.open(direct_io);
                    let io = if fixed {
                        let (count, fds) = set.fixed_fds(31);
                        ring.register_files_at(2, &fds);
                        UringIo::with_fixed(ring, set, 2, count)
                    } else {
                        UringIo::new(ring, set)
                    };
                    test(&place.path, id, &AnyIo::Uring(io)).await;
                }),
            }
        }
    }
}

/// One type for all of them, so that one closure tests all of them.
enum AnyIo {
    Opening(HostFiles),
    Blocking(BlockingIo),
    Uring(UringIo<crate::OwnRing>),
}

macro_rules! any {
    ($self:ident, $io:ident => $call:expr) => {
        match $self {
            AnyIo::Opening($io) => $call,
            AnyIo::Blocking($io) => $call,
            AnyIo::Uring($io) => $call,
        }
    };
}

impl AnyIo {
    async fn read(&self, id: FileId, offset: u64, len: usize) -> io::Result<Vec<u8>> {
        // Not at the buffer's edges: what surrounds the part must stay as it is.
        let buf = Buf::new(len + 4096 + 1);
        buf.copy_in(4095, b"<");
        buf.copy_in(4096 + len, b">");
        any!(self, io => io.read_at(id, &buf, 4096..4096 + len, offset).await)?;
        let mut bytes = vec![0; len + 2];
        buf.copy_out(4095, &mut bytes);
        assert_eq!((bytes.remove(0), bytes.pop()), (b'<', Some(b'>')));
        Ok(bytes)
    }

    async fn write(&self, id: FileId, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let io_buf = any!(self, io => io.alloc(bytes.len()));
        any!(self, io => io.copy_in(&io_buf, 0, bytes))?;
        any!(self, io => io.write_at(id, &io_buf, 0..bytes.len(), offset).await)
    }

    async fn punch(&self, id: FileId, offset: u64, len: u64) -> io::Result<()> {
        any!(self, io => io.punch_hole(id, offset, len).await)
    }

    async fn zero(&self, id: FileId, offset: u64, len: u64) -> io::Result<()> {
        any!(self, io => io.zero_range(id, offset, len).await)
    }

    async fn reserve(&self, id: FileId, offset: u64, len: u64) -> io::Result<()> {
        any!(self, io => io.reserve(id, offset, len).await)
    }

    async fn reserve_fresh(&self, id: FileId, offset: u64, len: u64) -> io::Result<()> {
        any!(self, io => io.reserve_fresh(id, offset, len).await)
    }

    async fn set_len(&self, id: FileId, len: u64) -> io::Result<()> {
        any!(self, io => io.set_len(id, len).await)
    }

    async fn sync(&self, id: FileId) -> io::Result<()> {
        any!(self, io => io.sync_data(id).await)
    }
}

const SIZE: usize = 5 * 4096 + 700;

/// Ranges around every kind of edge: of sectors, pages and the file.
fn ranges() -> Vec<(usize, usize)> {
    let edges = [0, 1, 511, 512, 513, 4095, 4096, 4097, 8192, 5 * 4096, SIZE - 1, SIZE];
    let pairs = edges.iter().flat_map(|from| edges.iter().map(move |to| (*from, *to)));
    pairs.filter(|(from, to)| from <= to).collect()
}

#[test]
fn reads_every_range() {
    let content = pattern(SIZE);
    on_every_engine(&content, async |_, id, io| {
        for (from, to) in ranges() {
            assert_eq!(io.read(id, from as u64, to - from).await.unwrap(), content[from..to], "{from}..{to}");
        }
    });
}

#[test]
fn the_end_of_the_file_is_unexpected() {
    on_every_engine(&pattern(SIZE), async |_, id, io| {
        for (offset, len) in [(0, SIZE + 1), (SIZE - 1, 2), (SIZE, 1), (5 * 4096, 4096), (1 << 20, 4096)] {
            let e = io.read(id, offset as u64, len).await.unwrap_err();
            assert_eq!(e.kind(), io::ErrorKind::UnexpectedEof, "{len} at {offset}: {e}");
        }
        assert_eq!(io.read(id, 1 << 20, 0).await.unwrap(), b"");
    });
}

#[test]
fn writes_every_range_and_nothing_else() {
    let start = pattern(SIZE);
    on_every_engine(&start, async |path, id, io| {
        let mut model = start.clone();
        for (n, (from, to)) in ranges().into_iter().enumerate() {
            let bytes = vec![n as u8; to - from];
            io.write(id, from as u64, &bytes).await.unwrap();
            model[from..to].copy_from_slice(&bytes);
            assert!(fs::read(path).unwrap() == model, "{from}..{to}");
        }
        io.sync(id).await.unwrap();
        assert!(fs::read(path).unwrap() == model);
    });
}

#[test]
fn a_write_past_the_end_extends_the_file_by_a_hole() {
    on_every_engine(b"begin", async |path, id, io| {
        io.write(id, 3 * 4096, &[7; 4096]).await.unwrap();
        io.write(id, 1 << 20, b"end").await.unwrap();
        let mut model = b"begin".to_vec();
        model.resize(3 * 4096, 0);
        model.resize(4 * 4096, 7);
        model.resize(1 << 20, 0);
        model.extend_from_slice(b"end");
        assert!(fs::read(path).unwrap() == model);
        assert_eq!(io.read(id, 3, 10).await.unwrap(), b"in\0\0\0\0\0\0\0\0");
    });
}

#[test]
fn a_range_that_no_file_has_is_invalid() {
    on_every_engine(b"", async |_, id, io| {
        for offset in [u64::MAX, u64::MAX - 511, i64::MAX as u64] {
            for e in [
                io.read(id, offset, 512).await.map(drop),
                io.write(id, offset, &[1; 512]).await,
                io.punch(id, offset, 512).await,
                io.zero(id, offset, 512).await,
            ] {
                assert_eq!(e.unwrap_err().kind(), io::ErrorKind::InvalidInput);
            }
        }
        let foreign = io.read(FileId(7), 0, 1).await.unwrap_err();
        assert_eq!(foreign.to_string(), "FileId(7) is no file of this image");
    });
}

#[test]
fn a_hole_reads_as_zeroes_and_its_space_is_given_back() {
    let content = vec![5; 1 << 20];
    on_every_engine(&content, async |path, id, io| {
        io.sync(id).await.unwrap();
        let used = || fs::metadata(path).unwrap().blocks() * 512;
        let before = used();
        io.punch(id, 65536, 65536).await.unwrap();
        assert!(used() <= before - 65536, "{before} {}", used());
        // Not a block's bounds; then past the end, and nothing.
        io.punch(id, 300_001, 5000).await.unwrap();
        io.punch(id, (1 << 20) - 10, 4096).await.unwrap();
        io.punch(id, 0, 0).await.unwrap();
        let mut model = content.clone();
        model[65536..131_072].fill(0);
        model[300_001..305_001].fill(0);
        model[(1 << 20) - 10..].fill(0);
        assert!(fs::read(path).unwrap() == model);
    });
}

#[test]
fn a_reserved_range_takes_space_and_keeps_its_bytes_and_the_length() {
    on_every_engine(&pattern(SIZE), async |path, id, io| {
        io.set_len(id, 1 << 20).await.unwrap();
        io.sync(id).await.unwrap();
        let used = || fs::metadata(path).unwrap().blocks() * 512;
        let before = used();
        match io.reserve(id, 1000, 300_000).await {
            Ok(()) => assert!(used() >= before + 250_000, "{before} {}", used()),
            Err(e) => assert_eq!(e.kind(), io::ErrorKind::Unsupported),
        }
        let mut model = pattern(SIZE);
        model.resize(1 << 20, 0);
        assert!(fs::read(path).unwrap() == model);
    });
}

/// Most disks cannot write zeroes by themselves: then it is as the above. tests/device has one that can.
#[test]
fn a_fresh_range_takes_space_and_the_length_stays() {
    on_every_engine(&pattern(SIZE), async |path, id, io| {
        io.set_len(id, 1 << 20).await.unwrap();
        io.sync(id).await.unwrap();
        let used = || fs::metadata(path).unwrap().blocks() * 512;
        let before = used();
        for (from, to) in [(65536, 400_000), (400_000, 1 << 20), (1 << 20, 1 << 20)] {
            match io.reserve_fresh(id, from, to - from).await {
                Ok(()) => assert!(used() >= before + to - 65536 - 8192, "{before} {}", used()),
                Err(e) => assert_eq!(e.kind(), io::ErrorKind::Unsupported),
            }
        }
        let mut model = pattern(SIZE);
        model.resize(1 << 20, 0);
        assert!(fs::read(path).unwrap() == model);
    });
}

#[test]
fn a_zeroed_range_stays_allocated_or_is_unsupported() {
    on_every_engine(&pattern(SIZE), async |path, id, io| match io.zero(id, 4000, 5000).await {
        Ok(()) => {
            let mut model = pattern(SIZE);
            model[4000..9000].fill(0);
            io.zero(id, 0, 0).await.unwrap();
            assert!(fs::read(path).unwrap() == model);
        }
        // tmpfs cannot.
        Err(e) => assert_eq!(e.kind(), io::ErrorKind::Unsupported, "{e}"),
    });
}

#[test]
fn the_length_can_be_cut_and_extended() {
    on_every_engine(&pattern(SIZE), async |path, id, io| {
        let mut model = pattern(SIZE);
        for len in [SIZE - 1, 4096, 4095, 0, 1, 8192] {
            model.resize(len, 0);
            io.set_len(id, len as u64).await.unwrap();
            assert!(fs::read(path).unwrap() == model, "{len}");
        }
    });
}

/// Otherwise a write behind what is missing would make zeroes of it.
#[test]
fn a_file_that_another_program_has_cut_is_not_read_written_or_synced() {
    for found_by_reading in [true, false] {
        on_every_engine(&pattern(SIZE), async |path, id, io| {
            io.set_len(id, 8 * 4096).await.unwrap();
            io.sync(id).await.unwrap();
            fs::OpenOptions::new().write(true).open(path).unwrap().set_len(4096).unwrap();
            if found_by_reading {
                let e = io.read(id, 3 * 4096, 4096).await.unwrap_err();
                assert!(e.to_string().contains("was cut"), "{e}");
            } else {
                // Nobody was told yet that this is durable.
                io.write(id, 7 * 4096, &[1; 4096]).await.unwrap();
                fs::OpenOptions::new().write(true).open(path).unwrap().set_len(4096).unwrap();
                assert!(io.sync(id).await.unwrap_err().to_string().contains("was cut"));
            }
            for result in
                [io.read(id, 0, 4096).await.map(drop), io.write(id, 7 * 4096, &[1; 4096]).await, io.sync(id).await]
            {
                assert!(result.unwrap_err().to_string().contains("was cut"));
            }
            assert_eq!(fs::metadata(path).unwrap().len(), 4096);
        });
    }
}

#[test]
fn a_file_that_nobody_could_find_any_more_is_not_durable() {
    on_every_engine(&pattern(SIZE), async |path, id, io| {
        let moved = path.with_extension("moved");
        fs::rename(path, &moved).unwrap();
        io.write(id, 0, &[1; 512]).await.unwrap();
        io.sync(id).await.unwrap();
        fs::write(path, b"another").unwrap();
        fs::rename(path, &moved).unwrap();
        let e = io.sync(id).await.unwrap_err();
        assert!(e.to_string().contains("another one took its name"), "{e}");
        assert_eq!(fs::read(&moved).unwrap(), b"another");
        assert_eq!(io.read(id, 0, 512).await.unwrap(), [1; 512]);
    });
}

#[test]
fn a_write_that_the_host_refuses_fails_with_its_reason() {
    // A write to /dev/full would do, but it is no image. A file opened read-only is as good.
    let place = Place::new(&std::env::temp_dir(), b"x");
    let (files, id) = HostFiles::open(&place.path, OpenMode::default()).unwrap();
    let set = files.into_set();
    let write = |e: io::Result<()>| assert_eq!(e.unwrap_err().raw_os_error(), Some(libc::EBADF));
    let buf = Buf::new(1);
    write(block_on(BlockingIo::new(Arc::clone(&set)).write_at(id, &buf, 0..1, 0)));
    if crate::OwnRing::available().is_ok() {
        with_ring(8, async |ring| write(UringIo::new(ring, Arc::clone(&set)).write_at(id, &buf, 0..1, 0).await));
    }
}

#[test]
fn an_image_opens_the_files_that_it_names_once() {
    let place = Place::new(&std::env::temp_dir(), b"descriptor");
    let sibling = place.path.with_file_name("disk-s001.vmdk");
    fs::write(&sibling, b"extent").unwrap();
    let mode = OpenMode { writable: true, ..OpenMode::default() };
    let (files, image) = HostFiles::open(&place.path, mode).unwrap();
    let extent = files.open(FileId(0), "disk-s001.vmdk", true).unwrap();
    assert_eq!((image, extent), (FileId(0), FileId(1)));
    assert_eq!((files.len(image).unwrap(), files.len(extent).unwrap()), (10, 6));
    assert_eq!(files.name(extent), fs::canonicalize(&sibling).unwrap().display().to_string());
    fs::hard_link(&sibling, place.path.with_file_name("again.vmdk")).unwrap();
    for name in ["disk.img", "disk-s001.vmdk", "again.vmdk"] {
        let e = files.open(FileId(0), name, false).unwrap_err();
        assert!(e.kind() == io::ErrorKind::InvalidInput && e.to_string().ends_with("are the same file"), "{e}");
    }
    let set = files.into_set();
    assert_eq!(set.iter().map(|(id, f)| (id, f.len().unwrap())).collect::<Vec<_>>(), [(image, 10), (extent, 6)]);
    let blocks = fs::metadata(&place.path).unwrap().blocks() + fs::metadata(&sibling).unwrap().blocks();
    assert_eq!(set.host_space_used().unwrap(), blocks * 512);
    assert!(set.get(extent).is_writable());
}

#[test]
fn a_reader_may_open_a_file_twice_but_not_for_writing() {
    let place = Place::new(&std::env::temp_dir(), &[1; 4096]);
    let (files, _) = HostFiles::open(&place.path, OpenMode::default()).unwrap();
    assert_eq!(files.open(FileId(0), "disk.img", true).unwrap_err().kind(), io::ErrorKind::PermissionDenied);
    assert_eq!(files.open(FileId(0), "disk.img", false).unwrap(), FileId(1));
    let blocks = fs::metadata(&place.path).unwrap().blocks();
    assert_eq!(files.into_set().host_space_used().unwrap(), blocks * 512);
}

#[test]
fn direct_io_is_used_for_what_is_aligned_only() {
    let place = Place::new(&std::env::temp_dir(), &pattern(SIZE));
    let (set, id) = place.open(true);
    let file = set.get(id);
    assert!(file.direct_fd().is_some());
    let buf = Buf::new(8192);
    let direct = |part, offset| {
        let transfer = crate::transfer::Transfer::new(crate::transfer::Direction::Read, &buf, part, offset).unwrap();
        file.is_direct(transfer.next_piece().unwrap())
    };
    assert!(direct(0..4096, 0) && direct(4096..8192, 4096));
    assert!(!direct(0..4095, 0) && !direct(0..4096, 1) && !direct(1..4097, 0) && !direct(0..1, 0));
    let (count, fds) = set.fixed_fds(31);
    assert_eq!((count, fds.len()), (1, 2));
    assert_eq!(set.fixed_fds(1), (0, vec![]));
}

/// A loop device on a file, where root may have one.
pub(crate) struct Loop(pub(crate) PathBuf);

impl Loop {
    pub(crate) fn new(path: &Path) -> Option<Self> {
        let output = std::process::Command::new("losetup").args(["--find", "--show"]).arg(path).output().ok()?;
        let node = String::from_utf8(output.stdout).ok()?;
        output.status.success().then(|| Self(node.trim_end().into()))
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = std::process::Command::new("losetup").arg("--detach").arg(&self.0).status();
    }
}

#[test]
fn a_block_device_is_an_image_too() {
    let content = pattern(1 << 20);
    let place = Place::new(&std::env::temp_dir(), &content);
    let Some(device) = Loop::new(&place.path) else {
        println!("skipped: no loop device to be had");
        return;
    };
    let link = place.path.with_file_name("link");
    std::os::unix::fs::symlink(&device.0, &link).unwrap();
    let mode = OpenMode { writable: true, trust_paths: true, direct_io: true, unlocked: false };
    let (files, id) = HostFiles::open(&link, mode).unwrap();
    assert_eq!(files.len(id).unwrap(), 1 << 20);
    let twin = files.open(FileId(0), device.0.to_str().unwrap(), false).unwrap_err();
    assert!(twin.to_string().ends_with("are the same file"), "{twin}");
    let io = AnyIo::Opening(files);
    block_on(async {
        assert_eq!(io.read(id, 1000, 5000).await.unwrap(), content[1000..6000]);
        assert_eq!(io.read(id, 1 << 20, 1).await.unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
        io.write(id, 4096, &[9; 4096]).await.unwrap();
        io.punch(id, 8192, 4096).await.unwrap();
        assert_eq!(io.punch(id, 1, 4096).await.unwrap_err().kind(), io::ErrorKind::Unsupported);
        io.set_len(id, 4096).await.unwrap_err();
        io.sync(id).await.unwrap();
    });
    let now = fs::read(&place.path).unwrap();
    assert!(now[4096..8192] == [9; 4096] && now[8192..12288] == [0; 4096] && now[12288..] == content[12288..]);
}

#[test]
fn a_block_device_is_not_opened_for_an_image_that_names_it() {
    let place = Place::new(&std::env::temp_dir(), &[0; 4096]);
    let Some(device) = Loop::new(&place.path) else {
        println!("skipped: no loop device to be had");
        return;
    };
    let (files, _) = HostFiles::open(&device.0, OpenMode::default()).unwrap();
    let name = device.0.file_name().unwrap().to_str().unwrap();
    let e = files.open(FileId(0), name, false).unwrap_err();
    assert_eq!(e.to_string(), format!("{name:?} is a block device; --trust-paths follows it"));
}
