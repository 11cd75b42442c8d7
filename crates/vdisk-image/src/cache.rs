//! The grain cache: grains that are read in small pieces again and again.
//!
//! Write-through, so that it never holds what the file does not. A grain comes in when several times as much of it was read in
//! pieces as it is long, and not in place of one that was read since the last that asked for its place: whatever is read, the cache
//! adds a quarter to it at most, reads of more than fits hardly change what is here, and reads that are spread wide leave it alone,
//! at the price of a look at one word that no lock guards. A compressed grain comes in at its first read. A change takes the grain out after its
//! I/O and before its reply; a fill that was under way meanwhile notices and is thrown away.

use crate::file_io::FileId;
use crate::wait::locked;
use lru::LruCache;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

const SHARDS: usize = 16;

/// Larger grains are not cached: a small read would become a thousand times as large.
pub(crate) const MAX_GRAIN: u64 = 1 << 20;

/// How many times as much of a grain is read in pieces as it has, before it comes in. Whoever reads the same again and again has
/// mostly a cache of his own, so it is not lightly that a grain is read for this one. Tests read less.
const WORTH: usize = if cfg!(test) { 1 } else { 4 };

/// Tallies for each grain that there is room for, and at most altogether. Of grains that share one only the last is counted: a
/// few more than fit hardly meet, and the many of a wide load always do.
const TALLIES: usize = 4;
const MAX_TALLIES: usize = 1 << 18;

/// A grain by its file and byte offset in it; a compressed grain by its byte offset in the extent.
pub(crate) type GrainKey = (FileId, u64);

/// An LRU cache of grains, shared by all queues.
#[derive(Debug)]
pub(crate) struct GrainCache {
    shards: Vec<Mutex<Shard>>,
    shard_bytes: usize,
    /// What was read lately of which grain.
    tallies: Box<[AtomicU64]>,
    /// Leaves as many bits of a hash as number the tallies.
    tally_shift: u32,
    /// Grains in the cache or on their way into it.
    used: AtomicUsize,
    next_fill: AtomicU64,
}

#[derive(Debug)]
struct Shard {
    grains: LruCache<GrainKey, Slot>,
    bytes: usize,
}

/// How much was read of a grain in pieces: half of its hash, whether it came in since, and bytes.
#[derive(Clone, Copy)]
struct Tally(u64);

impl Tally {
    const CAME_IN: u64 = 1 << 31;

    /// Of no grain that is counted as many bytes are as would reach the flag: [`WORTH`] times [`MAX_GRAIN`].
    fn new(hash: u64, bytes: usize) -> Self {
        Self(hash >> 32 << 32 | bytes as u64 & (Self::CAME_IN - 1))
    }

    fn is_of(self, hash: u64) -> bool {
        (self.0 ^ hash) >> 32 == 0
    }

    fn came_in(self) -> bool {
        self.0 & Self::CAME_IN != 0
    }

    fn bytes(self) -> usize {
        usize::try_from(self.0 & (Self::CAME_IN - 1)).unwrap_or(usize::MAX)
    }
}

#[derive(Debug)]
enum Slot {
    /// On its way: the fill's number, and the bytes that it will take.
    Filling(u64, usize),
    /// Here; and whether it was read since it came in, or since another was turned away for it.
    Filled(Arc<[u8]>, bool),
}

impl Slot {
    fn bytes(&self) -> usize {
        match self {
            Self::Filling(_, len) => *len,
            Self::Filled(bytes, _) => bytes.len(),
        }
    }
}

/// What the cache knows of a grain.
#[derive(Debug)]
pub(crate) enum Cached {
    /// Its bytes.
    Hit(Arc<[u8]>),
    /// Nothing, but it is worth having: read it whole and hand it to [`GrainCache::fill`].
    Fill(Fill),
    /// Nothing yet: another task reads it.
    Coming,
    /// Nothing.
    Miss,
}

