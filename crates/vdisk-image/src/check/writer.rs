//! How a repair changes a file: never before what is there is kept, durably.

use crate::disk::{Disk, size};
use crate::error::DiskError;
use crate::file_io::{FileId, FileIo};
use crate::flush::{self, Step};
use std::collections::HashSet;
use std::io;
use vmdk_parse::SECTOR_SIZE;

/// Changes that are written together, in bytes.
const BATCH: usize = 4 << 20;

/// What is kept at once, in bytes.
const PIECE: u64 = 1 << 20;

/// What a host's file system can give back: less than a block it only zeroes.
const BLOCK: u64 = 4096;

/// What a repair is about to change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kept<'a> {
    /// Whole sectors, or the rest of the file, from a byte on: what is there, and what will be. Both are of the same length.
    Bytes {
        /// The file.
        file: FileId,
        /// Byte offset.
        offset: u64,
        /// What is there.
        before: &'a [u8],
        /// What will be there.
        after: &'a [u8],
    },
    /// The length of a file. What it loses is kept before; what it gains is not.
    Len {
        /// The file.
        file: FileId,
        /// Its length.
        before: u64,
        /// What its length will be.
        after: u64,
    },
}

/// Keeps what a repair changes, so that it can be undone: each thing as it was, the last one put back first.
pub trait Backup {
    /// Keeps this.
    ///
    /// # Errors
    ///
    /// The host's: then nothing of it is changed.
    fn keep(&mut self, kept: Kept<'_>) -> io::Result<()>;

    /// Makes what was kept durable.
    ///
    /// # Errors
    ///
    /// The host's: then nothing of what was kept since the last time is changed.
    fn sync(&mut self) -> io::Result<()>;
}

/// Changes files, a batch at a time.
pub(super) struct Writer<'a, I, B> {
    pub(super) disk: &'a Disk,
    pub(super) io: &'a I,
    backup: &'a mut B,
    steps: Vec<Step>,
    bytes: usize,
    /// Sectors in the batch.
    sectors: HashSet<(FileId, u64)>,
}

impl<'a, I: FileIo, B: Backup> Writer<'a, I, B> {
    pub(super) fn new(disk: &'a Disk, io: &'a I, backup: &'a mut B) -> Self {
        Self { disk, io, backup, steps: Vec::new(), bytes: 0, sectors: HashSet::new() }
    }

    /// Changes bytes that are in the file, some time before [`Writer::commit`] ends. What is the same already is not written.
    pub(super) async fn write(&mut self, file: FileId, offset: u64, bytes: &[u8]) -> Result<(), DiskError> {
        for (at, part) in by_sector(offset, bytes) {
            let first = at / SECTOR_SIZE * SECTOR_SIZE;
            if self.sectors.contains(&(file, first)) {
                self.commit().await?;
            }
            let skip = size(at - first);
            let before = self.sector(file, first, at + part.len() as u64).await?;
            let mut after = before.clone();
            if let Some(place) = after.get_mut(skip..skip + part.len()) {
                place.copy_from_slice(part);
            }
            if before != after {
                self.keep(Kept::Bytes { file, offset: first, before: &before, after: &after })?;
                self.sectors.insert((file, first));
                self.push(file, first, after).await?;
            }
        }
        Ok(())
    }

    /// The sector at `first`; of the last one of a file as much as there is.
    async fn sector(&self, file: FileId, first: u64, end: u64) -> Result<Vec<u8>, DiskError> {
        match self.disk.read_metadata(self.io, file, first, SECTOR_SIZE).await {
            // What is there behind the change stays, kept or not.
            Err(e) if e.is_end_of_file() => self.disk.read_metadata(self.io, file, first, end - first).await,
            read => read,
        }
    }

    /// Fills a part of the file that [`Writer::grow`] has added.
    pub(super) async fn write_new(&mut self, file: FileId, offset: u64, bytes: Vec<u8>) -> Result<(), DiskError> {
        self.push(file, offset, bytes).await
    }

    async fn push(&mut self, file: FileId, offset: u64, bytes: Vec<u8>) -> Result<(), DiskError> {
        self.bytes += bytes.len();
        self.steps.push(Step::Write { file, offset, bytes });
        if self.bytes >= BATCH { self.commit().await } else { Ok(()) }
    }

