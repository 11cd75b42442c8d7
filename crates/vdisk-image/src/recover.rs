//! Taking over what a process that died has left in its ledger.

use crate::allocate::sector_number;
use crate::disk::Disk;
use crate::error::DiskError;
use crate::file_io::FileIo;
use crate::image::Layout;
use crate::ledger::{EXTENTS, Ledger, LedgerMemory, LedgerOf, Record, What};
use crate::sparse::{Lookup, MetaRef, Sparse};
use crate::table::{PAGE_ENTRIES, TableCopy};
use crate::wait::locked;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use vmdk_parse::{Access, ContentId, SECTOR_SIZE};

/// What [`Disk::keep_ledger`] found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TakenOver {
    /// Grains that the image has now, and had not before.
    pub grains: u64,
    /// There were grains that do not fit the image any more: it was closed or changed by somebody who did not know of them.
    pub others: bool,
}

/// Whether a ledger has grains that are not in an image, of whatever image.
pub fn is_ledger_empty(memory: Arc<dyn LedgerMemory>) -> bool {
    Ledger::new(memory).is_empty()
}

impl Disk {
    /// Grains that a process which died has left in a ledger for this image: they are not in the image, and what it shows is as
    /// old as the last flush.
    pub fn left_in(&self, memory: Arc<dyn LedgerMemory>) -> u64 {
        self.left(&Ledger::new(memory)).iter().filter(|r| matches!(r.what, What::Grain { .. })).count() as u64
    }

    fn left(&self, ledger: &Ledger) -> Vec<Record> {
        // Whoever has closed the image since, or changed it, has not seen what is in the ledger.
        match self.info.content_id {
            Some(id) if !self.info.clean => ledger.left(id),
            _ => Vec::new(),
        }
    }

    /// Whether [`Disk::keep_ledger`] would keep one. An image that is only read, or has neither tables nor a content ID to be known
    /// by, has no use for it.
    pub fn needs_ledger(&self) -> bool {
        let tables = self.chain.top.writable_sparse().count();
        (1..EXTENTS).contains(&tables) && self.new_content_id.is_some() && !self.read_only
    }

    /// Whether what a ledger had is not to be had any more: a sync has failed, or somebody who did not know of it has closed or changed
    /// the image. One that keeps none has lost none: it is of another file that was deleted and had the same inode.
    pub fn is_lost(&self, memory: Arc<dyn LedgerMemory>) -> bool {
        let ledger = Ledger::new(memory);
        self.needs_ledger() && (ledger.is_void() || self.left(&ledger).is_empty() && !ledger.is_empty())
    }

    /// Whether a write that was answered is lost with this process, unless a ledger is kept or it was flushed.
    pub fn may_lose_entries(&self) -> bool {
        !self.read_only && self.chain.top.writable_sparse().next().is_some()
    }

    /// The content ID that the image has, and the one that it gets from this disk's first change.
    pub fn content_ids(&self) -> impl Iterator<Item = ContentId> {
        self.info.content_id.into_iter().chain(self.new_content_id)
    }

    /// Takes over what is left in a ledger for this image, durably, and keeps the ledger from now on: a write that was acknowledged
    /// survives the death of this process. Nothing was served yet.
    ///
    /// # Errors
    ///
    /// As of a write and a flush; the ledger then still has everything, unless it was a sync that failed.
    pub async fn keep_ledger<I: FileIo>(
        &mut self,
        io: &I,
        memory: Arc<dyn LedgerMemory>,
    ) -> Result<TakenOver, DiskError> {
        let Some(id) = self.new_content_id.filter(|_| self.needs_ledger()) else { return Ok(TakenOver::default()) };
        let ledger = Ledger::new(memory);
        let left = self.left(&ledger);
        let mut taken = TakenOver { grains: 0, others: left.is_empty() && !ledger.is_empty() };
        if let (Some(now), false) = (self.info.content_id, left.is_empty()) {
            self.check_data(io, &ledger).await?;
            // The first change gives the image another content ID, and this process may die as well.
            ledger.allow(now, id);
            self.begin_change(io).await?;
            for record in left {
                taken.grains += u64::from(self.take_over(io, record).await?);
            }
            self.flush(io).await?;
        }
        ledger.begin(id);
        let ledger = Arc::new(ledger);
        for (extent, sparse) in self.chain.top.extents.iter_mut().filter_map(writable_sparse).enumerate() {
            sparse.ledger = Some(LedgerOf { ledger: Arc::clone(&ledger), extent });
        }
        self.ledger = Some(ledger);
        Ok(taken)
    }

