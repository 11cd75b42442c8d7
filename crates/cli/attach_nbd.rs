//! The kernel's NBD client as a transport: `/dev/nbdN`.

use std::fs;

use vdisk_nbd::kernel::{self, AttachOptions};

use crate::failure::{Failure, Result};
use crate::open::Opened;
use crate::serve_nbd::{Engine, backend_of};
use crate::signals::Stop;
use crate::state::State;
use crate::transport::{DeviceOptions, OnReady, ServeFailure};

/// Why not, if not.
pub(crate) fn available() -> Result<(), String> {
    kernel::available()
}

/// Names the server of an image, to the kernel too: a device is only taken down under the same name.
fn backend_id(image: &str) -> String {
    // sysfs shows a page of it at most.
    let end = image.floor_char_boundary(1024);
    format!("vdisk {}", crate::failure::one_line(&image[..end]))
}

pub(crate) fn serve(
    image: &Opened,
    real_path: &str,
    options: DeviceOptions,
    ready: OnReady,
    stop: &Stop,
) -> Result<(), ServeFailure> {
    let (stopper, stopped) = vdisk_nbd::stop_channel();
    stop.arm(move || stopper.stop());
    let mut attach_options = AttachOptions::new(backend_id(real_path));
    if let Some(queues) = options.queues {
        attach_options.sockets = queues.into();
    }
    let fixed = options.depth.filter(|depth| *depth != 128);
    let notice = fixed.map(|_| "--depth is for ublk only: nbd has 128 requests in flight per queue".to_owned());
    let ready = |device: &kernel::Device| {
        ready(&device.path, device.notices.iter().cloned().chain(notice).collect());
    };
    let served = match Engine::best() {
        Engine::Uring => kernel::attach(&attach_options, backend_of::uring(image), &stopped, ready),
        Engine::Blocking => kernel::attach(&attach_options, backend_of::blocking(image), &stopped, ready),
    };
    // The workers have ended, whatever became of the device.
    served.map_err(|e| ServeFailure { failure: Failure::from_error(&e), device_may_live: false })
}

/// Removes the device of a dead server, unless somebody else has it by now.
pub(crate) fn remove(index: u32, state: &State) -> Result<()> {
    let backend = fs::read_to_string(format!("/sys/block/nbd{index}/backend")).unwrap_or_default();
    if backend.trim_end_matches('\n') != backend_id(&state.image) {
        return Ok(());
    }
    kernel::disconnect(index).map_err(|e| Failure::from_error(&e))?;
    if let Err(e) = kernel::forget_partitions(index) {
        tracing::debug!("open nbd{index}: {e}");
    }
    Ok(())
}
