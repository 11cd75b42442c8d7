//! `--overlay`: changes go to a child VMDK, the image itself is only read.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use rustix::fs::{CWD, RenameFlags, renameat_with};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use vdisk_image::{ContentId, Info, NO_CONTENT_ID, NewImage};

use crate::failure::{Failure, Result, chain};
use crate::location::Location;

/// What a temporary overlay calls its base.
pub(crate) const TEMPORARY_BASE: &str = "base";

/// Where changes go.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Overlay {
    /// To a file that nobody sees, which is gone when the image is closed.
    Temporary,
    /// To this VMDK, which is made if it is not there.
    File(#[serde(with = "crate::resume::path")] PathBuf),
}

impl FromStr for Overlay {
    type Err = std::convert::Infallible;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Ok(if text == "temporary" { Self::Temporary } else { Self::File(text.into()) })
    }
}

/// Makes the overlay `path` of an image, whole or not at all. Somebody else's that was made meanwhile is as good.
pub(crate) fn make_file(path: &Path, base: &Location, info: &Info, content_id: u32) -> Result<()> {
    let failed = |e: io::Error| Failure::doing(format_args!("make the overlay {}", path.display()), &e);
    let name = path.file_name().and_then(|n| n.to_str());
    let name = name.ok_or_else(|| Failure::new(format!("{} is no name for an overlay", path.display())))?;
    let new = new_image(name, info, content_id, hint(path, base).map_err(failed)?);
    let directory = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let unfinished = directory.join(format!(".{name}.{}.new", std::process::id()));
    let make = || -> Result<()> {
        // As open to others as the base, whose bytes will be in it.
        let mode = fs::metadata(base.path()).map_err(failed)?.permissions().mode() & 0o666 | 0o600;
        let file = OpenOptions::new().write(true).create_new(true).mode(mode).open(&unfinished).map_err(failed)?;
        fill(&file, &new)?;
        file.sync_all().map_err(failed)?;
        match renameat_with(CWD, &unfinished, CWD, path, RenameFlags::NOREPLACE) {
            Err(Errno::EXIST) => Ok(()),
            // The name too: an overlay that was flushed has to be there after a power cut.
            Ok(()) => File::open(directory).and_then(|d| d.sync_all()).map_err(failed),
            Err(e) => Err(failed(e.into())),
        }
    };
    let made = make();
    let _ = fs::remove_file(&unfinished);
    made
}

/// Makes an overlay that nobody else sees, in the directory for large temporary files.
pub(crate) fn make_temporary(info: &Info, content_id: u32) -> Result<(File, PathBuf)> {
    let directory = std::env::var_os("TMPDIR").map_or_else(|| PathBuf::from("/var/tmp"), PathBuf::from);
    let failed = |e: io::Error| Failure::doing(format_args!("make a temporary overlay in {}", directory.display()), &e);
    let file = tempfile::tempfile_in(&directory).map_err(failed)?;
    fill(&file, &new_image("temporary.vmdk", info, content_id, TEMPORARY_BASE.to_owned()))?;
    Ok((file, directory.join("(temporary overlay)")))
}

fn new_image(name: &str, info: &Info, content_id: u32, hint: String) -> NewImage {
    let parent = info.content_id.filter(|id| *id != ContentId::NO_PARENT).unwrap_or(NO_CONTENT_ID);
    NewImage {
        size: info.size,
        content_id: ContentId(content_id),
        parent: Some((parent, hint)),
        file_name: name.to_owned(),
    }
}

fn fill(file: &File, new: &NewImage) -> Result<()> {
    let pieces = new.pieces().map_err(|e| Failure::new(chain(&e)))?;
    for (at, bytes) in pieces {
        let written = file.write_all_at(&bytes, at).and_then(|()| match bytes.is_empty() {
            true => file.set_len(at),
            false => Ok(()),
        });
        written.map_err(|e| Failure::doing("write an empty overlay", &e))?;
    }
    Ok(())
}

/// How an overlay names its base: by its name if it is beside it, so that both can be moved together.
pub(crate) fn hint(path: &Path, base: &Location) -> io::Result<String> {
    let base = base.real_path()?;
    let directory = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let beside = base.parent().is_some_and(|above| fs::canonicalize(directory).is_ok_and(|d| d == above));
    let hint = if beside { Path::new(base.file_name().unwrap_or_default()) } else { base.as_path() };
    Ok(hint.to_string_lossy().into_owned())
}
