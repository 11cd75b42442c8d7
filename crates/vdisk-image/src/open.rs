//! Opening an image: what kind it is, and the chain of its parents.

use crate::cache::GrainCache;
use crate::change::FirstChange;
use crate::check::{Fault, FaultKind};
use crate::disk::{Disk, File};
use crate::error::{DiskError, ErrorKind};
use crate::file_io::{FileId, Files};
use crate::image::{Chain, Image};
use crate::info::Format;
use crate::link::{Link, Opening, SoFar};
use vmdk_parse::ContentId;

/// Links of a chain at most: a chain that goes round in a circle ends somewhere.
const MAX_LINKS: usize = 64;

/// Memory for the grain tables and directories of a disk: 24 MiB describe 256 GiB of one with 64 KiB grains.
const TABLE_BYTES: usize = 24 << 20;

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
    /// Attach a chain, read-only, although a parent has another content ID than its child expects.
    pub ignore_parent_content_id: bool,
    /// The image is only to be examined, by [`Disk::info`] and [`Disk::check`]: a parent that is not as it should be is a fault
    /// and a notice.
    pub examine: bool,
    /// Write to an image with change tracking (version 3, changeTrackPath), which the first change takes out of it: what was
    /// tracked would be wrong.
    pub drop_change_tracking: bool,
    /// Leave the content ID as it is: nothing of the content is going to change ([`Disk::compact`]).
    pub keep_content_id: bool,
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
        Self::open_chain(files, image, None, options).await
    }

    /// Opens a child VMDK over a base that is given, instead of the parent that the child names. The base may be any image, and
    /// is only read; `options.format` is about it. Both files are open already. A base without a content ID has
    /// [`NO_CONTENT_ID`] in its overlays.
    ///
    /// # Errors
    ///
    /// As of [`Disk::open`]; [`ErrorKind::Corrupt`] if the child is one of another image, [`ErrorKind::InvalidRequest`] if it says so: the last part of its
    /// parentFileNameHint has to be that of `name`.
    pub async fn open_overlay<F: Files>(
        files: &F,
        overlay: FileId,
        base: FileId,
        name: &str,
        options: &OpenOptions,
    ) -> Result<Self, DiskError> {
        Self::open_chain(files, overlay, Some((base, name)), options).await
    }

    async fn open_chain<F: Files>(
        files: &F,
        image: FileId,
        base: Option<(FileId, &str)>,
        options: &OpenOptions,
    ) -> Result<Self, DiskError> {
        let mut so_far = SoFar::default();
        let format = if base.is_some() { Some(Format::Vmdk) } else { options.format };
        let mut top = Opening::new(files, options, options.read_only, &mut so_far).link(image, format).await?;
        let (mut parents, mut child) = (Vec::new(), image);
        let mut expected = top.parent.take();
        if base.is_some() && expected.is_none() {
            let what = format!("{}: is not an overlay: it has no parent", files.name(image));
            return Err(DiskError::new(ErrorKind::InvalidRequest, what));
        }
        while let Some(parent) = expected {
            if parents.len() + 1 == MAX_LINKS {
                let what = format!("{}: the chain of parents has more than {MAX_LINKS} links", files.name(image));
                return Err(DiskError::new(ErrorKind::Unsupported, what));
            }
            let given = base.filter(|_| parents.is_empty());
            let opened = parent.open(files, options, child, given, &mut so_far).await;
            let (file, mut link) = match opened.map_err(|e| parent.explain(e)) {
                Err(e) if options.examine => {
                    let fault = Fault::unreadable(&files.name(child), &e);
                    top.info.notices.push(format!("{}: without its parent: {}", fault.file, fault.detail));
                    if !parent.has_to_be_given() {
                        top.faults.push(Fault { kind: FaultKind::Parent, ..fault });
                    }
                    break;
                }
                opened => opened?,
            };
            if given.is_some() && link.info.size != top.info.size {
                let (overlay, base) = (files.name(image), files.name(file));
                let what = format!("{overlay}: has {} bytes, but {base} has {}", top.info.size, link.info.size);
                return Err(DiskError::new(ErrorKind::Corrupt, what));
            }
            let found = link.info.content_id.filter(|id| *id != ContentId::NO_PARENT);
            let found = found.or(given.is_some().then_some(NO_CONTENT_ID));
            if let Some(notice) = parent.check(files, options, child, file, found)? {
                let file = files.name(child);
                top.faults.push(Fault { kind: FaultKind::Parent, file, offset: None, detail: notice.clone() });
                top.info.notices.push(notice);
            }
            top.faults.append(&mut link.faults);
            top.info.parents.push(files.name(file));
            top.info.notices.append(&mut link.info.notices);
            top.info.grain_size = top.info.grain_size.max(link.info.grain_size);
            expected = link.parent.take();
            parents.push(link.image());
            child = file;
        }
        Ok(top.finish(options, parents, so_far.names))
    }
}

