//! A sparse extent: where its grains are. Pure; what is missing in memory is asked for by a [`MetaRef`].
//!
//! Source: VMware Virtual Disk Format 1.1, "Hosted Sparse Extents". The other formats, COWD and seSparse, differ in their
//! [`Coding`] and in how they are opened.

use crate::allocate::State;
use crate::coding::{Coding, Entry};
use crate::disk::size;
use crate::error::{DiskError, ErrorKind};
use crate::file_io::FileId;
use crate::image::{Grain, Mapping};
use crate::ledger::LedgerOf;
use crate::link::DROP_TRACKING;
use crate::resident::Pages;
use crate::stream::Stream;
use crate::table::{PAGE_ENTRIES, Page, Table, TableCopy};
use crate::wait::locked;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use vmdk_parse::{GTE_SIZE, GdOffset, SECTOR_SIZE, Sectors, SparseHeader};

/// A piece of metadata of a sparse extent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum MetaRef {
    /// A page of the grain directory.
    Directory(u64),
    /// A grain table.
    Table(u64),
}

/// A sparse extent.
#[derive(Debug)]
pub(crate) struct Sparse {
    pub(crate) file: FileId,
    pub(crate) name: String,
    pub(crate) coding: Coding,
    /// What there is more of a compressed extent.
    stream: Option<Stream>,
    /// Bytes in a grain.
    pub(crate) grain: u64,
    /// Entries in a grain table.
    pub(crate) gtes: u64,
    /// Logarithms of both, if they are powers of two, as they nearly always are: every request divides by them.
    shifts: Option<(u32, u32)>,
    /// Byte offsets of the directory and its redundant copy.
    pub(crate) gd_at: u64,
    pub(crate) rgd_at: Option<u64>,
    /// Where the header says that the copy is, whether it is kept the same or not. Not checked.
    pub(crate) copy_gd: Option<u64>,
    /// Tables in the directory.
    pub(crate) tables: u64,
    /// Bytes at the beginning of the file where no grain is.
    pub(crate) overhead: u64,
    /// Where else the directories and the descriptor are: neither a table nor a grain is there.
    fixed: Vec<Range<u64>>,
    /// Where the last of them ends.
    fixed_end: u64,
    /// The header said that the extent was not closed.
    pub(crate) unclean: bool,
    /// Length of the extent's file in bytes, as far as it is known to have grown.
    pub(crate) file_len: AtomicU64,
    pub(crate) pages: Pages,
    pub(crate) state: Mutex<State>,
    /// Where changes of entries are noted that no flush has made durable.
    pub(crate) ledger: Option<LedgerOf>,
    /// Length of the file when it was opened, and where the first space was given out behind everything that any entry
    /// named. What an entry names in between is not there, however far the file grows.
    opened_len: u64,
    pub(crate) first_free: AtomicU64,
    /// Memory for grain tables, and for pages of the directory, in bytes.
    pub(crate) table_memory: usize,
    pub(crate) page_memory: usize,
}

/// What the header of a sparse extent says, of whatever format.
#[derive(Debug)]
pub(crate) struct Parts {
    pub(crate) coding: Coding,
    pub(crate) grain: u64,
    pub(crate) gtes: u64,
    pub(crate) gd_at: u64,
    pub(crate) rgd_at: Option<u64>,
    pub(crate) copy_gd: Option<u64>,
    pub(crate) tables: u64,
    pub(crate) overhead: u64,
    /// What the header places in the file beside the directory of `gd_at`.
    pub(crate) fixed: Vec<Range<u64>>,
    pub(crate) unclean: bool,
    pub(crate) stream: Option<Stream>,
}

