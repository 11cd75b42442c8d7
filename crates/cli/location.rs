//! Where an image is: a file, or a member of an archive.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use vdisk_image::FileId;
use vdisk_io::{HostFiles, OpenMode};

/// What a path on the command line means.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Location {
    File(PathBuf),
    /// `appliance.ova` or `appliance.ova:disk1.vmdk`: a tar archive, and the member; without a name its only image.
    Member {
        archive: PathBuf,
        member: Option<String>,
    },
}

impl Location {
    /// Reads a path. A file of just this name comes first.
    pub(crate) fn of(path: &Path) -> Self {
        let is_archive = |path: &Path| path.extension().is_some_and(|e| e.eq_ignore_ascii_case("ova"));
        if path.exists() {
            return match is_archive(path) {
                true => Self::Member { archive: path.to_owned(), member: None },
                false => Self::File(path.to_owned()),
            };
        }
        let split = path.to_str().and_then(|text| {
            let colons = text.char_indices().filter(|(_, c)| *c == ':').map(|(at, _)| (&text[..at], &text[at + 1..]));
            colons.into_iter().find(|(archive, member)| Path::new(archive).is_file() && !member.is_empty())
        });
        match split {
            Some((archive, member)) => Self::Member { archive: archive.into(), member: Some(member.to_owned()) },
            None => Self::File(path.to_owned()),
        }
    }

    /// The file, for messages.
    pub(crate) fn path(&self) -> &Path {
        match self {
            Self::File(path) => path,
            Self::Member { archive, .. } => archive,
        }
    }

    /// Opens and locks the image.
    pub(crate) fn open(&self, mode: OpenMode) -> io::Result<(HostFiles, FileId)> {
        match self {
            Self::File(path) => HostFiles::open(path, mode),
            Self::Member { archive, member } => HostFiles::open_member(archive, member.as_deref(), mode),
        }
    }

    /// Opens and locks the image beside another, to be read.
    pub(crate) fn open_as_base(&self, files: &HostFiles) -> io::Result<FileId> {
        match self {
            Self::File(path) => files.open_base(path),
            Self::Member { archive, member } => files.open_base_member(archive, member.as_deref()),
        }
    }

    /// The same with the file's real path: what the books call the image.
    pub(crate) fn real_path(&self) -> io::Result<PathBuf> {
        match self {
            Self::File(path) => fs::canonicalize(path),
            Self::Member { archive, member: None } => fs::canonicalize(archive),
            Self::Member { archive, member: Some(member) } => {
                let mut path = fs::canonicalize(archive)?.into_os_string();
                path.push(":");
                path.push(member);
                Ok(path.into())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_member_is_named_behind_the_archive_unless_a_file_has_the_whole_name() {
        let temp = tempfile::tempdir().unwrap();
        let path = |name: &str| temp.path().join(name);
        for name in ["a.ova", "b.OVA", "c.tar", "odd:name.vmdk"] {
            fs::write(path(name), "").unwrap();
        }
        let member = |archive: &str, member: Option<&str>| Location::Member {
            archive: path(archive),
            member: member.map(str::to_owned),
        };
        assert_eq!(Location::of(&path("a.ova")), member("a.ova", None));
        assert_eq!(Location::of(&path("b.OVA")), member("b.OVA", None));
        assert_eq!(Location::of(&path("c.tar")), Location::File(path("c.tar")));
        assert_eq!(Location::of(&path("a.ova:d/x:1.vmdk")), member("a.ova", Some("d/x:1.vmdk")));
        assert_eq!(Location::of(&path("c.tar:x.vmdk")), member("c.tar", Some("x.vmdk")));
        for file in ["odd:name.vmdk", "missing.ova", "missing.ova:x", "a.ova:"] {
            assert_eq!(Location::of(&path(file)), Location::File(path(file)), "{file}");
        }
    }
}
