//! Discard and write zeroes: space is given back by punching holes, in units of the host's blocks. So it is safe at once: whatever
//! entries a crash leaves, what was zeroed reads as zeroes.
//!
//! A whole grain then loses its entry, if no parent would show through, and its place is used again ([`crate::free`]). Other
//! grains keep theirs. A grain that is absent reads as zeroes already: both operations leave it so. Over a parent, write zeroes hides
//! what the parent has by a grain that is a hole, which every version of the format can say.

use crate::cache::GrainKey;
use crate::disk::{Disk, size};
use crate::error::{DiskError, ErrorKind};
use crate::file_io::{FileId, FileIo};
use crate::free::Freeing;
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

/// A range of whole blocks of this size is one that no host refuses for its alignment.
const BLOCK: u64 = 4096;

/// Zeroes are written in pieces of this size where the host offers nothing better.
const ZEROES: u64 = 256 << 10;

/// A grain that is zeroed as a whole.
struct Whole<'a> {
    extent: &'a Sparse,
    /// In the extent.
    offset: u64,
    /// Byte offset in the file.
    at: u64,
    /// Index of the run that zeroes it.
    run: usize,
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
        let mut done = 0;
        while done < len {
            let mut runs = Runs::new();
            let mut stale: Vec<GrainKey> = Vec::new();
            let mut whole: Vec<Whole<'_>> = Vec::new();
            // Up to a multiple, which splits no grain.
            let enough = len.min((offset + done + BYTES_AT_ONCE) / BYTES_AT_ONCE * BYTES_AT_ONCE - offset);
            while done < enough && runs.len() < AT_ONCE {
                let place = self.chain.top.locate(offset + done, enough - done)?;
                place.check_writable()?;
                match place.map()? {
                    Mapping::NeedMeta(meta) => self.load_at(io, place, meta).await?,
                    // Who may be written is not barred.
                    Mapping::Zero { len } | Mapping::Barred { len } => done += len,
                    Mapping::Parent { len } if how == Zeroing::Discard => done += len,
                    Mapping::Parent { len } => match self.chain.find_from(1, offset + done, len) {
                        Ok(Found { place: Some(below), mapping: Mapping::NeedMeta(meta), .. }) => {
                            self.load_at(io, below, meta).await?;
                        }
                        Ok(Found { mapping: Mapping::Zero { len }, .. }) => done += len,
                        // What cannot be read is hidden like anything else.
                        _ => done += self.hide_parent(io, offset + done, enough - done).await?,
                    },
                    Mapping::Compressed { file, record, .. } => {
                        // Opening for writing refuses compressed extents, so nobody sees this.
                        let what = format!("{}: the grain at byte {} is compressed", self.name(file), record.at);
                        return Err(DiskError::new(ErrorKind::ReadOnly, what));
                    }
                    Mapping::Data { file, offset: at, len, grain } => {
                        push(&mut runs, Run { file, at, start: done, len, grain });
                        stale.extend(grain.map(|g| (file, g.start)));
                        if let Some(extent) = self.covers_grain(place, len, how) {
                            whole.push(Whole { extent, offset: place.offset, at, run: runs.len() - 1 });
                        }
                        done += len;
                    }
                }
            }
            let results = join_all(runs.iter().map(|run| self.zero_run(io, run, how))).await;
            for run in &runs {
                self.mark_dirty(run.file);
            }
            for key in stale {
                self.cache.forget(key);
            }
            let punched = results.into_iter().collect::<Result<Vec<bool>, _>>()?;
            for grain in whole {
                let punched = punched.get(grain.run).copied().unwrap_or(false);
                // Zeroes that were written are gone with their place, and would have to be again: not before a flush.
                if punched || how == Zeroing::Discard {
                    self.free(io, &grain, punched).await?;
                }
            }
        }
        Ok(())
    }

    /// The extent, if `len` bytes at this place are a whole grain of it that may lose its entry.
    fn covers_grain<'a>(&self, place: Place<'a>, len: u64, how: Zeroing) -> Option<&'a Sparse> {
        let Layout::Sparse(extent) = &place.extent.layout else { return None };
        let is_last = place.offset + len == place.extent.len;
        let is_whole = place.offset.is_multiple_of(extent.grain) && (len == extent.grain || is_last);
        let may = how != Zeroing::Keep && self.chain.parents.is_empty() && extent.frees_grains();
        (is_whole && may).then_some(&**extent)
    }

    async fn free<I: FileIo>(&self, io: &I, grain: &Whole<'_>, zeroed: bool) -> Result<(), DiskError> {
        loop {
            let obstacle = match grain.extent.free(grain.offset, grain.at, zeroed) {
                Freeing::Done | Freeing::Kept => return Ok(()),
                Freeing::Reserve(room) => Obstacle::Reserve(grain.extent, room),
                Freeing::Flush => Obstacle::Flush,
            };
            match self.overcome(io, obstacle).await {
                // Its table cannot change: it keeps its entry.
                Err(e) if e.kind() == ErrorKind::NoSpace => return Ok(()),
                result => result?,
            }
        }
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
