//! COWD extents, ESX's own sparse format (`VMFSSPARSE`): opening them, and what only they need.
//!
//! Grains and tables follow one another in the file, and the header says where free space begins: ESX hands out what lies
//! behind that. So it is never behind what a durable entry names. Source: VMware Virtual Disk Format 1.1, "ESX Server
//! Sparse Extents".

use crate::allocate::State;
use crate::change::Unclean;
use crate::coding::Coding;
use crate::error::{DiskError, ErrorKind};
use crate::file_io::{FileId, Files};
use crate::flush::Step;
use crate::link::Opening;
use crate::sparse::{Parts, Sparse};
use crate::wait::locked;
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
            tables,
            overhead: CowdHeader::LEN as u64,
            fixed: Vec::new(),
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
