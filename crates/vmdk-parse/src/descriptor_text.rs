//! The text of a descriptor: its lines, its keys and values, and how one knows that a file is one.
//!
//! All reading goes through [`Span`], which knows where in the input it stands: what is read and what is patched in
//! place are found by the same rules.

use crate::error::{ParseError, ParseErrorKind, shortened};
use std::borrow::Cow;
use std::ops::Range;

/// The most bytes of text in a descriptor that we read, as QEMU does.
pub const MAX_TEXT_BYTES: u64 = 1 << 20;
/// The most lines of a descriptor that we read; VirtualBox stops at 1100.
pub const MAX_LINES: u64 = 20_000;

const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";

/// Whether a file that begins so is a descriptor: among its first comments is the one that says so, in any of the
/// spellings that programs write or read (`# Disk DescriptorFile`, `# Disk Descriptor File`, `#Disk...`,
/// `# Description file created by VMDK stream converter`), in any letter case, after an optional byte order mark.
///
/// The first 512 bytes are enough; they need not end at the end of a line.
pub fn looks_like_descriptor(first_bytes: &[u8]) -> bool {
    let limit = usize::try_from(MAX_TEXT_BYTES).unwrap_or(usize::MAX);
    let text = until_nul(first_bytes.get(..limit).unwrap_or(first_bytes));
    let comments = lines(text)
        .map(|(_, line)| line.trim().bytes)
        .filter(|line| !line.is_empty())
        .map_while(|line| line.strip_prefix(b"#"));
    let known: [&[u8]; 2] = [b"diskdescriptorfile", b"descriptionfilecreatedbyvmdkstreamconverter"];
    comments.into_iter().any(|comment| known.iter().any(|magic| starts_with_ignoring_blanks(comment, magic)))
}

fn starts_with_ignoring_blanks(text: &[u8], magic: &[u8]) -> bool {
    let mut squeezed = text.iter().filter(|byte| !byte.is_ascii_whitespace()).map(u8::to_ascii_lowercase);
    magic.iter().all(|&expected| squeezed.next() == Some(expected))
}

/// The text of a descriptor: what comes before the first NUL.
pub(crate) fn until_nul(bytes: &[u8]) -> &[u8] {
    bytes.split(|&byte| byte == 0).next().unwrap_or_default()
}

/// The same, if it is not too long. Does not look further than the limit for the NUL.
pub(crate) fn text(bytes: &[u8]) -> Result<&[u8], ParseError> {
    let limit = usize::try_from(MAX_TEXT_BYTES).unwrap_or(usize::MAX);
    let text = until_nul(bytes.get(..=limit).unwrap_or(bytes));
    if text.len() > limit {
        return Err(ParseError::whole("descriptor", ParseErrorKind::TooLong { limit: MAX_TEXT_BYTES }));
    }
    Ok(text)
}

/// The lines of a text with their numbers, from 1. LF, CRLF and a lone CR end a line.
pub(crate) fn lines(text: &[u8]) -> impl Iterator<Item = (u64, Span<'_>)> {
    let whole = Span { start: 0, bytes: text };
    let mut rest = match text.strip_prefix(BYTE_ORDER_MARK) {
        Some(_) => whole.split_at(BYTE_ORDER_MARK.len()).1,
        None => whole,
    };
    let mut number = 0u64;
    std::iter::from_fn(move || {
        if rest.bytes.is_empty() {
            return None;
        }
        let end = rest.bytes.iter().position(|&byte| byte == b'\n' || byte == b'\r').unwrap_or(rest.bytes.len());
        let (line, after) = rest.split_at(end);
        rest = after.split_at(if after.bytes.starts_with(b"\r\n") { 2 } else { 1 }).1;
        number = number.saturating_add(1);
        Some((number, line))
    })
}

/// A part of the input that knows where it stands in it.
#[derive(Clone, Copy)]
pub(crate) struct Span<'a> {
    start: usize,
    pub(crate) bytes: &'a [u8],
}