impl Parts {
    /// A hosted sparse extent of `sectors` whose header was decoded (with `stream` if it is compressed), in a file of `file_len`
    /// bytes.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Corrupt`] if the directory does not lie in the file, [`ErrorKind::Unsupported`] unless
    /// `read_only` for what cannot be written without breaking it.
    pub(crate) fn hosted(
        name: &str,
        header: &SparseHeader,
        stream: Option<Stream>,
        sectors: Sectors,
        file_len: u64,
        read_only: bool,
    ) -> Result<Self, DiskError> {
        let corrupt = |what: String| DiskError::new(ErrorKind::Corrupt, format!("{name}: {what}"));
        let unsupported = |what: &str| DiskError::new(ErrorKind::Unsupported, format!("{name}: {what}"));
        if !read_only && header.version > 2 {
            return Err(unsupported(&format!("version 3 (change tracking) cannot be written: {DROP_TRACKING}")));
        }
        if !read_only && header.gtes_per_gt != 512 {
            return Err(unsupported("grain tables of other than 512 entries are opened read-only: use --read-only"));
        }
        if header.overhead.bytes().is_none_or(|end| end > file_len) {
            return Err(corrupt(format!(
                "the metadata ends at sector {}, past the end of the file of {file_len} bytes",
                header.overhead.0
            )));
        }
        // What the header has beyond the extent's own sectors cannot be reached.
        let indexed = stream.as_ref().is_some_and(|s| s.index.is_some());
        let tables =
            if indexed { 0 } else { header.directory_len().min(sectors.0.div_ceil(header.table_coverage().0)) };
        let inside = |at: Sectors, what: &str| {
            at.bytes()
                .filter(|b| *b > 0 && b.checked_add(tables * GTE_SIZE).is_some_and(|end| end <= file_len))
                .ok_or_else(|| {
                    corrupt(format!("{what} at sector {} does not lie in the file of {file_len} bytes", at.0))
                })
        };
        let gd_at = match header.gd_offset {
            _ if indexed => 0,
            GdOffset::At(gd) => inside(gd, "the grain directory")?,
            GdOffset::AtEnd => {
                return Err(unsupported("the grain directory is at the end of a file that is not a stream"));
            }
        };
        let rgd_at = match header.redundant() {
            Some(at) if !read_only => {
                let at = inside(at, "the redundant grain directory")?;
                if at < gd_at + tables * GTE_SIZE && gd_at < at + tables * GTE_SIZE {
                    return Err(corrupt("the two grain directories overlap".to_owned()));
                }
                Some(at)
            }
            _ => None,
        };
        let copy = header.redundant().and_then(Sectors::bytes);
        let copy = copy.map(|at| at..at.saturating_add(tables * GTE_SIZE));
        Ok(Self {
            coding: Coding::Hosted { zeroed_grain: header.flags.zeroed_grain() },
            grain: header.grain_bytes(),
            gtes: u64::from(header.gtes_per_gt),
            gd_at,
            rgd_at,
            copy_gd: header.redundant().and_then(Sectors::bytes),
            tables,
            overhead: header.overhead.bytes().unwrap_or(u64::MAX),
            fixed: copy.into_iter().chain(header.embedded_descriptor()).collect(),
            unclean: header.unclean_shutdown,
            stream,
        })
    }
}

impl Sparse {
    /// An extent whose directory was checked to lie in its file of `file_len` bytes. It has no memory for tables yet.
    pub(crate) fn new(file: FileId, name: String, parts: Parts, file_len: u64) -> Self {
        let directory = parts.gd_at..parts.gd_at + parts.tables * parts.coding.entry_bytes();
        let fixed = parts.fixed.into_iter().chain([directory]).filter(|area| !area.is_empty());
        let fixed: Vec<_> = fixed.collect();
        Self {
            fixed_end: fixed.iter().map(|area| area.end).max().unwrap_or(0),
            fixed,
            file,
            name,
            coding: parts.coding,
            grain: parts.grain,
            gtes: parts.gtes,
            shifts: shift(parts.grain).zip(shift(parts.gtes)),
            gd_at: parts.gd_at,
            rgd_at: parts.rgd_at,
            copy_gd: parts.copy_gd,
            tables: parts.tables,
            overhead: parts.overhead,
            unclean: parts.unclean,
            stream: parts.stream,
            file_len: AtomicU64::new(file_len),
            pages: Pages::new(parts.tables.div_ceil(PAGE_ENTRIES), 0),
            state: Mutex::new(State::default()),
            ledger: None,
            opened_len: file_len,
            first_free: AtomicU64::new(u64::MAX),
            table_memory: 0,
            page_memory: 0,
        }
    }

    /// Whether tables may differ from their copies, because the extent was not closed.
    pub(crate) fn is_to_be_compared(&self) -> bool {
        self.unclean && self.rgd_at.is_some()
    }

    /// Whether the grains are records of a stream.
    pub(crate) fn is_compressed(&self) -> bool {
        self.stream.is_some()
    }

    /// The grains of a stream that has no directory.
    pub(crate) fn indexed_grains(&self) -> Option<impl Iterator<Item = u64>> {
        Some(self.stream.as_ref()?.index.as_ref()?.grains())
    }

