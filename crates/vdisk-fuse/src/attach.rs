//! `/dev/loopN` on the raw view.

use std::ffi::OsString;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use vdisk_image::Disk;
use vdisk_io::FileSet;

use crate::error::Error;
use crate::loop_device::{self, LoopDevice, Setup};
use crate::mount;
use crate::session::{self, Grower, THREADS};
use crate::stop::{End, Stop};
use crate::view::{Gate, Shape, View};

/// How long a look by udev or blkid may keep the device.
const GLANCE: Duration = Duration::from_secs(3);

/// How to make a device.
#[derive(Clone, Debug)]
pub struct Options {
    /// The name of the file behind the device, by which [`remove`] knows the device again: it has to be the server's own. No
    /// `/`, at most 255 bytes.
    pub name: String,
    /// Threads that serve requests, each one at a time; `None` for a good number.
    pub threads: Option<usize>,
}

/// Whether this kernel has what it takes, and this process may use it.
///
/// # Errors
///
/// What is missing.
pub fn available() -> Result<(), Error> {
    mount::available().and_then(|()| loop_device::available())
}

/// Serves a disk as a loop device until `stop` is given or somebody unbinds the device. `added` is told the device's path as
/// soon as the device is bound, `ready` when its partitions are there too. On return no request is under way and none
/// will reach the disk. The device is unbound, or will be when its last user closes it.
///
/// # Errors
///
/// Why there is no device, or why it could not be unbound ([`bound_to`] tells whether it still is).
pub fn attach(
    disk: Arc<Disk>,
    files: Arc<FileSet>,
    options: &Options,
    added: impl FnOnce(&Path),
    ready: impl FnOnce(&Path),
    stop: &Stop,
) -> Result<(), Error> {
    let setup = Setup { read_only: disk.geometry().read_only };
    let gate = Gate::open();
    let view = View::new(disk, files, Shape::Behind(OsString::from(&options.name)), gate.clone());
    let (mount, kernel) = mount::detached().map_err(Error::step("mount a FUSE file system"))?;
    let grower = session::serve_detached(view, &mount, kernel, options.threads.unwrap_or(THREADS), stop)?;
    let served = bind(&mount, options, setup).and_then(|bound| {
        // From here on the device alone keeps the mount.
        drop(mount);
        serve(bound, options, setup, &grower, added, ready, stop)
    });
    gate.close();
    served
}

fn bind(mount: &OwnedFd, options: &Options, setup: Setup) -> Result<(LoopDevice, File), Error> {
    let file = mount::open_file(mount, options.name.as_ref(), setup.read_only);
    LoopDevice::bind(&file.map_err(Error::step("open the file to bind"))?, setup)
}

fn serve(
    (device, node): (LoopDevice, File),
    options: &Options,
    setup: Setup,
    grower: &Grower,
    added: impl FnOnce(&Path),
    ready: impl FnOnce(&Path),
    stop: &Stop,
) -> Result<(), Error> {
    let path = device.path();
    added(&path);
    let kept = LoopDevice::keep(&node, setup).map_err(Error::step(format!("scan {}", path.display())));
    drop(node);
    let ended = kept.and_then(|()| {
        ready(&path);
        let grow = |size| grower.grow(size).and_then(|()| device.grow(&options.name, size));
        match stop.wait(|size| grow(size).map_err(Error::step(format!("make {} larger", path.display())))) {
            End::Asked => Ok(()),
            End::Unmounted(Ok(())) => {
                tracing::info!("{} was unbound by somebody else", path.display());
                Ok(())
            }
            End::Unmounted(Err(e)) => Err(Error::step("read from /dev/fuse")(e)),
        }
    });
    let cleared = device.clear(&options.name, true).map_err(Error::step(format!("unbind {}", path.display())));
    ended.and(cleared.map(drop))
}

/// Whether `/dev/loop<number>` is bound to the file that a server with this name serves, as far as can be seen.
pub fn bound_to(number: u32, name: &str) -> bool {
    LoopDevice(number).is_bound_to(name).unwrap_or(true)
}

/// Unbinds `/dev/loop<number>` if it is that of the server with this name, and waits a little while others look at it.
/// Answers whether it is gone; if not, it goes when its last user closes it.
///
/// # Errors
///
/// The host's.
pub fn remove(number: u32, name: &str) -> Result<bool, Error> {
    let device = LoopDevice(number);
    let unbind = || Error::step(format!("unbind {}", device.path().display()));
    // Its server is dead: what the page cache holds cannot be written.
    Ok(device.clear(name, false).map_err(unbind())? || unbound(number, name)?)
}

/// Waits a little until the device is unbound: it is not before the last one closes it.
///
/// # Errors
///
/// The host's, if sysfs does not tell.
pub fn unbound(number: u32, name: &str) -> Result<bool, Error> {
    let device = LoopDevice(number);
    let deadline = Instant::now() + GLANCE;
    while device.is_bound_to(name).map_err(Error::step(format!("look at {}", device.path().display())))? {
        if Instant::now() >= deadline {
            return Ok(false);
        }
        thread::sleep(Duration::from_millis(10));
    }
    Ok(true)
}
