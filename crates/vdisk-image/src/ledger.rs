//! The ledger: entries that changed and are not durable yet, in memory that outlives the process and not the power.
//!
//! A write that was acknowledged survives the death of the process that served it: its data is in the host's page cache, and what
//! names the data is here until a flush has made it durable. It may not be in the file before (an entry must never be durable
//! before its grain), and after a power cut it must be gone with the data: so the memory is a mapped file in `/run`, say.
//!
//! Two halves take records in turn. A flush that is planned turns to the other half, and when it is done the first one is empty.

use crate::wait::{WaitList, locked, until, wake};
use std::fmt::Debug;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use vmdk_parse::ContentId;

/// Memory that outlives the process.
pub trait LedgerMemory: Debug + Send + Sync {
    /// The memory, [`LEDGER_WORDS`] words of it. Zeroes at first.
    fn words(&self) -> &[AtomicU64];
}

/// Records in a half: 2 GiB of new grains of 64 KiB between two flushes. A writer that finds no room flushes.
const RECORDS: usize = if cfg!(test) { 64 } else { 1 << 15 };

/// Extents that can be told apart.
pub(crate) const EXTENTS: usize = 1 << 15;

/// Words in front of the halves.
const HEAD: usize = 8;
/// Words of a record: which entry of which extent; what it says now.
const RECORD: usize = 2;
const HALF: usize = RECORDS * RECORD;

/// Words of the memory of a ledger.
pub const LEDGER_WORDS: usize = HEAD + 2 * HALF;

/// Index of words in the head. What a word means is not changed without another magic number.
const MAGIC_AT: usize = 0;
/// The content ID of the image as long as records count; and another one that it may have.
const CONTENT_ID_AT: usize = 1;
const OTHER_ID_AT: usize = 2;
/// The half that takes records.
const ACTIVE_AT: usize = 3;
/// Of each half its number of records, and above 32 bits how often it was emptied.
const COUNT_AT: usize = 4;

const MAGIC: u64 = u64::from_le_bytes(*b"vdisk\0\0\x02");
/// In its place.
const VOID: u64 = u64::from_le_bytes(*b"vdisk\0\0\0");

/// A content ID in its word: 0 is none.
const HAS_ID: u64 = 1 << 32;
/// In the first word of a record: it is about a directory.
const TABLE: u64 = 1 << 63;
const EXTENT_SHIFT: u32 = 48;

/// The ledger of a disk.
#[derive(Debug)]
pub(crate) struct Ledger {
    memory: Arc<dyn LedgerMemory>,
    /// Records of the active half, and room in it that was promised.
    load: AtomicU64,
    /// Who waits until a flush would make room.
    waiting: Mutex<WaitList>,
    is_awaited: AtomicBool,
}

/// What a ledger says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Record {
    /// Which of the sparse extents of the top link.
    pub(crate) extent: usize,
    pub(crate) what: What,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum What {
    /// A grain has its place at this sector, or with sector 0 no place any more.
    Grain { grain: u64, sector: u32 },
    /// A grain table was made at this sector.
    Table { table: u64, sector: u32 },
}

/// One extent's way to the ledger.
#[derive(Debug)]
pub(crate) struct LedgerOf {
    pub(crate) ledger: Arc<Ledger>,
    pub(crate) extent: usize,
}

impl LedgerOf {
    pub(crate) fn note(&self, what: What) {
        self.ledger.note(Record { extent: self.extent, what });
    }
}

/// Which half a flush has turned away from: what is in it is durable when the flush is.
#[derive(Debug)]
#[must_use]
pub(crate) struct Turned {
    half: usize,
    /// It took records until now.
    was_active: bool,
}

impl Ledger {
    pub(crate) fn new(memory: Arc<dyn LedgerMemory>) -> Self {
        Self { memory, load: AtomicU64::new(0), waiting: Mutex::default(), is_awaited: AtomicBool::new(false) }
    }

    fn word(&self, at: usize) -> Option<&AtomicU64> {
        self.memory.words().get(at)
    }

    fn get(&self, at: usize) -> u64 {
        self.word(at).map_or(0, |w| w.load(Ordering::Acquire))
    }

    fn set(&self, at: usize, value: u64) {
        if let Some(word) = self.word(at) {
            word.store(value, Ordering::Release);
        }
    }

    /// Begins a session of an image that has this content ID from its first change on.
    pub(crate) fn begin(&self, id: ContentId) {
        self.set(MAGIC_AT, 0);
        self.empty(0);
        self.empty(1);
        self.set(ACTIVE_AT, 0);
        self.load.store(0, Ordering::Release);
        self.set(CONTENT_ID_AT, HAS_ID | u64::from(id.0));
        self.set(OTHER_ID_AT, 0);
        self.set(MAGIC_AT, MAGIC);
    }

    /// The image, which has the content ID `now`, is about to get another one, and what is here still counts.
    pub(crate) fn allow(&self, now: ContentId, next: ContentId) {
        self.set(CONTENT_ID_AT, HAS_ID | u64::from(now.0));
        self.set(OTHER_ID_AT, HAS_ID | u64::from(next.0));
    }

    /// What is here must not be believed any more: the data behind it may be gone.
    pub(crate) fn void(&self) {
        self.set(MAGIC_AT, VOID);
    }

    /// Whether it was voided, and nobody has begun another session since.
    pub(crate) fn is_void(&self) -> bool {
        self.get(MAGIC_AT) == VOID
    }

