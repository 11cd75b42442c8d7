//! The first change to an image: it is marked as open and gets a new content ID, durably, before the change is done.
//!
//! Until then an attached image is left exactly as it was. Source: VMware Virtual Disk Format 1.1, "The Header"
//! (CID) and "Hosted Sparse Extents" (uncleanShutdown).

use crate::disk::{Disk, size};
use crate::error::{DiskError, ErrorKind, chain};
use crate::file_io::{FileId, FileIo};
use crate::flush::{self, Failed, Step};
use crate::free::{LOOKS, MOST_INTERVALS};
use crate::scan::TableRun;
use crate::sparse::{MetaRef, Sparse};
use crate::table::{PAGE_ENTRIES, Page, TableCopy};
use crate::usage::Used;
use crate::wait::{WaitList, locked, until, wake};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use vmdk_parse::{COWD_UNCLEAN_SHUTDOWN_AT, UNCLEAN_SHUTDOWN_AT};

/// How much of the tables is read at once when they are looked through.
const SCAN_BYTES: u64 = 1 << 20;

/// What the first change has to do, and whether it has happened.
#[derive(Debug, Default)]
pub(crate) struct FirstChange {
    happened: AtomicBool,
    state: Mutex<Option<WaitList>>,
    /// Why the image cannot change: nobody looks through all its tables twice for that.
    refused: Mutex<Option<String>>,
    /// Writes the new content ID, and whatever else changes once.
    once: Vec<Step>,
    /// Where headers say that they were not closed.
    unclean: Vec<Unclean>,
}

impl FirstChange {
    pub(crate) fn new(once: Vec<Step>, unclean: Vec<Unclean>) -> Self {
        Self { once, unclean, ..Self::default() }
    }

    pub(crate) fn happened(&self) -> bool {
        self.happened.load(Ordering::Acquire)
    }

    fn refuse(&self, e: &DiskError) {
        if e.kind() == ErrorKind::Corrupt {
            *locked(&self.refused) = Some(e.to_string());
        }
    }

    fn check_refused(&self) -> Result<(), DiskError> {
        match &*locked(&self.refused) {
            Some(why) => Err(DiskError::new(ErrorKind::Corrupt, why.clone())),
            None => Ok(()),
        }
    }

    /// Sets uncleanShutdown, changes the content ID, does what `more` says, makes all of it durable.
    fn steps(&self, more: impl Iterator<Item = Step>) -> Vec<Step> {
        let mut steps: Vec<Step> = self.unclean.iter().map(|u| u.step(1)).collect();
        steps.extend(self.once.iter().cloned());
        steps.extend(more);
        with_barriers(steps)
    }

    /// Clears uncleanShutdown. Everything else is durable already.
    pub(crate) fn cleaning_steps(&self) -> Vec<Step> {
        with_barriers(self.unclean.iter().map(|u| u.step(0)).collect())
    }
}

/// The uncleanShutdown field of a sparse extent's header.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Unclean {
    file: FileId,
    at: u64,
    bytes: usize,
}

impl Unclean {
    pub(crate) fn hosted(file: FileId) -> Self {
        Self { file, at: UNCLEAN_SHUTDOWN_AT, bytes: 1 }
    }

    pub(crate) fn cowd(file: FileId) -> Self {
        Self { file, at: COWD_UNCLEAN_SHUTDOWN_AT, bytes: 4 }
    }

    pub(crate) fn step(self, value: u8) -> Step {
        let mut bytes = vec![value];
        bytes.resize(self.bytes, 0);
        Step::Write { file: self.file, offset: self.at, bytes }
    }
}

fn with_barriers(mut steps: Vec<Step>) -> Vec<Step> {
    let mut files: Vec<FileId> = steps.iter().filter_map(Step::written).collect();
    files.sort_unstable();
    files.dedup();
    steps.extend(files.into_iter().map(Step::Barrier));
    steps
}

