//! The descriptor: the text that says what a disk is made of, and how it is written. `descriptor_reader.rs` reads it.

use crate::content_id::ContentId;
use crate::descriptor_text::one_line;
use crate::error::{ParseError, ParseErrorKind};
use crate::extent::ExtentLine;
use crate::sectors::Sectors;

/// What a descriptor says (VMware Virtual Disk Format 1.1, "The Descriptor File").
///
/// All of it is as written and none of it is checked against files: extents may be missing, names may lead anywhere.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Descriptor {
    /// Version of the descriptor, which is not that of the header: 1, 2, or 3 where changes are tracked. 1 if the
    /// text does not say.
    pub version: u32,
    /// Character set, as written. Only UTF-8 is understood: see [`Descriptor::decode`].
    pub encoding: Option<String>,
    /// Content ID of the disk; `None` if the text has none, which is fine until a child asks for it.
    pub content_id: Option<ContentId>,
    /// Content ID that the parent has to have; `None` without a parent (`ffffffff`, or no such key).
    pub parent_content_id: Option<ContentId>,
    /// `createType` in the letter case written, empty if there is none. Tells people what the disk was made as; what
    /// it is made of, the extents say.
    pub create_type: String,
    /// Name of the parent's descriptor as written, of whatever host. Hostile.
    pub parent_file_name_hint: Option<String>,
    /// Name of the file that tracks changes, which becomes wrong when somebody writes without maintaining it.
    pub change_track_path: Option<String>,
    /// The extents in the order of the disk.
    pub extents: Vec<ExtentLine>,
    /// The disk database: keys with their `ddb.` and values, as written, in order.
    pub ddb: Vec<(String, String)>,
    /// Keys that are not known here and their values, as written, in order; `isNativeSnapshot` is one.
    pub other: Vec<(String, String)>,
}

impl Default for Descriptor {
    /// Version 1 and nothing else.
    fn default() -> Self {
        Self {
            version: 1,
            encoding: None,
            content_id: None,
            parent_content_id: None,
            create_type: String::new(),
            parent_file_name_hint: None,
            change_track_path: None,
            extents: Vec::new(),
            ddb: Vec::new(),
            other: Vec::new(),
        }
    }
}

impl Descriptor {
    /// Writes the descriptor in VMware's form: its sections, its comments, LF. The first line is the comment by which
    /// others know a descriptor, so the text may begin a file.
    ///
    /// What [`Descriptor::decode`] returned is read back the same, except that an `encoding` other than UTF-8 becomes
    /// UTF-8 if there is anything but ASCII. In a value built by hand, a line end or NUL becomes `_`; keys have to be
    /// words, and every extent but a `ZERO` one has to have a file.
    pub fn encode(&self) -> String {
        let mut body = String::new();
        let mut line = |text: &str| {
            body.push_str(text);
            body.push('\n');
        };
        let quoted = |key: &str, value: &str| format!("{}=\"{}\"", one_line(key), one_line(value));
        if let Some(id) = self.content_id {
            line(&format!("CID={id}"));
        }
        line(&format!("parentCID={}", self.parent_content_id.unwrap_or(ContentId::NO_PARENT)));
        for (key, value) in &self.other {
            line(&quoted(key, value));
        }
        if !self.create_type.is_empty() {
            line(&quoted("createType", &self.create_type));
        }
        if let Some(hint) = &self.parent_file_name_hint {
            line(&quoted("parentFileNameHint", hint));
        }
        line("\n# Extent description");
        for extent in &self.extents {
            line(&extent.to_string());
        }
        if let Some(path) = &self.change_track_path {
            line("\n# Change Tracking File");
            line(&quoted("changeTrackPath", path));
        }
        line("\n# The Disk Data Base \n#DDB\n");
        for (key, value) in &self.ddb {
            line(&format!("{} = \"{}\"", one_line(key), one_line(value)));
        }
        let encoding = self.encoding.as_deref().map(|name| if body.is_ascii() { name } else { "UTF-8" });
        let encoding = encoding.map(|name| quoted("encoding", name) + "\n").unwrap_or_default();
        format!("# Disk DescriptorFile\nversion={}\n{encoding}{body}", self.version)
    }

    /// The first value of a key of the disk database, `ddb.` included, in any letter case.
    pub fn ddb(&self, key: &str) -> Option<&str> {
        self.ddb.iter().find(|(known, _)| known.eq_ignore_ascii_case(key)).map(|(_, value)| value.as_str())
    }

