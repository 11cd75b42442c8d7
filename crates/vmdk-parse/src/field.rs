//! A field of a binary structure: what it is called, where it stands, and how its value is checked.

use crate::error::{ParseError, ParseErrorKind};
use crate::sectors::Sectors;

/// A field: its name in the specification and its byte offset from the start of the structure.
#[derive(Clone, Copy)]
pub(crate) struct Field(pub(crate) &'static str, pub(crate) u64);

impl Field {
    pub(crate) fn error(self, kind: ParseErrorKind) -> ParseError {
        ParseError::at_byte(self.0, self.1, kind)
    }

    pub(crate) fn within(self, value: u64, min: u64, max: u64) -> Result<u64, ParseError> {
        let fits = (min..=max).contains(&value);
        if fits { Ok(value) } else { Err(self.error(ParseErrorKind::OutOfRange { value, min, max })) }
    }

    pub(crate) fn power_of_two(self, value: u64, min: u64, max: u64) -> Result<(), ParseError> {
        let value = self.within(value, min, max)?;
        if value.is_power_of_two() { Ok(()) } else { Err(self.error(ParseErrorKind::NotPowerOfTwo(value))) }
    }

    /// A value that only one number can be.
    pub(crate) fn exactly(self, value: u64, expected: u64) -> Result<(), ParseError> {
        let kind = ParseErrorKind::Mismatch { value, expected };
        if value == expected { Ok(()) } else { Err(self.error(kind)) }
    }

    /// A value in which the structure would have to be read in another way.
    pub(crate) fn supported(self, value: u64, expected: u64) -> Result<(), ParseError> {
        if value == expected { Ok(()) } else { Err(self.error(ParseErrorKind::Unsupported(value))) }
    }

    /// A run in the file that starts at the value of this field: its end in bytes has to fit in 64 bits.
    pub(crate) fn run(self, start: Sectors, len: Sectors) -> Result<(), ParseError> {
        let end = start.checked_add(len).and_then(Sectors::bytes);
        end.map(drop).ok_or_else(|| self.error(ParseErrorKind::Overflow))
    }

    pub(crate) fn bytes<const N: usize>(self, from: &[u8]) -> Result<[u8; N], ParseError> {
        let skipped = usize::try_from(self.1).ok().and_then(|at| from.get(at..));
        let found = skipped.and_then(|rest| rest.first_chunk::<N>());
        found.copied().ok_or_else(|| {
            let need = u64::try_from(N).unwrap_or(u64::MAX).saturating_add(self.1);
            self.error(ParseErrorKind::Truncated { need, have: len(from) })
        })
    }

    pub(crate) fn u32(self, from: &[u8]) -> Result<u32, ParseError> {
        self.bytes(from).map(u32::from_le_bytes)
    }

    pub(crate) fn u64(self, from: &[u8]) -> Result<u64, ParseError> {
        self.bytes(from).map(u64::from_le_bytes)
    }

    pub(crate) fn sectors(self, from: &[u8]) -> Result<Sectors, ParseError> {
        self.u64(from).map(Sectors)
    }

    /// Writes the value into a structure; the part of it that the structure has no room for is left out.
    pub(crate) fn put(self, into: &mut [u8], value: &[u8]) {
        let skipped = usize::try_from(self.1).unwrap_or(usize::MAX);
        for (to, from) in into.iter_mut().skip(skipped).zip(value) {
            *to = *from;
        }
    }
}

/// The first `N` bytes: all of a structure that is read as a whole.
pub(crate) fn whole<'a, const N: usize>(name: &'static str, bytes: &'a [u8]) -> Result<&'a [u8; N], ParseError> {
    bytes.first_chunk().ok_or_else(|| {
        let need = u64::try_from(N).unwrap_or(u64::MAX);
        ParseError::at_byte(name, 0, ParseErrorKind::Truncated { need, have: len(bytes) })
    })
}

fn len(bytes: &[u8]) -> u64 {
    u64::try_from(bytes.len()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_field_that_the_bytes_do_not_reach_is_truncated() {
        let field = Field("size", 2);
        assert_eq!(field.u32(&[9, 9, 1, 0, 0, 0]), Ok(1));
        let truncated = ParseErrorKind::Truncated { need: 6, have: 5 };
        assert_eq!(field.u32(&[9; 5]), Err(ParseError::at_byte("size", 2, truncated)));
        assert!(Field("size", u64::MAX).u64(&[0; 8]).is_err());
        assert!(whole::<2>("header", &[0]).is_err());
    }

    #[test]
    fn writes_only_where_there_is_room() {
        let mut bytes = [0; 4];
        Field("size", 2).put(&mut bytes, &[1, 2, 3]);
        assert_eq!(bytes, [0, 0, 1, 2]);
        Field("size", u64::MAX).put(&mut bytes, &[7]);
        assert_eq!(bytes, [0, 0, 1, 2]);
    }
}