/// What is to become of a grain that is not here.
#[derive(Clone, Copy)]
enum Wish {
    None,
    /// It comes in, unless that took the place of one that is read.
    Place,
    /// It comes in, whoever has to leave.
    PlaceOfAny,
}

/// A promise to fill the cache.
#[derive(Debug)]
pub(crate) struct Fill {
    key: GrainKey,
    id: u64,
}

impl GrainCache {
    /// A cache of `bytes` for grains of up to `grain` bytes. Too small a budget caches nothing.
    pub(crate) fn new(bytes: usize, grain: u64) -> Self {
        let grain = usize::try_from(grain).unwrap_or(usize::MAX).max(1);
        let shards = SHARDS.min(bytes / grain);
        let shard_bytes = bytes.checked_div(shards).unwrap_or(0);
        let shard = || Shard { grains: LruCache::unbounded(), bytes: 0 };
        let tallies = if shards == 0 { 0 } else { (bytes / grain * TALLIES).clamp(2, MAX_TALLIES).next_power_of_two() };
        Self {
            shards: (0..shards).map(|_| Mutex::new(shard())).collect(),
            shard_bytes,
            tallies: (0..tallies).map(|_| AtomicU64::new(0)).collect(),
            tally_shift: u64::BITS - tallies.trailing_zeros(),
            used: AtomicUsize::new(0),
            next_fill: AtomicU64::new(0),
        }
    }

    fn shard(&self, key: GrainKey) -> Option<&Mutex<Shard>> {
        let count = self.shards.len() as u64;
        self.shards.get(usize::try_from((mixed(key) >> 32).checked_rem(count)?).ok()?)
    }

    /// Looks a grain of `len` bytes up for a read of `wanted` of them.
    pub(crate) fn look_up(&self, key: GrainKey, len: usize, wanted: usize) -> Cached {
        let mixed = mixed(key);
        // The topmost bits: they differ the most for neighbours.
        let slot = mixed.wrapping_shr(self.tally_shift);
        let Some(tally) = usize::try_from(slot).ok().and_then(|n| self.tallies.get(n)) else { return Cached::Miss };
        // Another thread may count at the same time: that one of them is lost does not matter.
        let so_far = Tally(tally.load(Ordering::Relaxed));
        let put = |t: Tally| tally.store(t.0, Ordering::Relaxed);
        if !so_far.is_of(mixed) {
            put(Tally::new(mixed, wanted));
            return Cached::Miss;
        }
        let bytes = so_far.bytes().saturating_add(wanted);
        if !so_far.came_in() && bytes < len.saturating_mul(WORTH) {
            put(Tally::new(mixed, bytes));
            return Cached::Miss;
        }
        let answer = self.look(key, len, if so_far.came_in() { Wish::None } else { Wish::Place });
        match answer {
            Cached::Fill(_) => put(Tally(Tally::new(mixed, 0).0 | Tally::CAME_IN)),
            // It left again.
            Cached::Miss => put(Tally::new(mixed, wanted)),
            Cached::Hit(_) | Cached::Coming => {}
        }
        answer
    }

    /// The same for a grain that is dear to read, such as a compressed one: it comes in at its first read.
    pub(crate) fn look_up_eagerly(&self, key: GrainKey, len: usize) -> Cached {
        self.look(key, len, Wish::PlaceOfAny)
    }

    /// A grain's bytes, if they are here.
    pub(crate) fn hit(&self, key: GrainKey) -> Option<Arc<[u8]>> {
        match locked(self.shard(key)?).grains.get_mut(&key) {
            Some(Slot::Filled(bytes, read)) => {
                *read = true;
                Some(Arc::clone(bytes))
            }
            Some(Slot::Filling(..)) | None => None,
        }
    }

    /// Whether the budget is large enough for any grain.
    pub(crate) fn keeps_grains(&self) -> bool {
        !self.shards.is_empty()
    }

