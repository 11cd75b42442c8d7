//! Which files may be opened. The user's own path is trusted; a name inside an image is hostile and stays beneath the
//! image's directory.

use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, OpenHow, ResolveFlag, fcntl, open, openat, openat2};
use nix::sys::stat::Mode;

/// Opens the files that an image names.
#[derive(Debug)]
pub(crate) struct Gate {
    /// The real directory of the image; none if it has no name any more.
    directory: Option<(PathBuf, OwnedFd)>,
    trust_paths: bool,
    /// For tests: a kernel or a sandbox without openat2(2).
    without_openat2: bool,
}

impl Gate {
    /// Opens the image itself and finds its directory.
    pub(crate) fn open_image(path: &Path, writable: bool, trust_paths: bool) -> io::Result<(Self, File)> {
        let file = open(path, flags(writable), Mode::empty()).map_err(|e| refused(path.display(), e))?;
        let file = checked(file, path.display(), true)?;
        let directory = directory_of(path, &file);
        Ok((Self { directory, trust_paths, without_openat2: false }, file))
    }

    /// A gate that lets nothing through.
    pub(crate) fn closed() -> Self {
        Self { directory: None, trust_paths: false, without_openat2: false }
    }

    /// Opens a file by the name that the image has for it; also says where it is.
    pub(crate) fn open_named(&self, name: &str, writable: bool) -> io::Result<(File, PathBuf)> {
        let Some((path, directory)) = &self.directory else {
            return Err(denied(format!("{name:?}: the image has no directory (any more) to look in")));
        };
        let flags = flags(writable);
        let file = if self.trust_paths {
            openat(directory, name, flags, Mode::empty()).map_err(|e| refused(format!("{name:?}"), e))?
        } else {
            self.open_beneath(directory, name, flags | OFlag::O_NOFOLLOW)?
        };
        Ok((checked(file, format!("{name:?}"), self.trust_paths)?, path.join(name)))
    }

    /// Opens the parent that an image names, and a gate for the names in it: the name as it is, or else its last part, which is
    /// all that is left of a path on another host.
    pub(crate) fn open_parent(&self, hint: &str) -> io::Result<(Self, File, PathBuf)> {
        let base = base_name(hint);
        let (name, opened) = match self.open_named(hint, false) {
            Err(e) if base != hint && (is_missing(&e) || e.kind() == io::ErrorKind::PermissionDenied) => {
                let opened = self.open_named(base, false).map_err(|other| match is_missing(&other) {
                    true => io::Error::new(e.kind(), format!("{e}; nor is there {base:?} beside the child")),
                    false => other,
                })?;
                (base, opened)
            }
            opened => (hint, opened?),
        };
        let (file, path) = opened;
        let directory = match self.trust_paths {
            // Links may have been followed: names in the parent are beside the file that was found.
            true => directory_of(&path, &file),
            false => self.directory_of_name(name),
        };
        Ok((Self { directory, trust_paths: self.trust_paths, without_openat2: self.without_openat2 }, file, path))
    }

    /// The directory that a name which was let through leads to, without links.
    fn directory_of_name(&self, name: &str) -> Option<(PathBuf, OwnedFd)> {
        let (path, directory) = self.directory.as_ref()?;
        let above = match Path::new(name).parent() {
            Some(above) if !above.as_os_str().is_empty() => above.to_str()?,
            _ => ".",
        };
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let opened = self.open_beneath(directory, above, flags | OFlag::O_NOFOLLOW).ok()?;
        Some((if above == "." { path.clone() } else { path.join(above) }, opened))
    }

    fn open_beneath(&self, directory: &OwnedFd, name: &str, flags: OFlag) -> io::Result<OwnedFd> {
        let resolve =
            ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS | ResolveFlag::RESOLVE_NO_MAGICLINKS;
        let how = OpenHow::new().flags(flags).resolve(resolve);
        let mut tries = 0;
        let answer = loop {
            match openat2(directory, name, how) {
                _ if self.without_openat2 => break Err(Errno::ENOSYS),
                // A directory was renamed while a ".." was looked up: openat2(2), ERRORS.
                Err(Errno::EAGAIN) if tries < 10 => tries += 1,
                answer => break answer,
            }
        };
        answer.or_else(|e| match e {
            // Missing, or forbidden by a seccomp filter, some of which say EPERM.
            Errno::ENOSYS | Errno::EPERM => open_plain(directory, name, flags),
            Errno::EXDEV => Err(denied(format!("{name:?} leaves the image's directory; --trust-paths follows it"))),
            Errno::ELOOP => Err(symbolic_link(name)),
            _ => Err(refused(format!("{name:?}"), e)),
        })
    }
}

