//! Putting right what can be put right without guessing: `vdisk check --repair`.
//!
//! Of tables and copies that differ, the one that is right where that can be told ([`super::verdict`]); then the places that
//! nothing names any more; then the headers. Each step makes the image better by itself and is durable before the next begins, so a
//! power cut leaves an image that a second repair goes on with. The image is not marked as open meanwhile: in one that was not closed
//! the primary tables would count, whatever is wrong with them.

use super::survey::{Named, Pair, Survey};
use super::verdict::{self, Says, Side};
use super::writer::{Backup, Writer};
use crate::allocate::ADDRESSABLE;
use crate::change::Unclean;
use crate::coding::Coding;
use crate::disk::{Disk, size};
use crate::error::{DiskError, ErrorKind};
use crate::file_io::FileIo;
use crate::flush::Step;
use crate::sparse::Sparse;
use crate::table::SECTOR_ENTRIES;
use std::sync::atomic::Ordering;
use vmdk_parse::{COWD_FREE_SECTOR_AT, SECTOR_SIZE};

/// Something that a repair did, or left alone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Repair {
    /// The file, as its messages call it.
    pub file: String,
    /// Byte offset in the file of what was wrong. `None` where there is no one place.
    pub offset: Option<u64>,
    /// For people.
    pub detail: String,
}

/// Who is told what a repair does.
pub trait RepairWatch {
    /// This is right now.
    fn repaired(&mut self, repair: Repair);

    /// This was left alone, and why.
    fn left(&mut self, repair: Repair);

    /// So much of the work is done. Units mean nothing.
    fn progress(&mut self, done: u64, total: u64);
}

impl Disk {
    /// Repairs the top link of the chain. The disk was opened for writing with [`crate::OpenOptions::examine`], nobody else has it
    /// open, nothing was or will be served by it, and no ledger waits for it. What `backup` keeps is durable before it is changed.
    ///
    /// # Errors
    ///
    /// The host's. What was done until then stays, and does no harm; a second repair goes on.
    pub async fn repair<I: FileIo>(
        &self,
        io: &I,
        backup: &mut impl Backup,
        watch: &mut impl RepairWatch,
    ) -> Result<(), DiskError> {
        if self.read_only {
            return Err(DiskError::new(ErrorKind::ReadOnly, "the image was opened to be read only"));
        }
        let mut writer = Writer::new(self, io, backup);
        let total = self.chain.top.writable_sparse().map(|e| e.check_units()).sum();
        let mut done = 0;
        for extent in self.chain.top.writable_sparse() {
            Repairing { extent, writer: &mut writer, watch, file_len: 0, progress: (done, total) }.run().await?;
            done += extent.check_units();
            watch.progress(done, total);
        }
        if let Some(Step::Write { file, offset, bytes }) = &self.content_id_step {
            writer.write(*file, *offset, bytes).await?;
            writer.commit().await?;
            let detail = "the end of longContentID was made the same as the CID".to_owned();
            watch.repaired(Repair { file: self.name(*file), offset: Some(*offset), detail });
        }
        Ok(())
    }
}

/// The work on one extent.
struct Repairing<'a, 'w, I, B, W> {
    extent: &'a Sparse,
    writer: &'w mut Writer<'a, I, B>,
    watch: &'w mut W,
    file_len: u64,
    /// Done before this extent, and in all.
    progress: (u64, u64),
}

/// A table that only one of the directories has.
struct Missing {
    table: u64,
    /// The directory that does not have it.
    side: Side,
    /// Where the one that is there is.
    from: u64,
}

