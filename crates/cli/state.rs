//! State files: what is attached, one file per device, written by the process that serves it.

use std::fs::{self, File, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use rustix::fs::OFlags;
use serde::{Deserialize, Serialize};
use vdisk_image::Geometry;

use crate::failure::{Failure, Result};
use crate::process;
use crate::resume::Resume;
use crate::transport::{ServerId, Transport};

const VERSION: u32 = 2;

/// One attached image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct State {
    version: u32,
    /// `/dev/ublkb0`
    pub(crate) device: PathBuf,
    pub(crate) transport: Transport,
    /// The image's real path. Bytes that are no UTF-8 are replaced: it is compared with names treated the same way.
    pub(crate) image: String,
    /// Of the device, in bytes.
    pub(crate) size: u64,
    pub(crate) read_only: bool,
    pub(crate) pid: u32,
    /// Start time of the process: another one with the same number is not ours.
    pub(crate) start_time: u64,
    /// Path of the log, or `journal`.
    pub(crate) log: String,
    /// Whether the device can be used. Until then the file is there so that the device is known if the process dies.
    pub(crate) ready: bool,
    /// Why the image takes no more changes, if it does not: a sync failed.
    #[serde(default)]
    pub(crate) poisoned: Option<String>,
    /// How often the process has said whether the device has grown; `None` from one that does not know how.
    #[serde(default)]
    pub(crate) answers: Option<u64>,
    /// Why not, the last time.
    #[serde(default)]
    pub(crate) not_grown: Option<String>,
    /// Why the process ended in failure.
    pub(crate) error: Option<String>,
    /// After such a failure: whether the process took the device away, whose number others may have by now.
    pub(crate) device_gone: bool,
    /// For the next server of the device.
    pub(crate) resume: Resume,
}

impl State {
    /// Describes a device that this process is about to make. It has no name yet.
    pub(crate) fn of_this_process(
        transport: Transport,
        image: &Path,
        geometry: Geometry,
        log: String,
        resume: Resume,
    ) -> Result<Self> {
        let pid = std::process::id();
        let start_time = process::start_time(pid).ok_or_else(|| Failure::new("/proc is not mounted"))?;
        let image = image.to_string_lossy().into_owned();
        Ok(Self {
            version: VERSION,
            device: PathBuf::new(),
            transport,
            image,
            size: geometry.size,
            read_only: geometry.read_only,
            pid,
            start_time,
            log,
            ready: false,
            poisoned: None,
            answers: Some(0),
            not_grown: None,
            error: None,
            device_gone: false,
            resume,
        })
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

    /// Who serves the device.
    pub(crate) fn server(&self) -> ServerId<'_> {
        ServerId { pid: self.pid, start_time: self.start_time, image: &self.image }
    }

    /// For `list`: `live`, `dead`, `poisoned` (it is only read any more), `starting`, which is what a device is before it can be used, or
    /// `recovering`.
    pub(crate) fn word(&self) -> &'static str {
        match (self.is_live(), self.ready) {
            (true, true) if self.poisoned.is_some() => "poisoned",
            (true, true) => "live",
            (true, false) if self.resume.taking_over => "recovering",
            (true, false) => "starting",
            (false, _) => "dead",
        }
    }

    /// Why it is not live, as far as its process could say.
    pub(crate) fn reason(&self) -> Option<&str> {
        self.error.as_deref().or(self.poisoned.as_deref())
    }

    pub(crate) fn is_of_same_process(&self, other: &Self) -> bool {
        (self.pid, self.start_time) == (other.pid, other.start_time)
    }
}

/// The directory of the state files.
pub(crate) struct StateDir(PathBuf);

