//! The two headers of a seSparse extent, ESXi's sparse format for snapshots of large disks, a `SESPARSE` line in the
//! descriptor.
//!
//! There is no specification. All of this is what QEMU reads (`block/vmdk.c`, since 4.1), as strictly: a value that
//! nobody has seen is refused, since what it means for the grains is not known. Entries are in `se_sparse_entry.rs`.

use crate::error::{ParseError, ParseErrorKind};
use crate::field::{Field, whole};
use crate::se_sparse_entry::{SE_SPARSE_ENTRY_SIZE, SE_SPARSE_GRAIN_SECTORS};
use crate::sectors::Sectors;
use crate::tables::TableGeometry;

/// Entries of a grain table of a seSparse extent, each [`SE_SPARSE_ENTRY_SIZE`] bytes; they cover 16 MiB.
pub const SE_SPARSE_GTES_PER_GT: u32 = 4096;
/// Sectors of a grain table of a seSparse extent (32 KiB).
pub const SE_SPARSE_TABLE_SECTORS: Sectors = Sectors(64);
/// The largest capacity of a seSparse extent: 64 TiB in sectors, which makes 4 Mi grain tables.
pub const SE_SPARSE_MAX_CAPACITY: Sectors = Sectors(1 << 37);

const MAGIC: u64 = 0x0000_0000_cafe_babe;
const VOLATILE_MAGIC: u64 = 0x0000_0000_cafe_cafe;
const KNOWN_VERSION: u64 = 0x0000_0002_0000_0001;

const MAGIC_NUMBER: Field = Field("magic", 0);
const VERSION: Field = Field("version", 8);
const CAPACITY: Field = Field("capacity", 16);
const GRAIN_SIZE: Field = Field("grain_size", 24);
const GRAIN_TABLE_SIZE: Field = Field("grain_table_size", 32);
const FLAGS: Field = Field("flags", 40);
const RESERVED: [Field; 4] =
    [Field("reserved1", 48), Field("reserved2", 56), Field("reserved3", 64), Field("reserved4", 72)];
const VOLATILE_HEADER: AreaField = AreaField(Field("volatile_header_offset", 80), Field("volatile_header_size", 88));
const JOURNAL_HEADER: AreaField = AreaField(Field("journal_header_offset", 96), Field("journal_header_size", 104));
const JOURNAL: AreaField = AreaField(Field("journal_offset", 112), Field("journal_size", 120));
const GRAIN_DIRECTORY: AreaField = AreaField(Field("grain_dir_offset", 128), Field("grain_dir_size", 136));
const GRAIN_TABLES: AreaField = AreaField(Field("grain_tables_offset", 144), Field("grain_tables_size", 152));
const FREE_BITMAP: AreaField = AreaField(Field("free_bitmap_offset", 160), Field("free_bitmap_size", 168));
const BACKMAP: AreaField = AreaField(Field("backmap_offset", 176), Field("backmap_size", 184));
const GRAINS: AreaField = AreaField(Field("grains_offset", 192), Field("grains_size", 200));
const PAD: Field = Field("pad", 208);

const FREE_GT_NUMBER: Field = Field("free_gt_number", 8);
const NEXT_TXN_SEQ_NUMBER: Field = Field("next_txn_seq_number", 16);
const REPLAY_JOURNAL: Field = Field("replay_journal", 24);
const VOLATILE_PAD: Field = Field("pad", 32);

/// A run of sectors of the extent file that serves one purpose.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub struct SeArea {
    /// Its first sector in the file.
    pub start: Sectors,
    /// Its length.
    pub len: Sectors,
}

/// The two fields of an area: first sector and length.
#[derive(Clone, Copy)]
struct AreaField(Field, Field);

impl AreaField {
    fn read(self, header: &[u8]) -> Result<SeArea, ParseError> {
        Ok(SeArea { start: self.0.sectors(header)?, len: self.1.sectors(header)? })
    }

    fn put(self, header: &mut [u8], area: SeArea) {
        self.0.put(header, &area.start.0.to_le_bytes());
        self.1.put(header, &area.len.0.to_le_bytes());
    }
}

