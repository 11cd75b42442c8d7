//! Options that several verbs have.

use std::path::PathBuf;

use clap::ValueEnum;
use serde::{Deserialize, Serialize};
use vdisk_image::Format;

use crate::overlay::Overlay;
use crate::size;

/// Which image, and how to open it. Kept in the books for the next server of its device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, clap::Args)]
pub(crate) struct ImageOptions {
    /// The image: a VMDK (its descriptor, or its only file), a raw disk, or an appliance (`box.ova`, `box.ova:disk1.vmdk`)
    #[serde(with = "crate::resume::path")]
    pub(crate) image: PathBuf,
    /// Refuse every change
    #[arg(short, long)]
    pub(crate) read_only: bool,
    /// Only read the image, and write changes to this VMDK beside it, which is made if it is not there; `temporary`: throw them
    /// away at the end. Also for what cannot be written itself (streamOptimized, OVA, an image that many share)
    #[arg(long, value_name = "FILE", conflicts_with = "read_only")]
    pub(crate) overlay: Option<Overlay>,
    /// Memory for grains that are read in small pieces again and again
    #[arg(long, value_name = "SIZE", default_value = "64M", value_parser = size::parse_usize)]
    pub(crate) cache_size: usize,
    /// What the image is (auto: by its first bytes)
    #[arg(long, value_enum, value_name = "FORMAT", default_value_t = FormatChoice::Auto)]
    pub(crate) format: FormatChoice,
    /// What write zeroes does when asked to keep the space: obey, or free it all the same
    #[arg(long, value_enum, value_name = "HOW", default_value_t = Zeroout::Keep)]
    pub(crate) zeroout: Zeroout,
    /// Follow extent and parent names that leave the image's directory
    #[arg(long)]
    pub(crate) trust_paths: bool,
    /// Go on although a parent was changed after its child was made (needs --read-only)
    #[arg(long, requires = "read_only")]
    pub(crate) ignore_parent_cid: bool,
    /// Write to an image with change tracking, and take the tracking out of it at the first write (version 1, no
    /// changeTrackPath): the next backup has to read everything
    #[arg(long, conflicts_with_all = ["read_only", "overlay"])]
    pub(crate) drop_change_tracking: bool,
}

impl ImageOptions {
    /// An image, and nothing that the user has asked for.
    pub(crate) fn of(image: PathBuf) -> Self {
        Self {
            image,
            read_only: false,
            overlay: None,
            cache_size: 0,
            format: FormatChoice::Auto,
            zeroout: Zeroout::Keep,
            trust_paths: false,
            ignore_parent_cid: false,
            drop_change_tracking: false,
        }
    }
}

/// Which image to look at, and how.
#[derive(Debug, clap::Args)]
pub(crate) struct LookOptions {
    /// The image: a VMDK, a raw disk, or an appliance (`box.ova`, `box.ova:disk1.vmdk`)
    pub(crate) image: PathBuf,
    /// Look at this overlay of the image. Only one of a raw image or of an appliance does not find it by itself
    #[arg(long, value_name = "FILE")]
    pub(crate) overlay: Option<PathBuf>,
    /// What the image is, if its first bytes do not tell
    #[arg(long, value_enum, value_name = "FORMAT", default_value_t = FormatChoice::Auto)]
    pub(crate) format: FormatChoice,
    /// Follow extent and parent names that leave the image's directory
    #[arg(long)]
    pub(crate) trust_paths: bool,
}

/// `--format`
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum FormatChoice {
    Auto,
    Raw,
    Vmdk,
}

impl FormatChoice {
    /// `None`: find out.
    pub(crate) fn wanted(self) -> Option<Format> {
        match self {
            Self::Auto => None,
            Self::Raw => Some(Format::Raw),
            Self::Vmdk => Some(Format::Vmdk),
        }
    }
}

/// `--direct-io`
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum DirectIo {
    Auto,
    On,
    Off,
}

/// `--zero-copy`
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum ZeroCopy {
    Auto,
    Off,
}

/// `--zeroout`
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Zeroout {
    Keep,
    Unmap,
}
