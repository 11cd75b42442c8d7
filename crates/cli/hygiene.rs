//! What a process must do that serves a block device of the host it runs on.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use rustix::mm::{MlockAllFlags, mlockall};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Keeps memory reclaim from waiting for this very process, which may be what writes the memory out. To be called before
/// there are other threads: they inherit it. Answers with what could not be done.
pub(crate) fn guard_against_reclaim() -> Option<String> {
    if let Err(e) = fs::write("/proc/self/oom_score_adj", "-1000") {
        tracing::info!("oom_score_adj stays as it is: {e}");
    }
    if let Err(e) = keep_in_memory() {
        tracing::info!("memory of this process may be swapped out: {e}");
    }
    let refused = rustix::process::configure_io_flusher_behavior(true).err()?;
    let refused = crate::failure::chain(&refused);
    Some(format!("no protection against a deadlock when memory runs out (PR_SET_IO_FLUSHER: {refused})"))
}

/// Whatever this process touches stays in memory, its program and the ledger too: what had to be read again might lie behind the device
/// that waits for it. Not without a limit to what may be locked, which later allocations would run into.
fn keep_in_memory() -> rustix::io::Result<()> {
    if getrlimit(Resource::Memlock).current.is_some() {
        setrlimit(Resource::Memlock, Rlimit { current: None, maximum: None })?;
    }
    mlockall(MlockAllFlags::CURRENT | MlockAllFlags::FUTURE | MlockAllFlags::ONFAULT)
}

/// Gives this process a mount namespace of its own, with nothing in it that would pin a file system of others or, worse,
/// one on the device that is served: the kernel would wait for this process while ending it.
///
/// The image must be open before: then it keeps the mount that it was opened through busy for everybody, as it should.
/// To be called before there are other threads.
pub(crate) fn leave_mounts() -> nix::Result<()> {
    unshare(CloneFlags::CLONE_NEWNS)?;
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>)?;
    // From here on no change to the mounts is seen outside.
    let needed = needed();
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    for place in mounts.lines().rev().filter_map(crate::in_use::parse).map(|mount| mount.place) {
        let place = Path::new(&place);
        // Fails for what went away with the mount it was on.
        if !holds_any(place, &needed) {
            let _ = umount2(place, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW);
        }
    }
    Ok(())
}

/// What is used after the mounts have gone: kernel file systems, the books, the journal, the service manager's socket. In
/// containers any of these may be a mount of its own.
fn needed() -> Vec<PathBuf> {
    let fixed =
        ["/proc", "/sys", "/dev", "/run/vdisk", "/run/vdisk.lock", "/run/ublksrvd", "/run/systemd/journal/socket"];
    let notify = env::var_os("NOTIFY_SOCKET").map(PathBuf::from).filter(|path| path.is_absolute());
    fixed.into_iter().map(PathBuf::from).chain(notify).collect()
}

/// Whether one of the paths goes through `place`.
fn holds_any(place: &Path, paths: &[PathBuf]) -> bool {
    paths.iter().any(|path| path.starts_with(place))
}

/// Closes the descriptors that whoever started this process left open: a background process would hold the other ends of
/// pipes for as long as it serves. To be called before it opens anything itself.
pub(crate) fn close_inherited() {
    let open = fs::read_dir("/proc/self/fd").into_iter().flatten().flatten();
    let open: Vec<i32> = open.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect();
    for fd in open.into_iter().filter(|fd| *fd > 2) {
        // Fails for the one that the directory was read by.
        let _ = nix::unistd::close(fd);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keeps_the_mounts_of_the_books_and_of_the_journal_only() {
        let needed = needed();
        let kept = |place| holds_any(Path::new(place), &needed);
        assert!(
            ["/", "/proc", "/dev", "/run", "/run/vdisk", "/run/systemd", "/run/systemd/journal"].into_iter().all(kept)
        );
        assert!(!["/home", "/run/media/me/stick", "/run/user/1000", "/dev/pts", "/run/vdisk2"].into_iter().any(kept));
    }
}
