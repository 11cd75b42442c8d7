//! libublk's directory of running devices.

use std::fs::{self, DirBuilder, OpenOptions, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

/// Where libublk keeps a JSON file for each device.
pub(crate) const PATH: &str = "/run/ublksrvd";

/// Makes the directory before libublk does: it would be writable by everybody (0777), and libublk, as root, writes
/// files in it through whatever symbolic links it finds there.
pub(crate) fn prepare() -> io::Result<()> {
    prepare_at(Path::new(PATH), 0)
}

fn prepare_at(path: &Path, owner: u32) -> io::Result<()> {
    match DirBuilder::new().mode(0o755).create(path) {
        Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(e),
        _ => {}
    }
    let data = fs::symlink_metadata(path)?;
    if !data.is_dir() || data.uid() != owner {
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, "not a directory of root's own: remove it"));
    }
    if data.mode() & 0o022 != 0 {
        fs::set_permissions(path, Permissions::from_mode(0o755))?;
    }
    Ok(())
}

/// Removes what is there by the name of a device's file: of one that had the same number, or a link that somebody laid.
pub(crate) fn forget(device: u32) {
    match fs::remove_file(file(device)) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => tracing::warn!(device, "remove libublk's file: {e}"),
        _ => {}
    }
}

/// Makes a file for a device that has none, until the answer is dropped: libublk prints a line to standard error for want
/// of one when it opens such a device, and finds nothing in it that it needs for that.
pub(crate) fn stand_in(device: u32) -> Option<StandIn> {
    prepare().ok()?;
    stand_in_at(file(device))
}

fn stand_in_at(path: PathBuf) -> Option<StandIn> {
    // Never through a link, and never over what is there.
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o700).open(&path).ok()?;
    let made = StandIn(path);
    file.write_all(EMPTY).ok()?;
    Some(made)
}

const EMPTY: &[u8] = b"{}";

/// A file that is removed again, unless somebody has written to it.
#[derive(Debug)]
pub(crate) struct StandIn(PathBuf);

impl Drop for StandIn {
    fn drop(&mut self) {
        if fs::read(&self.0).is_ok_and(|content| content == EMPTY) {
            let _ = fs::remove_file(&self.0);
        }
    }
}

fn file(device: u32) -> PathBuf {
    Path::new(PATH).join(format!("{device:04}.json"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scratch(name: &str) -> PathBuf {
        let dir = std::env::temp_dir().join(format!("vdisk-ublk-{}-{name}", std::process::id()));
        let _ = fs::remove_dir_all(&dir);
        fs::create_dir(&dir).unwrap();
        dir
    }

    fn me() -> u32 {
        fs::metadata("/proc/self").unwrap().uid()
    }

    #[test]
    fn makes_a_directory_that_only_its_owner_writes_to_and_tightens_an_old_one() {
        let dir = scratch("make");
        let path = dir.join("d");
        for _ in 0..2 {
            prepare_at(&path, me()).unwrap();
            assert_eq!(fs::metadata(&path).unwrap().mode() & 0o7777, 0o755);
            fs::set_permissions(&path, Permissions::from_mode(0o777)).unwrap();
        }
        fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn refuses_a_symbolic_link_a_file_and_somebody_elses_directory() {
        let dir = scratch("refuse");
        let (link, plain, real) = (dir.join("link"), dir.join("plain"), dir.join("real"));
        fs::create_dir(&real).unwrap();
        std::os::unix::fs::symlink(&real, &link).unwrap();
        fs::write(&plain, "").unwrap();
        assert!(prepare_at(&link, me()).is_err());
        assert!(prepare_at(&plain, me()).is_err());
        assert!(prepare_at(&real, me() + 1).is_err());
        fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn a_stand_in_takes_no_ones_place_and_goes_away_unless_it_was_written_to() {
        let dir = scratch("stand-in");
        let path = dir.join("0000.json");
        let made = stand_in_at(path.clone());
        assert_eq!(fs::read(&path).unwrap(), b"{}");
        assert!(stand_in_at(path.clone()).is_none());
        drop(made);
        assert!(!path.exists());
        let made = stand_in_at(path.clone());
        fs::write(&path, "{\"queues\":{}}").unwrap();
        drop(made);
        assert!(path.exists());
        fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn the_files_name_has_four_digits() {
        assert_eq!(file(7), Path::new("/run/ublksrvd/0007.json"));
        assert_eq!(file(12345), Path::new("/run/ublksrvd/12345.json"));
    }
}
