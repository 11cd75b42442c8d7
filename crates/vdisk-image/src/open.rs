//! Opening: what kind of image it is, which files it has, and whether all of it can be served.

use crate::cache::GrainCache;
use crate::change::{FirstChange, Unclean};
use crate::cowd;
use crate::disk::{Disk, File, size};
use crate::error::{DiskError, ErrorKind};
use crate::file_io::{FileId, Files};
use crate::flush::Step;
use crate::image::{Extent, Image, Layout};
use crate::info::{ExtentInfo, Format, Info};
use crate::probe::{self, Kind};
use crate::request::Geometry;
use crate::sparse::{Parts, Sparse};
use std::ops::Range;
use vmdk_parse::{
    Access, ContentId, Descriptor, ExtentKind, ExtentLine, ParseError, ParseErrorKind, SECTOR_SIZE, SparseHeader,
    content_id_places,
};

/// Memory for grain tables: 16 MiB of them describe 256 GiB of a disk with 64 KiB grains.
const TABLE_BYTES: usize = 16 << 20;

/// However many extents there are, each gets this much.
const TABLE_BYTES_AT_LEAST: usize = 64 << 10;

/// How to open an image.
#[derive(Clone, Debug)]
pub struct OpenOptions {
    /// Refuse every change.
    pub read_only: bool,
    /// What the image is; `None`: look at its first bytes.
    pub format: Option<Format>,
    /// Budget of the grain cache in bytes.
    pub cache_bytes: usize,
    /// Let write zeroes free space even when the request asks to keep it (`--zeroout=unmap`).
    pub zeroout_unmaps: bool,
    /// The content ID that the first change gives to a VMDK; random.
    pub new_content_id: u32,
}

impl Disk {
    /// Opens the image whose first (or only) file is `image`; other files are opened through `files`.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::NotAnImage`], [`ErrorKind::Unsupported`] or [`ErrorKind::Corrupt`] with what is wrong and what to do,
    /// or the host's when a file cannot be opened or read.
    pub async fn open<F: Files>(files: &F, image: FileId, options: &OpenOptions) -> Result<Self, DiskError> {
        let mut opening = Opening::new(files, options);
        opening.note(image);
        let head = opening.read(image, 0, probe::HEAD).await?;
        let kind = probe::probe(&opening.name(image), opening.len(image)?, &head, options.format)?;
        match kind {
            Kind::Raw => opening.raw(image)?,
            Kind::SparseExtent => opening.sparse_image(image).await?,
            Kind::CowdExtent => opening.cowd_alone(image).await?,
            Kind::Descriptor => {
                let len = opening.len(image)?;
                let (descriptor, text) = opening.descriptor(image, 0, len).await?;
                opening.described(image, 0, &descriptor, &text).await?;
            }
        }
        opening.finish()
    }
}

/// An image on its way to being open.
pub(crate) struct Opening<'a, F: Files> {
    files: &'a F,
    pub(crate) options: &'a OpenOptions,
    /// By [`FileId`].
    names: Vec<String>,
    extents: Vec<Extent>,
    pub(crate) unclean: Vec<Unclean>,
    content_id: Vec<Step>,
    /// Memory for the grain tables of each sparse extent.
    table_memory: usize,
    pub(crate) info: Info,
}

impl<'a, F: Files> Opening<'a, F> {
    fn new(files: &'a F, options: &'a OpenOptions) -> Self {
        let info = Info {
            format: Format::Vmdk,
            subformat: None,
            size: 0,
            grain_size: None,
            clean: true,
            content_id: None,
            extents: Vec::new(),
            notices: Vec::new(),
        };
        Self {
            files,
            options,
            names: Vec::new(),
            extents: Vec::new(),
            unclean: Vec::new(),
            content_id: Vec::new(),
            table_memory: TABLE_BYTES,
            info,
        }
    }