/// The last part of a path of any system: VMware writes those of Windows, and of datastores (`[store] folder/disk.vmdk`).
pub(crate) fn base_name(path: &str) -> &str {
    path.rsplit(['/', '\\']).next().unwrap_or(path)
}

fn is_missing(e: &io::Error) -> bool {
    matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory)
}

/// Without openat2(2): only what needs no resolving, a name in the directory itself.
fn open_plain(directory: &OwnedFd, name: &str, flags: OFlag) -> io::Result<OwnedFd> {
    let mut plain = name;
    while let Some(rest) = plain.strip_prefix("./") {
        plain = rest;
    }
    if plain.contains('/') || plain == ".." {
        return Err(denied(format!(
            "{name:?} is more than a file's name, and this kernel or sandbox has no openat2 to keep it in the image's \
             directory; --trust-paths follows it"
        )));
    }
    openat(directory, plain, flags, Mode::empty()).map_err(|e| match e {
        Errno::ELOOP => symbolic_link(name),
        _ => refused(format!("{name:?}"), e),
    })
}

/// `O_NONBLOCK`: opening a FIFO without a peer would wait for one. `O_EXCL`: a block device that is mounted, or held by another
/// driver, is not written under it (open(2); regular files do not mind).
fn flags(writable: bool) -> OFlag {
    let access = if writable { OFlag::O_RDWR | OFlag::O_EXCL } else { OFlag::O_RDONLY };
    access | OFlag::O_NONBLOCK | OFlag::O_NOCTTY | OFlag::O_CLOEXEC
}

/// Lets regular files through, and block devices if they are allowed.
fn checked(fd: OwnedFd, name: impl std::fmt::Display, block_devices: bool) -> io::Result<File> {
    let file = File::from(fd);
    let kind = file.metadata()?.file_type();
    let what = match kind {
        _ if kind.is_file() => None,
        _ if kind.is_block_device() => (!block_devices).then_some("a block device"),
        _ if kind.is_dir() => Some("a directory"),
        _ if kind.is_fifo() => Some("a FIFO"),
        _ if kind.is_char_device() => Some("a character device"),
        _ => Some("no regular file"),
    };
    if let Some(what) = what {
        let hint = if kind.is_block_device() { "; --trust-paths follows it" } else { "" };
        return Err(io::Error::new(io::ErrorKind::InvalidInput, format!("{name} is {what}{hint}")));
    }
    // It was for the opening only. io_uring takes it for "fail with EAGAIN rather than wait" on file systems without
    // nowait support (io_uring/rw.c, io_rw_init_file).
    let status = OFlag::from_bits_retain(fcntl(&file, FcntlArg::F_GETFL)?);
    fcntl(&file, FcntlArg::F_SETFL(status - OFlag::O_NONBLOCK))?;
    Ok(file)
}

/// The directory in which the open file really is, links followed.
fn directory_of(path: &Path, file: &File) -> Option<(PathBuf, OwnedFd)> {
    let real = fs::canonicalize(path).ok()?;
    let (named, opened) = (fs::metadata(&real).ok()?, file.metadata().ok()?);
    let same = (named.dev(), named.ino()) == (opened.dev(), opened.ino());
    let parent = real.parent().filter(|_| same)?;
    let directory = open(parent, OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty()).ok()?;
    Some((parent.to_owned(), directory))
}

fn denied(text: String) -> io::Error {
    io::Error::new(io::ErrorKind::PermissionDenied, text)
}

fn symbolic_link(name: &str) -> io::Error {
    denied(format!("{name:?} is, or leads through, a symbolic link; --trust-paths follows it"))
}

