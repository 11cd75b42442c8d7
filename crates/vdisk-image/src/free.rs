//! Places in an extent's file that nothing names: where grains were, to be used again.
//!
//! A grain that is discarded as a whole loses its entry. When no request can be at its place any more ([`crate::grace`]), a hole is
//! punched there, and when the entry is durably gone as well (the next flush), it is given out again. What earlier sessions left is
//! found when the tables are looked through for the first change.

use crate::allocate::{Room, State, sector_number};
use crate::coding::{Coding, Entry};
use crate::ledger::What;
use crate::sparse::{Lookup, Sparse};
use crate::table::TableCopy;
use crate::wait::locked;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// Intervals that are kept: what is more than that is found again by the next session. A few MiB.
pub(crate) const MOST_INTERVALS: usize = 1 << 16;

/// Intervals that are looked at for a long one.
pub(crate) const LOOKS: usize = 64;

/// Grains that are freed between two flushes, where no ledger limits them.
const MOST_FREED: usize = 1 << 16;

/// A part of an extent's file that nothing names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    /// Byte offset.
    pub(crate) at: u64,
    pub(crate) len: u64,
    /// It reads as zeroes.
    pub(crate) zeroed: bool,
}

impl Place {
    fn end(self) -> u64 {
        self.at + self.len
    }
}

/// Places that can be given out, as intervals.
#[derive(Debug, Default)]
pub(crate) struct FreeSpace(BTreeMap<u64, Place>);

impl FreeSpace {
    /// Takes in a place, no part of which is here.
    pub(crate) fn insert(&mut self, place: Place) {
        let mut new = place;
        if let Some((_, before)) = self.0.range(..new.at).next_back()
            && before.end() == new.at
            && before.zeroed == new.zeroed
        {
            new = Place { at: before.at, len: before.len + new.len, ..new };
        }
        if let Some(after) = self.0.get(&new.end()).copied()
            && after.zeroed == new.zeroed
        {
            self.0.remove(&after.at);
            new.len += after.len;
        }
        if self.0.len() < MOST_INTERVALS || self.0.contains_key(&new.at) {
            self.0.insert(new.at, new);
        }
    }

    /// Takes out room for up to `count` units in a row: the first interval that has it all, or the longest of the first ones.
    pub(crate) fn take(&mut self, unit: u64, count: u64) -> Option<Place> {
        let wanted = count.saturating_mul(unit);
        let mut best: Option<Place> = None;
        for place in self.0.values().take(LOOKS) {
            if best.is_none_or(|b| place.len > b.len) {
                best = Some(*place);
            }
            if place.len >= wanted {
                break;
            }
        }
        let best = best.filter(|b| b.len >= unit)?;
        let taken = Place { len: wanted.min(best.len / unit * unit), ..best };
        self.remove(taken.at, taken.len);
        Some(taken)
    }

    /// Takes out what is here of a range.
    pub(crate) fn remove(&mut self, at: u64, len: u64) {
        let end = at + len;
        while let Some(place) = self.0.range(..end).next_back().map(|(_, p)| *p).filter(|p| p.end() > at) {
            self.0.remove(&place.at);
            for (from, to) in [(place.at, at), (end, place.end())] {
                if from < to {
                    self.0.insert(from, Place { at: from, len: to - from, ..place });
                }
            }
        }
    }

    /// Takes out what lies in front of `end` without a gap. The new end of what is used.
    fn cut_tail(&mut self, end: u64) -> u64 {
        let mut end = end;
        while let Some(last) = self.0.last_entry().filter(|last| last.get().end() == end) {
            end = last.remove().at;
        }
        end
    }
}

/// What became of a grain that was to be freed.
#[derive(Debug)]
pub(crate) enum Freeing {
    /// It has no entry any more, or another one.
    Done,
    /// It keeps the entry that it has.
    Kept,
    /// The host's space for its table has to be taken first.
    Reserve(Room),
    /// A flush has to make room first.
    Flush,
}

impl Sparse {
    /// Whether grains lose their entries when they are discarded as a whole. What lies between the grains and tables of a COWD
    /// extent is no whole number of grains.
    pub(crate) fn frees_grains(&self) -> bool {
        matches!(self.coding, Coding::Hosted { .. })
    }

    /// Takes the entry of the grain at `offset` away, if its place is still the one at byte `at` of the file. When no request is at that
    /// any more, the caller hands it to [`Sparse::freed`].
    pub(crate) fn free(&self, offset: u64, at: u64) -> Freeing {
        let in_file = at + self.grain <= self.file_len.load(Ordering::Acquire);
        if !in_file {
            return Freeing::Kept;
        }
        self.rename(offset, at, None)
    }

    /// No entry names these places, and no request is at them: when the next flush has made that durable, they are free.
    pub(crate) fn freed(&self, places: Vec<Place>) {
        locked(&self.state).freed.extend(places);
    }

