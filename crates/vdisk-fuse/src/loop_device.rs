//! Loop devices: drivers/block/loop.c, include/uapi/linux/loop.h.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use linux_raw_sys::loop_device as sys;
use rustix::fs::{CWD, FileType, Mode, makedev, mknodat};

use crate::error::Error;

const CONTROL: &str = "/dev/loop-control";
/// How often to look for another free device when somebody was faster.
const ATTEMPTS: usize = 64;

#[allow(unsafe_code, missing_docs, reason = "the macros make unsafe functions")]
mod ioctl {
    use super::sys;

    nix::ioctl_none_bad!(get_free, sys::LOOP_CTL_GET_FREE);
    nix::ioctl_write_ptr_bad!(configure, sys::LOOP_CONFIGURE, sys::loop_config);
    nix::ioctl_write_ptr_bad!(set_status, sys::LOOP_SET_STATUS64, sys::loop_info64);
    nix::ioctl_none_bad!(set_capacity, sys::LOOP_SET_CAPACITY);
    nix::ioctl_none_bad!(clear, sys::LOOP_CLR_FD);
}

/// `/dev/loopN`
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct LoopDevice(pub(crate) u32);

/// Whether there are loop devices, and this process may make one.
///
/// # Errors
///
/// What is missing.
pub(crate) fn available() -> Result<(), Error> {
    open_control().map(drop).map_err(|source| Error::Unavailable { what: CONTROL, source })
}

fn open_control() -> io::Result<File> {
    File::options().read(true).write(true).open(CONTROL)
}

/// How to make a device.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Setup {
    pub(crate) read_only: bool,
}

impl LoopDevice {
    /// Binds a free device to a file, without a look for partitions. The device is unbound when the descriptor that comes with it
    /// is closed, unless [`LoopDevice::keep`] was called: a server that is killed before anybody knows of the device leaves
    /// nothing.
    ///
    /// # Errors
    ///
    /// The host's, by step.
    pub(crate) fn bind(file: &File, setup: Setup) -> Result<(Self, File), Error> {
        let control = open_control().map_err(Error::step(format!("open {CONTROL}")))?;
        let mut last = io::Error::from(io::ErrorKind::ResourceBusy);
        for _ in 0..ATTEMPTS {
            #[expect(unsafe_code, reason = "an ioctl without argument")]
            // SAFETY: LOOP_CTL_GET_FREE takes no argument; the descriptor is open.
            let number = unsafe { ioctl::get_free(control.as_raw_fd()) };
            let number = number.map_err(Error::step("find a free loop device"))?;
            let device = Self(u32::try_from(number).unwrap_or_default());
            let node =
                device.open(setup.read_only).map_err(Error::step(format!("open {}", device.path().display())))?;
            let config = sys::loop_config {
                fd: file.as_raw_fd().cast_unsigned(),
                block_size: 512,
                info: info(setup.flags() | sys::LO_FLAGS_AUTOCLEAR as u32),
                __reserved: [0; 8],
            };
            #[expect(unsafe_code, reason = "an ioctl with a struct")]
            // SAFETY: LOOP_CONFIGURE reads a `loop_config`, and this is one; both descriptors are open.
            match unsafe { ioctl::configure(node.as_raw_fd(), &config) } {
                Ok(_) => return Ok((device, node)),
                // Somebody else has it by now.
                Err(nix::errno::Errno::EBUSY) => last = nix::errno::Errno::EBUSY.into(),
                Err(e) => return Err(Error::step(format!("bind {}", device.path().display()))(e)),
            }
        }
        Err(Error::step("find a free loop device")(last))
    }

    /// Makes the device stay, and the kernel look for partitions; their nodes are there on return where the kernel makes nodes
    /// at all.
    ///
    /// # Errors
    ///
    /// The host's.
    pub(crate) fn keep(node: &File, setup: Setup) -> io::Result<()> {
        let info = info(setup.flags() | sys::LO_FLAGS_PARTSCAN as u32);
        #[expect(unsafe_code, reason = "an ioctl with a struct")]
        // SAFETY: LOOP_SET_STATUS64 reads a `loop_info64`, and this is one; the descriptor is open.
        unsafe { ioctl::set_status(node.as_raw_fd(), &info) }?;
        Ok(())
    }

