//! Reading.

use crate::cache::{Cached, MAX_GRAIN};
use crate::disk::{Disk, size};
use crate::error::{DiskError, ErrorKind};
use crate::file_io::{FileId, FileIo, read_bytes};
use crate::image::{Found, Grain, Layout, Mapping, Place};
use crate::inflate::{Packed, Packs};
use crate::sparse::MetaRef;
use futures_util::future::{join, join_all};
use smallvec::SmallVec;
use std::ops::Range;
use std::sync::Arc;

/// A piece of a request that is in one place in a file.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Run {
    pub(crate) file: FileId,
    /// Byte offset in the file.
    pub(crate) at: u64,
    /// Byte offset in the request's buffer.
    pub(crate) start: u64,
    pub(crate) len: u64,
    /// The grain that it lies in, if it lies in one.
    pub(crate) grain: Option<Grain>,
}

/// The pieces of a request. The usual one has one or two, which take no heap.
pub(crate) type Runs = SmallVec<[Run; 4]>;

impl Run {
    pub(crate) fn part(&self) -> Range<usize> {
        size(self.start)..size(self.start + self.len)
    }
}

/// Adds a run, joined to the last one if it goes on there.
pub(crate) fn push(runs: &mut Runs, run: Run) {
    match runs.last_mut() {
        Some(last) if last.file == run.file && last.at + last.len == run.at && last.start + last.len == run.start => {
            last.len += run.len;
            last.grain = None;
        }
        _ => runs.push(run),
    }
}

impl Disk {
    pub(crate) async fn read<I: FileIo>(&self, io: &I, offset: u64, len: u64, buf: &I::Buf) -> Result<(), DiskError> {
        self.read_by(io, offset, len, buf, |offset, len| self.chain.find(offset, len)).await.map(drop)
    }

    /// Reads what the top link's parents have. Whether there is anything but zeroes that no link has.
    pub(crate) async fn read_below<I: FileIo>(
        &self,
        io: &I,
        offset: u64,
        len: u64,
        buf: &I::Buf,
    ) -> Result<bool, DiskError> {
        self.read_by(io, offset, len, buf, |offset, len| self.chain.find_from(1, offset, len)).await
    }

    async fn read_by<'a, I: FileIo>(
        &'a self,
        io: &I,
        offset: u64,
        len: u64,
        buf: &I::Buf,
        find: impl Fn(u64, u64) -> Result<Found<'a>, DiskError>,
    ) -> Result<bool, DiskError> {
        let mut runs = Runs::new();
        let mut packs = Packs::new();
        let mut done = 0;
        while done < len {
            let Found { place, mapping, .. } = find(offset + done, len - done)?;
            match mapping {
                Mapping::NeedMeta(meta) => {
                    if let Some(place) = place {
                        self.load_at(io, place, meta).await?;
                    }
                }
                Mapping::Zero { len } | Mapping::Parent { len } => {
                    fill_zero(io, buf, done, len)?;
                    done += len;
                }
                Mapping::Barred { .. } => {
                    let at = place.map_or(offset + done, |p| p.extent.start);
                    let what = format!("the extent at byte {at} of the disk is marked NOACCESS");
                    return Err(DiskError::new(ErrorKind::PermissionDenied, what));
                }
                Mapping::Compressed { file, record, skip, len } => {
                    packs.push(Packed { file, record, skip, len, start: done });
                    done += len;
                }
                Mapping::Data { file, offset: at, len, grain } => {
                    push(&mut runs, Run { file, at, start: done, len, grain });
                    done += len;
                }
            }
        }
        if packs.is_empty() {
            self.read_runs(io, &runs, buf).await?;
        } else {
            // Boxed, so that the usual request is no larger for it.
            let (packed, plain) =
                join(Box::pin(self.read_packed(io, &packs, buf)), Box::pin(self.read_runs(io, &runs, buf))).await;
            packed.and(plain)?;
        }
        Ok(!packs.is_empty() || !runs.is_empty())
    }

    async fn read_runs<I: FileIo>(&self, io: &I, runs: &Runs, buf: &I::Buf) -> Result<(), DiskError> {
        match **runs {
            [] => Ok(()),
            [ref run] => self.read_run(io, run, buf).await,
            _ => join_all(runs.iter().map(|run| self.read_run(io, run, buf))).await.into_iter().collect(),
        }
    }

    /// Loads metadata of the extent that `place` is in.
    pub(crate) async fn load_at<I: FileIo>(&self, io: &I, place: Place<'_>, meta: MetaRef) -> Result<(), DiskError> {
        match &place.extent.layout {
            Layout::Sparse(s) => self.load(io, s, meta).await,
            // Only sparse extents have metadata.
            Layout::Flat { .. } | Layout::Zero => Ok(()),
        }
    }

    async fn read_run<I: FileIo>(&self, io: &I, run: &Run, buf: &I::Buf) -> Result<(), DiskError> {
        if let Some(grain) = run.grain.filter(|g| g.whole && run.len < g.len && g.len <= MAX_GRAIN) {
            match self.cache.look_up((run.file, grain.start), size(grain.len), size(run.len)) {
                Cached::Hit(bytes) => {
                    let skip = size(run.at - grain.start);
                    if let Some(part) = bytes.get(skip..skip + size(run.len)) {
                        return hand_over(io, buf, run.start, part);
                    }
                }
                Cached::Fill(fill) => {
                    let bytes = self.read_grain(io, run.file, grain).await;
                    self.cache.fill(&fill, bytes.clone());
                    let skip = size(run.at - grain.start);
                    if let Some(part) = bytes.as_deref().and_then(|b| b.get(skip..skip + size(run.len))) {
                        return hand_over(io, buf, run.start, part);
                    }
                    // One bad sector somewhere in the grain must not fail a read beside it.
                }
                Cached::Miss | Cached::Coming => {}
            }
        }
        io.read_at(run.file, buf, run.part(), run.at)
            .await
            .map_err(|e| DiskError::host(format!("read {} bytes at {} of {}", run.len, run.at, self.name(run.file)), e))
    }

    async fn read_grain<I: FileIo>(&self, io: &I, file: FileId, grain: Grain) -> Option<Arc<[u8]>> {
        Some(Arc::from(read_bytes(io, file, grain.start, size(grain.len)).await.ok()?))
    }
}

/// Stores bytes in a request's buffer.
pub(crate) fn hand_over<I: FileIo>(io: &I, buf: &I::Buf, at: u64, bytes: &[u8]) -> Result<(), DiskError> {
    let failed = |e| DiskError::host(format!("copy {} bytes to byte {at} of a request", bytes.len()), e);
    io.copy_in(buf, size(at), bytes).map_err(failed)
}

/// Zeroes a part of a request's buffer.
pub(crate) fn fill_zero<I: FileIo>(io: &I, buf: &I::Buf, at: u64, len: u64) -> Result<(), DiskError> {
    let failed = |e| DiskError::host(format!("zero {len} bytes at byte {at} of a request"), e);
    io.fill_zero(buf, size(at)..size(at + len)).map_err(failed)
}
