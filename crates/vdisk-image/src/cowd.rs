//! COWD extents, ESX's own sparse format (`VMFSSPARSE`): opening them, and what only they need.
//!
//! Grains and tables follow one another in the file, and the header says where free space begins: ESX hands out what lies
//! behind that. So it is never behind what a durable entry names. Source: VMware Virtual Disk Format 1.1, "ESX Server
//! Sparse Extents".

use crate::allocate::State;
use crate::change::Unclean;
use crate::coding::Coding;
use crate::disk::Disk;
use crate::error::{DiskError, ErrorKind};
use crate::file_io::{FileId, FileIo, Files};
use crate::flush::Step;
use crate::link::Opening;
use crate::scan::TableRun;
use crate::sparse::{Parts, Sparse};
use crate::wait::locked;
use std::ops::Range;
use vmdk_parse::{
    Access, COWD_FREE_SECTOR_AT, COWD_GTES_PER_GT, CowdHeader, ExtentKind, ExtentLine, GTE_SIZE, SECTOR_SIZE, Sectors,
};

/// What a COWD extent begins with, whichever of `SPARSE` and `VMFSSPARSE` its line says.
pub(crate) const MAGIC: &[u8] = b"COWD";

impl<F: Files> Opening<'_, F> {
    /// The COWD extent of a line.
    pub(crate) async fn cowd(&mut self, line: &ExtentLine, file: FileId) -> Result<(), DiskError> {
        let header = self.cowd_header(file).await?;
        self.cowd_extent(line, file, &header)
    }

    /// A COWD extent that nothing lists. It has no content ID, and nothing says whether it is a snapshot: ESX calls those
    /// roots as well. So it can be read, if it does not name a parent itself, but not written.
    pub(crate) async fn cowd_alone(&mut self, file: FileId) -> Result<(), DiskError> {
        let name = self.name(file);
        let header = self.cowd_header(file).await?;
        let refused = |what: String| {
            let text = format!("{name}: {what}: open the .vmdk descriptor that lists it");
            Err(DiskError::new(ErrorKind::NotAnImage, text))
        };
        if let Some(parent) = header.parent_file_name() {
            let parent = String::from_utf8_lossy(parent);
            return refused(format!("is a COWD extent and a delta of \"{}\"", parent.escape_debug()));
        }
        if !self.read_only {
            return refused("is a COWD extent, which can only be read by itself (--read-only)".to_owned());
        }
        self.link.info.notices.push(
            "a COWD extent by itself: if a descriptor lists it, open that; what a snapshot does not have reads as zeroes"
                .to_owned(),
        );
        let line = ExtentLine {
            access: Access::RdOnly,
            sectors: header.capacity,
            kind: ExtentKind::VmfsSparse,
            file: None,
            offset: Sectors(0),
            partition_uuid: None,
            device_id: None,
        };
        self.cowd_extent(&line, file, &header)
    }

    async fn cowd_header(&self, file: FileId) -> Result<CowdHeader, DiskError> {
        let bytes = self.read(file, 0, CowdHeader::LEN as u64).await?;
        CowdHeader::decode(&bytes).map_err(|e| self.bad_header(file, "COWD extent header", e))
    }

    fn cowd_extent(&mut self, line: &ExtentLine, file: FileId, header: &CowdHeader) -> Result<(), DiskError> {
        let name = self.name(file);
        let read_only = self.is_read_only(line);
        if header.needs_check() {
            self.link.info.clean = false;
        }
        if !read_only && header.flags & CowdHeader::INCONSISTENT != 0 {
            let text = format!("{name}: calls itself inconsistent: use --read-only");
            return Err(DiskError::new(ErrorKind::Unsupported, text));
        }
        let parts = Parts::cowd(&name, header, line.sectors, self.len(file)?)?;
        if !read_only {
            self.link.unclean.push(Unclean::cowd(file));
        }
        self.push_sparse(line, file, parts)
    }
}

impl Parts {
    fn cowd(name: &str, header: &CowdHeader, sectors: Sectors, file_len: u64) -> Result<Self, DiskError> {
        let corrupt = |what: String| DiskError::new(ErrorKind::Corrupt, format!("{name}: {what}"));
        if header.capacity < sectors {
            return Err(corrupt(format!("the header says {}, but the descriptor {sectors}", header.capacity)));
        }
        // What the header has beyond the extent's own sectors cannot be reached.
        let gtes = u64::from(COWD_GTES_PER_GT);
        let tables = sectors.0.div_ceil(gtes * header.grain_size.0);
        let directory = header.gd_offset.0 * SECTOR_SIZE;
        if directory + tables * GTE_SIZE > file_len {
            return Err(corrupt(format!(
                "the grain directory at sector {} does not lie in the file of {file_len} bytes",
                header.gd_offset.0
            )));
        }
        Ok(Self {
            coding: Coding::Cowd { free: header.free_sector.0 * SECTOR_SIZE },
            grain: header.grain_size.0 * SECTOR_SIZE,
            gtes,
            gd_at: directory,
            rgd_at: None,
            copy_gd: None,
            front: CowdHeader::LEN as u64,
            tables,
            overhead: CowdHeader::LEN as u64,
            unclean: header.unclean_shutdown != 0,
            stream: None,
        })
    }
}

