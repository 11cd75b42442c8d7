//! Opening an image on the host's files.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use vdisk_image::{Disk, DiskError, ErrorKind, Fault, FileId, FileIo, Flags, Geometry, Info, Op, OpenOptions, Request};
use vdisk_io::{BlockingIo, FileSet, HostFiles, OpenMode, block_on};

use crate::failure::{Failure, Result, chain};
use crate::identity::Identity;
use crate::location::Location;
use crate::options::{DirectIo, FormatChoice, ImageOptions, LookOptions, Zeroout};
use crate::overlay::{self, Overlay};
use crate::resume;
use crate::state::{State, StateDir};

/// How long the last I/O of a server that was killed may take.
const LAST_IO: Duration = Duration::from_secs(30);

/// An image that is open and locked.
pub(crate) struct Opened {
    pub(crate) files: Arc<FileSet>,
    pub(crate) disk: Arc<Disk>,
    /// The file of the ledger, if one is kept.
    pub(crate) ledger: Option<PathBuf>,
}

impl Opened {
    /// Opens an image as the options say.
    pub(crate) fn open(options: &ImageOptions, direct: DirectIo) -> Result<Self, OpenFailure> {
        let mode = OpenMode {
            writable: !options.read_only,
            trust_paths: options.trust_paths,
            direct_io: direct != DirectIo::Off,
            ..OpenMode::default()
        };
        let disk_options = OpenOptions {
            read_only: options.read_only,
            format: options.format.wanted(),
            cache_bytes: options.cache_size,
            zeroout_unmaps: options.zeroout == Zeroout::Unmap,
            ignore_parent_content_id: options.ignore_parent_cid,
            examine: false,
            drop_change_tracking: options.drop_change_tracking,
            keep_content_id: false,
            new_content_id: random(),
        };
        let image = Location::of(&options.image);
        let opened = match &options.overlay {
            None => Self::open_with(&image, mode, &disk_options)?,
            Some(Overlay::File(overlay)) => {
                if let (Ok(one), Ok(other)) = (fs::canonicalize(overlay), image.real_path())
                    && one == other
                {
                    return Err(OpenFailure::plain(Failure::new("is the overlay itself: name another file for it")));
                }
                if !overlay.exists() {
                    let info = Self::base_info(&image, mode, &disk_options)?;
                    overlay::make_file(overlay, &image, &info, random()).map_err(OpenFailure::plain)?;
                }
                let name = overlay::hint(overlay, &image).map_err(|e| OpenFailure::host(image.path(), e))?;
                // The line names the image at its beginning, and this is about another file.
                let files = HostFiles::open(overlay, mode).map_err(|e| OpenFailure::host(Path::new(""), e))?;
                Self::open_over(files, &image, &name, &disk_options)?
            }
            Some(Overlay::Temporary) => {
                let info = Self::base_info(&image, mode, &disk_options)?;
                let (file, name) = overlay::make_temporary(&info, random()).map_err(OpenFailure::plain)?;
                let files = HostFiles::of_unnamed(file, &name, mode).map_err(|e| OpenFailure::host(&name, e))?;
                Self::open_over(files, &image, overlay::TEMPORARY_BASE, &disk_options)?
            }
        };
        let refused = opened.files.iter().find(|(_, file)| file.direct_fd().is_none());
        match refused.filter(|_| direct == DirectIo::On) {
            Some((_, file)) => {
                let plain = Failure::new(format!("no direct I/O on {}", file.path().display()));
                Err(OpenFailure { plain, busy: false, hint: Some("use --direct-io auto") })
            }
            None => Ok(opened),
        }
    }

    /// Opens an image that a server which was killed may have locked until its last I/O is over: `is_dying` says whether, and may take
    /// its time.
    pub(crate) fn open_after(
        options: &ImageOptions,
        direct: DirectIo,
        is_dying: impl Fn() -> bool,
    ) -> Result<Self, OpenFailure> {
        let deadline = Instant::now() + LAST_IO;
        loop {
            match Self::open(options, direct) {
                Err(failure) if failure.busy && Instant::now() < deadline && is_dying() => {
                    thread::sleep(Duration::from_millis(50));
                }
                opened => return opened,
            }
        }
    }

    /// Opens an image to say what it is, and passes its notices on. To `examine` is to go on without a parent that is not there.
    pub(crate) fn open_to_look(options: &LookOptions, examine: bool) -> Result<Self, OpenFailure> {
        // Unlocked: also of an image that is attached.
        let mode =
            OpenMode { writable: false, trust_paths: options.trust_paths, unlocked: true, ..OpenMode::default() };
        let opened = Self::look(options, mode, examine)??;
        // Of a server that lives, nothing is left.
        let changed = options.overlay.as_ref().unwrap_or(&options.image);
        let is_free = Location::of(changed).open(OpenMode { unlocked: false, ..mode }).is_ok();
        let left = opened.left_behind().filter(|_| is_free);
        for notice in opened.disk.info().notices.iter().chain(&left) {
            crate::notice(notice);
        }
        Ok(opened)
    }

