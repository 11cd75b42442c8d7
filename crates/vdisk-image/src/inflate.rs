//! From the record of a compressed grain to its bytes.
//!
//! Whatever a record or the header says, memory is bounded: input and output go through small windows, and a grain is
//! gathered as a whole only where it is small enough for the cache. Then it is inflated by any processor that is idle: the grains of
//! a request, and of requests, at the same time.

use crate::cache::{Cached, GrainKey, MAX_GRAIN};
use crate::disk::{Disk, size};
use crate::error::{DiskError, ErrorKind};
use crate::file_io::{self, FileId, FileIo};
use crate::read::{fill_zero, hand_over};
use crate::wait::{WaitList, locked, until, wake};
use flate2::{Decompress, FlushDecompress, Status};
use futures_util::future::join_all;
use smallvec::SmallVec;
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::ops::Range;
use std::sync::{Arc, Mutex};
use vmdk_parse::{GrainRecord, SECTOR_SIZE, Sectors, TableGeometry};

/// Bytes of a record that are read at once: a record of a usual grain takes one read even where it could not be compressed.
const PIECE: u64 = 128 << 10;

/// Bytes that are inflated at once.
const WINDOW: u64 = 64 << 10;

/// Grains of a request that are inflated together: each takes memory.
const AT_ONCE: usize = 8;

/// And of all requests: as many processors are rarely idle.
const MOST: usize = 64;

/// A compressed grain: where it is, and what it has to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Record {
    /// Byte offset in the file.
    pub(crate) at: u64,
    /// Bytes in the file, which the record does not exceed.
    pub(crate) file_len: u64,
    /// First sector of the grain, in the extent.
    pub(crate) lba: Sectors,
    /// Of the extent.
    pub(crate) geometry: TableGeometry,
}

/// A piece of a request that is a part of a compressed grain.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Packed {
    pub(crate) file: FileId,
    pub(crate) record: Record,
    /// Byte offset in the grain.
    pub(crate) skip: u64,
    pub(crate) len: u64,
    /// Byte offset in the request's buffer.
    pub(crate) start: u64,
}

/// The compressed pieces of a request.
pub(crate) type Packs = SmallVec<[Packed; 1]>;

impl Record {
    /// Bytes of the grain when inflated.
    pub(crate) fn grain_len(&self) -> u64 {
        self.geometry.grain_size().0 * SECTOR_SIZE
    }

    /// The last grain of an extent may be stored short.
    fn may_be_short(&self) -> bool {
        self.geometry.capacity().0.saturating_sub(self.lba.0) <= self.geometry.grain_size().0
    }
}

impl Disk {
    /// Reads pieces of compressed grains into the request's buffer.
    pub(crate) async fn read_packed<I: FileIo>(&self, io: &I, packs: &[Packed], buf: &I::Buf) -> Result<(), DiskError> {
        for some in packs.chunks(AT_ONCE) {
            let results = join_all(some.iter().map(|pack| self.read_pack(io, pack, buf))).await;
            results.into_iter().collect::<Result<(), _>>()?;
        }
        Ok(())
    }

    async fn read_pack<I: FileIo>(&self, io: &I, pack: &Packed, buf: &I::Buf) -> Result<(), DiskError> {
        let grain = pack.record.grain_len();
        if grain > MAX_GRAIN {
            return self.read_large(io, pack, buf).await;
        }
        let copy = |bytes: &[u8]| match bytes.get(size(pack.skip)..size(pack.skip + pack.len)) {
            Some(part) => hand_over(io, buf, pack.start, part),
            None => Ok(()),
        };
        // At the first read already, and by one of those who want it: a grain of which small parts are read one after the
        // other, or together, is inflated once. The key is the grain and not its record: two entries may name one record,
        // which is that of one of them only.
        let key = (pack.file, pack.record.lba.0 * SECTOR_SIZE);
        let claim = loop {
            if let Some(bytes) = self.cache.hit(key) {
                return copy(&bytes);
            }
            if !self.cache.keeps_grains() {
                break None;
            }
            match Claim::new(&self.inflating, key) {
                Some(claim) => break Some(claim),
                None => self.wait_for_inflated(key).await,
            }
        };
        let fill = match self.cache.look_up_eagerly(key, size(grain)) {
            Cached::Hit(bytes) => return copy(&bytes),
            Cached::Fill(fill) => Some(fill),
            Cached::Miss | Cached::Coming => None,
        };
        let inflated = self.inflate_whole(io, pack.file, &pack.record).await;
        let copied = inflated.as_deref().map_or(Ok(()), copy);
        let (bytes, result) = match inflated {
            Ok(bytes) => (Some(bytes), copied),
            Err(e) => (None, Err(e)),
        };
        if let Some(fill) = fill {
            self.cache.fill(&fill, bytes.map(Arc::from));
        }
        // Not before the cache has it.
        drop(claim);
        result
    }

