//! An engine in memory, for tests: operations interleave, fail on demand, and the power can be cut.

#![expect(clippy::cast_possible_truncation, reason = "sizes in tests are small, and a wrong one fails the test")]

use crate::file_io::{FileId, FileIo, Files, Stored};
use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::future::poll_fn;
use std::io;
use std::ops::Range;
use std::task::Poll;

/// Small, fast, repeatable random numbers (splitmix64).
#[derive(Debug)]
pub struct Random(Cell<u64>);

impl Random {
    /// The same numbers for the same seed.
    pub fn new(seed: u64) -> Self {
        Self(Cell::new(seed))
    }

    /// A number below `limit`, which is not 0.
    pub fn below(&self, limit: u64) -> u64 {
        self.0.set(self.0.get().wrapping_add(0x9e37_79b9_7f4a_7c15));
        let mut z = self.0.get();
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % limit
    }
}

/// A change to a file that no sync has covered.
#[derive(Clone, Debug)]
enum Change {
    Write { offset: usize, bytes: Vec<u8> },
    Zero { offset: usize, len: usize },
    SetLen(usize),
}

#[derive(Debug)]
struct MemoryFile {
    name: String,
    now: Vec<u8>,
    durable: Vec<u8>,
    /// Changes with their sequence numbers, in order.
    pending: Vec<(u64, Change)>,
    /// Opened read-only by its image.
    read_only: bool,
    /// Sectors of zeroes that the host has space for all the same.
    reserved: BTreeSet<usize>,
}

impl MemoryFile {
    /// The sectors of a range that the host has no space for: a file in memory has no holes, but sectors of zeroes will do.
    fn holes(&self, offset: usize, len: usize) -> impl Iterator<Item = usize> {
        let zero = |n: usize| self.now.iter().skip(n * 512).take(512).all(|b| *b == 0);
        (offset / 512..(offset + len).div_ceil(512)).filter(move |n| zero(*n) && !self.reserved.contains(n))
    }
}

/// Files in memory.
#[derive(Debug)]
pub struct Memory {
    files: RefCell<Vec<MemoryFile>>,
    random: Random,
    calls: Cell<u64>,
    syncs: Cell<u64>,
    /// The call with this number fails with this errno.
    pub fail_call: Cell<Option<(u64, i32)>>,
    /// From the call with this number on, nothing succeeds any more: the process was killed or the power is off.
    pub dead_from_call: Cell<u64>,
    /// Calls of the dead never end, as if there were nobody to see it, instead of failing.
    pub dead_hangs: Cell<bool>,
    /// Hole punching and zeroing are [`io::ErrorKind::Unsupported`].
    pub cannot_punch: Cell<bool>,
    /// The host is full: no sector of zeroes takes data, but those that were reserved.
    pub full: Cell<bool>,
    /// [`FileIo::reserve`] is [`io::ErrorKind::Unsupported`].
    pub cannot_reserve: Cell<bool>,
    /// The host has no space for more than so many bytes at once.
    pub reserves_at_most: Cell<u64>,
    /// No file grows past this many bytes (1 GiB at first): the host is full.
    pub full_at: Cell<u64>,
}

impl Memory {
    /// Files by name and content. `seed` decides how operations interleave.
    pub fn new(files: Vec<(String, Vec<u8>)>, seed: u64) -> Self {
        let file = |(name, now): (String, Vec<u8>)| MemoryFile {
            name,
            durable: now.clone(),
            now,
            pending: Vec::new(),
            read_only: false,
            reserved: BTreeSet::new(),
        };
        Self {
            files: RefCell::new(files.into_iter().map(file).collect()),
            random: Random::new(seed),
            calls: Cell::new(0),
            syncs: Cell::new(0),
            fail_call: Cell::new(None),
            dead_from_call: Cell::new(u64::MAX),
            dead_hangs: Cell::new(false),
            cannot_punch: Cell::new(false),
            full: Cell::new(false),
            cannot_reserve: Cell::new(false),
            reserves_at_most: Cell::new(u64::MAX),
            full_at: Cell::new(1 << 30),
        }
    }

    /// Calls to the engine so far.
    pub fn calls(&self) -> u64 {
        self.calls.get()
    }

    /// Syncs so far.
    pub fn syncs(&self) -> u64 {
        self.syncs.get()
    }

    /// The files as a process sees them.
    pub fn files(&self) -> Vec<(String, Vec<u8>)> {
        self.files.borrow().iter().map(|f| (f.name.clone(), f.now.clone())).collect()
    }

