//! The disk that a transport serves: one place that sees every request.

use crate::cache::GrainCache;
use crate::change::FirstChange;
use crate::check::Fault;
use crate::error::{DiskError, ErrorKind};
use crate::file_io::{FileId, FileIo, read_bytes};
use crate::flush::{self, Failed, FlushPlan, Rounds, Step};
use crate::grace::Grace;
use crate::grow::End;
use crate::image::{Chain, Layout};
use crate::inflate::{Inflating, Slots};
use crate::info::Info;
use crate::ledger::Ledger;
use crate::request::{Geometry, Op, Request};
use crate::sparse::{MetaRef, Sparse};
use crate::wait::{WaitList, locked, until, wake};
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use vmdk_parse::ContentId;

/// An image that is open and can be served. Shared by all queues and connections.
#[derive(Debug)]
pub struct Disk {
    pub(crate) read_only: bool,
    /// See [`Geometry`].
    pub(crate) preferred_block: u32,
    pub(crate) end: End,
    pub(crate) chain: Chain,
    pub(crate) info: Info,
    /// What opening found to be wrong and went on.
    pub(crate) faults: Vec<Fault>,
    /// What a repair does about the content ID.
    pub(crate) content_id_step: Option<Step>,
    pub(crate) files: Vec<File>,
    pub(crate) cache: GrainCache,
    pub(crate) first_change: FirstChange,
    pub(crate) zeroout_unmaps: bool,
    pub(crate) rounds: Rounds,
    /// Requests that may be at places of grains.
    pub(crate) grace: Grace,
    pub(crate) loading: Mutex<HashMap<(FileId, MetaRef), WaitList>>,
    pub(crate) inflating: Inflating,
    pub(crate) slots: Mutex<Slots>,
    pub(crate) ledger: Option<Arc<Ledger>>,
    /// The content ID that the first change gives to the image; `None` if it has none that can be changed.
    pub(crate) new_content_id: Option<ContentId>,
}

/// What the disk remembers of a file of the image.
#[derive(Debug)]
pub(crate) struct File {
    pub(crate) name: String,
    /// Has data that no sync has covered.
    pub(crate) dirty: AtomicBool,
    /// The host's file system refused once to do this.
    pub(crate) cannot_punch: AtomicBool,
    pub(crate) cannot_zero: AtomicBool,
}

impl Disk {
    /// Size and limits. The size may grow, but for what a caller has.
    pub fn geometry(&self) -> Geometry {
        let size = self.chain.top.size();
        Geometry { size, read_only: self.read_only, preferred_block: self.preferred_block }
    }

    /// What the image is.
    pub fn info(&self) -> &Info {
        &self.info
    }

    /// Whether grains are compressed, of the image or of a parent: they are read faster side by side than one after the other.
    pub fn has_compressed(&self) -> bool {
        let links = std::iter::once(&self.chain.top).chain(&self.chain.parents);
        links.flat_map(|link| &link.extents).any(|e| matches!(&e.layout, Layout::Sparse(s) if s.is_compressed()))
    }

    /// Whether an earlier failure left it unknown what is durable: every change is refused with
    /// [`ErrorKind::Poisoned`], reads go on.
    pub fn is_poisoned(&self) -> bool {
        self.rounds.is_poisoned()
    }

    /// Waits until [`Disk::is_poisoned`], and answers why. On any executor.
    pub async fn poisoned(&self) -> Arc<str> {
        self.rounds.poisoned().await
    }

    /// Has `tell` called, once, when a sync has failed, before any request is answered by that: whoever goes on with the image must know
    /// of it, even if this process dies in the next moment. It must not wait for anybody.
    pub fn on_poison(&self, tell: impl Fn(&str) + Send + Sync + 'static) {
        self.rounds.on_poison(tell);
    }

