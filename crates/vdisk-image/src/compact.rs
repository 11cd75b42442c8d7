//! Giving unused space back in place: `vdisk compact`.
//!
//! What nothing names is punched, grains of zeroes lose their entries, and the grains at the end of the file are moved to free places
//! in front, so that the end can be cut off when the image is closed. A grain is copied, then its entry is changed by the next flush,
//! and only after that its old place is free ([`crate::free`]): a crash leaves each grain in one place or the other, and both hold the
//! same. So it can be ended at any point, and done again from there. The content does not change, nor does its ID.

mod plan;
mod scan;

use crate::check::survey::Survey;
use crate::disk::{Disk, size};
use crate::error::{DiskError, ErrorKind};
use crate::file_io::{FileId, FileIo, read_bytes};
use crate::free::{Freeing, Place};
use crate::image::Layout;
use crate::scan::TableRun;
use crate::sparse::{Lookup, Sparse};
use crate::write::Obstacle;
use plan::Plan;
use scan::Content;
use std::io;
use std::sync::atomic::Ordering;
use vmdk_parse::Access;

/// Tables are read so many bytes at once.
const TABLES: u64 = 1 << 20;

/// Grains that are moved between two flushes, and bytes of them: so much more space than before is needed. Tests flush often.
const MOVES: usize = if cfg!(test) { 3 } else { 4096 };
const MOVED_BYTES: u64 = 64 << 20;

/// Data is copied in pieces of this size.
const COPY: u64 = 1 << 20;

/// Who is told how far it is.
pub trait CompactWatch {
    /// So much of the work is done. Units mean nothing; the total may grow.
    fn progress(&mut self, done: u64, total: u64);

    /// Whether to end soon, with the image as far as it got.
    fn is_stopped(&self) -> bool;
}

/// What was done, or would be.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Compacted {
    /// The files with space that could be given back.
    pub files: Vec<CompactedFile>,
    /// Grains that were nothing but zeroes and have no place any more.
    pub dropped_grains: u64,
    /// Grains that were moved.
    pub moved_grains: u64,
    /// It was ended early.
    pub stopped: bool,
    /// What a user should know.
    pub notices: Vec<String>,
}

/// A file, as it is when the disk is closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CompactedFile {
    /// Which.
    pub file: FileId,
    /// Its length in bytes.
    pub len: u64,
    /// Bytes that it takes on the host, as far as can be told.
    pub stored: u64,
}

impl Disk {
    /// Gives unused space of the top link back; with `dry_run` only looks how much that would be. The rest happens in
    /// [`Disk::close`]. The disk was opened for writing with [`crate::OpenOptions::keep_content_id`], and nobody else uses it.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Corrupt`] for an image in which something is wrong, and the host's. What was done until then does no harm.
    pub async fn compact<I: FileIo>(
        &self,
        io: &I,
        dry_run: bool,
        watch: &mut impl CompactWatch,
    ) -> Result<Compacted, DiskError> {
        let mut work = Compacting { disk: self, io, watch, dry_run, done: 0, total: 0, result: Compacted::default() };
        for extent in self.chain.top.extents.iter().filter(|e| e.access == Access::Rw) {
            match &extent.layout {
                _ if work.result.stopped => {}
                Layout::Zero => {}
                Layout::Flat { file, offset } => work.flat(*file, *offset, extent.len()).await?,
                Layout::Sparse(sparse) if sparse.frees_grains() => work.sparse(sparse, extent.start).await?,
                Layout::Sparse(sparse) => {
                    let what = "is left as it is: the grains of a COWD extent stay where they are";
                    work.result.notices.push(format!("{}: {what}", sparse.name));
                }
            }
        }
        Ok(work.result)
    }
}

struct Compacting<'a, I, W> {
    disk: &'a Disk,
    io: &'a I,
    watch: &'a mut W,
    dry_run: bool,
    done: u64,
    total: u64,
    result: Compacted,
}

/// A grain that a table names.
#[derive(Clone, Copy)]
struct Named {
    /// Byte offset in the extent.
    offset: u64,
    /// Byte offset in the file.
    at: u64,
}

