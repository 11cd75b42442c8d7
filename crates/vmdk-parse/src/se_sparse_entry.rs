//! The entries of a seSparse extent: 64 bits each, whose upper four say what the rest means. As QEMU reads them
//! (`block/vmdk.c`, since 4.1); there is no specification.

use crate::error::{ParseError, ParseErrorKind};
use crate::sectors::Sectors;

/// Bytes of an entry of a grain directory or a grain table of a seSparse extent.
pub const SE_SPARSE_ENTRY_SIZE: u64 = 8;
/// Sectors of a grain of a seSparse extent (4 KiB); no other size is known.
pub const SE_SPARSE_GRAIN_SECTORS: Sectors = Sectors(8);

/// The upper four bits.
const KIND: u64 = 0xf << 60;
const UNMAPPED: u64 = 1 << 60;
const ZERO: u64 = 2 << 60;
const ALLOCATED: u64 = 3 << 60;
/// The upper half of the entry of a grain table that is there. Its lower bits stay 0, since 64 TiB have 4 Mi tables.
const TABLE: u64 = 0x1000_0000;

/// What an entry of a seSparse grain directory says about its grain table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SeDirectoryEntry {
    /// No grain of this table is in the extent; the parent has them, or they read as zeroes.
    Absent,
    /// The grain table with this index; [`crate::SeSparseHeader::table_start`] says where it is.
    Table(u32),
}

impl SeDirectoryEntry {
    /// Reads an entry: 0, or `0x10000000` in the upper half and an index in the lower.
    ///
    /// # Errors
    /// Anything else ([`ParseErrorKind::BadEntry`]).
    pub fn decode(entry: u64) -> Result<Self, ParseError> {
        if entry == 0 {
            return Ok(Self::Absent);
        }
        let index = u32::try_from(entry & u64::from(u32::MAX)).ok().filter(|_| entry >> 32 == TABLE);
        index.map(Self::Table).ok_or_else(|| bad("grain directory entry", entry))
    }

    /// The entry to write.
    pub fn encode(self) -> u64 {
        match self {
            Self::Absent => 0,
            Self::Table(index) => TABLE << 32 | u64::from(index),
        }
    }
}

/// What an entry of a seSparse grain table says about its grain.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SeGrainEntry {
    /// The grain is not in this extent; the parent has it, or it reads as zeroes.
    Absent,
    /// The guest discarded the grain (SCSI UNMAP): reads as zeroes, whatever the parent holds.
    ///
    /// So QEMU has it, where "fallthrough" is said of the code, not of the grain; dissect.hypervisor took the word
    /// for the other, and reads the parent.
    Unmapped,
    /// Reads as zeroes, whatever the parent holds.
    Zero,
    /// The grain stands at this sector of the extent file, and ends inside 64 bits of bytes.
    At(Sectors),
}

impl SeGrainEntry {
    /// Reads an entry. `grains` is where the grains start in the file, [`crate::SeSparseHeader::grains`]: the 60
    /// lower bits of an allocated entry are an index, whose lowest 12 bits are the highest of them. Of grains that
    /// read as zeroes the lower bits are not looked at.
    ///
    /// # Errors
    /// Bits in an entry that says absent, a kind that is not known ([`ParseErrorKind::BadEntry`]); a place whose end
    /// in bytes exceeds 64 bits.
    pub fn decode(entry: u64, grains: Sectors) -> Result<Self, ParseError> {
        match entry & KIND {
            0 if entry == 0 => Ok(Self::Absent),
            UNMAPPED => Ok(Self::Unmapped),
            ZERO => Ok(Self::Zero),
            ALLOCATED => {
                let index = (entry & 0x0fff_0000_0000_0000) >> 48 | (entry & 0x0000_ffff_ffff_ffff) << 12;
                let offset = index.checked_mul(SE_SPARSE_GRAIN_SECTORS.0).map(Sectors);
                let start = offset.and_then(|offset| grains.checked_add(offset));
                let start = start.filter(|&start| end_fits(start));
                start.map(Self::At).ok_or_else(|| ParseError::whole(GRAIN_ENTRY, ParseErrorKind::Overflow))
            }
            _ => Err(bad(GRAIN_ENTRY, entry)),
        }
    }

    /// The entry to write; `None` for a grain that does not stand among the grains, or not on a border of them.
    pub fn encode(self, grains: Sectors) -> Option<u64> {
        match self {
            Self::Absent => Some(0),
            Self::Unmapped => Some(UNMAPPED),
            Self::Zero => Some(ZERO),
            Self::At(start) => {
                let offset = Some(start).filter(|&start| end_fits(start))?.checked_sub(grains)?;
                let index = offset.0.checked_div(SE_SPARSE_GRAIN_SECTORS.0)?;
                let on_border = offset.0.checked_rem(SE_SPARSE_GRAIN_SECTORS.0)? == 0;
                on_border.then_some(ALLOCATED | (index & 0xfff) << 48 | index >> 12)
            }
        }
    }
}

const GRAIN_ENTRY: &str = "grain table entry";

fn bad(field: &'static str, entry: u64) -> ParseError {
    ParseError::whole(field, ParseErrorKind::BadEntry(entry))
}

fn end_fits(start: Sectors) -> bool {
    start.checked_add(SE_SPARSE_GRAIN_SECTORS).and_then(Sectors::bytes).is_some()
}

/// The entries in the bytes of a seSparse grain table or grain directory; bytes after the last whole entry are left
/// out.
pub fn decode_se_entries(bytes: &[u8]) -> impl ExactSizeIterator<Item = u64> + '_ {
    let (entries, _) = bytes.as_chunks::<8>();
    entries.iter().map(|&entry| u64::from_le_bytes(entry))
}

