//! Discard and write zeroes: space is given back by punching holes, in units of the host's blocks.
//!
//! A whole grain loses its entry first, if no parent would show through. The hole is punched when no request is at its place any
//! more: a write that was under way could fill it again, and then the place is used again ([`crate::free`]) and must read as zeroes.
//! Other grains keep their entries, and what is punched or written there at the same time is in the hands of whoever asked for both. A grain that is absent reads as zeroes already: both operations leave it so. Over a parent, write zeroes hides
//! what the parent has by a grain that is a hole, which every version of the format can say.

use crate::cache::GrainKey;
use crate::disk::{Disk, size};
use crate::error::{DiskError, ErrorKind};
use crate::file_io::{FileId, FileIo};
use crate::free::{self, Freeing};
use crate::image::{Found, Layout, Mapping, Place};
use crate::read::{Run, Runs, push};
use crate::sparse::Sparse;
use crate::write::Obstacle;
use futures_util::future::join_all;
use std::io;
use std::sync::atomic::Ordering;

/// Pieces that are zeroed at the same time: a discard of a gigabyte has thousands.
const AT_ONCE: usize = 32;

/// And so many bytes: one piece may be many grains.
const BYTES_AT_ONCE: u64 = 64 << 20;

/// Runs of places that wait for the requests under way together.
const MOST_EMPTIED: usize = 1 << 14;

/// A range of whole blocks of this size is one that no host refuses for its alignment.
const BLOCK: u64 = 4096;

/// Zeroes are written in pieces of this size where the host offers nothing better.
const ZEROES: u64 = 256 << 10;

/// The beginning of what is to be zeroed.
#[derive(Default)]
struct Batch {
    /// Bytes of it.
    len: u64,
    /// What is zeroed where it is.
    runs: Runs,
    /// Grains whose cached bytes will be wrong.
    stale: Vec<GrainKey>,
}

/// Places, in runs, of grains that have no entry any more.
#[derive(Default)]
struct Freed<'a>(Vec<FreedRun<'a>>);

struct FreedRun<'a> {
    extent: &'a Sparse,
    /// Byte offset in its file.
    at: u64,
    len: u64,
}

