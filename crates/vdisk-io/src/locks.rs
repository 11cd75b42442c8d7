//! Locks that exclude other processes from an image, the same as qemu's, so that the two exclude each other.
//!
//! What qemu does (block/file-posix.c: `raw_apply_lock_bytes`, `raw_check_lock_bytes`; docs/system/images.rst, "Disk
//! image file locking"): for every permission that it uses it holds a read lock on the byte 100 + permission, for
//! every one that it does not share with others a read lock on the byte 200 + permission. Read locks never exclude each
//! other: afterwards it looks for foreign locks on the counterparts. Two that start at once may both fail, never both
//! succeed. The locks belong to the open file (fcntl(2), "Open file description locks") and end with it at the latest.
//!
//! The locks of VMware's own products, which are files, keep our writers out.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};

use crate::host_file::HostFile;

/// qemu's permissions (include/block/block-common.h, `BLK_PERM_*`), by the number of their bit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Permission {
    ConsistentRead = 0,
    Write = 1,
    WriteUnchanged = 2,
    Resize = 3,
}

use Permission::{ConsistentRead, Resize, Write, WriteUnchanged};

/// What a holder of an image does with it, and what it keeps others from doing.
struct Claim {
    uses: &'static [Permission],
    excludes: &'static [Permission],
}

/// As a qemu with a format that has tables: others may read or even rewrite the same bytes, but change nothing.
const READER: Claim = Claim { uses: &[ConsistentRead], excludes: &[Write, Resize] };

/// Others may read what is consistent, which says little while a writer has its tables in memory: qemu's readers
/// exclude writers, so that they get in only with `-U`.
const WRITER: Claim = Claim { uses: &[ConsistentRead, Write, Resize], excludes: &[Write, WriteUnchanged, Resize] };

const FIRST_USED: i64 = 100;
const FIRST_EXCLUDED: i64 = 200;

/// Locks a file for as long as it is open. `changing`: something is written that builds on the file, or the file itself, so that
/// VMware's locks matter.
///
/// # Errors
///
/// [`io::ErrorKind::ResourceBusy`] if another process uses it in a way that excludes ours.
pub(crate) fn lock(file: &HostFile, changing: bool) -> io::Result<()> {
    if changing && let Some(lock) = vmware_lock(file.path()) {
        let (file, lock) = (file.path().display(), lock.display());
        return Err(io::Error::new(
            io::ErrorKind::ResourceBusy,
            format!(
                "{file}: in use by VMware, whose locks are in {lock}: shut the virtual machine down, or remove {lock} \
                 if none runs and it was left behind; --read-only does not mind it"
            ),
        ));
    }
    let claim = if file.is_writable() { &WRITER } else { &READER };
    match claim.take(file.buffered_fd()) {
        Ok(None) => Ok(()),
        Ok(Some(conflict)) => {
            Err(io::Error::new(io::ErrorKind::ResourceBusy, format!("{}: {conflict}", file.path().display())))
        }
        // A file system without locks (fcntl(2), ERRORS; NFS says ENOLCK) or a sandbox without OFD locks.
        Err(e) => {
            tracing::warn!("{}: going on without locks, which do not work here: {e}", file.path().display());
            Ok(())
        }
    }
}

/// An open file that gives its locks up when it goes. Closing would do, were it not for a child between fork and exec,
/// which has the open file too for a moment (any thread of ours may be starting one).
#[derive(Debug)]
pub(crate) struct Locked(pub(crate) File);

impl Drop for Locked {
    fn drop(&mut self) {
        let whole_file = libc::flock { l_len: 0, ..request(libc::F_UNLCK, 0) };
        // Where there are no locks there is none to give up.
        let _ = fcntl(self.0.as_fd(), FcntlArg::F_OFD_SETLK(&whole_file));
    }
}

