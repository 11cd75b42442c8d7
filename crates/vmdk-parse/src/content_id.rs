//! Content IDs: how a child knows that its parent was not changed.

use crate::descriptor_text::{Span, lines, text};
use std::fmt;
use std::ops::{Range, RangeInclusive};

/// A content ID: a random number that changes when the content of a disk first changes after each opening
/// (VMware Virtual Disk Format 1.1, "The Header", `CID`). Written as 8 lower-case hexadecimal digits.
///
/// `ffffffff` as a *parent's* ID says that there is no parent: that is `None` in [`crate::Descriptor`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ContentId(pub u32);

impl ContentId {
    /// What `parentCID` says where there is no parent. Not to be chosen as the ID of a disk.
    pub const NO_PARENT: Self = Self(0xffff_ffff);

    /// Reads 1 to 8 hexadecimal digits: QEMU leaves out leading zeroes.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let digits = (1..=8).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_hexdigit());
        if digits { u32::from_str_radix(text, 16).ok().map(Self) } else { None }
    }
}

impl fmt::Display for ContentId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:08x}", self.0)
    }
}

/// Where a content ID stands in the text of a descriptor, for a writer that replaces these digits by as many others and nothing
/// else.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct ContentIdPlaces {
    /// The digits of `CID`; `None` if there is no such key, if there are several (a writer that changed one of them
    /// would make the descriptor contradict itself), or if its value is not 1 to 8 hexadecimal digits. QEMU leaves out leading
    /// zeroes, so one image in sixteen has fewer than 8.
    pub cid: Option<Range<usize>>,
    /// The last 8 digits of `ddb.longContentID`, which repeat the CID in disks that VMware writes to; `None` if
    /// there is no such key, if there are several, or if its value is not exactly 32 hexadecimal digits.
    pub long_content_id_tail: Option<Range<usize>>,
}

/// Finds the places of the content ID, as byte ranges of `bytes`: of a descriptor file, or of the room for an
/// embedded descriptor. Reads by the rules of [`crate::Descriptor::decode`]; what that refuses has places all the
/// same, unless it is too long.
pub fn content_id_places(bytes: &[u8]) -> ContentIdPlaces {
    let Ok(text) = text(bytes) else { return ContentIdPlaces::default() };
    let place = |name: &str, digits: RangeInclusive<usize>| {
        let mut values = lines(text).filter_map(|(_, line)| value_of(line, name));
        let value = values.next()?.unquote()?;
        let exact = digits.contains(&value.bytes.len()) && value.bytes.iter().all(u8::is_ascii_hexdigit);
        let alone = values.next().is_none();
        (exact && alone).then(|| value.split_at(value.bytes.len().saturating_sub(8)).1.range())
    };
    ContentIdPlaces { cid: place("CID", 1..=8), long_content_id_tail: place("ddb.longContentID", 32..=32) }
}

/// What a descriptor says about change tracking, for a writer that drops it in place.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct ChangeTrackingPlaces {
    /// The digit of `version=3`; `None` for another version.
    pub version: Option<Range<usize>>,
    /// The first byte of each `changeTrackPath`: a `#` there makes a comment of it.
    pub paths: Vec<usize>,
}

/// Finds what a descriptor says about change tracking, as byte ranges of `bytes`, by the rules of [`content_id_places`].
pub fn change_tracking_places(bytes: &[u8]) -> ChangeTrackingPlaces {
    let Ok(text) = text(bytes) else { return ChangeTrackingPlaces::default() };
    let version = lines(text).find_map(|(_, line)| value_of(line, "version")).and_then(Span::unquote);
    let paths = lines(text).filter(|(_, line)| value_of(*line, "changeTrackPath").is_some());
    ChangeTrackingPlaces {
        version: version.filter(|v| v.bytes == b"3").map(Span::range),
        paths: paths.map(|(_, line)| line.trim().range().start).collect(),
    }
}

fn value_of<'a>(line: Span<'a>, name: &str) -> Option<Span<'a>> {
    let line = line.trim();
    if line.bytes.starts_with(b"#") {
        return None;
    }
    let (key, value) = line.key_and_value()?;
    key.eq_ignore_ascii_case(name.as_bytes()).then_some(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn places(text: &str) -> (Option<&str>, Option<&str>) {
        let found = content_id_places(text.as_bytes());
        (found.cid.map(|range| &text[range]), found.long_content_id_tail.map(|range| &text[range]))
    }

    #[test]
    fn content_ids_have_8_lower_case_digits() {
        assert_eq!(ContentId(0xAB).to_string(), "000000ab");
        assert_eq!(ContentId::NO_PARENT.to_string(), "ffffffff");
    }

    #[test]
    fn reads_1_to_8_hexadecimal_digits() {
        assert_eq!(ContentId::parse("52db3b7"), Some(ContentId(0x52d_b3b7)));
        assert_eq!(ContentId::parse("FFFFFFFE"), Some(ContentId(0xffff_fffe)));
        assert_eq!(ContentId::parse("0"), Some(ContentId(0)));
        for text in ["", "123456789", "0x12", "+1", "-1", "12 4", "xyz"] {
            assert_eq!(ContentId::parse(text), None, "{text:?}");
        }
    }

    #[test]
    fn finds_the_digits_among_blanks_quotes_and_other_line_ends() {
        let long = "0123456789abcdef0123456789ABCDEF";
        let text = format!(
            "\u{feff}# CID=11111111\r\n cid = \"A454774a\" \r\rparentCID=ffffffff\nDDB.longContentID=\"{long}\""
        );
        assert_eq!(places(&text), (Some("A454774a"), Some("89ABCDEF")));
        assert_eq!(places("CID=12345678"), (Some("12345678"), None));
        assert_eq!(places("CID=234567"), (Some("234567"), None));
        assert_eq!(places("CID=12345678\0CID=87654321"), (Some("12345678"), None));
    }

    #[test]
    fn has_no_place_for_a_value_of_another_length() {
        for text in ["", "CID=", "CID=123456789", "CID=1234567g", "CID=\"12345678", "parentCID=12345678"] {
            assert_eq!(places(text), (None, None), "{text:?}");
        }
        for digits in [8, 31, 33] {
            assert_eq!(places(&format!("ddb.longContentID=\"{}\"", "0".repeat(digits))), (None, None));
        }
    }

    #[test]
    fn change_tracking_is_dropped_by_as_many_bytes() {
        let mut text =
            b"version=3\nCID=1\n# changeTrackPath=\"no\"\n changeTrackPath = \"a-ctk.vmdk\"\r\nRW 1 ZERO\n".to_vec();
        let places = change_tracking_places(&text);
        text[places.version.unwrap()].copy_from_slice(b"1");
        for at in places.paths {
            text[at] = b'#';
        }
        assert_eq!(
            String::from_utf8(text).unwrap(),
            "version=1\nCID=1\n# changeTrackPath=\"no\"\n #hangeTrackPath = \"a-ctk.vmdk\"\r\nRW 1 ZERO\n"
        );
        assert_eq!(change_tracking_places(b"version=1\nversion=3"), ChangeTrackingPlaces::default());
    }

    #[test]
    fn has_no_place_for_a_key_that_is_given_twice() {
        assert_eq!(places("CID=12345678\ncid=12345678"), (None, None));
        assert_eq!(places("CID=12345678\n#CID=12345678"), (Some("12345678"), None));
    }
}
