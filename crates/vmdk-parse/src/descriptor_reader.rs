//! Reads a descriptor. Tolerant of every form that programs write, and strict where a guess could map a disk wrongly.

use crate::content_id::ContentId;
use crate::descriptor::Descriptor;
use crate::descriptor_text::{MAX_LINES, Span, decimal, lines, text};
use crate::error::{ParseError, ParseErrorKind, shortened};
use crate::extent::{Access, ExtentLine};

/// The most extents of a disk that we read. VMware cuts a disk into files of 2 GiB: this is 16 TiB of them.
pub const MAX_EXTENTS: usize = 8192;

impl Descriptor {
    /// Reads a descriptor file, or the room for an embedded descriptor: the text ends at the first NUL.
    ///
    /// Keys and words may be in any letter case, values quoted or not; LF, CRLF and CR end lines; a byte order mark,
    /// blank lines, comments, blanks around `=` and at both ends of a line are passed over. The first comment is not
    /// demanded (see [`crate::looks_like_descriptor`]), nor is any key, nor an extent. Of a key given twice the
    /// first value counts.
    ///
    /// Bytes that are not UTF-8 become replacement characters in values, whatever `encoding` says.
    ///
    /// # Errors
    /// All name the line. A file name that is not UTF-8; an extent line with an unknown word, a bad number, a bad
    /// quote or no file; a line that is neither extent nor `key = value`; a bad content ID or version; two different
    /// values for `CID`, `parentCID` or `createType`; more than [`crate::MAX_TEXT_BYTES`], [`MAX_LINES`] or
    /// [`MAX_EXTENTS`].
    pub fn decode(bytes: &[u8]) -> Result<Self, ParseError> {
        let mut reader = Reader::default();
        for (number, line) in lines(text(bytes)?) {
            if number > MAX_LINES {
                return Err(ParseError::whole("descriptor lines", ParseErrorKind::TooMany { limit: MAX_LINES }));
            }
            let line = line.trim();
            if line.bytes.is_empty() || line.bytes.starts_with(b"#") {
                continue;
            }
            match line.key_and_value() {
                Some((key, value)) => reader.key(key, value, number)?,
                None if Access::parse(line.first_word()).is_some() => reader.extent(line, number)?,
                None => {
                    let word = shortened(&String::from_utf8_lossy(line.first_word()));
                    return Err(ParseError::at_line("first word", number, ParseErrorKind::UnknownWord(word)));
                }
            }
        }
        Ok(reader.finish())
    }
}

/// A descriptor on the way: tells "not given" from "given as the default".
#[derive(Default)]
struct Reader {
    descriptor: Descriptor,
    version: Option<u32>,
    parent_content_id: Option<ContentId>,
    create_type: Option<String>,
}

impl Reader {
    fn extent(&mut self, line: Span<'_>, number: u64) -> Result<(), ParseError> {
        let text = utf8("extent file name", line, number)?;
        if self.descriptor.extents.len() >= MAX_EXTENTS {
            let limit = u64::try_from(MAX_EXTENTS).unwrap_or(u64::MAX);
            return Err(ParseError::at_line("extents", number, ParseErrorKind::TooMany { limit }));
        }
        self.descriptor.extents.push(ExtentLine::parse(&text, number)?);
        Ok(())
    }

    fn key(&mut self, key: &[u8], value: Span<'_>, line: u64) -> Result<(), ParseError> {
        let descriptor = &mut self.descriptor;
        let is = |name: &str| key.eq_ignore_ascii_case(name.as_bytes());
        let unquoted = || {
            let bad_quote = || ParseError::at_line("value", line, ParseErrorKind::BadQuote);
            value.unquote().ok_or_else(bad_quote)
        };
        if is("version") {
            let version = version(&unquoted()?.lossy(), line)?;
            self.version.get_or_insert(version);
        } else if is("CID") {
            set_once(&mut descriptor.content_id, content_id("CID", unquoted()?, line)?, "CID", line)?;
        } else if is("parentCID") {
            let id = content_id("parentCID", unquoted()?, line)?;
            set_once(&mut self.parent_content_id, id, "parentCID", line)?;
        } else if is("createType") {
            let value = unquoted()?.lossy().into_owned();
            set_once(&mut self.create_type, value, "createType", line)?;
        } else if is("encoding") {
            keep_first(&mut descriptor.encoding, unquoted()?.lossy().into_owned());
        } else if is("parentFileNameHint") {
            keep_first(&mut descriptor.parent_file_name_hint, utf8("parentFileNameHint", unquoted()?, line)?);
        } else if is("changeTrackPath") {
            keep_first(&mut descriptor.change_track_path, utf8("changeTrackPath", unquoted()?, line)?);
        } else {
            let pair = (String::from_utf8_lossy(key).into_owned(), unquoted()?.lossy().into_owned());
            let in_database = key.get(..4).is_some_and(|start| start.eq_ignore_ascii_case(b"ddb."));
            if in_database { descriptor.ddb.push(pair) } else { descriptor.other.push(pair) }
        }
        Ok(())
    }

