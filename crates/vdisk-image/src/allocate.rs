//! Where new grains go, and who is writing them.
//!
//! A writer of absent grains takes a [`Ticket`], writes, and publishes. Until then nobody sees the grains; a second
//! writer of one of them waits. Nothing here is held across an await but the ticket itself.

use crate::coding::Entry;
use crate::error::{DiskError, ErrorKind};
use crate::file_io::FileId;
use crate::free::{FreeSpace, Place};
use crate::ledger::{Ledger, What};
use crate::sparse::{Lookup, MetaRef, Sparse};
use crate::table::{PAGE_ENTRIES, SECTOR_ENTRIES, Table, TableCopy};
use crate::wait::{WaitList, locked, until, wake};
use smallvec::SmallVec;
use std::collections::{BTreeSet, HashMap, VecDeque};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use vmdk_parse::SECTOR_SIZE;

/// How far a file is extended at once, and its space taken: by 1/256 of what it has, within these limits. Few calls for many
/// grains, and no image takes much more of the host than it needs. What is left over is cut off at detach. Tests extend often.
const LEAST_GROWTH: u64 = if cfg!(test) { 64 << 10 } else { 1 << 20 };
pub(crate) const GROWTH: u64 = if cfg!(test) { 64 << 10 } else { 16 << 20 };

/// End of what grain table entries can name, in bytes of the file.
pub(crate) const ADDRESSABLE: u64 = u32::MAX as u64 * SECTOR_SIZE;

/// What changes in an extent. Behind its lock, which is never held across an await or an I/O.
#[derive(Debug, Default)]
pub(crate) struct State {
    /// First byte that was never given out; `None` until the tables were looked through.
    pub(crate) next: Option<u64>,
    /// Places in front of that which nothing names: they are given out first.
    pub(crate) free: FreeSpace,
    /// Places that the next flush makes free.
    pub(crate) freed: Vec<Place>,
    /// Grains that are being written for the first time, and who waits for them.
    pub(crate) busy: HashMap<u64, WaitList>,
    /// The file is being extended.
    growing: Option<WaitList>,
    /// Room for new grain tables.
    table_room: Range<u64>,
    /// The table, and the end of the room, that the host has space for.
    room_for: Option<(u64, u64)>,
    /// Tables with dirty sectors.
    pub(crate) dirty: Vec<u64>,
    /// Sectors of the directory that name tables which it did not name before.
    pub(crate) dirty_gd: BTreeSet<u64>,
    /// Memory that the tables take, and the pages of the directory.
    pub(crate) table_bytes: usize,
    pub(crate) page_bytes: usize,
    /// Pages of the directory in memory, in the order in which their clock hand passes them.
    pub(crate) page_clock: VecDeque<u64>,
    /// Tables in memory, in the order in which the clock hand passes them.
    pub(crate) clock: VecDeque<u64>,
}

/// The right to write the absent grains `first..first + count` of a table to `place` in the extent's file.
#[derive(Debug)]
pub(crate) struct Ticket<'a> {
    extent: &'a Sparse,
    table: Arc<Table>,
    index: u64,
    first: u64,
    count: u64,
    /// Byte offset in the file.
    place: u64,
    /// The place reads as zeroes: what is not written need not be.
    zeroed: bool,
    done: bool,
}

/// A part of fresh grains that a write does not cover.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rest {
    /// In the extent.
    pub(crate) offset: u64,
    pub(crate) len: u64,
    /// Byte offset in the file.
    pub(crate) at: u64,
    /// What is below in the chain is to be seen there; else zeroes.
    pub(crate) from_below: bool,
}

/// What a writer has to do next.
#[derive(Debug)]
pub(crate) enum Plan<'a> {
    /// Write here: the grain is there already, or the ticket says where it will be. `len` is the part that this covers.
    Write { offset: u64, len: u64, ticket: Option<Ticket<'a>> },
    /// Read this first.
    Need(MetaRef),
    /// Another request is writing this grain for the first time.
    Wait(u64),
    /// The file has to be extended first; see [`Sparse::grow`].
    Grow,
    /// The host's space for a table has to be taken first.
    Reserve(Room),
    /// The ledger is full: a flush has to empty it first.
    Flush,
}

