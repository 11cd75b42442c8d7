//! Grain directories and grain tables: what an entry means, and which entry a sector has.

use crate::error::{At, ParseError, ParseErrorKind};
use crate::sectors::Sectors;

/// Bytes of an entry of a grain directory or a grain table (hosted sparse and COWD).
pub const GTE_SIZE: u64 = 4;

/// The most entries of a grain directory that we accept: 32 Mi (1 PiB with usual grains), as QEMU does. A header
/// may name any number; this one bounds what follows from it.
pub const MAX_DIRECTORY_LEN: u64 = 32 << 20;

/// What an entry of a grain table says about its grain
/// (VMware Virtual Disk Format 1.1, "Hosted Sparse Extents", grain tables).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum GrainEntry {
    /// Entry 0: the grain is not in this extent; the parent has it, or it reads as zeroes.
    Absent,
    /// Entry 1 where the header has the zeroed-grain flag: reads as zeroes, whatever the parent holds.
    Zeroed,
    /// The grain, or the marker before its compressed bytes, stands at this sector of the extent file.
    At(Sectors),
}

impl GrainEntry {
    /// Reads an entry. `zeroed_grain` is the header's flag bit 2: without it an entry of 1 is a sector number, which
    /// lies in the metadata and which callers therefore refuse as damage.
    pub fn decode(entry: u32, zeroed_grain: bool) -> Self {
        match entry {
            0 => Self::Absent,
            1 if zeroed_grain => Self::Zeroed,
            sector => Self::At(Sectors(u64::from(sector))),
        }
    }

    /// The entry to write; `None` for a grain at sector 0 (which would read as absent) or at a sector that 32 bits
    /// do not hold (2 TiB into the file).
    pub fn encode(self) -> Option<u32> {
        match self {
            Self::Absent => Some(0),
            Self::Zeroed => Some(1),
            Self::At(Sectors(sector)) => u32::try_from(sector).ok().filter(|&entry| entry != 0),
        }
    }
}

/// The entries in the bytes of a grain table or grain directory; bytes after the last whole entry are left out.
pub fn decode_entries(bytes: &[u8]) -> impl ExactSizeIterator<Item = u32> + '_ {
    let (entries, _) = bytes.as_chunks::<4>();
    entries.iter().map(|&entry| u32::from_le_bytes(entry))
}

/// The bytes of a run of entries, [`GTE_SIZE`] each.
pub fn encode_entries(entries: &[u32]) -> Vec<u8> {
    entries.iter().flat_map(|entry| entry.to_le_bytes()).collect()
}

/// Where a sector of an extent is to be looked up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct GrainPlace {
    /// Index into the grain directory: which grain table.
    pub table: u32,
    /// Index into that grain table: which grain.
    pub entry: u32,
    /// Sectors between the start of the grain and the sector.
    pub offset: Sectors,
}

/// How the sectors of one extent divide into grains and grain tables. Positions are relative to the extent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TableGeometry {
    capacity: u64,
    grain_size: u64,
    gtes_per_gt: u64,
    coverage: u64,
    directory_len: u32,
}

impl TableGeometry {
    /// Checks sizes for what the arithmetic here needs, which is less than what a hosted sparse header has to obey
    /// (a COWD extent may have grains of one sector).
    ///
    /// # Errors
    /// `grainSize` or `numGTEsPerGT` is 0; `capacity` in bytes, or the coverage of a table, exceeds 64 bits; the
    /// directory would have more than [`MAX_DIRECTORY_LEN`] entries.
    pub fn new(capacity: Sectors, grain_size: Sectors, gtes_per_gt: u32) -> Result<Self, ParseError> {
        let out_of_range = |field, value, min, max| ParseError {
            field,
            at: At::Whole,
            kind: ParseErrorKind::OutOfRange { value, min, max },
        };
        let coverage = u64::from(gtes_per_gt)
            .checked_mul(grain_size.0)
            .filter(|&sectors| sectors <= Sectors::MAX.0)
            .ok_or_else(|| ParseError::whole("grainSize", ParseErrorKind::Overflow))?;
        if grain_size.0 == 0 {
            return Err(out_of_range("grainSize", 0, 1, Sectors::MAX.0));
        }
        if gtes_per_gt == 0 {
            return Err(out_of_range("numGTEsPerGT", 0, 1, u64::from(u32::MAX)));
        }
        let max = coverage.saturating_mul(MAX_DIRECTORY_LEN).min(Sectors::MAX.0);
        if capacity.0 > max {
            return Err(out_of_range("capacity", capacity.0, 0, max));
        }
        let directory_len = u32::try_from(div_ceil(capacity.0, coverage))
            .map_err(|_| ParseError::whole("capacity", ParseErrorKind::Overflow))?;
        let gtes_per_gt = u64::from(gtes_per_gt);
        Ok(Self { capacity: capacity.0, grain_size: grain_size.0, gtes_per_gt, coverage, directory_len })
    }

