//! Handshake and option haggling (proto.md, "Handshake" and "Option types").

use super::{ProtocolError, TransmissionFlags, short_len, take_u16, take_u32, take_u64};
use crate::export::{MAX_NAME, clip};

/// What the server says first: fixed newstyle, and zeroes can be left out.
pub const GREETING: [u8; 18] = *b"NBDMAGICIHAVEOPT\x00\x03";

/// Bytes of the client's answer to the greeting.
pub const CLIENT_FLAGS_LEN: usize = 4;

/// Bytes of an option's header.
pub const OPTION_HEADER_LEN: usize = 16;

/// Most data of one option in bytes: room for a meta context query of many names, and cheap to hold.
pub const MAX_OPTION_DATA: u32 = 64 << 10;

const IHAVEOPT: u64 = 0x4948_4156_454F_5054;
const REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
const FIXED_NEWSTYLE: u32 = 1;
const NO_ZEROES: u32 = 2;

/// Option numbers.
#[expect(missing_docs, reason = "the names are the specification's")]
pub mod option {
    pub const EXPORT_NAME: u32 = 1;
    pub const ABORT: u32 = 2;
    pub const LIST: u32 = 3;
    pub const STARTTLS: u32 = 5;
    pub const INFO: u32 = 6;
    pub const GO: u32 = 7;
    pub const STRUCTURED_REPLY: u32 = 8;
    pub const LIST_META_CONTEXT: u32 = 9;
    pub const SET_META_CONTEXT: u32 = 10;
    pub const EXTENDED_HEADERS: u32 = 11;
}

mod info {
    pub(super) const EXPORT: u16 = 0;
    pub(super) const NAME: u16 = 1;
    pub(super) const DESCRIPTION: u16 = 2;
    pub(super) const BLOCK_SIZE: u16 = 3;
}

/// The client's answer to the greeting.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClientFlags {
    /// The client knows that unknown options get an answer.
    pub fixed_newstyle: bool,
    /// The answer to EXPORT_NAME ends without 124 zeroes.
    pub no_zeroes: bool,
}

impl ClientFlags {
    /// Decodes them.
    ///
    /// # Errors
    ///
    /// [`ProtocolError::UnknownClientFlags`]
    pub fn decode(bytes: [u8; CLIENT_FLAGS_LEN]) -> Result<Self, ProtocolError> {
        let flags = u32::from_be_bytes(bytes);
        if flags & !(FIXED_NEWSTYLE | NO_ZEROES) != 0 {
            return Err(ProtocolError::UnknownClientFlags(flags));
        }
        Ok(Self { fixed_newstyle: flags & FIXED_NEWSTYLE != 0, no_zeroes: flags & NO_ZEROES != 0 })
    }
}

/// An option's header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OptionHeader {
    /// Which option, see [`option`].
    pub option: u32,
    /// Bytes of data that follow; at most [`MAX_OPTION_DATA`].
    pub len: u32,
}

impl OptionHeader {
    /// Decodes it.
    ///
    /// # Errors
    ///
    /// [`ProtocolError::BadOptionMagic`], [`ProtocolError::OptionTooLong`]
    pub fn decode(bytes: &[u8; OPTION_HEADER_LEN]) -> Result<Self, ProtocolError> {
        let mut rest = bytes.as_slice();
        let magic = take_u64(&mut rest).unwrap_or_default();
        let option = take_u32(&mut rest).unwrap_or_default();
        let len = take_u32(&mut rest).unwrap_or_default();
        if magic != IHAVEOPT {
            return Err(ProtocolError::BadOptionMagic(magic));
        }
        if len > MAX_OPTION_DATA {
            return Err(ProtocolError::OptionTooLong { option, len });
        }
        Ok(Self { option, len })
    }
}

/// What the client asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum OptionRequest<'a> {
    /// Begin transmission on the export of this name. The only answer to "no" is to hang up.
    ExportName(&'a [u8]),
    /// The client is about to go.
    Abort,
    /// Which exports are there?
    List,
    /// What is this export like?
    Info(InfoRequest<'a>),
    /// The same, and begin transmission on it.
    Go(InfoRequest<'a>),
    /// Replies may be structured.
    StructuredReply,
    /// Something that is not supported, or not known.
    Unsupported(u32),
}

/// The data of INFO and GO.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InfoRequest<'a> {
    /// The export's name.
    pub name: &'a [u8],
    /// The client wants to know the canonical name.
    pub wants_name: bool,
    /// The client wants a description.
    pub wants_description: bool,
    /// The client heeds block sizes.
    pub wants_block_size: bool,
}

/// Why an option gets an error instead of what it asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// The error.
    pub error: OptionError,
    /// The reason, for people.
    pub text: &'static str,
}

