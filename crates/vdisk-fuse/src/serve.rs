//! The raw view as a plain file, for everybody's tools.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;

use fuser::{MountOption, Session};
use rustix::fs::{AtFlags, CWD, StatxAttributes, StatxFlags, statx};
use rustix::io::Errno;
use rustix::mount::{UnmountFlags, unmount};
use vdisk_image::Disk;
use vdisk_io::FileSet;

use crate::error::Error;
use crate::mount;
use crate::session::{self, THREADS};
use crate::stop::{End, Stop};
use crate::view::{Gate, Shape, View};

/// Serves a disk as the file `place` until `stop` is given or somebody unmounts it. The file is made if there is none, and then
/// removed at the end; what it holds is out of sight meanwhile. Root mounts by itself, others by fusermount3(1). `ready` is told
/// when the file can be opened.
///
/// # Errors
///
/// Why it could not be mounted, or not be unmounted, or what programs had changed by mmap(2) could not be written.
pub fn serve(
    disk: Arc<Disk>,
    files: Arc<FileSet>,
    place: &Path,
    ready: impl FnOnce(),
    stop: &Stop,
) -> Result<(), Error> {
    mount::device_available()?;
    let made = make_place(place)?;
    let served = mounted(disk, files, place, ready, stop);
    if let Some(made) = made {
        made.remove();
    }
    served
}

fn mounted(disk: Arc<Disk>, files: Arc<FileSet>, place: &Path, ready: impl FnOnce(), stop: &Stop) -> Result<(), Error> {
    let gate = Gate::open();
    let read_only = disk.geometry().read_only;
    let view = View::new(disk, files, Shape::File, gate.clone());
    let mut config = session::config(THREADS);
    config.mount_options = vec![
        MountOption::FSName("vdisk".to_owned()),
        MountOption::Subtype("vdisk".to_owned()),
        MountOption::DefaultPermissions,
        MountOption::NoDev,
        MountOption::NoSuid,
        MountOption::NoExec,
        if read_only { MountOption::RO } else { MountOption::RW },
    ];
    let at = place.to_owned();
    session::start(stop, move || Session::new(view, &at, &config).map_err(|e| mounting(&at, e)))?;
    ready();
    let ended = match stop.wait(|_| Err(Error::Ended)) {
        End::Asked => {
            // What programs have mapped and changed is written back while requests are still served.
            let synced = File::open(place).and_then(|file| file.sync_all());
            take_away(place).and(synced)
        }
        End::Unmounted(ended) => ended,
    };
    gate.close();
    ended.map_err(Error::step(format!("unmount {}", place.display())))
}

fn mounting(place: &Path, e: io::Error) -> Error {
    // fusermount3 says it with an end of line.
    let said = e.to_string();
    let e = if said.ends_with('\n') { io::Error::new(e.kind(), said.trim_end().to_owned()) } else { e };
    let missing = e.kind() == io::ErrorKind::NotFound;
    let hint = if missing { " (fusermount3 is missing: install the package fuse3)" } else { "" };
    Error::step(format!("mount on {}{hint}", place.display()))(e)
}

/// Unmounts the file. Who still has it open gets errors from now on.
fn take_away(place: &Path) -> io::Result<()> {
    match unmount(place, UnmountFlags::NOFOLLOW) {
        Err(Errno::BUSY) => {
            tracing::warn!("{} is in use: it is taken away all the same", place.display());
            Ok(unmount(place, UnmountFlags::NOFOLLOW | UnmountFlags::DETACH)?)
        }
        // Only root may do it; a setuid program does it for those who mounted it.
        Err(Errno::PERM) => {
            let mut command = Command::new("fusermount3");
            let output = command.args(["-u", "-z", "--"]).arg(place).stdin(Stdio::null()).output()?;
            let said = || io::Error::other(String::from_utf8_lossy(&output.stderr).trim_end().to_owned());
            if output.status.success() { Ok(()) } else { Err(said()) }
        }
        done => Ok(done?),
    }
}

/// A file that was made to be mounted upon.
struct Made {
    place: PathBuf,
    file: File,
}

impl Made {
    /// Removes the file, unless something else has its name by now, or something was written to it.
    fn remove(self) {
        let ours = |data: &fs::Metadata| Ok::<_, io::Error>((data.dev(), data.ino(), data.len()));
        let same = self.file.metadata().and_then(|made| Ok(ours(&made)? == ours(&fs::symlink_metadata(&self.place)?)?));
        let empty = self.file.metadata().is_ok_and(|made| made.len() == 0);
        match same {
            Ok(true) if empty => {
                if let Err(e) = fs::remove_file(&self.place) {
                    tracing::warn!("remove {}: {e}", self.place.display());
                }
            }
            _ => tracing::warn!("{} is not what it was: it is left alone", self.place.display()),
        }
    }
}

/// Sees to it that there is a file to mount upon: the one that was made, if none was there.
fn make_place(place: &Path) -> Result<Option<Made>, Error> {
    let refuse = |what: &str| Err(Error::Place(format!("{} {what}", place.display())));
    match fs::metadata(place) {
        Ok(_) if is_mount_point(place) => refuse("is a mount point already: unmount it, or name another file"),
        Ok(data) if data.is_file() => Ok(None),
        Ok(data) if data.is_dir() => refuse("is a directory: name a file in it"),
        Ok(_) => refuse("is no regular file"),
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            let file = File::create_new(place).map_err(Error::step(format!("create {}", place.display())))?;
            Ok(Some(Made { place: place.to_owned(), file }))
        }
        // What a server left that was killed.
        Err(e) if e.kind() == io::ErrorKind::NotConnected => {
            refuse("is the mount of a server that has died: take it away with fusermount3 -u")
        }
        Err(e) => Err(Error::step(format!("look at {}", place.display()))(e)),
    }
}

/// Since Linux 5.8.
fn is_mount_point(place: &Path) -> bool {
    let stat = statx(CWD, place, AtFlags::empty(), StatxFlags::TYPE);
    stat.is_ok_and(|stat| stat.stx_attributes.contains(StatxAttributes::MOUNT_ROOT))
}
