//! The files of an image: first opened one after the other, then a set that threads share.

use std::cell::RefCell;
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, RawFd};
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;

use vdisk_image::{FileId, FileIo, Files, Stored};

use crate::archive::Archive;
use crate::buf::Buf;
use crate::gate::{Gate, base_name};
use crate::host_file::HostFile;
use crate::locks;

/// How to open an image.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OpenMode {
    /// For writing. Files that the image names may still be opened read-only (parents).
    pub writable: bool,
    /// Follow whatever names the image has inside: out of its directory, through symbolic links, to block devices.
    pub trust_paths: bool,
    /// Go around the page cache where memory, offset and length are aligned for it.
    pub direct_io: bool,
    /// Take no locks, and do not mind those of others: for a look at an image that somebody is writing. Read-only.
    pub unlocked: bool,
}

/// The opening stage: the image's own file and those that it names, so far. I/O blocks; futures are ready at once.
#[derive(Debug)]
pub struct HostFiles {
    mode: OpenMode,
    files: RefCell<Vec<(HostFile, Rc<Names>)>>,
}

/// Where to look for the files that a file names: beside it.
#[derive(Debug)]
enum Names {
    Directory(Gate),
    Archive(Archive),
}

impl HostFiles {
    /// Opens and locks the image's own file: a regular file or a block device, whatever way the path takes.
    ///
    /// # Errors
    ///
    /// The host's; [`io::ErrorKind::InvalidInput`] for another kind of file, [`io::ErrorKind::ResourceBusy`] if
    /// another process (or a product of VMware's) uses it in a way that excludes ours.
    pub fn open(path: &Path, mode: OpenMode) -> io::Result<(Self, FileId)> {
        let (gate, file) = Gate::open_image(path, mode.writable, mode.trust_paths)?;
        let files = Self { mode, files: RefCell::default() };
        let file = HostFile::new(file, path.to_owned(), mode.writable, mode.direct_io)?;
        let id = files.add_locked(file, Names::Directory(gate).into())?;
        Ok((files, id))
    }

    /// Opens an image inside a tar archive (a regular file or a block device), and locks the archive as a whole. The image
    /// is the member of that name (a leading "./" does not matter), or the only one whose name ends in ".vmdk".
    ///
    /// Names that the image mentions are those of members beside it, never of files of the host. There is no direct I/O.
    ///
    /// # Errors
    ///
    /// As of [`HostFiles::open`]; [`io::ErrorKind::ReadOnlyFilesystem`] for `mode.writable`,
    /// [`io::ErrorKind::InvalidData`] for what is no tar archive, compressed, damaged or cut short,
    /// [`io::ErrorKind::NotFound`] if there is no such member, [`io::ErrorKind::InvalidInput`] if there are several
    /// images to choose from, or the member is not stored as plain bytes (a link, a directory, sparse).
    pub fn open_member(archive: &Path, member: Option<&str>, mode: OpenMode) -> io::Result<(Self, FileId)> {
        let (archive, image) = Archive::open(archive, member, mode)?;
        let files = Self { mode, files: RefCell::default() };
        let id = files.add(image, Names::Archive(archive).into())?;
        Ok((files, id))
    }

    /// Takes over a file that nobody else can open, for an image that is to go away with it. `name` is what messages call it.
    ///
    /// # Errors
    ///
    /// The host's.
    pub fn of_unnamed(file: std::fs::File, name: &Path, mode: OpenMode) -> io::Result<(Self, FileId)> {
        let files = Self { mode, files: RefCell::default() };
        let file = HostFile::new(file, name.to_owned(), true, mode.direct_io)?;
        let id = files.add(file, Names::Directory(Gate::closed()).into())?;
        Ok((files, id))
    }

    /// Opens and locks another image beside the first, to be read: the base of an overlay.
    ///
    /// # Errors
    ///
    /// As of [`HostFiles::open`]; [`io::ErrorKind::InvalidInput`] if it is the first image itself.
    pub fn open_base(&self, path: &Path) -> io::Result<FileId> {
        let (gate, file) = Gate::open_image(path, false, self.mode.trust_paths)?;
        let file = HostFile::new(file, path.to_owned(), false, self.mode.direct_io)?;
        self.add_locked(file, Names::Directory(gate).into())
    }