    fn look(&self, key: GrainKey, len: usize, wish: Wish) -> Cached {
        let Some(shard) = self.shard(key) else { return Cached::Miss };
        let mut shard = locked(shard);
        match shard.grains.get_mut(&key) {
            Some(Slot::Filled(bytes, read)) => {
                *read = true;
                return Cached::Hit(Arc::clone(bytes));
            }
            Some(Slot::Filling(..)) => return Cached::Coming,
            None => {}
        }
        if matches!(wish, Wish::None) || len > self.shard_bytes {
            return Cached::Miss;
        }
        let mut room = self.shard_bytes.saturating_sub(shard.bytes);
        let leaving = shard.grains.iter().rev().take_while(|(_, slot)| {
            let leaves = room < len;
            room += slot.bytes();
            leaves
        });
        let mut leaving = leaving.filter(|(_, slot)| matches!((wish, slot), (Wish::Place, Slot::Filled(_, true))));
        if let Some((&other, _)) = leaving.next() {
            // As good as the one that asks, for all that is known, and it is here. Next time it has to be better.
            if let Some(Slot::Filled(_, read)) = shard.grains.get_mut(&other) {
                *read = false;
            }
            return Cached::Miss;
        }
        while shard.bytes + len > self.shard_bytes {
            let Some((&oldest, _)) = shard.grains.peek_lru() else { break };
            self.remove(&mut shard, oldest);
        }
        let id = self.next_fill.fetch_add(1, Ordering::Relaxed);
        // Before the grain is read: a change that finds the count at 0 was complete before that read.
        self.used.fetch_add(1, Ordering::SeqCst);
        shard.grains.put(key, Slot::Filling(id, len));
        shard.bytes += len;
        Cached::Fill(Fill { key, id })
    }

    /// Puts a grain in that was read after [`GrainCache::look_up`] asked for it; `None` if it could not be read.
    pub(crate) fn fill(&self, fill: &Fill, bytes: Option<Arc<[u8]>>) {
        let Some(shard) = self.shard(fill.key) else { return };
        let mut shard = locked(shard);
        let Some(slot) = shard.grains.peek_mut(&fill.key) else { return };
        let &mut Slot::Filling(id, len) = slot else { return };
        if id != fill.id {
            return;
        }
        match bytes {
            Some(bytes) if bytes.len() == len => *slot = Slot::Filled(bytes, false),
            _ => self.remove(&mut shard, fill.key),
        }
    }

    /// The grain was changed. After the change, before its reply.
    pub(crate) fn forget(&self, key: GrainKey) {
        if self.used.load(Ordering::SeqCst) == 0 {
            return;
        }
        if let Some(shard) = self.shard(key) {
            self.remove(&mut locked(shard), key);
        }
    }

    fn remove(&self, shard: &mut Shard, key: GrainKey) {
        if let Some(slot) = shard.grains.pop(&key) {
            self.used.fetch_sub(1, Ordering::SeqCst);
            shard.bytes -= slot.bytes();
        }
    }
}