impl Disk {
    /// Does what has to be durable before the first change; waits while another task does.
    pub(crate) async fn begin_change<I: FileIo>(&self, io: &I) -> Result<(), DiskError> {
        let first = &self.first_change;
        if first.happened() {
            return Ok(());
        }
        let mine = until(&first.state, |s| {
            if first.happened() {
                return Ok(None);
            }
            if s.is_some() {
                // Not an `if let`: the borrow of the list would outlive its arm.
                return s.as_mut().map_or(Ok(None), Err);
            }
            *s = Some(WaitList::default());
            Ok(Some(Beginning(first)))
        })
        .await;
        let Some(_beginning) = mine else { return Ok(()) };
        first.check_refused()?;
        // All are looked at before anything is written: an image that is refused is left as it is.
        for extent in self.chain.top.writable_sparse() {
            self.find_end(io, extent).await.inspect_err(|e| first.refuse(e))?;
        }
        for extent in self.chain.top.writable_sparse().filter(|e| e.is_to_be_compared()) {
            self.mend_copies(io, extent).await?;
        }
        let steps = first.steps(self.chain.top.writable_sparse().filter_map(Sparse::free_sector_step));
        self.run_at_once(io, &steps).await?;
        first.happened.store(true, Ordering::Release);
        Ok(())
    }

    /// Runs steps outside of a flush. A sync that fails among them poisons as one of a flush does.
    async fn run_at_once<I: FileIo>(&self, io: &I, steps: &[Step]) -> Result<(), DiskError> {
        let ran = flush::run(io, steps, |f| self.name(f)).await;
        ran.map_err(|Failed { error, nothing_lost }| {
            if !nothing_lost {
                self.rounds.poison(chain(&error));
            }
            error
        })
    }

    /// Looks through all tables of an extent for the first byte behind everything that is used, for places that nothing names, and for
    /// places that two entries name: nothing of such an extent can change, for a write in one place of the disk would show in another.
    ///
    /// The length of the file is not enough: after a crash an entry can be durable whose grain the file does not reach
    /// (qemu leaves such images, and gives the same place out again). In an image that was not closed, tables whose copy
    /// differs are written again; the primary counts, since what only the copy has was never acknowledged as durable.
    async fn find_end<I: FileIo>(&self, io: &I, extent: &Sparse) -> Result<(), DiskError> {
        if extent.knows_its_end() {
            return Ok(());
        }
        let compare = extent.is_to_be_compared();
        let mut used = Used::new(extent);
        for page in 0..extent.page_count() {
            let Some(_loaded) = self.load_page(io, extent, page).await? else { continue };
            used.take_tables(page)?;
        }
        let mut end = extent.metadata_end();
        for page in 0..extent.page_count() {
            let Some(_loaded) = self.load_page(io, extent, page).await? else { continue };
            let tables_end = extent.end_of_tables(page);
            if tables_end > extent.file_len.load(Ordering::Acquire) {
                let what = format!("{}: a grain table lies past the end of the file, which was cut off", extent.name);
                return Err(DiskError::new(
                    ErrorKind::Corrupt,
                    format!("{what}: use --read-only (vdisk check shows all)"),
                ));
            }
            end = end.max(tables_end);
            for run in extent.table_runs(page, SCAN_BYTES).unwrap_or_default() {
                let len = run.count * extent.table_bytes();
                let has_copy = extent.rgd_at.is_some() && self.has_copy(io, extent, run).await;
                if !has_copy && self.is_hole(io, extent.file, run.at, len).await {
                    continue;
                }
                let bytes = self.read_metadata(io, extent.file, run.at, len).await?;
                end = end.max(extent.end_of_entries(&bytes));
                used.take_grains(run, &bytes)?;
                if !has_copy {
                    continue;
                }
                for (first, copy) in self.read_copies(io, extent, run).await? {
                    if compare {
                        end = end.max(extent.end_of_entries(&copy));
                    }
                    // It may be all that is left of something.
                    if bytes.get(first..first + copy.len()) != Some(&copy) {
                        used.keep(&copy);
                    }
                }
            }
        }
        let free = used.free(extent.file_len.load(Ordering::Acquire)).take(MOST_INTERVALS);
        let mut free: Vec<_> = free.collect();
        // Those that are given out first. The sync of the first change makes a hole one for good.
        for place in free.iter_mut().take(LOOKS) {
            place.zeroed = self.is_hole(io, extent.file, place.at, place.len).await;
        }
        extent.allocate_from(end, free);
        Ok(())
    }

