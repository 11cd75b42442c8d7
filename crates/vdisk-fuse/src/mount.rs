//! A mount that is nowhere: reached through a descriptor, gone with its last user.

use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;

use rustix::fs::{Mode, OFlags, openat};
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsconfig_set_string, fsmount, fsopen};

use crate::error::Error;

/// The device through which a file system talks to the kernel.
const DEVICE: &str = "/dev/fuse";

/// Whether this process may make such a mount.
///
/// # Errors
///
/// What is missing.
pub(crate) fn available() -> Result<(), Error> {
    device_available()?;
    let missing = |e: rustix::io::Errno| Error::Unavailable { what: "mount a FUSE file system", source: e.into() };
    fsopen("fuse", FsOpenFlags::FSOPEN_CLOEXEC).map(drop).map_err(missing)
}

/// Whether there is FUSE for this process.
///
/// # Errors
///
/// [`Error::Unavailable`].
pub(crate) fn device_available() -> Result<(), Error> {
    open_device().map(drop).map_err(|source| Error::Unavailable { what: DEVICE, source })
}

fn open_device() -> io::Result<File> {
    File::options().read(true).write(true).open(DEVICE)
}

/// A file system that nobody serves yet: its mount, and the kernel's end for whoever will.
pub(crate) fn detached() -> io::Result<(OwnedFd, OwnedFd)> {
    let device = OwnedFd::from(open_device()?);
    let context = fsopen("fuse", FsOpenFlags::FSOPEN_CLOEXEC)?;
    // Decimal numbers but for the mode, as fs/fuse/inode.c reads them.
    for (key, value) in [
        ("source", "vdisk".to_owned()),
        ("subtype", "vdisk".to_owned()),
        ("fd", device.as_raw_fd().to_string()),
        ("rootmode", format!("{:o}", libc::S_IFDIR)),
        ("user_id", rustix::process::geteuid().as_raw().to_string()),
        ("group_id", rustix::process::getegid().as_raw().to_string()),
    ] {
        fsconfig_set_string(&context, key, &*value)?;
    }
    fsconfig_create(&context)?;
    let none = MountAttrFlags::MOUNT_ATTR_NODEV | MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    Ok((fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, none)?, device))
}

/// Opens the file of a mount that is being served.
pub(crate) fn open_file(mount: &OwnedFd, name: &OsStr, read_only: bool) -> io::Result<File> {
    let access = if read_only { OFlags::RDONLY } else { OFlags::RDWR };
    Ok(openat(mount, Path::new(name), access | OFlags::CLOEXEC | OFlags::NOFOLLOW, Mode::empty())?.into())
}