impl<'a> Span<'a> {
    /// Byte offsets in the input.
    pub(crate) fn range(self) -> Range<usize> {
        self.start..self.start.saturating_add(self.bytes.len())
    }

    /// The first `at` bytes and the others; an `at` behind the end leaves nothing in the second part.
    pub(crate) fn split_at(self, at: usize) -> (Self, Self) {
        let at = at.min(self.bytes.len());
        let (head, tail) = self.bytes.split_at_checked(at).unwrap_or_default();
        (Self { start: self.start, bytes: head }, Self { start: self.start.saturating_add(at), bytes: tail })
    }

    /// Without blanks at both ends.
    pub(crate) fn trim(self) -> Self {
        let tail = self.bytes.trim_ascii_start();
        let skipped = self.bytes.len().saturating_sub(tail.len());
        Self { start: self.start.saturating_add(skipped), bytes: tail.trim_ascii_end() }
    }

    /// The first word.
    pub(crate) fn first_word(self) -> &'a [u8] {
        self.bytes.trim_ascii_start().split(u8::is_ascii_whitespace).next().unwrap_or_default()
    }

    /// What `key = value` says, both without the blanks around them; `None` for a line that is no such thing. A key
    /// holds neither blanks nor quotes, so that a broken extent line cannot pass for one.
    pub(crate) fn key_and_value(self) -> Option<(&'a [u8], Self)> {
        let equals = self.bytes.iter().position(|&byte| byte == b'=')?;
        let (key, rest) = self.split_at(equals);
        let key = key.trim().bytes;
        let word = !key.is_empty() && !key.iter().any(|byte| byte.is_ascii_whitespace() || *byte == b'"');
        word.then(|| (key, rest.split_at(1).1.trim()))
    }

    /// Without the quotes around it, if it begins with one; `None` if it does not end with one as well.
    pub(crate) fn unquote(self) -> Option<Self> {
        if !self.bytes.starts_with(b"\"") {
            return Some(self);
        }
        let inner = self.split_at(1).1;
        let len = inner.bytes.strip_suffix(b"\"")?.len();
        Some(inner.split_at(len).0)
    }

    /// As text; bytes that are not UTF-8 become replacement characters.
    pub(crate) fn lossy(self) -> Cow<'a, str> {
        String::from_utf8_lossy(self.bytes)
    }
}

/// A decimal number without a sign.
pub(crate) fn decimal(field: &'static str, text: &str, line: u64) -> Result<u64, ParseError> {
    let error = |kind| ParseError::at_line(field, line, kind);
    if text.is_empty() || !text.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(error(ParseErrorKind::BadNumber(shortened(text))));
    }
    text.parse().map_err(|_| error(ParseErrorKind::Overflow))
}