impl<'a> OptionRequest<'a> {
    /// Decodes an option's data.
    ///
    /// # Errors
    ///
    /// The error reply that the client is to get: after any of them the next option is read.
    pub fn parse(option: u32, data: &'a [u8]) -> Result<Self, Refusal> {
        let invalid = |text| Err(Refusal { error: OptionError::Invalid, text });
        match option {
            option::EXPORT_NAME => Ok(Self::ExportName(data)),
            option::ABORT => Ok(Self::Abort),
            option::LIST if data.is_empty() => Ok(Self::List),
            option::LIST => invalid("LIST has no data"),
            option::STRUCTURED_REPLY if data.is_empty() => Ok(Self::StructuredReply),
            option::STRUCTURED_REPLY => invalid("STRUCTURED_REPLY has no data"),
            option::INFO => InfoRequest::parse(data).map(Self::Info),
            option::GO => InfoRequest::parse(data).map(Self::Go),
            other => Ok(Self::Unsupported(other)),
        }
    }
}

impl<'a> InfoRequest<'a> {
    fn parse(data: &'a [u8]) -> Result<Self, Refusal> {
        let invalid = |text| Refusal { error: OptionError::Invalid, text };
        let mut rest = data;
        let truncated = || invalid("the data is truncated");
        let name_len = take_u32(&mut rest).and_then(|n| usize::try_from(n).ok()).ok_or_else(truncated)?;
        let (name, tail) = rest.split_at_checked(name_len).ok_or_else(truncated)?;
        if name_len > MAX_NAME {
            return Err(Refusal { error: OptionError::TooBig, text: "a name has at most 4096 bytes" });
        }
        rest = tail;
        let count = usize::from(take_u16(&mut rest).ok_or_else(truncated)?);
        if rest.len() != count.saturating_mul(2) {
            return Err(invalid("the number of information requests does not fit the data"));
        }
        let mut request = Self { name, wants_name: false, wants_description: false, wants_block_size: false };
        while let Some(wanted) = take_u16(&mut rest) {
            match wanted {
                info::NAME => request.wants_name = true,
                info::DESCRIPTION => request.wants_description = true,
                info::BLOCK_SIZE => request.wants_block_size = true,
                _ => {}
            }
        }
        Ok(request)
    }
}

/// Error replies to options (proto.md, "Option reply types").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum OptionError {
    /// ERR_UNSUP: not known or not supported here.
    Unsup = 0x8000_0001,
    /// ERR_INVALID: the data makes no sense.
    Invalid = 0x8000_0003,
    /// ERR_UNKNOWN: no such export.
    Unknown = 0x8000_0006,
    /// ERR_SHUTDOWN: the server is stopping.
    Shutdown = 0x8000_0007,
    /// ERR_TOO_BIG: more than the server takes.
    TooBig = 0x8000_0009,
}