    /// The bytes of a grain of at most [`MAX_GRAIN`] bytes.
    async fn inflate_whole<I: FileIo>(&self, io: &I, file: FileId, record: &Record) -> Result<Vec<u8>, DiskError> {
        let _slot = Slot::take(&self.slots).await;
        let grain = record.grain_len();
        let mut bytes = Vec::new();
        let feed = async |mut fed: Fed| {
            let mut gathered = std::mem::take(&mut bytes);
            let work = move || {
                let ended = fed.run(grain, &mut |_, more| gathered.extend_from_slice(more));
                (fed, ended, gathered)
            };
            let (fed, ended, gathered) = io.compute(work).await;
            bytes = gathered;
            (fed, ended)
        };
        self.inflate_by(io, file, record, grain, feed).await?;
        bytes.resize(size(grain), 0);
        Ok(bytes)
    }

    async fn wait_for_inflated(&self, key: GrainKey) {
        until(&self.inflating, |i| match i.get_mut(&key) {
            Some(list) => Err(list),
            None => Ok(()),
        })
        .await;
    }

    /// Reads from a grain that is too large to be kept. What comes behind the wanted part is not looked at.
    async fn read_large<I: FileIo>(&self, io: &I, pack: &Packed, buf: &I::Buf) -> Result<(), DiskError> {
        let end = pack.skip + pack.len;
        fill_zero(io, buf, pack.start, pack.len)?;
        let mut copied = Ok(());
        let inflated = self.inflate(io, pack.file, &pack.record, end, |at, bytes| {
            // The overlap of what is here, from `at` on, with what is wanted.
            let from = pack.skip.max(at);
            let to = end.min(at + bytes.len() as u64);
            if copied.is_ok()
                && from < to
                && let Some(part) = bytes.get(size(from - at)..size(to - at))
            {
                copied = hand_over(io, buf, pack.start + from - pack.skip, part);
            }
        });
        inflated.await?;
        copied
    }

    /// Inflates a grain until it ends, or until more than `enough` bytes of it are known. `take` gets the bytes in order
    /// with their offset in the grain; what it does not get of a good grain is zeroes.
    pub(crate) async fn inflate<I: FileIo>(
        &self,
        io: &I,
        file: FileId,
        record: &Record,
        enough: u64,
        mut take: impl FnMut(u64, &[u8]),
    ) -> Result<(), DiskError> {
        let feed = async |mut fed: Fed| {
            let ended = fed.run(enough, &mut take);
            (fed, ended)
        };
        self.inflate_by(io, file, record, enough, feed).await
    }

    async fn inflate_by<I: FileIo>(
        &self,
        io: &I,
        file: FileId,
        record: &Record,
        enough: u64,
        mut feed: impl AsyncFnMut(Fed) -> (Fed, Result<bool, Wrong>),
    ) -> Result<(), DiskError> {
        let corrupt = |what: String| {
            DiskError::new(
                ErrorKind::Corrupt,
                format!("{}: the grain of sector {}, at byte {}: {what}", self.name(file), record.lba.0, record.at),
            )
        };
        let grain = record.grain_len();
        let head_len = GrainRecord::HEAD_LEN as u64;
        // What cannot be compressed grows a little.
        let mut piece = (grain + SECTOR_SIZE).min(PIECE).min(record.file_len.saturating_sub(record.at));
        let bytes = self.read_bytes(io, file, record.at, piece).await?;
        let head = GrainRecord::decode(&bytes).and_then(|head| head.check(&record.geometry).map(|()| head));
        let head = head.map_err(|e| corrupt("the head of its record".to_owned()).because(e))?;
        if head.lba != record.lba {
            return Err(corrupt(format!("the record says that it is the grain of sector {}", head.lba.0)));
        }
        let end = record.at + head_len + u64::from(head.len);
        if end > record.file_len {
            return Err(corrupt(format!(
                "its {} compressed bytes end past the end of the file at {}",
                head.len, record.file_len
            )));
        }
        let mut at = record.at + head_len;
        let mut fed = Fed { inflater: Inflater::new(grain), input: bytes, part: 0..0 };
        let mut skip = GrainRecord::HEAD_LEN;
        loop {
            let here = size((end - at).min((fed.input.len() - skip) as u64));
            fed.part = skip..skip + here;
            let (back, ended) = feed(fed).await;
            fed = back;
            let made = fed.inflater.made();
            match ended {
                Ok(true) if made == grain || made >= enough || record.may_be_short() => return Ok(()),
                Ok(true) => return Err(corrupt(format!("inflates to {made} bytes instead of {grain}"))),
                Ok(false) => {}
                Err(Wrong::TooLong) => return Err(corrupt(format!("inflates to more than the {grain} bytes it has"))),
                Err(Wrong::Data(e)) => return Err(corrupt("cannot be inflated".to_owned()).because(e)),
            }
            at += here as u64;
            piece = (end - at).min(PIECE);
            if piece == 0 {
                return Err(corrupt(format!("ends after {made} of {grain} bytes")));
            }
            fed.input = self.read_bytes(io, file, at, piece).await?;
            skip = 0;
        }
    }

