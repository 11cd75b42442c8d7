//! What is known of a disk: what was written to it in this run, and what was read from it.

use std::collections::HashMap;

/// Sectors and what they hold. Of the others nothing is known yet.
#[derive(Debug, Default)]
pub struct Model(HashMap<u64, [u8; 512]>);

impl Model {
    /// The range holds these bytes now. Of a sector that was not known, and is not whole, nothing is known afterwards either.
    pub fn wrote(&mut self, offset: u64, bytes: &[u8]) {
        self.pieces(offset, bytes, |known, skip, piece| known[skip..skip + piece.len()].copy_from_slice(piece));
    }

    /// The range may hold anything now.
    pub fn forget(&mut self, offset: u64, len: u64) {
        for n in offset / 512..(offset + len).div_ceil(512) {
            self.0.remove(&n);
        }
    }

    /// The range was read.
    ///
    /// # Panics
    ///
    /// If it should hold something else.
    pub fn read(&mut self, offset: u64, bytes: &[u8]) {
        self.pieces(offset, bytes, |known, skip, piece| {
            assert!(known[skip..skip + piece.len()] == *piece, "other bytes than were written at {offset}");
        });
    }

    /// Sectors that are known.
    pub fn known(&self) -> impl Iterator<Item = u64> {
        self.0.keys().copied()
    }

    fn pieces(&mut self, offset: u64, mut bytes: &[u8], f: impl Fn(&mut [u8; 512], usize, &[u8])) {
        let mut at = offset;
        while !bytes.is_empty() {
            let skip = (at % 512) as usize;
            let (piece, rest) = bytes.split_at(bytes.len().min(512 - skip));
            match self.0.get_mut(&(at / 512)) {
                Some(known) => f(known, skip, piece),
                None => {
                    if let Ok(whole) = piece.try_into() {
                        self.0.insert(at / 512, whole);
                    }
                }
            }
            at += piece.len() as u64;
            bytes = rest;
        }
    }
}
