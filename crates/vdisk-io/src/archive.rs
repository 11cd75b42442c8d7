//! An image inside a tar archive (an appliance's .ova, usually), served where it lies, read-only.

use std::io;
use std::path::{Path, PathBuf};

use crate::files::OpenMode;
use crate::gate::Gate;
use crate::host_file::HostFile;
use crate::locks;
use crate::tar::{Kind, Member, members};

/// Names in a message, at most.
const MAX_LISTED: usize = 10;

/// Characters of a name in a message, at most.
const MAX_SHOWN: usize = 100;

/// An open archive: one descriptor and one lock for all of its members.
#[derive(Debug)]
pub(crate) struct Archive {
    file: HostFile,
    members: Vec<Member>,
    /// The image's directory inside the archive, with a slash at the end, or nothing.
    directory: String,
}

impl Archive {
    /// Opens and locks an archive, and its image: the member of that name, or the only one that ends in ".vmdk".
    ///
    /// # Errors
    ///
    /// See [`crate::HostFiles::open_member`].
    pub(crate) fn open(path: &Path, member: Option<&str>, mode: OpenMode) -> io::Result<(Self, HostFile)> {
        if mode.writable {
            return Err(io::Error::new(
                io::ErrorKind::ReadOnlyFilesystem,
                format!(
                    "{}: an image inside an archive cannot be written: use --read-only or --overlay",
                    path.display()
                ),
            ));
        }
        // What the gate thinks of names does not matter: they never lead out of the archive.
        let (_, file) = Gate::open_image(path, false, false)?;
        // No direct I/O: members begin at sectors, and end anywhere.
        let file = HostFile::new(file, path.to_owned(), false, false)?;
        if !mode.unlocked {
            locks::lock(&file, false)?;
        }
        let members = members(file.file(), file.len()?)
            .map_err(|e| io::Error::new(e.kind(), format!("{}: {e}", path.display())))?;
        let mut archive = Self { file, members, directory: String::new() };
        let image = match member {
            Some(name) => archive.find(name)?,
            None => archive.only_image()?,
        };
        let directory = plain(&image.name).rsplit_once('/').map(|(directory, _)| format!("{directory}/"));
        let image = archive.file_of(image)?;
        archive.directory = directory.unwrap_or_default();
        Ok((archive, image))
    }

    /// The member that the image has this name for, which is beside the image as a file would be.
    ///
    /// # Errors
    ///
    /// [`io::ErrorKind::NotFound`] if there is none; see also [`crate::HostFiles::open_member`].
    pub(crate) fn open_named(&self, name: &str) -> io::Result<HostFile> {
        self.file_of(self.find(&format!("{}{}", self.directory, plain(name)))?)
    }

    fn find(&self, name: &str) -> io::Result<&Member> {
        let mut found = self.members.iter().filter(|m| plain(&m.name) == plain(name));
        match (found.next(), found.next()) {
            (Some(member), None) => Ok(member),
            // Which one is meant is a matter of opinion among programs that read archives.
            (Some(_), Some(_)) => Err(self.error(
                io::ErrorKind::InvalidData,
                format!("has more than one member {}: unpack the one that is meant", shown(name)),
            )),
            (None, _) => {
                let has = match list(self.members.iter()) {
                    names if names.is_empty() => "it is empty".to_owned(),
                    names => format!("it has {names}"),
                };
                Err(self.error(io::ErrorKind::NotFound, format!("no member {} in this archive: {has}", shown(name))))
            }
        }
    }

    fn only_image(&self) -> io::Result<&Member> {
        let is_image = |m: &&Member| m.kind != Kind::Directory && ends_in_vmdk(&m.name);
        let images = || self.members.iter().filter(is_image);
        match (images().next(), images().nth(1)) {
            (Some(only), None) => Ok(only),
            (Some(first), Some(_)) => Err(self.error(
                io::ErrorKind::InvalidInput,
                format!(
                    "{} images in this archive, {}: name one, such as {}:{}",
                    images().count(),
                    list(images()),
                    self.file.path().display(),
                    unquoted(plain(&first.name)),
                ),
            )),
            (None, _) => {
                let has = match list(self.members.iter()) {
                    names if names.is_empty() => "it is empty".to_owned(),
                    names => format!("it has {names}; name the one that is an image, if any is"),
                };
                Err(self.error(io::ErrorKind::NotFound, format!("no member of this archive ends in .vmdk: {has}")))
            }
        }
    }

