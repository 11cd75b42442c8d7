//! Which places of a file are in use: to find what two entries name.

use crate::error::{DiskError, ErrorKind};
use crate::free::Place;
use crate::scan::TableRun;
use crate::sparse::Sparse;
use roaring::RoaringTreemap;
use std::ops::Range;
use vmdk_parse::SECTOR_SIZE;

/// Places of a file that are in use, each by a piece of the same size (a grain, a table), no two of which overlap.
///
/// Takes memory by what is in it and not by the length of the file, which may be any number: a bit for each piece where the
/// pieces lie close together, about two bytes where they do not, and so less than the entries that name them take on the
/// host. A fully used extent of 2 TiB with grains of 64 KiB takes 4 MiB.
#[derive(Debug)]
pub(crate) struct PlaceSet {
    /// Sectors of a piece.
    unit: u64,
    /// Pieces on a multiple of their size, by number.
    aligned: RoaringTreemap,
    /// First sectors of the others.
    others: RoaringTreemap,
}

impl PlaceSet {
    /// No places yet. `unit` is the size of a piece in bytes: whole sectors.
    pub(crate) fn new(unit: u64) -> Self {
        let unit = (unit / SECTOR_SIZE).max(1);
        Self { unit, aligned: RoaringTreemap::new(), others: RoaringTreemap::new() }
    }

    /// Takes in the piece at byte `at`, a multiple of a sector. `false`, and it is not taken in, if one that is there overlaps it.
    pub(crate) fn insert(&mut self, at: u64) -> bool {
        let sector = at / SECTOR_SIZE;
        if sector.is_multiple_of(self.unit) && self.others.is_empty() {
            return self.aligned.insert(sector / self.unit);
        }
        if self.overlaps(at, self.unit * SECTOR_SIZE) {
            return false;
        }
        match sector.is_multiple_of(self.unit) {
            true => self.aligned.insert(sector / self.unit),
            false => self.others.insert(sector),
        }
    }

    /// Takes in the piece at byte `at`, whether or not others overlap it.
    pub(crate) fn add(&mut self, at: u64) {
        let sector = at / SECTOR_SIZE;
        match sector.is_multiple_of(self.unit) {
            true => self.aligned.insert(sector / self.unit),
            false => self.others.insert(sector),
        };
    }

    /// Where the pieces are: (first byte, byte behind the last), in order.
    pub(crate) fn areas(&self) -> impl Iterator<Item = (u64, u64)> {
        let of = |sector: u64| (sector * SECTOR_SIZE, (sector + self.unit) * SECTOR_SIZE);
        in_order(self.aligned.iter().map(move |n| of(n * self.unit)), self.others.iter().map(of))
    }

    /// Whether there is no piece.
    pub(crate) fn is_empty(&self) -> bool {
        self.aligned.is_empty() && self.others.is_empty()
    }

    /// Whether a piece lies in any of the `len` bytes from byte `at` on. Both are multiples of a sector.
    pub(crate) fn overlaps(&self, at: u64, len: u64) -> bool {
        let (start, end) = (at / SECTOR_SIZE, (at / SECTOR_SIZE).saturating_add(len / SECTOR_SIZE));
        // The first sector of the first piece that can reach so far.
        let first = start.saturating_sub(self.unit - 1);
        let numbers = first.div_ceil(self.unit)..end.div_ceil(self.unit);
        let any = |set: &RoaringTreemap, places| !set.is_empty() && set.range_cardinality(places) > 0;
        any(&self.aligned, numbers) || any(&self.others, first..end)
    }
}

/// Joins areas that are in order each by themselves.
pub(crate) fn in_order(
    one: impl Iterator<Item = (u64, u64)>,
    other: impl Iterator<Item = (u64, u64)>,
) -> impl Iterator<Item = (u64, u64)> {
    let (mut one, mut other) = (one.peekable(), other.peekable());
    std::iter::from_fn(move || match (one.peek(), other.peek()) {
        (Some(a), Some(b)) if a > b => other.next(),
        (Some(_), _) => one.next(),
        (None, _) => other.next(),
    })
}

/// Sectors of a file that are in use: for areas that lie in a row, which are taken in together.
#[derive(Debug, Default)]
pub(crate) struct SectorSet(RoaringTreemap);

