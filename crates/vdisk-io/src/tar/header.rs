//! One header block of a tar archive: POSIX.1-1988 (ustar), GNU, and what came before. Numbers of the fields are bytes
//! from the block's beginning: tar(5) of libarchive, "Basic Tar Format" of the GNU tar manual.

/// Bytes of a block: headers are one, data is filled up to them.
pub(super) const BLOCK: usize = 512;

/// A block where a header belongs.
pub(super) struct Header(pub(super) [u8; BLOCK]);

impl Header {
    /// Whether this is the end of the archive.
    pub(super) fn is_zero(&self) -> bool {
        self.0.iter().all(|b| *b == 0)
    }

    /// Whether the sum of all bytes, those of the sum itself taken for spaces, is the one that is written down.
    pub(super) fn is_sound(&self) -> bool {
        let sum = |bytes: &[u8]| bytes.iter().map(|b| u64::from(*b)).sum::<u64>();
        let total = sum(&self.0[..148]) + 8 * u64::from(b' ') + sum(&self.0[156..]);
        number(&self.0[148..156]) == Some(total)
    }

    /// What kind of member follows, or what this says of the next one.
    pub(super) fn flag(&self) -> u8 {
        self.0[156]
    }

    /// Bytes of data behind the header; `None` if that is no number.
    pub(super) fn size(&self) -> Option<u64> {
        number(&self.0[124..136])
    }

    /// The name, in full only if no extension has another.
    pub(super) fn name(&self) -> Vec<u8> {
        let name = until_nul(&self.0[..100]);
        // "ustar" and a space is GNU's, which keeps other things there.
        let prefix = if &self.0[257..263] == b"ustar\0" { until_nul(&self.0[345..500]) } else { b"" };
        if prefix.is_empty() { name.to_vec() } else { [prefix, b"/", name].concat() }
    }

    /// Whether a block with more of a sparse map follows this header.
    pub(super) fn map_goes_on(&self) -> bool {
        self.0[482] != 0
    }

    /// Whether another block follows this one, which is no header but goes on with a sparse map.
    pub(super) fn map_goes_on_again(&self) -> bool {
        self.0[504] != 0
    }

    /// What other kind of file this looks like, if it is no header.
    pub(super) fn compression(&self) -> Option<&'static str> {
        const MAGICS: [(&[u8], &str); 5] = [
            (b"\x1f\x8b", "gzip"),
            (b"BZh", "bzip2"),
            (b"\xfd7zXZ\0", "xz"),
            (b"\x28\xb5\x2f\xfd", "zstd"),
            (b"PK\x03\x04", "zip"),
        ];
        MAGICS.iter().find(|(magic, _)| self.0.starts_with(magic)).map(|(_, name)| *name)
    }
}

/// The bytes before the first NUL.
pub(super) fn until_nul(bytes: &[u8]) -> &[u8] {
    bytes.split(|b| *b == 0).next().unwrap_or_default()
}

/// A number in octal digits, or in binary behind a byte 0x80 (GNU, for what is too large).
fn number(field: &[u8]) -> Option<u64> {
    if let Some((0x80, binary)) = field.split_first() {
        return binary.iter().try_fold(0u64, |n, b| n.checked_mul(256)?.checked_add((*b).into()));
    }
    let digits = until_nul(field).trim_ascii();
    digits.iter().try_fold(0u64, |n, b| match b {
        b'0'..=b'7' => n.checked_mul(8)?.checked_add(u64::from(b - b'0')),
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_octal_or_binary_and_nothing_else() {
        for (field, value) in [
            (&b"00000001750\0"[..], Some(1000)),
            (b"     1750 \0\0", Some(1000)),
            (b"777777777777", Some((1 << 36) - 1)),
            (b"\x80\0\0\0\0\0\0\x02\0\0\0\0", Some(1 << 33)),
            (b"\x80\0\0\0\xff\xff\xff\xff\xff\xff\xff\xff", Some(u64::MAX)),
            (b"\x80\0\0\x01\0\0\0\0\0\0\0\0", None),
            (b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff", None),
            (b"\0\0\0\0\0\0\0\0\0\0\0\0", Some(0)),
            (b"-0000000001\0", None),
            (b"00000000018\0", None),
            (b"0000 000010\0", None),
        ] {
            assert_eq!(number(field), value, "{field:?}");
        }
    }
}
