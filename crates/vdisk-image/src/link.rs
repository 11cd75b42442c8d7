//! Opening one link of a chain: which extents it has, and whether all of them can be served.

use crate::change::Unclean;
use crate::check::{Fault, FaultKind};
use crate::cowd;
use crate::disk::size;
use crate::error::{DiskError, ErrorKind};
use crate::file_io::{FileId, Files, read_bytes};
use crate::flush::Step;
use crate::grow::End;
use crate::image::{Extent, Layout};
use crate::info::{ExtentInfo, Format, Info};
use crate::open::{OpenOptions, Parent};
use crate::probe::{self, Kind};
use crate::sparse::{Parts, Sparse};
use crate::stream;
use std::ops::Range;
use vmdk_parse::{
    Access, ContentId, Descriptor, ExtentKind, ExtentLine, ParseError, ParseErrorKind, SECTOR_SIZE, SparseHeader,
    change_tracking_places, content_id_places,
};

/// Grain tables of all extents of a chain together at most, in memory or not: what is kept for each page of them is 8 MiB.
/// That is 32 times a disk of 64 TiB with grains of 4 KiB, or 512 times one with 64 KiB.
const MAX_TABLES: u64 = 1 << 30;

/// A link of a chain that is open.
pub(crate) struct Link {
    pub(crate) extents: Vec<Extent>,
    pub(crate) unclean: Vec<Unclean>,
    /// What the first change writes into descriptors and headers beside [`Link::unclean`].
    pub(crate) first_steps: Vec<Step>,
    /// What one of them makes the content ID.
    pub(crate) new_content_id: Option<ContentId>,
    pub(crate) parent: Option<Parent>,
    pub(crate) info: Info,
    /// What is wrong and does not keep the link from being read.
    pub(crate) faults: Vec<Fault>,
    /// Makes the end of longContentID what the CID is, where the two differ.
    pub(crate) content_id_step: Option<Step>,
    pub(crate) end: End,
}

/// What all links of a chain that were opened have together.
#[derive(Default)]
pub(crate) struct SoFar {
    /// Of their files, by [`FileId`].
    pub(crate) names: Vec<String>,
    /// Grain tables.
    tables: u64,
}

/// A link of a chain on its way to being open.
pub(crate) struct Opening<'a, F: Files> {
    files: &'a F,
    options: &'a OpenOptions,
    /// Refuse every change of this link.
    pub(crate) read_only: bool,
    so_far: &'a mut SoFar,
    pub(crate) link: Link,
}

impl<'a, F: Files> Opening<'a, F> {
    pub(crate) fn new(files: &'a F, options: &'a OpenOptions, read_only: bool, so_far: &'a mut SoFar) -> Self {
        let info = Info {
            format: Format::Vmdk,
            subformat: None,
            size: 0,
            grain_size: None,
            clean: true,
            content_id: None,
            parents: Vec::new(),
            extents: Vec::new(),
            notices: Vec::new(),
        };
        let (extents, unclean, first_steps, faults) = Default::default();
        let (new_content_id, parent, content_id_step, end) = (None, None, None, End::Fixed);
        let link = Link { extents, unclean, first_steps, new_content_id, parent, info, faults, content_id_step, end };
        Self { files, options, read_only, so_far, link }
    }

    /// Opens the link whose first (or only) file is `image`.
    pub(crate) async fn link(mut self, image: FileId, format: Option<Format>) -> Result<Link, DiskError> {
        self.note(image);
        let head = self.read(image, 0, probe::HEAD).await?;
        match probe::probe(&self.name(image), self.len(image)?, &head, format)? {
            Kind::Raw => self.raw(image)?,
            Kind::SparseExtent => self.sparse_image(image).await?,
            Kind::CowdExtent => self.cowd_alone(image).await?,
            Kind::Descriptor => {
                let len = self.len(image)?;
                let (descriptor, text) = self.descriptor(image, 0, len).await?;
                self.described(image, 0, &descriptor, &text).await?;
                self.link.end = End::Descriptor { file: image, text };
            }
        }
        if self.link.info.size == 0 {
            let what = format!("{}: the disk has no sectors", self.name(image));
            return Err(DiskError::new(ErrorKind::NotAnImage, what));
        }
        Ok(self.link)
    }

