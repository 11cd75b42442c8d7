//! Transmission: requests, simple replies and structured replies (proto.md, "Transmission", "Structured reply types").

use vdisk_image::Geometry;

use super::{NbdError, ProtocolError, short_len, take_u16, take_u32, take_u64};
use crate::export::clip;

/// Bytes of a request's header.
pub const REQUEST_LEN: usize = 28;
/// Bytes of a simple reply.
pub const SIMPLE_REPLY_LEN: usize = 16;
/// Bytes of an OFFSET_DATA chunk before its data.
pub const OFFSET_DATA_HEAD_LEN: usize = 28;
/// Bytes of an ERROR chunk before its text.
pub const ERROR_CHUNK_HEAD_LEN: usize = 26;

/// Most bytes that one read or write may carry. Twice what is advertised: clients exist that go beyond (the reference
/// suite's `integrityhuge` writes 47.6 MiB at once).
pub const MAX_PAYLOAD: u32 = 64 << 20;
/// Most bytes of one read or write that clients are told.
pub const PAYLOAD_ADVERTISED: u32 = 32 << 20;

const REQUEST_MAGIC: u32 = 0x2560_9513;
const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
const CHUNK_MAGIC: u32 = 0x668e_33ef;
const CHUNK_FLAG_DONE: u16 = 1;
const CHUNK_NONE: u16 = 0;
const CHUNK_OFFSET_DATA: u16 = 1;
const CHUNK_ERROR: u16 = 0x8001;

/// What an export can do (proto.md, "Transmission flags").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TransmissionFlags(u16);

impl TransmissionFlags {
    /// Always there.
    pub const HAS_FLAGS: Self = Self(1);
    /// No request may change anything.
    pub const READ_ONLY: Self = Self(1 << 1);
    /// FLUSH works.
    pub const SEND_FLUSH: Self = Self(1 << 2);
    /// The flag FUA works, on every command.
    pub const SEND_FUA: Self = Self(1 << 3);
    /// TRIM works.
    pub const SEND_TRIM: Self = Self(1 << 5);
    /// WRITE_ZEROES works, and its flag NO_HOLE.
    pub const SEND_WRITE_ZEROES: Self = Self(1 << 6);
    /// The flag DF works; after structured replies only.
    pub const SEND_DF: Self = Self(1 << 7);
    /// A flush on one connection covers the writes of all.
    pub const CAN_MULTI_CONN: Self = Self(1 << 8);

    /// What a disk can do on a connection, with or without structured replies.
    pub fn of(geometry: &Geometry, structured: bool) -> Self {
        let mut flags = Self::HAS_FLAGS.and(Self::SEND_FLUSH).and(Self::SEND_FUA).and(Self::CAN_MULTI_CONN);
        flags = if geometry.read_only {
            flags.and(Self::READ_ONLY)
        } else {
            flags.and(Self::SEND_TRIM).and(Self::SEND_WRITE_ZEROES)
        };
        if structured { flags.and(Self::SEND_DF) } else { flags }
    }

    /// These and `more`.
    #[must_use]
    pub const fn and(self, more: Self) -> Self {
        Self(self.0 | more.0)
    }

    /// Whether all of `flags` are among them.
    pub const fn contains(self, flags: Self) -> bool {
        self.0 & flags.0 == flags.0
    }

    /// The value on the wire.
    pub const fn wire(self) -> u16 {
        self.0
    }
}

/// Flags of a request.
#[expect(missing_docs, reason = "the names are the specification's")]
pub mod command_flag {
    pub const FUA: u16 = 1;
    pub const NO_HOLE: u16 = 1 << 1;
    pub const DF: u16 = 1 << 2;
}

/// What a request does (proto.md, "Request types").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// READ
    Read,
    /// WRITE: the payload follows the header.
    Write,
    /// DISC: the client goes; there is no reply.
    Disc,
    /// FLUSH
    Flush,
    /// TRIM
    Trim,
    /// WRITE_ZEROES
    WriteZeroes,
    /// Something that is not known or was not offered.
    Other(u16),
}

impl Command {
    fn from_wire(kind: u16) -> Self {
        match kind {
            0 => Self::Read,
            1 => Self::Write,
            2 => Self::Disc,
            3 => Self::Flush,
            4 => Self::Trim,
            6 => Self::WriteZeroes,
            other => Self::Other(other),
        }
    }

