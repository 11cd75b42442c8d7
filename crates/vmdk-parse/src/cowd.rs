//! The header of a COWD extent: ESX's own sparse format, a `VMFSSPARSE` line in the descriptor.

use crate::error::{ParseError, ParseErrorKind};
use crate::field::{Field, whole};
use crate::sectors::Sectors;
use crate::tables::{GTE_SIZE, TableGeometry};

/// Entries of a grain table of a COWD extent, each [`GTE_SIZE`] bytes.
pub const COWD_GTES_PER_GT: u32 = 4096;
/// Sectors of a grain table of a COWD extent (16 KiB).
pub const COWD_TABLE_SECTORS: Sectors = Sectors(32);
/// The largest grain of a COWD extent, in sectors (1 MiB); the usual one has a single sector.
pub const COWD_MAX_GRAIN_SECTORS: u64 = 2048;
/// Byte offset of `freeSector`, 4 bytes, to be patched in place by whoever appends to the file: ESX hands out the
/// sectors from there on.
pub const COWD_FREE_SECTOR_AT: u64 = 28;
/// Byte offset of `uncleanShutdown`, 4 bytes, 0 or 1, to be patched in place.
pub const COWD_UNCLEAN_SHUTDOWN_AT: u64 = 1648;

const MAGIC: [u8; 4] = *b"COWD";
const HEADER_SECTORS: u64 = 4;

const MAGIC_NUMBER: Field = Field("magicNumber", 0);
const VERSION: Field = Field("version", 4);
const FLAGS: Field = Field("flags", 8);
const NUM_SECTORS: Field = Field("numSectors", 12);
const GRAIN_SIZE: Field = Field("grainSize", 16);
const GD_OFFSET: Field = Field("gdOffset", 20);
const NUM_GD_ENTRIES: Field = Field("numGDEntries", 24);
const FREE_SECTOR: Field = Field("freeSector", COWD_FREE_SECTOR_AT);
const ROOT_OR_PARENT: Field = Field("parentFileName", 32);
const PARENT_GENERATION: Field = Field("parentGeneration", 1056);
const GENERATION: Field = Field("generation", 1060);
const NAME: Field = Field("name", 1064);
const DESCRIPTION: Field = Field("description", 1124);
const SAVED_GENERATION: Field = Field("savedGeneration", 1636);
const RESERVED: Field = Field("reserved", 1640);
const UNCLEAN_SHUTDOWN: Field = Field("uncleanShutdown", COWD_UNCLEAN_SHUTDOWN_AT);
const PADDING: Field = Field("padding", 1652);

/// The first four sectors of a COWD extent (VMware Virtual Disk Format 1.1, "ESX Server Sparse Extents",
/// `COWDisk_Header`).
///
/// Grain directory and grain tables work as in a hosted sparse extent, with other sizes
/// ([`CowdHeader::geometry`]): both entries are 32-bit sector numbers, 0 is absent, and 1 has no meaning of its own
/// ([`crate::GrainEntry::decode`] without the zeroed-grain flag). A grain table comes into being with its first grain:
/// directory entries of 0 are normal. There are no redundant tables.
///
/// What [`CowdHeader::decode`] returned is within all bounds that the header alone can tell, and
/// [`CowdHeader::encode`] gives the very bytes back. A value built by hand is checked there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CowdHeader {
    /// 3 in all known files ([`CowdHeader::ROOT`] and "can be checked"); other bits are kept.
    pub flags: u32,
    /// `numSectors`, the size of the extent as the disk sees it; below 2^32.
    pub capacity: Sectors,
    /// Size of a grain, 1 to [`COWD_MAX_GRAIN_SECTORS`]; no power of two is asked for.
    pub grain_size: Sectors,
    /// Where the grain directory starts: right behind the header, at sector 4, in all known files.
    pub gd_offset: Sectors,
    /// The next free sector of the file. Untested: QEMU appends and does not keep it up to date.
    pub free_sector: Sectors,
    /// A union whose meaning the flags tell: [`CowdHeader::root_geometry`], [`CowdHeader::parent_file_name`].
    pub root_or_parent: [u8; 1024],
    /// Generation of the parent; means nothing in a root.
    pub parent_generation: u32,
    /// Generation of this extent. Like the next three it is not used (so VirtualBox quotes the specification).
    pub generation: u32,
    /// Name of the disk, ended by a zero byte.
    pub name: [u8; 60],
    /// Description of the disk, ended by a zero byte.
    pub description: [u8; 512],
    /// Generation that was saved last.
    pub saved_generation: u32,
    /// Kept as it is.
    pub reserved: [u8; 8],
    /// Other than 0: somebody had the extent open for writing and did not close it.
    pub unclean_shutdown: u32,
    /// Kept as it is.
    pub padding: [u8; 396],
}

