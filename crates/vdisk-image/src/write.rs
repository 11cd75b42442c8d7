//! Writing: in place where there is a grain, else into a fresh one that is shown when it is written, with what the parent has
//! around the write.

use crate::allocate::{Growth, Plan, Rest, Room, Ticket};
use crate::cache::GrainKey;
use crate::disk::{Disk, size};
use crate::error::{DiskError, ErrorKind};
use crate::file_io::{FileId, FileIo};
use crate::image::{Layout, Mapping, Place};
use crate::read::{Run, Runs, push};
use crate::sparse::{MetaRef, Sparse};
use futures_util::future::join_all;
use smallvec::SmallVec;
use std::io;

/// The beginning of a write, as far as it could be planned without waiting.
#[derive(Default)]
struct Batch<'a> {
    runs: Runs,
    tickets: SmallVec<[Ticket<'a>; 2]>,
    /// Parts of fresh grains that the write does not cover.
    gaps: SmallVec<[Gap; 2]>,
    /// Grains whose cached bytes will be wrong.
    stale: SmallVec<[GrainKey; 4]>,
}

/// A part of a fresh grain that takes what is below it in the chain, or zeroes.
struct Gap {
    /// On the disk.
    offset: u64,
    len: u64,
    file: FileId,
    /// In the file.
    at: u64,
    from_below: bool,
    /// The place reads as zeroes.
    zeroed: bool,
}

/// Parents are copied in pieces of this size.
const COPY: u64 = 1 << 20;

