//! Why bytes were refused: which field, where, what is wrong with it.

use std::fmt;

/// What was wrong with a header or a descriptor, and where.
///
/// Its text is for people: `grainSize at byte 20: 100 is not a power of two`,
/// `line 12: extent type "FOO" is not known`.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub struct ParseError {
    /// The field, by the name the specification gives it.
    pub field: &'static str,
    /// Where the field stands.
    pub at: At,
    /// What is wrong with it.
    pub kind: ParseErrorKind,
}

/// Where a [`ParseError`] was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum At {
    /// Byte offset from the start of the binary structure.
    Byte(u64),
    /// Line of a descriptor, the first being 1. CRLF, LF and a lone CR each end a line.
    Line(u64),
    /// The structure as a whole.
    Whole,
}

/// What is wrong with a field.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ParseErrorKind {
    /// The input ends too early; both numbers are bytes.
    #[error("needs {need} bytes, there are {have}")]
    Truncated {
        /// Bytes that the structure takes.
        need: u64,
        /// Bytes that were given.
        have: u64,
    },
    /// Not a hosted sparse extent at all.
    #[error("is not \"KDMV\"")]
    BadMagic,
    /// Not the structure that was looked for (COWD, seSparse).
    #[error("is not {0}")]
    WrongMagic(&'static str),
    /// A version that nobody has described yet.
    #[error("{0} is not supported")]
    UnsupportedVersion(u32),
    /// Bits of the incompatible half that are not known: the extent cannot be read rightly without knowing them.
    #[error("{0:#010x} are not known")]
    UnknownFlags(u32),
    /// A value with which the structure would have to be read in a way that nobody has described.
    #[error("{0:#x} is not supported")]
    Unsupported(u64),
    /// The type of a stream marker is none that is known.
    #[error("{0} is not known")]
    UnknownType(u32),
    /// An entry of a seSparse directory or table that has no meaning.
    #[error("{0:#018x} has no meaning")]
    BadEntry(u64),
    /// A seSparse extent was not closed: its journal has to be replayed first, which is not described anywhere.
    #[error("is set: the journal has to be replayed first")]
    DirtyJournal,
    /// Bytes that have to be zeroes are not.
    #[error("is not all zeroes")]
    NotZero,
    /// A size that has to be a power of two.
    #[error("{0} is not a power of two")]
    NotPowerOfTwo(u64),
    /// A number outside its bounds, both of which are allowed values.
    #[error("{value} is outside {min} to {max}")]
    OutOfRange {
        /// The number found.
        value: u64,
        /// The least allowed.
        min: u64,
        /// The most allowed.
        max: u64,
    },
    /// A number that can only be another one.
    #[error("is {value} and not {expected}")]
    Mismatch {
        /// The number found.
        value: u64,
        /// The number that it has to be.
        expected: u64,
    },
    /// A position that does not lie on a border.
    #[error("{value} is not a multiple of {unit}")]
    NotMultiple {
        /// The position found.
        value: u64,
        /// The distance between two borders.
        unit: u64,
    },
    /// The file went through something that changed its line ends, such as FTP in text mode.
    #[error("line ends were changed, as by a transfer in text mode")]
    NewlineDamage,
    /// A name whose bytes are not UTF-8: guessing it could open another file.
    #[error("is not UTF-8")]
    NotText,
    /// Something that has to be there is not.
    #[error("is missing")]
    Missing,
    /// Not a number in the base that the field takes, or a negative one.
    #[error("{0:?} is not a number")]
    BadNumber(String),
    /// A quoted value does not end where it has to.
    #[error("has a quote without its partner")]
    BadQuote,
    /// A word that has no meaning at this place (shortened).
    #[error("{0:?} is not known")]
    UnknownWord(String),
    /// Too many bytes.
    #[error("is longer than {limit} bytes")]
    TooLong {
        /// The most bytes allowed.
        limit: u64,
    },
    /// Too many of something.
    #[error("are more than {limit}")]
    TooMany {
        /// The most allowed.
        limit: u64,
    },
    /// Two different values for one key.
    #[error("is given twice with different values")]
    Duplicate,
    /// A number or a sum that no disk can have.
    #[error("is too large")]
    Overflow,
}

