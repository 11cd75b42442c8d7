//! A line of the extent section of a descriptor.

use crate::descriptor_text::{decimal, one_line};
use crate::error::{ParseError, ParseErrorKind, shortened};
use crate::sectors::Sectors;
use std::fmt;

/// What may be done with an extent (VMware Virtual Disk Format 1.1, "The Extents", access).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Access {
    /// `RW`: read and write.
    Rw,
    /// `RDONLY`: read only.
    RdOnly,
    /// `NOACCESS`: neither.
    NoAccess,
}

/// How an extent stores its sectors (VMware Virtual Disk Format 1.1, "The Extents", type of extent; `SESPARSE` is
/// of later ESXi versions).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ExtentKind {
    /// `FLAT`: the sectors as they are.
    Flat,
    /// `SPARSE`: a hosted sparse extent.
    Sparse,
    /// `ZERO`: zeroes, without a file.
    Zero,
    /// `VMFS`: flat, on VMFS.
    Vmfs,
    /// `VMFSSPARSE`: an ESX redo log (`COWD`).
    VmfsSparse,
    /// `VMFSRDM`: mapping of a raw device.
    VmfsRdm,
    /// `VMFSRAW`: a raw device.
    VmfsRaw,
    /// `SESPARSE`: the space-efficient sparse format.
    SeSparse,
}

const ACCESS_WORDS: [(&str, Access); 3] =
    [("RW", Access::Rw), ("RDONLY", Access::RdOnly), ("NOACCESS", Access::NoAccess)];

const KIND_WORDS: [(&str, ExtentKind); 8] = [
    ("FLAT", ExtentKind::Flat),
    ("SPARSE", ExtentKind::Sparse),
    ("ZERO", ExtentKind::Zero),
    ("VMFS", ExtentKind::Vmfs),
    ("VMFSSPARSE", ExtentKind::VmfsSparse),
    ("VMFSRDM", ExtentKind::VmfsRdm),
    ("VMFSRAW", ExtentKind::VmfsRaw),
    ("SESPARSE", ExtentKind::SeSparse),
];

fn meaning<T: Copy>(words: &[(&str, T)], word: &str) -> Option<T> {
    words.iter().find(|(known, _)| known.eq_ignore_ascii_case(word)).map(|&(_, meaning)| meaning)
}

fn word_for<T: PartialEq>(words: &[(&'static str, T)], meaning: &T) -> &'static str {
    words.iter().find(|(_, known)| known == meaning).map_or("", |&(word, _)| word)
}

impl Access {
    pub(crate) fn parse(word: &[u8]) -> Option<Self> {
        meaning(&ACCESS_WORDS, str::from_utf8(word).ok()?)
    }
}

impl fmt::Display for Access {
    /// The word of the descriptor, upper case.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(word_for(&ACCESS_WORDS, self))
    }
}

impl fmt::Display for ExtentKind {
    /// The word of the descriptor, upper case.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(word_for(&KIND_WORDS, self))
    }
}

/// One extent: `ACCESS SECTORS TYPE ["file" [offset [partition-uuid [device-id]]]]`
/// (VMware Virtual Disk Format 1.1, "The Extents").
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExtentLine {
    /// What may be done with it.
    pub access: Access,
    /// Its size. 0 is read as an extent that adds nothing: it cannot move what follows it, and callers pass over it.
    pub sectors: Sectors,
    /// How it stores its sectors.
    pub kind: ExtentKind,
    /// The name of its file as written, with all its blanks and quotes. Hostile: absolute names and `..` are up to
    /// callers. There is one for every kind but [`ExtentKind::Zero`], which has none: if its line names a file all
    /// the same, that and all after it is passed over, since it would read as zeroes anyhow.
    pub file: Option<String>,
    /// Where in the file the extent starts; 0 if the line does not say. Means something for flat extents only.
    pub offset: Sectors,
    /// Word after the offset, in disks that map partitions.
    pub partition_uuid: Option<String>,
    /// What stands after that.
    pub device_id: Option<String>,
}

impl ExtentLine {
    /// Reads a line without blanks at its ends.
    pub(crate) fn parse(text: &str, line: u64) -> Result<Self, ParseError> {
        let error = |field, kind| ParseError::at_line(field, line, kind);
        let (word, rest) = next_word(text);
        let access = meaning(&ACCESS_WORDS, word)
            .ok_or_else(|| error("extent access", ParseErrorKind::UnknownWord(shortened(word))))?;
        let (word, rest) = next_word(rest);
        let sectors = sectors_of("extent size", word, line)?;
        let (word, rest) = next_word(rest);
        if word.is_empty() {
            return Err(error("extent type", ParseErrorKind::Missing));
        }
        let kind = meaning(&KIND_WORDS, word)
            .ok_or_else(|| error("extent type", ParseErrorKind::UnknownWord(shortened(word))))?;
        if kind == ExtentKind::Zero {
            let offset = Sectors(0);
            return Ok(Self { access, sectors, kind, file: None, offset, partition_uuid: None, device_id: None });
        }
        let (file, rest) = file_name(rest).ok_or_else(|| error("extent file name", ParseErrorKind::BadQuote))?;
        if file.is_empty() {
            return Err(error("extent file name", ParseErrorKind::Missing));
        }
        let (word, rest) = next_word(rest);
        let offset = if word.is_empty() { Sectors(0) } else { sectors_of("extent offset", word, line)? };
        if offset.checked_add(sectors).and_then(Sectors::bytes).is_none() {
            return Err(error("extent end", ParseErrorKind::Overflow));
        }
        let (partition_uuid, device_id) = next_word(rest);
        let given = |text: &str| Some(text.to_owned()).filter(|text| !text.is_empty());
        Ok(Self {
            access,
            sectors,
            kind,
            file: given(file),
            offset,
            partition_uuid: given(partition_uuid),
            device_id: given(device_id),
        })
    }
}

impl fmt::Display for ExtentLine {
    /// The line as VMware writes it, without a line end. An offset of 0 is written for `FLAT` only, where readers
    /// demand it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} {}", self.access, self.sectors.0, self.kind)?;
        if self.kind == ExtentKind::Zero {
            return Ok(());
        }
        write!(f, " \"{}\"", one_line(self.file.as_deref().unwrap_or_default()))?;
        if self.kind == ExtentKind::Flat || self.offset.0 != 0 || self.partition_uuid.is_some() {
            write!(f, " {}", self.offset.0)?;
        }
        if let Some(uuid) = &self.partition_uuid {
            write!(f, " {}", one_line(uuid))?;
            if let Some(device) = &self.device_id {
                write!(f, " {}", one_line(device))?;
            }
        }
        Ok(())
    }
}