impl<I: FileIo, B: Backup, W: RepairWatch> Repairing<'_, '_, I, B, W> {
    async fn run(mut self) -> Result<(), DiskError> {
        self.file_len = self.extent.file_len.load(Ordering::Acquire);
        let survey = loop {
            let (watch, (done, total)) = (&mut *self.watch, self.progress);
            let told = |tables: u64| watch.progress(done + tables, total);
            let survey = Survey::of(self.writer.disk, self.writer.io, self.extent, self.file_len, told).await?;
            // What one table has now may tell what another one has to have.
            let mut left = Vec::new();
            if !self.tables(&survey, &mut left).await? {
                left.into_iter().for_each(|repair| self.watch.left(repair));
                break survey;
            }
        };
        self.free_sector(&survey).await?;
        if survey.wrong || survey.misaligned || !survey.differing.is_empty() {
            if self.extent.unclean {
                self.watch
                    .left(self.of(None, "stays marked as not closed, for the rest of it is not right".to_owned()));
            }
            if survey.has_unused() {
                let what = "what nothing names was not given back, for it may be what is missing elsewhere";
                self.watch.left(self.of(None, what.to_owned()));
            }
            return Ok(());
        }
        self.give_back(&survey).await?;
        if self.extent.unclean {
            let unclean = match self.extent.coding {
                Coding::Cowd { .. } => Unclean::cowd(self.extent.file),
                Coding::Hosted { .. } | Coding::SeSparse(_) => Unclean::hosted(self.extent.file),
            };
            if let Step::Write { file, offset, bytes } = unclean.step(0) {
                self.writer.write(file, offset, &bytes).await?;
                self.writer.commit().await?;
                self.repaired(Some(offset), "was marked as closed (uncleanShutdown)".to_owned());
            }
        }
        Ok(())
    }

    fn of(&self, offset: Option<u64>, detail: String) -> Repair {
        Repair { file: self.extent.name.clone(), offset, detail }
    }

    fn repaired(&mut self, offset: Option<u64>, detail: String) {
        self.watch.repaired(self.of(offset, detail));
    }

    /// Makes tables and copies the same where it can be told which is right. Whether anything was.
    async fn tables(&mut self, survey: &Survey<'_>, left: &mut Vec<Repair>) -> Result<bool, DiskError> {
        let (mut missing, mut cleared) = (Vec::new(), Vec::new());
        let mut changed = false;
        for table in &survey.differing {
            let pairs = survey.pairs(self.writer.disk, self.writer.io, *table, 1).await?;
            let Some(Pair { primary, copy: Some(copy), .. }) = pairs.first() else { continue };
            let file = self.extent.name.clone();
            let alone = |why: &str| {
                let detail = format!("grain table {table}: {why}");
                Repair { file: file.clone(), offset: None, detail }
            };
            let is_certain = primary.at().into_iter().chain(copy.at()).all(|at| survey.is_certain(at));
            match (primary, copy) {
                _ if !is_certain => left.push(alone("something else is where it or its copy is")),
                (Named::At(at), Named::At(copy_at)) if at != copy_at => {
                    let (at, copy_at) = (*at, *copy_at);
                    let (some, undecided) = self.pair(survey, *table, at, copy_at).await?;
                    changed |= some;
                    if undecided > 0 {
                        let what = "entries differ from its copy, and which are right cannot be told";
                        left.push(alone(&format!("{undecided} {what}")));
                    }
                }
                (Named::At(from), _) => missing.push(Missing { table: *table, side: Side::Copy, from: *from }),
                (Named::Nothing | Named::Wrong(..), Named::At(from)) => {
                    let bytes = self.read_table(*from).await?;
                    let entries = self.extent.coding.entries(&bytes);
                    match entries.iter().all(|gte| verdict::is_sound(survey.judge(gte, Side::Copy))) {
                        true => missing.push(Missing { table: *table, side: Side::Primary, from: *from }),
                        false => left.push(alone("only a copy is there, and not all of it can be right")),
                    }
                }
                (Named::Nothing, Named::Wrong(..)) => cleared.push((*table, Side::Copy, 0)),
                (Named::Wrong(..), Named::Nothing | Named::Wrong(..)) => {
                    left.push(alone("neither directory says where it is"));
                }
                (Named::Nothing, Named::Nothing) => {}
            }
        }
        self.writer.commit().await?;
        changed |= !cleared.is_empty();
        for (table, _, _) in &cleared {
            let what = format!("the redundant directory has no grain table {table}, as the primary one");
            self.repaired(self.entry_at(*table, Side::Copy), what);
        }
        changed |= self.make_missing(survey, &missing, cleared, left).await?;
        Ok(changed)
    }

