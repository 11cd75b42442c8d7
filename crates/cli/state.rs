//! State files: what is attached, one file per device, written by the process that serves it.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::failure::{Failure, Result};
use crate::process;
use crate::transport::Transport;

const VERSION: u32 = 1;

/// One attached image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct State {
    version: u32,
    /// `/dev/ublkb0`
    pub(crate) device: PathBuf,
    pub(crate) transport: Transport,
    /// The image's real path. Bytes that are no UTF-8 are replaced: it is compared with names treated the same way.
    pub(crate) image: String,
    /// In bytes.
    pub(crate) size: u64,
    pub(crate) read_only: bool,
    pub(crate) pid: u32,
    /// Start time of the process: another one with the same number is not ours.
    start_time: u64,
    /// Path of the log, or `journal`.
    pub(crate) log: String,
    /// Why the process ended in failure.
    pub(crate) error: Option<String>,
}

impl State {
    /// Describes a device that this process serves.
    pub(crate) fn of_this_process(device: PathBuf, transport: Transport, image: &Path, log: String) -> Result<Self> {
        let pid = std::process::id();
        let start_time = process::start_time(pid).ok_or_else(|| Failure::new("/proc is not mounted"))?;
        let image = image.to_string_lossy().into_owned();
        let (size, read_only, error) = (0, false, None);
        Ok(Self { version: VERSION, device, transport, image, size, read_only, pid, start_time, log, error })
    }

    /// `ublkb0`
    pub(crate) fn device_name(&self) -> &str {
        self.device.file_name().and_then(|n| n.to_str()).unwrap_or_default()
    }

    /// The process that serves the device, if it still runs.
    pub(crate) fn process(&self) -> Result<Option<process::Process>> {
        process::Process::find(self.pid, self.start_time)
            .map_err(|e| Failure::doing(format_args!("pid {}", self.pid), &e))
    }

    /// Whether the process that serves the device still runs.
    pub(crate) fn is_live(&self) -> bool {
        self.error.is_none() && process::start_time(self.pid) == Some(self.start_time)
    }

    fn is_of_same_process(&self, other: &Self) -> bool {
        (self.pid, self.start_time) == (other.pid, other.start_time)
    }
}

/// The directory of the state files.
pub(crate) struct StateDir(PathBuf);

impl StateDir {
    /// The one of this host.
    pub(crate) fn host() -> Self {
        Self(PathBuf::from("/run/vdisk"))
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }

    /// Makes the directory unless it is there.
    pub(crate) fn create(&self) -> Result<()> {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o755)
            .create(&self.0)
            .map_err(|e| Failure::doing(format_args!("create {}", self.0.display()), &e))
    }

    fn file(&self, state: &State) -> PathBuf {
        self.0.join(format!("{}.json", state.device_name()))
    }

    /// Nobody else adds or removes a file while this is held.
    fn lock(&self) -> io::Result<File> {
        let dir = File::open(&self.0)?;
        dir.lock()?;
        Ok(dir)
    }

    /// Writes a state file, whole or not at all. What it replaces belonged to a device that is gone.
    pub(crate) fn write(&self, state: &State) -> Result<()> {
        let file = self.file(state);
        let write = || -> io::Result<()> {
            let _lock = self.lock()?;
            let new = self.0.join(format!(".{}.{}", state.device_name(), state.pid));
            let mut out = fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o644).open(&new)?;
            let written = out.write_all(&serde_json::to_vec(state)?).and_then(|()| fs::rename(&new, &file));
            if written.is_err() {
                let _ = fs::remove_file(&new);
            }
            written
        };
        write().map_err(|e| Failure::doing(format_args!("write {}", file.display()), &e))
    }

    /// Removes the file of `state`, unless it belongs to another process by now.
    pub(crate) fn remove(&self, state: &State) -> Result<()> {
        let file = self.file(state);
        let remove = || -> io::Result<()> {
            let _lock = self.lock()?;
            match read(&file) {
                Ok(found) if !found.is_of_same_process(state) => Ok(()),
                Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
                _ => fs::remove_file(&file),
            }
        };
        remove().map_err(|e| Failure::doing(format_args!("remove {}", file.display()), &e))
    }

    /// What the file of `state` says now, if it is still there and of the same process.
    pub(crate) fn reread(&self, state: &State) -> Option<State> {
        read(&self.file(state)).ok().filter(|found| found.is_of_same_process(state))
    }

    /// All that is attached, by device name. A file that cannot be read is reported on stderr and left out.
    pub(crate) fn list(&self) -> Result<Vec<State>> {
        let entries = match fs::read_dir(&self.0) {
            Ok(entries) => entries,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(e) => return Err(Failure::doing(self.0.display(), &e)),
        };
        let mut states = Vec::new();
        for entry in entries.flatten() {
            let path = entry.path();
            if path.extension().is_none_or(|e| e != "json") {
                continue;
            }
            match read(&path) {
                Ok(state) => states.push(state),
                Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                Err(e) => crate::notice(&Failure::doing(path.display(), &e).to_string()),
            }
        }
        states.sort_by(|a, b| order(a.device_name()).cmp(&order(b.device_name())));
        Ok(states)
    }
}

