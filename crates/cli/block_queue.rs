//! What the kernel does with a device's requests before they come here: settings in `/sys/class/block/NAME/queue`.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

/// KiB of read-ahead, where the kernel's own default is 128: two grains, which is work for two processors.
const OF_COMPRESSED: u32 = 1024;

/// How long a setting may take that waits for requests under way.
const PATIENCE: Duration = Duration::from_secs(2);

/// Has whoever reads a device from front to back have many grains inflated at the same time.
pub(crate) fn widen_read_ahead(device: &Path) {
    let Some(setting) = setting(device, "read_ahead_kb") else { return };
    let now = fs::read_to_string(&setting).ok().and_then(|text| text.trim_end().parse::<u32>().ok());
    if now.is_some_and(|kib| kib >= OF_COMPRESSED) {
        return;
    }
    write(&setting, &OF_COMPRESSED.to_string());
}

/// Has the driver get requests from whoever makes them. A device with a single queue has the kernel's scheduler (block/elevator.c,
/// `elevator_set_default`), and with it those that are not plugged are handed to a worker first; with several it has none. Another one
/// than the kernel's own choice is somebody's, by a rule of udev say, and stays.
pub(crate) fn drop_scheduler(device: &Path) {
    let Some(setting) = setting(device, "scheduler") else { return };
    if fs::read_to_string(&setting).is_ok_and(|text| text.split_whitespace().any(|word| word == "[mq-deadline]")) {
        write(&setting, "none");
    }
}

fn setting(device: &Path, name: &str) -> Option<PathBuf> {
    Some(Path::new("/sys/class/block").join(device.file_name()?).join("queue").join(name))
}

/// A device without it works all the same.
fn write(setting: &Path, value: &str) {
    if let Err(e) = by_another_process(setting, value) {
        tracing::info!("{}: {e}", setting.display());
    }
}

/// The kernel stops the queue for such a change, and waits for the requests under way in a way that no signal ends. They are served by this
/// process: were it killed meanwhile, a thread of its own that waits there would keep it, and with it what its next server needs.
fn by_another_process(setting: &Path, value: &str) -> io::Result<()> {
    let mut child = Command::new("/bin/sh")
        .args(["-c", "echo \"$2\" >\"$1\"", "sh"])
        .arg(setting)
        .arg(value)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()?;
    let deadline = Instant::now() + PATIENCE;
    loop {
        match child.try_wait()? {
            Some(status) if status.success() => return Ok(()),
            Some(status) => return Err(io::Error::other(format!("cannot be set to {value}: {status}"))),
            None if Instant::now() >= deadline => return Err(io::ErrorKind::TimedOut.into()),
            None => thread::sleep(Duration::from_millis(1)),
        }
    }
}
