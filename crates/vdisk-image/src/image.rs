//! Images: extents in a row, and the one thing a format says: where data is; and chains of them.

use crate::error::{DiskError, ErrorKind};
use crate::file_io::FileId;
use crate::inflate::Record;
use crate::sparse::{MetaRef, Sparse};
use std::iter;
use std::sync::atomic::{AtomicU64, Ordering};
use vmdk_parse::Access;

/// Where a part of the disk is. `len` is never 0 and never more than was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mapping {
    /// In a file.
    Data { file: FileId, offset: u64, len: u64, grain: Option<Grain> },
    /// In a file, inside a compressed grain: `skip` bytes into it.
    Compressed { file: FileId, record: Record, skip: u64, len: u64 },
    /// Nowhere: it reads as zeroes.
    Zero { len: u64 },
    /// Not in this link of the chain: the parent has it, and without a parent it reads as zeroes.
    Parent { len: u64 },
    /// In an extent marked NOACCESS.
    Barred { len: u64 },
    /// Not known before this is read.
    NeedMeta(MetaRef),
}

/// The grain that a piece of data belongs to: byte offset in its file, and bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Grain {
    pub(crate) start: u64,
    pub(crate) len: u64,
    /// The file reaches to its end.
    pub(crate) whole: bool,
}

/// A part of the disk with its own file.
#[derive(Debug)]
pub(crate) struct Extent {
    /// First byte on the disk.
    pub(crate) start: u64,
    /// Bytes. More of them as soon as the last extent has grown ([`crate::Disk::find_growth`]), never fewer.
    len: AtomicU64,
    pub(crate) access: Access,
    pub(crate) layout: Layout,
}

/// How an extent stores its bytes.
#[derive(Debug)]
pub(crate) enum Layout {
    /// As they are, from `offset` of the file on.
    Flat { file: FileId, offset: u64 },
    /// Not at all: they are zeroes.
    Zero,
    /// In grains.
    Sparse(Box<Sparse>),
}

/// The extents of an image, in order and without gaps.
#[derive(Debug)]
pub(crate) struct Image {
    pub(crate) extents: Vec<Extent>,
}

/// An image and its parents: a read goes down until a link has something, a change stays in the top.
#[derive(Debug)]
pub(crate) struct Chain {
    pub(crate) top: Image,
    /// The parent, its parent, and so on.
    pub(crate) parents: Vec<Image>,
}

/// An extent and an offset in it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Place<'a> {
    pub(crate) extent: &'a Extent,
    pub(crate) offset: u64,
    /// Bytes that are left in the extent, no more than were asked for.
    pub(crate) len: u64,
}

/// Which link of a chain decides what begins at a byte of the disk, and what it says.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Found<'a> {
    /// 0 is the top, 1 its parent, and so on; for zeroes that no link has the last one that reaches so far.
    pub(crate) depth: usize,
    /// In that link; `None` for zeroes that no link has. Links above it have nothing in all of the place.
    pub(crate) place: Option<Place<'a>>,
    /// Never [`Mapping::Parent`].
    pub(crate) mapping: Mapping,
}

impl Chain {
    /// Divides the memory for tables among all sparse extents. Not by who asks first: an extent that took most of it and is
    /// not read any more would leave nothing to the others.
    pub(crate) fn share_memory(&mut self, bytes: usize) {
        let extents = iter::once(&mut self.top).chain(&mut self.parents).flat_map(|image| &mut image.extents);
        let mut sparse: Vec<&mut Sparse> = extents
            .filter_map(|e| match &mut e.layout {
                Layout::Sparse(s) => Some(&mut **s),
                Layout::Flat { .. } | Layout::Zero => None,
            })
            .collect();
        let share = bytes / sparse.len().max(1);
        sparse.iter_mut().for_each(|s| s.set_memory(share));
    }

