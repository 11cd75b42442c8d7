//! Which parts of a disk hold data, and which are holes.

use crate::disk::Disk;
use crate::error::DiskError;
use crate::file_io::{FileId, FileIo, Stored};
use crate::image::Mapping;

/// A stretch of the disk that is all data or all hole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// Takes no space on the host, and reads as zeroes.
    pub hole: bool,
    /// Bytes.
    pub len: u64,
}

/// What the host said of a file last: runs of a disk mostly follow one another in the file as well.
#[derive(Clone, Copy, Debug)]
struct Told {
    file: FileId,
    start: u64,
    stored: Stored,
}

impl Disk {
    /// What begins at byte `offset` of the disk, as far as it is the same; `len` bytes from there on, inside the disk, are
    /// looked at. Reads tables, never data. What changes meanwhile may be told either way.
    ///
    /// # Errors
    ///
    /// As for a read: what failed, where.
    pub async fn span<I: FileIo>(&self, io: &I, offset: u64, len: u64) -> Result<Span, DiskError> {
        let mut span: Option<bool> = None;
        let mut told = None;
        let mut done = 0;
        while done < len {
            let (place, mapping) = self.chain.find(offset + done, len - done)?;
            let (hole, more) = match mapping {
                Mapping::NeedMeta(meta) => {
                    self.load_at(io, place, meta).await?;
                    continue;
                }
                Mapping::Zero { len } | Mapping::Parent { len } => (true, len),
                Mapping::Compressed { len, .. } => (false, len),
                Mapping::Data { file, offset, len, .. } => {
                    let stored = self.stored(io, file, offset, &mut told).await?;
                    (stored.hole, len.min(stored.len))
                }
            };
            if *span.get_or_insert(hole) != hole {
                break;
            }
            done += more;
        }
        Ok(Span { hole: span.unwrap_or(true), len: done })
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
