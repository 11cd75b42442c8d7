//! The commands of the family `nbd` (`include/uapi/linux/nbd-netlink.h`).

use std::fs;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::thread::sleep;
use std::time::{Duration, Instant};

use nix::libc;

use super::error::{AttachError, KernelError};
use super::netlink::{CTRL_ATTR_FAMILY_ID, CTRL_ATTR_FAMILY_NAME, CTRL_CMD_GETFAMILY, GENL_ID_CTRL, Message};
use super::socket::Netlink;
use super::sysfs::Sysfs;
use crate::codec::TransmissionFlags;

const NBD_CMD_CONNECT: u8 = 1;
const NBD_CMD_DISCONNECT: u8 = 2;
const NBD_CMD_RECONFIGURE: u8 = 3;
const NBD_ATTR_INDEX: u16 = 1;
const NBD_ATTR_SIZE_BYTES: u16 = 2;
const NBD_ATTR_BLOCK_SIZE_BYTES: u16 = 3;
const NBD_ATTR_TIMEOUT: u16 = 4;
const NBD_ATTR_SERVER_FLAGS: u16 = 5;
const NBD_ATTR_CLIENT_FLAGS: u16 = 6;
const NBD_ATTR_SOCKETS: u16 = 7;
const NBD_ATTR_DEAD_CONN_TIMEOUT: u16 = 8;
const NBD_ATTR_BACKEND_IDENTIFIER: u16 = 10;
const NBD_SOCK_ITEM: u16 = 1;
const NBD_SOCK_FD: u16 = 1;

/// Partition tables count in logical blocks: the kernel's default of 1024 would put every partition in the wrong place.
const BLOCK_SIZE: u64 = 512;

/// udev opens a device as soon as it is there, and for that moment it is busy.
const BUSY_FOR: Duration = Duration::from_secs(5);
const BUSY_POLL: Duration = Duration::from_millis(50);

/// What the kernel is told about a device.
#[derive(Clone, Debug)]
pub struct Connect<'a> {
    /// Which `/dev/nbdN`; the kernel picks a free one, or makes a new one, when there is none.
    pub index: Option<u32>,
    /// Size in bytes, a multiple of 512.
    pub size: u64,
    /// What the server can do; more than one socket needs [`TransmissionFlags::CAN_MULTI_CONN`].
    pub flags: TransmissionFlags,
    /// A request that takes longer is sent again on another socket, and the slow one is given up. Whole seconds, at
    /// least one: 0 would leave a device the timeout of its last user, or 30 s.
    pub timeout: Duration,
    /// How long requests wait for new sockets after the last one was lost, in whole seconds.
    pub dead_connection_timeout: Duration,
    /// Who serves the device; in `/sys/block/nbdN/backend` since Linux 5.14, as [`backend_id`] cuts it.
    pub backend_id: &'a str,
    /// The kernel's ends of the socket pairs. It keeps its own references.
    pub sockets: Vec<BorrowedFd<'a>>,
}

impl Connect<'_> {
    fn attributes(&self, message: Message) -> Message {
        let message = match self.index {
            Some(index) => message.u32(NBD_ATTR_INDEX, index),
            None => message,
        };
        message
            .u64(NBD_ATTR_SIZE_BYTES, self.size)
            .u64(NBD_ATTR_BLOCK_SIZE_BYTES, BLOCK_SIZE)
            .u64(NBD_ATTR_TIMEOUT, self.timeout.as_secs().max(1))
            .u64(NBD_ATTR_DEAD_CONN_TIMEOUT, self.dead_connection_timeout.as_secs())
            .u64(NBD_ATTR_SERVER_FLAGS, self.flags.wire().into())
            .u64(NBD_ATTR_CLIENT_FLAGS, 0)
            .string(NBD_ATTR_BACKEND_IDENTIFIER, &backend_id(self.backend_id))
            .nested(NBD_ATTR_SOCKETS, |mut message| {
                for socket in &self.sockets {
                    let fd = socket.as_raw_fd().to_ne_bytes();
                    message = message.nested(NBD_SOCK_ITEM, |item| item.attribute(NBD_SOCK_FD, &fd));
                }
                message
            })
    }
}