/// The const header: the first sector of a seSparse extent, which never changes.
///
/// What [`SeSparseHeader::decode`] returned is within all bounds that the header alone can tell: each area ends inside
/// 64 bits of bytes. Whether areas lie in the file, and beside each other, is for callers. A value built by hand is
/// not checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SeSparseHeader {
    /// Size of the extent as the disk sees it, at most [`SE_SPARSE_MAX_CAPACITY`].
    pub capacity: Sectors,
    /// Where the [`SeVolatileHeader`] stands, in the first sector of the area.
    pub volatile_header: SeArea,
    /// Not described anywhere.
    pub journal_header: SeArea,
    /// Not described anywhere.
    pub journal: SeArea,
    /// The grain directory: one entry for each 16 MiB of the disk, and perhaps room behind them.
    pub grain_directory: SeArea,
    /// The grain tables, one behind the other; a directory entry is an index into them.
    pub grain_tables: SeArea,
    /// Not described anywhere.
    pub free_bitmap: SeArea,
    /// Not described anywhere.
    pub backmap: SeArea,
    /// The grains; a table entry is an index into them. No reader bounds them by the length of this area.
    pub grains: SeArea,
}

impl SeSparseHeader {
    /// Bytes of a header.
    pub const LEN: usize = 512;

    /// Reads a const header from the first 512 bytes given.
    ///
    /// # Errors
    /// Too few bytes, another magic; a version, grain size, table size or flags other than the ones that are known;
    /// reserved bytes that are not zero; more than 64 TiB; an area whose end in bytes exceeds 64 bits; an area that
    /// is needed and lies in sector 0; a grain directory without an entry for each grain table.
    pub fn decode(bytes: &[u8]) -> Result<Self, ParseError> {
        let bytes = whole::<{ Self::LEN }>("header", bytes)?;
        if MAGIC_NUMBER.u64(bytes)? != MAGIC {
            return Err(MAGIC_NUMBER.error(ParseErrorKind::WrongMagic("0x00000000cafebabe")));
        }
        VERSION.supported(VERSION.u64(bytes)?, KNOWN_VERSION)?;
        GRAIN_SIZE.supported(GRAIN_SIZE.u64(bytes)?, SE_SPARSE_GRAIN_SECTORS.0)?;
        GRAIN_TABLE_SIZE.supported(GRAIN_TABLE_SIZE.u64(bytes)?, SE_SPARSE_TABLE_SECTORS.0)?;
        FLAGS.supported(FLAGS.u64(bytes)?, 0)?;
        for field in RESERVED {
            field.supported(field.u64(bytes)?, 0)?;
        }
        zeroes(PAD, PAD.bytes::<304>(bytes)?)?;
        let header = Self {
            capacity: CAPACITY.sectors(bytes)?,
            volatile_header: VOLATILE_HEADER.read(bytes)?,
            journal_header: JOURNAL_HEADER.read(bytes)?,
            journal: JOURNAL.read(bytes)?,
            grain_directory: GRAIN_DIRECTORY.read(bytes)?,
            grain_tables: GRAIN_TABLES.read(bytes)?,
            free_bitmap: FREE_BITMAP.read(bytes)?,
            backmap: BACKMAP.read(bytes)?,
            grains: GRAINS.read(bytes)?,
        };
        header.check()?;
        Ok(header)
    }

    /// Writes the header. Meant for tests: nothing here keeps a journal, so nothing here may write such an extent.
    pub fn encode(&self) -> [u8; Self::LEN] {
        let mut out = [0; Self::LEN];
        let numbers = [
            (MAGIC_NUMBER, MAGIC),
            (VERSION, KNOWN_VERSION),
            (CAPACITY, self.capacity.0),
            (GRAIN_SIZE, SE_SPARSE_GRAIN_SECTORS.0),
            (GRAIN_TABLE_SIZE, SE_SPARSE_TABLE_SECTORS.0),
        ];
        for (field, value) in numbers {
            field.put(&mut out, &value.to_le_bytes());
        }
        for (field, area) in self.areas() {
            field.put(&mut out, area);
        }
        out
    }