    fn raw(&mut self, file: FileId) -> Result<(), DiskError> {
        self.info.format = Format::Raw;
        let len = self.len(file)?;
        let size = len - len % SECTOR_SIZE;
        if size < len {
            self.info
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
        self.sparse(&line, file, header)
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
        let sparse = descriptor.extents.iter().filter(|line| is_sparse(line.kind)).count();
        self.table_memory = (TABLE_BYTES / sparse.max(1)).max(TABLE_BYTES_AT_LEAST);
        for (n, line) in (1..).zip(&descriptor.extents) {
            self.extent(n, line).await?;
        }
        Ok(())
    }

    async fn extent(&mut self, n: usize, line: &ExtentLine) -> Result<(), DiskError> {
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
        let writable = !self.options.read_only && line.access == Access::Rw;
        let file =
            self.files.open(name, writable).map_err(|e| DiskError::host(format!("extent {n}: open \"{name}\""), e))?;
        self.note(file);
        if line.kind == ExtentKind::SeSparse {
            return self.se_sparse(line, file).await;
        }
        if is_sparse(line.kind) {
            if self.read(file, 0, cowd::MAGIC.len() as u64).await? == cowd::MAGIC {
                return self.cowd(line, file).await;
            }
            let header = self.header(file).await?;
            return self.sparse(line, file, header);
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

    fn sparse(&mut self, line: &ExtentLine, file: FileId, header: SparseHeader) -> Result<(), DiskError> {
        let name = self.name(file);
        let read_only = self.is_read_only(line);
        if header.capacity < line.sectors {
            return Err(DiskError::new(
                ErrorKind::Corrupt,
                format!("{name}: the header says {}, but the descriptor {}", header.capacity, line.sectors),
            ));
        }
        if header.unclean_shutdown {
            self.info.clean = false;
        }
        let parts = Parts::hosted(&name, &header, line.sectors, self.len(file)?, read_only)?;
        if !read_only {
            self.unclean.push(Unclean::hosted(file));
        }
        self.push_sparse(line, file, parts)
    }

    /// Whether an extent is not to be changed.
    pub(crate) fn is_read_only(&self, line: &ExtentLine) -> bool {
        self.options.read_only || line.access != Access::Rw
    }

    pub(crate) fn push_sparse(&mut self, line: &ExtentLine, file: FileId, parts: Parts) -> Result<(), DiskError> {
        let grain = parts.grain;
        self.info.grain_size = Some(self.info.grain_size.map_or(grain, |g| g.max(grain)));
        let sparse = Sparse::new(file, self.name(file), parts, self.len(file)?, self.table_memory);
        self.push(line, Layout::Sparse(Box::new(sparse)), Some(file))
    }

    fn push(&mut self, line: &ExtentLine, layout: Layout, file: Option<FileId>) -> Result<(), DiskError> {
        let too_large = || DiskError::new(ErrorKind::Corrupt, "the extents together are larger than any disk");
        let len = line.sectors.bytes().ok_or_else(too_large)?;
        let start = self.info.size;
        // Offsets on the host are signed.
        self.info.size = start.checked_add(len).filter(|end| *end <= i64::MAX as u64).ok_or_else(too_large)?;
        let offset = if let Layout::Flat { offset, .. } = layout { offset } else { 0 };
        let file = file.map(|f| self.name(f));
        self.info.extents.push(ExtentInfo { kind: line.kind, access: line.access, size: len, file, offset });
        if len > 0 {
            self.extents.push(Extent { start, len, access: line.access, layout });
        }
        Ok(())
    }

    /// Takes what the descriptor says about the whole image. `text` are its bytes, from byte `at` of `file` on.
    fn describe(&mut self, file: FileId, at: u64, descriptor: &Descriptor, text: &[u8]) -> Result<(), DiskError> {
        let name = self.name(file);
        let unsupported = |what: String| Err(DiskError::new(ErrorKind::Unsupported, format!("{name}: {what}")));
        self.info.subformat = Some(descriptor.create_type.clone());
        self.info.content_id = descriptor.content_id;
        if descriptor.parent_content_id.is_some() || descriptor.parent_file_name_hint.is_some() {
            let parent = descriptor.parent_file_name_hint.as_deref().unwrap_or("unnamed");
            return unsupported(format!(
                "is a delta of the parent \"{parent}\": chains are not supported yet; merge them with qemu-img convert"
            ));
        }
        if descriptor.extents.is_empty() {
            return Err(DiskError::new(ErrorKind::Corrupt, format!("{name}: the descriptor lists no extents")));
        }
        if descriptor.change_track_path.is_some() && !self.options.read_only {
            return unsupported("has change tracking, which a write would break: use --read-only".to_owned());
        }
        let places = content_id_places(text);
        let Some(cid) = places.cid else {
            self.info.notices.push("the descriptor has no single CID: it is not changed on writing".to_owned());
            return Ok(());
        };
        // In place, so as many digits as there are: a text that moved could be torn by a crash.
        let digits = cid.len();
        let id = ContentId(self.options.new_content_id & (u32::MAX >> (32 - 4 * digits.clamp(1, 8))));
        let mut put = |place: Range<usize>, text: String| {
            self.content_id.push(Step::Write { file, offset: at + place.start as u64, bytes: text.into_bytes() });
        };
        put(cid, format!("{:0digits$x}", id.0));
        if let Some(tail) = places.long_content_id_tail {
            put(tail, id.to_string());
        }
        Ok(())
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
        let text = self.read(file, at, len.min(vmdk_parse::MAX_TEXT_BYTES)).await?;
        let descriptor = Descriptor::decode(&text)
            .map_err(|e| DiskError::new(ErrorKind::Corrupt, format!("{}: descriptor", self.name(file))).because(e))?;
        Ok((descriptor, text))
    }

    /// Up to `len` bytes: fewer where the file ends.
    pub(crate) async fn read(&self, file: FileId, at: u64, len: u64) -> Result<Vec<u8>, DiskError> {
        let len = size(len.min(self.len(file)?.saturating_sub(at)));
        let buf = self.files.alloc(len);
        self.files
            .read_at(file, &buf, 0..len, at)
            .await
            .map_err(|e| DiskError::host(format!("{}: read {len} bytes at {at}", self.name(file)), e))?;
        let mut bytes = vec![0; len];
        self.files.copy_out(&buf, 0, &mut bytes);
        Ok(bytes)
    }

    /// Remembers a file that was opened.
    fn note(&mut self, file: FileId) {
        let index = size(u64::from(file.0));
        if index >= self.names.len() {
            self.names.resize(index + 1, String::new());
        }
        if let Some(name) = self.names.get_mut(index) {
            *name = self.files.name(file);
        }
    }

    pub(crate) fn name(&self, file: FileId) -> String {
        self.files.name(file)
    }

    pub(crate) fn len(&self, file: FileId) -> Result<u64, DiskError> {
        self.files.len(file).map_err(|e| DiskError::host(format!("{}: length", self.name(file)), e))
    }

    fn finish(self) -> Result<Disk, DiskError> {
        if self.info.size == 0 {
            return Err(DiskError::new(ErrorKind::NotAnImage, "the disk has no sectors"));
        }
        // The grains of a COWD extent may be single sectors: nothing is won by requests as small.
        let grain = self.info.grain_size.map(|g| g.max(4096));
        let geometry = Geometry {
            size: self.info.size,
            read_only: self.options.read_only,
            preferred_block: grain.and_then(|g| u32::try_from(g).ok()).unwrap_or(4096),
        };
        let file = |name| File { name, dirty: false.into(), cannot_punch: false.into(), cannot_zero: false.into() };
        Ok(Disk {
            geometry,
            image: Image { extents: self.extents },
            files: self.names.into_iter().map(file).collect(),
            cache: GrainCache::new(self.options.cache_bytes, grain.unwrap_or(u64::MAX)),
            first_change: FirstChange::new(self.content_id, self.unclean),
            zeroout_unmaps: self.options.zeroout_unmaps,
            rounds: Default::default(),
            loading: Default::default(),
            info: self.info,
        })
    }
}

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
