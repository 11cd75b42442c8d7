//! Where the grains of an extent are to be: as far to the front as they fit. Pure.

use crate::check::survey::Survey;
use roaring::RoaringTreemap;

/// The places of an extent's file, in units of a grain.
#[derive(Debug)]
pub(super) struct Plan {
    /// Bytes of a unit.
    unit: u64,
    /// The first one behind the metadata.
    start: u64,
    /// Where grains are that can be moved.
    grains: RoaringTreemap,
    /// Where something is that stays: grain tables among the grains, and grains where none begins.
    fixed: RoaringTreemap,
}

impl Plan {
    pub(super) fn new(survey: &Survey<'_>) -> Self {
        let unit = survey.extent.grain;
        let (grains, others) = survey.grains.units();
        let mut fixed = RoaringTreemap::new();
        let areas = others.map(|at| (at, at + unit)).chain(survey.tables.areas()).chain(survey.offered.areas());
        let areas = areas.chain(survey.extent.fixed_areas().iter().map(|area| (area.start, area.end)));
        let start = survey.extent.overhead.div_ceil(unit);
        for (from, to) in areas {
            let units = (from / unit).max(start)..to.div_ceil(unit);
            if !units.is_empty() {
                fixed.insert_range(units);
            }
        }
        Self { unit, start, grains: grains - &fixed, fixed }
    }

    /// The grain at byte `at` is not needed any more.
    pub(super) fn drop_grain(&mut self, at: u64) {
        self.grains.remove(at / self.unit);
    }

    /// The first unit behind everything, when all grains are where they are to be: so many as are behind it now find room in front of
    /// it. What stays is in front of it.
    pub(super) fn end(&self) -> u64 {
        let used_below = |end: u64| rank(&self.grains, end) + rank(&self.fixed, end);
        let fits = |end: u64| {
            self.grains.len() - rank(&self.grains, end) <= (end - self.start).saturating_sub(used_below(end))
        };
        let last = |set: &RoaringTreemap| set.max().map_or(self.start, |last| last + 1);
        let (mut low, mut high) = (self.start, last(&self.grains).max(self.start));
        while low < high {
            let middle = low.midpoint(high);
            if fits(middle) { high = middle } else { low = middle + 1 }
        }
        low.max(last(&self.fixed))
    }

    /// Free places in front of a unit, in order: byte offsets.
    pub(super) fn free(&self, end: u64) -> impl Iterator<Item = u64> {
        let used = |n: &u64| self.grains.contains(*n) || self.fixed.contains(*n);
        (self.start..end).filter(move |n| !used(n)).map(|n| n * self.unit)
    }

    /// How many grains are behind a unit.
    pub(super) fn behind(&self, end: u64) -> u64 {
        self.grains.len() - rank(&self.grains, end)
    }
}

/// Numbers below `end`.
fn rank(set: &RoaringTreemap, end: u64) -> u64 {
    end.checked_sub(1).map_or(0, |last| set.rank(last))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(start: u64, grains: &[u64], fixed: &[u64]) -> Plan {
        Plan { unit: 4096, start, grains: grains.iter().copied().collect(), fixed: fixed.iter().copied().collect() }
    }

    #[test]
    fn grains_end_where_they_would_if_there_were_no_gaps() {
        assert_eq!(plan(2, &[], &[]).end(), 2);
        assert_eq!(plan(2, &[2, 3, 4], &[]).end(), 5);
        assert_eq!(plan(2, &[2, 5, 9], &[]).end(), 5);
        assert_eq!(plan(0, &[9], &[]).end(), 1);
    }

    #[test]
    fn what_stays_is_gone_round_and_nothing_is_cut_off_before_it() {
        assert_eq!(plan(2, &[5, 9], &[2, 3]).end(), 6);
        assert_eq!(plan(2, &[5, 9], &[7]).end(), 8);
        let plan = plan(2, &[3, 9], &[4]);
        assert_eq!((plan.end(), plan.behind(5)), (5, 1));
        assert_eq!(plan.free(5).collect::<Vec<_>>(), [2 * 4096]);
    }

    #[test]
    fn there_is_always_room_for_what_is_moved() {
        let random = crate::memory::Random::new(7);
        for _ in 0..2000 {
            let (mut grains, mut fixed) = (Vec::new(), Vec::new());
            for n in 3..40 {
                match random.below(4) {
                    0 | 1 => grains.push(n),
                    2 if random.below(4) == 0 => fixed.push(n),
                    _ => {}
                }
            }
            let plan = plan(3, &grains, &fixed);
            let end = plan.end();
            assert!(plan.free(end).count() as u64 >= plan.behind(end), "{grains:?} {fixed:?}");
            let least = 3 + (grains.len() + fixed.len()) as u64;
            assert!(end >= least && fixed.iter().all(|n| *n < end));
            assert!(end == least || fixed.last().is_some_and(|last| end == last + 1) || !fixed.is_empty());
        }
    }
}