    /// Gives the device the size that the kernel knows of the file, which has this name, and makes sure that it is `size`.
    ///
    /// # Errors
    ///
    /// The host's.
    pub(crate) fn grow(self, file: &str, size: u64) -> io::Result<()> {
        let node = self.open(true)?;
        // As long as we have it open its number cannot go to another file.
        if !self.is_bound_to(file)? {
            return Err(io::Error::other("somebody has unbound it"));
        }
        #[expect(unsafe_code, reason = "an ioctl without argument")]
        // SAFETY: LOOP_SET_CAPACITY takes no argument; the descriptor is open.
        unsafe { ioctl::set_capacity(node.as_raw_fd()) }?;
        let sectors = fs::read_to_string(format!("/sys/block/loop{}/size", self.0))?;
        match sectors.trim_end().parse::<u64>() {
            Ok(sectors) if sectors != size / 512 => {
                Err(io::Error::other(format!("the kernel leaves it at {sectors} sectors, the file has {size} bytes")))
            }
            _ => Ok(()),
        }
    }

    /// Unbinds the device from its file: at once if nobody has it open, else when the last one closes it. Answers whether it
    /// is unbound now. With `sync`, what its page cache holds is written before: later there may be nobody to take it.
    ///
    /// # Errors
    ///
    /// The host's. What could not be written is lost, the device is unbound all the same.
    pub(crate) fn clear(self, file: &str, sync: bool) -> io::Result<bool> {
        let node = match self.open(true) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(true),
            node => node?,
        };
        // As long as we have it open its number cannot go to another file.
        if !self.is_bound_to(file)? {
            return Ok(true);
        }
        let synced = if sync { node.sync_all() } else { Ok(()) };
        #[expect(unsafe_code, reason = "an ioctl without argument")]
        // SAFETY: LOOP_CLR_FD takes no argument; the descriptor is open.
        match unsafe { ioctl::clear(node.as_raw_fd()) } {
            // Unbound between our look and now.
            Ok(_) | Err(nix::errno::Errno::ENXIO) => {}
            Err(e) => return Err(e.into()),
        }
        // The kernel acts when the last descriptor is closed, which may be this one.
        drop(node);
        synced.and_then(|()| Ok(!self.is_bound_to(file)?))
    }

    /// Whether the file behind the device has this name, in whatever mount.
    ///
    /// # Errors
    ///
    /// The host's, if sysfs does not tell.
    pub(crate) fn is_bound_to(self, name: &str) -> io::Result<bool> {
        match fs::read_to_string(format!("/sys/block/loop{}/loop/backing_file", self.0)) {
            Ok(backing) => Ok(Path::new(backing.trim_end_matches('\n')).file_name().is_some_and(|found| found == name)),
            // Unbound, or no such device: ENODEV while it is being unbound.
            Err(e) if is_gone(&e) && Path::new("/sys/block").exists() => Ok(false),
            Err(e) => Err(e),
        }
    }

    pub(crate) fn path(self) -> PathBuf {
        PathBuf::from(format!("/dev/loop{}", self.0))
    }

    fn open(self, read_only: bool) -> io::Result<File> {
        let open = || File::options().read(true).write(!read_only).open(self.path());
        match open() {
            Err(e) if e.kind() == io::ErrorKind::NotFound => self.make_node().and_then(|()| open()),
            opened => opened,
        }
    }

    /// A container has the nodes that were there when it was made: a new device's may be missing.
    fn make_node(self) -> io::Result<()> {
        let number = fs::read_to_string(format!("/sys/block/loop{}/dev", self.0))?;
        let number = number.trim_end().split_once(':').and_then(|(a, b)| Some((a.parse().ok()?, b.parse().ok()?)));
        let (major, minor) = number.ok_or(io::ErrorKind::InvalidData)?;
        let mode = Mode::RUSR | Mode::WUSR | Mode::RGRP | Mode::WGRP;
        Ok(mknodat(CWD, self.path(), FileType::BlockDevice, mode, makedev(major, minor))?)
    }
}

fn is_gone(e: &io::Error) -> bool {
    e.kind() == io::ErrorKind::NotFound || e.raw_os_error() == Some(libc::ENODEV)
}

impl Setup {
    fn flags(self) -> u32 {
        let read_only = if self.read_only { sys::LO_FLAGS_READ_ONLY as u32 } else { 0 };
        read_only | sys::LO_FLAGS_DIRECT_IO as u32
    }
}

fn info(flags: u32) -> sys::loop_info64 {
    sys::loop_info64 {
        lo_device: 0,
        lo_inode: 0,
        lo_rdevice: 0,
        lo_offset: 0,
        lo_sizelimit: 0,
        lo_number: 0,
        lo_encrypt_type: 0,
        lo_encrypt_key_size: 0,
        lo_flags: flags,
        lo_file_name: [0; 64],
        lo_crypt_name: [0; 64],
        lo_encrypt_key: [0; 32],
        lo_init: [0; 2],
    }
}