impl CowdHeader {
    /// Bytes of a header.
    pub const LEN: usize = 2048;
    /// Bit 0 of the flags: the extent calls itself a root, and holds a geometry instead of a parent's name. ESX sets
    /// it in snapshots as well: the descriptor says who the parent is.
    pub const ROOT: u32 = 1;
    /// Bit 2 of the flags: the extent is inconsistent. By its name alone, `COWDISK_INCONSISTENT` in VMware's sources;
    /// not seen in a file.
    pub const INCONSISTENT: u32 = 1 << 2;

    /// The header of a new, empty extent: no grain table, and the first free sector behind the grain directory.
    ///
    /// # Errors
    /// Sizes that a COWD extent cannot have, see [`CowdHeader::decode`].
    pub fn new(capacity: Sectors, grain_size: Sectors) -> Result<Self, ParseError> {
        let gd_offset = Sectors(HEADER_SECTORS);
        let mut header = Self {
            flags: 3,
            capacity,
            grain_size,
            gd_offset,
            free_sector: gd_offset,
            root_or_parent: [0; 1024],
            parent_generation: 0,
            generation: 0,
            name: [0; 60],
            description: [0; 512],
            saved_generation: 0,
            reserved: [0; 8],
            unclean_shutdown: 0,
            padding: [0; 396],
        };
        header.check()?;
        let end = gd_offset.checked_add(header.directory_sectors());
        header.free_sector = end.ok_or_else(|| FREE_SECTOR.error(ParseErrorKind::Overflow))?;
        Ok(header)
    }

    /// Reads a header from the first 2048 bytes given.
    ///
    /// # Errors
    /// Too few bytes, another magic, a version other than 1; a grain of 0 sectors or of more than
    /// [`COWD_MAX_GRAIN_SECTORS`]; a grain directory inside the header; `numGDEntries` that are not as many as the
    /// size asks for, or more than [`crate::MAX_DIRECTORY_LEN`].
    pub fn decode(bytes: &[u8]) -> Result<Self, ParseError> {
        let bytes = whole::<{ Self::LEN }>("header", bytes)?;
        if !bytes.starts_with(&MAGIC) {
            return Err(MAGIC_NUMBER.error(ParseErrorKind::WrongMagic("\"COWD\"")));
        }
        let version = VERSION.u32(bytes)?;
        if version != 1 {
            return Err(VERSION.error(ParseErrorKind::UnsupportedVersion(version)));
        }
        let sectors = |field: Field| field.u32(bytes).map(|value| Sectors(u64::from(value)));
        let header = Self {
            flags: FLAGS.u32(bytes)?,
            capacity: sectors(NUM_SECTORS)?,
            grain_size: sectors(GRAIN_SIZE)?,
            gd_offset: sectors(GD_OFFSET)?,
            free_sector: sectors(FREE_SECTOR)?,
            root_or_parent: ROOT_OR_PARENT.bytes(bytes)?,
            parent_generation: PARENT_GENERATION.u32(bytes)?,
            generation: GENERATION.u32(bytes)?,
            name: NAME.bytes(bytes)?,
            description: DESCRIPTION.bytes(bytes)?,
            saved_generation: SAVED_GENERATION.u32(bytes)?,
            reserved: RESERVED.bytes(bytes)?,
            unclean_shutdown: UNCLEAN_SHUTDOWN.u32(bytes)?,
            padding: PADDING.bytes(bytes)?,
        };
        let geometry = header.check()?;
        NUM_GD_ENTRIES.exactly(u64::from(NUM_GD_ENTRIES.u32(bytes)?), u64::from(geometry.directory_len()))?;
        Ok(header)
    }