/// The first word, empty at the end, and what follows without blanks at its ends.
fn next_word(text: &str) -> (&str, &str) {
    let text = text.trim_ascii();
    let end = text.find(|c: char| c.is_ascii_whitespace()).unwrap_or(text.len());
    let (word, rest) = text.split_at_checked(end).unwrap_or((text, ""));
    (word, rest.trim_ascii())
}

/// A file name and what follows it. A quoted one ends at the last quote of the line, so that it may hold quotes:
/// nothing that follows may. `None` if there is no second quote, or something sticks to it.
fn file_name(text: &str) -> Option<(&str, &str)> {
    let Some(quoted) = text.strip_prefix('"') else {
        return Some(next_word(text)).filter(|(_, rest)| !rest.contains('"'));
    };
    let (name, rest) = quoted.rsplit_once('"')?;
    let apart = rest.chars().next().is_none_or(|c| c.is_ascii_whitespace());
    apart.then_some((name, rest))
}

fn sectors_of(field: &'static str, word: &str, line: u64) -> Result<Sectors, ParseError> {
    if word.is_empty() {
        return Err(ParseError::at_line(field, line, ParseErrorKind::Missing));
    }
    let value = decimal(field, word, line)?;
    if value > Sectors::MAX.0 {
        let kind = ParseErrorKind::OutOfRange { value, min: 0, max: Sectors::MAX.0 };
        return Err(ParseError::at_line(field, line, kind));
    }
    Ok(Sectors(value))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: &str) -> ExtentLine {
        ExtentLine::parse(text, 1).unwrap_or_else(|error| panic!("{text:?}: {error}"))
    }

    fn refused(text: &str) -> String {
        ExtentLine::parse(text, 12).expect_err(text).to_string()
    }

    #[test]
    fn reads_every_access_and_every_kind_in_any_letter_case() {
        for (word, access) in ACCESS_WORDS {
            assert_eq!(parsed(&format!("{} 1 FLAT \"f\" 0", word.to_lowercase())).access, access);
            assert_eq!(access.to_string(), word);
        }
        for (word, kind) in KIND_WORDS {
            assert_eq!(parsed(&format!("RW 1 {} \"f\"", word.to_lowercase())).kind, kind);
            assert_eq!(kind.to_string(), word);
        }
        assert_eq!(refused("WR 1 FLAT \"f\""), "line 12: extent access \"WR\" is not known");
        assert_eq!(refused("RW 1 FOO \"f\""), "line 12: extent type \"FOO\" is not known");
    }

    #[test]
    fn a_name_may_hold_blanks_and_quotes() {
        let names = [
            ("RW 100 FLAT \"my disk.vmdk\" 0", "my disk.vmdk"),
            ("RW 100 FLAT \"my \"disk\".vmdk\" 0", "my \"disk\".vmdk"),
            ("RW 100 FLAT \"a\" 0\" 0", "a\" 0"),
            ("RW 100 SPARSE \"\"\"", "\""),
            ("RW 100 SPARSE \" a  b \"", " a  b "),
            ("RW\t100 \t SPARSE\t\"größe.vmdk\"\t", "größe.vmdk"),
            ("RW 100 SPARSE plain.vmdk", "plain.vmdk"),
        ];
        for (text, name) in names {
            assert_eq!(parsed(text).file.as_deref(), Some(name), "{text:?}");
        }
    }

    #[test]
    fn a_name_needs_both_quotes_and_a_blank_after_them() {
        for text in ["RW 1 FLAT \"a", "RW 1 FLAT \"", "RW 1 FLAT \"a\"0", "RW 1 FLAT \"a\"b", "RW 1 FLAT a \"b\""] {
            assert_eq!(refused(text), "line 12: extent file name has a quote without its partner", "{text:?}");
        }
        assert_eq!(refused("RW 1 FLAT"), "line 12: extent file name is missing");
        assert_eq!(refused("RW 1 FLAT \"\" 0"), "line 12: extent file name is missing");
        assert_eq!(refused("RW 1"), "line 12: extent type is missing");
        assert_eq!(refused("RW"), "line 12: extent size is missing");
    }

    #[test]
    fn a_flat_extent_without_an_offset_starts_at_0() {
        assert_eq!(parsed("RW 1 FLAT \"f\"").offset, Sectors(0));
        assert_eq!(parsed("RW 1 FLAT \"f\" 63").offset, Sectors(63));
        assert_eq!(parsed("RW 1 FLAT \"f\"").to_string(), "RW 1 FLAT \"f\" 0");
        assert_eq!(parsed("RW 1 VMFS \"f\"").to_string(), "RW 1 VMFS \"f\"");
    }

    #[test]
    fn keeps_partition_and_device() {
        let text = "RW 63 FLAT \"\\\\.\\PhysicalDrive0\" 2048 5B3A-11 device one";
        let line = parsed(text);
        assert_eq!(line.partition_uuid.as_deref(), Some("5B3A-11"));
        assert_eq!(line.device_id.as_deref(), Some("device one"));
        assert_eq!(line.to_string(), text);
    }

    #[test]
    fn a_zero_extent_has_no_file_even_if_it_names_one() {
        for text in ["RW 8 ZERO", "RW 8 ZERO \"/etc/hostname\" 0", "RW 8 ZERO \"a"] {
            assert_eq!((parsed(text).file, parsed(text).to_string().as_str()), (None, "RW 8 ZERO"));
        }
    }

    #[test]
    fn an_extent_of_0_sectors_is_empty() {
        assert_eq!(parsed("RW 0 SPARSE \"f\"").sectors, Sectors(0));
    }

    #[test]
    fn rejects_sizes_and_offsets_that_no_disk_has() {
        let max = Sectors::MAX.0;
        assert_eq!(parsed(&format!("RW {max} FLAT \"f\"")).sectors, Sectors::MAX);
        assert_eq!(parsed(&format!("RW 1 FLAT \"f\" {}", max - 1)).offset, Sectors(max - 1));
        assert_eq!(refused(&format!("RW 1 FLAT \"f\" {max}")), "line 12: extent end is too large");
        for (number, problem) in [
            ("-1", "\"-1\" is not a number"),
            ("+1", "\"+1\" is not a number"),
            ("1k", "\"1k\" is not a number"),
            ("36028797018963968", "36028797018963968 is outside 0 to 36028797018963967"),
            ("18446744073709551616", "is too large"),
        ] {
            assert_eq!(refused(&format!("RW {number} FLAT \"f\"")), format!("line 12: extent size {problem}"));
            assert_eq!(refused(&format!("RW 1 FLAT \"f\" {number}")), format!("line 12: extent offset {problem}"));
        }
    }

    #[test]
    fn a_line_end_in_a_name_cannot_add_a_line() {
        let line = ExtentLine { file: Some("a\nRW 1 FLAT \"b\"".into()), ..parsed("RW 1 SPARSE \"f\"") };
        assert_eq!(line.to_string(), "RW 1 SPARSE \"a_RW 1 FLAT \"b\"\"");
    }
}