impl<'a> Freed<'a> {
    fn push(&mut self, extent: &'a Sparse, at: u64) {
        let len = extent.grain;
        match self.0.last_mut() {
            Some(r) if std::ptr::eq(r.extent, extent) && r.at + r.len == at && r.len < BYTES_AT_ONCE => r.len += len,
            _ => self.0.push(FreedRun { extent, at, len }),
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Zeroing {
    /// A hint: a host that cannot punch leaves the data.
    Discard,
    /// Must read as zeroes, and the space may go.
    Unmap,
    /// Must read as zeroes, and the space stays.
    Keep,
}

impl Disk {
    pub(crate) async fn discard<I: FileIo>(&self, io: &I, offset: u64, len: u64) -> Result<(), DiskError> {
        self.zero(io, offset, len, Zeroing::Discard).await
    }

    pub(crate) async fn write_zeroes<I: FileIo>(
        &self,
        io: &I,
        offset: u64,
        len: u64,
        keep: bool,
    ) -> Result<(), DiskError> {
        self.zero(io, offset, len, if keep { Zeroing::Keep } else { Zeroing::Unmap }).await
    }

    async fn zero<I: FileIo>(&self, io: &I, offset: u64, len: u64, how: Zeroing) -> Result<(), DiskError> {
        let (mut done, mut freed) = (0, Freed::default());
        while done < len {
            let zeroed = self.zero_some(io, offset + done, len - done, how, &mut freed).await;
            if zeroed.is_err() || freed.0.len() >= MOST_EMPTIED {
                self.empty(io, std::mem::take(&mut freed)).await?;
            }
            done += zeroed?;
        }
        self.empty(io, freed).await
    }

    /// Zeroes the beginning of a range, as far as it is not freed only. How much of it.
    async fn zero_some<'a, I: FileIo>(
        &'a self,
        io: &I,
        offset: u64,
        len: u64,
        how: Zeroing,
        freed: &mut Freed<'a>,
    ) -> Result<u64, DiskError> {
        let mut batch = Batch::default();
        let _passage = self.grace.enter();
        // Up to a multiple, which splits no grain.
        let enough = len.min((offset + BYTES_AT_ONCE) / BYTES_AT_ONCE * BYTES_AT_ONCE - offset);
        let planned = self.plan_zero(io, offset, enough, how, &mut batch, freed).await;
        let results = join_all(batch.runs.iter().map(|run| self.zero_run(io, run, how))).await;
        for run in &batch.runs {
            self.mark_dirty(run.file);
        }
        for key in batch.stale {
            self.cache.forget(key);
        }
        planned?;
        results.into_iter().collect::<Result<Vec<_>, _>>()?;
        Ok(batch.len)
    }

    /// Plans the beginning of a range, and takes the entries of whole grains away. What the batch has is to be done even after an
    /// error.
    async fn plan_zero<'a, I: FileIo>(
        &'a self,
        io: &I,
        offset: u64,
        len: u64,
        how: Zeroing,
        batch: &mut Batch,
        freed: &mut Freed<'a>,
    ) -> Result<(), DiskError> {
        while batch.len < len && batch.runs.len() < AT_ONCE {
            let (offset, len) = (offset + batch.len, len - batch.len);
            let place = self.chain.top.locate(offset, len)?;
            place.check_writable()?;
            batch.len += match place.map()? {
                Mapping::NeedMeta(meta) => {
                    self.load_at(io, place, meta).await?;
                    0
                }
                // Who may be written is not barred.
                Mapping::Zero { len } | Mapping::Barred { len } => len,
                Mapping::Parent { len } if how == Zeroing::Discard => len,
                Mapping::Parent { len: absent } => match self.chain.find_from(1, offset, absent) {
                    Ok(Found { place: Some(below), mapping: Mapping::NeedMeta(meta), .. }) => {
                        self.load_at(io, below, meta).await?;
                        0
                    }
                    Ok(Found { mapping: Mapping::Zero { len }, .. }) => len,
                    // What cannot be read is hidden like anything else.
                    _ => self.hide_parent(io, offset, len).await?,
                },
                Mapping::Compressed { file, record, .. } => {
                    // Opening for writing refuses compressed extents, so nobody sees this.
                    let what = format!("{}: the grain at byte {} is compressed", self.name(file), record.at);
                    return Err(DiskError::new(ErrorKind::ReadOnly, what));
                }
                Mapping::Data { file, offset: at, len, grain } => {
                    match self.covers_grain(place, len, how) {
                        Some(extent) if self.free(io, extent, place.offset, at).await? => freed.push(extent, at),
                        _ => {
                            batch.stale.extend(grain.map(|g| (file, g.start)));
                            push(&mut batch.runs, Run { file, at, start: batch.len, len, grain });
                        }
                    }
                    len
                }
            };
        }
        Ok(())
    }

    /// The extent, if `len` bytes at this place are a whole grain of it that may lose its entry.
    fn covers_grain<'a>(&self, place: Place<'a>, len: u64, how: Zeroing) -> Option<&'a Sparse> {
        let Layout::Sparse(extent) = &place.extent.layout else { return None };
        let is_last = place.offset + len == place.extent.len();
        let is_whole = place.offset.is_multiple_of(extent.grain) && (len == extent.grain || is_last);
        let may = how != Zeroing::Keep && self.chain.parents.is_empty() && extent.frees_grains();
        (is_whole && may).then_some(&**extent)
    }

    /// Whether the grain at `offset` of the extent, which is at byte `at` of its file, has lost its entry.
    async fn free<I: FileIo>(&self, io: &I, extent: &Sparse, offset: u64, at: u64) -> Result<bool, DiskError> {
        loop {
            let obstacle = match extent.free(offset, at) {
                Freeing::Done => return Ok(true),
                Freeing::Kept => return Ok(false),
                Freeing::Reserve(room) => Obstacle::Reserve(extent, room),
                Freeing::Flush => Obstacle::Flush,
            };
            match self.overcome(io, obstacle).await {
                // Its table cannot change: it keeps its entry.
                Err(e) if e.kind() == ErrorKind::NoSpace => return Ok(false),
                result => result?,
            }
        }
    }

    /// Makes holes of places that no entry names any more, when no request is at them, and hands them on to be used again. Whoever calls
    /// this is not under way itself.
    async fn empty<I: FileIo>(&self, io: &I, freed: Freed<'_>) -> Result<(), DiskError> {
        if freed.0.is_empty() {
            return Ok(());
        }
        self.grace.all_left().await;
        // What is in the cache by now is the last of it: nobody looks for these places any more.
        for r in &freed.0 {
            let grains = (r.at..r.at + r.len).step_by(size(r.extent.grain));
            grains.for_each(|grain| self.cache.forget((r.extent.file, grain)));
        }
        let punch = async |&FreedRun { extent, at, len }: &FreedRun<'_>| {
            let run = Run { file: extent.file, at, start: 0, len, grain: None };
            // Nobody sees what is there: a host that cannot punch need not write zeroes.
            let punched = self.zero_run(io, &run, Zeroing::Discard).await;
            extent.freed(vec![free::Place { at, len, zeroed: matches!(punched, Ok(true)) }]);
            punched.map(drop)
        };
        let mut result = Ok(());
        for some in freed.0.chunks(AT_ONCE) {
            let punched = join_all(some.iter().map(punch)).await;
            result = result.and(punched.into_iter().collect());
        }
        result
    }

    /// Whether the run is a hole now.
    async fn zero_run<I: FileIo>(&self, io: &I, run: &Run, how: Zeroing) -> Result<bool, DiskError> {
        let Some(file) = self.file(run.file) else { return Ok(false) };
        let failed = |what: &str, e: io::Error| {
            DiskError::host(format!("{what} {} bytes at {} of {}", run.len, run.at, file.name), e)
        };
        // A block device refuses what is no multiple of its blocks, and only that.
        let whole_blocks = (run.at | run.len).is_multiple_of(BLOCK);
        if how != Zeroing::Keep && !file.cannot_punch.load(Ordering::Relaxed) {
            match io.punch_hole(run.file, run.at, run.len).await {
                Err(e) if e.kind() == io::ErrorKind::Unsupported && !whole_blocks => {}
                Err(e) if e.kind() == io::ErrorKind::Unsupported => {
                    tracing::warn!(
                        file = file.name,
                        "the host's file system cannot punch holes: no space is given back"
                    );
                    file.cannot_punch.store(true, Ordering::Relaxed);
                }
                result => return result.map(|()| true).map_err(|e| failed("punch a hole of", e)),
            }
        }
        if how == Zeroing::Discard {
            return Ok(false);
        }
        if !file.cannot_zero.load(Ordering::Relaxed) {
            match io.zero_range(run.file, run.at, run.len).await {
                Err(e) if e.kind() == io::ErrorKind::Unsupported && !whole_blocks => {}
                Err(e) if e.kind() == io::ErrorKind::Unsupported => file.cannot_zero.store(true, Ordering::Relaxed),
                result => return result.map(|()| false).map_err(|e| failed("zero", e)),
            }
        }
        let written = self.write_zero_bytes(io, run.file, run.at, run.len).await;
        written.map(|()| false).map_err(|e| failed("write zeroes to", e))
    }

    async fn write_zero_bytes<I: FileIo>(&self, io: &I, file: FileId, at: u64, len: u64) -> io::Result<()> {
        let zeroes = io.alloc(size(len.min(ZEROES)));
        let mut done = 0;
        while done < len {
            let piece = (len - done).min(ZEROES);
            io.write_at(file, &zeroes, 0..size(piece), at + done).await?;
            done += piece;
        }
        Ok(())
    }
}
