//! Devices of other processes, and those whose process has died.

use std::fs::{self, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use libublk::ctrl::UblkCtrl;
use libublk::{UblkError, sys};

use crate::error::Error;
use crate::features::{RECOVERY, available};
use crate::{node, run_dir};

/// What the driver says of a device (`UBLK_S_DEV_*`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Not started yet, or stopped, or its server died and nobody may take over.
    Dead,
    /// Being served.
    Live,
    /// Its server died or let go, and another may take over.
    Quiesced,
    /// As [`State::Quiesced`], but requests fail meanwhile.
    Failing,
    /// A state that is not known here.
    Unknown(u16),
}

/// A device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Status {
    /// What state it is in.
    pub state: State,
    /// The process that serves or served it.
    pub server: i32,
    /// Whether it waits for another server when its own dies.
    pub recoverable: bool,
    /// What it was given when it was made ([`crate::Options::cookie`]).
    pub cookie: u64,
}

impl Status {
    /// Of a device that waits, the driver itself says that nobody serves it: the number of its server may be another process's by now.
    fn is_served(&self, is_running: impl FnOnce(i32) -> bool) -> bool {
        match self.state {
            State::Live => true,
            State::Quiesced | State::Failing => false,
            State::Dead | State::Unknown(_) => is_running(self.server),
        }
    }
}

/// The state of the device with the number `id`, or `None` if there is none.
///
/// # Errors
///
/// [`Error::Unavailable`], or the driver's.
pub fn status(id: u32) -> Result<Option<Status>, Error> {
    available()?;
    Ok(open(id)?.map(|control| status_of(&control)))
}

/// Removes a device that nobody serves any more, and what libublk noted about it. Nothing happens if there is none.
///
/// Removes any device of the driver by that number: that it is the right one is the caller's to know. Does not wait for
/// those who still have it open or mounted; its number stays taken until they let go.
///
/// # Errors
///
/// [`Error::Served`] for a device that is live, or whose process is: between ADD_DEV and START_DEV, and between STOP_DEV and
/// DEL_DEV, the driver calls a device dead that its server is still about. [`Error::Unavailable`], or the driver's.
pub fn delete(id: u32) -> Result<(), Error> {
    available()?;
    if let Some(control) = open(id)? {
        let status = status_of(&control);
        if status.is_served(is_running) {
            return Err(Error::Served { id, pid: status.server });
        }
        delete_device(&control)?;
    }
    run_dir::forget(id);
    Ok(())
}

/// Whether the block device, or a partition of it, is mounted or otherwise held (by device mapper, as swap): an exclusive
/// open is refused. Somebody who merely has it open does not count.
///
/// # Errors
///
/// The host's; [`io::ErrorKind::NotFound`] if there is no such device.
pub fn is_busy(id: u32) -> io::Result<bool> {
    match OpenOptions::new().read(true).custom_flags(libc::O_EXCL).open(node::path(id)) {
        Ok(_) => Ok(false),
        Err(e) if e.raw_os_error() == Some(libc::EBUSY) => Ok(true),
        Err(e) => Err(e),
    }
}

/// Stops a device of this process from outside its control thread. libublk's control needs a ring of the calling thread,
/// which only a control that was made by it has.
pub(crate) fn stop_anyway(id: u32) -> Result<(), Error> {
    let Some(control) = open(id)? else { return Ok(()) };
    control.kill_dev().map(|_| ()).map_err(Error::control("STOP_DEV"))
}

/// Removes a device of this process that did not end by itself.
pub(crate) fn delete_anyway(id: u32) -> Result<(), Error> {
    open(id)?.map_or(Ok(()), |control| delete_device(&control))
}

/// Removes the device without waiting for its last user, if the kernel can (6.9).
pub(crate) fn delete_device(control: &UblkCtrl) -> Result<(), Error> {
    let answer = match control.del_dev_async() {
        Err(UblkError::UringIOError(e)) if e == -libc::EOPNOTSUPP || e == -libc::ENOTSUP => control.del_dev(),
        answer => answer,
    };
    match answer {
        Ok(_) => Ok(()),
        // Somebody else was faster.
        Err(e) if is_gone(&e) => Ok(()),
        Err(e) => Err(Error::control("DEL_DEV")(e)),
    }
}