impl ParseError {
    /// An error at a byte offset of a binary structure.
    pub fn at_byte(field: &'static str, offset: u64, kind: ParseErrorKind) -> Self {
        Self { field, at: At::Byte(offset), kind }
    }

    /// An error in a line of a descriptor, counted from 1.
    pub fn at_line(field: &'static str, line: u64, kind: ParseErrorKind) -> Self {
        Self { field, at: At::Line(line), kind }
    }

    /// An error of the structure as a whole.
    pub fn whole(field: &'static str, kind: ParseErrorKind) -> Self {
        Self { field, at: At::Whole, kind }
    }
}

impl fmt::Display for ParseError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { field, at, kind } = self;
        match at {
            At::Byte(offset) => write!(f, "{field} at byte {offset}: {kind}"),
            At::Line(line) => write!(f, "line {line}: {field} {kind}"),
            At::Whole => write!(f, "{field} {kind}"),
        }
    }
}

/// So much of foreign text as belongs into an error.
pub(crate) fn shortened(text: &str) -> String {
    const LIMIT: usize = 60;
    let mut short: String = text.chars().take(LIMIT).collect();
    if short.len() < text.len() {
        short.push_str("...");
    }
    short
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_name_field_place_and_numbers() {
        use ParseErrorKind as K;
        let byte = |field, at, kind| ParseError::at_byte(field, at, kind).to_string();
        let line = |field, at, kind| ParseError::at_line(field, at, kind).to_string();
        assert_eq!(byte("grainSize", 20, K::NotPowerOfTwo(100)), "grainSize at byte 20: 100 is not a power of two");
        assert_eq!(
            byte("grainSize", 20, K::OutOfRange { value: 7, min: 8, max: 99 }),
            "grainSize at byte 20: 7 is outside 8 to 99"
        );
        assert_eq!(byte("flags", 8, K::UnknownFlags(1 << 31)), "flags at byte 8: 0x80000000 are not known");
        assert_eq!(byte("version", 4, K::UnsupportedVersion(4)), "version at byte 4: 4 is not supported");
        assert_eq!(
            byte("header", 0, K::Truncated { need: 512, have: 3 }),
            "header at byte 0: needs 512 bytes, there are 3"
        );
        assert_eq!(byte("version", 8, K::Unsupported(17)), "version at byte 8: 0x11 is not supported");
        assert_eq!(byte("type", 12, K::UnknownType(5)), "type at byte 12: 5 is not known");
        assert_eq!(byte("magicNumber", 0, K::WrongMagic("\"COWD\"")), "magicNumber at byte 0: is not \"COWD\"");
        assert_eq!(byte("val", 0, K::Mismatch { value: 2, expected: 1 }), "val at byte 0: is 2 and not 1");
        assert_eq!(byte("lba", 0, K::NotMultiple { value: 9, unit: 8 }), "lba at byte 0: 9 is not a multiple of 8");
        assert_eq!(
            ParseError::whole("grain table entry", K::BadEntry(5)).to_string(),
            "grain table entry 0x0000000000000005 has no meaning"
        );
        assert_eq!(line("extent type", 12, K::UnknownWord("FOO".into())), "line 12: extent type \"FOO\" is not known");
        assert_eq!(line("CID", 3, K::BadNumber("x\n".into())), "line 3: CID \"x\\n\" is not a number");
        assert_eq!(
            ParseError::whole("descriptor", K::TooLong { limit: 9 }).to_string(),
            "descriptor is longer than 9 bytes"
        );
    }

    #[test]
    fn shortens_foreign_text_between_characters() {
        assert_eq!(shortened("short"), "short");
        assert_eq!(shortened(&"ä".repeat(60)), "ä".repeat(60));
        assert_eq!(shortened(&"ä".repeat(61)), format!("{}...", "ä".repeat(60)));
    }
}
