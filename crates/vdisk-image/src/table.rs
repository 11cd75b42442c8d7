//! Grain tables and pages of the grain directory in memory.

use arc_swap::ArcSwapOption;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

/// Entries of the grain directory that are loaded together: 4 KiB of it, 32 GiB of a disk with 64 KiB grains.
pub(crate) const PAGE_ENTRIES: u64 = 1024;

/// Entries in one 512-byte sector of a table or directory: what is written at once.
pub(crate) const SECTOR_ENTRIES: usize = 128;

/// Entries as they stand in the file; [`crate::coding::Coding`] says what they mean.
#[derive(Debug)]
pub(crate) enum Entries {
    /// 32 bits each.
    Narrow(Box<[AtomicU32]>),
    /// 64 bits each, of a format that is only read.
    Wide(Box<[u64]>),
}

impl Entries {
    pub(crate) fn narrow(entries: impl Iterator<Item = u32>) -> Self {
        Self::Narrow(entries.map(AtomicU32::new).collect())
    }

    pub(crate) fn len(&self) -> usize {
        match self {
            Self::Narrow(entries) => entries.len(),
            Self::Wide(entries) => entries.len(),
        }
    }

    /// `Acquire`: who sees an entry sees what is behind it.
    pub(crate) fn get(&self, index: usize) -> Option<u64> {
        match self {
            Self::Narrow(entries) => entries.get(index).map(|e| u64::from(e.load(Ordering::Acquire))),
            Self::Wide(entries) => entries.get(index).copied(),
        }
    }

    /// Under the extent's lock.
    pub(crate) fn set(&self, index: usize, value: u32) {
        match self {
            Self::Narrow(entries) => {
                if let Some(e) = entries.get(index) {
                    e.store(value, Ordering::Release);
                }
            }
            // Nothing writes such a format: opening it for writing is refused.
            Self::Wide(_) => {}
        }
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = u64> {
        (0..self.len()).map_while(|n| self.get(n))
    }

    /// Bytes that the entries take.
    fn weight(&self) -> usize {
        self.len()
            * match self {
                Self::Narrow(_) => size_of::<AtomicU32>(),
                Self::Wide(_) => size_of::<u64>(),
            }
    }

    /// The bytes of the entries in `range`, as far as there are any.
    pub(crate) fn encode(&self, range: Range<usize>) -> Vec<u8> {
        let range = range.start..range.end.min(self.len());
        match self {
            Self::Narrow(entries) => {
                let entries = entries.get(range).unwrap_or_default();
                entries.iter().flat_map(|e| e.load(Ordering::Relaxed).to_le_bytes()).collect()
            }
            Self::Wide(entries) => {
                let entries = entries.get(range).unwrap_or_default();
                entries.iter().flat_map(|e| e.to_le_bytes()).collect()
            }
        }
    }
}

/// A piece of the grain directory.
#[derive(Debug)]
pub(crate) struct Page {
    /// Where each grain table is; 0 is a table that does not exist.
    pub(crate) gd: Entries,
    /// The same for the redundant tables. Empty where the extent has none.
    pub(crate) rgd: Entries,
    /// The tables that are in memory.
    pub(crate) tables: Box<[ArcSwapOption<Table>]>,
    /// Looked at since the clock hand last passed.
    referenced: AtomicBool,
    /// Differs from what the file had when it was loaded. Changed under the extent's lock.
    changed: AtomicBool,
}

impl Page {
    /// What a page weighs for each of its entries at most: the widest ones, and a second directory.
    pub(crate) const ENTRY_WEIGHT: usize = 2 * size_of::<u64>() + size_of::<ArcSwapOption<Table>>();

    pub(crate) fn new(gd: Entries, rgd: Entries) -> Self {
        let tables = (0..gd.len()).map(|_| ArcSwapOption::empty()).collect();
        Self { gd, rgd, tables, referenced: AtomicBool::new(true), changed: AtomicBool::new(false) }
    }

    /// Bytes of memory that the page takes without its tables, roughly.
    pub(crate) fn weight(&self) -> usize {
        self.gd.weight() + self.rgd.weight() + self.tables.len() * size_of::<ArcSwapOption<Table>>() + 128
    }

    /// Notes that the page is in use.
    pub(crate) fn touch(&self) {
        touch(&self.referenced);
    }

    /// As [`Table::second_chance`].
    pub(crate) fn second_chance(&self) -> bool {
        self.referenced.swap(false, Ordering::Relaxed)
    }

    /// The page has to stay: the file may not have what is in it. Under the extent's lock.
    pub(crate) fn keep(&self) {
        self.changed.store(true, Ordering::Relaxed);
    }

    /// Takes out all tables, if the page may leave memory; their weight. Under the extent's lock.
    pub(crate) fn give_up(&self) -> Option<usize> {
        let there = || self.tables.iter().filter_map(ArcSwapOption::load_full);
        if self.changed.load(Ordering::Relaxed) || !there().all(|t| t.evictable()) {
            return None;
        }
        let weight = there().map(|t| t.weight()).sum();
        self.tables.iter().for_each(|slot| slot.store(None));
        Some(weight)
    }
}

/// The redundant copy of a grain table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum TableCopy {
    /// The extent keeps none.
    None,
    /// At this byte offset.
    At(u64),
    /// The directory names a place where it cannot be: the table can be read and its entries cannot change.
    Broken,
}

/// A grain table in memory. Entries are read without a lock; they change under the extent's lock only.
#[derive(Debug)]
pub(crate) struct Table {
    entries: Entries,
    /// Byte offset of the table in the extent's file.
    pub(crate) at: u64,
    pub(crate) copy: TableCopy,
    /// Looked at since the clock hand last passed.
    referenced: AtomicBool,
    /// Bit n: sector n differs from the file. Changed under the extent's lock.
    dirty: AtomicU32,
    /// The host has space for what the table will be.
    reserved: AtomicBool,
    /// Tickets and flushes that need the table to stay. Changed under the extent's lock.
    pins: AtomicU32,
}

