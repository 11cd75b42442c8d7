//! VMDK as bytes and values: headers, descriptors, grain tables. Bytes in, values out; nothing here opens a file.
//!
//! The crate holds what VMware's "Virtual Disk Format 1.1" says, and what the images out there really contain where
//! the two differ; of seSparse, which has no specification, what QEMU reads. Input is hostile: no function panics,
//! allocates by a number that the input names, or computes without a check. What these values
//! point at (does the grain directory lie inside the file?) is for callers.

#![forbid(unsafe_code)]
#![deny(
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects,
    clippy::big_endian_bytes,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::cast_possible_truncation
)]
#![cfg_attr(
    test,
    allow(
        clippy::indexing_slicing,
        clippy::arithmetic_side_effects,
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::panic,
        clippy::cast_possible_truncation
    )
)]

mod content_id;
mod cowd;
mod descriptor;
mod descriptor_reader;
mod descriptor_text;
mod error;
mod extent;
mod field;
mod header;
mod header_bytes;
mod marker;
#[cfg(test)]
mod samples;
mod se_sparse;
mod se_sparse_entry;
mod sectors;
mod tables;

pub use content_id::{ChangeTrackingPlaces, ContentId, ContentIdPlaces, change_tracking_places, content_id_places};
pub use cowd::{
    COWD_FREE_SECTOR_AT, COWD_GTES_PER_GT, COWD_MAX_GRAIN_SECTORS, COWD_TABLE_SECTORS, COWD_UNCLEAN_SHUTDOWN_AT,
    CowdHeader,
};
pub use descriptor::Descriptor;
pub use descriptor_reader::MAX_EXTENTS;
pub use descriptor_text::{MAX_LINES, MAX_TEXT_BYTES, looks_like_descriptor};
pub use error::{At, ParseError, ParseErrorKind};
pub use extent::{Access, ExtentKind, ExtentLine};
pub use header::{
    Compression, GdOffset, HeaderFlags, MAX_DESCRIPTOR_SECTORS, MAX_GRAIN_SECTORS, MAX_GTES_PER_GT, MIN_GRAIN_SECTORS,
    SparseHeader, UNCLEAN_SHUTDOWN_AT,
};
pub use marker::{GrainRecord, MAX_DIRECTORY_MARKER_SECTORS, MAX_TABLE_MARKER_SECTORS, Marker, max_compressed_len};
pub use se_sparse::{
    SE_SPARSE_GTES_PER_GT, SE_SPARSE_MAX_CAPACITY, SE_SPARSE_TABLE_SECTORS, SeArea, SeSparseHeader, SeVolatileHeader,
};
pub use se_sparse_entry::{
    SE_SPARSE_ENTRY_SIZE, SE_SPARSE_GRAIN_SECTORS, SeDirectoryEntry, SeGrainEntry, decode_se_entries, encode_se_entries,
};
pub use sectors::{SECTOR_SIZE, Sectors};
pub use tables::{GTE_SIZE, GrainEntry, GrainPlace, MAX_DIRECTORY_LEN, TableGeometry, decode_entries, encode_entries};
