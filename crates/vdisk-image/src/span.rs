//! Which parts of a disk hold data and where, and which are holes.

use crate::disk::Disk;
use crate::error::DiskError;
use crate::file_io::{FileId, FileIo, Stored};
use crate::image::{Layout, Mapping, Place};
use crate::sparse::MetaRef;

/// A stretch of the disk that is all data or all hole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// Takes no space on the host, and reads as zeroes.
    pub hole: bool,
    /// Bytes.
    pub len: u64,
}

/// A stretch of the disk that one link of the chain has in one way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// Bytes.
    pub len: u64,
    /// The link that decides: 0 is the image itself, 1 its parent, and so on. For [`RunKind::Hole`] the last one that reaches so far.
    pub depth: usize,
    /// How it has it.
    pub kind: RunKind,
}

/// How a link of a chain has a stretch of the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RunKind {
    /// As it is, in a file from a byte offset on.
    Data {
        /// The file.
        file: FileId,
        /// Of the first byte.
        offset: u64,
    },
    /// Compressed, in a file. The grains of a run may be anywhere in it.
    Compressed {
        /// The file.
        file: FileId,
    },
    /// As zeroes that take no space on the host.
    Zero {
        /// The place in a file that the image keeps for it and the host has a hole at; `None` if the image itself says that
        /// there are zeroes.
        place: Option<(FileId, u64)>,
    },
    /// It may not be read: the image says so (NOACCESS).
    NoAccess,
    /// Not at all, nor has any other link: it reads as zeroes.
    Hole,
}

impl Run {
    /// Whether it takes no space on the host, and reads as zeroes.
    pub fn is_hole(&self) -> bool {
        match self.kind {
            RunKind::Zero { .. } | RunKind::Hole => true,
            RunKind::Data { .. } | RunKind::Compressed { .. } | RunKind::NoAccess => false,
        }
    }

    /// Whether `next`, which follows it on the disk, is more of the same.
    fn goes_on_in(&self, next: &Self) -> bool {
        let after = |offset: u64| offset + self.len;
        let expected = match self.kind {
            RunKind::Data { file, offset } => RunKind::Data { file, offset: after(offset) },
            RunKind::Zero { place: Some((file, offset)) } => RunKind::Zero { place: Some((file, after(offset))) },
            kind @ (RunKind::Compressed { .. } | RunKind::Zero { place: None } | RunKind::NoAccess | RunKind::Hole) => {
                kind
            }
        };
        (self.depth, expected) == (next.depth, next.kind)
    }
}

/// What the host said of a file last: runs of a disk mostly follow one another in the file as well.
#[derive(Clone, Copy, Debug)]
struct Told {
    file: FileId,
    start: u64,
    stored: Stored,
}

/// What is remembered from one piece of the disk to the next.
#[derive(Debug, Default)]
struct Walk {
    data: Option<Told>,
    tables: Option<Told>,
    /// Links above this depth have nothing up to byte `until` of the disk.
    first: usize,
    until: u64,
}

impl Disk {
    /// What begins at byte `offset` of the disk, as far as it is the same; `len` bytes from there on, inside the disk, are
    /// looked at. Reads tables, never data. What changes meanwhile may be told either way.
    ///
    /// # Errors
    ///
    /// As for a read: what failed, where.
    pub async fn span<I: FileIo>(&self, io: &I, offset: u64, len: u64) -> Result<Span, DiskError> {
        let run = self.gather(io, offset, len, |run, next| run.is_hole() == next.is_hole()).await?;
        Ok(Span { hole: run.is_hole(), len: run.len })
    }

    /// As [`Disk::span`], but says which link of the chain has it, and where: a run goes on as long as that does.
    ///
    /// # Errors
    ///
    /// As of [`Disk::span`].
    pub async fn map<I: FileIo>(&self, io: &I, offset: u64, len: u64) -> Result<Run, DiskError> {
        self.gather(io, offset, len, Run::goes_on_in).await
    }

