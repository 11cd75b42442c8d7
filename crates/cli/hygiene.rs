//! What a process must do that serves a block device of the host it runs on.

use std::collections::HashSet;
use std::fs;
use std::path::Path;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};

/// Keeps memory reclaim from waiting for this very process, which may be what writes the memory out. To be called before
/// there are other threads: they inherit it. Answers with what could not be done.
pub(crate) fn guard_against_reclaim() -> Option<String> {
    if let Err(e) = fs::write("/proc/self/oom_score_adj", "-1000") {
        tracing::info!("oom_score_adj stays as it is: {e}");
    }
    let refused = rustix::process::configure_io_flusher_behavior(true).err()?;
    let refused = crate::failure::chain(&refused);
    Some(format!("no protection against a deadlock when memory runs out (PR_SET_IO_FLUSHER: {refused})"))
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
    let keep: HashSet<&str> = HashSet::from(["/", "/proc", "/sys", "/dev", "/run"]);
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    for place in mounts.lines().rev().filter_map(crate::in_use::parse).map(|mount| mount.place) {
        // Fails for what went away with the mount it was on.
        if !keep.contains(place.as_str()) {
            let _ = umount2(Path::new(&place), MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW);
        }
    }
    Ok(())
}
