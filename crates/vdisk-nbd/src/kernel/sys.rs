//! The system calls that need unsafe code.

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

/// Makes the kernel forget a partition (`BLKPG_DEL_PARTITION`), without reading anything. EBUSY while it is open; that
/// the whole device is does not matter. ENXIO if there is none.
pub(super) fn delete_partition(device: &File, number: u32) -> io::Result<()> {
    // linux/blkpg.h; `_IO(0x12, 105)`.
    const BLKPG: libc::Ioctl = 0x1269;
    const BLKPG_DEL_PARTITION: libc::c_int = 2;
    #[repr(C)]
    struct Partition {
        start: libc::c_longlong,
        length: libc::c_longlong,
        number: libc::c_int,
        names: [u8; 2 * 64],
    }
    #[repr(C)]
    struct Argument {
        op: libc::c_int,
        flags: libc::c_int,
        len: libc::c_int,
        data: *mut libc::c_void,
    }
    let number = libc::c_int::try_from(number).map_err(io::Error::other)?;
    let len = libc::c_int::try_from(size_of::<Partition>()).map_err(io::Error::other)?;
    let mut partition = Partition { start: 0, length: 0, number, names: [0; 128] };
    let argument = Argument { op: BLKPG_DEL_PARTITION, flags: 0, len, data: (&raw mut partition).cast() };
    #[expect(unsafe_code, reason = "ioctl")]
    // SAFETY: the descriptor is open for as long as `device` is borrowed; `argument` and the `partition` that it points
    // to have the kernel's layouts and live until after the call, which keeps neither.
    let result = unsafe { libc::ioctl(device.as_raw_fd(), BLKPG, &raw const argument) };
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