    /// The piece at `offset`, and those that follow as long as they go on with it.
    async fn gather<I: FileIo>(
        &self,
        io: &I,
        offset: u64,
        len: u64,
        goes_on: impl Fn(&Run, &Run) -> bool,
    ) -> Result<Run, DiskError> {
        let mut walk = Walk::default();
        let mut run: Option<Run> = None;
        let mut done = 0;
        while done < len {
            let piece = self.piece(io, offset + done, len - done, &mut walk).await?;
            let run = run.get_or_insert(Run { len: 0, ..piece });
            if !goes_on(run, &piece) {
                break;
            }
            done += piece.len;
            run.len = done;
        }
        Ok(run.unwrap_or(Run { len: 0, depth: 0, kind: RunKind::Hole }))
    }

    /// What one look tells.
    async fn piece<I: FileIo>(&self, io: &I, offset: u64, len: u64, walk: &mut Walk) -> Result<Run, DiskError> {
        let (mut first, mut len) = match walk.until.checked_sub(offset) {
            Some(known @ 1..) => (walk.first, len.min(known)),
            _ => (0, len),
        };
        loop {
            let found = self.chain.find_from(first, offset, len)?;
            let depth = found.depth;
            if let Some(place) = &found.place {
                (walk.first, walk.until) = (depth, offset + place.len);
            }
            let (len, kind) = match (found.mapping, found.place) {
                (Mapping::NeedMeta(meta), Some(place)) => {
                    match self.absent_by_hole(io, place, meta, &mut walk.tables).await? {
                        0 => self.load_at(io, place, meta).await?,
                        absent => (first, len) = (depth + 1, absent),
                    }
                    continue;
                }
                (Mapping::Zero { len }, Some(_)) => (len, RunKind::Zero { place: None }),
                (Mapping::Barred { len }, _) => (len, RunKind::NoAccess),
                (Mapping::Compressed { file, len, .. }, _) => (len, RunKind::Compressed { file }),
                (Mapping::Data { file, offset, len, .. }, _) => {
                    let stored = self.stored(io, file, offset, &mut walk.data).await?;
                    let kind = match stored.hole {
                        true => RunKind::Zero { place: Some((file, offset)) },
                        false => RunKind::Data { file, offset },
                    };
                    (len.min(stored.len), kind)
                }
                // Only a link that has a place asks for metadata, and what is left to the parent ends as zeroes.
                (Mapping::Zero { len } | Mapping::Parent { len }, _) => (len, RunKind::Hole),
                (Mapping::NeedMeta(_), None) => (len, RunKind::Hole),
            };
            return Ok(Run { len, depth, kind });
        }
    }

    /// How many bytes of the place are absent because their grain tables or pages of the directory, of which `meta` is the first,
    /// lie in a hole of the file.
    /// Programs that make all tables beforehand leave most of them so, and there are millions in a large image.
    async fn absent_by_hole<I: FileIo>(
        &self,
        io: &I,
        place: Place<'_>,
        meta: MetaRef,
        told: &mut Option<Told>,
    ) -> Result<u64, DiskError> {
        let Layout::Sparse(extent) = &place.extent.layout else { return Ok(0) };
        let Some((at, _, _)) = extent.place_of(meta)? else { return Ok(0) };
        let stored = self.stored(io, extent.file, at, told).await?;
        if !stored.hole {
            return Ok(0);
        }
        Ok(extent.absent_by_hole(meta, place.offset, place.len, &(at..at.saturating_add(stored.len))))
    }

    async fn stored<I: FileIo>(
        &self,
        io: &I,
        file: FileId,
        offset: u64,
        told: &mut Option<Told>,
    ) -> Result<Stored, DiskError> {
        if let Some(t) = told
            && t.file == file
            && let Some(skip) = offset.checked_sub(t.start)
            && skip < t.stored.len
        {
            return Ok(Stored { hole: t.stored.hole, len: t.stored.len - skip });
        }
        let stored = io.stored_at(file, offset).await;
        let stored =
            stored.map_err(|e| DiskError::host(format!("look for holes at {offset} of {}", self.name(file)), e))?;
        *told = Some(Told { file, start: offset, stored });
        Ok(stored)
    }
}
