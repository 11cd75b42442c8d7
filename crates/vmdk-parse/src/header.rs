//! The header of a hosted sparse extent: what its fields say. How they lie in bytes is in `header_bytes.rs`.

use crate::error::ParseError;
use crate::sectors::Sectors;
use crate::tables::{GTE_SIZE, TableGeometry, div_ceil};
use std::ops::Range;

/// Byte offset of `uncleanShutdown` in the header: one byte, 0 or 1, to be patched in place.
pub const UNCLEAN_SHUTDOWN_AT: u64 = 72;
/// The smallest grain we accept, in sectors. The specification says "greater than 8", which libvmdk takes literally;
/// VirtualBox takes 8.
pub const MIN_GRAIN_SECTORS: u64 = 8;
/// The largest grain we accept, in sectors (1 GiB), as QEMU does.
pub const MAX_GRAIN_SECTORS: u64 = 2 << 20;
/// The most entries of a grain table we accept; the specification knows no other number.
pub const MAX_GTES_PER_GT: u32 = 512;
/// The largest embedded descriptor we accept, in sectors (1 MiB).
pub const MAX_DESCRIPTOR_SECTORS: u64 = 2048;

/// `flags` of a header. Bits 0 to 15 may be ignored by who does not know them, and are kept; an unknown one of bits
/// 16 to 31 makes an extent unreadable (VMware Virtual Disk Format 1.1, "Hosted Sparse Extents", flags).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub struct HeaderFlags(pub u32);

impl HeaderFlags {
    /// Bit 0: the bytes of the newline test are filled in.
    pub const NEWLINE_TEST: Self = Self(1);
    /// Bit 1: there is a second grain directory with its own grain tables.
    pub const REDUNDANT_TABLES: Self = Self(1 << 1);
    /// Bit 2: a grain table entry of 1 stands for a grain of zeroes.
    pub const ZEROED_GRAIN: Self = Self(1 << 2);
    /// Bit 16: grains are compressed.
    pub const COMPRESSED: Self = Self(1 << 16);
    /// Bit 17: the stream has markers, and grains carry their own sector number.
    pub const MARKERS: Self = Self(1 << 17);

    /// True if all bits of `other` are set here.
    pub const fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// These flags and those of `other`.
    pub const fn with(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// These flags without those of `other`.
    pub const fn without(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }

    /// Bit 0.
    pub const fn newline_test(self) -> bool {
        self.contains(Self::NEWLINE_TEST)
    }

    /// Bit 1.
    pub const fn redundant_tables(self) -> bool {
        self.contains(Self::REDUNDANT_TABLES)
    }

    /// Bit 2.
    pub const fn zeroed_grain(self) -> bool {
        self.contains(Self::ZEROED_GRAIN)
    }

    /// Bit 16.
    pub const fn compressed(self) -> bool {
        self.contains(Self::COMPRESSED)
    }

    /// Bit 17.
    pub const fn markers(self) -> bool {
        self.contains(Self::MARKERS)
    }

    /// Bits of the incompatible half that are not known here.
    pub(crate) const fn unknown(self) -> u32 {
        self.0 & 0xffff_0000 & !Self::COMPRESSED.0 & !Self::MARKERS.0
    }
}

/// Where the grain directory is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum GdOffset {
    /// At this sector of the extent file. Sector 0 in a header that only wraps a descriptor: there is none.
    At(Sectors),
    /// `GD_AT_END`: a copy of the header near the end of the file, the footer, knows
    /// (VMware Virtual Disk Format 1.1, "Stream-Optimized Compressed Sparse Extents").
    AtEnd,
}

/// How grains are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum Compression {
    /// As they are.
    #[default]
    None,
    /// Deflated; the specification says RFC 1951, all known files hold RFC 1950 (zlib) streams.
    Deflate,
}

/// The first sector of a hosted sparse extent (VMware Virtual Disk Format 1.1, "Hosted Sparse Extents",
/// `SparseExtentHeader`). A footer has the same form.
///
/// What [`SparseHeader::decode`] returned is within all bounds that the header alone can tell. A value built by hand
/// is not checked; the methods then saturate and do not panic.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SparseHeader {
    /// 1, 2 (with zeroed grains) or 3 (streams, and disks whose changes are tracked); callers decide about 3.
    pub version: u32,
    /// What the extent uses; unknown compatible bits are kept.
    pub flags: HeaderFlags,
    /// Size of the extent as the disk sees it; often not a multiple of `grain_size`. 0 where the header only wraps
    /// a descriptor.
    pub capacity: Sectors,
    /// Size of a grain, a power of two.
    pub grain_size: Sectors,
    /// Where the embedded descriptor starts; 0 if there is none.
    pub descriptor_offset: Sectors,
    /// Room for the embedded descriptor; means nothing where `descriptor_offset` is 0.
    pub descriptor_size: Sectors,
    /// Entries of a grain table, a power of two; 512 except in files that no known program writes.
    pub gtes_per_gt: u32,
    /// Where the redundant grain directory starts; means nothing without the flag, see [`SparseHeader::redundant`].
    pub rgd_offset: Sectors,
    /// Where the grain directory starts.
    pub gd_offset: GdOffset,
    /// Sectors of metadata before the first grain.
    pub overhead: Sectors,
    /// Whether somebody had the extent open for writing and did not close it. Any byte but 0 reads as true.
    pub unclean_shutdown: bool,
    /// How grains are stored; [`Compression::None`] without flag bit 16, whatever the field holds.
    pub compression: Compression,
}

impl SparseHeader {
    /// Bytes of a header.
    pub const LEN: usize = 512;