    async fn read_bytes<I: FileIo>(&self, io: &I, file: FileId, at: u64, len: u64) -> Result<Vec<u8>, DiskError> {
        file_io::read_bytes(io, file, at, size(len))
            .await
            .map_err(|e| DiskError::host(format!("read {len} bytes at {at} of {}", self.name(file)), e))
    }
}

/// Grains that are being inflated for the cache, and who waits for them.
pub(crate) type Inflating = Mutex<HashMap<GrainKey, WaitList>>;

/// The duty to inflate a grain for all who want it. Who has it waits for nobody but the host.
struct Claim<'a> {
    inflating: &'a Inflating,
    key: GrainKey,
}

impl<'a> Claim<'a> {
    /// `None` if another task has it.
    fn new(inflating: &'a Inflating, key: GrainKey) -> Option<Self> {
        match locked(inflating).entry(key) {
            Entry::Occupied(_) => None,
            Entry::Vacant(v) => {
                v.insert(WaitList::default());
                Some(Self { inflating, key })
            }
        }
    }
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        let list = locked(self.inflating).remove(&self.key);
        wake(list.map(|mut l| l.take()).unwrap_or_default());
    }
}

/// How many grains are being inflated, and who waits for that to become less.
#[derive(Debug, Default)]
pub(crate) struct Slots {
    taken: usize,
    waiting: WaitList,
}

/// One of the [`MOST`] grains. Who has it waits for nobody but the host.
struct Slot<'a>(&'a Mutex<Slots>);

impl<'a> Slot<'a> {
    async fn take(slots: &'a Mutex<Slots>) -> Self {
        until(slots, |p| {
            if p.taken == MOST {
                return Err(&mut p.waiting);
            }
            p.taken += 1;
            Ok(())
        })
        .await;
        Self(slots)
    }
}

impl Drop for Slot<'_> {
    fn drop(&mut self) {
        let mut slots = locked(self.0);
        slots.taken -= 1;
        let wakers = slots.waiting.take();
        drop(slots);
        wake(wakers);
    }
}

/// Why a grain cannot be inflated.
enum Wrong {
    TooLong,
    Data(flate2::DecompressError),
}

/// A stream, and the piece of its input that is next.
struct Fed {
    inflater: Inflater,
    input: Vec<u8>,
    part: Range<usize>,
}

impl Fed {
    /// As [`Inflater::feed`].
    fn run(&mut self, enough: u64, take: &mut impl FnMut(u64, &[u8])) -> Result<bool, Wrong> {
        self.inflater.feed(self.input.get(self.part.clone()).unwrap_or_default(), enough, take)
    }
}

/// A zlib stream of at most `limit` bytes.
struct Inflater {
    stream: Decompress,
    window: Vec<u8>,
    limit: u64,
}

impl Inflater {
    fn new(limit: u64) -> Self {
        Self { stream: Decompress::new(true), window: vec![0; size(WINDOW.min(limit))], limit }
    }

    /// Bytes that came out.
    fn made(&self) -> u64 {
        self.stream.total_out()
    }

    /// Inflates more input. Whether the stream is at its end, or more than `enough` bytes are out.
    fn feed(&mut self, mut input: &[u8], enough: u64, take: &mut impl FnMut(u64, &[u8])) -> Result<bool, Wrong> {
        loop {
            let (used_before, made_before) = (self.stream.total_in(), self.made());
            // One byte of room behind the limit: whether the stream ends there is known by what comes out there.
            let room = size((self.limit + 1 - made_before).min(self.window.len() as u64));
            let window = self.window.get_mut(..room).unwrap_or_default();
            let status = self.stream.decompress(input, window, FlushDecompress::None).map_err(Wrong::Data)?;
            let used = size(self.stream.total_in() - used_before);
            let made = size(self.stream.total_out() - made_before);
            if self.made() > self.limit {
                return Err(Wrong::TooLong);
            }
            take(made_before, self.window.get(..made).unwrap_or_default());
            if status == Status::StreamEnd || (self.made() >= enough && enough < self.limit) {
                return Ok(true);
            }
            input = input.get(used..).unwrap_or_default();
            // Without input something may still come out; without either nothing will.
            if made == 0 && (used == 0 || input.is_empty()) {
                return Ok(false);
            }
        }
    }
}
