//! The two system calls that need unsafe code.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd};

use nix::libc;

/// Makes the kernel read the partition table again (`BLKRRPART`). EBUSY while a partition is open.
pub(super) fn reread_partitions(device: &File) -> io::Result<()> {
    // `_IO(0x12, 95)`, linux/fs.h.
    const BLKRRPART: libc::Ioctl = 0x125f;
    #[expect(unsafe_code, reason = "ioctl")]
    // SAFETY: the descriptor is open for as long as `device` is borrowed; this request takes no argument and so
    // touches no memory of ours.
    let result = unsafe { libc::ioctl(device.as_raw_fd(), BLKRRPART) };
    nix::errno::Errno::result(result)?;
    Ok(())
}

/// Asks for texts in refusals (`NETLINK_EXT_ACK`, Linux 4.12).
pub(super) fn want_extended_acks(socket: &impl AsFd) -> io::Result<()> {
    let on: libc::c_int = 1;
    let len = libc::socklen_t::try_from(size_of_val(&on)).map_err(io::Error::other)?;
    #[expect(unsafe_code, reason = "a socket option that nix does not know")]
    // SAFETY: the descriptor is open for as long as `socket` is borrowed; the pointer is to `on`, of `len` bytes, which
    // lives until after the call; the kernel only reads it.
    let result = unsafe {
        libc::setsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_NETLINK,
            libc::NETLINK_EXT_ACK,
            (&raw const on).cast(),
            len,
        )
    };
    nix::errno::Errno::result(result)?;
    Ok(())
}
