//! seSparse extents, ESXi's sparse format for snapshots (`SESPARSE`): opening them. They are only read: their journal, free
//! bitmap and backmap are not described anywhere.

use crate::coding::Coding;
use crate::error::{DiskError, ErrorKind};
use crate::file_io::{FileId, Files};
use crate::link::Opening;
use crate::sparse::Parts;
use vmdk_parse::{
    ExtentLine, ParseErrorKind, SE_SPARSE_ENTRY_SIZE, SE_SPARSE_GRAIN_SECTORS, SE_SPARSE_GTES_PER_GT, SECTOR_SIZE,
    SeSparseHeader, SeVolatileHeader, Sectors,
};

/// What a seSparse extent begins with.
pub(crate) const MAGIC: [u8; 8] = 0xcafe_babe_u64.to_le_bytes();

impl<F: Files> Opening<'_, F> {
    /// Refuses a seSparse extent that could be written to.
    pub(crate) fn check_se_sparse(&self, n: usize, line: &ExtentLine) -> Result<(), DiskError> {
        if self.is_read_only(line) {
            return Ok(());
        }
        let text = format!(
            "extent {n}: a seSparse extent can only be read: use --read-only, or --overlay FILE to write beside it"
        );
        Err(DiskError::new(ErrorKind::Unsupported, text))
    }

    /// The seSparse extent of a line that is read-only.
    pub(crate) async fn se_sparse(&mut self, line: &ExtentLine, file: FileId) -> Result<(), DiskError> {
        let bytes = self.read(file, 0, SeSparseHeader::LEN as u64).await?;
        let header = SeSparseHeader::decode(&bytes).map_err(|e| self.bad_header(file, "seSparse extent header", e))?;
        let at = header.volatile_header.start.0 * SECTOR_SIZE;
        let bytes = self.read(file, at, SeVolatileHeader::LEN as u64).await?;
        SeVolatileHeader::decode(&bytes).map_err(|e| match e.kind {
            ParseErrorKind::DirtyJournal => {
                let text = format!(
                    "{}: was not closed, and what its journal holds is missing in its tables: \
                     open it once with the ESX host, which replays it",
                    self.name(file)
                );
                DiskError::new(ErrorKind::Unsupported, text).because(e)
            }
            _ => self.bad_header(file, "seSparse volatile header", e),
        })?;
        let parts = Parts::se_sparse(&self.name(file), header, line.sectors, self.len(file)?)?;
        self.push_sparse(line, file, parts)
    }
}

impl Parts {
    fn se_sparse(name: &str, header: SeSparseHeader, sectors: Sectors, file_len: u64) -> Result<Self, DiskError> {
        let corrupt = |what: String| DiskError::new(ErrorKind::Corrupt, format!("{name}: {what}"));
        if header.capacity < sectors {
            return Err(corrupt(format!("the header says {}, but the descriptor {sectors}", header.capacity)));
        }
        // What the header has beyond the extent's own sectors cannot be reached.
        let gtes = u64::from(SE_SPARSE_GTES_PER_GT);
        let tables = sectors.0.div_ceil(gtes * SE_SPARSE_GRAIN_SECTORS.0);
        // The area ends inside 64 bits of bytes and has room for all tables.
        let directory = header.grain_directory.start;
        let gd_at = directory.0 * SECTOR_SIZE;
        if gd_at + tables * SE_SPARSE_ENTRY_SIZE > file_len {
            return Err(corrupt(format!(
                "the grain directory at sector {} does not lie in the file of {file_len} bytes",
                directory.0
            )));
        }
        Ok(Self {
            coding: Coding::SeSparse(header),
            grain: SE_SPARSE_GRAIN_SECTORS.0 * SECTOR_SIZE,
            gtes,
            gd_at,
            rgd_at: None,
            copy_gd: None,
            tables,
            // Grains are counted from the start of their area.
            overhead: 0,
            fixed: Vec::new(),
            unclean: false,
            stream: None,
        })
    }
}