    /// Decides between a table and its copy, entry by entry, and writes both. Whether anything changed, and how many entries were
    /// left alone.
    async fn pair(&mut self, survey: &Survey<'_>, table: u64, at: u64, copy_at: u64) -> Result<(bool, u64), DiskError> {
        let (mut primary, mut copy) = (self.read_table(at).await?, self.read_table(copy_at).await?);
        let decided = self.decide(survey, &primary, &copy);
        let entry = size(self.extent.coding.entry_bytes());
        let mut counts = [0u64; 2];
        let mut alone = 0;
        for (n, (own, other)) in primary.chunks_exact_mut(entry).zip(copy.chunks_exact_mut(entry)).enumerate() {
            if own == other {
                continue;
            }
            match decided.get(n).copied().flatten() {
                Some(Side::Primary) => {
                    other.copy_from_slice(own);
                    counts[0] += 1;
                }
                Some(Side::Copy) => {
                    own.copy_from_slice(other);
                    counts[1] += 1;
                }
                None => alone += 1,
            }
        }
        self.writer.write(self.extent.file, at, &primary).await?;
        self.writer.write(self.extent.file, copy_at, &copy).await?;
        let [to_copy, from_copy] = counts;
        if from_copy > 0 {
            self.repaired(
                Some(at),
                format!("{from_copy} entries of grain table {table} were taken from its redundant copy"),
            );
        }
        if to_copy > 0 {
            let what = format!("{to_copy} entries of the redundant copy of grain table {table} were taken from it");
            self.repaired(Some(copy_at), what);
        }
        Ok((to_copy + from_copy > 0, alone))
    }

    /// For every entry which side is right.
    fn decide(&self, survey: &Survey<'_>, primary: &[u8], copy: &[u8]) -> Vec<Option<Side>> {
        let (entries, copies) = (self.extent.coding.entries(primary), self.extent.coding.entries(copy));
        let says: Vec<(Says, Says)> = entries
            .iter()
            .zip(copies.iter())
            .map(|(gte, other)| {
                let own = survey.judge(gte, Side::Primary);
                (own, if gte == other { own } else { survey.judge(other, Side::Copy) })
            })
            .collect();
        if self.extent.unclean {
            return says.iter().map(|(own, other)| verdict::unclosed(*own, *other)).collect();
        }
        let side = verdict::closed(&says, |n| entries.get(n) != copies.get(n));
        says.iter().map(|_| side).collect()
    }

    async fn read_table(&self, at: u64) -> Result<Vec<u8>, DiskError> {
        self.writer.disk.read_metadata(self.writer.io, self.extent.file, at, self.extent.table_bytes()).await
    }

    /// Makes the tables that only one directory has, at the end of the file, and then the directory entries, with those of `entries`.
    async fn make_missing(
        &mut self,
        survey: &Survey<'_>,
        missing: &[Missing],
        mut entries: Vec<(u64, Side, u32)>,
        left: &mut Vec<Repair>,
    ) -> Result<bool, DiskError> {
        let extent = self.extent;
        let start = survey.end.max(self.file_len).next_multiple_of(SECTOR_SIZE);
        let end = start + missing.len() as u64 * extent.table_bytes();
        let room = end <= survey.missing && end <= ADDRESSABLE;
        if !missing.is_empty() && !room {
            let why = "the file cannot grow over what an entry names past its end";
            let text = |m: &Missing| format!("grain table {}: {why}", m.table);
            left.extend(missing.iter().map(|m| self.of(self.entry_at(m.table, m.side), text(m))));
        } else if !missing.is_empty() {
            self.writer.grow(extent.file, self.file_len, end).await?;
            self.file_len = end;
            for (at, m) in (start..).step_by(size(extent.table_bytes())).zip(missing) {
                let bytes = self.read_table(m.from).await?;
                self.writer.write_new(extent.file, at, bytes).await?;
                #[expect(clippy::cast_possible_truncation, reason = "below ADDRESSABLE")]
                entries.push((m.table, m.side, (at / SECTOR_SIZE) as u32));
                let what = match m.side {
                    Side::Primary => "was made anew from its redundant copy",
                    Side::Copy => "got a redundant copy",
                };
                self.repaired(self.entry_at(m.table, m.side), format!("grain table {} {what}", m.table));
            }
            // A directory entry is never durable before its table.
            self.writer.commit().await?;
        }
        let changed = !entries.is_empty();
        self.write_directories(entries).await?;
        Ok(changed)
    }