    /// Size of the disk: the sum of its extents.
    ///
    /// # Errors
    /// The sum in bytes exceeds 64 bits.
    pub fn capacity(&self) -> Result<Sectors, ParseError> {
        let sum = self.extents.iter().try_fold(Sectors(0), |sum, extent| sum.checked_add(extent.sectors));
        sum.filter(|sum| *sum <= Sectors::MAX)
            .ok_or_else(|| ParseError::whole("sum of the extent sizes", ParseErrorKind::Overflow))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Access, ExtentKind};
    use proptest::prelude::*;

    fn decoded(text: &str) -> Descriptor {
        Descriptor::decode(text.as_bytes()).unwrap_or_else(|error| panic!("{error}\n{text}"))
    }

    /// From vmware-monolithicSparse.vmdk, byte for byte: the blank after "Data Base" is VMware's.
    const VMWARE: &str = r#"# Disk DescriptorFile
version=1
CID=00000000
parentCID=ffffffff
isNativeSnapshot="no"
createType="monolithicSparse"

# Extent description
RW 20480 SPARSE "monolithicSparse.vmdk"

# The Disk Data Base 
#DDB

ddb.adapterType = "buslogic"
ddb.geometry.sectors = "17"
ddb.geometry.heads = "4"
ddb.geometry.cylinders = "301"
ddb.uuid = "60 00 C2 9f 48 66 ae a5-2f 18 d3 03 0b a9 14 ff"
ddb.longContentID = "6e3d2a3fb9f03cc89dfc119febc44fce"
ddb.encoding = "UTF-8"
ddb.toolsVersion = "1"
ddb.virtualHWVersion = "7"
ddb.deletable = "true"
"#;

    #[test]
    fn writes_back_what_vmware_wrote_byte_for_byte() {
        assert_eq!(decoded(VMWARE).encode(), VMWARE);
    }

    #[test]
    fn writes_every_section_where_vmware_has_it() {
        let extent = |text: &str| decoded(text).extents.remove(0);
        let descriptor = Descriptor {
            version: 3,
            encoding: Some("UTF-8".into()),
            content_id: Some(ContentId(0xfffffffe)),
            parent_content_id: Some(ContentId(0x1a)),
            create_type: "vmfsSparse".into(),
            parent_file_name_hint: Some("base disk.vmdk".into()),
            change_track_path: Some("a-ctk.vmdk".into()),
            extents: vec![
                extent("RW 8 VMFSSPARSE \"a-delta.vmdk\""),
                extent("RDONLY 8 FLAT \"b\""),
                extent("RW 1 ZERO"),
            ],
            ddb: vec![("ddb.comment".into(), "5\" of it".into())],
            other: vec![("isNativeSnapshot".into(), "no".into())],
        };
        let expected = r#"# Disk DescriptorFile
version=3
encoding="UTF-8"
CID=fffffffe
parentCID=0000001a
isNativeSnapshot="no"
createType="vmfsSparse"
parentFileNameHint="base disk.vmdk"

# Extent description
RW 8 VMFSSPARSE "a-delta.vmdk"
RDONLY 8 FLAT "b" 0
RW 1 ZERO

# Change Tracking File
changeTrackPath="a-ctk.vmdk"

# The Disk Data Base 
#DDB

ddb.comment = "5" of it"
"#;
        assert_eq!(descriptor.encode(), expected);
        assert_eq!(decoded(expected), descriptor);
    }

    #[test]
    fn the_empty_descriptor_has_the_first_comment_and_no_parent() {
        let text = Descriptor::default().encode();
        assert!(text.starts_with("# Disk DescriptorFile\nversion=1\nparentCID=ffffffff\n"));
        assert!(crate::looks_like_descriptor(text.as_bytes()));
        assert_eq!(decoded(&text), Descriptor::default());
    }

    #[test]
    fn names_its_character_set_rightly() {
        let mut descriptor = Descriptor { encoding: Some("GBK".into()), ..Descriptor::default() };
        assert!(descriptor.encode().contains("encoding=\"GBK\""));
        descriptor.ddb.push(("ddb.comment".into(), "\u{78c1}\u{76d8}".into()));
        assert!(descriptor.encode().contains("encoding=\"UTF-8\""));
    }

    #[test]
    fn a_line_end_in_a_value_cannot_add_a_key() {
        let hint = Some("a\"\nCID=00000000\r\0".to_owned());
        let text = Descriptor { parent_file_name_hint: hint, ..Descriptor::default() }.encode();
        assert_eq!(decoded(&text).parent_file_name_hint.as_deref(), Some("a\"_CID=00000000__"));
        assert_eq!(decoded(&text).content_id, None);
    }