    /// Bytes of a grain.
    pub fn grain_bytes(&self) -> u64 {
        self.grain_size.bytes().unwrap_or(u64::MAX)
    }

    /// Sectors of the disk that one grain table covers: `numGTEsPerGT` times `grainSize`.
    pub fn table_coverage(&self) -> Sectors {
        Sectors(u64::from(self.gtes_per_gt).saturating_mul(self.grain_size.0))
    }

    /// Entries of the grain directory, which is the number of grain tables.
    pub fn directory_len(&self) -> u64 {
        div_ceil(self.capacity.0, self.table_coverage().0)
    }

    /// Sectors that the grain directory takes in the file; its last sector is padded.
    pub fn directory_sectors(&self) -> Sectors {
        Sectors::from_bytes_ceil(self.directory_len().saturating_mul(GTE_SIZE))
    }

    /// Sectors that one grain table takes in the file (4 for 512 entries).
    pub fn table_sectors(&self) -> Sectors {
        Sectors::from_bytes_ceil(u64::from(self.gtes_per_gt).saturating_mul(GTE_SIZE))
    }

    /// Where the redundant grain directory starts; `None` if there is none. Without flag bit 1 the offset is to be
    /// ignored: there are exports that have one and no directory behind it.
    pub fn redundant(&self) -> Option<Sectors> {
        Some(self.rgd_offset).filter(|offset| self.flags.redundant_tables() && offset.0 != 0)
    }

    /// The bytes of the file that hold the embedded descriptor, at most 1 MiB in a decoded header; `None` if there
    /// is no embedded descriptor.
    pub fn embedded_descriptor(&self) -> Option<Range<u64>> {
        let start = Some(self.descriptor_offset).filter(|offset| offset.0 != 0)?;
        let end = start.checked_add(self.descriptor_size)?;
        Some(start.bytes()?..end.bytes()?)
    }

    /// True if the header has no extent of its own and only carries a descriptor, whose extents hold the data
    /// (Haiku's images are such: a flat extent behind a sparse header).
    pub fn only_wraps_descriptor(&self) -> bool {
        self.capacity.0 == 0 && self.descriptor_offset.0 != 0
    }

    /// How the sectors of the extent divide into grain tables and grains.
    ///
    /// # Errors
    /// Those of [`TableGeometry::new`]; none for a decoded header.
    pub fn geometry(&self) -> Result<TableGeometry, ParseError> {
        TableGeometry::new(self.capacity, self.grain_size, self.gtes_per_gt)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header() -> SparseHeader {
        SparseHeader {
            version: 1,
            flags: HeaderFlags(3),
            capacity: Sectors(204_800),
            grain_size: Sectors(128),
            descriptor_offset: Sectors(1),
            descriptor_size: Sectors(20),
            gtes_per_gt: 512,
            rgd_offset: Sectors(21),
            gd_offset: GdOffset::At(Sectors(38)),
            overhead: Sectors(128),
            unclean_shutdown: false,
            compression: Compression::None,
        }
    }

    #[test]
    fn computes_sizes_of_tables() {
        let header = header();
        assert_eq!(header.grain_bytes(), 65536);
        assert_eq!(header.table_coverage(), Sectors(65536));
        assert_eq!(header.table_sectors(), Sectors(4));
        assert_eq!(header.embedded_descriptor(), Some(512..10752));
        for (capacity, entries, sectors) in
            [(0, 0, 0), (1, 1, 1), (65536, 1, 1), (65537, 2, 1), (128 * 65536, 128, 1), (128 * 65536 + 1, 129, 2)]
        {
            let header = SparseHeader { capacity: Sectors(capacity), ..header.clone() };
            assert_eq!((header.directory_len(), header.directory_sectors().0), (entries, sectors), "{capacity}");
            assert_eq!(u64::from(header.geometry().unwrap().directory_len()), entries);
        }
    }

    #[test]
    fn the_redundant_directory_needs_flag_and_offset() {
        assert_eq!(header().redundant(), Some(Sectors(21)));
        assert_eq!(SparseHeader { flags: HeaderFlags(1), ..header() }.redundant(), None);
        assert_eq!(SparseHeader { rgd_offset: Sectors(0), ..header() }.redundant(), None);
    }

    #[test]
    fn flags_are_named_by_their_bits() {
        let stream = HeaderFlags(0x30001);
        assert!(stream.newline_test() && stream.compressed() && stream.markers());
        assert!(!stream.redundant_tables() && !stream.zeroed_grain());
        assert_eq!(HeaderFlags(3).with(HeaderFlags::ZEROED_GRAIN), HeaderFlags(7));
        assert_eq!(HeaderFlags(7).without(HeaderFlags::ZEROED_GRAIN), HeaderFlags(3));
        assert_eq!(HeaderFlags(0xffff_ffff).unknown(), 0xfffc_0000);
    }

    #[test]
    fn a_header_built_from_nonsense_saturates() {
        let wild = SparseHeader {
            capacity: Sectors(u64::MAX),
            grain_size: Sectors(u64::MAX),
            descriptor_size: Sectors(u64::MAX),
            ..header()
        };
        assert_eq!((wild.grain_bytes(), wild.directory_len()), (u64::MAX, 1));
        assert_eq!(wild.embedded_descriptor(), None);
        let empty = SparseHeader { grain_size: Sectors(0), gtes_per_gt: 0, ..header() };
        assert_eq!((empty.directory_len(), empty.table_sectors()), (0, Sectors(0)));
        assert!(empty.geometry().is_err());
    }
}