    fn wire(self) -> u16 {
        match self {
            Self::Read => 0,
            Self::Write => 1,
            Self::Disc => 2,
            Self::Flush => 3,
            Self::Trim => 4,
            Self::WriteZeroes => 6,
            Self::Other(other) => other,
        }
    }

    /// The flags that it may carry.
    pub fn allowed_flags(self, structured: bool) -> u16 {
        match self {
            Self::Read if structured => command_flag::FUA | command_flag::DF,
            Self::WriteZeroes => command_flag::FUA | command_flag::NO_HOLE,
            Self::Read | Self::Write | Self::Disc | Self::Flush | Self::Trim => command_flag::FUA,
            Self::Other(_) => u16::MAX,
        }
    }
}

/// A request's header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RequestHeader {
    /// See [`command_flag`].
    pub flags: u16,
    /// What to do.
    pub command: Command,
    /// The client's own number for the request; the reply carries it.
    pub cookie: u64,
    /// First byte on the disk.
    pub offset: u64,
    /// Bytes. For a write, at most [`MAX_PAYLOAD`] of them follow.
    pub len: u32,
}

impl RequestHeader {
    /// Decodes it.
    ///
    /// # Errors
    ///
    /// [`ProtocolError::BadRequestMagic`], [`ProtocolError::WriteTooLong`]: it is not known where the next request
    /// begins, or not worth the wait.
    pub fn decode(bytes: &[u8; REQUEST_LEN]) -> Result<Self, ProtocolError> {
        let mut rest = bytes.as_slice();
        let magic = take_u32(&mut rest).unwrap_or_default();
        if magic != REQUEST_MAGIC {
            return Err(ProtocolError::BadRequestMagic(magic));
        }
        let header = Self {
            flags: take_u16(&mut rest).unwrap_or_default(),
            command: Command::from_wire(take_u16(&mut rest).unwrap_or_default()),
            cookie: take_u64(&mut rest).unwrap_or_default(),
            offset: take_u64(&mut rest).unwrap_or_default(),
            len: take_u32(&mut rest).unwrap_or_default(),
        };
        if header.command == Command::Write && header.len > MAX_PAYLOAD {
            return Err(ProtocolError::WriteTooLong(header.len));
        }
        Ok(header)
    }

    /// Encodes it: a client's part.
    pub fn encode(&self) -> [u8; REQUEST_LEN] {
        join([
            &REQUEST_MAGIC.to_be_bytes(),
            &self.flags.to_be_bytes(),
            &self.command.wire().to_be_bytes(),
            &self.cookie.to_be_bytes(),
            &self.offset.to_be_bytes(),
            &self.len.to_be_bytes(),
        ])
    }
}

/// A simple reply; the data of a successful read follows it.
pub fn simple_reply(cookie: u64, error: Option<NbdError>) -> [u8; SIMPLE_REPLY_LEN] {
    let error = error.map_or(0, NbdError::wire);
    join([&SIMPLE_REPLY_MAGIC.to_be_bytes(), &error.to_be_bytes(), &cookie.to_be_bytes()])
}

/// The only chunk of a reply that has no data.
pub fn none_chunk(cookie: u64) -> [u8; 20] {
    join([&chunk_head(CHUNK_NONE, cookie, 0)])
}

/// The head of the only chunk of a read; `len` bytes of data follow (1 to [`MAX_PAYLOAD`]).
pub fn offset_data_head(cookie: u64, offset: u64, len: u32) -> [u8; OFFSET_DATA_HEAD_LEN] {
    join([&chunk_head(CHUNK_OFFSET_DATA, cookie, len.saturating_add(8)), &offset.to_be_bytes()])
}

/// The head of the only chunk of a failed request, and the text that follows (cut to what the protocol can carry).
pub fn error_chunk_head(cookie: u64, error: NbdError, text: &str) -> ([u8; ERROR_CHUNK_HEAD_LEN], &str) {
    let text = clip(text);
    let text_len = u16::try_from(text.len()).unwrap_or(u16::MAX);
    let chunk = chunk_head(CHUNK_ERROR, cookie, short_len(text.len()).saturating_add(6));
    (join([&chunk, &error.wire().to_be_bytes(), &text_len.to_be_bytes()]), text)
}