/// What the kernel is told, and shows in sysfs, of a text that names a server: at most its first 255 bytes.
pub fn backend_id(text: &str) -> String {
    // It is a C string for the kernel.
    let text = text.split('\0').next().unwrap_or_default();
    text.get(..text.floor_char_boundary(255)).unwrap_or_default().to_owned()
}

/// Whether this kernel's client can be used by this process, or why not. Loading the module is left to the caller,
/// who can choose its `max_part`.
///
/// # Errors
///
/// The reason, for people.
pub fn available() -> Result<(), String> {
    let mut netlink = Netlink::open().map_err(|e| format!("no generic netlink: {e}"))?;
    family(&mut netlink).map_err(|e| match e.errno {
        libc::ENOENT => "the kernel's nbd module is not loaded".to_owned(),
        _ => format!("look up the nbd driver: {e}"),
    })?;
    if may_administrate() { Ok(()) } else { Err("attaching by nbd needs CAP_SYS_ADMIN".into()) }
}

/// Makes a device of sockets (`nbd_genl_connect`) and returns its index. A busy device is tried again for 5 s.
///
/// # Errors
///
/// The kernel's refusal.
pub fn connect(connect: &Connect<'_>) -> Result<u32, AttachError> {
    let what = || match connect.index {
        Some(index) => format!("connect /dev/nbd{index}"),
        None => "connect an nbd device".to_owned(),
    };
    let failed = |e: KernelError| AttachError::new(what(), e);
    let mut netlink = Netlink::open().map_err(failed)?;
    let family = family(&mut netlink).map_err(failed)?;
    let started = Instant::now();
    loop {
        match netlink.request(family, NBD_CMD_CONNECT, |message| connect.attributes(message)) {
            Ok(answer) => {
                let index = answer.u32(NBD_ATTR_INDEX).or(connect.index);
                return index.ok_or_else(|| AttachError::new(what(), "the kernel did not say which device it took"));
            }
            Err(e) if e.errno == libc::EBUSY && started.elapsed() < BUSY_FOR => sleep(BUSY_POLL),
            Err(e) => return Err(failed(e)),
        }
    }
}

/// Takes a device down (`nbd_genl_disconnect`): requests that are not answered yet fail with EIO, at once even if the
/// server is dead. A device that is not connected is no error.
///
/// # Errors
///
/// The kernel's refusal; EINVAL when there is no such device.
pub fn disconnect(index: u32) -> Result<(), AttachError> {
    let failed = |e: KernelError| AttachError::new(format!("disconnect /dev/nbd{index}"), e);
    let mut netlink = Netlink::open().map_err(failed)?;
    let family = family(&mut netlink).map_err(failed)?;
    netlink.request(family, NBD_CMD_DISCONNECT, |message| message.u32(NBD_ATTR_INDEX, index)).map_err(failed)?;
    Ok(())
}

/// Tells the kernel how many bytes a connected device has now (`nbd_genl_reconfigure`), all of which requests may ask for
/// already. `server` is what [`Connect::backend_id`] was: another's device is left alone (since Linux 5.14).
///
/// # Errors
///
/// The kernel's refusal.
pub fn grow(index: u32, size: u64, server: &str) -> Result<(), AttachError> {
    let what = || format!("make /dev/nbd{index} larger");
    let failed = |e: KernelError| AttachError::new(what(), e);
    let mut netlink = Netlink::open().map_err(failed)?;
    let family = family(&mut netlink).map_err(failed)?;
    let attributes = |message: Message| {
        let message = message.u32(NBD_ATTR_INDEX, index).u64(NBD_ATTR_SIZE_BYTES, size);
        message.string(NBD_ATTR_BACKEND_IDENTIFIER, &backend_id(server))
    };
    netlink.request(family, NBD_CMD_RECONFIGURE, attributes).map_err(failed)?;
    match Sysfs::of(index).size() {
        Some(now) if now != size => Err(AttachError::new(what(), format!("the kernel leaves it at {now} bytes"))),
        _ => Ok(()),
    }
}