    /// The files after a power cut: of the changes that no sync covered, any subset is there, and a write may be torn
    /// between any two sectors.
    pub fn after_power_cut(&self, random: &Random) -> Vec<(String, Vec<u8>)> {
        self.files
            .borrow()
            .iter()
            .map(|f| {
                let mut bytes = f.durable.clone();
                for (_, change) in &f.pending {
                    match random.below(3) {
                        0 => {}
                        1 => apply(&mut bytes, change, |_| true),
                        _ => apply(&mut bytes, change, |_| random.below(2) == 0),
                    }
                }
                (f.name.clone(), bytes)
            })
            .collect()
    }

    /// Lets other tasks run, then counts the call, which may be the one to fail.
    async fn call(&self) -> io::Result<()> {
        for _ in 0..self.random.below(4) {
            let mut yielded = false;
            poll_fn(|cx| {
                if std::mem::replace(&mut yielded, true) {
                    return Poll::Ready(());
                }
                cx.waker().wake_by_ref();
                Poll::Pending
            })
            .await;
        }
        let n = self.calls.get();
        self.calls.set(n + 1);
        if n >= self.dead_from_call.get() {
            if self.dead_hangs.get() {
                std::future::pending::<()>().await;
            }
            return Err(io::Error::from_raw_os_error(5));
        }
        match self.fail_call.get() {
            Some((call, errno)) if call == n => Err(io::Error::from_raw_os_error(errno)),
            _ => Ok(()),
        }
    }

    fn change(&self, file: FileId, change: Change) -> io::Result<()> {
        let mut files = self.files.borrow_mut();
        let f = files.get_mut(file.0 as usize).ok_or(io::ErrorKind::NotFound)?;
        if f.read_only {
            // EBADF, as the host has it for a descriptor that was not opened for writing.
            return Err(io::Error::from_raw_os_error(9));
        }
        let grows_to = match &change {
            Change::Write { offset, bytes } => offset + bytes.len(),
            Change::SetLen(len) => *len,
            Change::Zero { .. } => 0,
        };
        if grows_to > f.now.len() && grows_to as u64 > self.full_at.get() {
            return Err(io::ErrorKind::StorageFull.into());
        }
        if let Change::Write { offset, bytes } = &change
            && self.full.get()
            && f.holes(*offset, bytes.len()).next().is_some()
        {
            return Err(io::ErrorKind::StorageFull.into());
        }
        apply(&mut f.now, &change, |_| true);
        f.pending.push((self.calls.get(), change));
        Ok(())
    }
}

/// Applies a change to the sectors that `sector` says.
fn apply(bytes: &mut Vec<u8>, change: &Change, sector: impl Fn(usize) -> bool) {
    let (offset, len) = match change {
        Change::SetLen(len) => return bytes.resize(*len, 0),
        Change::Write { offset, bytes } => (*offset, bytes.len()),
        Change::Zero { offset, len } => (*offset, (*len).min(bytes.len().saturating_sub(*offset))),
    };
    let mut at = offset;
    while at < offset + len {
        let end = ((at / 512 + 1) * 512).min(offset + len);
        if sector(at / 512) {
            if bytes.len() < end {
                bytes.resize(end, 0);
            }
            match change {
                Change::Write { bytes: new, .. } => bytes[at..end].copy_from_slice(&new[at - offset..end - offset]),
                _ => bytes[at..end].fill(0),
            }
        }
        at = end;
    }
}

impl FileIo for Memory {
    type Buf = RefCell<Vec<u8>>;

    fn alloc(&self, len: usize) -> Self::Buf {
        RefCell::new(vec![0; len])
    }

    fn copy_in(&self, buf: &Self::Buf, at: usize, bytes: &[u8]) -> io::Result<()> {
        buf.borrow_mut()[at..at + bytes.len()].copy_from_slice(bytes);
        Ok(())
    }

    fn copy_out(&self, buf: &Self::Buf, at: usize, bytes: &mut [u8]) -> io::Result<()> {
        bytes.copy_from_slice(&buf.borrow()[at..at + bytes.len()]);
        Ok(())
    }

    fn fill_zero(&self, buf: &Self::Buf, part: Range<usize>) -> io::Result<()> {
        buf.borrow_mut()[part].fill(0);
        Ok(())
    }

    async fn read_at(&self, file: FileId, buf: &Self::Buf, part: Range<usize>, offset: u64) -> io::Result<()> {
        self.call().await?;
        let files = self.files.borrow();
        let f = files.get(file.0 as usize).ok_or(io::ErrorKind::NotFound)?;
        let at = usize::try_from(offset).map_err(|_| io::ErrorKind::UnexpectedEof)?;
        let bytes = f.now.get(at..at + part.len()).ok_or(io::ErrorKind::UnexpectedEof)?;
        buf.borrow_mut()[part].copy_from_slice(bytes);
        Ok(())
    }

