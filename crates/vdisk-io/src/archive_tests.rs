//! Images inside archives that the real `tar` made, read by every engine.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use vdisk_image::{FileId, FileIo, Files, Stored};

use crate::own_ring::tests::with_ring;
use crate::tar::tests::{header, padded};
use crate::{BlockingIo, FileSet, HostFiles, OpenMode, OwnRing, UringIo, block_on};

const FORMATS: [&str; 4] = ["v7", "ustar", "gnu", "pax"];

/// A directory with files, to make archives of.
struct Place(tempfile::TempDir);

impl Place {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn write(&self, name: &str, content: &[u8]) {
        fs::create_dir_all(self.path(name).parent().unwrap()).unwrap();
        fs::write(self.path(name), content).unwrap();
    }

    /// Archives members with the real program.
    fn tar(&self, options: &[&str], members: &[&str]) -> PathBuf {
        let archive = self.path("appliance.ova");
        let mut tar = Command::new("tar");
        let tar = tar.arg("--create").arg("--file").arg(&archive).arg("-C").arg(self.0.path());
        assert!(tar.args(options).args(members).status().unwrap().success());
        archive
    }
}

/// Bytes of which no two sectors are alike.
fn pattern(seed: u8, len: usize) -> Vec<u8> {
    (0..len).map(|n| seed ^ (n % 251) as u8 ^ (n / 512) as u8).collect()
}

fn open(archive: &Path, member: Option<&str>) -> io::Result<(HostFiles, FileId)> {
    HostFiles::open_member(archive, member, OpenMode::default())
}

async fn read(io: &impl FileIo, id: FileId, offset: u64, len: usize) -> Result<Vec<u8>, io::ErrorKind> {
    let buf = io.alloc(len);
    io.read_at(id, &buf, 0..len, offset).await.map_err(|e| e.kind())?;
    let mut bytes = vec![0; len];
    io.copy_out(&buf, 0, &mut bytes).unwrap();
    Ok(bytes)
}

/// Whether a file has just this content, by ranges around its edges and those of sectors.
async fn assert_content(io: &impl FileIo, id: FileId, content: &[u8]) {
    let end = content.len();
    let edges = [0, 1, 511, 512, 513, end - 513, end - 1, end];
    for from in edges {
        for to in edges.into_iter().filter(|to| from <= *to) {
            assert!(read(io, id, from as u64, to - from).await.unwrap() == content[from..to], "{from}..{to}");
        }
        let past = read(io, id, from as u64, end - from + 1).await;
        assert_eq!(past, Err(io::ErrorKind::UnexpectedEof), "one past the end from {from}");
    }
    for offset in [end as u64 + 1, 1 << 40, i64::MAX as u64 - 1] {
        assert_eq!(read(io, id, offset, 1).await, Err(io::ErrorKind::UnexpectedEof), "{offset}");
    }
    for offset in [i64::MAX as u64, u64::MAX] {
        assert_eq!(read(io, id, offset, 1).await, Err(io::ErrorKind::InvalidInput), "{offset}");
    }
}

/// Checks the first files of what `open` gives, by every engine.
fn assert_contents(open: impl Fn() -> HostFiles, contents: &[&[u8]]) {
    let contents = || (0..).map(FileId).zip(contents);
    let files = open();
    for (id, content) in contents() {
        assert_eq!(files.len(id).unwrap(), content.len() as u64);
        block_on(assert_content(&files, id, content));
    }
    let io = BlockingIo::new(files.into_set());
    contents().for_each(|(id, content)| block_on(assert_content(&io, id, content)));
    drop(io);
    if let Err(e) = OwnRing::available() {
        assert!(std::env::var_os("CI").is_none(), "{e}");
        println!("skipped: {e}");
        return;
    }
    for fixed in [false, true] {
        with_ring(8, async |ring| {
            let set = open().into_set();
            let io = if fixed {
                let (count, fds) = set.fixed_fds(31);
                ring.register_files_at(2, &fds);
                UringIo::with_fixed(ring, set, 2, count)
            } else {
                UringIo::new(ring, set)
            };
            for (id, content) in contents() {
                assert_content(&io, id, content).await;
            }
        });
    }
}

#[test]
fn members_of_every_format_read_as_the_files_they_were() {
    let (image, extent) = (pattern(1, 5 * 4096 + 700), pattern(2, 3 * 512));
    // Too long for the field of 100 bytes; v7 has no other.
    let long = format!("{}/{}", "d".repeat(90), "n".repeat(80));
    for format in FORMATS {
        println!("{format}");
        let place = Place::new();
        let directory = if format == "v7" { "vm" } else { &long };
        let (disk, s001) = (format!("{directory}/disk.vmdk"), format!("{directory}/disk-s001.vmdk"));
        place.write("appliance.ovf", b"<Envelope/>");
        place.write(&disk, &image);
        place.write(&s001, &extent);
        let archive = place.tar(&["--format", format], &["appliance.ovf", directory]);
        let opened = || {
            let (files, id) = open(&archive, Some(&disk)).unwrap();
            assert_eq!((id, files.open(FileId(0), "disk-s001.vmdk", false).unwrap()), (FileId(0), FileId(1)));
            let name = files.name(FileId(1));
            assert!(name.ends_with(&format!("appliance.ova:{s001}")), "{name}");
            files
        };
        assert_contents(opened, &[&image, &extent]);
        let plain = HostFiles::open(&place.path(&disk), OpenMode::default()).unwrap().0;
        block_on(assert_content(&plain, FileId(0), &image));
        assert_eq!(open(&archive, None).unwrap_err().kind(), io::ErrorKind::InvalidInput, "two of them");
    }
}

