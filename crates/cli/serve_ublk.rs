//! The ublk transport: `/dev/ublkbN`.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use vdisk_ublk::{Added, Device};

use crate::failure::{Failure, Result, chain};
use crate::open::Opened;
use crate::options::ZeroCopy;
use crate::signals::Stop;
use crate::state::{State, StateDir};
use crate::transport::{Callbacks, DeviceOptions, End, ServeFailure, WhyKept};

/// How long the driver may take to notice that a server is dead. Before Linux 6.15 that may be the time-out of a request, 30 s.
const NOTICING: Duration = Duration::from_secs(90);
const STEP: Duration = Duration::from_millis(100);

/// Why not, if not.
pub(crate) fn available() -> Result<(), String> {
    vdisk_ublk::available().map(drop).map_err(|e| chain(&e))
}

pub(crate) fn serve(
    image: &Opened,
    options: DeviceOptions,
    callbacks: Callbacks,
    stop: &Stop,
) -> Result<End, ServeFailure> {
    let zero_copy = match options.zero_copy {
        ZeroCopy::Auto => vdisk_ublk::ZeroCopy::Auto,
        ZeroCopy::Off => vdisk_ublk::ZeroCopy::Off,
    };
    let options = vdisk_ublk::Options {
        queues: options.queues,
        depth: options.depth,
        zero_copy,
        recoverable: options.recoverable,
        cookie: options.cookie,
        ..Default::default()
    };
    let (disk, files) = (Arc::clone(&image.disk), Arc::clone(&image.files));
    let Callbacks { added, ready, kept } = callbacks;
    let added = |device: &Added| added(&device.path);
    let ready = |device: &Device| ready(&device.path, Vec::new());
    ended(vdisk_ublk::serve(disk, files, &options, added, ready, armed(stop, kept)))
}

/// Goes on with a device that waits.
pub(crate) fn take_over(image: &Opened, id: u32, callbacks: Callbacks, stop: &Stop) -> Result<End, ServeFailure> {
    let (disk, files) = (Arc::clone(&image.disk), Arc::clone(&image.files));
    let Callbacks { added, ready, kept } = callbacks;
    let begin = |device: &Added| added(&device.path);
    let ready = |device: &Device| ready(&device.path, Vec::new());
    ended(vdisk_ublk::take_over(disk, files, id, begin, ready, armed(stop, kept)))
}

fn armed(stop: &Stop, kept: WhyKept) -> vdisk_ublk::Stop {
    let device_stop = vdisk_ublk::Stop::new();
    let [to_stop, to_let_go, to_grow] = [(); 3].map(|()| device_stop.clone());
    stop.arm(move || to_stop.trigger());
    stop.arm_let_go(move || match kept() {
        None => to_let_go.let_go(),
        Some(why) => tracing::error!("the device is not let go of, another server could not go on with it: {why}"),
    });
    stop.arm_grow(move |size| to_grow.grow(size).map_err(|e| Failure::from_error(&e)));
    device_stop
}

fn ended(result: Result<vdisk_ublk::End, vdisk_ublk::Error>) -> Result<End, ServeFailure> {
    match result {
        Ok(vdisk_ublk::End::Gone) => Ok(End::Gone),
        Ok(vdisk_ublk::End::LetGo) => Ok(End::LetGo),
        Err(e) => Err(ServeFailure {
            failure: Failure::from_error(&e),
            device_may_live: e.device_may_live(),
            device_gone: !e.device_may_exist(),
        }),
    }
}

/// What the driver says of a device in the books, if it still is the same.
fn status(id: u32, state: &State) -> Result<Option<vdisk_ublk::Status>> {
    match vdisk_ublk::status(id) {
        Ok(status) => Ok(status.filter(|s| s.cookie == state.resume.cookie)),
        // Without the driver there is no device either.
        Err(vdisk_ublk::Error::Unavailable(vdisk_ublk::Unavailable::NoDriver)) => Ok(None),
        Err(e) => Err(Failure::from_error(&e)),
    }
}

/// Whether the device waits for another server, its own being dead; `None`: the driver has not noticed that yet.
pub(crate) fn waits(id: u32, state: &State) -> Result<Option<bool>> {
    if state.device_gone {
        return Ok(Some(false));
    }
    Ok(match status(id, state)?.map(|s| s.state) {
        Some(vdisk_ublk::State::Quiesced) => Some(true),
        Some(vdisk_ublk::State::Live) => None,
        _ => Some(false),
    })
}

/// The same, once the driver has noticed. Whoever holds the books then has everybody wait.
pub(crate) fn is_waiting(id: u32, state: &State) -> Result<bool> {
    let deadline = Instant::now() + NOTICING;
    loop {
        if let Some(waits) = waits(id, state)? {
            return Ok(waits);
        }
        let device = state.device.display();
        // Live, because another has taken it over?
        let (states, _) = StateDir::host().read_all()?;
        if let Some(other) = states.iter().find(|s| s.device == state.device && s.pid != state.pid && s.is_live()) {
            return Err(Failure::new(format!("{device} is served by pid {}", other.pid)));
        }
        if Instant::now() >= deadline {
            return Err(Failure::new(format!("the driver does not notice that the server of {device} is dead")));
        }
        thread::sleep(STEP);
    }
}

/// Whether the device, which is served, would wait for another server.
pub(crate) fn is_recoverable(id: u32, state: &State) -> Result<bool> {
    Ok(status(id, state)?.is_some_and(|s| s.recoverable))
}

/// Whether this kernel lets a take-over begin again that was cut short.
pub(crate) fn can_begin_again() -> bool {
    vdisk_ublk::available().is_ok_and(vdisk_ublk::Features::can_begin_again)
}

/// Removes the device of a dead server, unless somebody else has it by now.
pub(crate) fn remove(id: u32, state: &State) -> Result<()> {
    let deadline = Instant::now() + NOTICING;
    while status(id, state)?.is_some() {
        match vdisk_ublk::delete(id) {
            Ok(()) => break,
            Err(vdisk_ublk::Error::Served { .. }) if Instant::now() < deadline => thread::sleep(STEP),
            Err(e) => return Err(Failure::from_error(&e)),
        }
    }
    Ok(())
}
