//! Writing: in place where there is a grain, else into a fresh one that is shown when it is written.

use crate::allocate::{Plan, Ticket};
use crate::cache::GrainKey;
use crate::disk::Disk;
use crate::error::{DiskError, ErrorKind};
use crate::file_io::FileIo;
use crate::image::{Layout, Mapping, Place};
use crate::read::{Run, Runs, push};
use crate::sparse::{MetaRef, Sparse};
use futures_util::future::join_all;
use smallvec::SmallVec;

/// The beginning of a write, as far as it could be planned without waiting.
#[derive(Default)]
struct Batch<'a> {
    runs: Runs,
    tickets: SmallVec<[Ticket<'a>; 2]>,
    /// Grains whose cached bytes will be wrong.
    stale: SmallVec<[GrainKey; 4]>,
}

/// What keeps a plan from going on.
enum Obstacle<'a> {
    Need(&'a Sparse, MetaRef),
    Wait(&'a Sparse, u64),
    Grow(&'a Sparse),
}

impl Disk {
    pub(crate) async fn write<I: FileIo>(&self, io: &I, offset: u64, len: u64, buf: &I::Buf) -> Result<(), DiskError> {
        let mut done = 0;
        while done < len {
            let mut batch = Batch::default();
            let mut obstacle = None;
            while done < len && obstacle.is_none() {
                let place = self.image.locate(offset + done, len - done)?;
                match plan(place, done, &mut batch) {
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
            match obstacle {
                None => {}
                Some(Obstacle::Need(extent, meta)) => self.load(io, extent, meta).await?,
                Some(Obstacle::Wait(extent, grain)) => extent.wait_for(grain).await,
                Some(Obstacle::Grow(extent)) => self.grow(io, extent).await?,
            }
        }
        Ok(())
    }

    async fn write_batch<I: FileIo>(&self, io: &I, batch: Batch<'_>, buf: &I::Buf) -> Result<(), DiskError> {
        let result = match *batch.runs {
            [] => Ok(()),
            [ref run] => self.write_run(io, run, buf).await,
            _ => join_all(batch.runs.iter().map(|run| self.write_run(io, run, buf))).await.into_iter().collect(),
        };
        for run in &batch.runs {
            self.mark_dirty(run.file);
        }
        for key in batch.stale {
            self.cache.forget(key);
        }
        for ticket in batch.tickets {
            if result.is_ok() {
                ticket.publish();
                continue;
            }
            // The place may hold a part of the data. On a full host it can be given out again once it reads as zeroes; one
            // that could not be written for another reason is better left alone.
            let (at, len) = ticket.place();
            let full = result.as_ref().is_err_and(|e| e.kind() == ErrorKind::NoSpace);
            if full && io.punch_hole(ticket.file(), at, len).await.is_ok() {
                ticket.give_back();
            }
        }
        result
    }

    async fn write_run<I: FileIo>(&self, io: &I, run: &Run, buf: &I::Buf) -> Result<(), DiskError> {
        io.write_at(run.file, buf, run.part(), run.at).await.map_err(|e| {
            DiskError::host(format!("write {} bytes at {} of {}", run.len, run.at, self.name(run.file)), e)
        })
    }

    /// Extends an extent's file, so that grains can be given out in it.
    async fn grow<I: FileIo>(&self, io: &I, extent: &Sparse) -> Result<(), DiskError> {
        let Some((needed, wanted)) = extent.grow().await else { return Ok(()) };
        let mut growing = Growing { extent, len: None };
        // A limit that forbids the generous step may still allow the small one.
        for len in [wanted, needed] {
            match io.set_len(extent.file, len).await {
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

/// Plans the beginning of a place: how many bytes, or what has to happen first.
fn plan<'a>(place: Place<'a>, start: u64, batch: &mut Batch<'a>) -> Result<Result<u64, Obstacle<'a>>, DiskError> {
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
            batch.tickets.extend(ticket);
            Ok(len)
        }
        Plan::Need(meta) => Err(Obstacle::Need(extent, meta)),
        Plan::Wait(grain) => Err(Obstacle::Wait(extent, grain)),
        Plan::Grow => Err(Obstacle::Grow(extent)),
    })
}