    fn file_of(&self, member: &Member) -> io::Result<HostFile> {
        let what = match member.kind {
            Kind::File => {
                let path = format!("{}:{}", self.file.path().display(), unquoted(plain(&member.name)));
                return Ok(self.file.member(member.data, PathBuf::from(path)));
            }
            Kind::Sparse => "stored without its holes (tar --sparse): unpack it",
            Kind::HardLink => "a hard link to another member: name that one",
            Kind::SymbolicLink => "a symbolic link, and links in archives are not followed",
            Kind::Directory => "a directory",
            Kind::Other => "no regular file",
        };
        Err(self.error(io::ErrorKind::InvalidInput, format!("member {} is {what}", shown(&member.name))))
    }

    fn error(&self, kind: io::ErrorKind, text: String) -> io::Error {
        io::Error::new(kind, format!("{}: {text}", self.file.path().display()))
    }
}

/// A name without the "./" that `tar c .` puts before it.
fn plain(mut name: &str) -> &str {
    while let Some(rest) = name.strip_prefix("./") {
        name = rest;
    }
    name
}

fn ends_in_vmdk(name: &str) -> bool {
    name.rsplit_once('.').is_some_and(|(_, ending)| ending.eq_ignore_ascii_case("vmdk"))
}

/// Some names, for a message.
fn list<'a>(members: impl Iterator<Item = &'a Member> + Clone) -> String {
    let names: Vec<_> = members.clone().take(MAX_LISTED).map(|m| shown(plain(&m.name))).collect();
    match members.count() - names.len() {
        0 => names.join(", "),
        more => format!("{} and {more} more", names.join(", ")),
    }
}

/// A hostile name as a part of a message: quoted, without control characters, not too long.
fn shown(name: &str) -> String {
    match name.char_indices().nth(MAX_SHOWN) {
        Some((end, _)) => format!("{:?}...", &name[..end]),
        None => format!("{name:?}"),
    }
}

