//! The 512 bytes of a hosted sparse header, field by field; the fields from byte 12 on are not aligned.

use crate::error::{At, ParseError, ParseErrorKind};
use crate::field::{Field, whole};
use crate::header::{
    Compression, GdOffset, HeaderFlags, MAX_DESCRIPTOR_SECTORS, MAX_GRAIN_SECTORS, MAX_GTES_PER_GT, MIN_GRAIN_SECTORS,
    SparseHeader, UNCLEAN_SHUTDOWN_AT,
};
use crate::sectors::Sectors;

const MAGIC: [u8; 4] = *b"KDMV";
const NEWLINES: [u8; 4] = *b"\n \r\n";
const GD_AT_END: u64 = u64::MAX;

const VERSION: Field = Field("version", 4);
const FLAGS: Field = Field("flags", 8);
const CAPACITY: Field = Field("capacity", 12);
const GRAIN_SIZE: Field = Field("grainSize", 20);
const DESCRIPTOR_OFFSET: Field = Field("descriptorOffset", 28);
const DESCRIPTOR_SIZE: Field = Field("descriptorSize", 36);
const GTES_PER_GT: Field = Field("numGTEsPerGT", 44);
const RGD_OFFSET: Field = Field("rgdOffset", 48);
const GD_OFFSET: Field = Field("gdOffset", 56);
const OVERHEAD: Field = Field("overHead", 64);
const UNCLEAN_SHUTDOWN: Field = Field("uncleanShutdown", UNCLEAN_SHUTDOWN_AT);
const NEWLINE_TEST: Field = Field("singleEndLineChar", 73);
const COMPRESS_ALGORITHM: Field = Field("compressAlgorithm", 77);

impl SparseHeader {
    /// Reads a header, or a footer, from the first 512 bytes given.
    ///
    /// # Errors
    /// Too few bytes, another magic, a version other than 1, 2 and 3, an unknown incompatible flag, changed line
    /// ends where the flag says they can be tested, an unknown compression where the flag says there is one; sizes
    /// out of bounds ([`MIN_GRAIN_SECTORS`] and the like, [`crate::MAX_DIRECTORY_LEN`]); a place in the file whose
    /// byte offset exceeds 64 bits; a grain directory in sector 0 of an extent that has sectors.
    pub fn decode(bytes: &[u8]) -> Result<Self, ParseError> {
        let bytes = whole::<{ Self::LEN }>("header", bytes)?;
        check_identity(bytes)?;
        let flags = HeaderFlags(FLAGS.u32(bytes)?);
        let header = Self {
            version: VERSION.u32(bytes)?,
            flags,
            capacity: CAPACITY.sectors(bytes)?,
            grain_size: GRAIN_SIZE.sectors(bytes)?,
            descriptor_offset: DESCRIPTOR_OFFSET.sectors(bytes)?,
            descriptor_size: DESCRIPTOR_SIZE.sectors(bytes)?,
            gtes_per_gt: GTES_PER_GT.u32(bytes)?,
            rgd_offset: RGD_OFFSET.sectors(bytes)?,
            gd_offset: match GD_OFFSET.u64(bytes)? {
                GD_AT_END => GdOffset::AtEnd,
                sector => GdOffset::At(Sectors(sector)),
            },
            overhead: OVERHEAD.sectors(bytes)?,
            unclean_shutdown: UNCLEAN_SHUTDOWN.bytes(bytes)? != [0],
            compression: match u16::from_le_bytes(COMPRESS_ALGORITHM.bytes(bytes)?) {
                _ if !flags.compressed() => Compression::None,
                0 => Compression::None,
                1 => Compression::Deflate,
                other => {
                    let kind = ParseErrorKind::OutOfRange { value: u64::from(other), min: 0, max: 1 };
                    return Err(COMPRESS_ALGORITHM.error(kind));
                }
            },
        };
        header.check_sizes()?;
        header.check_places()?;
        Ok(header)
    }