    /// Writes the header; `numGDEntries` follows from the sizes.
    ///
    /// # Errors
    /// Those of [`CowdHeader::decode`], for a header that could not be read again.
    pub fn encode(&self) -> Result<[u8; Self::LEN], ParseError> {
        let geometry = self.check()?;
        let mut out = [0; Self::LEN];
        let numbers = [
            (VERSION, Sectors(1)),
            (FLAGS, Sectors(u64::from(self.flags))),
            (NUM_SECTORS, self.capacity),
            (GRAIN_SIZE, self.grain_size),
            (GD_OFFSET, self.gd_offset),
            (NUM_GD_ENTRIES, Sectors(u64::from(geometry.directory_len()))),
            (FREE_SECTOR, self.free_sector),
            (PARENT_GENERATION, Sectors(u64::from(self.parent_generation))),
            (GENERATION, Sectors(u64::from(self.generation))),
            (SAVED_GENERATION, Sectors(u64::from(self.saved_generation))),
            (UNCLEAN_SHUTDOWN, Sectors(u64::from(self.unclean_shutdown))),
        ];
        for (field, Sectors(value)) in numbers {
            let value = u32::try_from(value).map_err(|_| field.error(ParseErrorKind::Overflow))?;
            field.put(&mut out, &value.to_le_bytes());
        }
        MAGIC_NUMBER.put(&mut out, &MAGIC);
        ROOT_OR_PARENT.put(&mut out, &self.root_or_parent);
        NAME.put(&mut out, &self.name);
        DESCRIPTION.put(&mut out, &self.description);
        RESERVED.put(&mut out, &self.reserved);
        PADDING.put(&mut out, &self.padding);
        Ok(out)
    }

    /// How the sectors of the extent divide into grain tables and grains.
    ///
    /// # Errors
    /// Those of [`TableGeometry::new`]; none for a decoded header.
    pub fn geometry(&self) -> Result<TableGeometry, ParseError> {
        TableGeometry::new(self.capacity, self.grain_size, COWD_GTES_PER_GT)
    }

    /// Sectors that the grain directory takes in the file; its last sector is padded. 0 where there is no
    /// [`CowdHeader::geometry`].
    pub fn directory_sectors(&self) -> Sectors {
        let entries = self.geometry().map_or(0, |geometry| u64::from(geometry.directory_len()));
        Sectors::from_bytes_ceil(entries.saturating_mul(GTE_SIZE))
    }

    /// Cylinders, heads and sectors of a root; `None` in an extent that names its parent.
    pub fn root_geometry(&self) -> Option<[u32; 3]> {
        let (words, _) = self.root_or_parent.as_chunks::<4>();
        let words = words.first_chunk::<3>().filter(|_| self.flags & Self::ROOT != 0)?;
        Some(words.map(u32::from_le_bytes))
    }

    /// The bytes of the parent's name, without the zero byte that ends it; `None` in a root. The encoding is not
    /// known, and no program opens a parent by this name: the descriptor has one, too.
    pub fn parent_file_name(&self) -> Option<&[u8]> {
        let name = self.root_or_parent.split(|&byte| byte == 0).next();
        name.filter(|_| self.flags & Self::ROOT == 0)
    }

    /// Whether the extent has to be checked before it is written to: it was not closed, or calls itself inconsistent.
    pub fn needs_check(&self) -> bool {
        self.unclean_shutdown != 0 || self.flags & Self::INCONSISTENT != 0
    }

