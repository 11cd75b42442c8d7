//! Looking for what contradicts the format in an image: `vdisk check`.
//!
//! Everything that the tables say is looked at, in all links of the chain; of the data only what carries a check sum of its own,
//! the grains of streams. Nothing is changed.

mod extent;
mod place;
mod repair;
mod survey;
mod verdict;
mod writer;

pub use repair::{Repair, RepairWatch};
pub use writer::{Backup, Kept};

use crate::disk::Disk;
use crate::error::DiskError;
use crate::file_io::FileIo;
use crate::image::Layout;
use crate::sparse::Sparse;

/// What contradicts the format, and where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// What kind of contradiction.
    pub kind: FaultKind,
    /// The file, as its messages call it.
    pub file: String,
    /// Byte offset in the file of what is wrong: of the entry, not of what it names. `None` where there is no one place.
    pub offset: Option<u64>,
    /// For people.
    pub detail: String,
}

/// Kinds of contradictions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum FaultKind {
    /// The image, or a part of it, cannot be opened or read.
    Unreadable,
    /// The last one who wrote the extent did not close it.
    Unclean,
    /// The header's line ends were changed, as by a transfer in text mode.
    NewlineBytes,
    /// The header and the descriptor give the extent different sizes.
    Capacity,
    /// The CID and the end of longContentID differ, as after a write by qemu.
    ContentId,
    /// The parent was changed after the child was made, or cannot be opened.
    Parent,
    /// A stream has no grain directory.
    NoDirectory,
    /// An entry that has no meaning in this format.
    EntryUnknown,
    /// An entry names a place past the end of the file.
    EntryPastEnd,
    /// An entry names a place inside the metadata.
    EntryInMetadata,
    /// An entry names a place where no grain begins.
    EntryMisaligned,
    /// Two entries name the same place.
    EntryUsedTwice,
    /// A grain table, or the directory, differs from its redundant copy.
    CopiesDiffer,
    /// The header of a COWD extent calls a place free that is used.
    FreeSector,
    /// A compressed grain is damaged.
    Record,
}

impl FaultKind {
    /// Whether it is only worth knowing: other programs leave images so, and nothing is wrong with them.
    pub fn is_note(self) -> bool {
        self == Self::ContentId
    }

    /// The name that scripts may rely on.
    pub fn name(self) -> &'static str {
        match self {
            Self::Unreadable => "unreadable",
            Self::Unclean => "unclean",
            Self::NewlineBytes => "newline_bytes",
            Self::Capacity => "capacity",
            Self::ContentId => "content_id",
            Self::Parent => "parent",
            Self::NoDirectory => "no_directory",
            Self::EntryUnknown => "entry_unknown",
            Self::EntryPastEnd => "entry_past_end",
            Self::EntryInMetadata => "entry_in_metadata",
            Self::EntryMisaligned => "entry_misaligned",
            Self::EntryUsedTwice => "entry_used_twice",
            Self::CopiesDiffer => "copies_differ",
            Self::FreeSector => "free_sector",
            Self::Record => "record",
        }
    }
}

/// Who is told what a check finds.
pub trait CheckWatch {
    /// Something contradicts the format. There may be any number of these.
    fn fault(&mut self, fault: Fault);

    /// So much of the work is done. Units mean nothing.
    fn progress(&mut self, done: u64, total: u64);
}

/// What belongs to nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Leaks {
    /// Grains of the files that no entry names.
    pub grains: u64,
    /// The bytes that they take in the file, whether or not the host stores them.
    pub bytes: u64,
}

impl Disk {
    /// Looks for contradictions, and answers what belongs to nothing. The disk was opened with [`crate::OpenOptions::examine`],
    /// and nobody writes it. A table that cannot be read is a fault as well.
    pub async fn check<I: FileIo>(&self, io: &I, watch: &mut impl CheckWatch) -> Leaks {
        for fault in &self.faults {
            watch.fault(fault.clone());
        }
        let links = || std::iter::once(&self.chain.top).chain(&self.chain.parents);
        let extents: Vec<&Sparse> = links()
            .flat_map(|link| &link.extents)
            .filter_map(|e| match &e.layout {
                Layout::Sparse(s) => Some(&**s),
                Layout::Flat { .. } | Layout::Zero => None,
            })
            .collect();
        let total = extents.iter().map(|e| e.check_units()).sum();
        let mut leaks = Leaks::default();
        let mut done = 0;
        for extent in extents {
            let found = self.check_extent(io, extent, watch, (done, total)).await;
            done += extent.check_units();
            watch.progress(done, total);
            match found {
                Ok(more) => {
                    leaks.grains += more.grains;
                    leaks.bytes += more.bytes;
                }
                Err(e) => watch.fault(Fault::unreadable(&extent.name, &e)),
            }
        }
        leaks
    }
}

impl Fault {
    /// What could not be opened or read.
    pub fn unreadable(file: &str, e: &DiskError) -> Self {
        let mut detail = e.to_string();
        let mut cause = std::error::Error::source(e);
        let mut kind = FaultKind::Unreadable;
        while let Some(c) = cause {
            detail = format!("{detail}: {c}");
            let parse = c.downcast_ref::<vmdk_parse::ParseError>();
            if parse.is_some_and(|p| p.kind == vmdk_parse::ParseErrorKind::NewlineDamage) {
                kind = FaultKind::NewlineBytes;
            }
            cause = c.source();
        }
        Self { kind, file: file.to_owned(), offset: None, detail }
    }
}