    /// How the sectors of the extent divide into grain tables and grains.
    ///
    /// # Errors
    /// Those of [`TableGeometry::new`]; none for a decoded header.
    pub fn geometry(&self) -> Result<TableGeometry, ParseError> {
        TableGeometry::new(self.capacity, SE_SPARSE_GRAIN_SECTORS, SE_SPARSE_GTES_PER_GT)
    }

    /// Sectors that the entries of the grain directory take in the file (at most 32 MiB): what there is to read of
    /// [`SeSparseHeader::grain_directory`].
    pub fn directory_sectors(&self) -> Sectors {
        let entries = self.geometry().map_or(0, |geometry| u64::from(geometry.directory_len()));
        Sectors::from_bytes_ceil(entries.saturating_mul(SE_SPARSE_ENTRY_SIZE))
    }

    /// The first sector in the file of a grain table, given the index that a directory entry holds.
    ///
    /// # Errors
    /// The table would not lie in the area of the grain tables.
    pub fn table_start(&self, index: u32) -> Result<Sectors, ParseError> {
        let start = u64::from(index).checked_mul(SE_SPARSE_TABLE_SECTORS.0).map(Sectors);
        let end = start.and_then(|start| start.checked_add(SE_SPARSE_TABLE_SECTORS));
        let inside = start.filter(|_| end.is_some_and(|end| end <= self.grain_tables.len));
        inside.and_then(|start| start.checked_add(self.grain_tables.start)).ok_or_else(|| {
            let tables = self.grain_tables.len.0.checked_div(SE_SPARSE_TABLE_SECTORS.0).unwrap_or(0);
            let kind = ParseErrorKind::OutOfRange { value: u64::from(index), min: 0, max: tables.saturating_sub(1) };
            ParseError::whole("grain directory entry", kind)
        })
    }

    fn areas(&self) -> [(AreaField, SeArea); 8] {
        [
            (VOLATILE_HEADER, self.volatile_header),
            (JOURNAL_HEADER, self.journal_header),
            (JOURNAL, self.journal),
            (GRAIN_DIRECTORY, self.grain_directory),
            (GRAIN_TABLES, self.grain_tables),
            (FREE_BITMAP, self.free_bitmap),
            (BACKMAP, self.backmap),
            (GRAINS, self.grains),
        ]
    }

    fn check(&self) -> Result<(), ParseError> {
        CAPACITY.within(self.capacity.0, 0, SE_SPARSE_MAX_CAPACITY.0)?;
        for (AreaField(field, _), area) in self.areas() {
            field.run(area.start, area.len)?;
        }
        let needed = [
            (VOLATILE_HEADER, self.volatile_header),
            (GRAIN_DIRECTORY, self.grain_directory),
            (GRAIN_TABLES, self.grain_tables),
            (GRAINS, self.grains),
        ];
        for (AreaField(field, _), area) in needed {
            // One sector more than `run` asked for, so that the volatile header can be read whatever its length says.
            field.within(area.start.0, 1, Sectors::MAX.0.saturating_sub(1))?;
        }
        GRAIN_DIRECTORY.1.within(self.grain_directory.len.0, self.directory_sectors().0, Sectors::MAX.0)?;
        Ok(())
    }
}

/// The volatile header: the sector that says whether the extent was closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SeVolatileHeader {
    /// The next grain table to hand out, by its name; readers do not use it.
    pub free_gt_number: u64,
    /// The number of the next transaction, by its name; readers do not use it.
    pub next_txn_seq_number: u64,
}

impl SeVolatileHeader {
    /// Bytes of a header.
    pub const LEN: usize = 512;