/// The locks of VMware's hosted products (Workstation, Player, Fusion), if a file has any: while `disk.vmdk` is in use
/// there is a directory `disk.vmdk.lck` with a file for every user. Where it is a file, that counts too.
///
/// We make none of our own: VMware honours its own format only, which is not published and names the process that holds
/// a lock, so that it may be declared stale. What we would make would protect nothing, and be left behind by a crash.
fn vmware_lock(path: &Path) -> Option<PathBuf> {
    // VMware knows an image by the name in the machine's configuration, which may be a link as ours may.
    let real = fs::canonicalize(path).ok();
    [Some(path.to_owned()), real].into_iter().flatten().map(lock_of).find(|lock| is_held(lock))
}

fn lock_of(file: PathBuf) -> PathBuf {
    let mut name = file.into_os_string();
    name.push(".lck");
    name.into()
}

fn is_held(lock: &Path) -> bool {
    match fs::metadata(lock) {
        // A directory that we may not read might hold one.
        Ok(data) if data.is_dir() => fs::read_dir(lock).map_or(true, |mut entries| entries.next().is_some()),
        Ok(_) => true,
        Err(_) => false,
    }
}

impl Claim {
    /// Takes the locks; the answer is what stands in the way.
    fn take(&self, fd: BorrowedFd<'_>) -> nix::Result<Option<String>> {
        let bytes = bytes_of(FIRST_USED, self.uses).chain(bytes_of(FIRST_EXCLUDED, self.excludes));
        for (byte, _) in bytes {
            match fcntl(fd, FcntlArg::F_OFD_SETLK(&request(libc::F_RDLCK, byte))) {
                // Not qemu's doing, whose locks are read locks.
                Err(Errno::EAGAIN | Errno::EACCES) => return Ok(Some("in use by another process".to_owned())),
                answer => answer?,
            };
        }
        for (byte, permission) in bytes_of(FIRST_EXCLUDED, self.uses) {
            if is_locked_by_another(fd, byte)? {
                return Ok(Some(format!("in use by another process, which excludes {}", permission.name())));
            }
        }
        for (byte, permission) in bytes_of(FIRST_USED, self.excludes) {
            if is_locked_by_another(fd, byte)? {
                return Ok(Some(format!("in use by another process, which claims {}", permission.name())));
            }
        }
        Ok(None)
    }
}

impl Permission {
    /// As qemu says it.
    fn name(self) -> &'static str {
        match self {
            ConsistentRead => "consistent read",
            Write => "write",
            WriteUnchanged => "write unchanged",
            Resize => "resize",
        }
    }
}

fn bytes_of(first: i64, permissions: &'static [Permission]) -> impl Iterator<Item = (i64, Permission)> {
    permissions.iter().map(move |p| (first + *p as i64, *p))
}

/// Asks as if for a write lock, which every other lock stands in the way of.
fn is_locked_by_another(fd: BorrowedFd<'_>, byte: i64) -> nix::Result<bool> {
    let mut answer = request(libc::F_WRLCK, byte);
    fcntl(fd, FcntlArg::F_OFD_GETLK(&mut answer))?;
    Ok(i32::from(answer.l_type) != libc::F_UNLCK)
}

