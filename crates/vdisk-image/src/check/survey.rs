//! What the tables of an extent and their copies name, all of it, before anything is decided.

use super::FaultKind;
use super::place::Wrong;
use super::verdict::{Says, Side};
use crate::coding::Entry;
use crate::disk::{Disk, size};
use crate::error::DiskError;
use crate::file_io::FileIo;
use crate::sparse::Sparse;
use crate::table::Entries;
use crate::usage::{PlaceSet, in_order};
use vmdk_parse::SECTOR_SIZE;

/// Tables, and pieces of a directory, are read so many bytes at once.
const PIECE: u64 = 1 << 20;

/// A directory entry and its copy.
#[derive(Debug)]
pub(super) struct Pair {
    pub(super) table: u64,
    pub(super) primary: Named,
    /// `None` where the extent has no copies.
    pub(super) copy: Option<Named>,
}

/// What a directory entry names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Named {
    Nothing,
    /// A table at this byte.
    At(u64),
    /// A place where none can be, by an entry of this value.
    Wrong(u64, Wrong),
}

impl Named {
    pub(super) fn at(&self) -> Option<u64> {
        match self {
            Self::At(at) => Some(*at),
            Self::Nothing | Self::Wrong(..) => None,
        }
    }
}

/// What is named, by whom.
#[derive(Debug)]
pub(super) struct Survey<'a> {
    pub(super) extent: &'a Sparse,
    pub(super) file_len: u64,
    /// Tables and copies; and those that overlap others.
    pub(super) tables: PlaceSet,
    tables_twice: PlaceSet,
    /// Tables among the grains that something else names as a grain: what is there is not known.
    clashes: PlaceSet,
    /// Grains of the primary tables; and those that overlap others.
    pub(super) grains: PlaceSet,
    grains_twice: PlaceSet,
    /// Grains that only a copy names where its primary says something else; and those that overlap others.
    pub(super) offered: PlaceSet,
    offered_twice: PlaceSet,
    /// Tables that differ from their copies, or that only one directory has.
    pub(super) differing: Vec<u64>,
    /// Something is wrong that no copy knows better.
    pub(super) wrong: bool,
    /// First byte past the end of the file that anything names.
    pub(super) missing: u64,
    /// First byte behind everything that is used.
    pub(super) end: u64,
}

impl<'a> Survey<'a> {
    /// Looks through everything that an extent's file of `file_len` bytes says. `progress` is told of every table.
    ///
    /// # Errors
    ///
    /// The host's.
    pub(super) async fn of<I: FileIo>(
        disk: &Disk,
        io: &I,
        extent: &'a Sparse,
        file_len: u64,
        mut progress: impl FnMut(u64),
    ) -> Result<Self, DiskError> {
        let tables = || PlaceSet::new(extent.table_bytes());
        let grains = || PlaceSet::new(extent.grain);
        let mut survey = Self {
            extent,
            file_len,
            tables: tables(),
            tables_twice: tables(),
            clashes: grains(),
            grains: grains(),
            grains_twice: grains(),
            offered: grains(),
            offered_twice: grains(),
            differing: Vec::new(),
            wrong: false,
            missing: u64::MAX,
            end: extent.fixed_areas().iter().map(|area| area.end).chain([extent.overhead]).max().unwrap_or(0),
        };
        let mut first = 0;
        while first < extent.tables {
            let pairs = survey.pairs(disk, io, first, PIECE / extent.coding.entry_bytes()).await?;
            pairs.iter().for_each(|pair| survey.take_pair(pair));
            first += pairs.len() as u64;
        }
        first = 0;
        while first < extent.tables {
            let pairs = survey.pairs(disk, io, first, PIECE / extent.coding.entry_bytes()).await?;
            first += pairs.len() as u64;
            let bytes = extent.table_bytes();
            let follows = |a: &Pair, b: &Pair| {
                let next = |a: Option<u64>, b: Option<u64>| a.map(|at| at + bytes) == b;
                next(a.primary.at(), b.primary.at()) && next(a.at_of_copy(), b.at_of_copy())
            };
            for run in pairs.chunk_by(follows).flat_map(|run| run.chunks(size((PIECE / bytes).max(1)))) {
                survey.take_run(disk, io, run).await?;
                progress(run.last().map_or(0, |pair| pair.table + 1));
            }
        }
        survey.wrong |=
            !survey.tables_twice.is_empty() || !survey.grains_twice.is_empty() || !survey.clashes.is_empty();
        Ok(survey)
    }