    /// Sectors of the extent.
    pub fn capacity(&self) -> Sectors {
        Sectors(self.capacity)
    }

    /// Sectors of a grain.
    pub fn grain_size(&self) -> Sectors {
        Sectors(self.grain_size)
    }

    /// Sectors that one grain table covers.
    pub fn table_coverage(&self) -> Sectors {
        Sectors(self.coverage)
    }

    /// Entries of the grain directory, which is the number of grain tables.
    pub fn directory_len(&self) -> u32 {
        self.directory_len
    }

    /// Grains of the extent, the last one being perhaps partial.
    pub fn grain_count(&self) -> u64 {
        div_ceil(self.capacity, self.grain_size)
    }

    /// Where to look up a sector; `None` from the end of the extent on.
    pub fn locate(&self, sector: Sectors) -> Option<GrainPlace> {
        if sector.0 >= self.capacity {
            return None;
        }
        let grain = sector.0.checked_div(self.grain_size)?;
        let offset = sector.0.checked_rem(self.grain_size)?;
        let table = grain.checked_div(self.gtes_per_gt)?;
        let entry = grain.checked_rem(self.gtes_per_gt)?;
        Some(GrainPlace {
            table: u32::try_from(table).ok()?,
            entry: u32::try_from(entry).ok()?,
            offset: Sectors(offset),
        })
    }

    /// The first sector of a grain; `None` if the extent has no such grain.
    pub fn grain_start(&self, table: u32, entry: u32) -> Option<Sectors> {
        let entry = Some(u64::from(entry)).filter(|&entry| entry < self.gtes_per_gt)?;
        let start = u64::from(table).checked_mul(self.coverage)?.checked_add(entry.checked_mul(self.grain_size)?)?;
        Some(Sectors(start)).filter(|start| start.0 < self.capacity)
    }

    /// How many sectors of a grain belong to the disk: all of them except perhaps in the last grain, which is stored
    /// whole in an uncompressed extent all the same. `None` if the extent has no such grain.
    pub fn grain_len(&self, table: u32, entry: u32) -> Option<Sectors> {
        let left = self.capacity.checked_sub(self.grain_start(table, entry)?.0)?;
        Some(Sectors(left.min(self.grain_size)))
    }

    /// How many entries of a table stand for grains of the disk: `numGTEsPerGT`, or fewer in the last table, whose
    /// other entries mean nothing. `None` if there is no such table.
    pub fn table_len(&self, table: u32) -> Option<u32> {
        let left = self.capacity.checked_sub(self.grain_start(table, 0)?.0)?;
        u32::try_from(div_ceil(left, self.grain_size).min(self.gtes_per_gt)).ok()
    }
}