/// A lock of one byte.
fn request(kind: i32, byte: i64) -> libc::flock {
    let narrow = |n: i32| i16::try_from(n).expect("the kernel's own constant");
    // An OFD lock demands pid 0.
    libc::flock { l_type: narrow(kind), l_whence: narrow(libc::SEEK_SET), l_start: byte, l_len: 1, l_pid: 0 }
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader, Write as _};
    use std::process::{Child, Command, Stdio};

    use vdisk_image::Files as _;

    use super::*;
    use crate::{HostFiles, OpenMode};

    fn open(path: &Path, writable: bool) -> io::Result<HostFiles> {
        HostFiles::open(path, OpenMode { writable, ..OpenMode::default() }).map(|(files, _)| files)
    }

    fn image() -> (tempfile::TempDir, PathBuf) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("disk.img");
        File::create(&path).unwrap().set_len(1 << 20).unwrap();
        (directory, path)
    }

    /// Says so, and fails under CI, if there is no qemu to compare with.
    fn has_qemu() -> bool {
        let found = Command::new("qemu-io").arg("--version").output().is_ok_and(|o| o.status.success());
        assert!(found || std::env::var_os("CI").is_none(), "qemu-io is missing");
        if !found {
            eprintln!("skipped: qemu-io is missing");
        }
        found
    }

    /// A qemu-io that has the image open, and ends with its input.
    struct Holder(Child);

    impl Holder {
        fn new(path: &Path, format: &str, options: &[&str]) -> Self {
            let mut child = Command::new("qemu-io")
                .args(options)
                .args(["-f", format])
                .arg(path)
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .spawn()
                .unwrap();
            // It answers only once the image is open.
            child.stdin.as_mut().unwrap().write_all(b"length\n").unwrap();
            let mut line = String::new();
            BufReader::new(child.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
            assert!(line.contains("1 MiB"), "{line}");
            Self(child)
        }
    }

    impl Drop for Holder {
        fn drop(&mut self) {
            drop(self.0.stdin.take());
            let _ = self.0.wait();
        }
    }

    /// Runs a tool; its status and everything that it said.
    fn run(program: &str, args: &[&str], path: &Path) -> (bool, String) {
        let output = Command::new(program).args(args).arg(path).output().unwrap();
        let said = [output.stdout, output.stderr].concat();
        (output.status.success(), String::from_utf8_lossy(&said).into_owned())
    }

    #[test]
    fn readers_share_and_a_writer_is_alone() {
        let (_directory, path) = image();
        let (first, second) = (open(&path, false).unwrap(), open(&path, false).unwrap());
        let e = open(&path, true).unwrap_err();
        assert_eq!(e.kind(), io::ErrorKind::ResourceBusy);
        assert!(e.to_string().ends_with("disk.img: in use by another process, which excludes write"), "{e}");
        drop((first, second));
        let writer = open(&path, true).unwrap();
        assert_eq!(open(&path, true).unwrap_err().kind(), io::ErrorKind::ResourceBusy);
        let e = open(&path, false).unwrap_err();
        assert!(e.to_string().ends_with("in use by another process, which claims write"), "{e}");
        drop(writer);
        open(&path, false).unwrap();
    }

    #[test]
    fn the_locks_live_as_long_as_the_set() {
        let (_directory, path) = image();
        let set = open(&path, true).unwrap().into_set();
        assert_eq!(open(&path, false).unwrap_err().kind(), io::ErrorKind::ResourceBusy);
        drop(set);
        open(&path, true).unwrap();
    }

    #[test]
    fn locks_of_vmware_keep_our_writer_out_only() {
        let (_directory, path) = image();
        let lock = lock_of(path.clone());
        fs::create_dir(&lock).unwrap();
        open(&path, true).expect("an empty directory holds no lock");
        let held = lock.join("M03285.lck");
        fs::write(&held, "").unwrap();
        let e = open(&path, true).unwrap_err();
        assert_eq!(e.kind(), io::ErrorKind::ResourceBusy);
        assert!(e.to_string().contains(&format!("remove {}", lock.display())), "{e}");
        open(&path, false).unwrap();
        fs::remove_file(held).unwrap();
        fs::remove_dir(&lock).unwrap();
        fs::write(&lock, "").unwrap();
        assert_eq!(open(&path, true).unwrap_err().kind(), io::ErrorKind::ResourceBusy);
        fs::remove_file(lock).unwrap();
        open(&path, true).unwrap();
    }

    #[test]
    fn locks_of_vmware_are_seen_through_links_and_on_extents() {
        let (directory, path) = image();
        let link = directory.path().join("link");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        let extent = directory.path().join("disk-s001.vmdk");
        fs::write(&extent, "extent").unwrap();
        let hold = |file: &Path| fs::create_dir_all(lock_of(file.to_owned()).join("M1.lck")).unwrap();
        let release = |file: &Path| fs::remove_dir_all(lock_of(file.to_owned())).unwrap();
        for named in [&path, &link] {
            hold(named);
            assert_eq!(open(&link, true).unwrap_err().kind(), io::ErrorKind::ResourceBusy);
            release(named);
        }
        hold(&extent);
        let files = open(&path, false).unwrap();
        files.open(vdisk_image::FileId(0), "disk-s001.vmdk", false).unwrap();
        drop(files);
        // Also where it is only read: what is written to a child builds on its parent.
        for writable in [true, false] {
            let e = open(&path, true).unwrap().open(vdisk_image::FileId(0), "disk-s001.vmdk", writable).unwrap_err();
            assert!(e.kind() == io::ErrorKind::ResourceBusy && e.to_string().contains("disk-s001.vmdk.lck"), "{e}");
        }
    }

    #[test]
    fn a_qemu_that_writes_keeps_us_out() {
        if !has_qemu() {
            return;
        }
        let (_directory, path) = image();
        let holder = Holder::new(&path, "raw", &[]);
        for writable in [false, true] {
            let e = open(&path, writable).unwrap_err();
            assert_eq!(e.kind(), io::ErrorKind::ResourceBusy);
            assert!(e.to_string().contains("in use by another process"), "{e}");
        }
        drop(holder);
        open(&path, true).unwrap();
    }

    #[test]
    fn a_qemu_that_reads_keeps_our_writer_out_only() {
        if !has_qemu() {
            return;
        }
        let (directory, _) = image();
        let path = directory.path().join("disk.vmdk");
        let status = Command::new("qemu-img").args(["create", "-q", "-f", "vmdk"]).arg(&path).arg("1M").status();
        assert!(status.unwrap().success());
        let holder = Holder::new(&path, "vmdk", &["-r"]);
        open(&path, false).unwrap();
        assert_eq!(open(&path, true).unwrap_err().kind(), io::ErrorKind::ResourceBusy);
        drop(holder);
        open(&path, true).unwrap();
    }

    #[test]
    fn our_writer_keeps_qemu_out() {
        if !has_qemu() {
            return;
        }
        let (directory, raw) = image();
        let vmdk = directory.path().join("disk.vmdk");
        let status = Command::new("qemu-img").args(["create", "-q", "-f", "vmdk"]).arg(&vmdk).arg("1M").status();
        assert!(status.unwrap().success());
        for (format, path) in [("raw", &raw), ("vmdk", &vmdk)] {
            let files = open(path, true).unwrap();
            let (ok, said) = run("qemu-io", &["-f", format, "-c", "write 0 512"], path);
            assert!(!ok && said.contains("Failed to get \"write\" lock"), "{format}: {said}");
            // qemu's reader of raw images lets others write (10.0), beside a qemu as beside us.
            let (ok, said) = run("qemu-img", &["info", "-f", format], path);
            let refused = !ok && said.contains("Failed to get shared \"write\" lock");
            assert!(refused || format == "raw", "{format}: {said}");
            let (ok, said) = run("qemu-img", &["info", "-U", "-f", format], path);
            assert!(ok, "{format}: {said}");
            drop(files);
            let (ok, said) = run("qemu-io", &["-f", format, "-c", "write 0 512"], path);
            assert!(ok, "{format}: {said}");
        }
    }

    #[test]
    fn our_reader_keeps_qemus_writer_out_only() {
        if !has_qemu() {
            return;
        }
        let (_directory, path) = image();
        let _files = open(&path, false).unwrap();
        let (ok, said) = run("qemu-io", &["-r", "-f", "raw", "-c", "read 0 512"], &path);
        assert!(ok, "{said}");
        let (ok, said) = run("qemu-img", &["info"], &path);
        assert!(ok, "{said}");
        let (ok, said) = run("qemu-io", &["-f", "raw", "-c", "write 0 512"], &path);
        assert!(!ok && said.contains("Failed to get \"write\" lock"), "{said}");
    }
}
