//! The ublk transport: `/dev/ublkbN`.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use crate::failure::{Failure, Result, chain};
use crate::open::Opened;
use crate::options::ZeroCopy;
use crate::signals::Stop;
use crate::state::State;
use crate::transport::{Callbacks, DeviceOptions, ServeFailure};

/// How long the driver may take to notice that a server is dead.
const NOTICING: Duration = Duration::from_secs(10);

/// Why not, if not.
pub(crate) fn available() -> Result<(), String> {
    vdisk_ublk::available().map(drop).map_err(|e| chain(&e))
}

pub(crate) fn serve(
    image: &Opened,
    options: DeviceOptions,
    callbacks: Callbacks,
    stop: &Stop,
) -> Result<(), ServeFailure> {
    let device_stop = vdisk_ublk::Stop::new();
    let armed = device_stop.clone();
    stop.arm(move || armed.trigger());
    let zero_copy = match options.zero_copy {
        ZeroCopy::Auto => vdisk_ublk::ZeroCopy::Auto,
        ZeroCopy::Off => vdisk_ublk::ZeroCopy::Off,
    };
    let options = vdisk_ublk::Options { queues: options.queues, depth: options.depth, zero_copy, ..Default::default() };
    let (disk, files) = (Arc::clone(&image.disk), Arc::clone(&image.files));
    let added = |device: &vdisk_ublk::Added| (callbacks.added)(&device.path);
    let ready = |device: &vdisk_ublk::Device| (callbacks.ready)(&device.path, Vec::new());
    vdisk_ublk::serve(disk, files, &options, added, ready, device_stop).map_err(|e| ServeFailure {
        failure: Failure::from_error(&e),
        device_may_live: e.device_may_live(),
        device_gone: !e.device_may_exist(),
    })
}

/// Removes the device of a dead server, unless somebody else has it by now.
pub(crate) fn remove(id: u32, state: &State) -> Result<()> {
    let deadline = Instant::now() + NOTICING;
    loop {
        match vdisk_ublk::delete(id) {
            // Without the driver there is no device either.
            Ok(()) | Err(vdisk_ublk::Error::Unavailable(vdisk_ublk::Unavailable::NoDriver)) => return Ok(()),
            // Another's by now. While the driver is about to notice a death, it names no process at all (-1): that is ours.
            Err(vdisk_ublk::Error::Served { pid, .. })
                if u32::try_from(pid).is_ok_and(|pid| ![0, state.pid].contains(&pid)) =>
            {
                return Ok(());
            }
            Err(vdisk_ublk::Error::Served { .. }) if Instant::now() < deadline => thread::sleep(NOTICING / 50),
            Err(e) => return Err(Failure::from_error(&e)),
        }
    }
}