/// The quotient rounded up; 0 for a divisor of 0.
pub(crate) fn div_ceil(number: u64, divisor: u64) -> u64 {
    if divisor == 0 { 0 } else { number.div_ceil(divisor) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn usual(capacity: u64) -> TableGeometry {
        TableGeometry::new(Sectors(capacity), Sectors(128), 512).unwrap()
    }

    #[test]
    fn entry_1_is_zeroes_only_with_the_flag() {
        for flag in [false, true] {
            assert_eq!(GrainEntry::decode(0, flag), GrainEntry::Absent);
            assert_eq!(GrainEntry::decode(2, flag), GrainEntry::At(Sectors(2)));
            assert_eq!(GrainEntry::decode(u32::MAX, flag), GrainEntry::At(Sectors(0xffff_ffff)));
        }
        assert_eq!(GrainEntry::decode(1, false), GrainEntry::At(Sectors(1)));
        assert_eq!(GrainEntry::decode(1, true), GrainEntry::Zeroed);
    }

    #[test]
    fn refuses_to_write_a_grain_at_sector_0_or_past_32_bits() {
        assert_eq!(GrainEntry::At(Sectors(0)).encode(), None);
        assert_eq!(GrainEntry::At(Sectors(1)).encode(), Some(1));
        assert_eq!(GrainEntry::At(Sectors(0xffff_ffff)).encode(), Some(u32::MAX));
        assert_eq!(GrainEntry::At(Sectors(0x1_0000_0000)).encode(), None);
        assert_eq!(GrainEntry::Absent.encode(), Some(0));
        assert_eq!(GrainEntry::Zeroed.encode(), Some(1));
    }

    #[test]
    fn entries_are_little_endian_and_a_partial_one_is_left_out() {
        let bytes = [1, 0, 0, 0, 0x78, 0x56, 0x34, 0x12, 9, 9, 9];
        assert_eq!(decode_entries(&bytes).collect::<Vec<_>>(), [1, 0x1234_5678]);
        assert_eq!(decode_entries(&bytes).len(), 2);
        assert_eq!(encode_entries(&[1, 0x1234_5678]), bytes[..8]);
    }

    #[test]
    fn locates_sectors_on_both_sides_of_every_border() {
        let geometry = usual(2 * 65536 + 200);
        let place = |sector| geometry.locate(Sectors(sector)).map(|p| (p.table, p.entry, p.offset.0));
        assert_eq!(place(0), Some((0, 0, 0)));
        assert_eq!(place(127), Some((0, 0, 127)));
        assert_eq!(place(128), Some((0, 1, 0)));
        assert_eq!(place(65535), Some((0, 511, 127)));
        assert_eq!(place(65536), Some((1, 0, 0)));
        assert_eq!(place(2 * 65536 + 199), Some((2, 1, 71)));
        assert_eq!(place(2 * 65536 + 200), None);
        assert_eq!(place(u64::MAX), None);
    }

    #[test]
    fn the_last_table_and_the_last_grain_may_be_partial() {
        let geometry = usual(2 * 65536 + 200);
        assert_eq!((geometry.directory_len(), geometry.grain_count()), (3, 1026));
        assert_eq!((geometry.table_len(1), geometry.table_len(2), geometry.table_len(3)), (Some(512), Some(2), None));
        assert_eq!(geometry.grain_len(2, 0), Some(Sectors(128)));
        assert_eq!(geometry.grain_len(2, 1), Some(Sectors(72)));
        assert_eq!(geometry.grain_len(2, 2), None);
        assert_eq!(geometry.grain_start(0, 511), Some(Sectors(65408)));
        assert_eq!(geometry.grain_start(0, 512), None);
        assert_eq!(geometry.grain_start(u32::MAX, u32::MAX), None);
        let whole = usual(65536);
        assert_eq!((whole.directory_len(), whole.table_len(0), whole.table_len(1)), (1, Some(512), None));
        assert_eq!((usual(0).directory_len(), usual(0).table_len(0), usual(1).table_len(0)), (0, None, Some(1)));
    }

    #[test]
    fn rejects_a_directory_of_more_than_32_mi_entries() {
        let max = MAX_DIRECTORY_LEN * 65536;
        assert_eq!(u64::from(usual(max).directory_len()), MAX_DIRECTORY_LEN);
        let error = TableGeometry::new(Sectors(max + 1), Sectors(128), 512).unwrap_err();
        assert_eq!(error.field, "capacity");
        assert_eq!(error.kind, ParseErrorKind::OutOfRange { value: max + 1, min: 0, max });
    }

    #[test]
    fn rejects_sizes_that_cannot_be_computed_with() {
        let field =
            |capacity, grain, gtes| TableGeometry::new(Sectors(capacity), Sectors(grain), gtes).unwrap_err().field;
        assert_eq!(field(1, 0, 512), "grainSize");
        assert_eq!(field(1, 1, 0), "numGTEsPerGT");
        assert_eq!(field(1, u64::MAX, 2), "grainSize");
        assert_eq!(field(u64::MAX, Sectors::MAX.0, 1), "capacity");
        assert!(TableGeometry::new(Sectors(1), Sectors(1), 4096).is_ok());
    }

    proptest! {
        #[test]
        fn a_located_sector_lies_in_the_grain_it_was_located_in(
            capacity in 1u64..1 << 40, grain in 0u32..=21, gtes in 0u32..=12, anywhere: u64,
        ) {
            let Ok(geometry) = TableGeometry::new(Sectors(capacity), Sectors(1 << grain), 1 << gtes) else {
                return Ok(());
            };
            let sector = anywhere % capacity;
            let place = geometry.locate(Sectors(sector)).unwrap();
            prop_assert!(place.table < geometry.directory_len());
            prop_assert!(place.entry < geometry.table_len(place.table).unwrap());
            prop_assert!(place.offset < geometry.grain_len(place.table, place.entry).unwrap());
            prop_assert_eq!(geometry.grain_start(place.table, place.entry).unwrap().0 + place.offset.0, sector);
        }

        #[test]
        fn entries_survive_the_round_trip(entries in proptest::collection::vec(any::<u32>(), 0..100)) {
            let bytes = encode_entries(&entries);
            prop_assert_eq!(decode_entries(&bytes).collect::<Vec<_>>(), entries);
        }
    }
}
