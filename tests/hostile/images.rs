//! Images to be broken.

use vmdk_parse::{Compression, GdOffset, HeaderFlags, Sectors, SparseHeader};

/// Sectors of the disk: two grain tables with grains of 4 KiB.
pub(crate) const SECTORS: u64 = 8192;
pub(crate) const GRAIN: u64 = 4096;
/// Bytes that a grain table describes.
pub(crate) const COVERAGE: u64 = 512 * GRAIN;

pub(crate) fn descriptor(extents: &str) -> String {
    child("parentCID=ffffffff", extents)
}

pub(crate) fn child(parent: &str, extents: &str) -> String {
    format!(
        "# Disk DescriptorFile\nversion=1\nCID=0badcafe\n{parent}\ncreateType=\"monolithicSparse\"\n\n{extents}\n\n\
         ddb.adapterType = \"ide\"\n"
    )
}

/// A monolithicSparse image of [`SECTORS`] with both copies of its tables, and one grain of ones at byte 0 and one of twos at
/// [`COVERAGE`].
pub(crate) struct Image {
    pub(crate) header: SparseHeader,
    pub(crate) bytes: Vec<u8>,
    pub(crate) gd: usize,
    pub(crate) rgd: usize,
}

impl Image {
    pub(crate) fn new() -> Self {
        Self::with(&descriptor(&format!("RW {SECTORS} SPARSE \"disk.vmdk\"")))
    }

    /// Without a descriptor of its own if it is empty.
    pub(crate) fn with(text: &str) -> Self {
        // Header, descriptor, RGD at 21, its tables at 22 and 26, GD at 30, its tables at 31 and 35, grains from 40 on.
        let embedded = u64::from(!text.is_empty());
        let header = SparseHeader {
            version: 1,
            flags: HeaderFlags::NEWLINE_TEST.with(HeaderFlags::REDUNDANT_TABLES),
            capacity: Sectors(SECTORS),
            grain_size: Sectors(8),
            descriptor_offset: Sectors(embedded),
            descriptor_size: Sectors(20 * embedded),
            gtes_per_gt: 512,
            rgd_offset: Sectors(21),
            gd_offset: GdOffset::At(Sectors(30)),
            overhead: Sectors(40),
            unclean_shutdown: false,
            compression: Compression::None,
        };
        let mut image = Self { header, bytes: vec![0; 56 * 512], gd: 30 * 512, rgd: 21 * 512 };
        image.bytes[512..512 + text.len()].copy_from_slice(text.as_bytes());
        for (at, sector) in [(21 * 512, 22), (21 * 512 + 4, 26), (30 * 512, 31), (30 * 512 + 4, 35)] {
            image.put(at, sector);
        }
        for (table, sector, value) in [(0, 40, 1), (1, 48, 2)] {
            image.entry(table, 0, sector);
            let at = sector as usize * 512;
            image.bytes[at..at + 4096].fill(value);
        }
        image
    }

    pub(crate) fn put(&mut self, at: usize, sector: u32) -> &mut Self {
        self.bytes[at..at + 4].copy_from_slice(&sector.to_le_bytes());
        self
    }

    /// Sets an entry of a table, and of its copy.
    pub(crate) fn entry(&mut self, table: usize, entry: usize, sector: u32) -> &mut Self {
        for first in [22, 31] {
            self.put((first + 4 * table) * 512 + entry * 4, sector);
        }
        self
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        let mut bytes = self.bytes.clone();
        bytes[..512].copy_from_slice(&self.header.encode());
        bytes
    }

    /// With bytes of the header as they are given here, which an encoder would not write.
    pub(crate) fn patched(&self, at: usize, patch: &[u8]) -> Vec<u8> {
        let mut bytes = self.bytes();
        bytes[at..at + patch.len()].copy_from_slice(patch);
        bytes
    }
}
