//! An image that somebody makes longer while it is served: one that ends in bytes as they are, raw or a FLAT extent.

use crate::disk::{Disk, size};
use crate::error::{DiskError, ErrorKind};
use crate::file_io::{FileId, FileIo, read_bytes};
use crate::image::{Extent, Layout};
use std::io;
use vmdk_parse::{ContentId, Descriptor, MAX_TEXT_BYTES, SECTOR_SIZE, change_tracking_places, content_id_places};

/// What says where an image ends.
#[derive(Debug)]
pub(crate) enum End {
    /// The length of a raw file.
    File,
    /// The last extent line of a descriptor file, whose text this was.
    Descriptor { file: FileId, text: Vec<u8> },
    /// What is no file by itself: a header, a descriptor inside of another file.
    Fixed,
}

impl Disk {
    /// Whether [`Disk::find_growth`] finds another size if the image gets one.
    pub fn can_grow(&self) -> bool {
        self.last_flat().is_ok()
    }

    /// Looks again at how large the image is. What it has grown by may be asked for from here on, and is part of the disk for good:
    /// it never gets smaller. Answers how large the disk is, in bytes, and the file that it ends in. `len_of` tells how long a file of the
    /// image is now.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Unsupported`] for an image that does not end in a file of its bytes, [`ErrorKind::Corrupt`] if it is shorter than
    /// it was, or its descriptor says anything else than it did; and the host's.
    pub async fn find_growth<I: FileIo>(
        &self,
        io: &I,
        len_of: impl Fn(FileId) -> io::Result<u64>,
    ) -> Result<(u64, FileId), DiskError> {
        let (last, file, offset) = self.last_flat()?;
        let length = |file| len_of(file).map_err(|e| DiskError::host(format!("{}: length", self.name(file)), e));
        let in_file = length(file)?.saturating_sub(offset);
        let len = match &self.end {
            End::Descriptor { file: descriptor, text } => {
                let now = length(*descriptor)?.min(MAX_TEXT_BYTES + 1);
                let read = read_bytes(io, *descriptor, 0, size(now)).await;
                let now = read.map_err(|e| DiskError::host(format!("{}: read it", self.name(*descriptor)), e))?;
                self.last_line(*descriptor, text, &now)?
            }
            End::File | End::Fixed => in_file - in_file % SECTOR_SIZE,
        };
        let name = self.name(file);
        let wrong = |what: String| Err(DiskError::new(ErrorKind::Corrupt, format!("{name}: {what}")));
        if len < last.len() {
            return wrong(format!(
                "has shrunk to {len} bytes of the disk, from {}: the disk keeps its size, and what is behind its end fails",
                last.len()
            ));
        }
        if len > in_file {
            return wrong(format!(
                "the descriptor puts {len} bytes into it, and it has {in_file}: make it longer first"
            ));
        }
        // Offsets on the host are signed.
        if last.start.checked_add(len).is_none_or(|end| end > i64::MAX as u64) {
            return wrong(format!("{len} bytes are more than any disk has"));
        }
        last.grow(len);
        Ok((self.geometry().size, file))
    }

    /// The extent that may grow, and from which byte of which file on it is.
    fn last_flat(&self) -> Result<(&Extent, FileId, u64), DiskError> {
        let refused = |what: &str| Err(DiskError::new(ErrorKind::Unsupported, what));
        if !self.chain.parents.is_empty() {
            return refused("its size is that of the child or overlay, which does not grow with what is below it");
        }
        match self.chain.top.extents.last().map(|last| (last, &last.layout)) {
            Some((last, Layout::Flat { file, offset })) if !matches!(self.end, End::Fixed) => {
                Ok((last, *file, *offset))
            }
            Some((_, Layout::Sparse(_))) => {
                refused("a sparse VMDK says in its header how large it is: only raw and FLAT extents grow")
            }
            _ => refused("does not end in a raw or FLAT extent: only these grow"),
        }
    }

    /// Bytes of the last extent by the text `now` of the descriptor, of which nothing else may be new.
    fn last_line(&self, file: FileId, then: &[u8], now: &[u8]) -> Result<u64, DiskError> {
        let name = self.name(file);
        let wrong = |what: String| DiskError::new(ErrorKind::Corrupt, format!("{name}: {what}"));
        if now.len() < then.len() {
            let what = "is shorter than it was when it was attached, as one that was cut: add a comment";
            return Err(wrong(what.to_owned()));
        }
        let decode = |text| Descriptor::decode(text).map_err(|e| wrong("descriptor".to_owned()).because(e));
        let (was, is) = (decode(then)?, decode(now)?);
        // An extent without sectors is none, and the last one is another.
        let last = |d: &Descriptor| d.extents.last().filter(|line| line.sectors.0 > 0).cloned();
        let (Some(line), Some(old)) = (last(&is), last(&was)) else {
            return Err(wrong("its last extent has no sectors".to_owned()));
        };
        let happened = self.first_change.happened();
        let id = if happened { self.new_content_id } else { was.content_id };
        if let (Some(wanted), found) = (id, is.content_id)
            && found != id
        {
            let found = found.map_or_else(|| "none".to_owned(), |id: ContentId| id.to_string());
            return Err(wrong(format!("its CID is {found}, and has to be {wanted}")));
        }
        // The disk database is for virtual machines: how many cylinders the disk has, say.
        let mut same = Descriptor { content_id: was.content_id, ddb: was.ddb.clone(), ..is };
        if happened {
            // By the first write, which may have dropped change tracking.
            (same.version, same.change_track_path) = (was.version, was.change_track_path.clone());
        }
        if let Some(line) = same.extents.last_mut() {
            line.sectors = old.sectors;
        }
        if same != was {
            return Err(wrong("differs in more than the size of its last extent from when it was attached".to_owned()));
        }
        let places = |text| (content_id_places(text), change_tracking_places(text));
        if !happened && !self.read_only && places(then) != places(now) {
            return Err(wrong(
                "its CID or longContentID is at another place, where the first write would not find it: detach and attach the \
                 image instead"
                    .to_owned(),
            ));
        }
        line.sectors.bytes().ok_or_else(|| wrong(format!("{} are more than any disk has", line.sectors)))
    }
}