    /// Reads a volatile header from the first 512 bytes given.
    ///
    /// # Errors
    /// Too few bytes, another magic, padding that is not zero; [`ParseErrorKind::DirtyJournal`] if `replay_journal`
    /// is set: the tables may be older than the journal.
    pub fn decode(bytes: &[u8]) -> Result<Self, ParseError> {
        let bytes = whole::<{ Self::LEN }>("volatile header", bytes)?;
        if MAGIC_NUMBER.u64(bytes)? != VOLATILE_MAGIC {
            return Err(MAGIC_NUMBER.error(ParseErrorKind::WrongMagic("0x00000000cafecafe")));
        }
        if REPLAY_JOURNAL.u64(bytes)? != 0 {
            return Err(REPLAY_JOURNAL.error(ParseErrorKind::DirtyJournal));
        }
        zeroes(VOLATILE_PAD, VOLATILE_PAD.bytes::<480>(bytes)?)?;
        let next_txn_seq_number = NEXT_TXN_SEQ_NUMBER.u64(bytes)?;
        Ok(Self { free_gt_number: FREE_GT_NUMBER.u64(bytes)?, next_txn_seq_number })
    }

    /// Writes the header of an extent that was closed. Meant for tests.
    pub fn encode(self) -> [u8; Self::LEN] {
        let mut out = [0; Self::LEN];
        MAGIC_NUMBER.put(&mut out, &VOLATILE_MAGIC.to_le_bytes());
        FREE_GT_NUMBER.put(&mut out, &self.free_gt_number.to_le_bytes());
        NEXT_TXN_SEQ_NUMBER.put(&mut out, &self.next_txn_seq_number.to_le_bytes());
        out
    }
}