    /// As [`HostFiles::open_base`], for an image inside a tar archive: see [`HostFiles::open_member`].
    ///
    /// # Errors
    ///
    /// As of [`HostFiles::open_member`].
    pub fn open_base_member(&self, archive: &Path, member: Option<&str>) -> io::Result<FileId> {
        let (archive, image) = Archive::open(archive, member, OpenMode { writable: false, ..self.mode })?;
        self.add(image, Names::Archive(archive).into())
    }

    /// Ends the opening stage.
    pub fn into_set(self) -> Arc<FileSet> {
        Arc::new(FileSet { files: self.files.into_inner().into_iter().map(|(file, _)| file).collect() })
    }

    /// Locks the file and takes it in.
    fn add_locked(&self, file: HostFile, names: Rc<Names>) -> io::Result<FileId> {
        let files = self.files.borrow();
        if let Some((twin, _)) = files.iter().find(|(f, _)| f.identity() == file.identity())
            && (twin.is_writable() || file.is_writable())
        {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("{} and {} are the same file", twin.path().display(), file.path().display()),
            ));
        }
        if self.mode.writable || !self.mode.unlocked {
            locks::lock(&file, self.mode.writable)?;
        }
        drop(files);
        self.add(file, names)
    }

    fn add(&self, file: HostFile, names: Rc<Names>) -> io::Result<FileId> {
        let mut files = self.files.borrow_mut();
        let id = u32::try_from(files.len()).map_err(|_| io::Error::from(io::ErrorKind::QuotaExceeded))?;
        files.push((file, names));
        Ok(FileId(id))
    }

    fn with<T>(&self, file: FileId, f: impl FnOnce(&HostFile) -> io::Result<T>) -> io::Result<T> {
        f(&find(&self.files.borrow(), file)?.0)
    }

    fn names_beside(&self, file: FileId) -> io::Result<Rc<Names>> {
        Ok(Rc::clone(&find(&self.files.borrow(), file)?.1))
    }
}

impl Files for HostFiles {
    fn open(&self, by: FileId, name: &str, writable: bool) -> io::Result<FileId> {
        if writable && !self.mode.writable {
            return Err(io::Error::new(
                io::ErrorKind::PermissionDenied,
                format!("{name:?}: for writing, in an image that is open read-only"),
            ));
        }
        let names = self.names_beside(by)?;
        match &*names {
            Names::Directory(gate) => {
                let (file, path) = gate.open_named(name, writable)?;
                let file = HostFile::new(file, path, writable, self.mode.direct_io)?;
                self.add_locked(file, names)
            }
            // Its lock is on the archive already.
            Names::Archive(archive) => {
                let file = archive.open_named(name)?;
                self.add(file, names)
            }
        }
    }

    fn open_parent(&self, by: FileId, hint: &str) -> io::Result<FileId> {
        let names = self.names_beside(by)?;
        let (file, parents_names) = match &*names {
            Names::Directory(gate) => {
                let (gate, file, path) = gate.open_parent(hint)?;
                (HostFile::new(file, path, false, self.mode.direct_io)?, Rc::new(Names::Directory(gate)))
            }
            Names::Archive(archive) => (archive.open_named(base_name(hint))?, Rc::clone(&names)),
        };
        // A parent is a file of its own: else the chain goes round in a circle, or an extent is taken for a parent.
        if let Some((twin, _)) = self.files.borrow().iter().find(|(f, _)| f.identity() == file.identity()) {
            let what = format!("{hint:?} is {}, which is in the chain already", twin.path().display());
            return Err(io::Error::new(io::ErrorKind::InvalidInput, what));
        }
        match *names {
            Names::Directory(_) => self.add_locked(file, parents_names),
            Names::Archive(_) => self.add(file, parents_names),
        }
    }

    fn len(&self, file: FileId) -> io::Result<u64> {
        self.with(file, HostFile::len)
    }

    fn name(&self, file: FileId) -> String {
        self.with(file, |f| Ok(f.path().display().to_string())).unwrap_or_else(|e| e.to_string())
    }
}