    /// Serves one request. `buf` holds at least `request.len()` bytes from its byte 0 on for reads and writes and is
    /// not looked at otherwise.
    ///
    /// # Errors
    ///
    /// What failed, where. A failed read may have changed the buffer; a failed write may have changed its range.
    pub async fn serve<I: FileIo>(&self, io: &I, request: Request, buf: &I::Buf) -> Result<(), DiskError> {
        let (op, offset, len, flags) = (request.op(), request.offset(), request.len(), request.flags());
        tracing::trace!(?op, offset, len, fua = flags.fua, no_unmap = flags.no_unmap, "request");
        if len == 0 && op != Op::Flush {
            return if flags.fua && !self.read_only { self.flush(io).await } else { Ok(()) };
        }
        if op == Op::Flush {
            return self.flush(io).await;
        }
        if op == Op::Read {
            let _passage = self.grace.enter();
            return self.read(io, offset, len, buf).await;
        }
        self.check_poison()?;
        self.begin_change(io).await?;
        match op {
            Op::Discard => self.discard(io, offset, len).await?,
            Op::WriteZeroes => self.write_zeroes(io, offset, len, flags.no_unmap && !self.zeroout_unmaps).await?,
            _ => {
                let _passage = self.grace.enter();
                self.write(io, offset, len, buf).await?;
            }
        }
        if flags.fua { self.flush(io).await } else { Ok(()) }
    }

    /// Flushes and marks the image clean. No request may be under way or follow.
    ///
    /// # Errors
    ///
    /// What could not be made durable. The image then stays marked unclean.
    pub async fn close<I: FileIo>(&self, io: &I) -> Result<(), DiskError> {
        self.flush(io).await?;
        let steps = self.closing_steps();
        Ok(flush::run(io, &steps, |f| self.name(f)).await?)
    }

    pub(crate) async fn flush<I: FileIo>(&self, io: &I) -> Result<(), DiskError> {
        if self.read_only {
            return Ok(());
        }
        self.check_poison()?;
        let Some(round) = self.rounds.join().await else { return self.check_poison() };
        // An earlier round may have failed while this task waited.
        self.check_poison()?;
        let turned = self.ledger.as_ref().map(|ledger| (ledger, ledger.turn()));
        let plan = self.plan_flush();
        if let Some((ledger, turned)) = &turned {
            ledger.planned(turned);
        }
        match flush::run(io, &plan.steps, |f| self.name(f)).await {
            Ok(()) => {
                // Before a place is used again: a record of who had it must not outlive that.
                if let Some((ledger, turned)) = &turned {
                    ledger.settle(turned);
                }
                plan.done();
                round.succeeded();
                Ok(())
            }
            Err(Failed { error, nothing_lost: true }) if error.kind() == ErrorKind::NoSpace => {
                for file in plan.give_back() {
                    self.mark_dirty(file);
                }
                round.given_up();
                Err(error)
            }
            Err(Failed { error, nothing_lost }) => {
                // Grains that the ledger names may be lost, and the next sync would not say so.
                if let (Some(ledger), false) = (&self.ledger, nothing_lost) {
                    ledger.void();
                }
                round.failed(&error);
                Err(error)
            }
        }
    }