#[test]
fn names_longer_than_any_header_are_found() {
    let name = format!("{}.vmdk", "n".repeat(240));
    for format in ["gnu", "pax"] {
        let place = Place::new();
        place.write(&name, &pattern(3, 1024));
        let archive = place.tar(&["--format", format], &[&name]);
        assert_contents(|| open(&archive, None).unwrap().0, &[&pattern(3, 1024)]);
        let named = format!("./{name}");
        open(&archive, Some(&named)).unwrap();
    }
}

#[test]
fn an_archive_of_a_directory_has_dots_before_its_names() {
    let place = Place::new();
    place.write("vm/disk.vmdk", &pattern(4, 600));
    let archive = place.tar(&["-C", "vm"], &["."]);
    assert_contents(|| open(&archive, None).unwrap().0, &[&pattern(4, 600)]);
    open(&archive, Some("disk.vmdk")).unwrap();
}

#[test]
fn a_member_may_end_with_the_archive() {
    let place = Place::new();
    let content = pattern(5, 2 * 512 + 3);
    place.write("disk.vmdk", &content);
    let archive = place.tar(&[], &["disk.vmdk"]);
    let cut = |len: usize| File::options().write(true).open(&archive).unwrap().set_len(512 + len as u64).unwrap();
    cut(content.len());
    let opened = || open(&archive, None).unwrap().0;
    assert_contents(opened, &[&content]);
    // Cut short while it is open, and before.
    let files = opened();
    cut(content.len() - 1);
    assert_eq!(block_on(read(&files, FileId(0), 0, content.len())), Err(io::ErrorKind::UnexpectedEof));
    drop(files);
    let e = open(&archive, None).unwrap_err();
    assert_eq!(e.kind(), io::ErrorKind::InvalidData);
    assert!(e.to_string().starts_with(&format!("{}: the tar header at byte 0", archive.display())), "{e}");
}

#[test]
fn a_member_is_not_written_to() {
    let place = Place::new();
    place.write("disk.vmdk", &pattern(6, 4096));
    let archive = place.tar(&[], &["disk.vmdk"]);
    let before = fs::read(&archive).unwrap();
    let refused = |answers: [io::Result<()>; 4]| {
        for answer in answers {
            assert_eq!(answer.unwrap_err().kind(), io::ErrorKind::ReadOnlyFilesystem);
        }
    };
    let (files, _) = open(&archive, None).unwrap();
    refused(block_on(changes(&files)));
    let set = files.into_set();
    refused(block_on(changes(&BlockingIo::new(Arc::clone(&set)))));
    if OwnRing::available().is_ok() {
        with_ring(8, async |ring| refused(changes(&UringIo::new(ring, set)).await));
    }
    assert!(fs::read(&archive).unwrap() == before);
    let (files, _) = open(&archive, None).unwrap();
    assert_eq!(files.open(FileId(0), "disk.vmdk", true).unwrap_err().kind(), io::ErrorKind::PermissionDenied);
}

async fn changes(io: &impl FileIo) -> [io::Result<()>; 4] {
    let id = FileId(0);
    let buf = io.alloc(512);
    [
        io.write_at(id, &buf, 0..512, 0).await,
        io.punch_hole(id, 0, 512).await,
        io.zero_range(id, 0, 512).await,
        io.set_len(id, 512).await,
    ]
}

#[test]
fn sparse_and_compressed_archives_are_refused() {
    for format in ["gnu", "pax"] {
        let place = Place::new();
        let sparse = File::create(place.path("disk.vmdk")).unwrap();
        for n in 0..30 {
            sparse.write_all_at(&[1; 4096], n << 20).unwrap();
        }
        place.write("other.vmdk", &pattern(7, 700));
        let archive = place.tar(&["--sparse", "--format", format], &["disk.vmdk", "other.vmdk"]);
        let e = open(&archive, Some("disk.vmdk")).unwrap_err();
        assert!(e.to_string().ends_with("is stored without its holes (tar --sparse): unpack it"), "{format}: {e}");
        // The walk steps over it rightly.
        assert_contents(|| open(&archive, Some("other.vmdk")).unwrap().0, &[&pattern(7, 700)]);
    }
    let place = Place::new();
    place.write("disk.vmdk", &pattern(7, 700));
    let e = open(&place.tar(&["--gzip"], &["disk.vmdk"]), None).unwrap_err();
    assert!(e.kind() == io::ErrorKind::InvalidData && e.to_string().contains(": compressed (gzip): "), "{e}");
    let e = open(&place.path("disk.vmdk"), None).unwrap_err();
    assert!(e.to_string().ends_with("disk.vmdk: no tar archive"), "{e}");
}