    async fn write_at(&self, file: FileId, buf: &Self::Buf, part: Range<usize>, offset: u64) -> io::Result<()> {
        self.call().await?;
        let bytes = buf.borrow()[part].to_vec();
        self.change(file, Change::Write { offset: offset as usize, bytes })
    }

    async fn sync_data(&self, file: FileId) -> io::Result<()> {
        // What is written while the sync runs is not covered by it.
        let covered = self.calls.get();
        self.call().await?;
        self.syncs.set(self.syncs.get() + 1);
        let mut files = self.files.borrow_mut();
        let f = files.get_mut(file.0 as usize).ok_or(io::ErrorKind::NotFound)?;
        let split = f.pending.partition_point(|(n, _)| *n <= covered);
        for (_, change) in f.pending.drain(..split) {
            apply(&mut f.durable, &change, |_| true);
        }
        Ok(())
    }

    async fn punch_hole(&self, file: FileId, offset: u64, len: u64) -> io::Result<()> {
        self.call().await?;
        if self.cannot_punch.get() {
            return Err(io::ErrorKind::Unsupported.into());
        }
        if let Some(f) = self.files.borrow_mut().get_mut(file.0 as usize) {
            let sectors = offset as usize / 512..(offset + len) as usize / 512;
            f.reserved.retain(|n| !sectors.contains(n));
        }
        self.change(file, Change::Zero { offset: offset as usize, len: len as usize })
    }

    async fn reserve(&self, file: FileId, offset: u64, len: u64) -> io::Result<()> {
        self.call().await?;
        if self.cannot_reserve.get() {
            return Err(io::ErrorKind::Unsupported.into());
        }
        let mut files = self.files.borrow_mut();
        let f = files.get_mut(file.0 as usize).ok_or(io::ErrorKind::NotFound)?;
        let holes: Vec<usize> = f.holes(offset as usize, len as usize).collect();
        if (self.full.get() && !holes.is_empty()) || len > self.reserves_at_most.get() {
            return Err(io::ErrorKind::StorageFull.into());
        }
        f.reserved.extend(holes);
        Ok(())
    }

    /// What it would zero has to be zeroes, before and after.
    async fn reserve_fresh(&self, file: FileId, offset: u64, len: u64) -> io::Result<()> {
        let check = |when: &str| {
            let files = self.files.borrow();
            let mut fresh = files[file.0 as usize].now.iter().skip(offset as usize).take(len as usize);
            assert!(fresh.all(|byte| *byte == 0), "{when}: bytes at {offset} are in use");
        };
        check("before");
        let answer = self.reserve(file, offset, len).await;
        check("after");
        answer
    }

    async fn zero_range(&self, file: FileId, offset: u64, len: u64) -> io::Result<()> {
        self.punch_hole(file, offset, len).await
    }

    /// A file in memory has no holes, but sectors of zeroes will do for one.
    async fn stored_at(&self, file: FileId, offset: u64) -> io::Result<Stored> {
        self.call().await?;
        let files = self.files.borrow();
        let f = files.get(file.0 as usize).ok_or(io::ErrorKind::NotFound)?;
        let sectors = f.now.get(offset as usize / 512 * 512..).unwrap_or_default();
        let is_zero = |sector: &[u8]| sector.iter().all(|b| *b == 0);
        let hole = sectors.chunks(512).next().is_none_or(is_zero);
        let same = sectors.chunks(512).take_while(|s| is_zero(s) == hole).count() as u64 * 512;
        let rest = if sectors.is_empty() { u64::MAX - offset } else { same - offset % 512 };
        Ok(Stored { hole, len: rest })
    }

    async fn set_len(&self, file: FileId, len: u64) -> io::Result<()> {
        self.call().await?;
        self.change(file, Change::SetLen(len as usize))
    }
}

impl Files for Memory {
    fn open_parent(&self, by: FileId, hint: &str) -> io::Result<FileId> {
        let n = self.open(by, hint, false)?;
        if n == by { Err(io::ErrorKind::InvalidInput.into()) } else { Ok(n) }
    }

    fn open(&self, _by: FileId, name: &str, writable: bool) -> io::Result<FileId> {
        let mut files = self.files.borrow_mut();
        let n = files.iter().position(|f| f.name == name).ok_or(io::ErrorKind::NotFound)?;
        files[n].read_only = !writable;
        Ok(FileId(n as u32))
    }

    fn len(&self, file: FileId) -> io::Result<u64> {
        let files = self.files.borrow();
        Ok(files.get(file.0 as usize).ok_or(io::ErrorKind::NotFound)?.now.len() as u64)
    }

    fn name(&self, file: FileId) -> String {
        self.files.borrow().get(file.0 as usize).map_or_else(String::new, |f| f.name.clone())
    }
}
