//! `vdisk recover`: what a killed server has left, into the image.

use std::path::PathBuf;
use std::sync::Arc;

use vdisk_io::{BlockingIo, block_on};

use crate::failure::{Failure, Result};
use crate::in_use;
use crate::open::Opened;
use crate::options::{DirectIo, ImageOptions};
use crate::overlay::Overlay;
use crate::state::StateDir;

/// Put into an image what its server had acknowledged, but not flushed, when it was killed
///
/// The next attach or serve of the image does the same. After a power cut there is nothing to recover: what was flushed is in the
/// image, the rest is gone.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  vdisk recover disk.vmdk")]
pub(crate) struct Args {
    /// The image, or the device that it was attached as
    #[arg(value_name = "IMAGE|DEVICE")]
    pub(crate) image: PathBuf,
    /// What was served was this overlay of the image
    #[arg(long, value_name = "FILE")]
    overlay: Option<PathBuf>,
    /// Follow extent and parent names that leave the image's directory
    #[arg(long)]
    trust_paths: bool,
}

pub(crate) fn run(args: &Args, verbose: bool) -> Result<()> {
    crate::logging::to_stderr(verbose);
    let mut image = args.image.clone();
    if in_use::rdev(&image).is_some() {
        let states = StateDir::host().list()?;
        let of_device = states.into_iter().find(|state| state.device == image);
        let state = of_device.ok_or_else(|| Failure::new("is no device of vdisk").hint("vdisk list"))?;
        image = state.image.into();
    }
    let overlay = args.overlay.clone().map(Overlay::File);
    let options = ImageOptions { trust_paths: args.trust_paths, overlay, ..ImageOptions::of(image) };
    let mut image = Opened::open(&options, DirectIo::Off)?;
    let was_clean = image.disk.info().clean;
    let needed = image.disk.needs_ledger();
    let told = image.keep_ledger(&options)?;
    if needed && image.ledger.is_none() {
        return Err(Failure::new(told.join("; ")));
    }
    if !was_clean {
        let io = BlockingIo::new(Arc::clone(&image.files));
        block_on(image.disk.mend(&io)).map_err(|e| Failure::from_error(&e))?;
    }
    image.close()?;
    if !told.is_empty() {
        return crate::print(&(told.join("\n") + "\n"));
    }
    crate::print(match was_clean {
        true => "nothing to recover: the image was closed\n",
        false => "nothing was left that is not in the image, which is closed now\n",
    })
}