    /// Directory entries from `first` on, at most `count`.
    pub(super) async fn pairs<I: FileIo>(
        &self,
        disk: &Disk,
        io: &I,
        first: u64,
        count: u64,
    ) -> Result<Vec<Pair>, DiskError> {
        let extent = self.extent;
        let size = extent.coding.entry_bytes();
        let len = count.min(extent.tables - first) * size;
        let read = async |at: u64| -> Result<Entries, DiskError> {
            Ok(extent.coding.entries(&disk.read_metadata(io, extent.file, at + first * size, len).await?))
        };
        let primary = read(extent.gd_at).await?;
        let copy = match extent.rgd_at {
            Some(at) => Some(read(at).await?),
            None => None,
        };
        let named = |gde: u64| match extent.table_place(gde, self.file_len) {
            Ok(None) => Named::Nothing,
            Ok(Some(at)) => Named::At(at),
            Err(wrong) => Named::Wrong(gde, wrong),
        };
        let pairs = (first..).zip(primary.iter()).zip(0..).map(|((table, gde), n)| Pair {
            table,
            primary: named(gde),
            copy: copy.as_ref().map(|copy| named(copy.get(n).unwrap_or(0))),
        });
        let pairs: Vec<Pair> = pairs.collect();
        Ok(pairs)
    }

    fn take_pair(&mut self, pair: &Pair) {
        let copy = pair.at_of_copy();
        for at in pair.primary.at().into_iter().chain(copy) {
            if !self.tables.insert(at) {
                self.tables_twice.add(at);
            }
            self.end = self.end.max(at + self.extent.table_bytes());
        }
        for named in [Some(&pair.primary), pair.copy.as_ref()].into_iter().flatten() {
            if let Named::Wrong(gde, (FaultKind::EntryPastEnd, _)) = named
                && let Ok(Some(at)) = self.extent.coding.table(*gde)
            {
                // A table that the file's end cuts in two as well.
                self.missing = self.missing.min(at.max(self.file_len));
            }
        }
    }

    /// Tables that follow one another in the file, and so do their copies; or a single pair.
    async fn take_run<I: FileIo>(&mut self, disk: &Disk, io: &I, run: &[Pair]) -> Result<(), DiskError> {
        let Some(first) = run.first() else { return Ok(()) };
        let (extent, bytes) = (self.extent, self.extent.table_bytes());
        let len = run.len() as u64 * bytes;
        let sides = [first.primary.at(), first.at_of_copy()];
        let mut tables = [Vec::new(), Vec::new()];
        for (at, table) in sides.iter().zip(&mut tables) {
            if let Some(at) = at
                && !disk.is_hole(io, extent.file, *at, len).await
            {
                *table = disk.read_metadata(io, extent.file, *at, len).await?;
            }
        }
        for (n, pair) in run.iter().enumerate() {
            let part = n * size(bytes)..(n + 1) * size(bytes);
            // One that is not there, or in a hole, is empty.
            let [primary, copy] = tables.each_ref().map(|t| t.get(part.clone()));
            self.take_tables(pair, primary, copy);
        }
        Ok(())
    }

