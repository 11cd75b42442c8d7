//! A loop device on the raw view in a FUSE mount: `/dev/loopN`.

use std::cell::Cell;
use std::path::Path;
use std::sync::Arc;

use vdisk_fuse::Options;

use crate::failure::{Failure, Result, chain};
use crate::open::Opened;
use crate::signals::Stop;
use crate::state::State;
use crate::transport::{Callbacks, DeviceOptions, ServeFailure, ServerId};

/// Why not, if not.
pub(crate) fn available() -> Result<(), String> {
    vdisk_fuse::available().map_err(|e| chain(&e))
}

/// The name of the file behind the device: what `losetup` shows, and by what a server knows its own device again. What tells it
/// from other servers of the same image comes first, and so is never cut off.
fn file_name(server: &ServerId<'_>) -> String {
    let image = Path::new(server.image).file_name().unwrap_or_default().to_string_lossy();
    let mut name = format!("vdisk {} {} {}", server.pid, server.start_time, crate::failure::one_line(&image));
    name.truncate(name.floor_char_boundary(255));
    name
}

pub(crate) fn serve(
    image: &Opened,
    server: &ServerId<'_>,
    options: DeviceOptions,
    callbacks: Callbacks,
    stop: &Stop,
) -> Result<(), ServeFailure> {
    let (stopper, stopped) = vdisk_fuse::stop_channel();
    let grower = stopper.clone();
    stop.arm(move || stopper.stop());
    stop.arm_grow(move |size| grower.grow(size).map_err(|e| Failure::from_error(&e)));
    let notice = options.depth.map(|_| "--depth is for ublk only: a loop device has 128 requests in flight".to_owned());
    let options = Options { name: file_name(server), threads: options.queues.map(usize::from) };
    let made = Cell::new(None);
    let added = |path: &Path| {
        made.set(number(path));
        (callbacks.added)(path);
    };
    let ready = |path: &Path| (callbacks.ready)(path, notice.into_iter().collect());
    let (disk, files) = (Arc::clone(&image.disk), Arc::clone(&image.files));
    vdisk_fuse::attach(disk, files, &options, added, ready, &stopped).map_err(|e| ServeFailure {
        failure: Failure::from_error(&e),
        // Requests are let through to the disk no more.
        device_may_live: false,
        device_gone: made.get().is_none_or(|number| !vdisk_fuse::bound_to(number, &options.name)),
    })
}

fn number(device: &Path) -> Option<u32> {
    device.file_name()?.to_str()?.strip_prefix("loop")?.parse().ok()
}

/// Removes the device of a dead server, unless somebody else has it by now. One that is still in use goes when it is not.
pub(crate) fn remove(number: u32, state: &State) -> Result<()> {
    let gone = vdisk_fuse::remove(number, &file_name(&state.server())).map_err(|e| Failure::from_error(&e))?;
    if !gone {
        crate::notice(&stays(state));
    }
    Ok(())
}

fn stays(state: &State) -> String {
    let device = state.device.display();
    format!("{device} is still open: it answers with errors until its last user closes it, and is gone then")
}

/// Waits until nobody looks at the device any more that its server has given up.
///
/// # Errors
///
/// Somebody opened it meanwhile, and keeps it.
pub(crate) fn wait_until_gone(number: u32, state: &State) -> Result<()> {
    match vdisk_fuse::unbound(number, &file_name(&state.server())) {
        Ok(true) => Ok(()),
        Ok(false) => Err(Failure::new(stays(state))),
        Err(e) => Err(Failure::from_error(&e)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn servers_of_the_same_image_have_different_names() {
        let name = |pid, start_time| file_name(&ServerId { pid, start_time, image: "/dir/a\nb.vmdk" });
        assert_eq!(name(7, 1234), "vdisk 7 1234 a\\nb.vmdk");
        assert_ne!(name(7, 1234), name(7, 1235));
    }

    #[test]
    fn a_long_name_is_cut_at_its_end_and_between_characters() {
        let image = "\u{20ac}".repeat(85);
        let name = file_name(&ServerId { pid: u32::MAX, start_time: u64::MAX, image: &image });
        assert!(name.starts_with("vdisk 4294967295 18446744073709551615 \u{20ac}"), "{name}");
        assert!((252..=255).contains(&name.len()), "{}", name.len());
    }

    #[test]
    fn a_device_has_its_number_in_its_name() {
        assert_eq!(number(Path::new("/dev/loop12")), Some(12));
        assert_eq!(number(Path::new("/dev/loop1p2")), None);
    }
}