/// One reply to an option.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OptionReply<'a> {
    /// Done.
    Ack,
    /// One export of LIST.
    Server {
        /// Its name.
        name: &'a str,
        /// For people.
        description: Option<&'a str>,
    },
    /// One piece of INFO and GO.
    Info(Info<'a>),
    /// Refused, with a text for people.
    Error(OptionError, &'a str),
}

/// What INFO and GO tell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Info<'a> {
    /// Size in bytes, and what the export can do.
    Export {
        /// Bytes.
        size: u64,
        /// What it can do.
        flags: TransmissionFlags,
    },
    /// The canonical name.
    Name(&'a str),
    /// A text for people.
    Description(&'a str),
    /// Block sizes in bytes (proto.md, "Block size constraints").
    BlockSize {
        /// Smallest unit.
        min: u32,
        /// Best unit.
        preferred: u32,
        /// Largest request.
        max: u32,
    },
}

impl OptionReply<'_> {
    /// Appends the reply to `out`.
    pub fn encode(&self, option: u32, out: &mut Vec<u8>) {
        let mut data = Vec::new();
        let kind: u32 = match self {
            Self::Ack => 1,
            Self::Server { name, description } => {
                let name = clip(name);
                data.extend(short_len(name.len()).to_be_bytes());
                data.extend(name.as_bytes());
                data.extend(clip(description.unwrap_or_default()).as_bytes());
                2
            }
            Self::Info(info) => {
                info.encode(&mut data);
                3
            }
            Self::Error(error, text) => {
                data.extend(clip(text).as_bytes());
                *error as u32
            }
        };
        out.extend(REPLY_MAGIC.to_be_bytes());
        out.extend(option.to_be_bytes());
        out.extend(kind.to_be_bytes());
        out.extend(short_len(data.len()).to_be_bytes());
        out.extend(data);
    }
}

impl Info<'_> {
    fn encode(&self, data: &mut Vec<u8>) {
        match *self {
            Self::Export { size, flags } => {
                data.extend(info::EXPORT.to_be_bytes());
                data.extend(size.to_be_bytes());
                data.extend(flags.wire().to_be_bytes());
            }
            Self::Name(name) => {
                data.extend(info::NAME.to_be_bytes());
                data.extend(clip(name).as_bytes());
            }
            Self::Description(text) => {
                data.extend(info::DESCRIPTION.to_be_bytes());
                data.extend(clip(text).as_bytes());
            }
            Self::BlockSize { min, preferred, max } => {
                data.extend(info::BLOCK_SIZE.to_be_bytes());
                data.extend(min.to_be_bytes());
                data.extend(preferred.to_be_bytes());
                data.extend(max.to_be_bytes());
            }
        }
    }
}

