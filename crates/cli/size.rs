//! Sizes as people write them: `64M`, `2G`.

/// Parses a number of bytes with an optional binary suffix (`K`, `M`, `G`, `T`, also as `KiB` and so on).
pub(crate) fn parse(text: &str) -> Result<u64, String> {
    let digits = text.trim_end_matches(|c: char| !c.is_ascii_digit());
    let number: u64 = digits.parse().map_err(|_| format!("{text:?} is not a size such as 64M or 2G"))?;
    let shift = match text[digits.len()..].to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kib" => 10,
        "m" | "mib" => 20,
        "g" | "gib" => 30,
        "t" | "tib" => 40,
        suffix => return Err(format!("unknown suffix {suffix:?} (K, M, G and T are powers of 1024)")),
    };
    number.checked_mul(1 << shift).ok_or_else(|| format!("{text:?} is too large"))
}

/// Parses a size that must fit into memory.
pub(crate) fn parse_usize(text: &str) -> Result<usize, String> {
    usize::try_from(parse(text)?).map_err(|_| format!("{text:?} is too large"))
}

/// A size for people, never rounded up: `10 MiB`, `1.4 GiB`, `512 B`.
pub(crate) fn human(bytes: u64) -> String {
    let (unit, shift) = match bytes {
        b if b >= 1 << 40 => ("TiB", 40),
        b if b >= 1 << 30 => ("GiB", 30),
        b if b >= 1 << 20 => ("MiB", 20),
        b if b >= 1 << 10 => ("KiB", 10),
        _ => return format!("{bytes} B"),
    };
    let tenth = ((bytes & ((1 << shift) - 1)) * 10) >> shift;
    match tenth {
        0 => format!("{} {unit}", bytes >> shift),
        _ => format!("{}.{tenth} {unit}", bytes >> shift),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_binary_suffixes_in_either_case() {
        for (text, bytes) in
            [("0", 0), ("512", 512), ("4k", 4096), ("64M", 64 << 20), ("2G", 2 << 30), ("1TiB", 1 << 40), ("7b", 7)]
        {
            assert_eq!(parse(text), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn refuses_what_is_not_a_size() {
        for text in ["", "M", "-1", "1.5G", "64Q", "64 M", "0x10", "99999999999999999999", "16777216T", "1é"] {
            assert!(parse(text).is_err(), "{text}");
        }
        assert_eq!(parse("16777215T"), Ok(16_777_215 << 40));
    }

    #[test]
    fn shows_sizes_with_one_digit_after_the_point() {
        for (bytes, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1 KiB"),
            (10 << 20, "10 MiB"),
            ((1 << 30) + (1 << 29), "1.5 GiB"),
            ((2 << 40) - 1, "1.9 TiB"),
            (u64::MAX, "16777215.9 TiB"),
        ] {
            assert_eq!(human(bytes), text);
        }
    }
}