    /// The copies of these tables that lie in the file, each with its place among the bytes of the tables; all of them as one if they
    /// lie in a row.
    async fn read_copies<I: FileIo>(
        &self,
        io: &I,
        extent: &Sparse,
        run: TableRun,
    ) -> Result<Vec<(usize, Vec<u8>)>, DiskError> {
        let bytes = extent.table_bytes();
        let places = run.tables(bytes).filter_map(|(table, _)| Some((table, extent.copy_at(table)?)));
        let mut copies = Vec::new();
        for copy in TableRun::of(places, bytes, SCAN_BYTES) {
            let first = size((copy.first - run.first) * bytes);
            copies.push((first, self.read_metadata(io, extent.file, copy.at, copy.count * bytes).await?));
        }
        Ok(copies)
    }

    /// Makes the copies of the tables the same as the primary ones, for an image that was not closed. At once and not with the next
    /// flush: there may be more of them than memory.
    async fn mend_copies<I: FileIo>(&self, io: &I, extent: &Sparse) -> Result<(), DiskError> {
        let mut count = 0u64;
        for page in 0..extent.page_count() {
            let Some(_loaded) = self.load_page(io, extent, page).await? else { continue };
            extent.forget_unborn_tables(page);
            let runs = extent.table_runs(page, SCAN_BYTES).unwrap_or_default();
            let mut there = Vec::new();
            for run in runs {
                let len = run.count * extent.table_bytes();
                if !self.is_hole(io, extent.file, run.at, len).await || self.has_copy(io, extent, run).await {
                    there.push(run);
                }
            }
            for (table, at) in there.iter().flat_map(|run| run.tables(extent.table_bytes())) {
                let TableCopy::At(copy_at) = extent.copy_of(table, at) else { continue };
                let primary = self.read_metadata(io, extent.file, at, extent.table_bytes()).await?;
                if primary == self.read_metadata(io, extent.file, copy_at, extent.table_bytes()).await? {
                    continue;
                }
                count += 1;
                let step = Step::Write { file: extent.file, offset: copy_at, bytes: primary };
                self.run_at_once(io, &[step]).await?;
            }
        }
        if count > 0 {
            tracing::warn!(
                file = extent.name,
                count,
                "grain tables differed from their copies, which were written again"
            );
        }
        Ok(())
    }

    /// Whether anything is in the copies of these tables.
    async fn has_copy<I: FileIo>(&self, io: &I, extent: &Sparse, run: TableRun) -> bool {
        let bytes = extent.table_bytes();
        let Some(first) = extent.copy_at(run.first) else { return true };
        let last = extent.copy_at(run.first + run.count - 1);
        // Copies that do not follow one another are looked at one by one.
        last != Some(first + (run.count - 1) * bytes) || !self.is_hole(io, extent.file, first, run.count * bytes).await
    }

    /// The page of the directory, which stays in memory while the answer is held. `None` if it names nothing: it lies in a hole.
    async fn load_page<I: FileIo>(&self, io: &I, extent: &Sparse, page: u64) -> Result<Option<Arc<Page>>, DiskError> {
        let meta = MetaRef::Directory(page);
        loop {
            if let Some((page, _)) = extent.page(page * PAGE_ENTRIES) {
                return Ok(Some(page));
            }
            if let Some((at, copy_at, len)) = extent.place_of(meta)?
                && self.is_hole(io, extent.file, at, len).await
                && self.is_hole(io, extent.file, copy_at.unwrap_or(at), len).await
            {
                return Ok(None);
            }
            self.load(io, extent, meta).await?;
        }
    }

    /// Whether the host has only a hole there: programs that make all tables beforehand leave most of them so. A host that does
    /// not tell has none.
    pub(crate) async fn is_hole<I: FileIo>(&self, io: &I, file: FileId, at: u64, len: u64) -> bool {
        io.stored_at(file, at).await.is_ok_and(|stored| stored.hole && stored.len >= len)
    }
}

/// The duty to do the first change's work. Dropped at its end, whatever the end is.
struct Beginning<'a>(&'a FirstChange);

impl Drop for Beginning<'_> {
    fn drop(&mut self) {
        let list = locked(&self.0.state).take();
        wake(list.map(|mut l| l.take()).unwrap_or_default());
    }
}
