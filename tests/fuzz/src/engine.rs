//! Files in memory whose holes take none, so that a small input can be a large image.
//!
//! It is stricter than a host: what only a bug can ask for is a panic and not an error. The files of an image do not change
//! under it here, so nothing has an excuse to read past the end of one, or to change one that it did not open for that.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::future::poll_fn;
use std::io;
use std::ops::Range;
use std::task::Poll;
use vdisk_image::{FileId, FileIo, Files, Stored};

/// Bytes that are stored together.
const PAGE: u64 = 4096;

/// Pages of all files at most: behind that the host is full.
const MAX_PAGES: usize = 8192;

/// A file with holes.
#[derive(Clone, Debug)]
pub struct HoleyFile {
    /// Without directories.
    pub name: String,
    len: u64,
    pages: BTreeMap<u64, Box<[u8]>>,
}

impl HoleyFile {
    /// A file of these bytes.
    pub fn new(name: &str, bytes: &[u8]) -> Self {
        let mut file = Self { name: name.to_owned(), len: 0, pages: BTreeMap::new() };
        file.put(0, bytes);
        file
    }

    /// Stores bytes; the file grows if need be.
    pub fn put(&mut self, at: u64, mut bytes: &[u8]) {
        let mut at = at;
        self.len = self.len.max(at + bytes.len() as u64);
        while !bytes.is_empty() {
            let skip = (at % PAGE) as usize;
            let (piece, rest) = bytes.split_at(bytes.len().min(PAGE as usize - skip));
            let page = self.pages.entry(at / PAGE).or_insert_with(|| vec![0; PAGE as usize].into());
            page[skip..skip + piece.len()].copy_from_slice(piece);
            at += piece.len() as u64;
            bytes = rest;
        }
    }

    /// Cuts the file, or extends it by a hole.
    pub fn set_len(&mut self, len: u64) {
        if len < self.len {
            self.zero(len, self.len - len);
            self.pages.split_off(&len.div_ceil(PAGE));
        }
        self.len = len;
    }

    fn take(&self, at: u64, bytes: &mut [u8]) {
        let mut done = 0;
        while done < bytes.len() {
            let at = at + done as u64;
            let skip = (at % PAGE) as usize;
            let piece = (bytes.len() - done).min(PAGE as usize - skip);
            match self.pages.get(&(at / PAGE)) {
                Some(page) => bytes[done..done + piece].copy_from_slice(&page[skip..skip + piece]),
                None => bytes[done..done + piece].fill(0),
            }
            done += piece;
        }
    }

    fn zero(&mut self, at: u64, len: u64) {
        let end = at + len;
        for (n, page) in self.pages.range_mut(at / PAGE..end.div_ceil(PAGE)) {
            let start = n * PAGE;
            let (from, to) = (at.max(start) - start, end.min(start + PAGE) - start);
            page[from as usize..to as usize].fill(0);
        }
        self.pages.retain(|n, page| n * PAGE < at || n * PAGE >= end || page.iter().any(|b| *b != 0));
    }

    fn stored_at(&self, at: u64) -> Stored {
        let page = at / PAGE;
        let hole = !self.pages.contains_key(&page);
        let next = match hole {
            true => self.pages.range(page..).next().map(|(n, _)| *n),
            false => Some((page..).find(|n| !self.pages.contains_key(n)).unwrap_or(u64::MAX)),
        };
        Stored { hole, len: next.map_or(u64::MAX, |n| n * PAGE) - at }
    }
}

/// Files, and how they are open.
#[derive(Debug)]
pub struct Engine {
    files: RefCell<Vec<HoleyFile>>,
    /// By [`FileId`]: which file, and whether for writing.
    open: RefCell<Vec<(usize, bool)>>,
    /// Decides how operations interleave.
    random: Cell<u32>,
}

impl Engine {
    /// An engine for an image of these files, of which the first is its own.
    pub fn new(files: Vec<HoleyFile>, seed: u8) -> Self {
        Self { files: files.into(), open: RefCell::default(), random: Cell::new(u32::from(seed) << 8 | 1) }
    }

