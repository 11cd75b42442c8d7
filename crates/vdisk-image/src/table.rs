//! Grain tables and pages of the grain directory in memory.

use arc_swap::ArcSwapOption;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

/// Entries of the grain directory that are loaded together: 4 KiB of it, 32 GiB of a disk with 64 KiB grains.
pub(crate) const PAGE_ENTRIES: u64 = 1024;

/// Entries in one 512-byte sector of a table or directory: what is written at once.
pub(crate) const SECTOR_ENTRIES: usize = 128;

/// A piece of the grain directory. Pages are loaded when they are first needed and stay.
#[derive(Debug)]
pub(crate) struct Page {
    /// Sector of each grain table; 0 is a table that does not exist.
    pub(crate) gd: Box<[AtomicU32]>,
    /// The same for the redundant tables. Empty where the extent has none.
    pub(crate) rgd: Box<[AtomicU32]>,
    /// The tables that are in memory.
    pub(crate) tables: Box<[ArcSwapOption<Table>]>,
}

impl Page {
    pub(crate) fn new(gd: impl Iterator<Item = u32>, rgd: impl Iterator<Item = u32>) -> Self {
        let gd: Box<[AtomicU32]> = gd.map(AtomicU32::new).collect();
        let tables = gd.iter().map(|_| ArcSwapOption::empty()).collect();
        Self { gd, rgd: rgd.map(AtomicU32::new).collect(), tables }
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
    entries: Box<[AtomicU32]>,
    /// Byte offset of the table in the extent's file.
    pub(crate) at: u64,
    pub(crate) copy: TableCopy,
    /// Looked at since the clock hand last passed.
    referenced: AtomicBool,
    /// Bit n: sector n differs from the file. Changed under the extent's lock.
    dirty: AtomicU32,
    /// Tickets and flushes that need the table to stay. Changed under the extent's lock.
    pins: AtomicU32,
}

impl Table {
    pub(crate) fn new(entries: impl Iterator<Item = u32>, at: u64, copy: TableCopy) -> Self {
        Self {
            entries: entries.map(AtomicU32::new).collect(),
            at,
            copy,
            referenced: AtomicBool::new(true),
            dirty: AtomicU32::new(0),
            pins: AtomicU32::new(0),
        }
    }

    /// Bytes of memory that the table takes, roughly.
    pub(crate) fn weight(&self) -> usize {
        self.entries.len() * 4 + 128
    }

    /// The entry as it stands in the file format. `Acquire`: who sees an entry sees the grain behind it.
    pub(crate) fn entry(&self, index: usize) -> Option<u32> {
        self.entries.get(index).map(|e| e.load(Ordering::Acquire))
    }

    /// How many entries are absent from `index` on, as far as `enough`.
    pub(crate) fn absent(&self, index: usize, enough: u64) -> u64 {
        let entries = self.entries.get(index..).unwrap_or_default();
        (0..enough).zip(entries).take_while(|(_, e)| e.load(Ordering::Acquire) == 0).count() as u64
    }

    /// Notes that the table is in use. A store only when it changes something, so that readers share the line.
    pub(crate) fn touch(&self) {
        if !self.referenced.load(Ordering::Relaxed) {
            self.referenced.store(true, Ordering::Relaxed);
        }
    }

    /// Sets an entry. Under the extent's lock. Whether the table was clean before.
    pub(crate) fn set(&self, index: usize, value: u32) -> bool {
        if let Some(e) = self.entries.get(index) {
            e.store(value, Ordering::Release);
        }
        self.mark_dirty(1 << (index / SECTOR_ENTRIES))
    }

    /// Marks every sector as different from the file. Under the extent's lock. Whether the table was clean before.
    pub(crate) fn set_all_dirty(&self) -> bool {
        let sectors = self.entries.len().div_ceil(SECTOR_ENTRIES);
        self.mark_dirty((1 << sectors) - 1)
    }

    fn mark_dirty(&self, sectors: u32) -> bool {
        self.dirty.fetch_or(sectors, Ordering::Relaxed) == 0
    }

    /// The dirty sectors as (byte offset in the table, bytes), which count as clean from now on. Under the extent's lock.
    pub(crate) fn take_dirty(&self) -> Vec<(u64, Vec<u8>)> {
        let dirty = self.dirty.swap(0, Ordering::Relaxed);
        let mut sectors = Vec::new();
        for (n, entries) in self.entries.chunks(SECTOR_ENTRIES).enumerate() {
            if dirty & (1 << n) != 0 {
                sectors.push((n as u64 * 512, encode(entries)));
            }
        }
        sectors
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

/// Entries as they stand in a file.
pub(crate) fn encode(entries: &[AtomicU32]) -> Vec<u8> {
    entries.iter().flat_map(|e| e.load(Ordering::Relaxed).to_le_bytes()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_sectors_that_changed_are_written() {
        let t = Table::new((0..512).map(|_| 0), 4096, TableCopy::None);
        assert!(t.set(127, 9));
        assert!(!t.set(511, 7));
        let dirty = t.take_dirty();
        assert_eq!(dirty.iter().map(|(at, b)| (*at, b.len())).collect::<Vec<_>>(), [(0, 512), (1536, 512)]);
        assert_eq!(dirty[0].1[508..], 9u32.to_le_bytes());
        assert_eq!(dirty[1].1[508..], 7u32.to_le_bytes());
        assert!(t.take_dirty().is_empty());
        assert!(t.evictable());
    }
}
