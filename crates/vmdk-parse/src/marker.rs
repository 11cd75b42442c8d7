//! The markers of a stream: what stands between the grains of a stream-optimized extent.
//!
//! A stream is a row of records, each of which starts on a sector: grains, which carry their place on the disk and
//! their length with them, and metadata, which carry a type and a number of sectors (VMware Virtual Disk Format 1.1,
//! "Stream-Optimized Compressed Sparse Extents"). Every record takes at least one sector, so who goes from one to
//! the next always advances. A grain table entry points at the record of a grain, not at its compressed bytes.

use crate::error::{ParseError, ParseErrorKind};
use crate::field::Field;
use crate::header::MAX_GTES_PER_GT;
use crate::sectors::{SECTOR_SIZE, Sectors};
use crate::tables::{GTE_SIZE, MAX_DIRECTORY_LEN, TableGeometry};

const LBA: Field = Field("lba", 0);
const VAL: Field = Field("val", 0);
const SIZE: Field = Field("size", 8);
const TYPE: Field = Field("type", 12);
const PROGRESS_LBA: Field = Field("lba", 16);

const END_OF_STREAM: u32 = 0;
const TABLE: u32 = 1;
const DIRECTORY: u32 = 2;
const FOOTER: u32 = 3;
const PROGRESS: u32 = 4;

/// The most sectors of a grain table behind its marker: 512 entries, 4 sectors.
pub const MAX_TABLE_MARKER_SECTORS: u64 = (MAX_GTES_PER_GT as u64 * GTE_SIZE).div_ceil(SECTOR_SIZE);
/// The most sectors of a grain directory behind its marker: [`MAX_DIRECTORY_LEN`] entries, 128 MiB.
pub const MAX_DIRECTORY_MARKER_SECTORS: u64 = (MAX_DIRECTORY_LEN * GTE_SIZE).div_ceil(SECTOR_SIZE);

/// The most bytes that a grain of so many sectors can take when compressed; `None` if they do not fit in the `size`
/// of a marker (grains above 3.5 GiB).
///
/// What cannot be compressed grows. The bound is zlib's for a compressor of unknown parameters, since anybody may
/// have written the stream: `n + ceil(n / 8) + ceil(n / 64) + 11` (zlib, `deflateBound`, "conservative upper
/// bound"; zlib 1.3 returns less). `compressBound`, 65569 for 64 KiB, holds for the usual window and memory only;
/// VMware wrote 65562 bytes for such a grain.
pub fn max_compressed_len(grain_size: Sectors) -> Option<u32> {
    let grain = grain_size.bytes()?;
    let bound = grain.checked_add(grain.div_ceil(8))?.checked_add(grain.div_ceil(64))?.checked_add(11)?;
    u32::try_from(bound).ok()
}

/// The head of a grain record: the 12 bytes that a grain table entry points at. The compressed bytes (a zlib stream,
/// RFC 1950) follow at once, and zeroes up to the next sector. The last record of a file may lack those (QEMU).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct GrainRecord {
    /// The first sector of the grain on the disk, relative to the extent.
    pub lba: Sectors,
    /// How many bytes the compressed grain takes; never 0 in a decoded head.
    pub len: u32,
}

impl GrainRecord {
    /// Bytes of the head: where in the record the compressed bytes begin.
    pub const HEAD_LEN: usize = 12;

    /// Reads the head of a grain record from the first 12 bytes given. Neither number is bounded before
    /// [`GrainRecord::check`]: nothing is to be allocated by them.
    ///
    /// # Errors
    /// Too few bytes; a size of 0, which is not a grain but another marker.
    pub fn decode(bytes: &[u8]) -> Result<Self, ParseError> {
        let record = Self { lba: LBA.sectors(bytes)?, len: SIZE.u32(bytes)? };
        SIZE.within(u64::from(record.len), 1, u64::from(u32::MAX))?;
        Ok(record)
    }