    /// Says how much memory tables and pages of the directory may take together. The last one that came stays in any case.
    pub(crate) fn set_memory(&mut self, bytes: usize) {
        self.page_memory = bytes / 4;
        self.pages = Pages::new(self.pages.len() as u64, self.page_memory);
        self.table_memory = bytes - self.page_memory;
    }

    /// Bytes of a table in the file.
    pub(crate) fn table_bytes(&self) -> u64 {
        self.gtes * self.coding.entry_bytes()
    }

    /// Bytes of the directory in the file.
    pub(crate) fn directory_bytes(&self) -> u64 {
        self.tables * self.coding.entry_bytes()
    }

    /// Splits an offset in the extent: (table, entry, offset in the grain).
    pub(crate) fn split(&self, offset: u64) -> (u64, usize, u64) {
        let (table, entry, skip) = match self.shifts {
            Some((grain, gtes)) => {
                let number = offset >> grain;
                (number >> gtes, number & (self.gtes - 1), offset & (self.grain - 1))
            }
            None => {
                let number = offset / self.grain;
                (number / self.gtes, number % self.gtes, offset % self.grain)
            }
        };
        #[expect(clippy::cast_possible_truncation, reason = "below gtes, which is at most 4096")]
        let entry = entry as usize;
        (table, entry, skip)
    }

    /// Where the range is. Pure. The answer never crosses the end of a grain, unless it is that the parent has it.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Corrupt`] for an entry that points outside the data area.
    pub(crate) fn map(&self, offset: u64, len: u64) -> Result<Mapping, DiskError> {
        let (table, entry, skip) = self.split(offset);
        let asked = len;
        let len = asked.min(self.grain - skip);
        // Absent grains are counted as far as was asked: far more of a disk is absent than anything else.
        let parent = |grains: u64| Mapping::Parent { len: asked.min(grains.saturating_mul(self.grain) - skip) };
        let found = match self.stream.as_ref().and_then(|s| s.index.as_ref()) {
            Some(index) => match index.absent(offset / self.grain) {
                0 => Ok(index.entry(offset / self.grain)),
                grains => return Ok(parent(grains)),
            },
            None => match self.table(table, |t| t.entry(entry).unwrap_or(0)) {
                Lookup::Table(value @ 1..) => self.coding.grain(value).map_err(|e| (value, e)),
                Lookup::Need(meta) => return Ok(Mapping::NeedMeta(meta)),
                // Somebody may make the grain or its table between the two looks: at the first one it was absent.
                absent => {
                    let enough = (skip + asked).div_ceil(self.grain);
                    let grains = match (absent, self.table(table, |t| t.absent(entry, enough))) {
                        (Lookup::Table(_), Lookup::Table(grains)) => grains,
                        (Lookup::Absent, _) => self.absent_from(table, entry, enough, None),
                        _ => 1,
                    };
                    return Ok(parent(grains.max(1)));
                }
            },
        };
        let corrupt = |what: String| {
            let what = format!("{}: entry {entry} of grain table {table} {what}", self.name);
            DiskError::new(ErrorKind::Corrupt, what)
        };
        let start = match found {
            Ok(Entry::At(start)) => start,
            Ok(Entry::Absent) => return Ok(parent(1)),
            Ok(Entry::Zeroed) => return Ok(Mapping::Zero { len }),
            Err((value, e)) => return Err(corrupt(format!("is {value:#x}")).because(e)),
        };
        let missing = self.is_missing(start, 1);
        // A record of a stream takes a sector at least.
        let taken = if self.stream.is_some() { SECTOR_SIZE } else { self.grain };
        if missing || self.is_metadata(start, taken) {
            let what = if missing { "past the end of the file" } else { "in the metadata" };
            return Err(corrupt(format!("points to sector {}, {what}", start / SECTOR_SIZE)));
        }
        if let Some(stream) = &self.stream {
            return Ok(stream.mapping(self.file, self.opened_len, start, offset / self.grain, skip, len));
        }
        // Some writers leave the last grain of the file unfinished: what is missing was never written, so it is zero.
        let there = self.file_len.load(Ordering::Acquire).saturating_sub(start);
        if skip >= there {
            return Ok(Mapping::Zero { len });
        }
        let grain = Grain { start, len: self.grain, whole: there >= self.grain };
        Ok(Mapping::Data { file: self.file, offset: start + skip, len: len.min(there - skip), grain: Some(grain) })
    }