/// Lengths of an extent's file.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Growth {
    /// As it is.
    pub(crate) from: u64,
    /// As it has to be at least.
    pub(crate) needed: u64,
    /// As it is better.
    pub(crate) wanted: u64,
}

/// Places of grains in a row that were given out.
#[derive(Clone, Copy, Debug)]
struct Given {
    /// Byte offset.
    at: u64,
    /// Grains.
    count: u64,
    zeroed: bool,
}

/// The host's space that a table needs before it changes or is made. Answered by [`Sparse::reserved`].
#[derive(Debug)]
pub(crate) struct Room {
    index: u64,
    /// The table, if there is one already.
    table: Option<Arc<Table>>,
    /// The end of the room for new tables.
    end: u64,
    /// Where the metadata is: (byte offset, bytes).
    pub(crate) ranges: SmallVec<[(u64, u64); 4]>,
}

impl Sparse {
    /// Says where a write of `len` bytes at `offset` begins. The answer may cover less than was asked for.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Corrupt`] from the tables, [`ErrorKind::NoSpace`] if the format cannot address more.
    pub(crate) fn plan_write(&self, offset: u64, len: u64) -> Result<Plan<'_>, DiskError> {
        let (index, _, skip) = self.split(offset);
        let grain = offset / self.grain;
        let mut state = locked(&self.state);
        if state.busy.contains_key(&grain) {
            return Ok(Plan::Wait(grain));
        }
        match self.map(offset, len)? {
            crate::image::Mapping::NeedMeta(meta) => return Ok(Plan::Need(meta)),
            crate::image::Mapping::Data { offset, len, .. } => return Ok(Plan::Write { offset, len, ticket: None }),
            // Of the extent itself, which may be written, and not of its place.
            crate::image::Mapping::Zero { .. }
            | crate::image::Mapping::Parent { .. }
            | crate::image::Mapping::Barred { .. } => {}
            crate::image::Mapping::Compressed { record, .. } => return Err(self.compressed(record.at)),
        }
        let table = match self.table(index, Arc::clone) {
            Lookup::Table(t) => t,
            Lookup::Need(meta) => return Ok(Plan::Need(meta)),
            Lookup::Absent => match self.new_table(&mut state, index)? {
                Ok(t) => t,
                Err(first) => return Ok(first),
            },
        };
        if self.has_place(&table, grain) {
            // The last grain of a file that ends inside it: it has a place already, the file only has to reach it.
            return Ok(Plan::Grow);
        }
        if table.copy == TableCopy::Broken {
            return Err(DiskError::new(
                ErrorKind::Corrupt,
                format!("{}: grain table {index} has no redundant copy that could be kept the same", self.name),
            ));
        }
        if !table.is_reserved() {
            return Ok(Plan::Reserve(self.room_of(index, table)));
        }
        let wanted = (skip + len).div_ceil(self.grain).min(self.gtes - grain % self.gtes);
        let count = (0..wanted).take_while(|n| self.is_absent(&state, &table, grain + n)).count() as u64;
        let count = count.min(Ledger::most());
        if !self.claim(count) {
            return Ok(Plan::Flush);
        }
        let taken = self.take_places(&mut state, count);
        self.unclaim(count - taken.as_ref().map_or(0, |t| t.as_ref().map_or(0, |t| t.count)));
        let Some(Given { at: place, count, zeroed }) = taken? else { return Ok(Plan::Grow) };
        for g in grain..grain + count {
            state.busy.insert(g, WaitList::default());
        }
        table.pin();
        let ticket = Ticket { extent: self, table, index, first: grain, count, place, zeroed, done: false };
        Ok(Plan::Write { offset: place + skip, len: len.min(count * self.grain - skip), ticket: Some(ticket) })
    }

    /// Promises the ledger so many records. `false`: it has no room for them.
    pub(crate) fn claim(&self, count: u64) -> bool {
        self.ledger.as_ref().is_none_or(|l| l.ledger.claim(count))
    }

    fn unclaim(&self, count: u64) {
        if let Some(l) = &self.ledger {
            l.ledger.unclaim(count);
        }
    }

    pub(crate) fn note(&self, what: What) {
        if let Some(l) = &self.ledger {
            l.note(what);
        }
    }

    /// What a table in memory needs.
    pub(crate) fn room_of(&self, index: u64, table: Arc<Table>) -> Room {
        let bytes = self.table_bytes();
        let copy = match table.copy {
            TableCopy::At(at) => Some((at, bytes)),
            TableCopy::None | TableCopy::Broken => None,
        };
        let ranges = [(table.at, bytes)].into_iter().chain(copy).collect();
        Room { index, table: Some(table), end: 0, ranges }
    }

    /// What a table that does not exist needs: all that is left of the room for such tables, and its entries in the directories.
    fn room_for_new(&self, state: &State, index: u64) -> Room {
        let entry = self.coding.entry_bytes();
        let entries = [Some(self.gd_at), self.rgd_at].into_iter().flatten().map(|at| (at + index * entry, entry));
        let Range { start, end } = state.table_room;
        Room { index, table: None, end, ranges: entries.chain([(start, end - start)]).collect() }
    }

    /// The host has taken the space.
    pub(crate) fn reserved(&self, room: &Room) {
        match &room.table {
            Some(table) => table.set_reserved(),
            None => locked(&self.state).room_for = Some((room.index, room.end)),
        }
    }

    /// Waits until nobody writes the grain for the first time.
    pub(crate) async fn wait_for(&self, grain: u64) {
        until(&self.state, |s| match s.busy.get_mut(&grain) {
            Some(list) => Err(list),
            None => Ok(()),
        })
        .await;
    }

    /// How far the caller must extend the file; `None` if another task did it meanwhile. The caller answers with [`Sparse::grown`].
    pub(crate) async fn grow(&self) -> Option<Growth> {
        until(&self.state, |s| {
            if s.growing.is_some() {
                // Not nested in the match on `growing`: the borrow of the list would outlive its arm.
                return s.growing.as_mut().map_or(Ok(Err(())), Err);
            }
            let align = self.coding.alignment(self.grain);
            let needed = s.next.unwrap_or(0) + self.grain.max(self.table_room());
            let len = self.file_len.load(Ordering::Relaxed);
            if len >= needed && len.is_multiple_of(align) {
                return Ok(Err(()));
            }
            s.growing = Some(WaitList::default());
            let needed = needed.max(len).next_multiple_of(align);
            let step = (needed / 256).clamp(LEAST_GROWTH, GROWTH).next_multiple_of(self.grain);
            Ok(Ok(Growth { from: len, needed, wanted: needed + step }))
        })
        .await
        .ok()
    }

    /// The file was extended to `len`, or could not be.
    pub(crate) fn grown(&self, len: Option<u64>) {
        let mut state = locked(&self.state);
        if let Some(len) = len {
            self.file_len.fetch_max(len, Ordering::Release);
        }
        let wakers = state.growing.take().map(|mut list| list.take());
        drop(state);
        wake(wakers.unwrap_or_default());
    }

    /// The tables were looked through: nothing is used at or after byte `end`, nor in the places that are `free`. Space is given out
    /// there.
    pub(crate) fn allocate_from(&self, end: u64, free: Vec<Place>) {
        let next = end.next_multiple_of(self.coding.alignment(self.grain));
        self.first_free.store(next, Ordering::Release);
        let mut state = locked(&self.state);
        free.into_iter().for_each(|place| state.free.insert(place));
        state.next = Some(next);
    }

    /// Whether [`Sparse::allocate_from`] was called.
    pub(crate) fn knows_its_end(&self) -> bool {
        locked(&self.state).next.is_some()
    }

    fn has_place(&self, table: &Table, grain: u64) -> bool {
        let entry = usize::try_from(grain % self.gtes).ok().and_then(|n| table.entry(n)).unwrap_or(0);
        matches!(self.coding.grain(entry), Ok(Entry::At(_)))
    }

    fn is_absent(&self, state: &State, table: &Table, grain: u64) -> bool {
        !self.has_place(table, grain) && !state.busy.contains_key(&grain)
    }

    /// Room for up to `count` grains, where others were if there is such. `None` if the file has to be extended first.
    fn take_places(&self, state: &mut State, count: u64) -> Result<Option<Given>, DiskError> {
        if let Some(Place { at, len, zeroed }) = state.free.take(self.grain, count) {
            return Ok(Some(Given { at, count: len / self.grain, zeroed }));
        }
        let new = self.take_room(state, self.grain, count)?;
        Ok(new.map(|(at, count)| Given { at, count, zeroed: true }))
    }

    /// Room for up to `count` units of `unit` bytes that was never used: (byte offset, units). `None` if the file has to be extended
    /// first.
    fn take_room(&self, state: &mut State, unit: u64, count: u64) -> Result<Option<(u64, u64)>, DiskError> {
        let Some(next) = state.next else {
            return Err(DiskError::new(ErrorKind::Poisoned, format!("{}: its end is not known", self.name)));
        };
        // Entries are 32-bit sector numbers: what lies behind the last one cannot be named.
        if next + unit > ADDRESSABLE {
            let what = format!("{}: an extent's file cannot grow past 2 TiB", self.name);
            return Err(DiskError::new(ErrorKind::NoSpace, what));
        }
        let len = self.file_len.load(Ordering::Acquire).min(ADDRESSABLE);
        let count = count.min(len.saturating_sub(next) / unit);
        if count == 0 {
            return Ok(None);
        }
        state.next = Some(next + count * unit);
        Ok(Some((next, count)))
    }

    /// Bytes that are given out at once for new tables: with its copy, a table takes a whole number of grains where
    /// grains are aligned.
    fn table_room(&self) -> u64 {
        let copies = if self.rgd_at.is_some() { 2 } else { 1 };
        (self.table_bytes() * copies).next_multiple_of(self.coding.alignment(self.grain))
    }

    /// Makes the table that the directory does not have, or says what has to happen first.
    fn new_table(&self, state: &mut State, index: u64) -> Result<Result<Arc<Table>, Plan<'_>>, DiskError> {
        // Held, so that it stays.
        let Some(_page) = self.page(index) else {
            return Ok(Err(Plan::Need(MetaRef::Directory(index / PAGE_ENTRIES))));
        };
        let bytes = self.table_bytes();
        let copies = if self.rgd_at.is_some() { 2 } else { 1 };
        if state.table_room.end - state.table_room.start < bytes * copies {
            let room = self.table_room();
            let Some((place, _)) = self.take_room(state, room, 1)? else { return Ok(Err(Plan::Grow)) };
            state.table_room = place..place + room;
        }
        // Before it is made: a table that no space can be found for would be in the way of every flush.
        if state.room_for != Some((index, state.table_room.end)) {
            return Ok(Err(Plan::Reserve(self.room_for_new(state, index))));
        }
        if !self.claim(1) {
            return Ok(Err(Plan::Flush));
        }
        let at = state.table_room.start;
        state.table_room.start += bytes * copies;
        let table = self.insert_new_table(state, index, at);
        self.note(What::Table { table: index, sector: sector_number(at) });
        Ok(table.ok_or(Plan::Need(MetaRef::Directory(index / PAGE_ENTRIES))))
    }

    /// Puts an empty table into memory and its place, which the host has space for, into the directories. `None` if its page is
    /// not in memory.
    pub(crate) fn insert_new_table(&self, state: &mut State, index: u64, at: u64) -> Option<Arc<Table>> {
        let (page, slot) = self.page(index)?;
        let copy_at = self.rgd_at.map(|_| at + self.table_bytes());
        let copy = copy_at.map_or(TableCopy::None, TableCopy::At);
        let table = Arc::new(Table::new((0..self.gtes).map(|_| 0), at, copy));
        table.set_reserved();
        table.set_all_dirty();
        state.dirty.push(index);
        state.dirty_gd.insert(index / SECTOR_ENTRIES as u64);
        self.insert_locked(state, index, Arc::clone(&table));
        page.keep();
        for (directory, at) in [(&page.gd, Some(at)), (&page.rgd, copy_at)] {
            if let Some(at) = at {
                directory.set(slot, sector_number(at));
            }
        }
        Some(table)
    }
}