    /// Opens an image to check it, or says what is so wrong that it cannot be.
    pub(crate) fn open_to_check(options: &LookOptions) -> Result<Result<Self, Fault>, OpenFailure> {
        let mode = OpenMode { writable: false, trust_paths: options.trust_paths, ..OpenMode::default() };
        match Self::look(options, mode, true)? {
            Ok(opened) => {
                opened.left_behind().iter().for_each(|notice| crate::notice(notice));
                Ok(Ok(opened))
            }
            Err(Unopened(e, path)) if e.kind() == ErrorKind::Corrupt => {
                Ok(Err(Fault::unreadable(&path.display().to_string(), &e)))
            }
            Err(unopened) => Err(unopened.into()),
        }
    }

    /// Opens and locks an image to be repaired, while nobody else has it open and nothing waits to be recovered. An error of the image
    /// itself is the inner one.
    pub(crate) fn open_to_repair(options: &LookOptions) -> Result<Result<Self, DiskError>> {
        let how = OpenOptions { read_only: false, new_content_id: random(), ..to_read(options.format, true) };
        match Self::open_alone(options, &how)? {
            Err(Unopened(e, _)) if matches!(e.kind(), ErrorKind::Corrupt | ErrorKind::Unsupported) => Ok(Err(e)),
            opened => Ok(Ok(opened.map_err(OpenFailure::from)?)),
        }
    }

    /// As [`Opened::open_to_repair`], to be compacted: its content is not going to change.
    pub(crate) fn open_to_compact(options: &LookOptions) -> Result<Self> {
        let how = OpenOptions { read_only: false, keep_content_id: true, ..to_read(options.format, false) };
        let how = OpenOptions { ignore_parent_content_id: false, ..how };
        Ok(Self::open_alone(options, &how)?.map_err(OpenFailure::from)?)
    }

    fn open_alone(options: &LookOptions, how: &OpenOptions) -> Result<Result<Self, Unopened>> {
        let mode = OpenMode { writable: true, trust_paths: options.trust_paths, ..OpenMode::default() };
        let changed = options.overlay.as_ref().unwrap_or(&options.image);
        let real = fs::canonicalize(changed).unwrap_or_else(|_| changed.clone());
        let opened = Self::look_as(options, mode, how).map_err(|failure| {
            let hint = match failure.hint {
                _ if failure.busy => Some("end the other process first"),
                // These verbs have no such option.
                Some("use --read-only") => None,
                hint => hint,
            };
            OpenFailure { hint, ..failure }.naming(
                &StateDir::host().list().unwrap_or_default(),
                &Identity::at(&real),
                "",
            )
        })?;
        let image = opened.as_ref().map_or_else(|_| Identity::at(&real), |opened| Identity::of(&real, opened));
        resume::refuse_waiting(&image)?;
        if let Ok(opened) = &opened {
            opened.check_recovered()?;
        }
        Ok(opened)
    }

    fn look(options: &LookOptions, mode: OpenMode, examine: bool) -> Result<Result<Self, Unopened>, OpenFailure> {
        Self::look_as(options, mode, &to_read(options.format, examine))
    }

    fn look_as(
        options: &LookOptions,
        mode: OpenMode,
        how: &OpenOptions,
    ) -> Result<Result<Self, Unopened>, OpenFailure> {
        let image = Location::of(&options.image);
        let Some(overlay) = &options.overlay else {
            let (files, id) = image.open(mode).map_err(|e| OpenFailure::host(image.path(), e))?;
            let disk = block_on(Disk::open(&files, id, how));
            return Ok(Self::of(files, disk).map_err(|e| Unopened(e, options.image.clone())));
        };
        let name = overlay::hint(overlay, &image).map_err(|e| OpenFailure::host(image.path(), e))?;
        let (files, id) = HostFiles::open(overlay, mode).map_err(|e| OpenFailure::host(Path::new(""), e))?;
        let base = image.open_as_base(&files).map_err(|e| OpenFailure::host(image.path(), e))?;
        let disk = block_on(Disk::open_overlay(&files, id, base, &name, how));
        Ok(Self::of(files, disk).map_err(|e| Unopened(e, overlay.clone())))
    }