    /// Closes all files, and opens the first one as the image.
    pub fn reopen(&self, writable: bool) -> FileId {
        *self.open.borrow_mut() = vec![(0, writable)];
        FileId(0)
    }

    /// Bytes of memory that the files take.
    pub fn held(&self) -> usize {
        self.files.borrow().iter().map(|f| f.pages.len() * (PAGE as usize + 64)).sum()
    }

    /// Lets others go first, sometimes.
    async fn call(&self) {
        let mut x = self.random.get();
        x ^= x << 13;
        x ^= x >> 17;
        x ^= x << 5;
        self.random.set(x);
        for _ in 0..(x >> 8) % 3 {
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
    }

    fn with<T>(&self, file: FileId, f: impl FnOnce(&mut HoleyFile) -> T) -> T {
        let (n, _) = self.open.borrow()[file.0 as usize];
        f(&mut self.files.borrow_mut()[n])
    }

    fn change(&self, file: FileId, end: u64, bytes: usize, f: impl FnOnce(&mut HoleyFile)) -> io::Result<()> {
        let (n, writable) = self.open.borrow()[file.0 as usize];
        let mut files = self.files.borrow_mut();
        assert!(writable, "a change to {}, which is not open for that", files[n].name);
        let pages: usize = files.iter().map(|f| f.pages.len()).sum();
        if end > i64::MAX as u64 || (bytes > 0 && pages > MAX_PAGES) {
            return Err(io::ErrorKind::StorageFull.into());
        }
        f(&mut files[n]);
        Ok(())
    }

    /// As the host's files behave: one that is written is open once.
    fn add(&self, name: &str, writable: bool, alone: bool) -> io::Result<FileId> {
        let n = self.files.borrow().iter().position(|f| f.name == name).ok_or(io::ErrorKind::NotFound)?;
        let mut open = self.open.borrow_mut();
        if open.iter().any(|(other, w)| *other == n && (alone || writable || *w)) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        open.push((n, writable));
        Ok(FileId(open.len() as u32 - 1))
    }
}

impl FileIo for Engine {
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
        self.call().await;
        self.with(file, |f| {
            let end = offset.checked_add(part.len() as u64);
            let inside = part.is_empty() || end.is_some_and(|end| end <= f.len);
            assert!(inside, "{} bytes at {offset} of {} are read, which has {}", part.len(), f.name, f.len);
            f.take(offset, &mut buf.borrow_mut()[part]);
        });
        Ok(())
    }

    async fn write_at(&self, file: FileId, buf: &Self::Buf, part: Range<usize>, offset: u64) -> io::Result<()> {
        self.call().await;
        self.change(file, offset + part.len() as u64, part.len(), |f| f.put(offset, &buf.borrow()[part]))
    }

    async fn sync_data(&self, _file: FileId) -> io::Result<()> {
        self.call().await;
        Ok(())
    }

    async fn punch_hole(&self, file: FileId, offset: u64, len: u64) -> io::Result<()> {
        self.call().await;
        self.change(file, 0, 0, |f| f.zero(offset, len))
    }

    async fn reserve(&self, _: FileId, _: u64, _: u64) -> io::Result<()> {
        self.call().await;
        Err(io::ErrorKind::Unsupported.into())
    }

    async fn zero_range(&self, file: FileId, offset: u64, len: u64) -> io::Result<()> {
        self.punch_hole(file, offset, len).await
    }

    async fn stored_at(&self, file: FileId, offset: u64) -> io::Result<Stored> {
        self.call().await;
        Ok(self.with(file, |f| f.stored_at(offset)))
    }

    async fn set_len(&self, file: FileId, len: u64) -> io::Result<()> {
        self.call().await;
        self.change(file, len, 0, |f| f.set_len(len))
    }
}

impl Files for Engine {
    fn open(&self, _by: FileId, name: &str, writable: bool) -> io::Result<FileId> {
        self.add(name, writable, false)
    }

    fn open_parent(&self, _by: FileId, hint: &str) -> io::Result<FileId> {
        self.add(hint, false, true)
    }

    fn len(&self, file: FileId) -> io::Result<u64> {
        Ok(self.with(file, |f| f.len))
    }

    fn name(&self, file: FileId) -> String {
        self.with(file, |f| f.name.clone())
    }
}