/// What keeps a plan from going on.
pub(crate) enum Obstacle<'a> {
    Need(&'a Sparse, MetaRef),
    Wait(&'a Sparse, u64),
    Grow(&'a Sparse),
    Reserve(&'a Sparse, Room),
    Flush,
}

impl Disk {
    pub(crate) async fn write<I: FileIo>(&self, io: &I, offset: u64, len: u64, buf: &I::Buf) -> Result<(), DiskError> {
        let mut done = 0;
        while done < len {
            let mut batch = Batch::default();
            let mut obstacle = None;
            while done < len && obstacle.is_none() {
                let place = self.chain.top.locate(offset + done, len - done)?;
                match self.plan(place, done, &mut batch) {
                    Ok(Ok(planned)) => done += planned,
                    Ok(Err(o)) => obstacle = Some(o),
                    Err(e) => {
                        // Nothing was written: the places read as zeroes as before.
                        batch.tickets.into_iter().for_each(Ticket::give_back);
                        return Err(e);
                    }
                }
            }
            // What is planned is written before anything is waited for: who waits holds no ticket, so that no two
            // requests can wait for one another.
            self.write_batch(io, batch, buf).await?;
            if let Some(obstacle) = obstacle {
                self.overcome(io, obstacle).await?;
            }
        }
        Ok(())
    }

    /// Hides what the parent has at the beginning of a range by fresh grains of zeroes, which are holes. Answers how many bytes
    /// are hidden; 0: the top has something there by now, look again.
    pub(crate) async fn hide_parent<I: FileIo>(&self, io: &I, offset: u64, len: u64) -> Result<u64, DiskError> {
        loop {
            let place = self.chain.top.locate(offset, len)?;
            let Layout::Sparse(extent) = &place.extent.layout else { return Ok(0) };
            let obstacle = match extent.plan_write(place.offset, place.len)? {
                Plan::Write { ticket: None, .. } => return Ok(0),
                Plan::Write { len, ticket: Some(ticket), .. } => {
                    let mut batch = Batch::default();
                    if !ticket.is_zero_filled() {
                        let (offset, at) = (place.extent.start + place.offset, ticket.at(place.offset));
                        let gap = Gap { offset, len, file: ticket.file(), at, from_below: false, zeroed: false };
                        batch.gaps.push(gap);
                    }
                    self.add_ticket(&mut batch, ticket, place, len);
                    self.write_batch(io, batch, &io.alloc(0)).await?;
                    return Ok(len);
                }
                Plan::Need(meta) => Obstacle::Need(extent, meta),
                Plan::Wait(grain) => Obstacle::Wait(extent, grain),
                Plan::Grow => Obstacle::Grow(extent),
                Plan::Reserve(room) => Obstacle::Reserve(extent, room),
                Plan::Flush => Obstacle::Flush,
            };
            self.overcome(io, obstacle).await?;
        }
    }

    pub(crate) async fn overcome<I: FileIo>(&self, io: &I, obstacle: Obstacle<'_>) -> Result<(), DiskError> {
        match obstacle {
            Obstacle::Need(extent, meta) => self.load(io, extent, meta).await,
            Obstacle::Wait(extent, grain) => {
                extent.wait_for(grain).await;
                Ok(())
            }
            Obstacle::Grow(extent) => self.grow(io, extent).await,
            Obstacle::Reserve(extent, room) => self.reserve(io, extent, &room).await,
            Obstacle::Flush => {
                if let Some(ledger) = &self.ledger {
                    ledger.wait_for_records().await;
                }
                self.flush(io).await
            }
        }
    }

    async fn write_batch<I: FileIo>(&self, io: &I, batch: Batch<'_>, buf: &I::Buf) -> Result<(), DiskError> {
        let mut result = match *batch.runs {
            [] => Ok(()),
            [ref run] => self.write_run(io, run, buf).await,
            _ => join_all(batch.runs.iter().map(|run| self.write_run(io, run, buf))).await.into_iter().collect(),
        };
        // Whether the place itself refused what was written to it.
        let mut refused = result.is_err();
        for gap in &batch.gaps {
            if result.is_ok() {
                (result, refused) = self.fill_gap(io, gap).await;
            }
        }
        for run in &batch.runs {
            self.mark_dirty(run.file);
        }
        for ticket in &batch.tickets {
            self.mark_dirty(ticket.file());
        }
        for key in batch.stale {
            self.cache.forget(key);
        }
        for ticket in batch.tickets {
            if result.is_ok() {
                ticket.publish();
                continue;
            }
            // The place may hold a part of the data. On a full host, or if it was the parent that could not be read, it can be
            // given out again; one that could not be written is better left alone.
            let (at, len) = ticket.place();
            let full = result.as_ref().is_err_and(|e| e.kind() == ErrorKind::NoSpace);
            if full || !refused {
                let zeroed = io.punch_hole(ticket.file(), at, len).await.is_ok();
                ticket.give_back_as(zeroed);
            }
        }
        result
    }

    async fn write_run<I: FileIo>(&self, io: &I, run: &Run, buf: &I::Buf) -> Result<(), DiskError> {
        io.write_at(run.file, buf, run.part(), run.at).await.map_err(|e| {
            DiskError::host(format!("write {} bytes at {} of {}", run.len, run.at, self.name(run.file)), e)
        })
    }

    /// Copies what is below a gap into it, or zeroes; whether it failed by writing. Zeroes are not copied to where they are.
    async fn fill_gap<I: FileIo>(&self, io: &I, gap: &Gap) -> (Result<(), DiskError>, bool) {
        let mut done = 0;
        while done < gap.len {
            let piece = (gap.len - done).min(COPY);
            let buf = io.alloc(size(piece));
            let below = match gap.from_below {
                true => self.read_below(io, gap.offset + done, piece, &buf).await,
                false => Ok(false),
            };
            match below {
                Err(e) => return (Err(e), false),
                Ok(false) if gap.zeroed => {}
                Ok(_) => {
                    let run = Run { file: gap.file, at: gap.at + done, start: 0, len: piece, grain: None };
                    if let Err(e) = self.write_run(io, &run, &buf).await {
                        return (Err(e), true);
                    }
                }
            }
            done += piece;
        }
        (Ok(()), false)
    }

    /// Takes the host's space for a table that is going to change: a full host is to fail this write and not the flush of
    /// many. A host that cannot do this is asked no more.
    async fn reserve<I: FileIo>(&self, io: &I, extent: &Sparse, room: &Room) -> Result<(), DiskError> {
        for &(at, len) in &room.ranges {
            let Err(e) = io.reserve(extent.file, at, len).await else { continue };
            let e = DiskError::host(format!("take {len} bytes for a grain table at {at} of {}", extent.name), e);
            // Any other trouble shows when the table is written.
            if e.kind() == ErrorKind::NoSpace {
                return Err(e);
            }
        }
        extent.reserved(room);
        Ok(())
    }

    /// Extends an extent's file, so that grains can be given out in it.
    async fn grow<I: FileIo>(&self, io: &I, extent: &Sparse) -> Result<(), DiskError> {
        let Some(Growth { from, needed, wanted }) = extent.grow().await else { return Ok(()) };
        let mut growing = Growing { extent, len: None };
        // A limit that forbids the generous step may still allow the small one.
        for len in [wanted, needed] {
            match io.set_len(extent.file, len).await {
                // Space that is taken already makes the write of a new grain about twice as fast, around the page cache. A host that
                // is full gets back what it could give of it: its last blocks are for writes. Nobody writes there before the growth
                // has ended.
                Ok(()) if len > needed && is_full(io.reserve_fresh(extent.file, from, len - from).await) => {}
                Ok(()) => {
                    growing.len = Some(len);
                    return Ok(());
                }
                Err(e) if len == needed => {
                    return Err(DiskError::host(format!("extend {} to {len} bytes", extent.name), e));
                }
                Err(_) => {}
            }
        }
        Ok(())
    }
}

fn is_full(answer: io::Result<()>) -> bool {
    answer.is_err_and(|e| ErrorKind::of(&e) == ErrorKind::NoSpace)
}

/// Tells the extent how its growth ended, whatever the end is.
struct Growing<'a> {
    extent: &'a Sparse,
    len: Option<u64>,
}

impl Drop for Growing<'_> {
    fn drop(&mut self) {
        self.extent.grown(self.len);
    }
}

impl Disk {
    /// Plans the beginning of a place: how many bytes, or what has to happen first.
    fn plan<'a>(
        &self,
        place: Place<'a>,
        start: u64,
        batch: &mut Batch<'a>,
    ) -> Result<Result<u64, Obstacle<'a>>, DiskError> {
        place.check_writable()?;
        // Without the extent's lock first: nearly every write finds its grain.
        if let Mapping::Data { file, offset: at, len, grain } = place.map()? {
            push(&mut batch.runs, Run { file, at, start, len, grain });
            batch.stale.extend(grain.map(|g| (file, g.start)));
            return Ok(Ok(len));
        }
        let Layout::Sparse(extent) = &place.extent.layout else {
            return Err(DiskError::new(
                ErrorKind::ReadOnly,
                format!("the extent at byte {} of the disk is of type ZERO and cannot be written", place.extent.start),
            ));
        };
        Ok(match extent.plan_write(place.offset, place.len)? {
            Plan::Write { offset: at, len, ticket } => {
                push(&mut batch.runs, Run { file: extent.file, at, start, len, grain: None });
                if let Some(ticket) = ticket {
                    self.add_ticket(batch, ticket, place, len);
                }
                Ok(len)
            }
            Plan::Need(meta) => Err(Obstacle::Need(extent, meta)),
            Plan::Wait(grain) => Err(Obstacle::Wait(extent, grain)),
            Plan::Grow => Err(Obstacle::Grow(extent)),
            Plan::Reserve(room) => Err(Obstacle::Reserve(extent, room)),
            Plan::Flush => Err(Obstacle::Flush),
        })
    }

    /// Takes a ticket for a change of `len` bytes at a place into a batch, and what the change leaves of its grains.
    fn add_ticket<'a>(&self, batch: &mut Batch<'a>, ticket: Ticket<'a>, place: Place<'a>, len: u64) {
        let (file, zeroed) = (ticket.file(), ticket.is_zero_filled());
        for Rest { offset, len, at, from_below } in ticket.rest(place.offset, len, !self.chain.parents.is_empty()) {
            // The last grain may reach past the extent.
            let len = len.min(place.extent.len().saturating_sub(offset));
            if len > 0 {
                batch.gaps.push(Gap { offset: place.extent.start + offset, len, file, at, from_below, zeroed });
            }
        }
        batch.tickets.push(ticket);
    }
}