    fn finish(self) -> Descriptor {
        Descriptor {
            version: self.version.unwrap_or(1),
            parent_content_id: self.parent_content_id.filter(|id| *id != ContentId::NO_PARENT),
            create_type: self.create_type.unwrap_or_default(),
            ..self.descriptor
        }
    }
}

fn version(text: &str, line: u64) -> Result<u32, ParseError> {
    let version = u32::try_from(decimal("version", text, line)?).unwrap_or(u32::MAX);
    if (1..=3).contains(&version) {
        return Ok(version);
    }
    Err(ParseError::at_line("version", line, ParseErrorKind::UnsupportedVersion(version)))
}

fn content_id(field: &'static str, value: Span<'_>, line: u64) -> Result<ContentId, ParseError> {
    let text = value.lossy();
    let bad_number = || ParseError::at_line(field, line, ParseErrorKind::BadNumber(shortened(&text)));
    ContentId::parse(&text).ok_or_else(bad_number)
}

fn utf8(field: &'static str, value: Span<'_>, line: u64) -> Result<String, ParseError> {
    let text = str::from_utf8(value.bytes).map_err(|_| ParseError::at_line(field, line, ParseErrorKind::NotText))?;
    Ok(text.to_owned())
}

/// For keys that two programs could each believe another value of.
fn set_once<T: PartialEq>(slot: &mut Option<T>, value: T, field: &'static str, line: u64) -> Result<(), ParseError> {
    match slot {
        Some(known) if *known != value => Err(ParseError::at_line(field, line, ParseErrorKind::Duplicate)),
        _ => {
            *slot = Some(value);
            Ok(())
        }
    }
}