    /// Where the bytes begin to be, in whatever link.
    ///
    /// # Errors
    ///
    /// As of [`Image::locate`] and [`Place::map`].
    pub(crate) fn find(&self, offset: u64, len: u64) -> Result<Found<'_>, DiskError> {
        self.find_from(0, offset, len)
    }

    /// As [`Chain::find`], from the link at depth `first` on down.
    ///
    /// # Errors
    ///
    /// As of [`Chain::find`].
    pub(crate) fn find_from(&self, first: usize, offset: u64, len: u64) -> Result<Found<'_>, DiskError> {
        let (mut depth, mut len) = (first, len);
        if depth == 0 {
            let place = self.top.locate(offset, len)?;
            match place.map()? {
                Mapping::Parent { len: less } => len = less,
                mapping => return Ok(Found { depth, place: Some(place), mapping }),
            }
            depth = 1;
        }
        for parent in self.parents.iter().skip(depth - 1) {
            // A parent may be smaller than its child, which has zeroes there whatever comes further down.
            let Some(inside) = parent.size().checked_sub(offset).filter(|inside| *inside > 0) else {
                return Ok(Found { depth: depth - 1, place: None, mapping: Mapping::Zero { len } });
            };
            let place = parent.locate(offset, len.min(inside))?;
            match place.map()? {
                Mapping::Parent { len: less } => len = less,
                mapping => return Ok(Found { depth, place: Some(place), mapping }),
            }
            depth += 1;
        }
        Ok(Found { depth: self.parents.len(), place: None, mapping: Mapping::Zero { len } })
    }
}

impl Extent {
    pub(crate) fn new(start: u64, len: u64, access: Access, layout: Layout) -> Self {
        Self { start, len: len.into(), access, layout }
    }

    pub(crate) fn len(&self) -> u64 {
        self.len.load(Ordering::Acquire)
    }

    /// Where it ends on the disk.
    pub(crate) fn end(&self) -> u64 {
        self.start + self.len()
    }

    pub(crate) fn grow(&self, len: u64) {
        self.len.fetch_max(len, Ordering::AcqRel);
    }
}

impl Image {
    /// Bytes of the disk that it makes.
    pub(crate) fn size(&self) -> u64 {
        self.extents.last().map_or(0, Extent::end)
    }

    /// The extent at a byte of the disk.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::OutOfRange`] past the last one.
    pub(crate) fn locate(&self, offset: u64, len: u64) -> Result<Place<'_>, DiskError> {
        let index = self.extents.partition_point(|e| e.end() <= offset);
        match self.extents.get(index) {
            Some(extent) => {
                let inside = offset - extent.start;
                Ok(Place { extent, offset: inside, len: len.min(extent.len() - inside) })
            }
            None => Err(DiskError::new(ErrorKind::OutOfRange, format!("no extent holds byte {offset} of the disk"))),
        }
    }

    /// The sparse extents that may change. The files of the others are not touched, and may not even be open for it.
    pub(crate) fn writable_sparse(&self) -> impl Iterator<Item = &Sparse> {
        self.extents.iter().filter_map(|e| match &e.layout {
            Layout::Sparse(s) if e.access == Access::Rw => Some(&**s),
            Layout::Sparse(_) | Layout::Flat { .. } | Layout::Zero => None,
        })
    }
}

impl Place<'_> {
    /// Where the bytes of this place begin to be; the answer may cover less.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Corrupt`] from the tables.
    pub(crate) fn map(&self) -> Result<Mapping, DiskError> {
        if self.extent.access == Access::NoAccess {
            return Ok(Mapping::Barred { len: self.len });
        }
        match &self.extent.layout {
            Layout::Flat { file, offset } => {
                Ok(Mapping::Data { file: *file, offset: offset + self.offset, len: self.len, grain: None })
            }
            Layout::Zero => Ok(Mapping::Zero { len: self.len }),
            Layout::Sparse(s) => s.map(self.offset, self.len),
        }
    }

    /// Refuses a change where the image does not allow one.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::ReadOnly`].
    pub(crate) fn check_writable(&self) -> Result<(), DiskError> {
        if self.extent.access == Access::Rw {
            return Ok(());
        }
        Err(DiskError::new(
            ErrorKind::ReadOnly,
            format!("the extent at byte {} of the disk is not marked RW", self.extent.start),
        ))
    }
}