    #[test]
    fn looks_up_the_database_in_any_letter_case() {
        let descriptor = decoded("ddb.AdapterType=\"ide\"\nDDB.adaptertype=scsi\n");
        assert_eq!(descriptor.ddb("ddb.adapterType"), Some("ide"));
        assert_eq!(descriptor.ddb("adapterType"), None);
        assert_eq!(descriptor.ddb.len(), 2);
    }

    #[test]
    fn adds_up_extents_as_far_as_64_bits_of_bytes() {
        let disk = |sizes: [u64; 2]| {
            let line = |size| format!("RW {size} ZERO\n");
            decoded(&sizes.map(line).concat()).capacity().map_err(|error| error.to_string())
        };
        let max = Sectors::MAX.0;
        assert_eq!(disk([1, 0]), Ok(Sectors(1)));
        assert_eq!(disk([max - 1, 1]), Ok(Sectors::MAX));
        assert_eq!(disk([max, 1]), Err("sum of the extent sizes is too large".into()));
        assert_eq!(disk([max, max]), Err("sum of the extent sizes is too large".into()));
        assert_eq!(Descriptor::default().capacity(), Ok(Sectors(0)));
    }

    fn any_extent() -> impl Strategy<Value = ExtentLine> {
        use ExtentKind::{Flat, SeSparse, Sparse, Vmfs, VmfsRaw, VmfsRdm, VmfsSparse, Zero};
        let access = prop::sample::select(vec![Access::Rw, Access::RdOnly, Access::NoAccess]);
        let kind = prop::sample::select(vec![Flat, Sparse, Zero, Vmfs, VmfsSparse, VmfsRdm, VmfsRaw, SeSparse]);
        let numbers = (0u64..1 << 54, 0u64..1 << 54);
        let words = prop::option::of(("[a-zA-Z0-9-]{1,12}", prop::option::of("[a-z]{1,5} [a-z]{1,5}")));
        (access, kind, numbers, "[ \"\\PC]{1,30}", words).prop_map(|(access, kind, (sectors, offset), file, words)| {
            let zero = kind == Zero;
            let words = words.filter(|_| !zero);
            ExtentLine {
                access,
                sectors: Sectors(sectors),
                kind,
                file: Some(file).filter(|_| !zero),
                offset: Sectors(if zero { 0 } else { offset }),
                partition_uuid: words.as_ref().map(|(uuid, _)| uuid.clone()),
                device_id: words.and_then(|(_, device)| device),
            }
        })
    }

    fn any_descriptor() -> impl Strategy<Value = Descriptor> {
        let value = || "[ \"=#\\PC]{0,30}";
        let name = || prop::option::of("[ \"=#\\PC]{1,30}");
        let ids = (prop::option::of(any::<u32>()), prop::option::of(0..u32::MAX));
        let texts = (value(), name(), name(), prop::sample::select(vec![None, Some("UTF-8".to_owned())]));
        let lists = (
            prop::collection::vec(any_extent(), 0..6),
            prop::collection::vec(("ddb\\.[a-zA-Z.]{1,20}", value()), 0..6),
            prop::collection::vec(("x[a-zA-Z.]{1,20}", value()), 0..3),
        );
        (1u32..=3, ids, texts, lists).prop_map(|(version, (id, parent), texts, (extents, ddb, other))| Descriptor {
            version,
            encoding: texts.3,
            content_id: id.map(ContentId),
            parent_content_id: parent.map(ContentId),
            create_type: texts.0,
            parent_file_name_hint: texts.1,
            change_track_path: texts.2,
            extents,
            ddb,
            other,
        })
    }

    proptest! {
        #[test]
        fn any_descriptor_with_printable_names_decodes_to_itself(descriptor in any_descriptor()) {
            let text = descriptor.encode();
            prop_assert_eq!(Descriptor::decode(text.as_bytes()), Ok(descriptor));
        }

        #[test]
        fn other_line_ends_and_blanks_change_nothing(descriptor in any_descriptor(), end in "\r|\r\n|\n\n| \r\n\t") {
            let text = format!("\u{feff}{}\0junk", descriptor.encode().replace('\n', &end));
            prop_assert_eq!(Descriptor::decode(text.as_bytes()), Ok(descriptor));
        }

        #[test]
        fn the_content_id_is_found_where_it_was_written(descriptor in any_descriptor()) {
            let text = descriptor.encode();
            let found = crate::content_id_places(text.as_bytes()).cid.map(|range| text[range].to_owned());
            prop_assert_eq!(found, descriptor.content_id.map(|id| id.to_string()));
        }
    }
}
