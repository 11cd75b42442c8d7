//! Looking through the tables of a sparse extent. Pure, like everything of [`Sparse`].

use crate::coding::{Coding, Entry};
use crate::sparse::{MetaRef, Sparse};
use crate::table::{PAGE_ENTRIES, SECTOR_ENTRIES};
use crate::wait::locked;
use std::sync::atomic::Ordering;

/// Tables that lie in a row in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct TableRun {
    /// Index of the first.
    pub(crate) first: u64,
    pub(crate) count: u64,
    /// Byte offset of the first.
    pub(crate) at: u64,
}

impl TableRun {
    /// Joins tables (index, byte offset) of `bytes` each that follow one another, to runs of at most `limit` bytes.
    pub(crate) fn of(tables: impl Iterator<Item = (u64, u64)>, bytes: u64, limit: u64) -> Vec<Self> {
        let mut runs: Vec<Self> = Vec::new();
        for (table, at) in tables {
            match runs.last_mut() {
                Some(r)
                    if r.first + r.count == table && r.at + r.count * bytes == at && (r.count + 1) * bytes <= limit =>
                {
                    r.count += 1;
                }
                _ => runs.push(Self { first: table, count: 1, at }),
            }
        }
        runs
    }

    /// The tables (index, byte offset), each of `bytes`.
    pub(crate) fn tables(self, bytes: u64) -> impl Iterator<Item = (u64, u64)> {
        (0..self.count).map(move |n| (self.first + n, self.at + n * bytes))
    }
}

impl Sparse {
    /// Pages of the directory.
    pub(crate) fn page_count(&self) -> u64 {
        self.pages.len() as u64
    }

    /// First byte behind the metadata that the header names, and behind the file.
    pub(crate) fn metadata_end(&self) -> u64 {
        let directory = self.directory_bytes();
        let free = match self.coding {
            // It may be behind the end of the file, but not trusted to be: qemu does not keep it.
            Coding::Cowd { free } => free,
            Coding::Hosted { .. } | Coding::SeSparse(_) => 0,
        };
        let file_len = self.file_len.load(Ordering::Acquire);
        file_len
            .max(free)
            .max(self.overhead)
            .max(self.gd_at + directory)
            .max(self.rgd_at.map_or(0, |at| at + directory))
    }

    /// The tables of a directory page that exist and lie in the file, in runs of at most `limit` bytes. The page, if it is
    /// not in memory.
    pub(crate) fn table_runs(&self, page: u64, limit: u64) -> Result<Vec<TableRun>, MetaRef> {
        let first = page * PAGE_ENTRIES;
        let (loaded, _) = self.page(first).ok_or(MetaRef::Directory(page))?;
        let there = (first..).zip(loaded.gd.iter()).filter(|(_, gde)| *gde != 0);
        // A table outside the file fails where it is used; here it only has no entries.
        let tables = there.filter_map(|(table, gde)| Some((table, self.table_at(table, gde).ok()?)));
        Ok(TableRun::of(tables, self.table_bytes(), limit))
    }

    /// First byte behind every table that a page of the directory or of its copy names, whether the file reaches it or not.
    pub(crate) fn end_of_tables(&self, page: u64) -> u64 {
        let Some((loaded, _)) = self.page(page * PAGE_ENTRIES) else { return 0 };
        let entries = loaded.gd.iter().chain(loaded.rgd.iter());
        let places = entries.filter_map(|e| self.coding.table(e).ok().flatten());
        places.max().map_or(0, |at| at + self.table_bytes())
    }

    /// First byte behind every grain that the entries name, whether the file reaches it or not.
    pub(crate) fn end_of_entries(&self, table: &[u8]) -> u64 {
        self.places(table).map(|(_, at)| at + self.grain).max().unwrap_or(0)
    }

    /// The grains that the entries name: (entry, byte offset).
    pub(crate) fn places(&self, table: &[u8]) -> impl Iterator<Item = (u64, u64)> {
        let entries = self.coding.entries(table);
        (0..).map_while(move |n| entries.get(n)).zip(0..).filter_map(|(e, n)| match self.coding.grain(e) {
            Ok(Entry::At(at)) => Some((n, at)),
            // One that means nothing fails where it is used.
            Ok(Entry::Absent | Entry::Zeroed) | Err(_) => None,
        })
    }

    /// Byte offset of the redundant copy of a table, if it lies in the file.
    pub(crate) fn copy_at(&self, table: u64) -> Option<u64> {
        let (page, index) = self.page(table)?;
        let rgde = page.rgd.get(index)?;
        self.table_at(table, rgde).ok()
    }

    /// Forgets tables of a directory page that only the redundant directory names: the power failed before the primary one
    /// named them, so nothing that was flushed is in them.
    pub(crate) fn forget_unborn_tables(&self, page: u64) {
        let first = page * PAGE_ENTRIES;
        let mut state = locked(&self.state);
        let Some((loaded, _)) = self.page(first) else { return };
        for (((n, table), gde), rgde) in (0..).zip(first..).zip(loaded.gd.iter()).zip(loaded.rgd.iter()) {
            if gde == 0 && rgde != 0 {
                loaded.keep();
                loaded.rgd.set(n, 0);
                state.dirty_gd.insert(table / SECTOR_ENTRIES as u64);
            }
        }
    }
}
