//! What the entries of grain directories and grain tables mean: where the sparse formats differ.

use crate::table::Entries;
use vmdk_parse::{
    GTE_SIZE, GrainEntry, ParseError, SE_SPARSE_ENTRY_SIZE, SECTOR_SIZE, SeDirectoryEntry, SeGrainEntry,
    SeSparseHeader, decode_entries, decode_se_entries,
};

/// How a sparse format codes entries, and where it puts what is new.
#[derive(Debug)]
pub(crate) enum Coding {
    /// Hosted sparse: 32-bit sector numbers. With `zeroed_grain`, 1 is a grain of zeroes.
    Hosted { zeroed_grain: bool },
    /// COWD: 32-bit sector numbers, grains and tables mixed. `free` is the byte that the header called the first free one
    /// when it was opened.
    Cowd { free: u64 },
    /// seSparse: 64-bit indices into two areas of the file. Only read.
    SeSparse(SeSparseHeader),
}

/// What the entry of a grain table says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Entry {
    /// The extent does not have the grain.
    Absent,
    /// The grain reads as zeroes, whatever lies below the extent.
    Zeroed,
    /// It is at this byte of the file.
    At(u64),
}

impl Coding {
    /// Bytes of an entry in the file.
    pub(crate) fn entry_bytes(&self) -> u64 {
        match self {
            Self::Hosted { .. } | Self::Cowd { .. } => GTE_SIZE,
            Self::SeSparse(_) => SE_SPARSE_ENTRY_SIZE,
        }
    }

    /// The entries in the bytes of a directory or a table.
    pub(crate) fn entries(&self, bytes: &[u8]) -> Entries {
        match self {
            Self::Hosted { .. } | Self::Cowd { .. } => Entries::narrow(decode_entries(bytes)),
            Self::SeSparse(_) => Entries::Wide(decode_se_entries(bytes).collect()),
        }
    }

    /// The byte of the file at which the table of a directory entry begins; `None` if it does not exist.
    ///
    /// # Errors
    ///
    /// An entry that has no meaning.
    pub(crate) fn table(&self, gde: u64) -> Result<Option<u64>, ParseError> {
        match self {
            Self::Hosted { .. } | Self::Cowd { .. } => Ok(Some(gde * SECTOR_SIZE).filter(|at| *at != 0)),
            Self::SeSparse(header) => match SeDirectoryEntry::decode(gde)? {
                SeDirectoryEntry::Absent => Ok(None),
                // The area of the tables ends inside 64 bits of bytes.
                SeDirectoryEntry::Table(index) => Ok(Some(header.table_start(index)?.0 * SECTOR_SIZE)),
            },
        }
    }

    /// What an entry of a table says. 0 is absent in every format.
    ///
    /// # Errors
    ///
    /// An entry that has no meaning.
    pub(crate) fn grain(&self, gte: u64) -> Result<Entry, ParseError> {
        Ok(match self {
            Self::Hosted { zeroed_grain } => sector_entry(gte, *zeroed_grain),
            Self::Cowd { .. } => sector_entry(gte, false),
            Self::SeSparse(header) => match SeGrainEntry::decode(gte, header.grains.start)? {
                SeGrainEntry::Absent => Entry::Absent,
                SeGrainEntry::Unmapped | SeGrainEntry::Zero => Entry::Zeroed,
                SeGrainEntry::At(sector) => Entry::At(sector.0 * SECTOR_SIZE),
            },
        })
    }

    /// What the places of new grains of `grain` bytes are a multiple of.
    pub(crate) fn alignment(&self, grain: u64) -> u64 {
        match self {
            Self::Hosted { .. } | Self::SeSparse(_) => grain,
            // Grains and tables follow one another.
            Self::Cowd { .. } => SECTOR_SIZE,
        }
    }
}

fn sector_entry(gte: u64, zeroed_grain: bool) -> Entry {
    #[expect(clippy::cast_possible_truncation, reason = "the entries of this format have 32 bits")]
    match GrainEntry::decode(gte as u32, zeroed_grain) {
        GrainEntry::Absent => Entry::Absent,
        GrainEntry::Zeroed => Entry::Zeroed,
        GrainEntry::At(sector) => Entry::At(sector.0 * SECTOR_SIZE),
    }
}