/// Whether there is a process of that number, other than one that has ended and was not waited for.
fn is_running(pid: i32) -> bool {
    let Ok(pid) = u32::try_from(pid) else { return false };
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // The name, which comes before, may hold anything.
    let state = stat.rsplit_once(')').and_then(|(_, rest)| rest.trim_start().chars().next());
    state.is_some_and(|state| !['Z', 'X'].contains(&state))
}

/// Looks below /sys first, so that nothing is made for a device that does not exist.
pub(crate) fn open(id: u32) -> Result<Option<UblkCtrl>, Error> {
    let Some(number) = i32::try_from(id).ok() else { return Ok(None) };
    let devices = Path::new("/sys/class/ublk-char");
    if devices.exists() && !devices.join(format!("ublkc{id}")).exists() {
        return Ok(None);
    }
    let _stand_in = run_dir::stand_in(id);
    match UblkCtrl::new_simple(number) {
        Ok(control) => Ok(Some(control)),
        Err(e) if is_gone(&e) => Ok(None),
        Err(e) => Err(Error::control("GET_DEV_INFO")(e)),
    }
}

/// The driver answers ENODEV for a number without a device. Drivers without the old opcodes answer libublk's second try
/// with EOPNOTSUPP, which hides that.
fn is_gone(e: &UblkError) -> bool {
    matches!(e, UblkError::UringIOError(r) if [-libc::ENODEV, -libc::ENOENT, -libc::EOPNOTSUPP].contains(r))
}

fn status_of(control: &UblkCtrl) -> Status {
    let info = control.dev_info();
    Status {
        state: state(info.state),
        server: info.ublksrv_pid,
        recoverable: info.flags & RECOVERY == RECOVERY,
        cookie: info.ublksrv_flags,
    }
}

pub(crate) fn state(state: u16) -> State {
    match u32::from(state) {
        sys::UBLK_S_DEV_DEAD => State::Dead,
        sys::UBLK_S_DEV_LIVE => State::Live,
        sys::UBLK_S_DEV_QUIESCED => State::Quiesced,
        sys::UBLK_S_DEV_FAIL_IO => State::Failing,
        _ => State::Unknown(state),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::host_error;

    #[test]
    fn states_are_the_drivers() {
        // include/uapi/linux/ublk_cmd.h
        let all = [State::Dead, State::Live, State::Quiesced, State::Failing, State::Unknown(4)];
        assert_eq!([0, 1, 2, 3, 4].map(state), all);
    }

    #[test]
    fn a_waiting_device_is_not_served_whoever_has_the_number_of_its_server() {
        let is_served = |state, runs| Status { state, server: 1, recoverable: true, cookie: 7 }.is_served(|_| runs);
        assert!(is_served(State::Live, false) && is_served(State::Dead, true));
        assert!(!is_served(State::Quiesced, true) && !is_served(State::Dead, false));
    }

    #[test]
    fn a_process_runs_until_it_is_a_zombie() {
        assert!(is_running(i32::try_from(std::process::id()).unwrap()));
        assert!(!is_running(-1));
        let mut child = std::process::Command::new("true").spawn().unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        let end = std::time::Instant::now() + std::time::Duration::from_secs(60);
        while is_running(pid) {
            assert!(std::time::Instant::now() < end);
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        child.wait().unwrap();
    }

    #[test]
    fn a_device_that_does_not_exist_is_not_busy_but_missing() {
        assert_eq!(is_busy(u32::MAX).map_err(|e| e.kind()), Err(io::ErrorKind::NotFound));
    }

    #[test]
    fn a_device_that_was_deleted_by_somebody_else_is_gone() {
        assert!(is_gone(&UblkError::UringIOError(-libc::ENODEV)));
        assert!(!is_gone(&UblkError::UringIOError(-libc::EPERM)));
        assert_eq!(host_error(UblkError::OtherError(-libc::EIO)).raw_os_error(), Some(libc::EIO));
    }
}