/// The parent as a child describes it.
#[derive(Debug)]
pub(crate) struct Parent {
    pub(crate) hint: String,
    pub(crate) content_id: ContentId,
}

/// What overlays call the content ID of a base that has none: raw images, extents by themselves.
pub const NO_CONTENT_ID: ContentId = ContentId(1);

impl Parent {
    /// Opens the parent of `child`, or the base that is `given` in its place with its name.
    async fn open<F: Files>(
        &self,
        files: &F,
        options: &OpenOptions,
        child: FileId,
        given: Option<(FileId, &str)>,
        so_far: &mut SoFar,
    ) -> Result<(FileId, Link), DiskError> {
        let file = match given {
            Some((base, name)) => {
                self.check_name(&files.name(child), name)?;
                base
            }
            None => files
                .open_parent(child, &self.hint)
                .map_err(|e| DiskError::host(format!("{}: open its parent \"{}\"", files.name(child), self.hint), e))?,
        };
        // A parent that an image names is never probed: a raw disk could look like anything.
        let format = if given.is_some() { options.format } else { Some(Format::Vmdk) };
        Ok((file, Opening::new(files, options, true, so_far).link(file, format).await?))
    }

    /// Whether it is no VMDK that lies somewhere: an overlay of it is not wrong for that.
    fn has_to_be_given(&self) -> bool {
        self.content_id == NO_CONTENT_ID || self.hint.to_ascii_lowercase().contains(".ova")
    }

    /// What to do about a parent that is no VMDK, which is opened only by whom it is given.
    fn explain(&self, e: DiskError) -> DiskError {
        if !self.has_to_be_given() {
            return e;
        }
        let what =
            "the base of an overlay that is a raw image or in an archive has to be named: --overlay OVERLAY BASE";
        DiskError::new(e.kind(), what).because(e)
    }

    /// Whether an overlay is one of the image of this name.
    fn check_name(&self, overlay: &str, name: &str) -> Result<(), DiskError> {
        let last = |path: &str| path.rsplit(['/', '\\']).next().map(str::to_owned);
        if last(&self.hint) == last(name) {
            return Ok(());
        }
        let what = format!("{overlay}: is an overlay of \"{}\", and not of \"{name}\"", self.hint);
        Err(DiskError::new(ErrorKind::InvalidRequest, what))
    }

    /// Whether the parent is as it was when the child was made. Answers with what the user should know if that is not asked for.
    fn check<F: Files>(
        &self,
        files: &F,
        options: &OpenOptions,
        child: FileId,
        file: FileId,
        found: Option<ContentId>,
    ) -> Result<Option<String>, DiskError> {
        if found == Some(self.content_id) {
            return Ok(None);
        }
        let found = found.map_or_else(|| "none".to_owned(), |id| id.to_string());
        let what = format!(
            "{}: its parent {} has CID {found}, and not {}: it was changed after the child was made",
            files.name(child),
            files.name(file),
            self.content_id
        );
        match options.examine || options.ignore_parent_content_id && options.read_only {
            true => Ok(Some(what)),
            false => Err(DiskError::new(
                ErrorKind::Corrupt,
                format!("{what}; --read-only with --ignore-parent-cid attaches it all the same"),
            )),
        }
    }
}

impl Link {
    fn image(self) -> Image {
        Image { extents: self.extents }
    }

    /// The disk that has this link on top.
    fn finish(self, options: &OpenOptions, parents: Vec<Image>, names: Vec<String>) -> Disk {
        // The grains of a COWD extent may be single sectors: nothing is won by requests as small.
        let grain = self.info.grain_size.map(|g| g.max(4096));
        let file = |name| File { name, dirty: false.into(), cannot_punch: false.into(), cannot_zero: false.into() };
        let mut chain = Chain { top: Image { extents: self.extents }, parents };
        chain.share_memory(TABLE_BYTES);
        Disk {
            read_only: options.read_only,
            preferred_block: grain.and_then(|g| u32::try_from(g).ok()).unwrap_or(4096),
            end: self.end,
            chain,
            files: names.into_iter().map(file).collect(),
            cache: GrainCache::new(options.cache_bytes, grain.unwrap_or(u64::MAX)),
            first_change: FirstChange::new(self.first_steps, self.unclean),
            zeroout_unmaps: options.zeroout_unmaps,
            rounds: Default::default(),
            grace: Default::default(),
            loading: Default::default(),
            inflating: Default::default(),
            slots: Default::default(),
            ledger: None,
            new_content_id: self.new_content_id,
            info: self.info,
            faults: self.faults,
            content_id_step: self.content_id_step,
        }
    }
}