    /// Gives the grain at `offset` the place at byte `to`, which nothing names, instead of the one at byte `from`. Both hold the same, and
    /// nobody changes the grain meanwhile. The place that it had is handed over as after [`Sparse::free`].
    pub(crate) fn move_to(&self, offset: u64, from: u64, to: u64) -> Freeing {
        self.rename(offset, from, Some(to))
    }

    fn rename(&self, offset: u64, at: u64, to: Option<u64>) -> Freeing {
        let (index, entry, _) = self.split(offset);
        let grain = offset / self.grain;
        let mut state = locked(&self.state);
        let Lookup::Table(table) = self.table(index, Arc::clone) else { return Freeing::Kept };
        let is_there = matches!(self.coding.grain(table.entry(entry).unwrap_or(0)), Ok(Entry::At(now)) if now == at);
        if !self.frees_grains() || !is_there || !at.is_multiple_of(self.grain) {
            return Freeing::Kept;
        }
        if table.copy == TableCopy::Broken {
            return Freeing::Kept;
        }
        if !table.is_reserved() {
            return Freeing::Reserve(self.room_of(index, table));
        }
        if state.freed.len() >= MOST_FREED || !self.claim(1) {
            return Freeing::Flush;
        }
        let sector = to.map_or(0, sector_number);
        self.note(What::Grain { grain, sector });
        if table.set(entry, sector) {
            state.dirty.push(index);
        }
        if let Some(to) = to {
            state.free.remove(to, self.grain);
        }
        Freeing::Done
    }

    /// Nothing is used at or after byte `end` any more, durably, and nobody is at it.
    pub(crate) fn end_at(&self, end: u64) {
        let mut state = locked(&self.state);
        state.free.remove(end, u64::MAX - end);
        if let Some(next) = &mut state.next {
            *next = end.min(*next);
        }
    }

    /// The entries that named these places are durably gone: they can be given out.
    pub(crate) fn flushed(&self, places: Vec<Place>) {
        let mut state = locked(&self.state);
        places.into_iter().for_each(|p| state.free.insert(p));
    }

    /// Cuts the free places at the end off what was given out, when no request is under way and everything is flushed. First byte
    /// behind what is used; `None` if nothing was given out.
    pub(crate) fn cut_tail(&self) -> Option<u64> {
        let mut state = locked(&self.state);
        let State { free, next, .. } = &mut *state;
        *next = next.map(|end| free.cut_tail(end));
        *next
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(at: u64, len: u64) -> Place {
        Place { at, len, zeroed: true }
    }

    fn all(free: &FreeSpace) -> Vec<(u64, u64, bool)> {
        free.0.values().map(|p| (p.at, p.len, p.zeroed)).collect()
    }

    #[test]
    fn places_that_touch_become_one_unless_only_one_is_zeroed() {
        let mut free = FreeSpace::default();
        for at in [8, 24, 16] {
            free.insert(place(at, 8));
        }
        assert_eq!(all(&free), [(8, 24, true)]);
        free.insert(Place { zeroed: false, ..place(32, 8) });
        free.insert(Place { zeroed: false, ..place(0, 8) });
        assert_eq!(all(&free), [(0, 8, false), (8, 24, true), (32, 8, false)]);
    }

    #[test]
    fn a_long_run_is_looked_for_and_the_longest_is_better_than_none() {
        let mut free = FreeSpace::default();
        for (at, len) in [(0, 8), (16, 16), (40, 32)] {
            free.insert(place(at, len));
        }
        assert_eq!(free.take(8, 2), Some(place(16, 16)));
        assert_eq!(free.take(8, 9), Some(place(40, 32)));
        assert_eq!(free.take(8, 1), Some(place(0, 8)));
        assert_eq!(free.take(8, 1), None);
    }

    #[test]
    fn what_somebody_else_has_is_taken_out_of_the_middle() {
        let mut free = FreeSpace::default();
        free.insert(place(0, 80));
        free.remove(16, 8);
        assert_eq!(all(&free), [(0, 16, true), (24, 56, true)]);
        free.remove(8, 32);
        assert_eq!(all(&free), [(0, 8, true), (40, 40, true)]);
        free.remove(100, 8);
        free.remove(0, 200);
        assert_eq!(all(&free), []);
    }

    #[test]
    fn the_tail_is_cut_as_far_as_it_is_free() {
        let mut free = FreeSpace::default();
        free.insert(place(0, 8));
        free.insert(place(16, 8));
        free.insert(Place { zeroed: false, ..place(24, 8) });
        assert_eq!(free.cut_tail(40), 40);
        assert_eq!(free.cut_tail(32), 16);
        assert_eq!(all(&free), [(0, 8, true)]);
    }

    #[test]
    fn the_number_of_intervals_is_bounded_and_those_that_are_there_still_grow() {
        let mut free = FreeSpace::default();
        for n in 0..MOST_INTERVALS as u64 + 10 {
            free.insert(place(n * 16, 8));
        }
        assert_eq!(free.0.len(), MOST_INTERVALS);
        free.insert(place(8, 8));
        assert_eq!(free.0.len(), MOST_INTERVALS - 1);
        assert_eq!(free.take(8, 3), Some(place(0, 24)));
    }
}