/// A hostile name as a part of a path for messages: as it is, but for control characters.
fn unquoted(name: &str) -> String {
    let escaped = |c: char| if c.is_control() { c.escape_default().to_string() } else { c.to_string() };
    name.chars().map(escaped).collect()
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::tar::tests::{header, padded};

    /// An archive of members by name and kind, each of which has its name for data.
    fn archive(members: &[(&str, u8)]) -> (tempfile::TempDir, PathBuf) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("appliance.ova");
        let blocks = members.iter().flat_map(|(name, flag)| {
            let len = if (b'1'..=b'6').contains(flag) { 0 } else { name.len() };
            [header(name, *flag, len as u64).to_vec(), padded(&name.as_bytes()[..len])]
        });
        fs::write(&path, blocks.chain([vec![0; 1024]]).collect::<Vec<_>>().concat()).unwrap();
        (directory, path)
    }

    /// The path of the image that is picked, or the error's kind and text, both without the archive's path.
    fn picked(members: &[(&str, u8)], name: Option<&str>) -> Result<String, (io::ErrorKind, String)> {
        let (_directory, path) = archive(members);
        let short = |text: String| text.replace(path.to_str().unwrap(), "A");
        match Archive::open(&path, name, OpenMode::default()) {
            Ok((_, image)) => Ok(short(image.path().display().to_string())),
            Err(e) => Err((e.kind(), short(e.to_string()))),
        }
    }

    #[test]
    fn the_only_vmdk_is_the_image() {
        let members = [("a.ovf", b'0'), ("vmdk", b'0'), ("x.vmdk", b'5'), ("disk1.VmDk", b'0'), ("a.vmdk.gz", b'0')];
        assert_eq!(picked(&members, None), Ok("A:disk1.VmDk".to_owned()));
        assert_eq!(picked(&[("./d.vmdk", b'0')], None), Ok("A:d.vmdk".to_owned()));
    }

    #[test]
    fn a_member_is_named_exactly_but_for_dot_slash() {
        let members = [("./sub/a.vmdk", b'0'), ("b.img", b'0')];
        for name in ["sub/a.vmdk", "./sub/a.vmdk", "././sub/a.vmdk"] {
            assert_eq!(picked(&members, Some(name)), Ok("A:sub/a.vmdk".to_owned()));
        }
        assert_eq!(picked(&members, Some("b.img")), Ok("A:b.img".to_owned()));
        for name in ["a.vmdk", "sub//a.vmdk", "sub/../b.img", "/b.img", "B.img", ""] {
            let text = format!("A: no member {name:?} in this archive: it has \"sub/a.vmdk\", \"b.img\"");
            assert_eq!(picked(&members, Some(name)), Err((io::ErrorKind::NotFound, text)));
        }
    }

    #[test]
    fn more_than_one_image_is_an_error_that_lists_them() {
        let text = "A: 2 images in this archive, \"disk1.vmdk\", \"./x/2.VMDK\": name one, such as A:disk1.vmdk";
        let members = [("disk1.vmdk", b'0'), ("a.ovf", b'0'), ("x/2.VMDK", b'0')];
        let expected = Err((io::ErrorKind::InvalidInput, text.replace("./", "")));
        assert_eq!(picked(&members, None), expected);
        let names: Vec<_> = (0..12).map(|n| format!("{n}.vmdk")).collect();
        let many: Vec<_> = names.iter().map(|n| (n.as_str(), b'0')).collect();
        let (_, text) = picked(&many, None).unwrap_err();
        assert!(text.starts_with("A: 12 images in this archive, \"0.vmdk\", "), "{text}");
        assert!(text.ends_with("\"9.vmdk\" and 2 more: name one, such as A:0.vmdk"), "{text}");
    }

    #[test]
    fn an_archive_without_an_image_says_what_it_has() {
        let (kind, text) = picked(&[("a.ovf", b'0'), ("a.mf", b'0')], None).unwrap_err();
        assert_eq!(kind, io::ErrorKind::NotFound);
        let has = "it has \"a.ovf\", \"a.mf\"; name the one that is an image, if any is";
        assert_eq!(text, format!("A: no member of this archive ends in .vmdk: {has}"));
        assert!(picked(&[], None).unwrap_err().1.ends_with(": it is empty"));
    }

    #[test]
    fn only_regular_members_are_images() {
        for (flag, what) in [
            (b'1', "a hard link to another member: name that one"),
            (b'2', "a symbolic link, and links in archives are not followed"),
            (b'4', "no regular file"),
            (b'5', "a directory"),
            (b'6', "no regular file"),
            (b'S', "stored without its holes (tar --sparse): unpack it"),
            (b'M', "no regular file"),
        ] {
            let expected = Err((io::ErrorKind::InvalidInput, format!("A: member \"a.vmdk\" is {what}")));
            assert_eq!(picked(&[("a.vmdk", flag)], Some("a.vmdk")), expected);
        }
    }

    #[test]
    fn a_name_that_is_there_twice_means_nothing() {
        let (kind, text) = picked(&[("a.vmdk", b'0'), ("./a.vmdk", b'0')], Some("a.vmdk")).unwrap_err();
        assert_eq!(kind, io::ErrorKind::InvalidData);
        assert_eq!(text, "A: has more than one member \"a.vmdk\": unpack the one that is meant");
        assert!(picked(&[("a.vmdk", b'0'), ("a.vmdk", b'0')], None).unwrap_err().1.contains("2 images"));
    }

    #[test]
    fn hostile_names_do_not_reach_the_terminal() {
        let name = "\x1b[2J\n.vmdk";
        assert_eq!(picked(&[(name, b'0')], None), Ok("A:\\u{1b}[2J\\n.vmdk".to_owned()));
        let (_, text) = picked(&[(name, b'0'), ("b.vmdk", b'0')], None).unwrap_err();
        assert!(!text.contains(char::is_control), "{text}");
        assert_eq!(shown(&"ä".repeat(101)), format!("\"{}\"...", "ä".repeat(100)));
    }

    #[test]
    fn an_archive_is_never_opened_for_writing() {
        let (_directory, path) = archive(&[("a.vmdk", b'0')]);
        let e = Archive::open(&path, None, OpenMode { writable: true, ..OpenMode::default() }).unwrap_err();
        assert_eq!(e.kind(), io::ErrorKind::ReadOnlyFilesystem);
        assert!(e.to_string().ends_with("cannot be written: use --read-only or --overlay"), "{e}");
    }

    #[test]
    fn the_image_finds_its_neighbours_and_nothing_else() {
        let (_directory, path) =
            archive(&[("vm/disk.vmdk", b'0'), ("./vm/disk-s001.vmdk", b'0'), ("disk-s002.vmdk", b'0'), ("vm/l", b'2')]);
        fs::write(path.with_file_name("disk-s003.vmdk"), "beside the archive").unwrap();
        let mode = OpenMode { trust_paths: true, ..OpenMode::default() };
        let (archive, _) = Archive::open(&path, Some("vm/disk.vmdk"), mode).unwrap();
        for name in ["disk-s001.vmdk", "./disk-s001.vmdk"] {
            let file = archive.open_named(name).unwrap();
            assert_eq!(file.path().file_name().unwrap(), "disk-s001.vmdk");
        }
        let outside = path.with_file_name("disk-s003.vmdk").display().to_string();
        for name in ["disk-s002.vmdk", "../disk-s002.vmdk", "disk-s003.vmdk", &outside, "/etc/passwd", "", "."] {
            assert_eq!(archive.open_named(name).unwrap_err().kind(), io::ErrorKind::NotFound, "{name}");
        }
        assert_eq!(archive.open_named("l").unwrap_err().kind(), io::ErrorKind::InvalidInput);
    }
}
