//! Making writes durable. What has to happen is data, a list of steps; running it is one loop.
//!
//! The order: data (and where free space begins, in a header that says so), barrier, both copies of the tables, barrier; where a table is new, then the redundant directory,
//! barrier, the directory, barrier. An entry is never durable before its grain, nor a directory entry before its table
//! and its copy.

use crate::error::{DiskError, chain};
use crate::file_io::{FileId, FileIo};
use crate::free::Place;
use crate::sparse::Sparse;
use crate::table::{Entries, SECTOR_ENTRIES, Table, TableCopy};
use crate::wait::{WaitList, locked, until, wake};
use futures_util::future::join_all;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

/// One step towards durability.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// Everything written to the file before this step is durable after it.
    Barrier(FileId),
    /// Metadata.
    Write { file: FileId, offset: u64, bytes: Vec<u8> },
    /// Cuts the file's unused end off.
    SetLen { file: FileId, len: u64 },
}

impl Step {
    /// The file that a write is for.
    pub(crate) fn written(&self) -> Option<FileId> {
        match self {
            Self::Write { file, .. } => Some(*file),
            Self::Barrier(_) | Self::SetLen { .. } => None,
        }
    }
}

/// What a flush has to do, and the tables that must stay in memory until it is done.
#[derive(Debug, Default)]
pub(crate) struct FlushPlan<'a> {
    pub(crate) steps: Vec<Step>,
    tables: Vec<TakenTable<'a>>,
    /// Sectors of directories.
    directories: Vec<(&'a Sparse, u64)>,
    /// Files with data that is to be durable.
    files: Vec<FileId>,
    /// Places whose entries the tables do not have any more.
    freed: Vec<(&'a Sparse, Vec<Place>)>,
}

/// A table whose dirty sectors count as clean since the plan has them.
#[derive(Debug)]
struct TakenTable<'a> {
    extent: &'a Sparse,
    index: u64,
    table: Arc<Table>,
    sectors: u32,
}

impl<'a> FlushPlan<'a> {
    /// The plan to make everything durable that was changed so far. `dirty_files` takes the files with data that is not.
    ///
    /// The tables are taken before the files: a writer marks its file before it publishes, so the file of every entry that is
    /// seen here is seen too. The other way round, an entry could be written without a barrier behind its grain.
    pub(crate) fn new(extents: impl Iterator<Item = &'a Sparse>, dirty_files: impl FnOnce() -> Vec<FileId>) -> Self {
        let mut plan = Self::default();
        let mut dirty = Dirty::default();
        for extent in extents {
            extent.take_dirty(&mut dirty);
        }
        plan.tables = dirty.taken;
        plan.directories = dirty.directories;
        plan.freed = dirty.freed;
        let mut files = dirty_files();
        plan.files.clone_from(&files);
        files.extend(dirty.headers.iter().map(|(file, _, _)| *file));
        files.sort_unstable();
        files.dedup();
        plan.steps.extend(merge(dirty.headers));
        plan.steps.extend(files.into_iter().map(Step::Barrier));
        for writes in [dirty.tables, dirty.redundant_directory, dirty.directory] {
            let mut files: Vec<FileId> = writes.iter().map(|(file, _, _)| *file).collect();
            files.sort_unstable();
            files.dedup();
            plan.steps.extend(merge(writes));
            plan.steps.extend(files.into_iter().map(Step::Barrier));
        }
        plan
    }

    /// Everything in the plan is durable, and the ledger knows: the tables may leave memory, and what was freed may be used again.
    pub(crate) fn done(self) {
        for taken in self.tables {
            taken.table.unpin();
        }
        for (extent, places) in self.freed {
            extent.flushed(places);
        }
    }

    /// The host was too full to write what is in the plan: all of it is left to the next flush. Answers the files whose data is
    /// not known to be durable. What was written of the tables does no harm: the data behind it is durable.
    pub(crate) fn give_back(self) -> Vec<FileId> {
        for TakenTable { extent, index, table, sectors } in self.tables {
            let mut state = locked(&extent.state);
            if table.mark_dirty(sectors) {
                state.dirty.push(index);
            }
            table.unpin();
        }
        for (extent, sector) in self.directories {
            locked(&extent.state).dirty_gd.insert(sector);
        }
        for (extent, places) in self.freed {
            extent.freed(places);
        }
        self.files
    }
}

type Write = (FileId, u64, Vec<u8>);