    fn raw(&mut self, file: FileId) -> Result<(), DiskError> {
        self.link.info.format = Format::Raw;
        self.link.end = End::File;
        let len = self.len(file)?;
        let size = len - len % SECTOR_SIZE;
        if size < len {
            self.link
                .info
                .notices
                .push(format!("the last {} bytes are less than a sector and not part of the disk", len - size));
        }
        let line = ExtentLine { sectors: vmdk_parse::Sectors(size / SECTOR_SIZE), ..flat_line() };
        self.push(&line, Layout::Flat { file, offset: 0 }, Some(file))
    }

    /// A file that begins with a sparse extent's header: with an embedded descriptor it is a whole image.
    async fn sparse_image(&mut self, file: FileId) -> Result<(), DiskError> {
        let name = self.name(file);
        let header = self.header(file).await?;
        let Some(place) = header.embedded_descriptor() else {
            return Err(one_of_many(&name));
        };
        let file_len = self.len(file)?;
        if place.end > file_len {
            return Err(DiskError::new(
                ErrorKind::Corrupt,
                format!("{name}: the descriptor ends at byte {}, past the end of the file at {file_len}", place.end),
            ));
        }
        let (descriptor, text) = self.descriptor(file, place.start, place.end - place.start).await?;
        if descriptor.extents.is_empty() {
            return Err(one_of_many(&name));
        }
        if header.only_wraps_descriptor() {
            return self.described(file, place.start, &descriptor, &text).await;
        }
        self.describe(file, place.start, &descriptor, &text)?;
        let [line] = descriptor.extents.as_slice() else {
            return Err(DiskError::new(
                ErrorKind::Unsupported,
                format!("{name}: an embedded descriptor with {} extents", descriptor.extents.len()),
            ));
        };
        // The file name means this file, whatever it says, and RDONLY only that a stream was exported.
        let line = ExtentLine { access: Access::Rw, ..line.clone() };
        self.sparse(&line, file, header).await
    }

    /// An image whose descriptor names its extents.
    async fn described(
        &mut self,
        file: FileId,
        at: u64,
        descriptor: &Descriptor,
        text: &[u8],
    ) -> Result<(), DiskError> {
        self.describe(file, at, descriptor, text)?;
        for (n, line) in (1..).zip(&descriptor.extents) {
            self.extent(file, n, line).await?;
        }
        Ok(())
    }

    async fn extent(&mut self, by: FileId, n: usize, line: &ExtentLine) -> Result<(), DiskError> {
        let unsupported = |what: String| Err(DiskError::new(ErrorKind::Unsupported, format!("extent {n}: {what}")));
        match line.kind {
            ExtentKind::Zero => return self.push(line, Layout::Zero, None),
            ExtentKind::Flat | ExtentKind::Vmfs | ExtentKind::Sparse | ExtentKind::VmfsSparse => {}
            ExtentKind::SeSparse => self.check_se_sparse(n, line)?,
            kind @ (ExtentKind::VmfsRdm | ExtentKind::VmfsRaw) => {
                return unsupported(format!("type {kind} is not supported yet: convert with qemu-img convert -O vmdk"));
            }
        }
        let Some(name) = line.file.as_deref() else { return unsupported(format!("type {} without a file", line.kind)) };
        let writable = !self.read_only && line.access == Access::Rw;
        let file = self
            .files
            .open(by, name, writable)
            .map_err(|e| DiskError::host(format!("extent {n}: open \"{name}\""), e))?;
        self.note(file);
        if line.kind == ExtentKind::SeSparse {
            return self.se_sparse(line, file).await;
        }
        if is_sparse(line.kind) {
            if self.read(file, 0, cowd::MAGIC.len() as u64).await? == cowd::MAGIC {
                return self.cowd(line, file).await;
            }
            let header = self.header(file).await?;
            return self.sparse(line, file, header).await;
        }
        let len = self.len(file)?;
        let end = line.offset.checked_add(line.sectors).and_then(vmdk_parse::Sectors::bytes);
        if end.is_none_or(|end| end > len) {
            return Err(DiskError::new(
                ErrorKind::Corrupt,
                format!(
                    "extent {n}: \"{name}\" has {len} bytes, but the descriptor puts {} from {} on into it",
                    line.sectors, line.offset
                ),
            ));
        }
        let offset = line.offset.0 * SECTOR_SIZE;
        self.push(line, Layout::Flat { file, offset }, Some(file))
    }