impl StateDir {
    /// The one of this host.
    pub(crate) fn host() -> &'static Self {
        static HOST: LazyLock<StateDir> = LazyLock::new(|| StateDir(PathBuf::from("/run/vdisk")));
        &HOST
    }

    #[cfg(test)]
    pub(crate) fn at(path: PathBuf) -> Self {
        Self(path)
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }

    /// Makes the directory unless it is there, for all to read whatever the umask is.
    pub(crate) fn create(&self) -> Result<()> {
        let made = match fs::DirBuilder::new().mode(0o755).create(&self.0) {
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            made => made.and_then(|()| fs::set_permissions(&self.0, Permissions::from_mode(0o755))),
        };
        made.map_err(|e| Failure::doing(format_args!("create {}", self.0.display()), &e))
    }

    fn file(&self, state: &State) -> PathBuf {
        self.0.join(format!("{}.json", state.device_name()))
    }

    /// Waits for the lock on the books, which only root can take: `/run/vdisk.lock`.
    pub(crate) fn lock(&self) -> Result<Books<'_>> {
        let path = self.0.with_extension("lock");
        let lock = || -> io::Result<File> {
            let no_link = i32::try_from(OFlags::NOFOLLOW.bits()).unwrap_or_default();
            let file = fs::OpenOptions::new().write(true).create(true).mode(0o600).custom_flags(no_link).open(&path)?;
            file.lock()?;
            Ok(file)
        };
        let lock = lock().map_err(|e| Failure::doing(format_args!("lock {}", path.display()), &e))?;
        Ok(Books { dir: self, lock })
    }

    /// Notes that a sync of a device's image has failed. Without a lock, and before the sync is answered: a next server must not believe in
    /// one that succeeds.
    pub(crate) fn mark_poisoned(&self, cookie: u64, why: &str) -> Result<()> {
        let mark = self.mark(cookie);
        write_new(&mark, why.as_bytes()).map_err(|e| Failure::doing(format_args!("write {}", mark.display()), &e))
    }

    /// What [`StateDir::mark_poisoned`] noted.
    pub(crate) fn why_poisoned(&self, cookie: u64) -> Option<String> {
        fs::read(self.mark(cookie)).ok().map(|why| String::from_utf8_lossy(&why).into_owned())
    }

    fn mark(&self, cookie: u64) -> PathBuf {
        self.0.join(format!("{cookie:016x}.poisoned"))
    }

    /// All that is attached, by device name. A file that cannot be read is reported on stderr and left out.
    pub(crate) fn list(&self) -> Result<Vec<State>> {
        let (states, unread) = self.read_all()?;
        unread.iter().for_each(|failure| crate::notice(&failure.to_string()));
        Ok(states)
    }

    /// All that is attached, by device name, and why files could not be read.
    pub(crate) fn read_all(&self) -> Result<(Vec<State>, Vec<Failure>)> {
        let entries = match fs::read_dir(&self.0) {
            Ok(entries) => entries,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok((Vec::new(), Vec::new())),
            Err(e) => return Err(Failure::doing(self.0.display(), &e)),
        };
        let (mut states, mut unread) = (Vec::new(), Vec::new());
        for entry in entries.flatten() {
            let path = entry.path();
            if path.extension().is_none_or(|e| e != "json") {
                continue;
            }
            match read(&path) {
                Ok(state) => states.push(state),
                Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                Err(e) => unread.push(Failure::doing(path.display(), &e)),
            }
        }
        states.sort_by(|a, b| order(a.device_name()).cmp(&order(b.device_name())));
        Ok((states, unread))
    }
}

/// The right to change the books: nobody else adds, changes or removes a file, or makes a device, while this is held.
pub(crate) struct Books<'a> {
    dir: &'a StateDir,
    lock: File,
}

impl Drop for Books<'_> {
    /// Closing the file alone would not do: threads with a table of descriptors of their own hold it too.
    fn drop(&mut self) {
        if let Err(e) = self.lock.unlock() {
            tracing::error!("unlock the books: {e}");
        }
    }
}

