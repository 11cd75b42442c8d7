//! Discard and write zeroes: space is given back by punching holes under grains that keep their entries.
//!
//! No metadata changes, so nothing can be lost by a crash, and it works in units of the host's blocks. A grain that is
//! absent reads as zeroes already: both operations leave it so. Over a parent, write zeroes hides what the parent has by a
//! grain that is a hole, which every version of the format can say.

use crate::cache::GrainKey;
use crate::disk::{Disk, size};
use crate::error::{DiskError, ErrorKind};
use crate::file_io::{FileId, FileIo};
use crate::image::{Found, Mapping};
use crate::read::{Run, Runs, push};
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
            let enough = len.min(done + BYTES_AT_ONCE);
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
            results.into_iter().collect::<Result<(), _>>()?;
        }
        Ok(())
    }

    async fn zero_run<I: FileIo>(&self, io: &I, run: &Run, how: Zeroing) -> Result<(), DiskError> {
        let Some(file) = self.file(run.file) else { return Ok(()) };
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
                result => return result.map_err(|e| failed("punch a hole of", e)),
            }
        }
        if how == Zeroing::Discard {
            return Ok(());
        }
        if !file.cannot_zero.load(Ordering::Relaxed) {
            match io.zero_range(run.file, run.at, run.len).await {
                Err(e) if e.kind() == io::ErrorKind::Unsupported && !whole_blocks => {}
                Err(e) if e.kind() == io::ErrorKind::Unsupported => file.cannot_zero.store(true, Ordering::Relaxed),
                result => return result.map_err(|e| failed("zero", e)),
            }
        }
        self.write_zero_bytes(io, run.file, run.at, run.len).await.map_err(|e| failed("write zeroes to", e))
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