/// The bytes of a run of entries, [`SE_SPARSE_ENTRY_SIZE`] each.
pub fn encode_se_entries(entries: &[u64]) -> Vec<u8> {
    entries.iter().flat_map(|entry| entry.to_le_bytes()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use ParseErrorKind as K;
    use proptest::prelude::*;

    #[test]
    fn a_directory_entry_is_0_or_an_index_under_0x10000000() {
        assert_eq!(SeDirectoryEntry::decode(0), Ok(SeDirectoryEntry::Absent));
        for index in [0, 1, u32::MAX] {
            let entry = 0x1000_0000_0000_0000 | u64::from(index);
            assert_eq!(SeDirectoryEntry::decode(entry), Ok(SeDirectoryEntry::Table(index)));
            assert_eq!(SeDirectoryEntry::Table(index).encode(), entry);
        }
        for entry in [1, 0xffff_ffff, 0x1000_0001_0000_0000, 0x2000_0000_0000_0000, 0x1100_0000_0000_0000, u64::MAX] {
            let error = ParseError::whole("grain directory entry", K::BadEntry(entry));
            assert_eq!(SeDirectoryEntry::decode(entry), Err(error));
        }
    }

    #[test]
    fn the_upper_four_bits_say_what_a_grain_is() {
        let decode = |entry| SeGrainEntry::decode(entry, Sectors(100));
        assert_eq!(decode(0), Ok(SeGrainEntry::Absent));
        for low in [0, 1, 0x0fff_ffff_ffff_ffff] {
            assert_eq!(decode(0x1000_0000_0000_0000 | low), Ok(SeGrainEntry::Unmapped));
            assert_eq!(decode(0x2000_0000_0000_0000 | low), Ok(SeGrainEntry::Zero));
            for kind in 4..=15 {
                assert_eq!(decode(kind << 60 | low).unwrap_err().kind, K::BadEntry(kind << 60 | low));
            }
        }
        for entry in [1, 0x0fff_ffff_ffff_ffff] {
            assert_eq!(decode(entry), Err(ParseError::whole("grain table entry", K::BadEntry(entry))));
        }
    }

    #[test]
    fn the_lowest_bits_of_an_index_stand_above_the_others() {
        let cases = [
            (0x3000_0000_0000_0000, 0),
            (0x3001_0000_0000_0000, 1),
            (0x3fff_0000_0000_0000, 0xfff),
            (0x3000_0000_0000_0001, 0x1000),
            (0x3234_0000_0000_0001, 0x1234),
            (0x3abc_0000_0123_4567, 0x0012_3456_7abc),
        ];
        for (entry, index) in cases {
            let at = SeGrainEntry::At(Sectors(100 + index * 8));
            assert_eq!(SeGrainEntry::decode(entry, Sectors(100)), Ok(at), "{entry:#x}");
            assert_eq!(at.encode(Sectors(100)), Some(entry));
        }
    }

    #[test]
    fn rejects_a_grain_that_ends_beyond_64_bits_of_bytes() {
        let overflow = Err(ParseError::whole("grain table entry", K::Overflow));
        assert_eq!(SeGrainEntry::decode(0x3fff_ffff_ffff_ffff, Sectors(1)), overflow);
        let last = Sectors(Sectors::MAX.0 - 8);
        assert_eq!(SeGrainEntry::decode(ALLOCATED, last), Ok(SeGrainEntry::At(last)));
        assert_eq!(SeGrainEntry::decode(ALLOCATED, Sectors(last.0 + 1)), overflow);
        assert_eq!(SeGrainEntry::decode(ALLOCATED | 1, Sectors(u64::MAX)), overflow);
    }

    #[test]
    fn refuses_to_write_a_grain_outside_the_grains_or_across_their_borders() {
        let encode = |sector| SeGrainEntry::At(Sectors(sector)).encode(Sectors(16));
        assert_eq!((encode(15), encode(16), encode(17)), (None, Some(ALLOCATED), None));
        assert_eq!(encode(24), Some(0x3001_0000_0000_0000));
        assert_eq!(encode(u64::MAX), None);
    }

    #[test]
    fn entries_are_little_endian_and_a_partial_one_is_left_out() {
        let bytes = [1, 0, 0, 0, 0, 0, 0, 0x30, 9, 9, 9, 9, 9, 9, 9];
        assert_eq!(decode_se_entries(&bytes).collect::<Vec<_>>(), [0x3000_0000_0000_0001]);
        assert_eq!(encode_se_entries(&[0x3000_0000_0000_0001]), bytes[..8]);
    }

    proptest! {
        #[test]
        fn decoding_arbitrary_entries_never_panics(entry: u64, grains: u64, near in any::<bool>()) {
            let (entry, grains) = if near { (entry & !0xffff_ff00_0000, grains >> 24) } else { (entry, grains) };
            let decoded = SeGrainEntry::decode(entry, Sectors(grains));
            if let Ok(decoded @ (SeGrainEntry::Absent | SeGrainEntry::At(_))) = decoded {
                prop_assert_eq!(decoded.encode(Sectors(grains)), Some(entry));
            }
            if let Ok(decoded) = SeDirectoryEntry::decode(entry) {
                prop_assert_eq!(decoded.encode(), entry);
            }
        }

        #[test]
        fn any_grain_decodes_to_itself(index in 0u64..1 << 48, grains in 0u64..1 << 50) {
            let at = SeGrainEntry::At(Sectors(grains + index * 8));
            let entry = at.encode(Sectors(grains)).unwrap();
            prop_assert_eq!(SeGrainEntry::decode(entry, Sectors(grains)), Ok(at));
            prop_assert_eq!(entry >> 60, 3);
        }
    }
}