    /// Opening for writing refuses compressed extents, so nobody sees this.
    pub(crate) fn compressed(&self, at: u64) -> DiskError {
        let what = format!("{}: the grain at byte {at} is compressed and cannot change", self.name);
        DiskError::new(ErrorKind::ReadOnly, what)
    }

    /// Looks at a table, if it is in memory or known not to exist.
    pub(crate) fn table<R>(&self, table: u64, look: impl FnOnce(&Arc<Table>) -> R) -> Lookup<R> {
        let index = index_in_page(table);
        let answer = self.pages.look(page_of(table), |page| {
            let Some(slot) = page.tables.get(index) else { return Lookup::Absent };
            if let Some(t) = &*slot.load() {
                t.touch();
                return Lookup::Table(look(t));
            }
            match page.gd.get(index) {
                None | Some(0) => Lookup::Absent,
                Some(_) => Lookup::Need(MetaRef::Table(table)),
            }
        });
        answer.unwrap_or(Lookup::Need(MetaRef::Directory(table / PAGE_ENTRIES)))
    }

    /// How many grains are absent from `entry` of `table` on, in tables that do not exist or lie in `hole`, a part of the file
    /// that is zeroes. Looks no further than for `enough` grains, nor past the table's page of the directory.
    fn absent_from(&self, table: u64, entry: usize, enough: u64, hole: Option<&Range<u64>>) -> u64 {
        let is_empty = |table: &u64| match (self.table(*table, |_| ()), hole) {
            (Lookup::Absent, _) => true,
            (Lookup::Need(meta @ MetaRef::Table(_)), Some(hole)) => {
                let place = self.place_of(meta).ok().flatten();
                place.is_some_and(|(at, _, len)| hole.start <= at && at + len <= hole.end)
            }
            (Lookup::Need(_) | Lookup::Table(()), _) => false,
        };
        let entry = entry as u64;
        let enough = (entry + enough).div_ceil(self.gtes).min(PAGE_ENTRIES - table % PAGE_ENTRIES);
        let tables = (table..table + enough).take_while(is_empty).count() as u64;
        (tables * self.gtes).saturating_sub(entry)
    }

    /// How many bytes from an offset in the extent on are absent because what is to be read there first, `meta`, and what
    /// follows it lies in `hole`, a part of the file that is zeroes. Looks at `len` bytes at most.
    pub(crate) fn absent_by_hole(&self, meta: MetaRef, offset: u64, len: u64, hole: &Range<u64>) -> u64 {
        let (table, entry, skip) = self.split(offset);
        let grains = match meta {
            MetaRef::Table(_) => self.absent_from(table, entry, (skip + len).div_ceil(self.grain), Some(hole)),
            MetaRef::Directory(page) => {
                let pages = (page..self.pages.len() as u64).take_while(|page| {
                    let place = self.place_of(MetaRef::Directory(*page)).ok().flatten();
                    // What is in memory may be newer.
                    place.is_some_and(|(at, _, len)| at + len <= hole.end) && !self.has(MetaRef::Directory(*page))
                });
                let tables = pages.count() as u64 * PAGE_ENTRIES;
                (tables * self.gtes).saturating_sub(table % PAGE_ENTRIES * self.gtes + entry as u64)
            }
        };
        len.min(grains.saturating_mul(self.grain).saturating_sub(skip))
    }

    /// The loaded directory page of a table, and the table's index in it. The page stays in memory while it is held.
    pub(crate) fn page(&self, table: u64) -> Option<(Arc<Page>, usize)> {
        Some((self.pages.get(page_of(table))?, index_in_page(table)))
    }

    /// Whether the file did not hold these bytes when it was opened, and we did not put them there.
    pub(crate) fn is_missing(&self, at: u64, len: u64) -> bool {
        at + len > self.opened_len && at < self.first_free.load(Ordering::Acquire)
    }

    /// Whether bytes that an entry of a grain table names belong to the metadata. Tables among the grains are not looked at.
    pub(crate) fn is_metadata(&self, at: u64, len: u64) -> bool {
        at < self.overhead || self.is_fixed(at, len)
    }

    /// Where the directories and the descriptor are.
    pub(crate) fn fixed_areas(&self) -> &[Range<u64>] {
        &self.fixed
    }

    /// Whether any of the bytes belong to a directory or to the descriptor. A header need not have them in its overhead.
    pub(crate) fn is_fixed(&self, at: u64, len: u64) -> bool {
        at < self.fixed_end && self.fixed.iter().any(|area| at < area.end && area.start < at.saturating_add(len))
    }