    /// Writes the header. The bytes of the newline test are always filled in, the padding is zero, and so is
    /// `compressAlgorithm` unless the grains are deflated: bytes of a read header that mean nothing are not kept.
    pub fn encode(&self) -> [u8; Self::LEN] {
        let mut out = [0; Self::LEN];
        let gd_offset = match self.gd_offset {
            GdOffset::At(sector) => sector.0,
            GdOffset::AtEnd => GD_AT_END,
        };
        let algorithm: u16 = match self.compression {
            Compression::None => 0,
            Compression::Deflate => 1,
        };
        Field("magicNumber", 0).put(&mut out, &MAGIC);
        VERSION.put(&mut out, &self.version.to_le_bytes());
        FLAGS.put(&mut out, &self.flags.0.to_le_bytes());
        CAPACITY.put(&mut out, &self.capacity.0.to_le_bytes());
        GRAIN_SIZE.put(&mut out, &self.grain_size.0.to_le_bytes());
        DESCRIPTOR_OFFSET.put(&mut out, &self.descriptor_offset.0.to_le_bytes());
        DESCRIPTOR_SIZE.put(&mut out, &self.descriptor_size.0.to_le_bytes());
        GTES_PER_GT.put(&mut out, &self.gtes_per_gt.to_le_bytes());
        RGD_OFFSET.put(&mut out, &self.rgd_offset.0.to_le_bytes());
        GD_OFFSET.put(&mut out, &gd_offset.to_le_bytes());
        OVERHEAD.put(&mut out, &self.overhead.0.to_le_bytes());
        UNCLEAN_SHUTDOWN.put(&mut out, &[u8::from(self.unclean_shutdown)]);
        NEWLINE_TEST.put(&mut out, &NEWLINES);
        COMPRESS_ALGORITHM.put(&mut out, &algorithm.to_le_bytes());
        out
    }

    fn check_sizes(&self) -> Result<(), ParseError> {
        CAPACITY.within(self.capacity.0, 0, Sectors::MAX.0)?;
        GRAIN_SIZE.power_of_two(self.grain_size.0, MIN_GRAIN_SECTORS, MAX_GRAIN_SECTORS)?;
        GTES_PER_GT.power_of_two(u64::from(self.gtes_per_gt), 1, u64::from(MAX_GTES_PER_GT))?;
        // After the checks above only the capacity can be at fault: too many entries of the directory.
        self.geometry().map_err(|error| ParseError { at: At::Byte(CAPACITY.1), ..error })?;
        Ok(())
    }

    fn check_places(&self) -> Result<(), ParseError> {
        if self.descriptor_offset.0 != 0 {
            DESCRIPTOR_SIZE.within(self.descriptor_size.0, 1, MAX_DESCRIPTOR_SECTORS)?;
            DESCRIPTOR_OFFSET.run(self.descriptor_offset, self.descriptor_size)?;
        }
        if let Some(start) = self.redundant() {
            RGD_OFFSET.run(start, self.directory_sectors())?;
        }
        if let GdOffset::At(start) = self.gd_offset {
            let least = u64::from(self.capacity.0 != 0);
            GD_OFFSET.within(start.0, least, Sectors::MAX.0)?;
            GD_OFFSET.run(start, self.directory_sectors())?;
        }
        OVERHEAD.within(self.overhead.0, 0, Sectors::MAX.0)?;
        Ok(())
    }
}