fn chunk_head(kind: u16, cookie: u64, len: u32) -> [u8; 20] {
    join([
        &CHUNK_MAGIC.to_be_bytes(),
        &CHUNK_FLAG_DONE.to_be_bytes(),
        &kind.to_be_bytes(),
        &cookie.to_be_bytes(),
        &len.to_be_bytes(),
    ])
}

/// The parts one after the other; together they have `N` bytes.
fn join<const N: usize, const PARTS: usize>(parts: [&[u8]; PARTS]) -> [u8; N] {
    let mut out = [0; N];
    for (to, from) in out.iter_mut().zip(parts.into_iter().flatten()) {
        *to = *from;
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const DISK: Geometry = Geometry { size: 1 << 20, read_only: false, preferred_block: 65536 };

    #[test]
    fn a_request_has_these_bytes() {
        let header = RequestHeader { flags: 3, command: Command::WriteZeroes, cookie: 0x0102, offset: 512, len: 4096 };
        let bytes = *b"\x25\x60\x95\x13\x00\x03\x00\x06\0\0\0\0\0\0\x01\x02\0\0\0\0\0\0\x02\0\0\0\x10\0";
        assert_eq!(header.encode(), bytes);
        assert_eq!(RequestHeader::decode(&bytes), Ok(header));
    }

    #[test]
    fn replies_have_these_bytes() {
        assert_eq!(simple_reply(7, None), *b"\x67\x44\x66\x98\0\0\0\0\0\0\0\0\0\0\0\x07");
        assert_eq!(simple_reply(7, Some(NbdError::NoSpace)), *b"\x67\x44\x66\x98\0\0\0\x1c\0\0\0\0\0\0\0\x07");
        assert_eq!(none_chunk(7), *b"\x66\x8e\x33\xef\0\x01\0\0\0\0\0\0\0\0\0\x07\0\0\0\0");
        assert_eq!(
            offset_data_head(7, 512, 16),
            *b"\x66\x8e\x33\xef\0\x01\0\x01\0\0\0\0\0\0\0\x07\0\0\0\x18\0\0\0\0\0\0\x02\0"
        );
        let (head, text) = error_chunk_head(7, NbdError::Io, "bad");
        assert_eq!(head, *b"\x66\x8e\x33\xef\0\x01\x80\x01\0\0\0\0\0\0\0\x07\0\0\0\x09\0\0\0\x05\0\x03");
        assert_eq!(text, "bad");
    }

    #[test]
    fn a_long_text_is_cut() {
        let long = "x".repeat(5000);
        let (head, text) = error_chunk_head(1, NbdError::Io, &long);
        assert_eq!(text.len(), 4096);
        assert_eq!(head[16..20], 4102_u32.to_be_bytes());
    }

    #[test]
    fn a_write_of_64_mib_is_the_longest_and_other_commands_may_be_longer() {
        let decode = |command, len| {
            RequestHeader::decode(&RequestHeader { flags: 0, command, cookie: 0, offset: 0, len }.encode())
        };
        assert!(decode(Command::Write, 64 << 20).is_ok());
        assert_eq!(decode(Command::Write, (64 << 20) + 1), Err(ProtocolError::WriteTooLong((64 << 20) + 1)));
        for command in [Command::Read, Command::Trim, Command::WriteZeroes, Command::Other(9)] {
            assert!(decode(command, u32::MAX).is_ok());
        }
    }

    #[test]
    fn a_read_only_disk_offers_no_changes_and_df_comes_with_structured_replies() {
        let writable = TransmissionFlags::of(&DISK, false);
        assert_eq!(writable.wire(), 0b1_0110_1101);
        let read_only = TransmissionFlags::of(&Geometry { read_only: true, ..DISK }, true);
        assert_eq!(read_only.wire(), 0b1_1000_1111);
        assert!(read_only.contains(TransmissionFlags::READ_ONLY) && !writable.contains(TransmissionFlags::SEND_DF));
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(bytes in any::<[u8; REQUEST_LEN]>()) {
            let _ = RequestHeader::decode(&bytes);
        }

        #[test]
        fn a_request_survives_the_wire(flags: u16, kind: u16, cookie: u64, offset: u64, len in 0..=MAX_PAYLOAD) {
            let header = RequestHeader { flags, command: Command::from_wire(kind), cookie, offset, len };
            prop_assert_eq!(RequestHeader::decode(&header.encode()), Ok(header));
        }
    }
}