/// The host's refusal, with the name in its text.
fn refused(name: impl std::fmt::Display, errno: Errno) -> io::Error {
    let e = io::Error::from(errno);
    if errno == Errno::EISDIR {
        return io::Error::new(io::ErrorKind::InvalidInput, format!("{name} is a directory"));
    }
    if errno == Errno::EBUSY {
        return io::Error::new(io::ErrorKind::ResourceBusy, format!("{name} is mounted or held by another driver"));
    }
    io::Error::new(e.kind(), format!("{name}: {e}"))
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::unix::fs::symlink;

    use nix::unistd::mkfifo;

    use super::*;

    /// A directory with an image in `images` and files around it.
    struct Place(tempfile::TempDir);

    impl Place {
        fn new() -> Self {
            let place = Self(tempfile::tempdir().unwrap());
            fs::create_dir_all(place.path("images/sub")).unwrap();
            for name in ["images/disk.vmdk", "images/a.vmdk", "images/sub/b.vmdk", "outside.vmdk"] {
                fs::write(place.path(name), name).unwrap();
            }
            symlink("a.vmdk", place.path("images/link.vmdk")).unwrap();
            symlink("sub", place.path("images/linked-sub")).unwrap();
            symlink("/proc/self/cwd", place.path("images/magic")).unwrap();
            mkfifo(&place.path("images/fifo"), Mode::S_IRWXU).unwrap();
            place
        }

        fn path(&self, name: &str) -> PathBuf {
            self.0.path().join(name)
        }

        fn gate(&self, trust_paths: bool) -> Gate {
            Gate::open_image(&self.path("images/disk.vmdk"), false, trust_paths).unwrap().0
        }
    }

    /// What is in the file, or the error's kind and text.
    fn opened(gate: &Gate, name: &str) -> Result<String, (io::ErrorKind, String)> {
        let (mut file, _) = gate.open_named(name, false).map_err(|e| (e.kind(), e.to_string()))?;
        let mut text = String::new();
        file.read_to_string(&mut text).unwrap();
        Ok(text)
    }

    #[test]
    fn names_beneath_the_directory_are_opened() {
        let place = Place::new();
        for name in ["a.vmdk", "./a.vmdk", "././a.vmdk", "sub/../a.vmdk"] {
            assert_eq!(opened(&place.gate(false), name).as_deref(), Ok("images/a.vmdk"), "{name}");
        }
        assert_eq!(opened(&place.gate(false), "sub/b.vmdk").as_deref(), Ok("images/sub/b.vmdk"));
    }

    #[test]
    fn names_that_leave_the_directory_are_refused() {
        let place = Place::new();
        let gate = place.gate(false);
        let absolute = place.path("images/a.vmdk").display().to_string();
        for name in ["../outside.vmdk", "sub/../../outside.vmdk", "..", "/etc/passwd", &absolute] {
            let (kind, text) = opened(&gate, name).unwrap_err();
            assert_eq!(kind, io::ErrorKind::PermissionDenied, "{name}: {text}");
            assert_eq!(text, format!("{name:?} leaves the image's directory; --trust-paths follows it"));
        }
    }

    #[test]
    fn symbolic_links_are_refused_even_inside_the_directory() {
        let place = Place::new();
        let gate = place.gate(false);
        for name in ["link.vmdk", "linked-sub/b.vmdk", "magic/x"] {
            let (kind, text) = opened(&gate, name).unwrap_err();
            assert_eq!(kind, io::ErrorKind::PermissionDenied, "{name}: {text}");
            assert!(text.contains("symbolic link"), "{text}");
        }
    }

    #[test]
    fn trusted_paths_go_anywhere() {
        let place = Place::new();
        let gate = place.gate(true);
        let absolute = place.path("outside.vmdk").display().to_string();
        assert_eq!(opened(&gate, "../outside.vmdk").as_deref(), Ok("outside.vmdk"));
        assert_eq!(opened(&gate, &absolute).as_deref(), Ok("outside.vmdk"));
        assert_eq!(opened(&gate, "link.vmdk").as_deref(), Ok("images/a.vmdk"));
        assert_eq!(opened(&gate, "linked-sub/b.vmdk").as_deref(), Ok("images/sub/b.vmdk"));
    }

    #[test]
    fn only_regular_files_are_let_through() {
        let place = Place::new();
        for trust_paths in [false, true] {
            let gate = place.gate(trust_paths);
            assert_eq!(opened(&gate, "fifo").unwrap_err().1, "\"fifo\" is a FIFO");
            assert_eq!(opened(&gate, "sub").unwrap_err().1, "\"sub\" is a directory");
            assert_eq!(gate.open_named("sub", true).unwrap_err().to_string(), "\"sub\" is a directory");
            assert_eq!(gate.open_named("fifo", true).unwrap_err().to_string(), "\"fifo\" is a FIFO");
        }
        assert_eq!(opened(&place.gate(true), "/dev/null").unwrap_err().1, "\"/dev/null\" is a character device");
    }

    #[test]
    fn the_image_itself_is_a_file_or_a_block_device() {
        let place = Place::new();
        for (path, what) in [
            (place.path("images"), "a directory"),
            (place.path("images/fifo"), "a FIFO"),
            ("/dev/zero".into(), "a character device"),
        ] {
            for writable in [false, true] {
                let e = Gate::open_image(&path, writable, false).unwrap_err();
                assert_eq!(e.to_string(), format!("{} is {what}", path.display()));
                assert_eq!(e.kind(), io::ErrorKind::InvalidInput);
            }
        }
    }

    #[test]
    fn a_missing_file_is_not_found_by_name() {
        let place = Place::new();
        for name in ["none.vmdk", "sub/none.vmdk", ""] {
            let (kind, text) = opened(&place.gate(false), name).unwrap_err();
            assert_eq!(kind, io::ErrorKind::NotFound);
            assert!(text.starts_with(&format!("{name:?}: No such file")), "{text}");
        }
        assert_eq!(opened(&place.gate(false), "a\0.vmdk").unwrap_err().0, io::ErrorKind::InvalidInput);
        let e = Gate::open_image(&place.path("none"), false, false).unwrap_err();
        assert!(e.kind() == io::ErrorKind::NotFound && e.to_string().contains("none: No such file"), "{e}");
    }

    #[test]
    fn a_link_to_the_image_leads_to_the_directory_of_the_image() {
        let place = Place::new();
        symlink("images/disk.vmdk", place.path("disk-link")).unwrap();
        let (gate, _) = Gate::open_image(&place.path("disk-link"), false, false).unwrap();
        assert_eq!(opened(&gate, "a.vmdk").as_deref(), Ok("images/a.vmdk"));
        assert_eq!(opened(&gate, "outside.vmdk").unwrap_err().0, io::ErrorKind::NotFound);
    }

    #[test]
    fn without_openat2_only_plain_names_are_opened() {
        let place = Place::new();
        let gate = Gate { without_openat2: true, ..place.gate(false) };
        for name in ["a.vmdk", "./a.vmdk", "././a.vmdk"] {
            assert_eq!(opened(&gate, name).as_deref(), Ok("images/a.vmdk"));
        }
        for name in ["sub/b.vmdk", "../outside.vmdk", "..", "./..", "/etc/passwd", "link.vmdk", ".//etc/passwd"] {
            assert_eq!(opened(&gate, name).unwrap_err().0, io::ErrorKind::PermissionDenied, "{name}");
        }
        assert_eq!(opened(&gate, "sub").unwrap_err().1, "\"sub\" is a directory");
    }

    #[test]
    fn an_image_without_a_name_has_no_directory() {
        let place = Place::new();
        let file = File::open(place.path("images/disk.vmdk")).unwrap();
        fs::remove_file(place.path("images/disk.vmdk")).unwrap();
        let link = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file));
        let (gate, _) = Gate::open_image(Path::new(&link), false, false).unwrap();
        assert_eq!(opened(&gate, "a.vmdk").unwrap_err().0, io::ErrorKind::PermissionDenied);
    }

    #[test]
    fn an_opened_file_blocks() {
        let place = Place::new();
        let (gate, image) = Gate::open_image(&place.path("images/disk.vmdk"), true, false).unwrap();
        for file in [image, gate.open_named("a.vmdk", true).unwrap().0] {
            let status = OFlag::from_bits_retain(fcntl(&file, FcntlArg::F_GETFL).unwrap());
            assert!(!status.contains(OFlag::O_NONBLOCK) && status.contains(OFlag::O_RDWR));
        }
    }
}