#[test]
fn a_member_may_be_larger_than_the_octal_digits_can_say() {
    const SIZE: u64 = (8 << 30) + 513;
    let pax = [&header("x", b'x', 19)[..], &padded(b"19 size=8589935105\n"), &header("d.vmdk", b'0', 0)].concat();
    for headers in [header("d.vmdk", b'0', SIZE).to_vec(), pax] {
        let place = Place::new();
        place.write("large.ova", &headers);
        let archive = place.path("large.ova");
        let file = File::options().write(true).open(&archive).unwrap();
        file.write_all_at(b"end!", headers.len() as u64 + SIZE - 4).unwrap();
        let (files, id) = open(&archive, None).unwrap();
        assert_eq!(files.len(id).unwrap(), SIZE);
        assert_eq!(block_on(read(&files, id, SIZE - 5, 5)).unwrap(), b"\0end!");
        assert_eq!(block_on(read(&files, id, SIZE - 4, 5)), Err(io::ErrorKind::UnexpectedEof));
    }
}

#[test]
fn holes_of_the_archive_are_holes_of_the_member() {
    const MIB: u64 = 1 << 20;
    let place = Place::new();
    // Headers fill the first MiB, so that the member begins at a bound that every file system can keep.
    let mut headers = [header("././@LongLink", b'K', MIB - 1024).to_vec(), vec![1; MIB as usize - 1024]].concat();
    headers.extend(header("d.vmdk", b'0', 3 * MIB));
    place.write("d.ova", &headers);
    let archive = place.path("d.ova");
    let file = File::options().write(true).open(&archive).unwrap();
    // Data, hole, data; the archive goes on behind with more data.
    file.write_all_at(&vec![2; MIB as usize], MIB).unwrap();
    file.write_all_at(&vec![3; 2 * MIB as usize + 512], 3 * MIB).unwrap();
    file.write_all_at(&header("z", b'0', MIB), 4 * MIB).unwrap();
    let (files, id) = open(&archive, None).unwrap();
    let io = BlockingIo::new(files.into_set());
    let at = |offset| block_on(io.stored_at(id, offset)).unwrap();
    assert_eq!(at(0), Stored { hole: false, len: MIB });
    assert_eq!(at(MIB - 1), Stored { hole: false, len: 1 });
    assert_eq!(at(MIB), Stored { hole: true, len: MIB });
    assert_eq!(at(2 * MIB), Stored { hole: false, len: MIB });
    assert_eq!(at(3 * MIB - 1), Stored { hole: false, len: 1 });
    assert_eq!(at(3 * MIB), Stored { hole: true, len: u64::MAX - 3 * MIB });
}

#[test]
fn the_archive_is_locked_once_for_as_long_as_a_member_is_open() {
    let place = Place::new();
    place.write("disk.vmdk", &pattern(8, 700));
    place.write("s001.bin", &pattern(9, 512));
    let archive = place.tar(&[], &["disk.vmdk", "s001.bin"]);
    let writer = || {
        let mode = OpenMode { writable: true, ..OpenMode::default() };
        HostFiles::open(&archive, mode).map(drop).map_err(|e| e.kind())
    };
    let (files, _) = open(&archive, None).unwrap();
    files.open(FileId(0), "s001.bin", false).unwrap();
    files.open(FileId(0), "none", false).unwrap_err();
    assert_eq!(writer(), Err(io::ErrorKind::ResourceBusy));
    open(&archive, None).expect("readers share");
    let set: Arc<FileSet> = files.into_set();
    assert_eq!(writer(), Err(io::ErrorKind::ResourceBusy));
    assert_eq!(set.host_space_used().unwrap(), 700 + 512);
    drop(set);
    writer().unwrap();
    let unlocked = OpenMode { unlocked: true, ..OpenMode::default() };
    let (_files, _) = HostFiles::open_member(&archive, None, unlocked).unwrap();
    writer().unwrap();
}

#[test]
fn direct_io_is_not_used_for_members() {
    let place = Place::new();
    place.write("disk.vmdk", &pattern(10, 8192));
    let archive = place.tar(&[], &["disk.vmdk"]);
    let mode = OpenMode { direct_io: true, ..OpenMode::default() };
    let (files, id) = HostFiles::open_member(&archive, None, mode).unwrap();
    let set = files.into_set();
    assert!(set.get(id).direct_fd().is_none() && !set.get(id).is_writable());
    block_on(assert_content(&BlockingIo::new(set), id, &pattern(10, 8192)));
}

#[test]
fn a_member_is_found_on_a_block_device() {
    let place = Place::new();
    place.write("disk.vmdk", &pattern(11, 700));
    let archive = place.tar(&[], &["disk.vmdk"]);
    let Some(device) = crate::engine_tests::Loop::new(&archive) else {
        println!("skipped: no loop device to be had");
        return;
    };
    assert_contents(|| open(&device.0, None).unwrap().0, &[&pattern(11, 700)]);
}