/// Metadata that differs from the files, by when it may be written.
#[derive(Default)]
struct Dirty<'a> {
    headers: Vec<Write>,
    tables: Vec<Write>,
    redundant_directory: Vec<Write>,
    directory: Vec<Write>,
    taken: Vec<TakenTable<'a>>,
    directories: Vec<(&'a Sparse, u64)>,
    freed: Vec<(&'a Sparse, Vec<Place>)>,
}

impl Sparse {
    /// What has to be written to make the tables durable, as of now. The tables are pinned.
    fn take_dirty<'a>(&'a self, to: &mut Dirty<'a>) {
        let mut state = locked(&self.state);
        if !state.dirty.is_empty() || !state.dirty_gd.is_empty() {
            to.headers.extend(self.free_sector(&state).map(|(at, bytes)| (self.file, at, bytes)));
        }
        for index in std::mem::take(&mut state.dirty) {
            // A dirty table is never evicted, so it is there.
            let table = self.page(index).and_then(|(p, i)| p.tables.get(i)?.load_full());
            let Some(table) = table else { continue };
            table.pin();
            let sectors = table.take_dirty();
            for (at, bytes) in table.sectors(sectors) {
                if let TableCopy::At(copy_at) = table.copy {
                    to.tables.push((self.file, copy_at + at, bytes.clone()));
                }
                to.tables.push((self.file, table.at + at, bytes));
            }
            to.taken.push(TakenTable { extent: self, index, table, sectors });
        }
        // With the sectors that name them no more.
        to.freed.push((self, std::mem::take(&mut state.freed)));
        // Every table that the directory names here is durable already or is written above.
        for sector in std::mem::take(&mut state.dirty_gd) {
            to.directories.push((self, sector));
            let first = sector * SECTOR_ENTRIES as u64;
            let Some((page, index)) = self.page(first) else { continue };
            let bytes = |directory: &Entries| directory.encode(index..index + SECTOR_ENTRIES);
            if let Some(at) = self.rgd_at {
                to.redundant_directory.push((self.file, at + first * 4, bytes(&page.rgd)));
            }
            to.directory.push((self.file, self.gd_at + first * 4, bytes(&page.gd)));
        }
    }
}

/// Joins writes that touch.
fn merge(mut writes: Vec<Write>) -> Vec<Step> {
    writes.sort_unstable_by_key(|(file, offset, _)| (*file, *offset));
    let mut merged: Vec<Write> = Vec::new();
    for (file, offset, bytes) in writes {
        match merged.last_mut() {
            Some((f, o, b)) if *f == file && *o + b.len() as u64 == offset => b.extend_from_slice(&bytes),
            _ => merged.push((file, offset, bytes)),
        }
    }
    merged.into_iter().map(|(file, offset, bytes)| Step::Write { file, offset, bytes }).collect()
}

/// Why steps were not run to their end.
pub(crate) struct Failed {
    pub(crate) error: DiskError,
    /// No sync has failed: the host has everything that it was given, and says what it does not have.
    pub(crate) nothing_lost: bool,
}

impl From<Failed> for DiskError {
    fn from(failed: Failed) -> Self {
        failed.error
    }
}

/// Runs steps in order; neighbouring steps of a kind at the same time.
///
/// # Errors
///
/// The first step's that failed. `name` says what a file is called.
pub(crate) async fn run<I: FileIo>(io: &I, steps: &[Step], name: impl Fn(FileId) -> String) -> Result<(), Failed> {
    let kind = |s: &Step| std::mem::discriminant(s);
    for group in steps.chunk_by(|a, b| kind(a) == kind(b)) {
        let nothing_lost = !matches!(group, [Step::Barrier(_), ..]);
        for result in join_all(group.iter().map(|step| run_one(io, step, &name))).await {
            result.map_err(|error| Failed { error, nothing_lost })?;
        }
    }
    Ok(())
}

async fn run_one<I: FileIo>(io: &I, step: &Step, name: &impl Fn(FileId) -> String) -> Result<(), DiskError> {
    match step {
        Step::Barrier(file) => {
            io.sync_data(*file).await.map_err(|e| DiskError::host(format!("sync {}", name(*file)), e))
        }
        Step::Write { file, offset, bytes } => {
            let buf = io.alloc(bytes.len());
            let failed = |e| {
                DiskError::host(format!("write {} bytes of metadata at {offset} of {}", bytes.len(), name(*file)), e)
            };
            io.copy_in(&buf, 0, bytes).map_err(failed)?;
            io.write_at(*file, &buf, 0..bytes.len(), *offset).await.map_err(failed)
        }
        Step::SetLen { file, len } => {
            let what = || format!("cut {} to {len} bytes", name(*file));
            io.set_len(*file, *len).await.map_err(|e| DiskError::host(what(), e))
        }
    }
}

/// Flushes in rounds: those that arrive while one runs share the next.
#[derive(Debug, Default)]
pub(crate) struct Rounds {
    state: Mutex<RoundState>,
    /// A sync did not succeed: what is durable is not known any more.
    poisoned: AtomicBool,
    /// Told of it before anybody else.
    on_poison: OnPoison,
}

