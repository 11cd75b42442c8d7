//! Where data is nothing but zeroes. Pure.

/// What a host's file system can give back: less than a block it only zeroes.
pub(super) const BLOCK: u64 = 4096;

/// The same as an index.
const LEN: usize = 4096;

/// What a part of a file holds.
#[derive(Debug, Default)]
pub(super) struct Content {
    /// Bytes that are not zeroes, in whole blocks.
    pub(super) stored: u64,
    /// Zeroes that take space: (first byte, byte behind the last).
    pub(super) zeroes: Vec<(u64, u64)>,
}

impl Content {
    /// Takes in the bytes at byte `at` of the file, behind what was taken in before.
    pub(super) fn take(&mut self, at: u64, bytes: &[u8]) {
        let mut at = at;
        // Up to a block's border, and from there on block by block.
        let first = usize::try_from(at.next_multiple_of(BLOCK) - at).unwrap_or(0).min(bytes.len());
        let (head, rest) = bytes.split_at(first);
        for block in std::iter::once(head).chain(rest.chunks(LEN)).filter(|block| !block.is_empty()) {
            let end = at + block.len() as u64;
            match (is_zero(block), self.zeroes.last_mut()) {
                (false, _) => self.stored += block.len() as u64,
                (true, Some((_, last))) if *last == at => *last = end,
                (true, _) => self.zeroes.push((at, end)),
            }
            at = end;
        }
    }
}

pub(super) fn is_zero(bytes: &[u8]) -> bool {
    const ZEROES: [u8; LEN] = [0; LEN];
    bytes.chunks(LEN).all(|block| ZEROES.get(..block.len()) == Some(block))
}

/// The parts of a grain that have to be written, each with its place: with `zeroed` the place reads as zeroes before.
pub(super) fn to_write(bytes: &[u8], zeroed: bool) -> Vec<(u64, &[u8])> {
    if !zeroed {
        return vec![(0, bytes)];
    }
    let mut parts = Vec::new();
    let mut at = 0;
    for same in bytes.chunks(LEN).collect::<Vec<_>>().chunk_by(|a, b| is_zero(a) == is_zero(b)) {
        let len: usize = same.iter().map(|block| block.len()).sum();
        if let (false, Some(part)) = (same.first().is_none_or(|block| is_zero(block)), bytes.get(at..at + len)) {
            parts.push((at as u64, part));
        }
        at += len;
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zeroes_are_found_by_whole_blocks_of_the_file() {
        let mut content = Content::default();
        let mut bytes = vec![0; 5 * LEN];
        bytes[2 * LEN + 7] = 1;
        // In two pieces, from the middle of a block on.
        content.take(BLOCK * 10 + 512, &bytes[512..LEN]);
        content.take(BLOCK * 11, &bytes[LEN..]);
        assert_eq!(content.zeroes, [(BLOCK * 10 + 512, BLOCK * 12), (BLOCK * 13, BLOCK * 15)]);
        assert_eq!(content.stored, BLOCK);
    }

    #[test]
    fn only_what_is_not_zero_is_written_where_zeroes_are() {
        let mut bytes = vec![0; 4 * LEN];
        bytes[LEN] = 1;
        bytes[3 * LEN - 1] = 1;
        let places = |zeroed| to_write(&bytes, zeroed).iter().map(|(at, part)| (*at, part.len())).collect::<Vec<_>>();
        assert_eq!(places(true), [(BLOCK, 2 * LEN)]);
        assert_eq!(places(false), [(0, 4 * LEN)]);
        assert!(to_write(&[0; 100], true).is_empty());
    }
}