    /// What to read (byte offset, bytes) to supply `meta`: one range, or for a directory page with a copy two. `None` for a table
    /// whose page of the directory has left memory.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Corrupt`] for a table that does not lie in the file.
    pub(crate) fn place_of(&self, meta: MetaRef) -> Result<Option<(u64, Option<u64>, u64)>, DiskError> {
        match meta {
            MetaRef::Directory(page) => {
                let first = page * PAGE_ENTRIES;
                let size = self.coding.entry_bytes();
                let len = size * PAGE_ENTRIES.min(self.tables - first);
                Ok(Some((self.gd_at + first * size, self.rgd_at.map(|at| at + first * size), len)))
            }
            MetaRef::Table(table) => {
                let Some((page, index)) = self.page(table) else { return Ok(None) };
                let at = self.table_at(table, page.gd.get(index).unwrap_or(0))?;
                Ok(Some((at, None, self.table_bytes())))
            }
        }
    }

    /// Byte offset of a table from its directory entry, checked to lie in the file.
    pub(crate) fn table_at(&self, table: u64, gde: u64) -> Result<u64, DiskError> {
        let corrupt =
            |what: String| DiskError::new(ErrorKind::Corrupt, format!("{}: grain table {table} {what}", self.name));
        let at = self.coding.table(gde).map_err(|e| corrupt(format!("has the directory entry {gde:#x}")).because(e))?;
        let at = at.unwrap_or(0);
        if at == 0 || self.is_missing(at, self.table_bytes()) {
            return Err(corrupt(format!(
                "at sector {} does not lie in the file of {} bytes",
                at / SECTOR_SIZE,
                self.opened_len
            )));
        }
        // The tables of the other formats are a part of the overhead.
        let in_header = matches!(self.coding, Coding::Cowd { .. }) && at < self.overhead;
        if in_header || self.is_fixed(at, self.table_bytes()) {
            let what = "lies in the header, in the descriptor or in the directory";
            return Err(corrupt(format!("at sector {} {what}", at / SECTOR_SIZE)));
        }
        Ok(at)
    }

    /// Takes metadata that was read from the place that [`Sparse::place_of`] gave.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Corrupt`] for a table that does not lie in the file.
    pub(crate) fn supply(&self, meta: MetaRef, bytes: &[u8], copy: &[u8]) -> Result<(), DiskError> {
        match meta {
            MetaRef::Directory(page) => {
                let new = Page::new(self.coding.entries(bytes), self.coding.entries(copy));
                self.insert_page_locked(&mut locked(&self.state), page, Arc::new(new));
            }
            MetaRef::Table(table) => {
                let Some((at, _, _)) = self.place_of(meta)? else { return Ok(()) };
                let new = Arc::new(Table::with(self.coding.entries(bytes), at, self.copy_of(table, at)));
                self.insert_locked(&mut locked(&self.state), table, new);
            }
        }
        Ok(())
    }

    /// Whether the piece of metadata is in memory.
    pub(crate) fn has(&self, meta: MetaRef) -> bool {
        match meta {
            MetaRef::Directory(page) => self.page(page * PAGE_ENTRIES).is_some(),
            MetaRef::Table(table) => {
                self.page(table).is_some_and(|(p, i)| p.tables.get(i).is_some_and(|slot| slot.load().is_some()))
            }
        }
    }

    /// The redundant copy of the table at byte `at`.
    pub(crate) fn copy_of(&self, table: u64, at: u64) -> TableCopy {
        match (self.rgd_at, self.copy_at(table)) {
            (None, _) => TableCopy::None,
            (Some(_), Some(copy_at)) if copy_at != at => TableCopy::At(copy_at),
            _ => TableCopy::Broken,
        }
    }
}

fn shift(value: u64) -> Option<u32> {
    value.is_power_of_two().then(|| value.trailing_zeros())
}

fn page_of(table: u64) -> usize {
    size(table / PAGE_ENTRIES)
}

fn index_in_page(table: u64) -> usize {
    // Below PAGE_ENTRIES.
    size(table % PAGE_ENTRIES)
}

/// What is known of a table.
pub(crate) enum Lookup<R> {
    /// It is in memory; this was seen in it.
    Table(R),
    /// It does not exist: all its grains are absent.
    Absent,
    /// It, or its page of the directory, has to be read first.
    Need(MetaRef),
}