    /// Where the directory entry of a table is.
    fn entry_at(&self, table: u64, side: Side) -> Option<u64> {
        let directory = match side {
            Side::Primary => Some(self.extent.gd_at),
            Side::Copy => self.extent.rgd_at,
        };
        directory.map(|at| at + table * self.extent.coding.entry_bytes())
    }

    async fn write_directories(&mut self, mut entries: Vec<(u64, Side, u32)>) -> Result<(), DiskError> {
        let key = |(table, side, _): &(u64, Side, u32)| (*side == Side::Primary, *table);
        entries.sort_unstable_by_key(key);
        let sector = |entry: &(u64, Side, u32)| (entry.1, entry.0 / SECTOR_ENTRIES as u64);
        for entries in entries.chunk_by(|a, b| sector(a) == sector(b)) {
            let Some((first, last)) = entries.first().zip(entries.last()) else { continue };
            let Some(at) = self.entry_at(first.0, first.1) else { continue };
            let len = (last.0 - first.0 + 1) * self.extent.coding.entry_bytes();
            let file = self.extent.file;
            let mut bytes = self.writer.disk.read_metadata(self.writer.io, file, at, len).await?;
            for (table, _, sector) in entries {
                let n = size((table - first.0) * self.extent.coding.entry_bytes());
                if let Some(place) = bytes.get_mut(n..n + 4) {
                    place.copy_from_slice(&sector.to_le_bytes());
                }
            }
            self.writer.write(file, at, &bytes).await?;
        }
        self.writer.commit().await
    }

    /// ESX hands out what lies behind freeSector.
    async fn free_sector(&mut self, survey: &Survey<'_>) -> Result<(), DiskError> {
        let Coding::Cowd { free } = self.extent.coding else { return Ok(()) };
        if free >= survey.end {
            return Ok(());
        }
        self.set_free_sector(survey.end).await?;
        let what = format!("freeSector was {}, and is {} now", free / SECTOR_SIZE, survey.end / SECTOR_SIZE);
        self.repaired(Some(COWD_FREE_SECTOR_AT), what);
        Ok(())
    }

    async fn set_free_sector(&mut self, end: u64) -> Result<(), DiskError> {
        let sector = u32::try_from(end / SECTOR_SIZE).unwrap_or(u32::MAX);
        self.writer.write(self.extent.file, COWD_FREE_SECTOR_AT, &sector.to_le_bytes()).await?;
        self.writer.commit().await
    }

    /// Gives the space back that nothing names: cuts the end of the file off, and punches holes before it.
    async fn give_back(&mut self, survey: &Survey<'_>) -> Result<(), DiskError> {
        let file = self.extent.file;
        let mut bytes = 0;
        for (start, end) in survey.unused() {
            bytes += self.writer.punch(file, start, end.min(self.file_len)).await?;
        }
        let end = survey.end.next_multiple_of(SECTOR_SIZE);
        if end < self.file_len {
            if let Coding::Cowd { free } = self.extent.coding
                && free > end
            {
                self.set_free_sector(end).await?;
            }
            bytes += self.file_len - end;
            self.writer.cut(file, self.file_len, end).await?;
            self.file_len = end;
        }
        if bytes > 0 {
            self.repaired(None, format!("{bytes} bytes that nothing names were given back"));
        }
        Ok(())
    }
}