/// A value as it can stand in one line: a line end or NUL, which no descriptor that was read contains, becomes `_`.
pub(crate) fn one_line(value: &str) -> Cow<'_, str> {
    let breaks = ['\n', '\r', '\0'];
    if value.contains(breaks) { Cow::Owned(value.replace(breaks, "_")) } else { Cow::Borrowed(value) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn split(text: &str) -> Vec<(u64, usize, String)> {
        lines(text.as_bytes()).map(|(number, line)| (number, line.range().start, line.lossy().into_owned())).collect()
    }

    #[test]
    fn every_kind_of_line_end_counts_once() {
        let expected =
            |at: [usize; 3]| vec![(1, at[0], "a".to_owned()), (2, at[1], String::new()), (3, at[2], "b".to_owned())];
        assert_eq!(split("a\n\nb"), expected([0, 2, 3]));
        assert_eq!(split("a\r\n\r\nb\r\n"), expected([0, 3, 5]));
        assert_eq!(split("a\r\rb\r"), expected([0, 2, 3]));
        assert_eq!(split("\u{feff}a\n\nb\n"), expected([3, 5, 6]));
        assert_eq!(split(""), []);
        assert_eq!(split("\u{feff}"), []);
    }

    #[test]
    fn knows_every_spelling_of_the_first_comment() {
        for text in [
            "# Disk DescriptorFile\nversion=1",
            "# Disk Descriptor File\r\n",
            "#Disk DescriptorFile",
            "#Disk Descriptor File",
            "# DISK DESCRIPTORFILE",
            "# disk descriptorfile\0\0",
            "# Description file created by VMDK stream converter\nversion=1",
            "\u{feff}# Disk DescriptorFile",
            "\n\r\n  \t\n  # Disk DescriptorFile  ",
            "# written by hand\n# Disk DescriptorFile\n",
        ] {
            assert!(looks_like_descriptor(text.as_bytes()), "{text:?}");
        }
    }

    #[test]
    fn other_files_do_not_look_like_descriptors() {
        for text in [
            "",
            "\0# Disk DescriptorFile",
            "KDMV",
            "# Disk Descriptor",
            "#!/bin/sh\n",
            "version=1\n# Disk DescriptorFile",
            "Disk DescriptorFile",
            "# This is no # Disk DescriptorFile",
        ] {
            assert!(!looks_like_descriptor(text.as_bytes()), "{text:?}");
        }
        assert!(!looks_like_descriptor(&[0xff; 512]));
    }

    #[test]
    fn reads_text_up_to_the_limit() {
        let mut bytes = vec![b'#'; MAX_TEXT_BYTES as usize - 1];
        for expected in [true, true, false] {
            assert_eq!(text(&bytes).is_ok(), expected);
            bytes.push(b'#');
        }
        bytes[100] = 0;
        assert_eq!(text(&bytes).unwrap().len(), 100);
    }

    #[test]
    fn a_key_is_one_word() {
        let key = |line: &'static str| {
            let span = Span { start: 7, bytes: line.as_bytes() };
            span.key_and_value().map(|(key, value)| (key, value.lossy(), value.range().start))
        };
        assert_eq!(key("CID=1"), Some((b"CID".as_slice(), "1".into(), 11)));
        assert_eq!(key(" a.b\t=  \"x = y\" "), Some((b"a.b".as_slice(), "\"x = y\"".into(), 15)));
        assert_eq!(key("a="), Some((b"a".as_slice(), "".into(), 9)));
        assert_eq!(key("= 1"), None);
        assert_eq!(key("no"), None);
        assert_eq!(key("RX 1 FLAT \"a=b\""), None);
        assert_eq!(key("\"a\"=b"), None);
    }

    #[test]
    fn strips_one_pair_of_quotes() {
        let unquoted = |text: &'static str| {
            let span = Span { start: 0, bytes: text.as_bytes() };
            span.unquote().map(|span| (span.lossy(), span.range().start))
        };
        assert_eq!(unquoted("a b"), Some(("a b".into(), 0)));
        assert_eq!(unquoted("\"a \"b\" c\""), Some(("a \"b\" c".into(), 1)));
        assert_eq!(unquoted("\"\""), Some(("".into(), 1)));
        assert_eq!(unquoted("\"\"a\"\""), Some(("\"a\"".into(), 1)));
        assert_eq!(unquoted("\""), None);
        assert_eq!(unquoted("\"a"), None);
        assert_eq!(unquoted("5\""), Some(("5\"".into(), 0)));
    }

    #[test]
    fn decimal_numbers_have_no_sign() {
        assert_eq!(decimal("n", "007", 1), Ok(7));
        assert_eq!(decimal("n", "18446744073709551615", 1), Ok(u64::MAX));
        assert_eq!(decimal("n", "18446744073709551616", 1).unwrap_err().kind, ParseErrorKind::Overflow);
        for text in ["", "-1", "+1", "0x1", "1 ", "١"] {
            assert_eq!(decimal("n", text, 1).unwrap_err().kind, ParseErrorKind::BadNumber(text.into()));
        }
    }
}
