//! What an image is, for people and for `vdisk info`.

use vmdk_parse::{Access, ContentId, ExtentKind};

/// The kind of image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// The bytes of the disk and nothing else.
    Raw,
    /// A VMware virtual disk.
    Vmdk,
}

/// What an image is.
#[derive(Clone, Debug)]
pub struct Info {
    /// The kind of image.
    pub format: Format,
    /// The createType of a VMDK, as it is written there.
    pub subformat: Option<String>,
    /// Size of the disk in bytes.
    pub size: u64,
    /// Bytes in a grain, the largest if extents differ; `None` without sparse extents.
    pub grain_size: Option<u64>,
    /// Whether the last one who wrote the image closed it. Its parents count not: nothing is written there.
    pub clean: bool,
    /// The CID of a VMDK.
    pub content_id: Option<ContentId>,
    /// The files of the parents: the parent's, its parent's, and so on.
    pub parents: Vec<String>,
    /// The extents in order, without those of parents. A raw image has one.
    pub extents: Vec<ExtentInfo>,
    /// What a user should know about how the image was taken.
    pub notices: Vec<String>,
}

/// An extent of an image.
#[derive(Clone, Debug)]
pub struct ExtentInfo {
    /// How it is stored.
    pub kind: ExtentKind,
    /// Who may use it.
    pub access: Access,
    /// Bytes of the disk that it holds.
    pub size: u64,
    /// Its file.
    pub file: Option<String>,
    /// Byte offset of its first byte in the file; 0 for sparse extents.
    pub offset: u64,
}
