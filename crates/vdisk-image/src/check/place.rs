//! What one entry says, against the file and the metadata.

use super::FaultKind;
use crate::coding::{Coding, Entry};
use crate::sparse::Sparse;
use crate::usage::PlaceSet;
use vmdk_parse::SECTOR_SIZE;

/// Why an entry cannot be followed: the kind of fault, and what to say of the entry.
pub(super) type Wrong = (FaultKind, String);

impl Sparse {
    /// Bytes at the place that an entry names that are nobody else's: of a record at least its beginning.
    pub(super) fn place_bytes(&self) -> u64 {
        if self.is_compressed() { SECTOR_SIZE } else { self.grain }
    }

    /// How much work a check of the extent is, against others.
    pub(super) fn check_units(&self) -> u64 {
        // The grains of a stream are inflated.
        self.tables.max(1) * if self.is_compressed() { self.gtes } else { 1 }
    }

    /// Where the table of a directory entry is, in a file of `file_len` bytes, or why there can be none.
    pub(super) fn table_place(&self, gde: u64, file_len: u64) -> Result<Option<u64>, Wrong> {
        let len = self.table_bytes();
        let at = match self.coding.table(gde) {
            Ok(Some(at)) => at,
            Ok(None) => return Ok(None),
            Err(e) => return Err((FaultKind::EntryUnknown, format!("is {gde:#x}: {e}"))),
        };
        let names = |what: &str| format!("names sector {}, {what}", at / SECTOR_SIZE);
        if at.checked_add(len).is_none_or(|end| end > file_len) {
            return Err((FaultKind::EntryPastEnd, names("past the end of the file")));
        }
        let in_header = matches!(self.coding, Coding::Cowd { .. }) && at < self.overhead;
        if in_header || self.is_fixed(at, len) {
            return Err((FaultKind::EntryInMetadata, names("in the header, in the descriptor or in a directory")));
        }
        Ok(Some(at))
    }

    /// What an entry of a table says, in a file of `file_len` bytes with tables at `tables`, or why it says nothing. Whether
    /// another entry says the same is not looked at.
    pub(super) fn grain_place(&self, gte: u64, file_len: u64, tables: &PlaceSet) -> Result<Entry, Wrong> {
        let at = match self.coding.grain(gte) {
            Ok(Entry::At(at)) => at,
            Ok(nowhere @ (Entry::Absent | Entry::Zeroed)) => return Ok(nowhere),
            Err(e) => return Err((FaultKind::EntryUnknown, format!("is {gte:#x}: {e}"))),
        };
        let names = |what: &str| format!("names sector {}, {what}", at / SECTOR_SIZE);
        // Some writers leave the last grain of a file short.
        if at >= file_len {
            return Err((FaultKind::EntryPastEnd, names("past the end of the file")));
        }
        let len = self.place_bytes();
        if self.is_metadata(at, len) || tables.overlaps(at, len) {
            return Err((FaultKind::EntryInMetadata, names("in the metadata")));
        }
        Ok(Entry::At(at))
    }

    /// Whether a grain may begin there.
    pub(super) fn is_aligned(&self, at: u64) -> bool {
        self.is_compressed() || at.is_multiple_of(self.coding.alignment(self.grain))
    }
}