impl<I: FileIo, W: CompactWatch> Compacting<'_, I, W> {
    /// One more piece is done. Whether to go on.
    fn step(&mut self, work: u64) -> bool {
        self.done += work;
        self.watch.progress(self.done, self.total.max(self.done));
        self.result.stopped = self.watch.is_stopped();
        !self.result.stopped
    }

    /// Punches the zeroes of a flat extent.
    async fn flat(&mut self, file: FileId, offset: u64, len: u64) -> Result<(), DiskError> {
        self.total += len / COPY;
        let (mut done, mut stored) = (0, 0);
        while done < len {
            let (hole, run) = self.disk.stored_at(self.io, file, offset + done, offset + len).await?;
            let part = if hole { run } else { COPY.min(len - done) };
            let content = self.content(file, offset + done, part).await?;
            stored += content.stored;
            if !self.dry_run {
                self.punch_zeroes(file, &content).await?;
            }
            done += part;
            if !self.step(part / COPY) {
                return Ok(());
            }
        }
        self.push(file, offset + len, stored);
        Ok(())
    }

    fn push(&mut self, file: FileId, len: u64, stored: u64) {
        match self.result.files.iter_mut().find(|f| f.file == file) {
            Some(f) => (f.len, f.stored) = (f.len.max(len), f.stored + stored),
            None => self.result.files.push(CompactedFile { file, len, stored }),
        }
    }

    /// Compacts a sparse extent, which begins at byte `start` of the disk.
    async fn sparse(&mut self, extent: &Sparse, start: u64) -> Result<(), DiskError> {
        if extent.unclean && !self.dry_run {
            self.disk.begin_change(self.io).await?;
        }
        let file_len = extent.file_len.load(Ordering::Acquire);
        let survey = Survey::of(self.disk, self.io, extent, file_len, |_| ()).await?;
        // The first change of one that was not closed makes the copies the same.
        let agrees = survey.differing.is_empty() || extent.unclean && self.dry_run;
        if survey.wrong || !agrees {
            let what = "something is wrong with it (vdisk check shows all, and may repair it)";
            return Err(DiskError::new(ErrorKind::Corrupt, format!("{}: {what}", extent.name)));
        }
        self.total += survey.grains.len();
        let mut stored = self.stored_metadata(&survey).await?;
        if !self.dry_run {
            self.punch_unused(&survey).await?;
        }
        let mut plan = Plan::new(&survey);
        stored += self.drop_zeroes(extent, start, &mut plan).await?;
        let end = plan.end();
        let len = (end * extent.grain).min(file_len);
        if self.dry_run {
            self.result.moved_grains += plan.behind(end);
        } else if !self.result.stopped && len < file_len {
            self.disk.begin_change(self.io).await?;
            self.total += plan.behind(end);
            self.move_grains(extent, &plan, end).await?;
        }
        self.push(extent.file, len, stored);
        Ok(())
    }

    /// Bytes that everything but the grains takes on the host.
    async fn stored_metadata(&self, survey: &Survey<'_>) -> Result<u64, DiskError> {
        let (extent, len) = (survey.extent, survey.file_len);
        let mut stored = self.disk.stored_bytes(self.io, extent.file, 0, extent.overhead.min(len)).await?;
        let behind = |at: u64| at >= extent.overhead;
        for (from, to) in survey.tables.areas().filter(|(from, _)| behind(*from)) {
            stored += self.disk.stored_bytes(self.io, extent.file, from, to.min(len)).await?;
        }
        Ok(stored)
    }

    /// Punches what nothing names, as far as the host stores it.
    async fn punch_unused(&mut self, survey: &Survey<'_>) -> Result<(), DiskError> {
        let (file, len) = (survey.extent.file, survey.file_len);
        for (from, to) in survey.unused().chain([(survey.end, len)]) {
            let to = to.min(len);
            if from < to && self.disk.stored_bytes(self.io, file, from, to).await? > 0 {
                // What no entry names may be what a power cut would bring back, unless all of it was synced.
                self.disk.begin_change(self.io).await?;
                self.punch(file, from, to).await?;
            }
        }
        Ok(())
    }

    /// Takes the entries of grains of zeroes away, and punches zeroes in others. Bytes that are left of the grains on the host.
    async fn drop_zeroes(&mut self, extent: &Sparse, start: u64, plan: &mut Plan) -> Result<u64, DiskError> {
        let (mut stored, mut dropped) = (0, 0);
        for page in 0..extent.page_count() {
            for run in self.runs(extent, page).await? {
                for grain in self.named(extent, run).await? {
                    let len = extent.grain.min(extent.file_len.load(Ordering::Acquire) - grain.at);
                    let content = self.content(extent.file, grain.at, len).await?;
                    let may_go = content.stored == 0 && len == extent.grain && extent.is_aligned(grain.at);
                    if may_go && self.is_zero_below(start + grain.offset, extent, grain).await? {
                        if self.dry_run || self.drop_grain(extent, grain).await? {
                            plan.drop_grain(grain.at);
                            dropped += 1;
                        }
                    } else {
                        stored += content.stored;
                        if !self.dry_run {
                            self.punch_zeroes(extent.file, &content).await?;
                        }
                    }
                    if !self.step(1) {
                        break;
                    }
                }
                if self.result.stopped {
                    break;
                }
            }
        }
        self.result.dropped_grains += dropped;
        // Their places are free from here on.
        if dropped > 0 && !self.dry_run {
            self.disk.flush(self.io).await?;
        }
        Ok(stored)
    }

    /// Whether the disk would read as zeroes without the grain.
    async fn is_zero_below(&self, on_disk: u64, extent: &Sparse, grain: Named) -> Result<bool, DiskError> {
        if self.disk.chain.parents.is_empty() {
            return Ok(true);
        }
        // The last grain may reach past the disk.
        let end = (on_disk + extent.grain).min(self.disk.info.size);
        let mut at = on_disk;
        while at < end {
            let len = COPY.min(end - at);
            let buf = self.io.alloc(size(len));
            if self.disk.read_below(self.io, at, len, &buf).await? {
                let mut bytes = vec![0; size(len)];
                let failed = |e| {
                    DiskError::host(format!("read the parent of the grain at byte {} of the extent", grain.offset), e)
                };
                self.io.copy_out(&buf, 0, &mut bytes).map_err(failed)?;
                if !scan::is_zero(&bytes) {
                    return Ok(false);
                }
            }
            at += len;
        }
        Ok(true)
    }

    async fn drop_grain(&mut self, extent: &Sparse, grain: Named) -> Result<bool, DiskError> {
        self.disk.begin_change(self.io).await?;
        self.punch(extent.file, grain.at, grain.at + extent.grain).await?;
        self.change(extent, grain, None).await
    }

    /// Moves the grains behind unit `end` to free places in front of it.
    async fn move_grains(&mut self, extent: &Sparse, plan: &Plan, end: u64) -> Result<(), DiskError> {
        let limit = end * extent.grain;
        let mut free = plan.free(end);
        let (mut moved, mut kept): (Vec<u64>, bool) = (Vec::new(), false);
        let is_behind = |grain: &Named| grain.at >= limit && extent.is_aligned(grain.at);
        for page in 0..extent.page_count() {
            for run in self.runs(extent, page).await? {
                for grain in self.named(extent, run).await?.into_iter().filter(is_behind) {
                    let Some(to) = free.next() else { continue };
                    self.copy(extent, grain.at, to).await?;
                    match self.change(extent, grain, Some(to)).await? {
                        true => moved.push(grain.at),
                        false => kept = true,
                    }
                    self.result.moved_grains += u64::from(!kept);
                    let go_on = self.step(1);
                    if !go_on || moved.len() >= MOVES || moved.len() as u64 * extent.grain >= MOVED_BYTES {
                        self.settle(extent, &mut moved).await?;
                    }
                    if !go_on {
                        return Ok(());
                    }
                }
            }
        }
        self.settle(extent, &mut moved).await?;
        if !kept {
            extent.end_at(limit);
        }
        Ok(())
    }

    /// Makes the new places of grains durable, and gives the old ones back.
    async fn settle(&mut self, extent: &Sparse, moved: &mut Vec<u64>) -> Result<(), DiskError> {
        self.disk.flush(self.io).await?;
        moved.sort_unstable();
        let runs = TableRun::of(moved.drain(..).zip(0..).map(|(at, n)| (n, at)), extent.grain, u64::MAX);
        for run in runs {
            self.punch(extent.file, run.at, run.at + run.count * extent.grain).await?;
        }
        Ok(())
    }

    /// Copies a grain, zeroes left out where they are already.
    async fn copy(&self, extent: &Sparse, from: u64, to: u64) -> Result<(), DiskError> {
        let (io, file) = (self.io, extent.file);
        let is_zeroed = self.disk.file(file).is_none_or(|f| !f.cannot_punch.load(Ordering::Relaxed));
        let mut done = 0;
        while done < extent.grain {
            let (hole, run) = self.disk.stored_at(self.io, file, from + done, from + extent.grain).await?;
            if hole && is_zeroed {
                done += run;
                continue;
            }
            let len = COPY.min(extent.grain - done);
            // What is missing at the end of the file is zeroes.
            let there = extent.file_len.load(Ordering::Acquire).saturating_sub(from + done).min(len);
            let mut bytes = self.read(file, from + done, there).await?;
            bytes.resize(size(len), 0);
            for (start, part) in scan::to_write(&bytes, is_zeroed) {
                let at = to + done + start;
                let failed = |e| DiskError::host(format!("write {} bytes at {at} of {}", part.len(), extent.name), e);
                let buf = io.alloc(part.len());
                io.copy_in(&buf, 0, part).map_err(failed)?;
                io.write_at(file, &buf, 0..part.len(), at).await.map_err(failed)?;
            }
            done += len;
        }
        self.disk.cache.forget((file, to));
        self.disk.mark_dirty(file);
        Ok(())
    }

    /// Gives a grain another place, or none. Whether it could be.
    async fn change(&self, extent: &Sparse, grain: Named, to: Option<u64>) -> Result<bool, DiskError> {
        let (index, _, _) = extent.split(grain.offset);
        loop {
            let obstacle = match extent.table(index, |_| ()) {
                Lookup::Need(meta) => Obstacle::Need(extent, meta),
                Lookup::Absent => return Ok(false),
                Lookup::Table(()) => {
                    let changed = match to {
                        None => extent.free(grain.offset, grain.at),
                        Some(to) => extent.move_to(grain.offset, grain.at, to),
                    };
                    match changed {
                        Freeing::Done => {
                            // No request is under way. A grain that has no place any more was zeroes.
                            extent.freed(vec![Place { at: grain.at, len: extent.grain, zeroed: to.is_none() }]);
                            return Ok(true);
                        }
                        Freeing::Kept => return Ok(false),
                        Freeing::Reserve(room) => Obstacle::Reserve(extent, room),
                        Freeing::Flush => Obstacle::Flush,
                    }
                }
            };
            self.disk.overcome(self.io, obstacle).await?;
        }
    }

    /// The tables of a page of the directory that hold anything, as far as the file says.
    async fn runs(&self, extent: &Sparse, page: u64) -> Result<Vec<TableRun>, DiskError> {
        let Some(_page) = self.disk.load_page(self.io, extent, page).await? else { return Ok(Vec::new()) };
        let mut runs = extent.table_runs(page, TABLES).unwrap_or_default();
        let mut there = Vec::new();
        for run in runs.drain(..) {
            if !self.disk.is_hole(self.io, extent.file, run.at, run.count * extent.table_bytes()).await {
                there.push(run);
            }
        }
        Ok(there)
    }

    /// The grains that tables name. Each table is asked once between two flushes, before it changes.
    async fn named(&self, extent: &Sparse, run: TableRun) -> Result<Vec<Named>, DiskError> {
        let bytes = self.disk.read_metadata(self.io, extent.file, run.at, run.count * extent.table_bytes()).await?;
        let offset = |n: u64| (run.first * extent.gtes + n) * extent.grain;
        Ok(extent.places(&bytes).map(|(n, at)| Named { offset: offset(n), at }).collect())
    }

    async fn read(&self, file: FileId, at: u64, len: u64) -> Result<Vec<u8>, DiskError> {
        let read = read_bytes(self.io, file, at, size(len)).await;
        read.map_err(|e| DiskError::host(format!("read {len} bytes at {at} of {}", self.disk.name(file)), e))
    }

    /// Where a part of a file has zeroes that take space, and how much is left without them.
    async fn content(&self, file: FileId, at: u64, len: u64) -> Result<Content, DiskError> {
        let mut content = Content::default();
        let (mut from, end) = (at, at + len);
        while from < end {
            let (hole, len) = self.disk.stored_at(self.io, file, from, end).await?;
            let len = if hole { len } else { len.min(COPY) };
            if !hole {
                content.take(from, &self.read(file, from, len).await?);
            }
            from += len;
        }
        Ok(content)
    }

    async fn punch_zeroes(&self, file: FileId, content: &Content) -> Result<(), DiskError> {
        for &(at, end) in &content.zeroes {
            self.punch(file, at, end).await?;
        }
        Ok(())
    }

    /// Punches a hole, as far as it is whole blocks. A host that cannot keeps the space.
    async fn punch(&self, file: FileId, from: u64, to: u64) -> Result<(), DiskError> {
        let (from, to) = (from.next_multiple_of(scan::BLOCK), to / scan::BLOCK * scan::BLOCK);
        let Some(known) = self.disk.file(file).filter(|f| !f.cannot_punch.load(Ordering::Relaxed) && from < to) else {
            return Ok(());
        };
        match self.io.punch_hole(file, from, to - from).await {
            Err(e) if e.kind() == io::ErrorKind::Unsupported => {
                known.cannot_punch.store(true, Ordering::Relaxed);
                Ok(())
            }
            done => {
                done.map_err(|e| DiskError::host(format!("punch {} bytes at {from} of {}", to - from, known.name), e))
            }
        }
    }
}