    /// Whether the record can be one of this extent.
    ///
    /// # Errors
    /// The grain starts past the end of the extent, or not where a grain starts; it is longer than
    /// [`max_compressed_len`], or empty.
    pub fn check(self, geometry: &TableGeometry) -> Result<(), ParseError> {
        let grain_size = geometry.grain_size();
        let last = geometry.capacity().0.checked_sub(1).ok_or_else(|| LBA.error(ParseErrorKind::Overflow))?;
        LBA.within(self.lba.0, 0, last)?;
        if self.lba.0.checked_rem(grain_size.0) != Some(0) {
            return Err(LBA.error(ParseErrorKind::NotMultiple { value: self.lba.0, unit: grain_size.0 }));
        }
        let max = max_compressed_len(grain_size).unwrap_or(u32::MAX);
        SIZE.within(u64::from(self.len), 1, u64::from(max))?;
        Ok(())
    }

    /// Sectors of the record: head, compressed bytes and padding.
    pub fn sectors(self) -> Sectors {
        // Far from an overflow: both together are 4 GiB and 11 bytes at most.
        Sectors::from_bytes_ceil(u64::from(self.len).saturating_add(12))
    }

    /// The 12 bytes of the head.
    pub fn encode(self) -> [u8; Self::HEAD_LEN] {
        let mut out = [0; Self::HEAD_LEN];
        LBA.put(&mut out, &self.lba.0.to_le_bytes());
        SIZE.put(&mut out, &self.len.to_le_bytes());
        out
    }

    /// A whole record: head, the bytes of the compressed grain, zeroes up to the next sector.
    ///
    /// # Errors
    /// There are no bytes, or more than the 32 bits of `size` can tell.
    pub fn encode_with(lba: Sectors, compressed: &[u8]) -> Result<Vec<u8>, ParseError> {
        let len = u32::try_from(compressed.len())
            .map_err(|_| SIZE.error(ParseErrorKind::TooLong { limit: u64::from(u32::MAX) }))?;
        SIZE.within(u64::from(len), 1, u64::from(u32::MAX))?;
        let mut out = Self { lba, len }.encode().to_vec();
        out.extend_from_slice(compressed);
        out.resize(out.len().next_multiple_of(512), 0);
        Ok(out)
    }
}

/// The start of a record of a stream.
///
/// What [`Marker::decode`] returned is within the bounds named here. A value built by hand is not checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Marker {
    /// A compressed grain, see [`GrainRecord`]. Its length is within nothing yet: [`GrainRecord::check`].
    Grain(GrainRecord),
    /// The stream ends. A sector of zeroes reads as this, too.
    EndOfStream,
    /// A grain table follows.
    Table {
        /// Its length, 1 to [`MAX_TABLE_MARKER_SECTORS`].
        sectors: Sectors,
    },
    /// The grain directory follows.
    Directory {
        /// Its length, 1 to [`MAX_DIRECTORY_MARKER_SECTORS`].
        sectors: Sectors,
    },
    /// The footer, a header whose `gdOffset` is known, follows.
    Footer {
        /// Its length: 1.
        sectors: Sectors,
    },
    /// How far the writer has come; nothing follows, and who reads a file may pass over it. Type 4 is in no
    /// specification. It shows up in exports of vSphere (VirtualBox, `VMDK_MARKER_UNSPECIFIED`); VMware's own stream
    /// library writes it with `val` 0, often four times in a row, and reads it as one sector whatever `val` is
    /// (`StreamVmdkReader`, `GRAIN_MARKER_PROGRESS`).
    Progress {
        /// A sector of the disk, relative to the extent; untested.
        lba: Sectors,
    },
}

impl Marker {
    /// Reads the start of a record. One sector is enough; where a file ends early, 12 bytes are for a grain and 16
    /// for the rest (24 for [`Marker::Progress`]).
    ///
    /// # Errors
    /// Too few bytes, a type that is not known, metadata longer than there is any, sectors after the end.
    pub fn decode(sector: &[u8]) -> Result<Self, ParseError> {
        if SIZE.u32(sector)? != 0 {
            return GrainRecord::decode(sector).map(Self::Grain);
        }
        let kind = TYPE.u32(sector)?;
        let sectors = VAL.sectors(sector)?;
        Ok(match kind {
            END_OF_STREAM => {
                VAL.exactly(sectors.0, 0)?;
                Self::EndOfStream
            }
            TABLE => {
                VAL.within(sectors.0, 1, MAX_TABLE_MARKER_SECTORS)?;
                Self::Table { sectors }
            }
            DIRECTORY => {
                VAL.within(sectors.0, 1, MAX_DIRECTORY_MARKER_SECTORS)?;
                Self::Directory { sectors }
            }
            FOOTER => {
                VAL.exactly(sectors.0, 1)?;
                Self::Footer { sectors }
            }
            PROGRESS => Self::Progress { lba: PROGRESS_LBA.sectors(sector)? },
            unknown => return Err(TYPE.error(ParseErrorKind::UnknownType(unknown))),
        })
    }

