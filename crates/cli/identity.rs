//! Whether a device in the books is of an image, whatever the image is called.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use crate::open::Opened;
use crate::state::State;

/// What an image is known by: a name, which another file may have by now, and its files, which may have other names.
pub(crate) struct Identity {
    /// As [`State::image`].
    path: String,
    /// The file that is named. Block devices, members of archives and what is not there have none.
    first: Option<(u64, u64)>,
    /// The files that changes go to, if it is open to be changed.
    written: Vec<(u64, u64)>,
}

impl Identity {
    /// Of an image that is not open, by its real path.
    pub(crate) fn at(real: &Path) -> Self {
        let file = fs::metadata(real).ok().filter(fs::Metadata::is_file);
        Self { path: text(real), first: file.map(|file| (file.dev(), file.ino())), written: Vec::new() }
    }

    pub(crate) fn of(real: &Path, image: &Opened) -> Self {
        Self { path: text(real), first: image.first_file(), written: image.written_files() }
    }

    #[cfg(test)]
    pub(crate) fn first(&self) -> Option<(u64, u64)> {
        self.first
    }

    /// Whether the device is of an image of this name.
    pub(crate) fn is_named_by(&self, state: &State) -> bool {
        self.path == state.image
    }

    /// Whether the device is of this very file, or is made of one that this image's changes go to. (A parent that both only read is
    /// nobody's.)
    pub(crate) fn is_shared_with(&self, state: &State) -> bool {
        let files = &state.resume.files;
        match (self.first, files.first()) {
            (None, None) => self.is_named_by(state),
            (first, other) => {
                first.is_some() && first.as_ref() == other || self.written.iter().any(|f| files.contains(f))
            }
        }
    }

    /// Either of the two.
    pub(crate) fn is_of(&self, state: &State) -> bool {
        self.is_named_by(state) || self.is_shared_with(state)
    }
}

fn text(real: &Path) -> String {
    real.to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::resume::Resume;
    use crate::transport::Transport;
    use vdisk_image::Geometry;

    fn state(path: &Path, files: &[(u64, u64)]) -> State {
        let geometry = Geometry { size: 10 << 20, read_only: false, preferred_block: 4096 };
        let mut resume = Resume::of_path(path.to_owned());
        resume.files = files.to_vec();
        State::of_this_process(Transport::Ublk, path, geometry, "journal".to_owned(), resume).unwrap()
    }

    #[test]
    fn a_device_is_found_by_another_name_of_its_image_and_by_the_name_of_one_that_is_gone() {
        let temp = tempfile::tempdir().unwrap();
        let (image, link, other) = (temp.path().join("a"), temp.path().join("b"), temp.path().join("c"));
        fs::write(&image, "a").unwrap();
        fs::write(&other, "c").unwrap();
        fs::hard_link(&image, &link).unwrap();
        let file = fs::metadata(&image).unwrap();
        let served = state(&image, &[(file.dev(), file.ino())]);
        let found = |path: &Path| {
            let identity = Identity::at(path);
            (identity.is_named_by(&served), identity.is_shared_with(&served), identity.is_of(&served))
        };
        assert_eq!(found(&image), (true, true, true));
        assert_eq!(found(&link), (false, true, true));
        assert_eq!(found(&other), (false, false, false));
        // Another file of the name.
        fs::rename(&other, &image).unwrap();
        assert_eq!(found(&image), (true, false, true));
        fs::remove_file(&image).unwrap();
        assert_eq!(found(&image), (true, false, true));
    }

    #[test]
    fn a_parent_that_both_read_is_not_shared_and_one_that_is_written_is() {
        let child = state(Path::new("/child"), &[(1, 2), (1, 1)]);
        let identity =
            |path: &str, first, written: &[_]| Identity { path: path.to_owned(), first, written: written.to_vec() };
        assert!(!identity("/other child", Some((1, 3)), &[(1, 3)]).is_shared_with(&child));
        assert!(!identity("/parent", Some((1, 1)), &[]).is_shared_with(&child));
        assert!(identity("/parent", Some((1, 1)), &[(1, 1)]).is_shared_with(&child));
        // Of block devices there is only the name.
        let disk = state(Path::new("/dev/sdz"), &[]);
        assert!(identity("/dev/sdz", None, &[]).is_shared_with(&disk));
        assert!(!identity("/dev/sdy", None, &[]).is_shared_with(&disk));
        assert!(!identity("/dev/sdz", None, &[]).is_shared_with(&child));
    }
}