    async fn sparse(&mut self, line: &ExtentLine, file: FileId, mut header: SparseHeader) -> Result<(), DiskError> {
        let name = self.name(file);
        let read_only = self.is_read_only(line);
        if header.capacity < line.sectors {
            return Err(DiskError::new(
                ErrorKind::Corrupt,
                format!("{name}: the header says {}, but the descriptor {}", header.capacity, line.sectors),
            ));
        }
        // Writers round up to a grain or do not; more than that is of another disk.
        if header.capacity.0.div_ceil(header.grain_size.0) > line.sectors.0.div_ceil(header.grain_size.0) {
            let detail = format!("the header says {}, but the descriptor {}", header.capacity, line.sectors);
            if !read_only {
                let what = format!("{name}: {detail}: use --read-only");
                return Err(DiskError::new(ErrorKind::Unsupported, what));
            }
            self.fault(FaultKind::Capacity, file, CAPACITY_AT, detail);
        }
        let stream = stream::open(self.files, file, &mut header, read_only, &mut self.link.info.notices).await?;
        if header.unclean_shutdown {
            self.link.info.clean = false;
        }
        if header.version > 2 && !read_only && self.options.drop_change_tracking {
            header.version = if header.flags.zeroed_grain() { 2 } else { 1 };
            let bytes = header.version.to_le_bytes().to_vec();
            self.link.first_steps.push(Step::Write { file, offset: VERSION_AT, bytes });
        }
        let parts = Parts::hosted(&name, &header, stream, line.sectors, self.len(file)?, read_only)?;
        if !read_only {
            self.link.unclean.push(Unclean::hosted(file));
        }
        self.push_sparse(line, file, parts)
    }

    /// Whether an extent is not to be changed.
    pub(crate) fn is_read_only(&self, line: &ExtentLine) -> bool {
        self.read_only || line.access != Access::Rw
    }

    pub(crate) fn push_sparse(&mut self, line: &ExtentLine, file: FileId, parts: Parts) -> Result<(), DiskError> {
        let grain = parts.grain;
        self.link.info.grain_size = Some(self.link.info.grain_size.map_or(grain, |g| g.max(grain)));
        self.so_far.tables = self.so_far.tables.saturating_add(parts.tables);
        if self.so_far.tables > MAX_TABLES {
            let what =
                format!("{}: the image and its parents have more than {MAX_TABLES} grain tables", self.name(file));
            return Err(DiskError::new(ErrorKind::Unsupported, what));
        }
        let sparse = Sparse::new(file, self.name(file), parts, self.len(file)?);
        self.push(line, Layout::Sparse(Box::new(sparse)), Some(file))
    }

    fn push(&mut self, line: &ExtentLine, layout: Layout, file: Option<FileId>) -> Result<(), DiskError> {
        let too_large = || DiskError::new(ErrorKind::Corrupt, "the extents together are larger than any disk");
        let len = line.sectors.bytes().ok_or_else(too_large)?;
        let start = self.link.info.size;
        // Offsets on the host are signed.
        self.link.info.size = start.checked_add(len).filter(|end| *end <= i64::MAX as u64).ok_or_else(too_large)?;
        let offset = if let Layout::Flat { offset, .. } = layout { offset } else { 0 };
        let file = file.map(|f| self.name(f));
        self.link.info.extents.push(ExtentInfo { kind: line.kind, access: line.access, size: len, file, offset });
        if len > 0 {
            self.link.extents.push(Extent::new(start, len, line.access, layout));
        }
        Ok(())
    }