    fn check(&self) -> Result<TableGeometry, ParseError> {
        let max = u64::from(u32::MAX);
        NUM_SECTORS.within(self.capacity.0, 0, max)?;
        GRAIN_SIZE.within(self.grain_size.0, 1, COWD_MAX_GRAIN_SECTORS)?;
        GD_OFFSET.within(self.gd_offset.0, HEADER_SECTORS, max)?;
        FREE_SECTOR.within(self.free_sector.0, 0, max)?;
        self.geometry().map_err(|error| NUM_SECTORS.error(error.kind))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ParseErrorKind as K;
    use proptest::prelude::*;

    fn sample() -> CowdHeader {
        CowdHeader::new(Sectors(0x0ca0_0000), Sectors(1)).unwrap()
    }

    fn patched(at: usize, bytes: &[u8]) -> Result<CowdHeader, ParseError> {
        let mut all = sample().encode().unwrap();
        all[at..at + bytes.len()].copy_from_slice(bytes);
        CowdHeader::decode(&all)
    }

    fn refused(at: usize, value: u32) -> (&'static str, K) {
        let error = patched(at, &value.to_le_bytes()).unwrap_err();
        assert_eq!(error.at, crate::At::Byte(at as u64));
        (error.field, error.kind)
    }

    #[test]
    fn writes_the_bytes_that_esx_writes() {
        let mut expected = [0; 2048];
        let start = b"COWD\x01\0\0\0\x03\0\0\0\0\0\xa0\x0c\x01\0\0\0\x04\0\0\0\0\xca\0\0\x98\x01\0\0";
        expected[..32].copy_from_slice(start);
        assert_eq!(sample().encode().unwrap(), expected);
        assert_eq!(CowdHeader::decode(&expected), Ok(sample()));
        assert_eq!(sample().free_sector, Sectors(4 + 404));
    }

    #[test]
    fn fields_lie_where_the_specification_has_them() {
        let header = CowdHeader {
            root_or_parent: [1; 1024],
            parent_generation: 0x0202_0202,
            generation: 0x0303_0303,
            name: [4; 60],
            description: [5; 512],
            saved_generation: 0x0606_0606,
            reserved: [7; 8],
            unclean_shutdown: 0x0808_0808,
            padding: [9; 396],
            ..sample()
        };
        let bytes = header.encode().unwrap();
        let runs = [
            (32..1056, 1),
            (1056..1060, 2),
            (1060..1064, 3),
            (1064..1124, 4),
            (1124..1636, 5),
            (1636..1640, 6),
            (1640..1648, 7),
            (1648..1652, 8),
            (1652..2048, 9),
        ];
        for (run, value) in runs {
            assert!(bytes[run.clone()].iter().all(|&byte| byte == value), "{run:?}");
        }
    }

    #[test]
    fn needs_2048_bytes_and_ignores_what_follows() {
        let mut bytes = sample().encode().unwrap().to_vec();
        bytes.push(1);
        assert_eq!(CowdHeader::decode(&bytes), Ok(sample()));
        for have in [0, 3, 512, 2047] {
            let error = CowdHeader::decode(&bytes[..have]).unwrap_err();
            assert_eq!(error.kind, K::Truncated { need: 2048, have: have as u64 });
        }
    }

    #[test]
    fn rejects_another_magic_and_another_version() {
        assert_eq!(patched(0, b"KDMV").unwrap_err().to_string(), "magicNumber at byte 0: is not \"COWD\"");
        for version in [0, 2, u32::MAX] {
            assert_eq!(refused(4, version), ("version", K::UnsupportedVersion(version)));
        }
    }

    #[test]
    fn bounds_the_grain_on_both_sides() {
        for grain in [1, 2, 3, 2047, 2048] {
            let header = CowdHeader::new(Sectors(1_000_000), Sectors(grain)).unwrap();
            assert_eq!(CowdHeader::decode(&header.encode().unwrap()), Ok(header));
        }
        for value in [0, 2049, u32::MAX] {
            let kind = K::OutOfRange { value: u64::from(value), min: 1, max: 2048 };
            assert_eq!(refused(16, value), ("grainSize", kind));
        }
    }

    #[test]
    fn rejects_a_directory_inside_the_header() {
        assert!(patched(20, &4u32.to_le_bytes()).is_ok());
        let kind = K::OutOfRange { value: 3, min: 4, max: u64::from(u32::MAX) };
        assert_eq!(refused(20, 3), ("gdOffset", kind));
        assert!(patched(20, &u32::MAX.to_le_bytes()).is_ok(), "whether it lies in the file is for callers");
    }

    #[test]
    fn the_directory_has_as_many_entries_as_the_size_asks_for() {
        for value in [0, 0xc9ff, 0xca01, u32::MAX] {
            let kind = K::Mismatch { value: u64::from(value), expected: 0xca00 };
            assert_eq!(refused(24, value), ("numGDEntries", kind));
        }
        for (capacity, grain, entries) in
            [(0, 1, 0), (1, 1, 1), (4096, 1, 1), (4097, 1, 2), (4096 * 128 + 1, 128, 2), (u32::MAX, 1, 1 << 20)]
        {
            let header = CowdHeader::new(Sectors(u64::from(capacity)), Sectors(grain)).unwrap();
            assert_eq!(header.geometry().unwrap().directory_len(), entries);
            assert_eq!(header.encode().unwrap()[24..28], entries.to_le_bytes());
        }
    }

    #[test]
    fn refuses_to_write_what_32_bits_do_not_hold() {
        let wild = Sectors(1 << 32);
        assert_eq!(CowdHeader::new(wild, Sectors(1)).unwrap_err().field, "numSectors");
        assert_eq!(CowdHeader { free_sector: wild, ..sample() }.encode().unwrap_err().field, "freeSector");
        assert_eq!(CowdHeader { gd_offset: wild, ..sample() }.encode().unwrap_err().field, "gdOffset");
        let empty = CowdHeader { grain_size: Sectors(0), ..sample() };
        assert_eq!((empty.encode().unwrap_err().field, empty.directory_sectors()), ("grainSize", Sectors(0)));
    }

    #[test]
    fn the_flags_say_what_the_union_holds() {
        let mut header = sample();
        header.root_or_parent[..16].copy_from_slice(b"a\0\0\0b\0\0\0c\0\0\0d\0\0\0");
        assert_eq!((header.root_geometry(), header.parent_file_name()), (Some([97, 98, 99]), None));
        header.flags = 2;
        assert_eq!((header.root_geometry(), header.parent_file_name()), (None, Some(&b"a"[..])));
        header.root_or_parent = [b'x'; 1024];
        assert_eq!(header.parent_file_name().map(<[u8]>::len), Some(1024));
    }

    #[test]
    fn an_extent_in_doubt_needs_a_check() {
        assert!(!sample().needs_check());
        assert!(patched(COWD_UNCLEAN_SHUTDOWN_AT as usize, &[0, 0, 0, 1]).unwrap().needs_check());
        assert!(patched(8, &[7]).unwrap().needs_check());
        assert_eq!(patched(COWD_FREE_SECTOR_AT as usize, &[9, 0, 0, 0]).unwrap().free_sector, Sectors(9));
    }

    #[test]
    fn the_table_constants_agree() {
        assert_eq!(COWD_TABLE_SECTORS, Sectors::from_bytes_ceil(u64::from(COWD_GTES_PER_GT) * GTE_SIZE));
        assert_eq!(HEADER_SECTORS * 512, CowdHeader::LEN as u64);
    }

    proptest! {
        #[test]
        fn any_header_that_is_read_is_written_back_byte_for_byte(
            mut bytes in prop::collection::vec(any::<u8>(), 2048..2100), capacity: u32, grain in 1u32..=2048,
        ) {
            let fresh = CowdHeader::new(Sectors(u64::from(capacity)), Sectors(u64::from(grain))).unwrap();
            let valid = fresh.encode().unwrap();
            bytes[..8].copy_from_slice(&valid[..8]);
            bytes[12..28].copy_from_slice(&valid[12..28]);
            let header = CowdHeader::decode(&bytes).unwrap();
            prop_assert_eq!(&header.encode().unwrap()[..], &bytes[..2048]);
        }

        #[test]
        fn decoding_arbitrary_bytes_never_panics(
            mut bytes in prop::collection::vec(any::<u8>(), 0..2100), identity in any::<bool>(), grain in 0u8..4,
        ) {
            if identity && bytes.len() >= 20 {
                bytes[..8].copy_from_slice(b"COWD\x01\0\0\0");
                bytes[16..20].copy_from_slice(&[grain, 0, 0, 0]);
            }
            if let Ok(header) = CowdHeader::decode(&bytes) {
                prop_assert_eq!(&header.encode().unwrap()[..], &bytes[..2048]);
            }
        }
    }
}
