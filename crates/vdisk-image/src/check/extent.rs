//! What the tables of one extent say, against one another and against the file.

use super::{CheckWatch, Fault, FaultKind, Leaks};
use crate::coding::{Coding, Entry};
use crate::disk::{Disk, size};
use crate::error::DiskError;
use crate::file_io::FileIo;
use crate::image::Mapping;
use crate::sparse::Sparse;
use crate::table::Entries;
use crate::usage::PlaceSet;
use std::sync::atomic::Ordering;
use vmdk_parse::{COWD_FREE_SECTOR_AT, COWD_UNCLEAN_SHUTDOWN_AT, SECTOR_SIZE, UNCLEAN_SHUTDOWN_AT};

/// Tables, and pieces of a directory, are read so many bytes at once.
const PIECE: u64 = 1 << 20;

/// A table that lies in the file, and its copy if that does.
struct TablePlace {
    index: u64,
    at: u64,
    copy_at: Option<u64>,
}

/// The work on one extent.
struct Check<'a, I, W> {
    disk: &'a Disk,
    io: &'a I,
    watch: &'a mut W,
    extent: &'a Sparse,
    file_len: u64,
    /// Byte offset of the redundant directory, if it lies in the file.
    copy: Option<u64>,
    /// Where the tables and their copies are.
    tables: PlaceSet,
    /// The tables that were looked at.
    seen: PlaceSet,
    /// Bytes of tables that lie where grains are.
    among_grains: u64,
    /// Where the grains are; of a stream, where their records begin.
    grains: PlaceSet,
    grain_count: u64,
    /// Behind everything that is named.
    end: u64,
    /// Done before this extent, and in all.
    progress: (u64, u64),
}

impl Disk {
    /// Checks one extent: its header, its directory, its tables, and its records if it is compressed.
    pub(super) async fn check_extent<I: FileIo>(
        &self,
        io: &I,
        extent: &Sparse,
        watch: &mut impl CheckWatch,
        progress: (u64, u64),
    ) -> Result<Leaks, DiskError> {
        let file_len = extent.file_len.load(Ordering::Acquire);
        let directory = extent.directory_bytes();
        let copy = extent.copy_gd.filter(|at| at.checked_add(directory).is_some_and(|end| end <= file_len));
        let (tables, seen) = (PlaceSet::new(extent.table_bytes()), PlaceSet::new(extent.table_bytes()));
        let grains = PlaceSet::new(extent.place_bytes());
        let (among_grains, grain_count, end) = (0, 0, 0);
        let mut check = Check {
            disk: self,
            io,
            watch,
            extent,
            file_len,
            copy,
            tables,
            seen,
            among_grains,
            grains,
            grain_count,
            end,
            progress,
        };
        check.header();
        if let Some(grains) = extent.indexed_grains() {
            let detail = "the stream has no grain directory: its grains were found by walking over the records";
            check.fault(FaultKind::NoDirectory, None, detail.to_owned());
            for grain in grains {
                check.record(grain, None).await?;
            }
            return Ok(Leaks::default());
        }
        check.directory().await?;
        check.tables().await?;
        check.free_sector();
        Ok(check.leaks())
    }
}