/// Mixed, so that no regular pattern of grains falls into one shard. Grains are multiples of 4 KiB.
fn mixed(key: GrainKey) -> u64 {
    (key.1 >> 12 ^ u64::from(key.0.0)).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: GrainKey = (FileId(0), 65536);

    fn grain(byte: u8) -> Option<Arc<[u8]>> {
        Some(Arc::from(vec![byte; 4096]))
    }

    /// Half of a grain.
    fn look_up(cache: &GrainCache, key: GrainKey) -> Cached {
        cache.look_up(key, 4096, 2048)
    }

    fn ask_twice(cache: &GrainCache, key: GrainKey) -> Fill {
        assert!(matches!(look_up(cache, key), Cached::Miss));
        match look_up(cache, key) {
            Cached::Fill(fill) => fill,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_grain_comes_in_when_as_much_of_it_was_read_as_it_has() {
        let cache = GrainCache::new(1 << 20, 4096);
        for _ in 0..7 {
            assert!(matches!(cache.look_up(KEY, 4096, 512), Cached::Miss));
        }
        let Cached::Fill(fill) = cache.look_up(KEY, 4096, 512) else { panic!("read enough") };
        cache.fill(&fill, grain(7));
        for _ in 0..2 {
            assert!(matches!(look_up(&cache, KEY), Cached::Hit(b) if b[0] == 7));
        }
    }

    #[test]
    fn a_grain_that_left_is_read_in_pieces_again_before_it_returns() {
        let cache = GrainCache::new(1 << 20, 4096);
        let fill = ask_twice(&cache, KEY);
        cache.fill(&fill, grain(7));
        cache.forget(KEY);
        cache.fill(&ask_twice(&cache, KEY), grain(8));
        assert!(matches!(look_up(&cache, KEY), Cached::Hit(b) if b[0] == 8));
    }

    #[test]
    fn reads_that_are_spread_wide_leave_the_cache_alone() {
        let cache = GrainCache::new(1 << 20, 65536);
        for n in 0..100_000u64 {
            // Every grain of 64 MiB comes again after a thousand others.
            let answer = cache.look_up((FileId(0), n * 7919 % 1024 * 65536), 65536, 4096);
            assert!(matches!(answer, Cached::Miss), "read {n}");
        }
    }

    #[test]
    fn a_working_set_that_fits_comes_in() {
        let cache = GrainCache::new(16 << 20, 65536);
        let mut hits = 0;
        for n in 0..10_000u64 {
            let key = (FileId(0), n * 7919 % 128 * 65536);
            match cache.look_up(key, 65536, 4096) {
                Cached::Fill(fill) => cache.fill(&fill, Some(Arc::from(vec![0; 65536]))),
                Cached::Hit(_) => hits += 1,
                Cached::Miss | Cached::Coming => {}
            }
        }
        // After 16 reads of each; some share a tally.
        assert!(hits > 6000, "{hits}");
    }

    #[test]
    fn grains_that_are_read_do_not_leave_for_others_that_are_read_as_much() {
        let cache = GrainCache::new(4 << 20, 65536);
        let (mut hits, mut fills) = (0, 0);
        for n in 0..100_000u64 {
            // Twice as many as fit, each as often as the others.
            match cache.look_up((FileId(0), n * 7919 % 128 * 65536), 65536, 4096) {
                Cached::Fill(fill) => {
                    fills += 1;
                    cache.fill(&fill, Some(Arc::from(vec![0; 65536])));
                }
                Cached::Hit(_) => hits += 1,
                Cached::Miss | Cached::Coming => {}
            }
        }
        assert!(hits > 20_000 && fills < 200, "{hits} hits, {fills} fills");
    }

    #[test]
    fn grains_that_are_read_no_more_leave_for_others_that_are() {
        let cache = GrainCache::new(16 << 20, 65536);
        let mut hits = [0; 2];
        for (part, hits) in hits.iter_mut().enumerate() {
            for n in 0..10_000u64 {
                let key = (FileId(0), (part as u64 * 128 + n * 7919 % 128) * 65536);
                match cache.look_up(key, 65536, 4096) {
                    Cached::Fill(fill) => cache.fill(&fill, Some(Arc::from(vec![0; 65536]))),
                    Cached::Hit(_) => *hits += 1,
                    Cached::Miss | Cached::Coming => {}
                }
            }
        }
        assert!(hits.iter().all(|hits| *hits > 6_000), "{hits:?}");
    }

    #[test]
    fn a_compressed_grain_that_is_read_does_not_leave_for_another_kind() {
        let cache = GrainCache::new(64 << 10, 65536);
        let compressed = (FileId(1), 0);
        let Cached::Fill(fill) = cache.look_up_eagerly(compressed, 65536) else { panic!("it is not here") };
        cache.fill(&fill, Some(Arc::from(vec![0; 65536])));
        assert!(cache.hit(compressed).is_some());
        let mut turned_away = 0;
        while !matches!(cache.look_up((FileId(0), 0), 65536, 32768), Cached::Fill(_)) {
            turned_away += 1;
        }
        // Once until enough of it was read, and once for the other.
        assert_eq!(turned_away, 2);
        assert!(cache.hit(compressed).is_none());
    }

    #[test]
    fn reads_of_a_grain_that_is_on_its_way_do_not_put_it_off() {
        let cache = GrainCache::new(1 << 20, 4096);
        let fill = ask_twice(&cache, KEY);
        for _ in 0..5 {
            assert!(matches!(look_up(&cache, KEY), Cached::Coming));
        }
        cache.fill(&fill, grain(7));
        assert!(matches!(look_up(&cache, KEY), Cached::Hit(_)));
    }

    #[test]
    fn nothing_leaves_for_a_grain_that_does_not_come_in() {
        let cache = GrainCache::new(12 << 10, 12 << 10);
        for n in 0..3 {
            let key = (FileId(0), n * 4096);
            cache.fill(&ask_twice(&cache, key), grain(1));
        }
        // The first two were not read since, the third was.
        assert!(matches!(look_up(&cache, (FileId(0), 2 * 4096)), Cached::Hit(_)));
        assert!(matches!(cache.look_up((FileId(1), 0), 12 << 10, 12 << 10), Cached::Miss));
        assert!(matches!(cache.look_up((FileId(1), 0), 12 << 10, 12 << 10), Cached::Miss));
        assert!((0..3).all(|n| cache.hit((FileId(0), n * 4096)).is_some()));
    }

    #[test]
    fn a_compressed_grain_comes_in_whoever_has_to_leave() {
        let cache = GrainCache::new(64 << 10, 65536);
        for n in 0..10 {
            let Cached::Fill(fill) = cache.look_up_eagerly((FileId(0), n), 65536) else { panic!("grain {n}") };
            cache.fill(&fill, Some(Arc::from(vec![0; 65536])));
            assert!(matches!(cache.look_up_eagerly((FileId(0), n), 65536), Cached::Hit(_)));
        }
    }

    #[test]
    fn a_fill_that_a_change_overtook_is_thrown_away() {
        let cache = GrainCache::new(1 << 20, 4096);
        let fill = ask_twice(&cache, KEY);
        cache.forget(KEY);
        cache.fill(&fill, grain(7));
        assert!(matches!(look_up(&cache, KEY), Cached::Miss));
    }

    #[test]
    fn a_second_fill_does_not_revive_the_first() {
        let cache = GrainCache::new(1 << 20, 4096);
        let stale = ask_twice(&cache, KEY);
        cache.forget(KEY);
        let fresh = ask_twice(&cache, KEY);
        cache.fill(&stale, grain(1));
        assert!(cache.hit(KEY).is_none());
        cache.fill(&fresh, grain(2));
        assert!(matches!(look_up(&cache, KEY), Cached::Hit(b) if b[0] == 2));
    }

    #[test]
    fn a_failed_read_leaves_nothing_behind() {
        let cache = GrainCache::new(1 << 20, 4096);
        let fill = ask_twice(&cache, KEY);
        cache.fill(&fill, None);
        assert_eq!(cache.used.load(Ordering::SeqCst), 0);
    }

    #[test]
    fn the_budget_holds() {
        let cache = GrainCache::new(64 << 10, 4096);
        for n in 0..100 {
            let fill = ask_twice(&cache, (FileId(0), n * 4096));
            cache.fill(&fill, grain(1));
        }
        let bytes: usize = cache.shards.iter().map(|s| locked(s).bytes).sum();
        assert!(bytes <= 64 << 10 && bytes > 0, "{bytes}");
        assert_eq!(cache.used.load(Ordering::SeqCst), bytes / 4096);
    }

    #[test]
    fn a_budget_of_nothing_caches_nothing() {
        let cache = GrainCache::new(0, 65536);
        for _ in 0..3 {
            assert!(matches!(look_up(&cache, KEY), Cached::Miss));
        }
        cache.forget(KEY);
    }
}