/// `ublkb10` comes after `ublkb9`.
fn order(name: &str) -> (&str, u64) {
    let letters = name.trim_end_matches(|c: char| c.is_ascii_digit());
    (letters, name[letters.len()..].parse().unwrap_or(0))
}

fn read(path: &Path) -> io::Result<State> {
    let state: State = serde_json::from_slice(&fs::read(path)?)?;
    let name = path.file_stem().and_then(|n| n.to_str());
    if state.version != VERSION {
        return Err(io::Error::other(format!("written by another vdisk (version {})", state.version)));
    }
    if name != Some(state.device_name()) || state.device_name().is_empty() {
        return Err(io::Error::other(format!("describes {}", state.device.display())));
    }
    Ok(state)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state(device: &str) -> State {
        let log = "journal".to_owned();
        let device = PathBuf::from(device);
        let mut state = State::of_this_process(device, Transport::Nbd, Path::new("/a \"b\".vmdk"), log).unwrap();
        state.size = 10 << 20;
        state
    }

    #[test]
    fn a_state_file_comes_back_as_it_was_written() {
        let temp = tempfile::tempdir().unwrap();
        let dir = StateDir(temp.path().join("vdisk"));
        assert_eq!(dir.list().unwrap(), []);
        dir.create().unwrap();
        for device in ["/dev/nbd10", "/dev/nbd9", "/dev/ublkb0"] {
            dir.write(&state(device)).unwrap();
        }
        assert_eq!(dir.list().unwrap(), [state("/dev/nbd9"), state("/dev/nbd10"), state("/dev/ublkb0")]);
        assert!(dir.list().unwrap().iter().all(State::is_live));
    }

    #[test]
    fn a_file_of_another_process_is_not_removed() {
        let temp = tempfile::tempdir().unwrap();
        let dir = StateDir(temp.path().to_owned());
        let theirs = State { start_time: 1, ..state("/dev/nbd0") };
        dir.write(&theirs).unwrap();
        dir.remove(&state("/dev/nbd0")).unwrap();
        assert_eq!(dir.list().unwrap(), std::slice::from_ref(&theirs));
        assert!(!theirs.is_live());
        assert_eq!(dir.reread(&state("/dev/nbd0")), None);
        dir.remove(&theirs).unwrap();
        dir.remove(&theirs).unwrap();
        assert_eq!(dir.list().unwrap(), []);
    }

    #[test]
    fn broken_files_are_left_out() {
        let temp = tempfile::tempdir().unwrap();
        let dir = StateDir(temp.path().to_owned());
        fs::write(temp.path().join("nbd0.json"), "{").unwrap();
        fs::write(temp.path().join("nbd1.json"), serde_json::to_vec(&state("/dev/nbd2")).unwrap()).unwrap();
        fs::write(temp.path().join("12.log"), "").unwrap();
        assert_eq!(dir.list().unwrap(), []);
    }
}