impl SectorSet {
    /// Takes in `len` bytes from byte `at` on, both multiples of a sector. `false`, and nothing is taken in, if any of them is
    /// there.
    pub(crate) fn insert(&mut self, at: u64, len: u64) -> bool {
        if self.overlaps(at, len) {
            return false;
        }
        self.0.insert_range(sectors(at, len));
        true
    }

    /// Whether any of the bytes is there.
    pub(crate) fn overlaps(&self, at: u64, len: u64) -> bool {
        self.0.range_cardinality(sectors(at, len)) > 0
    }
}

fn sectors(at: u64, len: u64) -> Range<u64> {
    at / SECTOR_SIZE..(at / SECTOR_SIZE).saturating_add(len / SECTOR_SIZE)
}

/// What the tables of an extent that is to change name, as far as it was looked through.
pub(crate) struct Used<'a> {
    extent: &'a Sparse,
    /// Tables and their copies.
    tables: SectorSet,
    grains: PlaceSet,
    /// Numbers of places, in units of a grain, that are not free although no grain is there.
    kept: RoaringTreemap,
}

impl<'a> Used<'a> {
    pub(crate) fn new(extent: &'a Sparse) -> Self {
        Self { extent, tables: SectorSet::default(), grains: PlaceSet::new(extent.grain), kept: RoaringTreemap::new() }
    }

    /// Takes in the tables that a page of the directory and of its copy name. The page is in memory.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Corrupt`] if two of them overlap.
    pub(crate) fn take_tables(&mut self, page: u64) -> Result<(), DiskError> {
        let bytes = self.extent.table_bytes();
        let runs = self.extent.table_runs(page, u64::MAX).unwrap_or_default();
        let tables = || runs.iter().flat_map(|run| run.tables(bytes)).map(|(table, _)| table);
        let copies = TableRun::of(tables().filter_map(|t| Some((t, self.extent.copy_at(t)?))), bytes, u64::MAX);
        for run in runs.iter().chain(&copies) {
            self.keep_range(run.at, run.count * bytes);
            if self.tables.insert(run.at, run.count * bytes) {
                continue;
            }
            // Which one is it?
            for (table, at) in run.tables(bytes) {
                if !self.tables.insert(at, bytes) {
                    let what = format!("grain table {table} at sector {} overlaps another one", at / SECTOR_SIZE);
                    return Err(self.cannot_change(&what));
                }
            }
        }
        Ok(())
    }

    /// Takes in the grains that the tables of a run name. All tables were taken in before.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Corrupt`] if one of them lies where a table is (the guest would write its own tables), or overlaps another.
    pub(crate) fn take_grains(&mut self, run: TableRun, bytes: &[u8]) -> Result<(), DiskError> {
        let extent = self.extent;
        for (n, at) in extent.places(bytes) {
            let what = match self.tables.overlaps(at, extent.grain) {
                true => "where a grain table is",
                // Once the file has grown over it, what is missing would be zeroes, and nobody would know.
                false if extent.is_missing(at, 1) => "past the end of the file, which was cut off",
                false if self.grains.insert(at) => continue,
                false => "which overlaps the grain of another entry",
            };
            let (table, entry) = (run.first + n / extent.gtes, n % extent.gtes);
            let sector = at / SECTOR_SIZE;
            return Err(
                self.cannot_change(&format!("entry {entry} of grain table {table} points to sector {sector}, {what}"))
            );
        }
        Ok(())
    }

    /// Keeps what the entries of a copy name that differs from its table.
    pub(crate) fn keep(&mut self, copy: &[u8]) {
        for (_, at) in self.extent.places(copy) {
            self.keep_range(at, self.extent.grain);
        }
    }

    fn keep_range(&mut self, at: u64, len: u64) {
        let unit = self.extent.grain;
        self.kept.insert_range(at / unit..at.saturating_add(len).div_ceil(unit));
    }