impl<I: FileIo, W: CheckWatch> Check<'_, I, W> {
    fn fault(&mut self, kind: FaultKind, offset: Option<u64>, detail: String) {
        self.watch.fault(Fault { kind, file: self.extent.name.clone(), offset, detail });
    }

    async fn read(&self, at: u64, len: u64) -> Result<Vec<u8>, DiskError> {
        self.disk.read_metadata(self.io, self.extent.file, at, len).await
    }

    fn header(&mut self) {
        if self.extent.unclean {
            let at = match self.extent.coding {
                Coding::Cowd { .. } => COWD_UNCLEAN_SHUTDOWN_AT,
                Coding::Hosted { .. } | Coding::SeSparse(_) => UNCLEAN_SHUTDOWN_AT,
            };
            let detail = "was not closed by its last writer (uncleanShutdown)";
            self.fault(FaultKind::Unclean, Some(at), detail.to_owned());
        }
        if let (Some(at), None) = (self.extent.copy_gd, self.copy) {
            let detail =
                format!("the redundant grain directory at sector {} does not lie in the file", at / SECTOR_SIZE);
            self.fault(FaultKind::EntryPastEnd, Some(REDUNDANT_AT), detail);
        }
        if self.copy == Some(self.extent.gd_at) {
            let detail = "both grain directories are at the same place".to_owned();
            self.fault(FaultKind::EntryUsedTwice, Some(REDUNDANT_AT), detail);
            self.copy = None;
        }
    }

    /// A piece of the directory, and of its copy: both as entries, and the byte offset of the first.
    async fn directory_piece(&self, first: u64) -> Result<(Entries, Option<Entries>, u64), DiskError> {
        let entry = self.extent.coding.entry_bytes();
        let len = (self.extent.tables - first).min(PIECE / entry) * entry;
        let at = self.extent.gd_at + first * entry;
        let gd = self.extent.coding.entries(&self.read(at, len).await?);
        let copy = match self.copy {
            Some(copy) => Some(self.extent.coding.entries(&self.read(copy + first * entry, len).await?)),
            None => None,
        };
        Ok((gd, copy, at))
    }

    /// Looks at all directory entries.
    async fn directory(&mut self) -> Result<(), DiskError> {
        let entry_bytes = self.extent.coding.entry_bytes();
        let mut first = 0;
        while first < self.extent.tables {
            let (gd, copy, at) = self.directory_piece(first).await?;
            let copy_at = self.copy.map_or(0, |copy| copy + first * entry_bytes);
            for (n, gde) in (0..gd.len()).zip(gd.iter()) {
                let table = first + n as u64;
                let entry_at = at + n as u64 * entry_bytes;
                self.directory_entry(table, gde, entry_at);
                let Some(rgde) = copy.as_ref().and_then(|c| c.get(n)) else { continue };
                let entry_at = copy_at + n as u64 * entry_bytes;
                self.directory_entry(table, rgde, entry_at);
                if (gde == 0) != (rgde == 0) {
                    let which = if gde == 0 { "redundant" } else { "primary" };
                    let detail = format!("only the {which} grain directory has grain table {table}");
                    self.fault(FaultKind::CopiesDiffer, Some(entry_at), detail);
                }
            }
            first += gd.len() as u64;
        }
        Ok(())
    }

    fn directory_entry(&mut self, table: u64, gde: u64, entry_at: u64) {
        let at = match self.extent.table_place(gde, self.file_len) {
            Ok(Some(at)) => at,
            Ok(None) => return,
            Err((kind, what)) => {
                return self.fault(kind, Some(entry_at), format!("the directory entry of grain table {table} {what}"));
            }
        };
        let (len, sector) = (self.extent.table_bytes(), at / SECTOR_SIZE);
        if !self.tables.insert(at) {
            let detail = format!("grain table {table} at sector {sector} lies where another one is");
            return self.fault(FaultKind::EntryUsedTwice, Some(entry_at), detail);
        }
        if at >= self.extent.overhead {
            self.among_grains += len;
        }
        self.end = self.end.max(at + len);
    }

    /// Looks at all tables.
    async fn tables(&mut self) -> Result<(), DiskError> {
        let mut first = 0;
        while first < self.extent.tables {
            let (gd, copy, _) = self.directory_piece(first).await?;
            let places: Vec<TablePlace> = (first..)
                .zip(gd.iter())
                .zip(0..)
                .filter_map(|((index, gde), n)| {
                    let copy_at = copy.as_ref().and_then(|c| self.extent.table_place(c.get(n)?, self.file_len).ok()?);
                    Some(TablePlace { index, at: self.extent.table_place(gde, self.file_len).ok()??, copy_at })
                })
                .collect();
            let bytes = self.extent.table_bytes();
            let follows =
                |a: &TablePlace, b: &TablePlace| a.at + bytes == b.at && a.copy_at.map(|at| at + bytes) == b.copy_at;
            // A table that many entries name is one fault for each of them, and read once.
            let places: Vec<TablePlace> = places.into_iter().filter(|place| self.seen.insert(place.at)).collect();
            for run in places.chunk_by(follows) {
                for run in run.chunks(size((PIECE / bytes).max(1))) {
                    self.table_run(run).await?;
                }
            }
            first += gd.len() as u64;
            self.watch.progress(self.progress.0 + first.min(self.extent.check_units()), self.progress.1);
        }
        Ok(())
    }

    /// Tables that follow one another in the file, and so do their copies.
    async fn table_run(&mut self, run: &[TablePlace]) -> Result<(), DiskError> {
        let Some(first) = run.first() else { return Ok(()) };
        let bytes = self.extent.table_bytes();
        let len = run.len() as u64 * bytes;
        let (io, file) = (self.io, self.extent.file);
        if self.disk.is_hole(io, file, first.at, len).await
            && match first.copy_at {
                Some(at) => self.disk.is_hole(io, file, at, len).await,
                None => true,
            }
        {
            // Most of the tables of a large image are empty.
            return Ok(());
        }
        let tables = self.read(first.at, len).await?;
        let copies = match first.copy_at {
            Some(at) => Some(self.read(at, len).await?),
            None => None,
        };
        for (n, place) in run.iter().enumerate() {
            let part = n * size(bytes)..(n + 1) * size(bytes);
            let table = tables.get(part.clone()).unwrap_or_default();
            if let Some(copy) = copies.as_ref().and_then(|c| c.get(part)) {
                self.compare(place, table, copy);
            }
            let entries = self.extent.coding.entries(table);
            for (entry, gte) in (0..).zip(entries.iter()).filter(|(_, gte)| *gte != 0) {
                self.entry(place, entry, gte).await?;
            }
        }
        Ok(())
    }

    fn compare(&mut self, place: &TablePlace, table: &[u8], copy: &[u8]) {
        if table == copy {
            return;
        }
        let size = size(self.extent.coding.entry_bytes());
        let pairs = || table.chunks(size).zip(copy.chunks(size)).enumerate().filter(|(_, (a, b))| a != b);
        let first = pairs().next().map_or(0, |(n, _)| n);
        let detail = format!(
            "grain table {} and its redundant copy differ in {} entries, the first is {first}",
            place.index,
            pairs().count()
        );
        self.fault(FaultKind::CopiesDiffer, Some(place.at + (first * size) as u64), detail);
    }

    async fn entry(&mut self, place: &TablePlace, entry: u64, gte: u64) -> Result<(), DiskError> {
        let offset = Some(place.at + entry * self.extent.coding.entry_bytes());
        let which = format!("entry {entry} of grain table {}", place.index);
        let at = match self.extent.grain_place(gte, self.file_len, &self.tables) {
            Ok(Entry::At(at)) => at,
            Ok(Entry::Absent | Entry::Zeroed) => return Ok(()),
            Err((kind, what)) => {
                self.fault(kind, offset, format!("{which} {what}"));
                return Ok(());
            }
        };
        let (len, sector) = (self.extent.place_bytes(), at / SECTOR_SIZE);
        if !self.extent.is_aligned(at) {
            let sectors = len / SECTOR_SIZE;
            let detail = format!("{which} names sector {sector}, where no grain of {sectors} sectors begins");
            self.fault(FaultKind::EntryMisaligned, offset, detail);
        }
        if !self.grains.insert(at) {
            self.fault(
                FaultKind::EntryUsedTwice,
                offset,
                format!("{which} names sector {sector}, as another entry does"),
            );
            return Ok(());
        }
        self.grain_count += 1;
        self.end = self.end.max(at + len);
        if self.extent.is_compressed() {
            let grain = place.index * self.extent.gtes + entry;
            self.record(grain, offset).await?;
            self.watch.progress(self.progress.0 + grain, self.progress.1);
        }
        Ok(())
    }

    /// Inflates a grain: its check sum is the only one that any data has.
    async fn record(&mut self, grain: u64, offset: Option<u64>) -> Result<(), DiskError> {
        let bytes = self.extent.grain;
        let record = loop {
            match self.extent.map(grain * bytes, bytes)? {
                Mapping::Compressed { record, .. } => break record,
                Mapping::NeedMeta(meta) => self.disk.load(self.io, self.extent, meta).await?,
                Mapping::Data { .. } | Mapping::Zero { .. } | Mapping::Parent { .. } | Mapping::Barred { .. } => {
                    return Ok(());
                }
            }
        };
        if let Err(e) = self.disk.inflate(self.io, self.extent.file, &record, bytes, |_, _| ()).await {
            let detail = Fault::unreadable(&self.extent.name, &e).detail;
            self.fault(FaultKind::Record, offset.or(Some(record.at)), detail);
        }
        Ok(())
    }

    fn free_sector(&mut self) {
        let Coding::Cowd { free } = self.extent.coding else { return };
        if free < self.end {
            let detail = format!(
                "freeSector is {}, but everything up to sector {} is used: ESX would hand it out again",
                free / SECTOR_SIZE,
                self.end / SECTOR_SIZE
            );
            self.fault(FaultKind::FreeSector, Some(COWD_FREE_SECTOR_AT), detail);
        }
    }

    /// What is neither metadata nor named by an entry.
    fn leaks(&self) -> Leaks {
        let (start, end) = match self.extent.coding {
            _ if self.extent.is_compressed() => return Leaks::default(),
            Coding::Hosted { .. } => (self.extent.overhead, self.file_len),
            // What lies behind freeSector is free and not lost.
            Coding::Cowd { free } => (self.extent.gd_at + self.extent.directory_bytes(), free.min(self.file_len)),
            // It keeps a bitmap of what is free.
            Coding::SeSparse(_) => return Leaks::default(),
        };
        let used = self.grain_count * self.extent.grain + self.among_grains;
        let bytes = end.saturating_sub(start).saturating_sub(used);
        Leaks { grains: bytes / self.extent.grain, bytes }
    }
}

/// Byte offset of `rgdOffset` in a hosted header.
const REDUNDANT_AT: u64 = 48;