    /// The files of the image and of all below it, by device and inode. Block devices have no such name.
    pub(crate) fn all_files(&self) -> Vec<(u64, u64)> {
        self.files.iter().filter_map(|(_, file)| file.dev_and_ino()).collect()
    }

    /// Those that changes go to.
    pub(crate) fn written_files(&self) -> Vec<(u64, u64)> {
        self.files.iter().filter(|(_, file)| file.is_writable()).filter_map(|(_, file)| file.dev_and_ino()).collect()
    }

    /// The one that is named to open it.
    pub(crate) fn first_file(&self) -> Option<(u64, u64)> {
        self.files.iter().find(|(id, _)| *id == FileId(0)).and_then(|(_, file)| file.dev_and_ino())
    }

    fn of(files: HostFiles, disk: Result<Disk, DiskError>) -> Result<Self, DiskError> {
        Ok(Self { disk: Arc::new(disk?), files: files.into_set(), ledger: None })
    }

    pub(crate) fn open_with(image: &Location, mode: OpenMode, options: &OpenOptions) -> Result<Self, OpenFailure> {
        let (files, id) = image.open(mode).map_err(|e| OpenFailure::host(image.path(), e))?;
        let disk = block_on(Disk::open(&files, id, options));
        Self::of(files, disk).map_err(|e| OpenFailure::disk(image.path(), &e))
    }

    /// Opens an image that is only read under an overlay that is open.
    fn open_over(
        (files, overlay): (HostFiles, FileId),
        image: &Location,
        name: &str,
        options: &OpenOptions,
    ) -> Result<Self, OpenFailure> {
        let base = image.open_as_base(&files).map_err(|e| OpenFailure::host(image.path(), e))?;
        let disk = block_on(Disk::open_overlay(&files, overlay, base, name, options));
        Self::of(files, disk).map_err(|e| OpenFailure::disk(image.path(), &e))
    }

    /// What a new overlay has to know of its base.
    fn base_info(image: &Location, mode: OpenMode, options: &OpenOptions) -> Result<Info, OpenFailure> {
        let mode = OpenMode { writable: false, ..mode };
        let options = OpenOptions { read_only: true, cache_bytes: 0, ..options.clone() };
        Ok(Self::open_with(image, mode, &options)?.disk.info().clone())
    }

    /// From here on all I/O goes through the page cache. Nothing may serve the image yet.
    pub(crate) fn forget_direct(&mut self) {
        if let Some(files) = Arc::get_mut(&mut self.files) {
            files.forget_direct();
        }
    }

    pub(crate) fn geometry(&self) -> Geometry {
        self.disk.geometry()
    }

    /// Flushes only, for requests may still be under way: the image is not called clean.
    pub(crate) fn flush(&self) -> Result<()> {
        let io = BlockingIo::new(Arc::clone(&self.files));
        let flush = Request::check(&self.disk.geometry(), Op::Flush, 0, 0, Flags::default());
        let flushed = flush.and_then(|flush| block_on(self.disk.serve(&io, flush, &io.alloc(512))));
        flushed.map_err(|e| Failure::doing("flush", &e))
    }

    /// Flushes, and marks the image clean. Nobody may use the disk any more.
    pub(crate) fn close(&self) -> Result<()> {
        let io = BlockingIo::new(Arc::clone(&self.files));
        block_on(self.disk.close(&io)).map_err(|e| Failure::doing("the image could not be closed", &e))?;
        self.forget_ledger();
        Ok(())
    }
}

/// Where the image really is that changes go to: what the books call it.
pub(crate) fn real_path(options: &ImageOptions) -> Result<PathBuf> {
    let image = Location::of(&options.image);
    let real = image.real_path().map_err(|e| OpenFailure::host(image.path(), e).hinted())?;
    let Some(Overlay::File(overlay)) = &options.overlay else { return Ok(real) };
    // It may have to be made first.
    let real = fs::canonicalize(overlay).or_else(|_| {
        let above = overlay.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        Ok(fs::canonicalize(above)?.join(overlay.file_name().unwrap_or_default()))
    });
    real.map_err(|e| OpenFailure::host(overlay, e).hinted())
}

/// Why a file is no image that can be served.
struct Unopened(DiskError, PathBuf);

impl From<Unopened> for OpenFailure {
    fn from(Unopened(e, path): Unopened) -> Self {
        Self::disk(&path, &e)
    }
}

/// An image that is not served: what is there is shown, whether the parents fit or not.
fn to_read(format: FormatChoice, examine: bool) -> OpenOptions {
    OpenOptions {
        read_only: true,
        format: format.wanted(),
        cache_bytes: 0,
        zeroout_unmaps: false,
        ignore_parent_content_id: true,
        examine,
        drop_change_tracking: false,
        keep_content_id: false,
        new_content_id: 0,
    }
}