    /// The places where a grain could be and nothing is, in a file of `file_len` bytes. What they hold is not known. All tables were
    /// taken in.
    pub(crate) fn free(mut self, file_len: u64) -> impl Iterator<Item = Place> {
        let unit = self.extent.grain;
        for area in self.extent.fixed_areas() {
            self.keep_range(area.start, area.end - area.start);
        }
        for sector in std::mem::take(&mut self.grains.others) {
            self.keep_range(sector * SECTOR_SIZE, unit);
        }
        let frees = self.extent.frees_grains();
        let (start, end) = (self.extent.overhead.div_ceil(unit), if frees { file_len / unit } else { 0 });
        let used = self.grains.aligned | self.kept;
        let mut used = used.into_iter().skip_while(move |n| *n < start).take_while(move |n| *n < end).peekable();
        let mut next = start;
        std::iter::from_fn(move || {
            while used.next_if_eq(&next).is_some() {
                next += 1;
            }
            let until = used.peek().copied().unwrap_or(end);
            let place = Place { at: next * unit, len: until.saturating_sub(next) * unit, zeroed: false };
            next = until;
            (place.len > 0).then_some(place)
        })
    }

    fn cannot_change(&self, what: &str) -> DiskError {
        let text = format!("{}: {what}: use --read-only (vdisk check shows all)", self.extent.name);
        DiskError::new(ErrorKind::Corrupt, text)
    }
}

#[cfg(test)]
#[allow(clippy::cast_possible_truncation, reason = "sizes in tests are small")]
mod tests {
    use super::*;

    fn at(sector: u64) -> u64 {
        sector * SECTOR_SIZE
    }

    #[test]
    fn a_piece_may_touch_another_but_not_overlap_it() {
        for first in [128, 130] {
            for (second, fits) in
                [(-128, true), (-127, false), (-1, false), (0, false), (1, false), (127, false), (128, true)]
            {
                let mut set = PlaceSet::new(at(128));
                assert!(set.insert(at(first)));
                assert_eq!(set.insert(at(first.strict_add_signed(second))), fits, "{first} and {second} behind");
                // Who was refused is not there.
                assert_eq!(set.overlaps(at(first + 255), at(1)), second == 128, "{first} and {second} behind");
            }
        }
    }

    #[test]
    fn a_range_overlaps_the_pieces_that_it_reaches() {
        let mut set = PlaceSet::new(at(4));
        assert!(set.insert(at(8)) && set.insert(at(21)));
        for (start, len, overlaps) in [
            (0, 8, false),
            (0, 9, true),
            (11, 1, true),
            (12, 9, false),
            (12, 10, true),
            (24, 1, true),
            (25, 1000, false),
            (0, 1000, true),
        ] {
            assert_eq!(set.overlaps(at(start), at(len)), overlaps, "{start} + {len}");
        }
    }

    #[test]
    fn areas_may_touch_but_not_overlap() {
        let mut set = SectorSet::default();
        assert!(set.insert(at(10), at(4)) && set.insert(at(14), at(1000)) && set.insert(at(6), at(4)));
        for (start, len) in [(6, 1), (0, 7), (13, 2), (1013, 1), (0, 5000)] {
            assert!(!set.insert(at(start), at(len)), "{start} + {len}");
        }
        assert!(!set.overlaps(at(0), at(6)) && !set.overlaps(at(1014), at(1)) && !set.overlaps(u64::MAX - 511, 512));
    }

    #[test]
    fn single_sectors_and_the_largest_place_there_is_are_kept() {
        let mut set = PlaceSet::new(at(1));
        assert!(set.insert(at(7)) && set.insert(at(8)) && !set.insert(at(7)));
        let last = u64::MAX / SECTOR_SIZE;
        assert!(set.insert(at(last)) && !set.insert(at(last)));
        assert!(set.overlaps(at(last), at(1)) && !set.overlaps(at(9), at(last - 9)));
    }

    #[test]
    fn it_agrees_with_a_list_of_sectors() {
        for unit in [1, 3, 8] {
            let mut set = PlaceSet::new(at(unit));
            let mut taken = vec![false; 600];
            let mut seed = 1u64;
            for _ in 0..2000 {
                seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                let sector = (seed >> 33) % 590;
                let range = &mut taken[sector as usize..(sector + unit) as usize];
                let free = !range.contains(&true);
                assert_eq!(set.insert(at(sector)), free, "{unit} sectors at {sector}");
                if free {
                    range.fill(true);
                }
            }
        }
    }
}
