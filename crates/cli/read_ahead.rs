//! How far the kernel reads ahead on a device.

use std::fs;
use std::path::Path;

/// KiB of the device, where the kernel's own default is 128: two grains, which is work for two processors.
const OF_COMPRESSED: u32 = 1024;

/// Has whoever reads a device from front to back have many grains inflated at the same time.
pub(crate) fn widen(device: &Path) {
    let Some(name) = device.file_name() else { return };
    let setting = Path::new("/sys/class/block").join(name).join("queue/read_ahead_kb");
    let now = fs::read_to_string(&setting).ok().and_then(|text| text.trim_end().parse::<u32>().ok());
    if now.is_some_and(|kib| kib >= OF_COMPRESSED) {
        return;
    }
    if let Err(e) = fs::write(&setting, OF_COMPRESSED.to_string()) {
        tracing::info!("{}: {e}", setting.display());
    }
}
