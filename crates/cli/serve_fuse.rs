//! The raw view alone: a plain file for tools that want one.

use std::path::Path;
use std::sync::Arc;

use crate::failure::{Failure, Result};
use crate::open::Opened;
use crate::signals::Stop;

/// Serves the image as the file `place` until `stop` is given. Tells by `ready` when it can be opened.
pub(crate) fn serve(image: &Opened, place: &Path, ready: impl FnOnce(), stop: &Stop) -> Result<()> {
    let (stopper, stopped) = vdisk_fuse::stop_channel();
    stop.arm(move || stopper.stop());
    let (disk, files) = (Arc::clone(&image.disk), Arc::clone(&image.files));
    vdisk_fuse::serve(disk, files, place, ready, &stopped).map_err(|e| Failure::from_error(&e))
}