impl Books<'_> {
    /// Writes a state file, whole or not at all. What it replaces belonged to a device that is gone.
    pub(crate) fn write(&self, state: &State) -> Result<()> {
        let file = self.dir.file(state);
        let write = || -> io::Result<()> {
            let new = self.dir.0.join(format!(".{}.{}", state.device_name(), state.pid));
            let written = write_new(&new, &serde_json::to_vec(state)?).and_then(|()| fs::rename(&new, &file));
            if written.is_err() {
                let _ = fs::remove_file(&new);
            }
            written
        };
        write().map_err(|e| Failure::doing(format_args!("write {}", file.display()), &e))
    }

    /// Writes a state file anew, unless it was removed or belongs to another process by now.
    pub(crate) fn update(&self, state: &State) -> Result<()> {
        if self.reread(state).is_some() { self.write(state) } else { Ok(()) }
    }

    /// Removes the file of `state`, unless it belongs to another process by now.
    pub(crate) fn remove(&self, state: &State) -> Result<()> {
        let file = self.dir.file(state);
        let removed = match read(&file) {
            // It may be the next server of the same device.
            Ok(found) if !found.is_of_same_process(state) => return Ok(()),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
            _ => fs::remove_file(&file),
        };
        let _ = fs::remove_file(self.dir.mark(state.resume.cookie));
        removed.map_err(|e| Failure::doing(format_args!("remove {}", file.display()), &e))
    }

    /// Removes what a process left that died while it was writing a state file: nobody else is writing one.
    pub(crate) fn sweep(&self) {
        for entry in fs::read_dir(&self.dir.0).into_iter().flatten().flatten() {
            if entry.file_name().as_encoded_bytes().starts_with(b".") {
                let removed = fs::remove_file(entry.path());
                tracing::info!("remove {}: {removed:?}", entry.path().display());
            }
        }
    }

    /// What the file of `state` says now, if it is still there and of the same process.
    pub(crate) fn reread(&self, state: &State) -> Option<State> {
        read(&self.dir.file(state)).ok().filter(|found| found.is_of_same_process(state))
    }
}

