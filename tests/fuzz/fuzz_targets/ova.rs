//! Archives: the walk over their headers, and images inside.
//!
//! The input has a byte for what is asked, and the archive. No header of hostile making would get past its checksum, so those
//! are mended first, unless the byte forbids it.

#![no_main]

use libfuzzer_sys::fuzz_target;
use nix::sys::memfd::{MFdFlags, memfd_create};
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use vdisk_fuzz::drive::{options, run};
use vdisk_fuzz::memory::bounded;
use vdisk_image::{Disk, FileId, FileIo, Files, Flags, Op, Request};
use vdisk_io::{HostFiles, OpenMode};

thread_local! {
    static ARCHIVE: File = memfd_create("archive", MFdFlags::MFD_CLOEXEC).expect("a file in memory").into();
}

fuzz_target!(|input: &[u8]| {
    let Some((how, archive)) = input.split_first() else { return };
    ARCHIVE.with(|file| {
        let mut archive = archive.to_vec();
        if how & 1 == 0 {
            archive.chunks_exact_mut(512).for_each(seal);
        }
        // A hole behind it: sizes may be large.
        let hole = if how & 2 == 0 { 0 } else { 1u64 << (how >> 3) };
        file.set_len(0).and_then(|()| file.write_all_at(&archive, 0)).expect("memory");
        file.set_len(archive.len() as u64 + hole).expect("memory");
        bounded(|| {
            let member = [None, Some("disk.vmdk")][usize::from(how >> 2 & 1)];
            let _ = serve(file, &archive, member);
            (24 << 20) + 128 * archive.len()
        });
    });
});

/// Writes the sum that a header has to have, if a block looks like one.
fn seal(block: &mut [u8]) {
    if !block[257..].starts_with(b"ustar") {
        return;
    }
    block[148..156].fill(b' ');
    let sum: u32 = block.iter().map(|b| u32::from(*b)).sum();
    block[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
}

fn serve(file: &File, archive: &[u8], member: Option<&str>) -> io::Result<()> {
    let path = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
    let mode = OpenMode { unlocked: true, ..OpenMode::default() };
    let (files, image) = HostFiles::open_member(&path, member, mode).inspect_err(|e| {
        assert!(!e.to_string().contains(char::is_control), "{e:?}");
    })?;
    let disk = run(Disk::open(&files, image, &options(1 | 32, true)));
    // Those of the image and all that it names.
    for id in (0..).map(FileId) {
        let Ok(len) = files.len(id) else { break };
        within(&files, id, len, archive);
    }
    let Ok(disk) = disk else { return Ok(()) };
    let size = disk.geometry().size;
    for offset in [0, size / 3, size - 512] {
        let len = (size - offset).min(8192);
        let request =
            Request::check(&disk.geometry(), Op::Read, offset, len, Flags::default()).expect("inside the disk");
        let _ = run(disk.serve(&files, request, &files.alloc(len as usize)));
        let _ = run(disk.map(&files, offset, len));
    }
    Ok(())
}

/// A member's bytes are bytes of the archive, and it ends.
fn within(files: &HostFiles, id: FileId, len: u64, archive: &[u8]) {
    let head = len.min(512) as usize;
    let buf = files.alloc(513);
    run(files.read_at(id, &buf, 0..head, 0)).expect("a member lies in the archive");
    let mut bytes = vec![0; head];
    files.copy_out(&buf, 0, &mut bytes).expect("memory");
    let known = bytes.iter().rposition(|b| *b != 0).map_or(0, |n| n + 1);
    assert!(
        known == 0 || archive.windows(known).step_by(512).any(|w| *w == bytes[..known]),
        "{id:?} is not in the archive"
    );
    let past = run(files.read_at(id, &buf, 0..1, len));
    assert!(past.is_err_and(|e| e.kind() == io::ErrorKind::UnexpectedEof));
}