impl FileIo for HostFiles {
    type Buf = Buf;

    buf_methods!();

    async fn read_at(&self, file: FileId, buf: &Buf, part: Range<usize>, offset: u64) -> io::Result<()> {
        self.with(file, |f| f.read_exact_at(buf, part, offset))
    }

    async fn write_at(&self, file: FileId, buf: &Buf, part: Range<usize>, offset: u64) -> io::Result<()> {
        self.with(file, |f| f.write_all_at(buf, part, offset))
    }

    async fn sync_data(&self, file: FileId) -> io::Result<()> {
        self.with(file, HostFile::sync_data)
    }

    async fn punch_hole(&self, file: FileId, offset: u64, len: u64) -> io::Result<()> {
        self.with(file, |f| f.punch_hole(offset, len))
    }

    async fn zero_range(&self, file: FileId, offset: u64, len: u64) -> io::Result<()> {
        self.with(file, |f| f.zero_range(offset, len))
    }

    async fn reserve(&self, file: FileId, offset: u64, len: u64) -> io::Result<()> {
        self.with(file, |f| f.reserve(offset, len))
    }

    async fn reserve_fresh(&self, file: FileId, offset: u64, len: u64) -> io::Result<()> {
        self.with(file, |f| f.reserve_fresh(offset, len))
    }

    async fn stored_at(&self, file: FileId, offset: u64) -> io::Result<Stored> {
        self.with(file, |f| Ok(f.stored_at(offset)))
    }

    async fn set_len(&self, file: FileId, len: u64) -> io::Result<()> {
        self.with(file, |f| f.set_len(len))
    }
}

/// The open files of an image, shared by the threads that serve it. Dropping the last handle closes them, which also
/// gives up the locks.
#[derive(Debug)]
pub struct FileSet {
    files: Vec<HostFile>,
}

impl FileSet {
    /// A file of the set.
    ///
    /// # Panics
    ///
    /// If the set has no such file: the id came from elsewhere.
    pub fn get(&self, file: FileId) -> &HostFile {
        self.find(file).expect("a file of this set")
    }

    /// From here on all I/O goes through the page cache.
    pub fn forget_direct(&mut self) {
        self.files.iter_mut().for_each(HostFile::forget_direct);
    }

    /// Every file, in the order of their ids (from 0 on): the image's own first.
    pub fn iter(&self) -> impl Iterator<Item = (FileId, &HostFile)> {
        (0..).map(FileId).zip(&self.files)
    }

    /// Bytes that the files take on the host, holes left out; a file that was opened twice counts once.
    ///
    /// # Errors
    ///
    /// The host's.
    pub fn host_space_used(&self) -> io::Result<u64> {
        let first = |n: usize| self.files.iter().take(n).all(|f| f.identity() != self.files[n].identity());
        (0..self.files.len()).filter(|n| first(*n)).map(|n| self.files[n].space_used()).sum()
    }

    /// What to register with a ring for [`crate::UringIo::with_fixed`]: `count` and the descriptors in the order of their
    /// slots, for as many files as fit into `slots`. The buffered ones come first, then, if any file has one, as many
    /// for direct I/O (a file without one repeats its buffered one). They stay open as long as the set lives.
    pub fn fixed_fds(&self, slots: usize) -> (u32, Vec<RawFd>) {
        let any_direct = self.files.iter().any(|f| f.direct_fd().is_some());
        let count = self.files.len().min(if any_direct { slots / 2 } else { slots });
        let files = &self.files[..count];
        let buffered = files.iter().map(HostFile::buffered_fd);
        let direct = files.iter().filter(|_| any_direct).map(|f| f.direct_fd().unwrap_or(f.buffered_fd()));
        let fds = buffered.chain(direct).map(|fd| fd.as_raw_fd()).collect();
        (u32::try_from(count).expect("a FileId is a u32"), fds)
    }

    pub(crate) fn find(&self, file: FileId) -> io::Result<&HostFile> {
        find(&self.files, file)
    }
}

fn find<T>(files: &[T], file: FileId) -> io::Result<&T> {
    usize::try_from(file.0)
        .ok()
        .and_then(|n| files.get(n))
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, format!("{file:?} is no file of this image")))
}