/// A file for all to read, whatever the umask is.
fn write_new(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut out = fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o644).open(path)?;
    out.set_permissions(Permissions::from_mode(0o644))?;
    out.write_all(bytes)
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
        let geometry = Geometry { size: 10 << 20, read_only: false, preferred_block: 4096 };
        let path = Path::new("/a \"b\".vmdk");
        let resume = Resume::of_path(path.to_owned());
        let state = State::of_this_process(Transport::Nbd, path, geometry, log, resume).unwrap();
        State { device: PathBuf::from(device), ..state }
    }

    /// A directory of state files, empty or not made yet, in one that goes away with the test.
    fn dir(temp: &tempfile::TempDir, made: bool) -> StateDir {
        let dir = StateDir(temp.path().join("vdisk"));
        if made {
            dir.create().unwrap();
        }
        dir
    }

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().permissions().mode() & 0o7777
    }

    #[test]
    fn a_state_file_comes_back_as_it_was_written() {
        let temp = tempfile::tempdir().unwrap();
        let dir = dir(&temp, false);
        assert_eq!(dir.list().unwrap(), []);
        dir.create().unwrap();
        for device in ["/dev/nbd10", "/dev/nbd9", "/dev/ublkb0"] {
            dir.lock().unwrap().write(&state(device)).unwrap();
        }
        assert_eq!((mode(&dir.0), mode(&dir.0.join("nbd9.json"))), (0o755, 0o644));
        assert_eq!(dir.list().unwrap(), [state("/dev/nbd9"), state("/dev/nbd10"), state("/dev/ublkb0")]);
        assert!(dir.list().unwrap().iter().all(|state| state.word() == "starting"));
    }

    #[test]
    fn the_lock_is_not_in_the_directory_and_only_for_its_owner() {
        let temp = tempfile::tempdir().unwrap();
        let dir = dir(&temp, true);
        let books = dir.lock().unwrap();
        let path = temp.path().join("vdisk.lock");
        assert_eq!((mode(&path), fs::read_dir(&dir.0).unwrap().count()), (0o600, 0));
        let other = File::open(&path).unwrap();
        assert!(other.try_lock().is_err());
        drop(books);
        other.try_lock().unwrap();
    }

    #[test]
    fn a_state_is_starting_until_it_is_ready_and_dead_with_its_process_or_an_error() {
        let starting = state("/dev/nbd0");
        let live = State { ready: true, ..starting.clone() };
        let failed = State { error: Some("EIO".into()), ..live.clone() };
        let killed = State { start_time: 1, ..starting.clone() };
        let poisoned = State { poisoned: Some("sync: EIO".into()), ..live.clone() };
        let words = [&starting, &live, &failed, &killed, &poisoned].map(State::word);
        assert_eq!(words, ["starting", "live", "dead", "dead", "poisoned"]);
        let reasons = [&live, &failed, &poisoned].map(State::reason);
        assert_eq!(reasons, [None, Some("EIO"), Some("sync: EIO")]);
        let mut taken_over = starting.clone();
        taken_over.resume.taking_over = true;
        assert_eq!(taken_over.word(), "recovering");
    }

    #[test]
    fn who_serves_and_has_never_heard_of_growing_is_known_by_its_file() {
        let mut file = serde_json::to_value(state("/dev/nbd0")).unwrap();
        assert_eq!(file["answers"], 0);
        let fields = file.as_object_mut().unwrap();
        assert!(fields.remove("answers").is_some() && fields.remove("not_grown").is_some());
        assert_eq!(serde_json::from_value::<State>(file).unwrap().answers, None);
    }

    #[test]
    fn a_file_of_another_process_is_not_removed() {
        let temp = tempfile::tempdir().unwrap();
        let dir = dir(&temp, true);
        let books = dir.lock().unwrap();
        let theirs = State { start_time: 1, ..state("/dev/nbd0") };
        books.write(&theirs).unwrap();
        books.update(&state("/dev/nbd0")).unwrap();
        books.remove(&state("/dev/nbd0")).unwrap();
        assert_eq!(dir.list().unwrap(), std::slice::from_ref(&theirs));
        assert!(!theirs.is_live());
        assert_eq!(books.reread(&state("/dev/nbd0")), None);
        books.remove(&theirs).unwrap();
        books.remove(&theirs).unwrap();
        books.update(&theirs).unwrap();
        assert_eq!(dir.list().unwrap(), []);
    }

    #[test]
    fn a_file_that_was_not_finished_is_swept_away_and_the_others_stay() {
        let temp = tempfile::tempdir().unwrap();
        let dir = dir(&temp, true);
        fs::write(dir.0.join(".nbd0.1"), "{").unwrap();
        let books = dir.lock().unwrap();
        books.write(&state("/dev/nbd0")).unwrap();
        books.sweep();
        assert_eq!((dir.list().unwrap().len(), fs::read_dir(&dir.0).unwrap().count()), (1, 1));
    }

    #[test]
    fn broken_files_are_left_out_and_told() {
        let temp = tempfile::tempdir().unwrap();
        let dir = dir(&temp, true);
        fs::write(dir.0.join("nbd0.json"), "{").unwrap();
        fs::write(dir.0.join("nbd1.json"), serde_json::to_vec(&state("/dev/nbd2")).unwrap()).unwrap();
        fs::write(dir.0.join("12.log"), "").unwrap();
        assert_eq!(dir.list().unwrap(), []);
        let mut unread: Vec<_> = dir.read_all().unwrap().1.iter().map(Failure::to_string).collect();
        unread.sort();
        assert!(unread[0].contains("nbd0.json") && unread[1].contains("describes /dev/nbd2"), "{unread:?}");
    }
}