impl Table {
    /// A table of 32-bit entries.
    pub(crate) fn new(entries: impl Iterator<Item = u32>, at: u64, copy: TableCopy) -> Self {
        Self::with(Entries::narrow(entries), at, copy)
    }

    pub(crate) fn with(entries: Entries, at: u64, copy: TableCopy) -> Self {
        Self {
            entries,
            at,
            copy,
            referenced: AtomicBool::new(true),
            dirty: AtomicU32::new(0),
            reserved: AtomicBool::new(false),
            pins: AtomicU32::new(0),
        }
    }

    /// Bytes of memory that the table takes, roughly.
    pub(crate) fn weight(&self) -> usize {
        self.entries.weight() + 128
    }

    /// The entry as it stands in the file format. `Acquire`: who sees an entry sees the grain behind it.
    pub(crate) fn entry(&self, index: usize) -> Option<u64> {
        self.entries.get(index)
    }

    /// How many entries are absent from `index` on, as far as `enough`.
    pub(crate) fn absent(&self, index: usize, enough: u64) -> u64 {
        // 0 is absent in every format.
        (0..enough).zip(index..).take_while(|(_, n)| self.entries.get(*n) == Some(0)).count() as u64
    }

    /// Notes that the table is in use.
    pub(crate) fn touch(&self) {
        touch(&self.referenced);
    }

    /// Sets an entry. Under the extent's lock. Whether the table was clean before.
    pub(crate) fn set(&self, index: usize, value: u32) -> bool {
        self.entries.set(index, value);
        self.mark_dirty(1 << (index / SECTOR_ENTRIES))
    }

    /// Marks every sector as different from the file. Under the extent's lock. Whether the table was clean before.
    pub(crate) fn set_all_dirty(&self) -> bool {
        // At most 32: the 4096 entries of a COWD table.
        let sectors = self.entries.len().div_ceil(SECTOR_ENTRIES);
        self.mark_dirty((0..sectors).fold(0, |mask, n| mask | 1 << n))
    }

    /// Marks sectors as different from the file. Under the extent's lock. Whether the table was clean before.
    pub(crate) fn mark_dirty(&self, sectors: u32) -> bool {
        self.dirty.fetch_or(sectors, Ordering::Relaxed) == 0
    }

    /// The dirty sectors, which count as clean from now on. Under the extent's lock.
    pub(crate) fn take_dirty(&self) -> u32 {
        self.dirty.swap(0, Ordering::Relaxed)
    }

    /// Sectors as (byte offset in the table, bytes).
    pub(crate) fn sectors(&self, dirty: u32) -> Vec<(u64, Vec<u8>)> {
        let mut sectors = Vec::new();
        for n in 0..self.entries.len().div_ceil(SECTOR_ENTRIES) {
            if dirty & (1 << n) != 0 {
                let first = n * SECTOR_ENTRIES;
                sectors.push((n as u64 * 512, self.entries.encode(first..first + SECTOR_ENTRIES)));
            }
        }
        sectors
    }

    /// Whether the host has space for the table, as far as it says.
    pub(crate) fn is_reserved(&self) -> bool {
        self.reserved.load(Ordering::Relaxed)
    }

    pub(crate) fn set_reserved(&self) {
        self.reserved.store(true, Ordering::Relaxed);
    }

    pub(crate) fn pin(&self) {
        self.pins.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn unpin(&self) {
        self.pins.fetch_sub(1, Ordering::Relaxed);
    }

    /// Whether the table may leave memory. Under the extent's lock.
    pub(crate) fn evictable(&self) -> bool {
        self.pins.load(Ordering::Relaxed) == 0 && self.dirty.load(Ordering::Relaxed) == 0
    }

    /// Takes the second chance that a recent use gave. Whether there was one.
    pub(crate) fn second_chance(&self) -> bool {
        self.referenced.swap(false, Ordering::Relaxed)
    }
}

/// A store only when it changes something, so that readers share the line.
fn touch(referenced: &AtomicBool) {
    if !referenced.load(Ordering::Relaxed) {
        referenced.store(true, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_sectors_that_changed_are_written() {
        let t = Table::new((0..512).map(|_| 0), 4096, TableCopy::None);
        assert!(t.set(127, 9));
        assert!(!t.set(511, 7));
        let dirty = t.sectors(t.take_dirty());
        assert_eq!(dirty.iter().map(|(at, b)| (*at, b.len())).collect::<Vec<_>>(), [(0, 512), (1536, 512)]);
        assert_eq!(dirty[0].1[508..], 9u32.to_le_bytes());
        assert_eq!(dirty[1].1[508..], 7u32.to_le_bytes());
        assert_eq!(t.take_dirty(), 0);
        assert!(t.evictable());
    }

    #[test]
    fn all_32_sectors_of_a_large_table_can_be_dirty() {
        let t = Table::new((0..4096).map(|_| 0), 4096, TableCopy::None);
        assert!(t.set_all_dirty());
        t.set(4095, 5);
        let dirty = t.sectors(t.take_dirty());
        assert_eq!(dirty.len(), 32);
        assert_eq!((dirty[31].0, &dirty[31].1[508..]), (31 * 512, 5u32.to_le_bytes().as_slice()));
        t.set(4095, 6);
        assert_eq!(t.sectors(t.take_dirty()).iter().map(|(at, _)| *at).collect::<Vec<_>>(), [31 * 512]);
    }
}
