//! The kernel's NBD client as a transport: `/dev/nbdN`.

use std::cell::Cell;
use std::fs;
use std::path::Path;

use vdisk_nbd::kernel::{self, AttachOptions};

use crate::failure::{Failure, Result};
use crate::open::Opened;
use crate::serve_nbd::{Engine, make_backend};
use crate::signals::Stop;
use crate::state::State;
use crate::transport::{Callbacks, DeviceOptions, ServeFailure, ServerId};

/// Why not, if not.
pub(crate) fn available() -> Result<(), String> {
    kernel::available()
}

/// Names the server to the kernel too: a device is only taken down under the same name. What tells it from other servers
/// of the same image comes first, and so is never cut off.
fn backend_id(server: &ServerId<'_>) -> String {
    let image = crate::failure::one_line(server.image);
    kernel::backend_id(&format!("vdisk {} {} {image}", server.pid, server.start_time))
}

/// The name that the kernel knows a device's server by (since Linux 5.14); none if it is not connected.
fn backend_of(index: u32) -> Option<String> {
    let id = fs::read_to_string(format!("/sys/block/nbd{index}/backend")).ok()?;
    Some(id.strip_suffix('\n').map(str::to_owned).unwrap_or(id))
}

pub(crate) fn serve(
    image: &Opened,
    server: &ServerId<'_>,
    options: DeviceOptions,
    callbacks: Callbacks,
    stop: &Stop,
) -> Result<(), ServeFailure> {
    let (stopper, stopped) = vdisk_nbd::stop_channel();
    stop.arm(move || stopper.stop());
    let id = backend_id(server);
    let mut attach_options = AttachOptions::new(&id);
    if let Some(queues) = options.queues {
        attach_options.sockets = queues.into();
    }
    let fixed = options.depth.filter(|depth| *depth != 128);
    let notice = fixed.map(|_| "--depth is for ublk only: nbd has 128 requests in flight per queue".to_owned());
    let made = Cell::new(None);
    let connected = |index, path: &Path| {
        made.set(Some(index));
        let id = id.clone();
        stop.arm_grow(move |size| kernel::grow(index, size, &id).map_err(|e| Failure::from_error(&e)));
        (callbacks.added)(path);
    };
    let ready = |device: &kernel::Device| {
        (callbacks.ready)(&device.path, device.notices.iter().cloned().chain(notice).collect());
    };
    let served = match Engine::best() {
        Engine::Uring => kernel::attach(&attach_options, make_backend::uring(image), &stopped, connected, ready),
        Engine::Blocking => kernel::attach(&attach_options, make_backend::blocking(image), &stopped, connected, ready),
    };
    served.map_err(|e| {
        let device_gone = made.get().and_then(backend_of).is_none_or(|now| now != id);
        // The workers have ended, whatever became of the device.
        ServeFailure { failure: Failure::from_error(&e), device_may_live: false, device_gone }
    })
}

/// Removes the device of a dead server, unless somebody else has it by now.
pub(crate) fn remove(index: u32, state: &State) -> Result<()> {
    if backend_of(index) != Some(backend_id(&state.server())) {
        return Ok(());
    }
    kernel::disconnect(index).map_err(|e| Failure::from_error(&e))?;
    if let Err(e) = kernel::forget_partitions(index) {
        tracing::debug!("open nbd{index}: {e}");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn servers_of_the_same_image_have_different_names() {
        let id = |pid, start_time| backend_id(&ServerId { pid, start_time, image: "/a\nb.vmdk" });
        assert_eq!(id(7, 1234), "vdisk 7 1234 /a\\nb.vmdk");
        assert_ne!(id(7, 1234), id(7, 1235));
    }

    #[test]
    fn a_long_name_is_cut_at_its_end_and_between_characters() {
        let image = "/\u{20ac}".repeat(200);
        let id = backend_id(&ServerId { pid: u32::MAX, start_time: u64::MAX, image: &image });
        assert!(id.starts_with("vdisk 4294967295 18446744073709551615 /"), "{id}");
        assert!((252..=255).contains(&id.len()), "{}", id.len());
    }
}