    pub(crate) fn plan_flush(&self) -> FlushPlan<'_> {
        FlushPlan::new(self.chain.top.writable_sparse(), || {
            let dirty = (0..).zip(&self.files).filter(|(_, f)| f.dirty.swap(false, Ordering::AcqRel));
            dirty.map(|(n, _)| FileId(n)).collect()
        })
    }

    fn check_poison(&self) -> Result<(), DiskError> {
        match self.rounds.why_poisoned() {
            None => Ok(()),
            Some(why) => Err(DiskError::new(
                ErrorKind::Poisoned,
                format!("no more changes until the image is attached again, since an earlier flush failed: {why}"),
            )),
        }
    }

    /// Reads a piece of metadata into memory, or waits while another task does. The caller looks again afterwards.
    pub(crate) async fn load<I: FileIo>(&self, io: &I, extent: &Sparse, meta: MetaRef) -> Result<(), DiskError> {
        let key = (extent.file, meta);
        let first = match locked(&self.loading).entry(key) {
            Entry::Occupied(_) => false,
            Entry::Vacant(v) => {
                v.insert(WaitList::default());
                true
            }
        };
        if !first {
            until(&self.loading, |l| match l.get_mut(&key) {
                Some(list) => Err(list),
                None => Ok(()),
            })
            .await;
            return Ok(());
        }
        let _loading = Loading { disk: self, key };
        // Somebody may have loaded it between the caller's look and now. It may even have changed since: what the file
        // holds must not take its place.
        if extent.has(meta) {
            return Ok(());
        }
        // The page of a table stays, so that the table has its place there.
        let _page = match meta {
            MetaRef::Table(table) => extent.page(table),
            MetaRef::Directory(_) => None,
        };
        let Some((at, copy_at, len)) = extent.place_of(meta)? else { return Ok(()) };
        let bytes = self.read_metadata(io, extent.file, at, len).await?;
        let copy = match copy_at {
            Some(at) => self.read_metadata(io, extent.file, at, len).await?,
            None => Vec::new(),
        };
        extent.supply(meta, &bytes, &copy)
    }

    /// Reads `len` bytes of metadata. The caller has checked that they lie in the file.
    pub(crate) async fn read_metadata<I: FileIo>(
        &self,
        io: &I,
        file: FileId,
        at: u64,
        len: u64,
    ) -> Result<Vec<u8>, DiskError> {
        read_bytes(io, file, at, size(len))
            .await
            .map_err(|e| DiskError::host(format!("read {len} bytes of metadata at {at} of {}", self.name(file)), e))
    }

    /// Bytes of a part of a file that take space on the host.
    pub(crate) async fn stored_bytes<I: FileIo>(
        &self,
        io: &I,
        file: FileId,
        from: u64,
        to: u64,
    ) -> Result<u64, DiskError> {
        let (mut at, mut bytes) = (from, 0);
        while at < to {
            let (hole, len) = self.stored_at(io, file, at, to).await?;
            bytes += if hole { 0 } else { len };
            at += len;
        }
        Ok(bytes)
    }

    /// Whether a hole begins there, and how long it or the data is, up to byte `end`.
    pub(crate) async fn stored_at<I: FileIo>(
        &self,
        io: &I,
        file: FileId,
        at: u64,
        end: u64,
    ) -> Result<(bool, u64), DiskError> {
        let stored = io.stored_at(file, at).await;
        let stored = stored.map_err(|e| DiskError::host(format!("look for holes in {}", self.name(file)), e))?;
        Ok((stored.hole, stored.len.min(end - at)))
    }

    pub(crate) fn name(&self, file: FileId) -> String {
        self.file(file).map_or_else(String::new, |f| f.name.clone())
    }

    pub(crate) fn file(&self, file: FileId) -> Option<&File> {
        self.files.get(usize::try_from(file.0).ok()?)
    }

    /// Notes that the file has data that is not durable. After the data was written, before its reply.
    pub(crate) fn mark_dirty(&self, file: FileId) {
        if let Some(f) = self.file(file)
            && !f.dirty.load(Ordering::Acquire)
        {
            f.dirty.store(true, Ordering::Release);
        }
    }

    /// The steps that mark the image clean and cut off what was never used.
    fn closing_steps(&self) -> Vec<Step> {
        if !self.first_change.happened() {
            return Vec::new();
        }
        let mut steps = Vec::new();
        for s in self.chain.top.writable_sparse() {
            if let Some(len) = s.cut_tail().filter(|end| *end < s.file_len.load(Ordering::Acquire)) {
                steps.push(Step::SetLen { file: s.file, len });
            }
        }
        steps.extend(self.chain.top.writable_sparse().filter_map(Sparse::free_sector_step));
        steps.extend(self.first_change.cleaning_steps());
        steps
    }
}

/// Ends a load, whatever its end is.
struct Loading<'a> {
    disk: &'a Disk,
    key: (FileId, MetaRef),
}

impl Drop for Loading<'_> {
    fn drop(&mut self) {
        let list = locked(&self.disk.loading).remove(&self.key);
        wake(list.map(|mut l| l.take()).unwrap_or_default());
    }
}

/// A length of a buffer that exists, as its index.
pub(crate) fn size(len: u64) -> usize {
    usize::try_from(len).unwrap_or(usize::MAX)
}