fn random() -> u32 {
    let mut bytes = [0; 4];
    match rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty()) {
        // All ones say that there is none.
        Ok(_) => u32::from_ne_bytes(bytes).min(u32::MAX - 1),
        // It is to differ from other images' only.
        Err(_) => std::process::id(),
    }
}

/// Why an image was not opened.
#[derive(Debug)]
pub(crate) struct OpenFailure {
    pub(crate) plain: Failure,
    /// Somebody else has it open.
    pub(crate) busy: bool,
    hint: Option<&'static str>,
}

impl OpenFailure {
    fn host(path: &Path, e: io::Error) -> Self {
        let text = chain(&e);
        Self::new(path, &text, DiskError::host("", e).kind())
    }

    fn plain(failure: Failure) -> Self {
        Self { plain: failure, busy: false, hint: None }
    }

    fn disk(path: &Path, e: &DiskError) -> Self {
        Self::new(path, &chain(e), e.kind())
    }

    fn new(path: &Path, text: &str, kind: ErrorKind) -> Self {
        // The line names the image at its beginning already.
        let name = path.display().to_string();
        let rest = text.strip_prefix(&name).and_then(|rest| rest.strip_prefix(": ").or(rest.strip_prefix(' ')));
        let text = rest.unwrap_or(text);
        Self { plain: Failure::new(text), busy: kind == ErrorKind::Busy, hint: hint(kind, text) }
    }

    /// With what to do about it: if a device holds the image, that it is to be detached `or` what else.
    pub(crate) fn naming(self, states: &[State], image: &Identity, or: &str) -> Failure {
        match states.iter().find(|s| self.busy && image.is_of(s) && s.is_live()) {
            Some(State { device, pid, .. }) => {
                let device = device.display();
                self.plain.hint(format_args!("attached as {device} by pid {pid}: vdisk detach it first{or}"))
            }
            None => self.hinted(),
        }
    }

    /// With what to do about it.
    pub(crate) fn hinted(self) -> Failure {
        match self.hint {
            Some(hint) => self.plain.hint(hint),
            None => self.plain,
        }
    }
}

impl From<OpenFailure> for Failure {
    fn from(failure: OpenFailure) -> Self {
        failure.hinted()
    }
}

fn hint(kind: ErrorKind, text: &str) -> Option<&'static str> {
    // What says itself what to do.
    if text.contains("--") || text.contains("convert") {
        return None;
    }
    match kind {
        ErrorKind::NotAnImage => Some("vdisk serves VMDK and raw images; qemu-img convert makes one of others"),
        ErrorKind::Unsupported => None,
        ErrorKind::Corrupt => Some("restore it from a copy"),
        ErrorKind::NotFound => Some("check the name, and that every file of the image is in its directory"),
        ErrorKind::PermissionDenied => Some("run vdisk as a user who may; attach and serve need less with --read-only"),
        ErrorKind::Busy => Some("end the other process, or open both with --read-only"),
        ErrorKind::ReadOnly => Some("use --read-only"),
        ErrorKind::NoSpace => Some("make room on the file system"),
        ErrorKind::HostIo if text.ends_with("is a directory") => Some("name the image file in it"),
        ErrorKind::HostIo | ErrorKind::OutOfRange | ErrorKind::InvalidRequest | ErrorKind::Poisoned => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(path: &str, e: io::Error) -> String {
        OpenFailure::host(Path::new(path), e).hinted().to_string()
    }

    #[test]
    fn the_images_own_name_is_not_repeated() {
        let e = io::Error::new(io::ErrorKind::NotFound, "d.vmdk: No such file or directory (os error 2)");
        assert!(text("d.vmdk", e).starts_with("No such file or directory (check the name"));
        let e = io::Error::new(io::ErrorKind::InvalidInput, "dir is a directory");
        assert_eq!(text("dir", e), "is a directory (name the image file in it)");
    }

    #[test]
    fn another_files_name_stays() {
        let e = io::Error::new(io::ErrorKind::NotFound, "\"d-s002.vmdk\": No such file or directory");
        assert!(text("d.vmdk", e).starts_with("\"d-s002.vmdk\": No such file"));
    }

    #[test]
    fn what_says_itself_what_to_do_gets_no_second_hint() {
        let e = io::Error::new(io::ErrorKind::PermissionDenied, "\"../x\" leaves the directory; --trust-paths follows");
        assert_eq!(text("d.vmdk", e), "\"../x\" leaves the directory; --trust-paths follows");
    }
}