fn zeroes<const N: usize>(field: Field, bytes: [u8; N]) -> Result<(), ParseError> {
    if bytes == [0; N] { Ok(()) } else { Err(field.error(ParseErrorKind::NotZero)) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ParseErrorKind as K;
    use proptest::prelude::*;

    fn area(start: u64, len: u64) -> SeArea {
        SeArea { start: Sectors(start), len: Sectors(len) }
    }

    /// 1 GiB: 64 grain tables.
    fn sample() -> SeSparseHeader {
        SeSparseHeader {
            capacity: Sectors(2 << 20),
            volatile_header: area(1, 1),
            journal_header: area(2, 2),
            journal: area(2048, 2048),
            grain_directory: area(4096, 2048),
            grain_tables: area(6144, 4096),
            free_bitmap: area(10240, 2048),
            backmap: area(12288, 2048),
            grains: area(14336, 0),
        }
    }

    fn with(change: impl FnOnce(&mut SeSparseHeader)) -> Result<SeSparseHeader, ParseError> {
        let mut header = sample();
        change(&mut header);
        SeSparseHeader::decode(&header.encode())
    }

    fn refused(change: impl FnOnce(&mut SeSparseHeader)) -> (&'static str, K) {
        let error = with(change).unwrap_err();
        (error.field, error.kind)
    }

    fn patched(at: usize, value: u64) -> Result<SeSparseHeader, ParseError> {
        let mut all = sample().encode();
        all[at..at + 8].copy_from_slice(&value.to_le_bytes());
        SeSparseHeader::decode(&all)
    }

    #[test]
    fn fields_lie_where_qemu_reads_them() {
        let bytes = sample().encode();
        let words: Vec<u64> = bytes.as_chunks::<8>().0.iter().map(|&word| u64::from_le_bytes(word)).collect();
        let fixed = [0xcafe_babe, 0x2_0000_0001, 2 << 20, 8, 64, 0, 0, 0, 0, 0];
        assert_eq!(words[..10], fixed);
        let areas = [1, 1, 2, 2, 2048, 2048, 4096, 2048, 6144, 4096, 10240, 2048, 12288, 2048, 14336, 0];
        assert_eq!(words[10..26], areas);
        assert!(words[26..].iter().all(|&word| word == 0));
        assert_eq!(SeSparseHeader::decode(&bytes), Ok(sample()));
    }

    #[test]
    fn needs_512_bytes_and_ignores_what_follows() {
        let mut bytes = sample().encode().to_vec();
        bytes.push(1);
        assert!(SeSparseHeader::decode(&bytes).is_ok());
        for have in [0, 8, 511] {
            let truncated = K::Truncated { need: 512, have: have as u64 };
            assert_eq!(SeSparseHeader::decode(&bytes[..have]).unwrap_err().kind, truncated);
            assert_eq!(SeVolatileHeader::decode(&bytes[..have]).unwrap_err().kind, truncated);
        }
    }

    #[test]
    fn refuses_what_nobody_has_seen() {
        assert_eq!(patched(0, 0x1_cafe_babe).unwrap_err().to_string(), "magic at byte 0: is not 0x00000000cafebabe");
        let cases = [
            (8, 0x2_0000_0000, "version"),
            (8, 1, "version"),
            (24, 7, "grain_size"),
            (24, 16, "grain_size"),
            (32, 63, "grain_table_size"),
            (32, 65, "grain_table_size"),
            (40, 1, "flags"),
            (48, 1, "reserved1"),
            (72, 1 << 63, "reserved4"),
        ];
        for (at, value, field) in cases {
            let error = patched(at, value).unwrap_err();
            assert_eq!(error, ParseError::at_byte(field, at as u64, K::Unsupported(value)));
        }
        for at in [208, 504] {
            assert_eq!(patched(at, 1), Err(ParseError::at_byte("pad", 208, K::NotZero)));
        }
    }

    #[test]
    fn bounds_the_capacity_at_64_tib() {
        let max = 1 << 37;
        let full = with(|h| (h.capacity, h.grain_directory.len) = (Sectors(max), Sectors(65536))).unwrap();
        assert_eq!(full.geometry().unwrap().directory_len(), 4 << 20);
        assert_eq!(full.directory_sectors(), Sectors(65536));
        for value in [max + 1, u64::MAX] {
            assert_eq!(refused(|h| h.capacity = Sectors(value)), ("capacity", K::OutOfRange { value, min: 0, max }));
        }
    }

    #[test]
    fn the_directory_holds_an_entry_for_each_table() {
        assert_eq!(sample().directory_sectors(), Sectors(1));
        for (tables, sectors) in [(0, 0), (1, 1), (64, 1), (65, 2), (128, 2)] {
            let capacity = Sectors(tables * 32768);
            assert!(with(|h| (h.capacity, h.grain_directory.len) = (capacity, Sectors(sectors))).is_ok());
            if let Some(less) = sectors.checked_sub(1) {
                let kind = K::OutOfRange { value: less, min: sectors, max: Sectors::MAX.0 };
                let refused = refused(|h| (h.capacity, h.grain_directory.len) = (capacity, Sectors(less)));
                assert_eq!(refused, ("grain_dir_size", kind));
            }
        }
    }

    #[test]
    fn rejects_areas_beyond_64_bits_of_bytes() {
        let last = Sectors::MAX.0;
        assert!(with(|h| h.grains = area(last - 5, 5)).is_ok());
        assert_eq!(refused(|h| h.grains = area(last - 5, 6)), ("grains_offset", K::Overflow));
        assert_eq!(refused(|h| h.journal = area(u64::MAX, u64::MAX)), ("journal_offset", K::Overflow));
        assert_eq!(refused(|h| h.backmap = area(0, last + 1)), ("backmap_offset", K::Overflow));
        assert!(with(|h| h.backmap = area(0, 0)).is_ok());
        assert_eq!(refused(|h| h.volatile_header = area(last, 0)).0, "volatile_header_offset");
    }

    #[test]
    fn rejects_areas_that_are_needed_and_lie_in_the_header() {
        assert_eq!(refused(|h| h.volatile_header.start = Sectors(0)).0, "volatile_header_offset");
        assert_eq!(refused(|h| h.grain_directory.start = Sectors(0)).0, "grain_dir_offset");
        assert_eq!(refused(|h| h.grain_tables.start = Sectors(0)).0, "grain_tables_offset");
        assert_eq!(refused(|h| h.grains.start = Sectors(0)).0, "grains_offset");
    }

    #[test]
    fn a_table_lies_whole_in_its_area() {
        let header = sample();
        assert_eq!(header.table_start(0), Ok(Sectors(6144)));
        assert_eq!(header.table_start(63), Ok(Sectors(6144 + 63 * 64)));
        for index in [64, u32::MAX] {
            let kind = K::OutOfRange { value: u64::from(index), min: 0, max: 63 };
            assert_eq!(header.table_start(index).unwrap_err().kind, kind);
        }
        let short = SeSparseHeader { grain_tables: area(6144, 127), ..sample() };
        assert!(short.table_start(0).is_ok() && short.table_start(1).is_err());
        let wild = SeSparseHeader { grain_tables: area(u64::MAX, u64::MAX), ..sample() };
        assert!(wild.table_start(1).is_err());
        assert!(SeSparseHeader { grain_tables: area(1, 0), ..sample() }.table_start(0).is_err());
    }

    #[test]
    fn the_table_constants_agree() {
        let bytes = u64::from(SE_SPARSE_GTES_PER_GT) * SE_SPARSE_ENTRY_SIZE;
        assert_eq!(SE_SPARSE_TABLE_SECTORS, Sectors::from_bytes_ceil(bytes));
        assert_eq!(sample().geometry().unwrap().table_coverage().bytes(), Some(16 << 20));
        assert_eq!(SE_SPARSE_MAX_CAPACITY.bytes(), Some(64 << 40));
    }

    #[test]
    fn an_extent_that_was_not_closed_has_an_error_of_its_own() {
        let header = SeVolatileHeader { free_gt_number: 5, next_txn_seq_number: 7 };
        let mut bytes = header.encode();
        assert_eq!(SeVolatileHeader::decode(&bytes), Ok(header));
        assert_eq!(bytes[..16], *b"\xfe\xca\xfe\xca\0\0\0\0\x05\0\0\0\0\0\0\0");
        for at in [24, 31] {
            let mut dirty = bytes;
            dirty[at] = 1;
            let error = ParseError::at_byte("replay_journal", 24, K::DirtyJournal);
            assert_eq!(SeVolatileHeader::decode(&dirty), Err(error));
        }
        bytes[511] = 1;
        assert_eq!(SeVolatileHeader::decode(&bytes), Err(ParseError::at_byte("pad", 32, K::NotZero)));
        assert_eq!(SeVolatileHeader::decode(&sample().encode()).unwrap_err().kind, K::WrongMagic("0x00000000cafecafe"));
    }

    fn any_area() -> impl Strategy<Value = SeArea> {
        (1u64..1 << 54, 0u64..1 << 53).prop_map(|(start, len)| area(start, len))
    }

    proptest! {
        #[test]
        fn any_valid_header_decodes_to_itself(
            capacity in 0u64..=1 << 37, areas in prop::array::uniform8(any_area()), volatile in any::<[u64; 2]>(),
        ) {
            let [volatile_header, journal_header, journal, directory, grain_tables, free_bitmap, backmap, grains] = areas;
            let grain_directory = SeArea { len: Sectors(directory.len.0 | 65536), ..directory };
            let header = SeSparseHeader {
                capacity: Sectors(capacity), volatile_header, journal_header, journal, grain_directory, grain_tables,
                free_bitmap, backmap, grains,
            };
            prop_assert_eq!(SeSparseHeader::decode(&header.encode()), Ok(header));
            let [free_gt_number, next_txn_seq_number] = volatile;
            let header = SeVolatileHeader { free_gt_number, next_txn_seq_number };
            prop_assert_eq!(SeVolatileHeader::decode(&header.encode()), Ok(header));
        }

        #[test]
        fn decoding_arbitrary_bytes_never_panics(
            mut bytes in prop::collection::vec(any::<u8>(), 0..600), identity in any::<bool>(), index: u32,
        ) {
            if identity && bytes.len() >= 512 {
                bytes[..80].copy_from_slice(&sample().encode()[..80]);
                bytes[208..512].fill(0);
                // Small enough, now and then, to pass as sectors.
                (80..208).skip(6).step_by(8).for_each(|at| bytes[at..at + 2].fill(0));
            }
            if let Ok(header) = SeSparseHeader::decode(&bytes) {
                prop_assert_eq!(&header.encode()[..], &bytes[..512]);
                let _ = header.table_start(index);
            }
            let _ = SeVolatileHeader::decode(&bytes);
        }
    }
}