/// The number of the family; it changes from boot to boot.
fn family(netlink: &mut Netlink) -> Result<u16, KernelError> {
    let answer = netlink.request(GENL_ID_CTRL, CTRL_CMD_GETFAMILY, |m| m.string(CTRL_ATTR_FAMILY_NAME, "nbd"))?;
    answer.u16(CTRL_ATTR_FAMILY_ID).ok_or(KernelError { errno: libc::ENOENT, text: None })
}

/// Whether this process has CAP_SYS_ADMIN, as far as it can know.
fn may_administrate() -> bool {
    const CAP_SYS_ADMIN: u32 = 21;
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let effective = effective.and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok());
    effective.is_none_or(|capabilities| capabilities >> CAP_SYS_ADMIN & 1 == 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    #[cfg(target_endian = "little")]
    #[test]
    fn connect_has_these_bytes() {
        let (a, b) = std::os::unix::net::UnixStream::pair().unwrap();
        let mut request = Connect {
            index: Some(5),
            size: 1 << 30,
            flags: TransmissionFlags::HAS_FLAGS.and(TransmissionFlags::CAN_MULTI_CONN),
            timeout: Duration::from_secs(30),
            dead_connection_timeout: Duration::from_secs(60),
            backend_id: "id",
            sockets: vec![a.as_fd(), b.as_fd()],
        };
        let mut expected = b"\x98\0\0\0\x1c\0\x05\0\x01\0\0\0\0\0\0\0\x01\x01\0\0\
            \x08\0\x01\0\x05\0\0\0\
            \x0c\0\x02\0\0\0\0\x40\0\0\0\0\
            \x0c\0\x03\0\0\x02\0\0\0\0\0\0\
            \x0c\0\x04\0\x1e\0\0\0\0\0\0\0\
            \x0c\0\x08\0\x3c\0\0\0\0\0\0\0\
            \x0c\0\x05\0\x01\x01\0\0\0\0\0\0\
            \x0c\0\x06\0\0\0\0\0\0\0\0\0\
            \x07\0\x0a\0id\0\0\
            \x1c\0\x07\x80"
            .to_vec();
        for socket in &request.sockets {
            expected.extend(b"\x0c\0\x01\x80\x08\0\x01\0");
            expected.extend(socket.as_raw_fd().to_ne_bytes());
        }
        expected[0] = u8::try_from(expected.len()).unwrap();
        assert_eq!(request.attributes(Message::new(0x1c, NBD_CMD_CONNECT, 1)).finish(), expected);

        request.index = None;
        expected.drain(20..28);
        expected[0] -= 8;
        assert_eq!(request.attributes(Message::new(0x1c, NBD_CMD_CONNECT, 1)).finish(), expected);
    }

    #[test]
    fn a_long_backend_id_is_cut_between_characters() {
        let id = "\u{20ac}".repeat(100);
        let request = Connect {
            index: None,
            size: 512,
            flags: TransmissionFlags::HAS_FLAGS,
            timeout: Duration::ZERO,
            dead_connection_timeout: Duration::ZERO,
            backend_id: &id,
            sockets: vec![],
        };
        assert_eq!((backend_id(&id).len(), backend_id("short\0er")), (255, "short".to_owned()));
        let bytes = request.attributes(Message::new(0x1c, NBD_CMD_CONNECT, 1)).finish();
        assert!(bytes.windows(4).any(|w| w == [4, 1, 10, 0].map(|b: u8| b)), "255 bytes, the NUL and the header");
    }

    #[test]
    fn the_kernel_answers_a_lookup() {
        // With or without the driver: the exchange itself works, and a missing family has its own reason.
        if let Err(reason) = available() {
            assert!(
                ["module is not loaded", "CAP_SYS_ADMIN", "netlink"].iter().any(|r| reason.contains(r)),
                "{reason}"
            );
        }
    }
}