    fn take_tables(&mut self, pair: &Pair, primary: Option<&[u8]>, copy: Option<&[u8]>) {
        let entries = primary.map(|bytes| self.extent.coding.entries(bytes));
        let copies = copy.map(|bytes| self.extent.coding.entries(bytes));
        let mut differs = false;
        for n in 0..size(self.extent.gtes) {
            let of = |entries: &Option<Entries>| entries.as_ref().and_then(|e| e.get(n)).unwrap_or(0);
            let (gte, other) = (of(&entries), of(&copies));
            let is_apart = pair.at_of_copy().is_some() && gte != other;
            differs |= is_apart;
            self.take_entry(gte, true, !is_apart);
            if is_apart {
                self.take_entry(other, false, false);
            }
        }
        let has_pair = match (&pair.primary, &pair.copy) {
            (Named::Wrong(..), None) => {
                self.wrong = true;
                true
            }
            (_, None) | (Named::Nothing, Some(Named::Nothing)) => true,
            (Named::At(at), Some(Named::At(copy_at))) => at != copy_at,
            (_, Some(_)) => false,
        };
        if differs || !has_pair {
            self.differing.push(pair.table);
        }
    }

    /// Takes in an entry of a primary table, or one of a copy that differs. `agreed`: no copy says anything else.
    fn take_entry(&mut self, gte: u64, is_primary: bool, agreed: bool) {
        let extent = self.extent;
        match extent.grain_place(gte, self.file_len, &self.tables) {
            Ok(Entry::At(at)) => {
                let (set, twice) = match is_primary {
                    true => (&mut self.grains, &mut self.grains_twice),
                    false => (&mut self.offered, &mut self.offered_twice),
                };
                if !set.insert(at) {
                    twice.add(at);
                }
                self.wrong |= is_primary && !extent.is_aligned(at);
                self.end = self.end.max(at + extent.grain);
            }
            Ok(Entry::Absent | Entry::Zeroed) => {}
            Err(_) => {
                self.wrong |= agreed;
                let Ok(Entry::At(at)) = extent.coding.grain(gte) else { return };
                if at >= self.file_len {
                    self.missing = self.missing.min(at);
                } else if !extent.is_metadata(at, extent.grain) {
                    self.clashes.add(at);
                }
            }
        }
    }

    /// What lies between what is used: (first byte, byte behind the last).
    pub(super) fn unused(&self) -> impl Iterator<Item = (u64, u64)> {
        let mut fixed: Vec<(u64, u64)> = self.extent.fixed_areas().iter().map(|area| (area.start, area.end)).collect();
        fixed.sort_unstable();
        let used = in_order(self.tables.areas(), self.grains.areas());
        let used = in_order(used, in_order(self.offered.areas(), fixed.into_iter()));
        let mut from = self.extent.overhead;
        used.filter_map(move |(start, end)| {
            let gap = (from.next_multiple_of(SECTOR_SIZE), start);
            from = from.max(end);
            (gap.0 < gap.1).then_some(gap)
        })
    }

    /// Whether nothing names some of the file.
    pub(super) fn has_unused(&self) -> bool {
        self.end < self.file_len || self.unused().next().is_some()
    }

    /// Whether nothing but the directory claims the place of a table.
    pub(super) fn is_certain(&self, at: u64) -> bool {
        let len = self.extent.table_bytes();
        !self.tables_twice.overlaps(at, len) && !self.clashes.overlaps(at, len)
    }

    /// What an entry says: of a primary table, or of a copy that differs from it.
    pub(super) fn judge(&self, gte: u64, side: Side) -> Says {
        let len = self.extent.grain;
        match self.extent.grain_place(gte, self.file_len, &self.tables) {
            Ok(Entry::Absent) => Says::Absent,
            Ok(Entry::Zeroed) => Says::Zeroed,
            Ok(Entry::At(at)) if side == Side::Copy && self.grains.overlaps(at, len) => Says::Taken,
            Ok(Entry::At(at)) if !self.extent.is_aligned(at) => Says::Doubtful,
            Ok(Entry::At(at)) => {
                let twice = if side == Side::Copy { &self.offered_twice } else { &self.grains_twice };
                if twice.overlaps(at, len) { Says::Doubtful } else { Says::Place }
            }
            Err((FaultKind::EntryPastEnd, _)) => Says::PastEnd,
            Err(_) => Says::Wrong,
        }
    }
}

impl Pair {
    /// Where the copy is, if it is another table than the primary one.
    pub(super) fn at_of_copy(&self) -> Option<u64> {
        self.copy.as_ref().and_then(Named::at).filter(|at| self.primary.at() != Some(*at))
    }
}