impl Sparse {
    /// What the header has to say of where free space begins: (byte offset, bytes). `None` where there is no such field,
    /// or nothing can have changed.
    pub(crate) fn free_sector(&self, state: &State) -> Option<(u64, Vec<u8>)> {
        let next = state.next.filter(|_| matches!(self.coding, Coding::Cowd { .. }))?;
        // An entry of somebody else's may have named the last sector there is: then nothing is free.
        let sector = u32::try_from(next / SECTOR_SIZE).unwrap_or(u32::MAX);
        Some((COWD_FREE_SECTOR_AT, sector.to_le_bytes().to_vec()))
    }

    /// Writes where free space begins.
    pub(crate) fn free_sector_step(&self) -> Option<Step> {
        let (offset, bytes) = self.free_sector(&locked(&self.state))?;
        Some(Step::Write { file: self.file, offset, bytes })
    }
}

/// Where the grain tables of an extent are, that has them among its grains.
#[derive(Debug)]
pub(crate) struct TableAreas {
    /// Byte offsets, in order.
    starts: Vec<u64>,
    /// Bytes of a table.
    len: u64,
    /// No table is here: the last answer is mostly the next one too.
    gap: Range<u64>,
}

impl TableAreas {
    /// The place of the second of two tables that overlap is the error.
    fn new(mut starts: Vec<u64>, len: u64) -> Result<Self, u64> {
        starts.sort_unstable();
        let overlap = starts.array_windows().find(|[a, b]| a + len > *b);
        match overlap {
            Some([_, second]) => Err(*second),
            None => Ok(Self::sorted(starts, len)),
        }
    }

    /// Of tables that are in order and may overlap.
    pub(crate) fn sorted(starts: Vec<u64>, len: u64) -> Self {
        Self { starts, len, gap: 0..0 }
    }

    /// Whether a grain lies where a table is.
    pub(crate) fn overlaps(&mut self, at: u64, len: u64) -> bool {
        if self.gap.start <= at && at + len <= self.gap.end {
            return false;
        }
        let index = self.starts.partition_point(|start| start + self.len <= at);
        let behind = self.starts.get(index).copied().unwrap_or(u64::MAX);
        if behind < at + len {
            return true;
        }
        let before = index.checked_sub(1).and_then(|i| self.starts.get(i));
        self.gap = before.map_or(0, |start| start + self.len)..behind;
        false
    }

    /// Refuses an extent with grains where tables are: the guest would write its own tables.
    pub(crate) fn check_grains(&mut self, extent: &Sparse, run: TableRun, bytes: &[u8]) -> Result<(), DiskError> {
        for (n, at) in extent.places(bytes) {
            if self.overlaps(at, extent.grain) {
                let (table, entry) = (run.first + n / extent.gtes, n % extent.gtes);
                return Err(cannot_change(
                    extent,
                    &format!(
                        "entry {entry} of grain table {table} points to sector {}, where a grain table is",
                        at / SECTOR_SIZE
                    ),
                ));
            }
        }
        Ok(())
    }
}

fn cannot_change(extent: &Sparse, what: &str) -> DiskError {
    DiskError::new(ErrorKind::Corrupt, format!("{}: {what}: use --read-only", extent.name))
}

impl Disk {
    /// Where the tables of a COWD extent are; they must not overlap if it is to change. `None` for other formats, whose
    /// tables are in front of the grains.
    pub(crate) async fn table_areas<I: FileIo>(
        &self,
        io: &I,
        extent: &Sparse,
    ) -> Result<Option<TableAreas>, DiskError> {
        if !matches!(extent.coding, Coding::Cowd { .. }) {
            return Ok(None);
        }
        let mut starts = Vec::new();
        for page in 0..extent.page_count() {
            let runs = loop {
                match extent.table_runs(page, u64::MAX) {
                    Ok(runs) => break runs,
                    Err(meta) => self.load(io, extent, meta).await?,
                }
            };
            for run in runs {
                starts.extend((0..run.count).map(|n| run.at + n * extent.table_bytes()));
            }
        }
        let overlap =
            |at: u64| cannot_change(extent, &format!("two grain tables overlap at sector {}", at / SECTOR_SIZE));
        TableAreas::new(starts, extent.table_bytes()).map(Some).map_err(overlap)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_grain_may_touch_a_table_but_not_overlap_it() {
        let mut areas = TableAreas::new(vec![5000, 1000], 1000).unwrap();
        for (at, len, overlaps) in [
            (0, 1000, false),
            (0, 1001, true),
            (999, 1, false),
            (1000, 1, true),
            (1999, 1, true),
            (2000, 3000, false),
            (2500, 10, false),
            (2000, 3001, true),
            (1500, 4000, true),
            (6000, 1, false),
            (5999, 1, true),
            (0, 10_000, true),
        ] {
            assert_eq!(areas.overlaps(at, len), overlaps, "{at} + {len}");
        }
        assert_eq!(TableAreas::new(vec![2999, 0, 2000], 1000).unwrap_err(), 2999);
        assert_eq!(TableAreas::new(vec![7, 7], 1000).unwrap_err(), 7);
        assert!(TableAreas::new(vec![2000, 0, 1000], 1000).is_ok());
    }
}