    /// Takes what the descriptor says about the whole image. `text` are its bytes, from byte `at` of `file` on.
    fn describe(&mut self, file: FileId, at: u64, descriptor: &Descriptor, text: &[u8]) -> Result<(), DiskError> {
        let name = self.name(file);
        let unsupported = |what: String| Err(DiskError::new(ErrorKind::Unsupported, format!("{name}: {what}")));
        self.link.info.subformat = Some(descriptor.create_type.clone());
        self.link.info.content_id = descriptor.content_id;
        self.link.parent = match (descriptor.parent_content_id, descriptor.parent_file_name_hint.as_deref()) {
            (Some(content_id), Some(hint)) if !hint.is_empty() => Some(Parent { hint: hint.to_owned(), content_id }),
            (None, None | Some("")) => None,
            (Some(id), _) => {
                let what = format!("{name}: has a parent of CID {id}, but does not say where (parentFileNameHint)");
                return Err(DiskError::new(ErrorKind::Corrupt, what));
            }
            (None, Some(hint)) => {
                let what = format!("{name}: names the parent \"{hint}\", but has no parentCID");
                return Err(DiskError::new(ErrorKind::Corrupt, what));
            }
        };
        if descriptor.extents.is_empty() {
            return Err(DiskError::new(ErrorKind::Corrupt, format!("{name}: the descriptor lists no extents")));
        }
        if descriptor.change_track_path.is_some() && !self.read_only && !self.options.drop_change_tracking {
            return unsupported(format!("has change tracking, which a write would break: {DROP_TRACKING}"));
        }
        if self.options.drop_change_tracking {
            let places = change_tracking_places(text);
            let mut put = |place: usize, byte: u8| {
                self.link.first_steps.push(Step::Write { file, offset: at + place as u64, bytes: vec![byte] });
            };
            places.version.into_iter().for_each(|digit| put(digit.start, b'1'));
            places.paths.into_iter().for_each(|line| put(line, b'#'));
        }
        let places = content_id_places(text);
        let Some(cid) = places.cid else {
            self.link.info.notices.push("the descriptor has no single CID: it is not changed on writing".to_owned());
            return Ok(());
        };
        // In place, so as many digits as there are: a text that moved could be torn by a crash.
        let digits = cid.len();
        if let Some(tail) = &places.long_content_id_tail
            && !descriptor.create_type.eq_ignore_ascii_case("streamOptimized")
        {
            let number = |place: &Range<usize>| {
                let text = text.get(place.clone()).and_then(|t| str::from_utf8(t).ok());
                text.and_then(|t| u32::from_str_radix(t, 16).ok())
            };
            if number(&cid) != number(tail) {
                let text = |place: &Range<usize>| String::from_utf8_lossy(text.get(place.clone()).unwrap_or_default());
                let detail = format!("CID is {}, but longContentID ends in {}", text(&cid), text(tail));
                let offset = at + tail.start as u64;
                self.fault(FaultKind::ContentId, file, offset, detail);
                let bytes = number(&cid).map(|id| ContentId(id).to_string().into_bytes());
                self.link.content_id_step = bytes.map(|bytes| Step::Write { file, offset, bytes });
            }
        }
        if self.options.keep_content_id {
            return Ok(());
        }
        let id = ContentId(self.options.new_content_id & (u32::MAX >> (32 - 4 * digits.clamp(1, 8))));
        // Fewer digits than most CIDs have would be a poor proof of identity.
        self.link.new_content_id = (digits >= 6).then_some(id);
        let mut put = |place: Range<usize>, text: String| {
            self.link.first_steps.push(Step::Write { file, offset: at + place.start as u64, bytes: text.into_bytes() });
        };
        put(cid, format!("{:0digits$x}", id.0));
        if let Some(tail) = places.long_content_id_tail {
            put(tail, id.to_string());
        }
        Ok(())
    }