/// An empty value counts as none.
fn keep_first(slot: &mut Option<String>, value: String) {
    if slot.is_none() && !value.is_empty() {
        *slot = Some(value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{ExtentKind, Sectors};
    use proptest::prelude::*;

    fn decoded(text: &str) -> Descriptor {
        Descriptor::decode(text.as_bytes()).unwrap_or_else(|error| panic!("{error}\n{text}"))
    }

    fn refused(text: impl AsRef<[u8]>) -> String {
        Descriptor::decode(text.as_ref()).unwrap_err().to_string()
    }

    fn extents(descriptor: &Descriptor) -> Vec<String> {
        descriptor.extents.iter().map(ToString::to_string).collect()
    }

    /// `qemu-img create -f vmdk -o subformat=twoGbMaxExtentFlat x.vmdk 100M`, QEMU 10.0.2.
    const QEMU: &str = "# Disk DescriptorFile\nversion=1\nCID=79c471dd\nparentCID=ffffffff\n\
        createType=\"twoGbMaxExtentFlat\"\n\n# Extent description\n\
        RW 204800 FLAT \"twoGbMaxExtentFlat-f001.vmdk\" 0\n\n# The Disk Data Base\n#DDB\n\n\
        ddb.virtualHWVersion = \"4\"\nddb.geometry.cylinders = \"203\"\nddb.geometry.heads = \"16\"\n\
        ddb.geometry.sectors = \"63\"\nddb.adapterType = \"ide\"\nddb.toolsVersion = \"2147483647\"\n";

    #[test]
    fn reads_a_descriptor_of_qemu() {
        let descriptor = decoded(QEMU);
        assert_eq!(descriptor.version, 1);
        assert_eq!(descriptor.content_id, Some(ContentId(0x79c4_71dd)));
        assert_eq!(descriptor.parent_content_id, None);
        assert_eq!(descriptor.create_type, "twoGbMaxExtentFlat");
        assert_eq!(extents(&descriptor), ["RW 204800 FLAT \"twoGbMaxExtentFlat-f001.vmdk\" 0"]);
        assert_eq!(descriptor.ddb("ddb.adapterType"), Some("ide"));
        assert_eq!(descriptor.ddb.len(), 6);
        assert_eq!(descriptor.capacity(), Ok(Sectors(204_800)));
    }

    #[test]
    fn line_ends_blanks_letter_case_and_room_behind_the_text_change_nothing() {
        let expected = decoded(QEMU);
        assert_eq!(decoded(&QEMU.replace('\n', "\r\n")), expected);
        assert_eq!(decoded(&QEMU.replace('\n', "\r")), expected);
        assert_eq!(decoded(&QEMU.replace('\n', " \t\r\n\r\n  ")), expected);
        assert_eq!(decoded(&QEMU.replace("=", " = ")), expected);
        assert_eq!(decoded(&QEMU.replace(" = ", "=")), expected);
        assert_eq!(decoded(&format!("{QEMU}\0RW 1 FLAT \"junk\" 0\n\0")), expected);
        assert_eq!(decoded(QEMU.trim_end()), expected);
        let keys = QEMU.replace("CID", "cid").replace("createType", "CREATETYPE").replace("RW", "rw");
        assert_eq!(decoded(&keys.replace("FLAT", "Flat").replace("version", "VERSION")), expected);
        assert_eq!(decoded(&QEMU.replace("\"203\"", "203").replace("CID=79c471dd", "CID=\"79C471DD\"")), expected);
    }

    #[test]
    fn a_blank_line_before_an_extent_does_not_double_it() {
        assert_eq!(decoded("\n\nRW 8 ZERO\n\n\nRW 9 ZERO\n").capacity(), Ok(Sectors(17)));
    }

    /// Made up after VirtualBox's keys.
    #[test]
    fn reads_a_child_with_the_database_of_virtualbox() {
        let descriptor = decoded(
            "# Disk DescriptorFile\nversion=1\nCID=0f8b1f5c\nparentCID=6e8a1b02\ncreateType=\"monolithicSparse\"\n\
            parentFileNameHint=\"Windows XP.vmdk\"\n\n# Extent description\n\
            RW 20971520 SPARSE \"{3ab6bb1c-5a0f-4b5c}.vmdk\"\n\n# The disk Data Base \n#DDB\n\n\
            ddb.virtualHWVersion = \"4\"\nddb.adapterType=\"ide\"\n\
            ddb.uuid.image=\"3ab6bb1c-5a0f-4b5c-8a1d-6e1f3c1b2a00\"\n\
            ddb.uuid.modification=\"00000000-0000-0000-0000-000000000000\"\n\
            ddb.uuid.parent=\"b7a1b7ff-0000-4000-8000-000000000001\"\nddb.comment=\"\"\n",
        );
        assert_eq!(descriptor.parent_content_id, Some(ContentId(0x6e8a_1b02)));
        assert_eq!(descriptor.parent_file_name_hint.as_deref(), Some("Windows XP.vmdk"));
        assert_eq!(descriptor.ddb("DDB.UUID.IMAGE"), Some("3ab6bb1c-5a0f-4b5c-8a1d-6e1f3c1b2a00"));
        assert_eq!(descriptor.ddb("ddb.comment"), Some(""));
    }

    /// Made up after ESXi's keys.
    #[test]
    fn reads_a_disk_of_esxi_whose_changes_are_tracked() {
        let descriptor = decoded(
            "# Disk DescriptorFile\nversion=3\nencoding=\"UTF-8\"\nCID=b59a0b1e\nparentCID=ffffffff\n\
            isNativeSnapshot=\"no\"\ncreateType=\"vmfs\"\n\n# Extent description\n\
            RW 83886080 VMFS \"web 01-flat.vmdk\"\n\n# Change Tracking File\n\
            changeTrackPath=\"web 01-ctk.vmdk\"\n\n# The Disk Data Base \n#DDB\n\n\
            ddb.adapterType = \"lsilogic\"\nddb.longContentID = \"4a1ad8e3f2f52c3f2e2aa3a2b59a0b1e\"\n\
            ddb.thinProvisioned = \"1\"\n",
        );
        assert_eq!((descriptor.version, descriptor.encoding.as_deref()), (3, Some("UTF-8")));
        assert_eq!(descriptor.change_track_path.as_deref(), Some("web 01-ctk.vmdk"));
        assert_eq!(descriptor.other, [("isNativeSnapshot".to_owned(), "no".to_owned())]);
        assert_eq!(descriptor.extents[0].kind, ExtentKind::Vmfs);
        assert_eq!(descriptor.extents[0].file.as_deref(), Some("web 01-flat.vmdk"));
    }

    /// The descriptor that Haiku's vmdkimage puts behind a header of capacity 0.
    #[test]
    fn reads_a_flat_extent_behind_a_header() {
        let descriptor = decoded(
            "# Disk Descriptor File\nversion=1\nCID=fffffffe\nparentCID=ffffffff\ncreateType=\"monolithicFlat\"\n\
            # Extent Description\nRW 614880 FLAT \"haiku.vmdk\" 128\n# Disk Data Base\nddb.toolsVersion = \"0\"\n",
        );
        assert_eq!(descriptor.content_id, Some(ContentId(0xffff_fffe)));
        assert_eq!(descriptor.extents[0].offset, Sectors(128));
    }

    #[test]
    fn reads_a_stream_whose_header_has_no_content_id_and_extents_of_every_access() {
        let descriptor = decoded(
            "# Description file created by VMDK stream converter\nversion=1\ncreateType=\"streamOptimized\"\n\
            RDONLY 8 SPARSE \"call-me-stream.vmdk\"\nNOACCESS 8 ZERO\nRW 0 FLAT \"empty\" 0\n",
        );
        assert_eq!((descriptor.content_id, descriptor.parent_content_id), (None, None));
        assert_eq!(
            extents(&descriptor),
            ["RDONLY 8 SPARSE \"call-me-stream.vmdk\"", "NOACCESS 8 ZERO", "RW 0 FLAT \"empty\" 0"]
        );
    }

    #[test]
    fn no_text_is_a_descriptor_of_nothing() {
        for text in ["", "\0", "\n\n", "# only a comment", "\u{feff}"] {
            assert_eq!(decoded(text), Descriptor::default());
        }
    }

    #[test]
    fn the_lines_that_are_wrong_are_named() {
        for (text, expected) in [
            ("\r\n\r\nRW 1 FOO \"f\"", "line 3: extent type \"FOO\" is not known"),
            ("version=1\nhello world", "line 2: first word \"hello\" is not known"),
            ("RX 1 FLAT \"a=b\"", "line 1: first word \"RX\" is not known"),
            ("=1", "line 1: first word \"=1\" is not known"),
            ("CID=xyz", "line 1: CID \"xyz\" is not a number"),
            ("parentCID=", "line 1: parentCID \"\" is not a number"),
            ("\rversion=4", "line 2: version 4 is not supported"),
            ("version=0", "line 1: version 0 is not supported"),
            ("version=4294967297", "line 1: version 4294967295 is not supported"),
            ("version=one", "line 1: version \"one\" is not a number"),
            ("ddb.comment = \"half", "line 1: value has a quote without its partner"),
            ("RW -1 ZERO", "line 1: extent size \"-1\" is not a number"),
        ] {
            assert_eq!(refused(text), expected, "{text:?}");
        }
    }

    #[test]
    fn contradictions_are_refused_and_repetitions_are_not() {
        assert_eq!(refused("CID=1\ncid=2"), "line 2: CID is given twice with different values");
        assert_eq!(
            refused("parentCID=ffffffff\nparentCID=1"),
            "line 2: parentCID is given twice with different values"
        );
        assert_eq!(
            refused("createType=\"a\"\ncreateType=b"),
            "line 2: createType is given twice with different values"
        );
        let twice = decoded(
            "CID=1\nCID=00000001\ncreateType=a\ncreateType=\"a\"\nversion=2\nversion=1\nencoding=a\nencoding=b",
        );
        assert_eq!((twice.content_id, twice.create_type.as_str()), (Some(ContentId(1)), "a"));
        assert_eq!((twice.version, twice.encoding.as_deref()), (2, Some("a")));
    }

    #[test]
    fn refuses_names_that_are_not_utf8_and_mends_other_values() {
        assert_eq!(refused(b"\nRW 1 FLAT \"gr\xf6\xdfe.vmdk\" 0"), "line 2: extent file name is not UTF-8");
        assert_eq!(refused(b"parentFileNameHint=\"\xff\""), "line 1: parentFileNameHint is not UTF-8");
        assert_eq!(refused(b"changeTrackPath=\"\xff\""), "line 1: changeTrackPath is not UTF-8");
        let text = b"encoding=\"windows-1252\"\n# gr\xf6\xdfe\nddb.comment = \"gr\xf6\xdfe\"\nRW 1 FLAT \"a\" 0";
        let descriptor = Descriptor::decode(text).unwrap();
        assert_eq!(descriptor.ddb("ddb.comment"), Some("gr\u{fffd}\u{fffd}e"));
    }

    #[test]
    fn reads_so_many_lines_and_extents_and_no_more() {
        assert!(Descriptor::decode("\n".repeat(20_000).as_bytes()).is_ok());
        assert_eq!(refused("\n".repeat(20_001)), "descriptor lines are more than 20000");
        assert_eq!(decoded(&"RW 1 ZERO\n".repeat(8192)).capacity(), Ok(Sectors(8192)));
        assert_eq!(refused("RW 1 ZERO\n".repeat(8193)), "line 8193: extents are more than 8192");
        assert_eq!(refused("#".repeat((1 << 20) + 1)), "descriptor is longer than 1048576 bytes");
    }

    #[test]
    fn a_line_of_a_million_quotes_is_read_in_no_time() {
        let text = format!("RW 1 FLAT \"{}\" 0", "\" ".repeat(500_000));
        assert!(Descriptor::decode(text.as_bytes()).is_ok());
        assert!(refused(format!("RW 1 FLAT {}x", "\"".repeat(1_000_000))).len() < 100);
    }

    #[test]
    fn reads_descriptors_that_vmware_wrote() {
        let Some(folder) = std::env::var_os("VDISK_SAMPLES") else {
            println!("skipped: VDISK_SAMPLES is not set, no descriptors of VMware read");
            return;
        };
        let read = |name: &str, sectors: usize| {
            let file = std::fs::read(std::path::Path::new(&folder).join(name)).unwrap();
            Descriptor::decode(&file[512..512 + 512 * sectors]).unwrap()
        };
        let sparse = read("vmware-monolithicSparse.vmdk", 20);
        assert_eq!(extents(&sparse), ["RW 20480 SPARSE \"monolithicSparse.vmdk\""]);
        assert_eq!((sparse.content_id, sparse.ddb.len()), (Some(ContentId(0)), 10));
        let stream = read("vmware-streamOptimized-v3.vmdk", 1);
        assert_eq!(extents(&stream), ["RDONLY 33554432 SPARSE \"generated-stream.vmdk\""]);
        assert_eq!((stream.content_id, stream.version), (Some(ContentId(0xa454_774a)), 1));
        assert_eq!(stream.ddb("ddb.adapterType"), Some("lsilogic"));
        let hostile = read("hostile-afl9.vmdk", 20);
        assert_eq!(hostile.content_id, Some(ContentId(0x052d_b3b7)), "old QEMU left out the leading zero");
    }

    /// Lines that are almost right, so that arbitrary text gets past the first word.
    fn any_line() -> impl Strategy<Value = String> {
        prop_oneof![
            "(RW|rdonly|NOACCESS) [0-9]{1,20} (FLAT|Sparse|ZERO|VMFS|X)( \"?[a \"]{0,6}\"?( [0-9a\"]{1,3}){0,4})?",
            "(CID|parentCID|version|createType|encoding|parentFileNameHint|ddb\\.x|y) ?= ?\"?[0-9a-f \"]{0,9}\"?",
            "\\PC{0,20}",
            Just(String::new()),
        ]
    }

    proptest! {
        #[test]
        fn decoding_arbitrary_bytes_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let _ = Descriptor::decode(&bytes);
            let _ = crate::looks_like_descriptor(&bytes);
            let _ = crate::content_id_places(&bytes);
        }

        #[test]
        fn what_was_read_is_written_so_that_it_reads_the_same(lines in prop::collection::vec(any_line(), 0..4)) {
            if let Ok(descriptor) = Descriptor::decode(lines.join("\n").as_bytes()) {
                let again = Descriptor::decode(descriptor.encode().as_bytes()).unwrap();
                let encoding = again.encoding.clone();
                prop_assert_eq!(again, Descriptor { encoding, ..descriptor });
            }
        }

        #[test]
        fn places_are_digits_within_the_input(lines in prop::collection::vec(any_line(), 0..6)) {
            let text = lines.join("\r\n");
            let places = crate::content_id_places(text.as_bytes());
            for range in [places.cid, places.long_content_id_tail].into_iter().flatten() {
                prop_assert!(text[range.clone()].bytes().all(|byte| byte.is_ascii_hexdigit()));
                prop_assert!((1..=8).contains(&range.len()));
            }
        }
    }
}
