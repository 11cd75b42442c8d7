//! The grain cache: grains that are read in small pieces again and again.
//!
//! Write-through, so that it never holds what the file does not. A grain comes in at its second read within a while: data
//! that is read once costs no more than the read. A compressed one comes in at its first read. A change takes the grain out
//! after its I/O and before its reply; a fill that was under way meanwhile notices and is thrown away.

use crate::file_io::FileId;
use crate::wait::locked;
use lru::LruCache;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

const SHARDS: usize = 16;

/// Larger grains are not cached: a small read would become a thousand times as large.
pub(crate) const MAX_GRAIN: u64 = 1 << 20;

/// Grains that a shard remembers to have been read once, at most.
const MAX_SEEN: usize = 1 << 14;

/// A grain by its file and byte offset in it; a compressed grain by its byte offset in the extent.
pub(crate) type GrainKey = (FileId, u64);

/// An LRU cache of grains, shared by all queues.
#[derive(Debug)]
pub(crate) struct GrainCache {
    shards: Vec<Mutex<Shard>>,
    shard_bytes: usize,
    /// Grains in the cache or on their way into it.
    used: AtomicUsize,
    next_fill: AtomicU64,
}

#[derive(Debug)]
struct Shard {
    grains: LruCache<GrainKey, Slot>,
    bytes: usize,
    /// Grains that were read once and are not here.
    seen: LruCache<GrainKey, ()>,
}

#[derive(Debug)]
enum Slot {
    /// On its way: the fill's number, and the bytes that it will take.
    Filling(u64, usize),
    Filled(Arc<[u8]>),
}

/// What the cache knows of a grain.
#[derive(Debug)]
pub(crate) enum Cached {
    /// Its bytes.
    Hit(Arc<[u8]>),
    /// Nothing, but it is worth having: read it whole and hand it to [`GrainCache::fill`].
    Fill(Fill),
    /// Nothing.
    Miss,
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
        // The list of grains takes its memory at once: bounded, whatever budget was asked for.
        let seen =
            std::num::NonZeroUsize::new((shard_bytes / grain).min(MAX_SEEN)).unwrap_or(std::num::NonZeroUsize::MIN);
        let shard = || Shard { grains: LruCache::unbounded(), bytes: 0, seen: LruCache::new(seen) };
        Self {
            shards: (0..shards).map(|_| Mutex::new(shard())).collect(),
            shard_bytes,
            used: AtomicUsize::new(0),
            next_fill: AtomicU64::new(0),
        }
    }

    fn shard(&self, key: GrainKey) -> Option<&Mutex<Shard>> {
        // Mixed, so that no regular pattern of grains falls into one shard. Grains are multiples of 4 KiB.
        let mixed = (key.1 >> 12 ^ u64::from(key.0.0)).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
        let count = self.shards.len() as u64;
        self.shards.get(usize::try_from(mixed.checked_rem(count)?).ok()?)
    }

    /// Looks a grain of `len` bytes up for a read of part of it.
    pub(crate) fn look_up(&self, key: GrainKey, len: usize) -> Cached {
        self.look(key, len, false)
    }

    /// The same for a grain that is dear to read, such as a compressed one: it comes in at its first read.
    pub(crate) fn look_up_eagerly(&self, key: GrainKey, len: usize) -> Cached {
        self.look(key, len, true)
    }

    /// A grain's bytes, if they are here.
    pub(crate) fn hit(&self, key: GrainKey) -> Option<Arc<[u8]>> {
        match locked(self.shard(key)?).grains.get(&key) {
            Some(Slot::Filled(bytes)) => Some(Arc::clone(bytes)),
            Some(Slot::Filling(..)) | None => None,
        }
    }

    /// Whether the budget is large enough for any grain.
    pub(crate) fn keeps_grains(&self) -> bool {
        !self.shards.is_empty()
    }

    fn look(&self, key: GrainKey, len: usize, eager: bool) -> Cached {
        let Some(shard) = self.shard(key) else { return Cached::Miss };
        let mut shard = locked(shard);
        match shard.grains.get(&key) {
            Some(Slot::Filled(bytes)) => return Cached::Hit(Arc::clone(bytes)),
            Some(Slot::Filling(..)) => return Cached::Miss,
            None => {}
        }
        if !eager && shard.seen.pop(&key).is_none() {
            shard.seen.put(key, ());
            return Cached::Miss;
        }
        let id = self.next_fill.fetch_add(1, Ordering::Relaxed);
        // Before the grain is read: a change that finds the count at 0 was complete before that read.
        self.used.fetch_add(1, Ordering::SeqCst);
        shard.grains.put(key, Slot::Filling(id, len));
        shard.bytes += len;
        while shard.bytes > self.shard_bytes {
            let Some((&oldest, _)) = shard.grains.peek_lru() else { break };
            self.remove(&mut shard, oldest);
        }
        if !shard.grains.contains(&key) {
            return Cached::Miss;
        }
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
            Some(bytes) if bytes.len() == len => *slot = Slot::Filled(bytes),
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
            shard.bytes -= match slot {
                Slot::Filled(bytes) => bytes.len(),
                Slot::Filling(_, len) => len,
            };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: GrainKey = (FileId(0), 65536);

    fn grain(byte: u8) -> Option<Arc<[u8]>> {
        Some(Arc::from(vec![byte; 4096]))
    }

    fn ask_twice(cache: &GrainCache, key: GrainKey) -> Fill {
        assert!(matches!(cache.look_up(key, 4096), Cached::Miss));
        match cache.look_up(key, 4096) {
            Cached::Fill(fill) => fill,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_second_read_fills_and_the_third_hits() {
        let cache = GrainCache::new(1 << 20, 4096);
        let fill = ask_twice(&cache, KEY);
        cache.fill(&fill, grain(7));
        assert!(matches!(cache.look_up(KEY, 4096), Cached::Hit(b) if b[0] == 7));
    }

    #[test]
    fn a_fill_that_a_change_overtook_is_thrown_away() {
        let cache = GrainCache::new(1 << 20, 4096);
        let fill = ask_twice(&cache, KEY);
        cache.forget(KEY);
        cache.fill(&fill, grain(7));
        assert!(matches!(cache.look_up(KEY, 4096), Cached::Miss));
    }

    #[test]
    fn a_second_fill_does_not_revive_the_first() {
        let cache = GrainCache::new(1 << 20, 4096);
        let stale = ask_twice(&cache, KEY);
        cache.forget(KEY);
        let fresh = ask_twice(&cache, KEY);
        cache.fill(&stale, grain(1));
        assert!(matches!(cache.look_up(KEY, 4096), Cached::Miss));
        cache.fill(&fresh, grain(2));
        assert!(matches!(cache.look_up(KEY, 4096), Cached::Hit(b) if b[0] == 2));
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
            assert!(matches!(cache.look_up(KEY, 4096), Cached::Miss));
        }
        cache.forget(KEY);
    }
}