/// The sector number of a place that [`Sparse::take_room`] gave out.
#[expect(clippy::cast_possible_truncation, reason = "take_room gives out nothing behind ADDRESSABLE")]
pub(crate) fn sector_number(at: u64) -> u32 {
    (at / SECTOR_SIZE) as u32
}

impl Ticket<'_> {
    /// The grains are written: shows them to everybody.
    pub(crate) fn publish(mut self) {
        let mut state = locked(&self.extent.state);
        let mut was_clean = false;
        for n in 0..self.count {
            let entry = usize::try_from((self.first + n) % self.extent.gtes).unwrap_or(0);
            let (grain, sector) = (self.first + n, sector_number(self.place + n * self.extent.grain));
            self.extent.note(What::Grain { grain, sector });
            was_clean |= self.table.set(entry, sector);
        }
        if was_clean {
            state.dirty.push(self.index);
        }
        self.finish(&mut state);
    }

    /// What a write of `len` bytes at `offset` of the extent leaves of the grains, before and behind it, and has to be written all
    /// the same: where `has_parents`, the parent is to be seen there, and where the place is not zeroes, zeroes are.
    pub(crate) fn rest(&self, offset: u64, len: u64, has_parents: bool) -> impl Iterator<Item = Rest> {
        let grain = self.extent.grain;
        let (start, end) = (self.first * grain, (self.first + self.count) * grain);
        let parts = [(self.first, start, offset), (self.first + self.count - 1, offset + len, end)];
        parts.into_iter().filter(|(_, from, to)| from < to).filter_map(move |(n, from, to)| {
            let from_below = has_parents && !self.is_zeroed(n);
            let rest = Rest { offset: from, len: to - from, at: self.at(from), from_below };
            (from_below || !self.zeroed).then_some(rest)
        })
    }

    /// Byte offset in the file of an offset in the extent that lies in the grains.
    pub(crate) fn at(&self, offset: u64) -> u64 {
        self.place + (offset - self.first * self.extent.grain)
    }

    /// Whether the place reads as zeroes.
    pub(crate) fn is_zero_filled(&self) -> bool {
        self.zeroed
    }

    /// Whether the grain is marked as zeroes, which hide the parent.
    fn is_zeroed(&self, grain: u64) -> bool {
        let entry = usize::try_from(grain % self.extent.gtes).ok().and_then(|n| self.table.entry(n)).unwrap_or(0);
        matches!(self.extent.coding.grain(entry), Ok(Entry::Zeroed))
    }

    /// The file that the place is in.
    pub(crate) fn file(&self) -> FileId {
        self.extent.file
    }

    /// The place of the grains: (byte offset in the file, bytes).
    pub(crate) fn place(&self) -> (u64, u64) {
        (self.place, self.count * self.extent.grain)
    }

    /// Nothing was written to the place.
    pub(crate) fn give_back(self) {
        let zeroed = self.zeroed;
        self.give_back_as(zeroed);
    }

    /// The grains could not be written. With `zeroed` their place reads as zeroes again; else it holds anything.
    pub(crate) fn give_back_as(mut self, zeroed: bool) {
        let mut state = locked(&self.extent.state);
        let (at, len) = self.place();
        if zeroed && state.next == Some(at + len) {
            state.next = Some(at);
        } else {
            state.free.insert(Place { at, len, zeroed });
        }
        self.extent.unclaim(self.count);
        self.finish(&mut state);
    }

    fn finish(&mut self, state: &mut State) {
        self.done = true;
        self.table.unpin();
        for grain in self.first..self.first + self.count {
            // Woken under the lock: a waker only queues its task, and a waiter takes this lock when it runs.
            wake(state.busy.remove(&grain).map(|mut list| list.take()).unwrap_or_default());
        }
    }
}

impl Drop for Ticket<'_> {
    /// A ticket that was neither published nor given back: its place is leaked, since what it holds is not known.
    fn drop(&mut self) {
        if !self.done {
            let extent = self.extent;
            extent.unclaim(self.count);
            self.finish(&mut locked(&extent.state));
        }
    }
}