    /// Writes what is left of the batch, and makes it durable.
    pub(super) async fn commit(&mut self) -> Result<(), DiskError> {
        if self.steps.is_empty() {
            return Ok(());
        }
        self.sync_backup()?;
        let mut steps = std::mem::take(&mut self.steps);
        let mut files: Vec<FileId> = steps.iter().filter_map(Step::written).collect();
        files.sort_unstable();
        files.dedup();
        steps.extend(files.into_iter().map(Step::Barrier));
        self.bytes = 0;
        self.sectors.clear();
        Ok(flush::run(self.io, &steps, |f| self.disk.name(f)).await?)
    }

    /// Extends the file by a hole, durably.
    pub(super) async fn grow(&mut self, file: FileId, from: u64, to: u64) -> Result<(), DiskError> {
        self.set_len(file, from, to).await
    }

    /// Cuts the end of the file off, durably.
    pub(super) async fn cut(&mut self, file: FileId, from: u64, to: u64) -> Result<(), DiskError> {
        self.keep_data(file, to, from).await?;
        self.set_len(file, from, to).await
    }

    async fn set_len(&mut self, file: FileId, from: u64, to: u64) -> Result<(), DiskError> {
        self.keep(Kept::Len { file, before: from, after: to })?;
        self.sync_backup()?;
        let failed = |e| DiskError::host(format!("set the length of {} to {to} bytes", self.disk.name(file)), e);
        self.io.set_len(file, to).await.map_err(failed)?;
        self.barrier(file).await
    }

    /// Punches a hole, durably, as far as it can be one. Bytes that the host has got back.
    pub(super) async fn punch(&mut self, file: FileId, start: u64, end: u64) -> Result<u64, DiskError> {
        let (start, end) = (start.next_multiple_of(BLOCK), end / BLOCK * BLOCK);
        let before = if start < end { self.disk.stored_bytes(self.io, file, start, end).await? } else { 0 };
        if before == 0 {
            return Ok(0);
        }
        self.keep_data(file, start, end).await?;
        self.sync_backup()?;
        match self.io.punch_hole(file, start, end - start).await {
            Ok(()) => {}
            Err(e) if e.kind() == io::ErrorKind::Unsupported => return Ok(0),
            Err(e) => {
                let what = format!("punch a hole of {} bytes at {start} of {}", end - start, self.disk.name(file));
                return Err(DiskError::host(what, e));
            }
        }
        self.barrier(file).await?;
        // Blocks of the host may be larger than ours.
        Ok(before.saturating_sub(self.disk.stored_bytes(self.io, file, start, end).await?))
    }

    /// Keeps a part of a file that is to read as zeroes, or not at all.
    async fn keep_data(&mut self, file: FileId, start: u64, end: u64) -> Result<(), DiskError> {
        let zeroes = vec![0; size(PIECE)];
        let mut at = start;
        while at < end {
            let (hole, mut len) = self.disk.stored_at(self.io, file, at, end).await?;
            if !hole {
                len = len.min(PIECE);
                let before = self.disk.read_metadata(self.io, file, at, len).await?;
                let after = zeroes.get(..size(len)).unwrap_or_default();
                if before != after {
                    self.keep(Kept::Bytes { file, offset: at, before: &before, after })?;
                }
            }
            at += len;
        }
        Ok(())
    }

    async fn barrier(&self, file: FileId) -> Result<(), DiskError> {
        Ok(flush::run(self.io, &[Step::Barrier(file)], |f| self.disk.name(f)).await?)
    }

    fn keep(&mut self, kept: Kept<'_>) -> Result<(), DiskError> {
        self.backup.keep(kept).map_err(|e| DiskError::host("keep what is about to change", e))
    }

    fn sync_backup(&mut self) -> Result<(), DiskError> {
        self.backup.sync().map_err(|e| DiskError::host("keep what is about to change", e))
    }
}

/// The parts of a write that lie in one sector each.
fn by_sector(offset: u64, bytes: &[u8]) -> impl Iterator<Item = (u64, &[u8])> {
    let (mut at, mut rest) = (offset, bytes);
    std::iter::from_fn(move || {
        let len = size(SECTOR_SIZE - at % SECTOR_SIZE).min(rest.len());
        let (part, after) = rest.split_at(len);
        let this = (at, part);
        (at, rest) = (at + len as u64, after);
        (len > 0).then_some(this)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_write_is_cut_at_every_sectors_border() {
        let parts = |at, len| by_sector(at, &[7; 2000][..len]).map(|(at, p)| (at, p.len())).collect::<Vec<_>>();
        assert_eq!(parts(511, 0), []);
        assert_eq!(parts(511, 1), [(511, 1)]);
        assert_eq!(parts(511, 515), [(511, 1), (512, 512), (1024, 2)]);
        assert_eq!(parts(512, 512), [(512, 512)]);
    }
}