    /// Sectors of the whole record, from this marker to the next: a grain with its head and padding, metadata with
    /// their marker. At least 1; `None` where a value built by hand exceeds [`Sectors::MAX`].
    pub fn record_sectors(self) -> Option<Sectors> {
        let sectors = match self {
            Self::Grain(record) => record.sectors(),
            Self::EndOfStream | Self::Progress { .. } => Sectors(1),
            Self::Table { sectors } | Self::Directory { sectors } | Self::Footer { sectors } => {
                sectors.checked_add(Sectors(1))?
            }
        };
        Some(sectors).filter(|sectors| *sectors <= Sectors::MAX)
    }

    /// The first sector of the record. Of a grain it holds the head and zeroes: [`GrainRecord::encode_with`] makes
    /// the whole record.
    pub fn encode(self) -> [u8; 512] {
        let mut out = [0; 512];
        let (kind, val) = match self {
            Self::Grain(record) => {
                LBA.put(&mut out, &record.encode());
                return out;
            }
            Self::EndOfStream => (END_OF_STREAM, Sectors(0)),
            Self::Table { sectors } => (TABLE, sectors),
            Self::Directory { sectors } => (DIRECTORY, sectors),
            Self::Footer { sectors } => (FOOTER, sectors),
            Self::Progress { lba } => {
                PROGRESS_LBA.put(&mut out, &lba.0.to_le_bytes());
                (PROGRESS, Sectors(0))
            }
        };
        VAL.put(&mut out, &val.0.to_le_bytes());
        TYPE.put(&mut out, &kind.to_le_bytes());
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::samples::sample_file;
    use ParseErrorKind as K;
    use proptest::prelude::*;

    fn marker(val: u64, size: u32, kind: u32) -> Result<Marker, ParseError> {
        let mut sector = [0; 512];
        sector[..8].copy_from_slice(&val.to_le_bytes());
        sector[8..12].copy_from_slice(&size.to_le_bytes());
        sector[12..16].copy_from_slice(&kind.to_le_bytes());
        Marker::decode(&sector)
    }

    fn grain(lba: u64, len: u32) -> GrainRecord {
        GrainRecord { lba: Sectors(lba), len }
    }

    #[test]
    fn a_size_other_than_0_makes_a_grain_whatever_stands_at_the_type() {
        for kind in [0, 1, 99, u32::MAX] {
            assert_eq!(marker(128, 312, kind), Ok(Marker::Grain(grain(128, 312))));
        }
        assert_eq!(marker(u64::MAX, u32::MAX, 0), Ok(Marker::Grain(grain(u64::MAX, u32::MAX))));
    }

    #[test]
    fn reads_every_known_type_and_refuses_the_others() {
        assert_eq!(marker(0, 0, 0), Ok(Marker::EndOfStream));
        assert_eq!(marker(4, 0, 1), Ok(Marker::Table { sectors: Sectors(4) }));
        assert_eq!(marker(4, 0, 2), Ok(Marker::Directory { sectors: Sectors(4) }));
        assert_eq!(marker(1, 0, 3), Ok(Marker::Footer { sectors: Sectors(1) }));
        assert_eq!(marker(0, 0, 4), Ok(Marker::Progress { lba: Sectors(0) }));
        for kind in [5, 256, u32::MAX] {
            assert_eq!(marker(0, 0, kind), Err(ParseError::at_byte("type", 12, K::UnknownType(kind))));
        }
    }

    #[test]
    fn bounds_the_sectors_of_metadata_on_both_sides() {
        let bounds = [(1, 1, MAX_TABLE_MARKER_SECTORS), (2, 1, MAX_DIRECTORY_MARKER_SECTORS)];
        assert_eq!((MAX_TABLE_MARKER_SECTORS, MAX_DIRECTORY_MARKER_SECTORS), (4, 262_144));
        for (kind, min, max) in bounds {
            assert!(marker(min, 0, kind).is_ok() && marker(max, 0, kind).is_ok());
            for value in [min - 1, max + 1, u64::MAX] {
                assert_eq!(marker(value, 0, kind).unwrap_err().kind, K::OutOfRange { value, min, max });
            }
        }
        for value in [0, 2, u64::MAX] {
            assert_eq!(marker(value, 0, 3).unwrap_err().kind, K::Mismatch { value, expected: 1 });
        }
        assert_eq!(marker(1, 0, 0).unwrap_err().kind, K::Mismatch { value: 1, expected: 0 });
    }

    #[test]
    fn reads_no_more_bytes_than_the_record_has() {
        let grain_head = grain(0, 5).encode();
        assert!(Marker::decode(&grain_head).is_ok());
        assert!(Marker::decode(&grain_head[..11]).is_err());
        let end = Marker::EndOfStream.encode();
        assert!(Marker::decode(&end[..16]).is_ok());
        assert_eq!(Marker::decode(&end[..15]).unwrap_err().kind, K::Truncated { need: 16, have: 15 });
        let progress = Marker::Progress { lba: Sectors(7) }.encode();
        assert!(Marker::decode(&progress[..24]).is_ok());
        assert!(Marker::decode(&progress[..23]).is_err());
        assert!(Marker::decode(&[]).is_err());
    }

    #[test]
    fn a_grain_record_takes_its_head_and_whole_sectors() {
        for (len, sectors) in [(1, 1), (500, 1), (501, 2), (1012, 2), (1013, 3), (u32::MAX, 8_388_609)] {
            assert_eq!(grain(0, len).sectors(), Sectors(sectors), "{len}");
            assert_eq!(Marker::Grain(grain(0, len)).record_sectors(), Some(Sectors(sectors)));
        }
    }

    #[test]
    fn metadata_take_one_sector_more_than_they_say_and_type_4_takes_one() {
        assert_eq!(Marker::Table { sectors: Sectors(4) }.record_sectors(), Some(Sectors(5)));
        assert_eq!(Marker::Directory { sectors: Sectors(9) }.record_sectors(), Some(Sectors(10)));
        assert_eq!(Marker::Footer { sectors: Sectors(1) }.record_sectors(), Some(Sectors(2)));
        assert_eq!(Marker::EndOfStream.record_sectors(), Some(Sectors(1)));
        assert_eq!(Marker::Progress { lba: Sectors(u64::MAX) }.record_sectors(), Some(Sectors(1)));
        assert_eq!(marker(77, 0, 4).unwrap().record_sectors(), Some(Sectors(1)), "as VMware reads it");
        assert_eq!(Marker::Table { sectors: Sectors(u64::MAX) }.record_sectors(), None);
        assert_eq!(Marker::Table { sectors: Sectors::MAX }.record_sectors(), None);
    }

    #[test]
    fn allows_what_any_compressor_may_make_of_a_grain() {
        let compress_bound = |n: u64| n + (n >> 12) + (n >> 14) + (n >> 25) + 13;
        for grain_size in [8, 16, 128, 4096, crate::MAX_GRAIN_SECTORS] {
            let max = u64::from(max_compressed_len(Sectors(grain_size)).unwrap());
            assert!(max >= compress_bound(grain_size * 512), "{grain_size}");
        }
        assert_eq!(max_compressed_len(Sectors(128)), Some(65536 + 8192 + 1024 + 11));
        assert_eq!(max_compressed_len(Sectors(8 << 20)), None);
        assert_eq!(max_compressed_len(Sectors(u64::MAX)), None);
    }

    #[test]
    fn checks_a_grain_against_its_extent() {
        let geometry = TableGeometry::new(Sectors(1000), Sectors(128), 512).unwrap();
        let max = max_compressed_len(Sectors(128)).unwrap();
        for good in [grain(0, 1), grain(896, max)] {
            assert_eq!(good.check(&geometry), Ok(()));
        }
        let kind = |record: GrainRecord| record.check(&geometry).unwrap_err().kind;
        assert_eq!(kind(grain(1024, 1)), K::OutOfRange { value: 1024, min: 0, max: 999 });
        assert_eq!(kind(grain(127, 1)), K::NotMultiple { value: 127, unit: 128 });
        for value in [0, max + 1, u32::MAX] {
            let kind_expected = K::OutOfRange { value: u64::from(value), min: 1, max: u64::from(max) };
            assert_eq!(kind(grain(0, value)), kind_expected);
        }
        let empty = TableGeometry::new(Sectors(0), Sectors(128), 512).unwrap();
        assert!(grain(0, 1).check(&empty).is_err());
    }

    #[test]
    fn a_head_without_bytes_is_no_grain() {
        let error = GrainRecord::decode(&[0; 12]).unwrap_err();
        assert_eq!((error.field, error.at), ("size", crate::At::Byte(8)));
        assert!(GrainRecord::encode_with(Sectors(0), &[]).is_err());
    }

    #[test]
    fn walks_the_streams_that_vmware_wrote_to_their_last_byte() {
        let samples = [
            ("vmware-streamOptimized.vmdk", 52, 0, "the tables stand before the grains"),
            ("vmware-streamOptimized-v3.vmdk", 151, 53, "tables among the grains"),
        ];
        for (name, grains, tables, why) in samples {
            let Some(file) = sample_file(name) else { return };
            let header = crate::SparseHeader::decode(&file).unwrap();
            let geometry = header.geometry().unwrap();
            let mut at = header.overhead.bytes().unwrap() as usize;
            let mut found = (0, 0);
            let mut last = None;
            while at < file.len() {
                let marker = Marker::decode(&file[at..]).unwrap();
                match marker {
                    Marker::Grain(record) => {
                        record.check(&geometry).unwrap();
                        let end = at + GrainRecord::HEAD_LEN + record.len as usize;
                        let data = &file[at + GrainRecord::HEAD_LEN..end];
                        let whole = GrainRecord::encode_with(record.lba, data).unwrap();
                        assert_eq!(whole, file[at..at + whole.len()], "{name}");
                        found.0 += 1;
                    }
                    Marker::Table { .. } => found.1 += 1,
                    Marker::Footer { .. } => drop(crate::SparseHeader::decode(&file[at + 512..]).unwrap()),
                    _ => (),
                }
                if !matches!(marker, Marker::Grain(_)) {
                    assert_eq!(marker.encode(), file[at..at + 512], "{name}");
                }
                last = Some(marker);
                at += marker.record_sectors().unwrap().bytes().unwrap() as usize;
            }
            assert_eq!((found, at, last), ((grains, tables), file.len(), Some(Marker::EndOfStream)), "{name}: {why}");
        }
    }

    fn any_marker() -> impl Strategy<Value = Marker> {
        prop_oneof![
            (any::<u64>(), 1u32..).prop_map(|(lba, len)| Marker::Grain(grain(lba, len))),
            Just(Marker::EndOfStream),
            (1..=MAX_TABLE_MARKER_SECTORS).prop_map(|n| Marker::Table { sectors: Sectors(n) }),
            (1..=MAX_DIRECTORY_MARKER_SECTORS).prop_map(|n| Marker::Directory { sectors: Sectors(n) }),
            Just(Marker::Footer { sectors: Sectors(1) }),
            any::<u64>().prop_map(|lba| Marker::Progress { lba: Sectors(lba) }),
        ]
    }

    proptest! {
        #[test]
        fn any_valid_marker_decodes_to_itself(marker in any_marker()) {
            prop_assert_eq!(Marker::decode(&marker.encode()), Ok(marker));
        }

        #[test]
        fn a_written_grain_takes_the_sectors_it_says(lba: u64, data in prop::collection::vec(any::<u8>(), 1..2000)) {
            let bytes = GrainRecord::encode_with(Sectors(lba), &data).unwrap();
            let record = GrainRecord::decode(&bytes).unwrap();
            prop_assert_eq!((record.lba.0, record.len as usize), (lba, data.len()));
            prop_assert_eq!(record.sectors().bytes().unwrap() as usize, bytes.len());
            prop_assert_eq!(&bytes[GrainRecord::HEAD_LEN..][..data.len()], &data[..]);
        }

        #[test]
        fn decoding_arbitrary_bytes_never_panics_and_always_advances(
            mut bytes in prop::collection::vec(any::<u8>(), 0..40), metadata in any::<bool>(), kind in 0u8..6,
        ) {
            if metadata && bytes.len() >= 16 {
                bytes[1..16].fill(0);
                bytes[12] = kind;
            }
            if let Ok(marker) = Marker::decode(&bytes) {
                prop_assert!(marker.record_sectors().unwrap() >= Sectors(1));
                prop_assert_eq!(Marker::decode(&marker.encode()), Ok(marker));
            }
            let _ = GrainRecord::decode(&bytes);
        }
    }
}