/// Who is told first that a sync has failed, and why.
#[derive(Default)]
pub(crate) struct OnPoison(OnceLock<Tell>);

type Tell = Box<dyn Fn(&str) + Send + Sync>;

impl std::fmt::Debug for OnPoison {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("OnPoison").field(&self.0.get().is_some()).finish()
    }
}

#[derive(Debug, Default)]
struct RoundState {
    running: bool,
    /// Rounds that began, and that ended.
    begun: u64,
    ended: u64,
    waiting: WaitList,
    /// Why it is poisoned, and who waits for that.
    poison: Option<Arc<str>>,
    waiting_for_poison: WaitList,
}

/// The duty to run a round. Dropped before [`Round::succeeded`] or [`Round::given_up`], it poisons: whoever waits for it must not
/// believe in it.
#[derive(Debug)]
pub(crate) struct Round<'a> {
    rounds: &'a Rounds,
    end: RoundEnd,
    why: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum RoundEnd {
    Succeeded,
    GivenUp,
    Failed,
}

impl Round<'_> {
    /// Everything in the round's plan is durable.
    pub(crate) fn succeeded(mut self) {
        self.end = RoundEnd::Succeeded;
    }

    /// It is not known what is durable.
    pub(crate) fn failed(mut self, why: &DiskError) {
        self.why = Some(chain(why));
    }

    /// Nothing is durable that was not, and nothing is lost. Who waits for the round has to run one of its own.
    pub(crate) fn given_up(mut self) {
        self.end = RoundEnd::GivenUp;
    }
}

impl Rounds {
    /// The round that the caller must run, or `None` once another task has run one that began after this call.
    pub(crate) async fn join(&self) -> Option<Round<'_>> {
        let mine = locked(&self.state).begun + 1;
        until(&self.state, |s| {
            if s.ended >= mine {
                Ok(None)
            } else if s.running {
                Err(&mut s.waiting)
            } else {
                s.running = true;
                s.begun += 1;
                Ok(Some(Round { rounds: self, end: RoundEnd::Failed, why: None }))
            }
        })
        .await
    }

    /// Whether a sync failed.
    pub(crate) fn is_poisoned(&self) -> bool {
        self.poisoned.load(Ordering::Acquire)
    }

    /// A sync failed. What the kernel dropped then cannot be known, and a second sync would say that all is well: not a word of it is
    /// believed until the image is opened again.
    pub(crate) fn poison(&self, why: String) {
        if let (Some(tell), false) = (self.on_poison.0.get(), self.is_poisoned()) {
            tell(&why);
        }
        let mut state = locked(&self.state);
        let why: Arc<str> = why.into();
        state.poison.get_or_insert(why);
        self.poisoned.store(true, Ordering::Release);
        let wakers = state.waiting_for_poison.take();
        drop(state);
        wake(wakers);
    }

    /// Has `tell` called before a failed sync is answered; the first such wish counts.
    pub(crate) fn on_poison(&self, tell: impl Fn(&str) + Send + Sync + 'static) {
        // It can only be refused if there is one.
        let _ = self.on_poison.0.set(Box::new(tell));
    }

    /// Why it is poisoned, once it is.
    pub(crate) async fn poisoned(&self) -> Arc<str> {
        until(&self.state, |s| s.poison.clone().ok_or(&mut s.waiting_for_poison)).await
    }

    /// Why it is poisoned, if it is.
    pub(crate) fn why_poisoned(&self) -> Option<Arc<str>> {
        if self.is_poisoned() { locked(&self.state).poison.clone() } else { None }
    }
}

impl Drop for Round<'_> {
    fn drop(&mut self) {
        if self.end == RoundEnd::Failed {
            self.rounds.poison(self.why.take().unwrap_or_else(|| "a flush was not ended".to_owned()));
        }
        let mut state = locked(&self.rounds.state);
        state.running = false;
        if self.end != RoundEnd::GivenUp {
            state.ended = state.begun;
        }
        let wakers = state.waiting.take();
        drop(state);
        wake(wakers);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn writes_that_touch_become_one() {
        let w = |offset, byte| (FileId(0), offset, vec![byte; 512]);
        let other = (FileId(1), 1536, vec![9; 512]);
        let steps = merge(vec![w(1024, 3), w(0, 1), other.clone(), w(512, 2), w(4096, 4)]);
        let sizes: Vec<_> = steps
            .iter()
            .map(|s| match s {
                Step::Write { file, offset, bytes } => (file.0, *offset, bytes.len()),
                other => panic!("{other:?}"),
            })
            .collect();
        assert_eq!(sizes, [(0, 0, 1536), (0, 4096, 512), (1, 1536, 512)]);
    }
}