    /// Whether there is anything that is not in an image, of whatever image.
    pub(crate) fn is_empty(&self) -> bool {
        self.get(MAGIC_AT) != MAGIC || (0..2).all(|half| self.records(half).next().is_none())
    }

    /// What was left here for the image with this content ID, in the order in which it happened.
    pub(crate) fn left(&self, id: ContentId) -> Vec<Record> {
        let word = HAS_ID | u64::from(id.0);
        let is_its = self.get(MAGIC_AT) == MAGIC && [self.get(CONTENT_ID_AT), self.get(OTHER_ID_AT)].contains(&word);
        if !is_its {
            return Vec::new();
        }
        let active = self.active();
        [1 - active, active].into_iter().flat_map(|half| self.records(half)).collect()
    }

    fn active(&self) -> usize {
        usize::from(self.get(ACTIVE_AT) == 1)
    }

    /// (Number of records, how often the half was emptied.)
    fn count(&self, half: usize) -> (usize, u64) {
        let word = self.get(COUNT_AT + half);
        (usize::try_from(word & u64::from(u32::MAX)).unwrap_or(RECORDS).min(RECORDS), word >> 32)
    }

    fn empty(&self, half: usize) {
        let (_, emptied) = self.count(half);
        self.set(COUNT_AT + half, ((emptied + 1) & u64::from(u32::MAX)) << 32);
    }

    fn records(&self, half: usize) -> impl Iterator<Item = Record> {
        let (count, emptied) = self.count(half);
        (0..count).filter_map(move |n| {
            let at = HEAD + half * HALF + n * RECORD;
            let (which, says) = (self.get(at), self.get(at + 1));
            // The process may have died between the count and the record.
            if says >> 32 != emptied {
                return None;
            }
            #[expect(clippy::cast_possible_truncation, reason = "the low half")]
            let sector = says as u32;
            let number = which & ((1 << EXTENT_SHIFT) - 1);
            let extent = usize::try_from(which >> EXTENT_SHIFT & 0x7fff).ok()?;
            let what = match which & TABLE {
                0 => What::Grain { grain: number, sector },
                _ => What::Table { table: number, sector },
            };
            Some(Record { extent, what })
        })
    }

    /// Promises room for so many records. `false`: there is none before the next flush.
    pub(crate) fn claim(&self, count: u64) -> bool {
        if self.load.fetch_add(count, Ordering::AcqRel) + count <= RECORDS as u64 {
            return true;
        }
        self.unclaim(count);
        false
    }

    /// Takes a promise back.
    pub(crate) fn unclaim(&self, count: u64) {
        self.load.fetch_sub(count, Ordering::SeqCst);
        self.wake();
    }

    /// Waits until a flush makes room: while there are promises only, there is nothing for it to do.
    pub(crate) async fn wait_for_records(&self) {
        until(&self.waiting, |list| {
            // Before the look: who changes what is seen here then knows that it is awaited.
            self.is_awaited.store(true, Ordering::SeqCst);
            match self.records_there() || self.load.load(Ordering::SeqCst) == 0 {
                true => Ok(()),
                false => Err(list),
            }
        })
        .await;
    }

    fn records_there(&self) -> bool {
        (0..2).any(|half| self.count(half).0 > 0)
    }

    /// Under an extent's lock too: a waker only queues its task.
    fn wake(&self) {
        if self.is_awaited.swap(false, Ordering::SeqCst) {
            let wakers = locked(&self.waiting).take();
            wake(wakers);
        }
    }

    /// Records for which a promise can be had at all.
    pub(crate) fn most() -> u64 {
        RECORDS as u64 / 4
    }

    /// Writes a promised record. Under the extent's lock, with the change itself: a plan to flush has either both or none, or
    /// the record is in the half that the flush has turned to.
    fn note(&self, record: Record) {
        let half = self.active();
        let Some(count) = self.word(COUNT_AT + half) else { return };
        let before = count.fetch_add(1, Ordering::SeqCst);
        let Some(n) = usize::try_from(before & u64::from(u32::MAX)).ok().filter(|n| *n < RECORDS) else {
            // Not promised, which nobody does.
            tracing::error!("the ledger is full");
            return;
        };
        let (kind, number, sector) = match record.what {
            What::Grain { grain, sector } => (0, grain, sector),
            What::Table { table, sector } => (TABLE, table, sector),
        };
        let at = HEAD + half * HALF + n * RECORD;
        self.set(at, kind | (record.extent as u64) << EXTENT_SHIFT | number);
        self.set(at + 1, before >> 32 << 32 | u64::from(sector));
        self.wake();
    }

    /// A flush is about to be planned, by one task at a time.
    pub(crate) fn turn(&self) -> Turned {
        let active = self.active();
        let other = 1 - active;
        let (count, _) = self.count(other);
        // Left by a flush that could not be done: this one covers what is in it. Both are not turned at once.
        if count == 0 {
            self.set(ACTIVE_AT, other as u64);
            return Turned { half: active, was_active: true };
        }
        Turned { half: other, was_active: false }
    }

    /// The flush is planned. Whoever was writing a record when it turned has written it by now, as the plan took his extent's lock.
    pub(crate) fn planned(&self, turned: &Turned) {
        if turned.was_active {
            self.load.fetch_sub(self.count(turned.half).0 as u64, Ordering::AcqRel);
        }
    }

    /// The flush is done.
    pub(crate) fn settle(&self, turned: &Turned) {
        self.empty(turned.half);
    }
}