    /// The data that a ledger names is in the host's page cache, or on its way from there. If it was lost on that way, the host says
    /// so once.
    async fn check_data<I: FileIo>(&self, io: &I, ledger: &Ledger) -> Result<(), DiskError> {
        for extent in self.chain.top.writable_sparse() {
            if let Err(e) = io.sync_data(extent.file).await {
                ledger.void();
                let what = format!("sync {}: what was not flushed when its server was killed is lost", extent.name);
                return Err(DiskError::host(what, e));
            }
        }
        Ok(())
    }

    /// Has [`Disk::close`] mark an image clean that nobody has closed, and makes its tables and their copies the same, although
    /// nothing else changes.
    ///
    /// # Errors
    ///
    /// As of a first write.
    pub async fn mend<I: FileIo>(&self, io: &I) -> Result<(), DiskError> {
        self.begin_change(io).await
    }

    /// Whether the record was of a grain that the image did not have.
    async fn take_over<I: FileIo>(&self, io: &I, record: Record) -> Result<bool, DiskError> {
        let Some(extent) = self.chain.top.writable_sparse().nth(record.extent) else { return Ok(false) };
        self.mark_dirty(extent.file);
        match record.what {
            What::Table { table, sector } => {
                while extent.page(table).is_none() {
                    if table >= extent.tables {
                        return Ok(false);
                    }
                    self.load(io, extent, MetaRef::Directory(table / PAGE_ENTRIES)).await?;
                }
                extent.take_over_table(table, u64::from(sector) * SECTOR_SIZE);
                Ok(false)
            }
            What::Grain { grain, sector } => loop {
                match extent.take_over_grain(grain, u64::from(sector) * SECTOR_SIZE) {
                    Ok(was_new) => return Ok(was_new),
                    Err(meta) => self.load(io, extent, meta).await?,
                }
            },
        }
    }
}

fn writable_sparse(extent: &mut crate::image::Extent) -> Option<&mut Sparse> {
    match &mut extent.layout {
        Layout::Sparse(s) if extent.access == Access::Rw => Some(s),
        Layout::Sparse(_) | Layout::Flat { .. } | Layout::Zero => None,
    }
}

impl Sparse {
    fn lies_in_file(&self, at: u64, len: u64) -> bool {
        at + len <= self.file_len.load(Ordering::Acquire) && !self.is_metadata(at, len)
    }

    fn take_over_table(&self, index: u64, at: u64) {
        let mut state = locked(&self.state);
        let Some((page, slot)) = self.page(index) else { return };
        let copies = if self.rgd_at.is_some() { 2 } else { 1 };
        // It may have become durable before the process died.
        if page.gd.get(slot) == Some(0) && self.lies_in_file(at, copies * self.table_bytes()) {
            state.free.remove(at, copies * self.table_bytes());
            self.insert_new_table(&mut state, index, at);
        }
    }

    /// What has to be read first, or whether the grain has this place now and had not before. Place 0 is none.
    fn take_over_grain(&self, grain: u64, at: u64) -> Result<bool, MetaRef> {
        let index = grain / self.gtes;
        let mut state = locked(&self.state);
        let table = match self.table(index, Arc::clone) {
            Lookup::Table(table) => table,
            Lookup::Need(meta) if index < self.tables => return Err(meta),
            Lookup::Need(_) | Lookup::Absent => return Ok(false),
        };
        let entry = usize::try_from(grain % self.gtes).unwrap_or(0);
        let now = table.entry(entry).unwrap_or(0);
        let says = sector_number(at);
        // The ledger has everything that happened since a flush, in order: an entry that says something else is older. But it may have
        // no place for what it says any more, if a power cut was what happened.
        if table.copy == TableCopy::Broken || now == u64::from(says) || says > 0 && !self.lies_in_file(at, self.grain) {
            return Ok(false);
        }
        state.free.remove(at, self.grain);
        if table.set(entry, says) {
            state.dirty.push(index);
        }
        Ok(says > 0)
    }
}
