//! The raw view as a plain file, for everybody's tools.

use std::fs::{self, File};
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::thread;

use fuser::{Config, MountOption, Session};
use vdisk_image::Disk;
use vdisk_io::FileSet;

use crate::error::Error;
use crate::stop::{End, Stop};
use crate::view::{Gate, Shape, View};

const THREADS: usize = 8;

/// Serves a disk as the file `place` until `stop` is given or somebody unmounts it. The file is made if there is none, and then
/// removed at the end; what it holds is out of sight meanwhile. Root mounts by itself, others by fusermount3(1). `ready` is told
/// when the file can be opened.
///
/// # Errors
///
/// Why it could not be mounted, or not be unmounted.
pub fn serve(
    disk: Arc<Disk>,
    files: Arc<FileSet>,
    place: &Path,
    ready: impl FnOnce(),
    stop: &Stop,
) -> Result<(), Error> {
    let made = make_place(place)?;
    let served = mounted(disk, files, place, ready, stop);
    if made && let Err(e) = fs::remove_file(place) {
        tracing::warn!("remove {}: {e}", place.display());
    }
    served
}

fn mounted(disk: Arc<Disk>, files: Arc<FileSet>, place: &Path, ready: impl FnOnce(), stop: &Stop) -> Result<(), Error> {
    let mounting = |e: io::Error| {
        let fusermount = e.kind() == io::ErrorKind::NotFound;
        let hint = if fusermount { " (fusermount3 is missing: install the package fuse3)" } else { "" };
        Error::step(format!("mount on {}{hint}", place.display()))(e)
    };
    let gate = Gate::open();
    let read_only = disk.geometry().read_only;
    let view = View::new(disk, files, Shape::File, gate.clone());
    let mut config = Config::default();
    config.n_threads = Some(THREADS);
    config.clone_fd = true;
    config.mount_options = vec![
        MountOption::FSName("vdisk".to_owned()),
        MountOption::Subtype("vdisk".to_owned()),
        MountOption::DefaultPermissions,
        MountOption::NoDev,
        MountOption::NoSuid,
        MountOption::NoExec,
        if read_only { MountOption::RO } else { MountOption::RW },
    ];
    let mut session = Session::new(view, place, &config).map_err(mounting)?;
    let mut unmounter = session.unmount_callable();
    let ends = stop.sender();
    let run = move || {
        let _ = ends.send(End::Unmounted(session.run()));
    };
    thread::Builder::new().name("fuse".to_owned()).spawn(run).map_err(Error::step("start a thread"))?;
    ready();
    let ended = match stop.wait() {
        End::Asked => {
            // What programs have mapped and changed is written back while requests are still served.
            if let Err(e) = File::open(place).and_then(|file| Ok(rustix::fs::syncfs(&file)?)) {
                tracing::warn!("sync {}: {e}", place.display());
            }
            unmounter.unmount().or_else(|e| detach_busy(place, e))
        }
        End::Unmounted(ended) => ended,
    };
    gate.close();
    ended.map_err(Error::step(format!("unmount {}", place.display())))
}

/// Who still has the file open gets errors from now on.
fn detach_busy(place: &Path, busy: io::Error) -> io::Result<()> {
    if busy.raw_os_error() != Some(libc::EBUSY) {
        return Err(busy);
    }
    tracing::warn!("{} is in use: it is taken away all the same", place.display());
    Ok(rustix::mount::unmount(place, rustix::mount::UnmountFlags::DETACH)?)
}

/// Sees to it that there is a file to mount upon. Answers whether it was made.
fn make_place(place: &Path) -> Result<bool, Error> {
    match fs::metadata(place) {
        Ok(data) if data.is_file() => Ok(false),
        Ok(data) if data.is_dir() => {
            Err(Error::Place(format!("{} is a directory: name a file in it", place.display())))
        }
        Ok(_) => Err(Error::Place(format!("{} is no regular file", place.display()))),
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            File::create_new(place).map(|_| true).map_err(Error::step(format!("create {}", place.display())))
        }
        // What a server left that was killed.
        Err(e) if e.kind() == io::ErrorKind::NotConnected => {
            Err(Error::Place(format!("{} is the mount of a server that has died: fusermount3 -u it", place.display())))
        }
        Err(e) => Err(Error::step(format!("look at {}", place.display()))(e)),
    }
}
