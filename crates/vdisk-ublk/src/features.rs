//! Whether there is ublk here, and what it can do.

use std::fs::OpenOptions;
use std::io;

use io_uring::IoUring;
use libublk::ctrl::UblkCtrl;
use libublk::sys;

const CONTROL: &str = "/dev/ublk-control";

/// What the driver can do.
///
/// What uses a flag has to look here first, for libublk asks for what it is told to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Features(u64);

impl Features {
    /// The driver's answer to `UBLK_U_CMD_GET_FEATURES`: the `UBLK_F_*` bits of include/uapi/linux/ublk_cmd.h.
    pub fn bits(self) -> u64 {
        self.0
    }

    /// The flags of a device that outlives its server, with requests that wait and are sent again; 0 if it cannot (before
    /// Linux 6.1).
    pub(crate) fn recovery(self) -> u64 {
        let flags = RECOVERY & self.0;
        if flags == RECOVERY { flags } else { 0 }
    }

    /// Whether a take-over that was cut short can be begun again. Linux 6.15 does; the flag is of 6.16. Earlier ones refuse it,
    /// or, if some of the queues were there already, oops.
    pub fn can_begin_again(self) -> bool {
        self.0 & u64::from(sys::UBLK_F_QUIESCE) != 0
    }

    /// Whether the size of a device may change while it is served (Linux 6.16).
    pub(crate) fn can_grow(self) -> bool {
        self.0 & u64::from(sys::UBLK_F_UPDATE_SIZE) != 0
    }

    /// What to ask for so that the pages of requests are used where they are; 0 if this driver has not all of it (Linux 6.16).
    pub(crate) fn zero_copy(self) -> u64 {
        if self.0 & ZERO_COPY == ZERO_COPY { ZERO_COPY } else { 0 }
    }
}

/// Requests wait for the next server, and those that the dead one had taken are sent again.
pub(crate) const RECOVERY: u64 = (sys::UBLK_F_USER_RECOVERY | sys::UBLK_F_USER_RECOVERY_REISSUE) as u64;

/// The driver puts the pages of each request into the ring's table of buffers (AUTO_BUF_REG, which wants SUPPORT_ZERO_COPY), and
/// lets them be read and written through the char device, for bytes that are in no file as they are.
pub(crate) const ZERO_COPY: u64 =
    (sys::UBLK_F_SUPPORT_ZERO_COPY | sys::UBLK_F_AUTO_BUF_REG | sys::UBLK_F_USER_COPY) as u64;

/// Why there is no ublk, and what to do about it.
#[derive(Debug, thiserror::Error)]
pub enum Unavailable {
    /// The driver's control device does not exist.
    #[error(
        "no {CONTROL}: load the driver with \"modprobe ublk_drv\" (Linux 6.5 or later, CONFIG_BLK_DEV_UBLK; some \
         distributions keep it in a package of extra modules)"
    )]
    NoDriver,
    /// The control device cannot be opened.
    #[error("open {CONTROL}: {0}: run as root (and let a container have the device)")]
    NoAccess(#[source] io::Error),
    /// io_uring is forbidden or missing.
    #[error("io_uring: {0}: set the sysctl kernel.io_uring_disabled to 0, or lift the container's seccomp filter")]
    NoUring(#[source] io::Error),
    /// The driver does not say what it can do.
    #[error("the ublk driver does not tell its features: Linux 6.5 or later is needed")]
    TooOld,
}

/// Asks whether ublk can be used by this process, without making a device.
///
/// The driver is a module on most systems. It is not loaded here.
///
/// # Errors
///
/// The first of the causes above that holds.
pub fn available() -> Result<Features, Unavailable> {
    OpenOptions::new().read(true).write(true).open(CONTROL).map_err(|e| match e.raw_os_error() {
        // No node, or a node without a driver.
        Some(libc::ENOENT | libc::ENXIO | libc::ENODEV) => Unavailable::NoDriver,
        _ => Unavailable::NoAccess(e),
    })?;
    IoUring::new(2).map_err(Unavailable::NoUring)?;
    UblkCtrl::get_features().map(Features).ok_or(Unavailable::TooOld)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn recovery_is_asked_for_as_a_whole_or_not_at_all() {
        // include/uapi/linux/ublk_cmd.h; GET_FEATURES of Linux 6.12 and 7.3.
        assert_eq!(RECOVERY, 1 << 3 | 1 << 4);
        assert_eq!([0x1fe, 0x1f_ffff, 0, 1 << 3].map(|f| Features(f).recovery()), [RECOVERY, RECOVERY, 0, 0]);
        assert_eq!([0x1fe, 0x1f_ffff].map(|f| Features(f).can_begin_again()), [false, true]);
        assert_eq!([0x1fe, 0x1f_ffff, 1 << 10].map(|f| Features(f).can_grow()), [false, true, true]);
    }

    #[test]
    fn says_what_to_do() {
        assert!(Unavailable::NoDriver.to_string().contains("modprobe ublk_drv"));
        let e = io::Error::from_raw_os_error(libc::EPERM);
        assert!(Unavailable::NoUring(e).to_string().contains("io_uring_disabled"));
    }

    #[test]
    fn zero_copy_is_asked_for_whole_or_not_at_all() {
        // include/uapi/linux/ublk_cmd.h: bits 0, 7 and 11.
        assert_eq!(ZERO_COPY, 0x881);
        // Linux 7.3, Linux 6.12, and one without USER_COPY.
        assert_eq!(Features(0x1f_ffff).zero_copy(), 0x881);
        assert_eq!(Features(0x1fe).zero_copy(), 0);
        assert_eq!(Features(0x801).zero_copy(), 0);
    }

    #[test]
    fn without_a_control_device_there_is_no_driver() {
        if !std::path::Path::new(CONTROL).exists() {
            assert!(matches!(available(), Err(Unavailable::NoDriver)));
        }
    }
}