    fn fault(&mut self, kind: FaultKind, file: FileId, offset: u64, detail: String) {
        self.link.faults.push(Fault { kind, file: self.name(file), offset: Some(offset), detail });
    }

    async fn header(&self, file: FileId) -> Result<SparseHeader, DiskError> {
        let bytes = self.read(file, 0, SparseHeader::LEN as u64).await?;
        SparseHeader::decode(&bytes).map_err(|e| self.bad_header(file, "sparse extent header", e))
    }

    /// The error for a header that could not be decoded.
    pub(crate) fn bad_header(&self, file: FileId, what: &str, e: ParseError) -> DiskError {
        let kind = match e.kind {
            ParseErrorKind::UnsupportedVersion(_)
            | ParseErrorKind::UnknownFlags(_)
            | ParseErrorKind::Unsupported(_) => ErrorKind::Unsupported,
            _ => ErrorKind::Corrupt,
        };
        DiskError::new(kind, format!("{}: {what}", self.name(file))).because(e)
    }

    async fn descriptor(&self, file: FileId, at: u64, len: u64) -> Result<(Descriptor, Vec<u8>), DiskError> {
        // One byte more than there may be: a text that is too long is refused, not cut.
        let text = self.read(file, at, len.min(vmdk_parse::MAX_TEXT_BYTES + 1)).await?;
        let descriptor = Descriptor::decode(&text)
            .map_err(|e| DiskError::new(ErrorKind::Corrupt, format!("{}: descriptor", self.name(file))).because(e))?;
        Ok((descriptor, text))
    }

    /// Up to `len` bytes: fewer where the file ends.
    pub(crate) async fn read(&self, file: FileId, at: u64, len: u64) -> Result<Vec<u8>, DiskError> {
        let len = size(len.min(self.len(file)?.saturating_sub(at)));
        read_bytes(self.files, file, at, len)
            .await
            .map_err(|e| DiskError::host(format!("{}: read {len} bytes at {at}", self.name(file)), e))
    }

    /// Remembers a file that was opened.
    fn note(&mut self, file: FileId) {
        let index = size(u64::from(file.0));
        let names = &mut self.so_far.names;
        if index >= names.len() {
            names.resize(index + 1, String::new());
        }
        if let Some(name) = names.get_mut(index) {
            *name = self.files.name(file);
        }
    }

    pub(crate) fn name(&self, file: FileId) -> String {
        self.files.name(file)
    }

    pub(crate) fn len(&self, file: FileId) -> Result<u64, DiskError> {
        self.files.len(file).map_err(|e| DiskError::host(format!("{}: length", self.name(file)), e))
    }
}

/// What to do about change tracking.
pub(crate) const DROP_TRACKING: &str =
    "use --read-only, or --drop-change-tracking, after which a backup has to read everything once";

/// Byte offset of `version` in a hosted header.
const VERSION_AT: u64 = 4;

/// Byte offset of `capacity` in a hosted header.
const CAPACITY_AT: u64 = 12;

/// Whether the extent has grains and tables.
fn is_sparse(kind: ExtentKind) -> bool {
    match kind {
        ExtentKind::Sparse | ExtentKind::VmfsSparse | ExtentKind::SeSparse => true,
        ExtentKind::Flat | ExtentKind::Vmfs | ExtentKind::Zero | ExtentKind::VmfsRdm | ExtentKind::VmfsRaw => false,
    }
}

fn one_of_many(name: &str) -> DiskError {
    let text = format!("{name}: is one extent of a split image: open the .vmdk descriptor that lists it");
    DiskError::new(ErrorKind::NotAnImage, text)
}

fn flat_line() -> ExtentLine {
    ExtentLine {
        access: Access::Rw,
        sectors: vmdk_parse::Sectors(0),
        kind: ExtentKind::Flat,
        file: None,
        offset: vmdk_parse::Sectors(0),
        partition_uuid: None,
        device_id: None,
    }
}
