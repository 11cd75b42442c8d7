//! The bytes of the protocol: bytes in, frames out. No I/O, no runtime, no clock.
//!
//! Everything on the wire is big-endian. Nothing here panics on any input, and nothing is allocated by a length that a
//! peer names: decoders work on bytes that the caller already holds, after it checked their length by
//! [`OptionHeader::decode`] and [`RequestHeader::decode`].

mod errors;
mod handshake;
mod transmission;

pub use errors::{NbdError, ProtocolError, nbd_error};
pub use handshake::{
    CLIENT_FLAGS_LEN, ClientFlags, GREETING, Info, InfoRequest, MAX_OPTION_DATA, OPTION_HEADER_LEN, OptionError,
    OptionHeader, OptionReply, OptionRequest, Refusal, export_name_reply, option,
};
pub use transmission::{
    Command, ERROR_CHUNK_HEAD_LEN, MAX_PAYLOAD, OFFSET_DATA_HEAD_LEN, PAYLOAD_ADVERTISED, REQUEST_LEN, RequestHeader,
    SIMPLE_REPLY_LEN, TransmissionFlags, command_flag, error_chunk_head, none_chunk, offset_data_head, simple_reply,
};

/// Takes an integer off the front of `bytes`.
macro_rules! take {
    ($name:ident, $int:ty) => {
        pub(crate) fn $name(bytes: &mut &[u8]) -> Option<$int> {
            let (head, tail) = bytes.split_first_chunk()?;
            *bytes = tail;
            Some(<$int>::from_be_bytes(*head))
        }
    };
}
take!(take_u16, u16);
take!(take_u32, u32);
take!(take_u64, u64);

/// The length of a string that is known to be short, for the wire.
fn short_len(len: usize) -> u32 {
    u32::try_from(len).unwrap_or(u32::MAX)
}