/// What has to hold before the rest means anything. The newline test comes before the sizes, since changed line ends
/// may have moved them.
fn check_identity(bytes: &[u8; SparseHeader::LEN]) -> Result<(), ParseError> {
    if !bytes.starts_with(&MAGIC) {
        return Err(ParseError::at_byte("magicNumber", 0, ParseErrorKind::BadMagic));
    }
    let version = VERSION.u32(bytes)?;
    if !(1..=3).contains(&version) {
        return Err(VERSION.error(ParseErrorKind::UnsupportedVersion(version)));
    }
    let flags = HeaderFlags(FLAGS.u32(bytes)?);
    if flags.unknown() != 0 {
        return Err(FLAGS.error(ParseErrorKind::UnknownFlags(flags.unknown())));
    }
    if flags.newline_test() && NEWLINE_TEST.bytes(bytes)? != NEWLINES {
        return Err(NEWLINE_TEST.error(ParseErrorKind::NewlineDamage));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::samples::sample_file;
    use ParseErrorKind as K;
    use proptest::prelude::*;

    /// What `qemu-img create -f vmdk` writes for 100 MiB.
    fn sample() -> SparseHeader {
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

    fn with(change: impl FnOnce(&mut SparseHeader)) -> Result<SparseHeader, ParseError> {
        let mut header = sample();
        change(&mut header);
        SparseHeader::decode(&header.encode())
    }

    fn refused(change: impl FnOnce(&mut SparseHeader)) -> (&'static str, K) {
        let error = with(change).unwrap_err();
        (error.field, error.kind)
    }

    fn patched(at: usize, bytes: &[u8]) -> Result<SparseHeader, ParseError> {
        let mut all = sample().encode();
        all[at..at + bytes.len()].copy_from_slice(bytes);
        SparseHeader::decode(&all)
    }

    #[test]
    fn writes_the_bytes_that_qemu_img_writes() {
        let mut expected = [0; 512];
        let start =
            b"KDMV\x01\0\0\0\x03\0\0\0\0\x20\x03\0\0\0\0\0\x80\0\0\0\0\0\0\0\x01\0\0\0\0\0\0\0\x14\0\0\0\0\0\0\0\
            \0\x02\0\0\x15\0\0\0\0\0\0\0\x26\0\0\0\0\0\0\0\x80\0\0\0\0\0\0\0\0\n \r\n\0\0";
        expected[..79].copy_from_slice(start);
        assert_eq!(sample().encode(), expected);
        assert_eq!(SparseHeader::decode(&expected), Ok(sample()));
    }

    #[test]
    fn needs_512_bytes_and_ignores_what_follows() {
        let mut bytes = sample().encode().to_vec();
        bytes.push(1);
        assert_eq!(SparseHeader::decode(&bytes), Ok(sample()));
        for have in [0, 3, 4, 511] {
            let error = SparseHeader::decode(&bytes[..have]).unwrap_err();
            assert_eq!(error.kind, K::Truncated { need: 512, have: have as u64 });
        }
    }

    #[test]
    fn rejects_another_magic() {
        assert_eq!(patched(0, b"COWD").unwrap_err().kind, K::BadMagic);
        assert_eq!(SparseHeader::decode(&[0; 512]).unwrap_err().kind, K::BadMagic);
    }

    #[test]
    fn accepts_versions_1_to_3() {
        for version in 1..=3 {
            assert_eq!(with(|h| h.version = version).unwrap().version, version);
        }
        for version in [0, 4, u32::MAX] {
            assert_eq!(refused(|h| h.version = version), ("version", K::UnsupportedVersion(version)));
        }
    }

    #[test]
    fn rejects_unknown_incompatible_flags_and_keeps_unknown_compatible_ones() {
        for bit in 3..16 {
            let flags = HeaderFlags(3 | 1 << bit);
            assert_eq!(with(|h| h.flags = flags).unwrap().flags, flags);
        }
        for bit in 18..32 {
            assert_eq!(refused(|h| h.flags.0 |= 1 << bit), ("flags", K::UnknownFlags(1 << bit)));
        }
        assert!(with(|h| h.flags = HeaderFlags(0x30003)).is_ok());
    }

    #[test]
    fn tests_line_ends_only_with_the_flag() {
        for damaged in [*b"\r\n \r", *b"\n \n\0", [0; 4]] {
            let error = patched(73, &damaged).unwrap_err();
            assert_eq!(error, ParseError::at_byte("singleEndLineChar", 73, K::NewlineDamage));
            let mut bytes = SparseHeader { flags: HeaderFlags(2), ..sample() }.encode();
            bytes[73..77].copy_from_slice(&damaged);
            assert!(SparseHeader::decode(&bytes).is_ok());
        }
    }

    #[test]
    fn rejects_grain_size_below_8_sectors() {
        for value in [0, 1, 4, 7] {
            let kind = K::OutOfRange { value, min: 8, max: 2 << 20 };
            assert_eq!(refused(|h| h.grain_size = Sectors(value)), ("grainSize", kind));
        }
        assert!(with(|h| h.grain_size = Sectors(8)).is_ok());
    }

    #[test]
    fn rejects_grain_size_above_1_gib() {
        assert!(with(|h| h.grain_size = Sectors(2 << 20)).is_ok());
        for value in [(2 << 20) + 1, 4 << 20, u64::MAX] {
            let kind = K::OutOfRange { value, min: 8, max: 2 << 20 };
            assert_eq!(refused(|h| h.grain_size = Sectors(value)), ("grainSize", kind));
        }
    }

    #[test]
    fn rejects_grain_size_that_is_no_power_of_two() {
        for value in [9, 100, 127, 129, (2 << 20) - 1] {
            assert_eq!(refused(|h| h.grain_size = Sectors(value)), ("grainSize", K::NotPowerOfTwo(value)));
        }
        let text = with(|h| h.grain_size = Sectors(100)).unwrap_err().to_string();
        assert_eq!(text, "grainSize at byte 20: 100 is not a power of two");
    }

    #[test]
    fn accepts_tables_of_1_to_512_entries() {
        for entries in [1, 2, 256, 512] {
            assert!(with(|h| h.gtes_per_gt = entries).is_ok());
        }
        for value in [0, 513, 1024, u32::MAX] {
            let kind = K::OutOfRange { value: u64::from(value), min: 1, max: 512 };
            assert_eq!(refused(|h| h.gtes_per_gt = value), ("numGTEsPerGT", kind));
        }
        assert_eq!(refused(|h| h.gtes_per_gt = 511), ("numGTEsPerGT", K::NotPowerOfTwo(511)));
    }

    #[test]
    fn rejects_capacity_that_needs_more_than_32_mi_tables() {
        let max = (32 << 20) * 65536;
        assert!(with(|h| h.capacity = Sectors(max)).is_ok());
        let error = with(|h| h.capacity = Sectors(max + 1)).unwrap_err();
        assert_eq!(error, ParseError::at_byte("capacity", 12, K::OutOfRange { value: max + 1, min: 0, max }));
        for value in [1 << 63, u64::MAX] {
            assert_eq!(refused(|h| h.capacity = Sectors(value)).0, "capacity");
        }
    }

    #[test]
    fn checks_the_size_of_a_descriptor_only_where_there_is_one() {
        for size in [1, 20, 2047, 2048] {
            assert!(with(|h| h.descriptor_size = Sectors(size)).is_ok());
        }
        for value in [0, 2049, u64::MAX] {
            let kind = K::OutOfRange { value, min: 1, max: 2048 };
            assert_eq!(refused(|h| h.descriptor_size = Sectors(value)), ("descriptorSize", kind));
            let none = with(|h| (h.descriptor_offset, h.descriptor_size) = (Sectors(0), Sectors(value))).unwrap();
            assert_eq!((none.embedded_descriptor(), none.descriptor_size.0), (None, value));
        }
    }

    #[test]
    fn rejects_places_beyond_64_bits_of_bytes() {
        let last = Sectors::MAX.0;
        assert!(with(|h| h.descriptor_offset = Sectors(last - 20)).is_ok());
        assert_eq!(refused(|h| h.descriptor_offset = Sectors(last - 19)), ("descriptorOffset", K::Overflow));
        assert!(with(|h| h.gd_offset = GdOffset::At(Sectors(last - 1))).is_ok());
        assert_eq!(refused(|h| h.gd_offset = GdOffset::At(Sectors(last))), ("gdOffset", K::Overflow));
        assert_eq!(refused(|h| h.gd_offset = GdOffset::At(Sectors(u64::MAX - 1))).0, "gdOffset");
        assert!(with(|h| h.rgd_offset = Sectors(last - 1)).is_ok());
        assert_eq!(refused(|h| h.rgd_offset = Sectors(last)), ("rgdOffset", K::Overflow));
        assert!(with(|h| h.overhead = Sectors(last)).is_ok());
        assert_eq!(refused(|h| h.overhead = Sectors(last + 1)).0, "overHead");
    }

    #[test]
    fn ignores_the_redundant_offset_without_its_flag() {
        let header = with(|h| (h.flags, h.rgd_offset) = (HeaderFlags(1), Sectors(u64::MAX))).unwrap();
        assert_eq!((header.rgd_offset.0, header.redundant()), (u64::MAX, None));
    }

    #[test]
    fn rejects_a_directory_in_sector_0_unless_the_header_only_wraps_a_descriptor() {
        let kind = K::OutOfRange { value: 0, min: 1, max: Sectors::MAX.0 };
        assert_eq!(refused(|h| h.gd_offset = GdOffset::At(Sectors(0))), ("gdOffset", kind));
        let wrapper = with(|h| (h.gd_offset, h.capacity) = (GdOffset::At(Sectors(0)), Sectors(0))).unwrap();
        assert!(wrapper.only_wraps_descriptor());
        assert_eq!(wrapper.directory_len(), 0);
        assert!(!sample().only_wraps_descriptor());
    }

    #[test]
    fn compression_means_something_only_with_its_flag() {
        assert_eq!(patched(77, &[9, 9]).unwrap().compression, Compression::None);
        let stream = SparseHeader { flags: HeaderFlags(0x30001), gd_offset: GdOffset::AtEnd, ..sample() };
        for (algorithm, expected) in [(0, Some(Compression::None)), (1, Some(Compression::Deflate)), (2, None)] {
            let mut bytes = stream.encode();
            bytes[77] = algorithm;
            assert_eq!(SparseHeader::decode(&bytes).ok().map(|h| h.compression), expected);
        }
    }

    #[test]
    fn any_byte_but_zero_is_an_unclean_shutdown() {
        for (byte, unclean) in [(0, false), (1, true), (0xff, true)] {
            assert_eq!(patched(UNCLEAN_SHUTDOWN_AT as usize, &[byte]).unwrap().unclean_shutdown, unclean);
        }
        assert_eq!(SparseHeader { unclean_shutdown: true, ..sample() }.encode()[72], 1);
    }

    #[test]
    fn reads_headers_that_vmware_wrote_and_writes_them_back() {
        let expected = [
            ("vmware-monolithicSparse.vmdk", 1, 20480, 20, GdOffset::At(Sectors(26)), Compression::None),
            ("vmware-streamOptimized.vmdk", 3, 20480, 20, GdOffset::At(Sectors(21)), Compression::Deflate),
            ("vmware-streamOptimized-v3.vmdk", 3, 33_554_432, 1, GdOffset::AtEnd, Compression::Deflate),
        ];
        for (name, version, capacity, descriptor_size, gd_offset, compression) in expected {
            let Some(file) = sample_file(name) else { return };
            let header = SparseHeader::decode(&file).unwrap();
            assert_eq!((header.version, header.capacity.0), (version, capacity), "{name}");
            assert_eq!(header.descriptor_size.0, descriptor_size, "{name}");
            assert_eq!((header.gd_offset, header.compression), (gd_offset, compression), "{name}");
            assert_eq!(header.encode(), file[..512], "{name}");
            let descriptor = header.embedded_descriptor().unwrap();
            let text = &file[descriptor.start as usize..descriptor.end as usize];
            let descriptor = crate::Descriptor::decode(text).unwrap();
            assert_eq!(descriptor.capacity(), Ok(header.capacity), "{name}");
        }
    }

    #[test]
    fn reads_a_footer_as_a_header_whose_directory_has_a_place() {
        let Some(file) = sample_file("vmware-streamOptimized-v3.vmdk") else { return };
        let header = SparseHeader::decode(&file).unwrap();
        let footer = SparseHeader::decode(&file[file.len() - 1024..]).unwrap();
        assert_eq!(footer.gd_offset, GdOffset::At(Sectors(0x221)));
        assert_eq!(SparseHeader { gd_offset: GdOffset::AtEnd, ..footer }, header);
    }

    /// The file that AFL found for Richard Jones: its directory length overflowed 32 bits in QEMU.
    #[test]
    fn refuses_every_fault_of_the_hostile_afl9_in_turn() {
        let Some(file) = sample_file("hostile-afl9.vmdk") else { return };
        let mut bytes = *file.first_chunk::<512>().unwrap();
        let healthy = sample().encode();
        let faults = [
            (73..77, "singleEndLineChar at byte 73: line ends were changed, as by a transfer in text mode"),
            (12..20, "capacity at byte 12: 2233785398448881665 is outside 0 to 36028797018963967"),
            (44..48, "numGTEsPerGT at byte 44: 506 is not a power of two"),
            (56..64, "gdOffset at byte 56: 2882303761517117440 is outside 1 to 36028797018963967"),
        ];
        for (repaired, text) in faults {
            assert_eq!(SparseHeader::decode(&bytes).unwrap_err().to_string(), text);
            bytes[repaired.clone()].copy_from_slice(&healthy[repaired]);
        }
        let rest = SparseHeader::decode(&bytes).unwrap();
        assert_eq!(rest.descriptor_offset, Sectors(0x0f00_0001), "past the end of the file: for who knows its length");
    }

    fn any_header() -> impl Strategy<Value = SparseHeader> {
        let capacity = 0u64..=crate::MAX_DIRECTORY_LEN * MIN_GRAIN_SECTORS;
        let sizes = (1u32..=3, 0u32..1 << 16, any::<[bool; 3]>(), 3u32..=21, 0u32..=9, capacity);
        let places = (0u64..1 << 54, 1u64..=2048, any::<u64>(), prop::option::of(1u64..1 << 54), 0u64..1 << 55);
        (sizes, places, any::<bool>()).prop_map(|(sizes, places, unclean_shutdown)| {
            let (version, low, [compressed, markers, deflate], grain, gtes, capacity) = sizes;
            let (descriptor_offset, descriptor_size, rgd, gd, overhead) = places;
            let flags = HeaderFlags(low | u32::from(compressed) << 16 | u32::from(markers) << 17);
            SparseHeader {
                version,
                flags,
                capacity: Sectors(capacity),
                grain_size: Sectors(1 << grain),
                descriptor_offset: Sectors(descriptor_offset),
                descriptor_size: Sectors(descriptor_size),
                gtes_per_gt: 1 << gtes,
                rgd_offset: Sectors(if flags.redundant_tables() { rgd >> 10 } else { rgd }),
                gd_offset: gd.map_or(GdOffset::AtEnd, |gd| GdOffset::At(Sectors(gd))),
                overhead: Sectors(overhead),
                unclean_shutdown,
                compression: if compressed && deflate { Compression::Deflate } else { Compression::None },
            }
        })
    }

    proptest! {
        #[test]
        fn any_valid_header_decodes_to_itself(header in any_header()) {
            prop_assert_eq!(SparseHeader::decode(&header.encode()), Ok(header));
        }

        #[test]
        fn decoding_arbitrary_bytes_never_panics(
            mut bytes in prop::collection::vec(any::<u8>(), 0..600), identity in any::<bool>(), small in any::<bool>(),
        ) {
            if identity && bytes.len() >= 79 {
                bytes[..12].copy_from_slice(b"KDMV\x01\0\0\0\x02\0\0\0");
                if small {
                    bytes[12..72].copy_from_slice(&sample().encode()[12..72]);
                }
            }
            if let Ok(header) = SparseHeader::decode(&bytes) {
                prop_assert!(header.directory_len() <= crate::MAX_DIRECTORY_LEN);
                prop_assert_eq!(SparseHeader::decode(&header.encode()), Ok(header));
            }
        }
    }
}