/// The answer to EXPORT_NAME; it has no header.
pub fn export_name_reply(size: u64, flags: TransmissionFlags, zeroes: bool) -> Vec<u8> {
    let mut out = Vec::with_capacity(134);
    out.extend(size.to_be_bytes());
    out.extend(flags.wire().to_be_bytes());
    if zeroes {
        out.extend([0; 124]);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn info_data(name: &[u8], wanted: &[u16]) -> Vec<u8> {
        let mut data = short_len(name.len()).to_be_bytes().to_vec();
        data.extend(name);
        data.extend(u16::try_from(wanted.len()).unwrap().to_be_bytes());
        data.extend(wanted.iter().flat_map(|w| w.to_be_bytes()));
        data
    }

    fn encoded(option: u32, reply: OptionReply<'_>) -> Vec<u8> {
        let mut out = Vec::new();
        reply.encode(option, &mut out);
        out
    }

    #[test]
    fn the_greeting_has_both_magics_and_both_flags() {
        assert_eq!(&GREETING, b"NBDMAGIC\x49\x48\x41\x56\x45\x4f\x50\x54\x00\x03");
    }

    #[test]
    fn client_flags_that_were_not_offered_are_refused() {
        assert_eq!(ClientFlags::decode([0, 0, 0, 3]), Ok(ClientFlags { fixed_newstyle: true, no_zeroes: true }));
        assert_eq!(ClientFlags::decode([0; 4]), Ok(ClientFlags { fixed_newstyle: false, no_zeroes: false }));
        assert_eq!(ClientFlags::decode([0, 0, 0, 4]), Err(ProtocolError::UnknownClientFlags(4)));
        assert_eq!(ClientFlags::decode([128, 0, 0, 3]), Err(ProtocolError::UnknownClientFlags(0x8000_0003)));
    }

    #[test]
    fn an_option_header_is_checked_before_its_data() {
        let header = |magic: &[u8; 8], len: u32| {
            let mut bytes = [0; 16];
            bytes[..8].copy_from_slice(magic);
            bytes[8..12].copy_from_slice(&7_u32.to_be_bytes());
            bytes[12..].copy_from_slice(&len.to_be_bytes());
            OptionHeader::decode(&bytes)
        };
        assert_eq!(header(b"IHAVEOPT", 65536), Ok(OptionHeader { option: 7, len: 65536 }));
        assert_eq!(header(b"IHAVEOPT", 65537), Err(ProtocolError::OptionTooLong { option: 7, len: 65537 }));
        assert!(matches!(header(b"IHAVEOPS", 0), Err(ProtocolError::BadOptionMagic(_))));
    }

    #[test]
    fn a_go_with_unknown_information_requests_is_understood() {
        let data = info_data(b"disk", &[0, 3, 1, 0xbeef]);
        let expected =
            InfoRequest { name: b"disk", wants_name: true, wants_description: false, wants_block_size: true };
        assert_eq!(OptionRequest::parse(option::GO, &data), Ok(OptionRequest::Go(expected)));
    }

    #[test]
    fn lengths_that_do_not_fit_are_invalid_at_every_cut() {
        let data = info_data(b"disk", &[1, 2]);
        for end in 0..data.len() {
            let refusal = OptionRequest::parse(option::INFO, &data[..end]).unwrap_err();
            assert_eq!(refusal.error, OptionError::Invalid, "{end} bytes");
        }
        let mut long = data;
        long.push(0);
        assert!(OptionRequest::parse(option::INFO, &long).is_err());
    }

    #[test]
    fn a_name_of_4096_bytes_is_the_longest() {
        assert!(OptionRequest::parse(option::GO, &info_data(&[b'x'; 4096], &[])).is_ok());
        let refusal = OptionRequest::parse(option::GO, &info_data(&[b'x'; 4097], &[])).unwrap_err();
        assert_eq!(refusal.error, OptionError::TooBig);
    }

    #[test]
    fn options_without_data_refuse_data() {
        for option in [option::LIST, option::STRUCTURED_REPLY] {
            assert!(OptionRequest::parse(option, &[]).is_ok());
            assert_eq!(OptionRequest::parse(option, &[0]).unwrap_err().error, OptionError::Invalid);
        }
        assert_eq!(OptionRequest::parse(option::ABORT, b"bye"), Ok(OptionRequest::Abort));
    }

    #[test]
    fn option_replies_have_these_bytes() {
        assert_eq!(
            encoded(7, OptionReply::Ack),
            b"\x00\x03\xe8\x89\x04\x55\x65\xa9\x00\x00\x00\x07\x00\x00\x00\x01\x00\x00\x00\x00"
        );
        assert_eq!(
            encoded(3, OptionReply::Server { name: "ab", description: Some("c") })[16..],
            *b"\x00\x00\x00\x07\x00\x00\x00\x02abc"
        );
        let export = Info::Export { size: 0x1_0000_0000, flags: TransmissionFlags::HAS_FLAGS };
        assert_eq!(
            encoded(6, OptionReply::Info(export))[12..],
            *b"\x00\x00\x00\x03\x00\x00\x00\x0c\x00\x00\x00\x00\x00\x01\x00\x00\x00\x00\x00\x01"
        );
        let sizes = Info::BlockSize { min: 1, preferred: 65536, max: 32 << 20 };
        assert_eq!(
            encoded(6, OptionReply::Info(sizes))[16..],
            *b"\x00\x00\x00\x0e\x00\x03\x00\x00\x00\x01\x00\x01\x00\x00\x02\x00\x00\x00"
        );
        assert_eq!(
            encoded(9, OptionReply::Error(OptionError::Unsup, "no"))[12..],
            *b"\x80\x00\x00\x01\x00\x00\x00\x02no"
        );
    }

    #[test]
    fn the_answer_to_export_name_ends_with_zeroes_unless_told_otherwise() {
        assert_eq!(export_name_reply(5, TransmissionFlags::HAS_FLAGS, false), [0, 0, 0, 0, 0, 0, 0, 5, 0, 1]);
        assert_eq!(export_name_reply(5, TransmissionFlags::HAS_FLAGS, true).len(), 134);
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(option in 0_u32..16, data in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = OptionRequest::parse(option, &data);
            if let Some(bytes) = data.first_chunk() { let _ = OptionHeader::decode(bytes); }
            if let Some(bytes) = data.first_chunk() { let _ = ClientFlags::decode(*bytes); }
        }

        #[test]
        fn what_a_client_asks_for_is_what_is_understood(
            name in proptest::collection::vec(any::<u8>(), 0..100),
            wanted in proptest::collection::vec(0_u16..6, 0..8),
        ) {
            let data = info_data(&name, &wanted);
            let Ok(OptionRequest::Info(request)) = OptionRequest::parse(option::INFO, &data) else {
                return Err(TestCaseError::fail("not understood"));
            };
            prop_assert_eq!(request.name, &name[..]);
            prop_assert_eq!(request.wants_name, wanted.contains(&1));
            prop_assert_eq!(request.wants_description, wanted.contains(&2));
            prop_assert_eq!(request.wants_block_size, wanted.contains(&3));
        }
    }
}
