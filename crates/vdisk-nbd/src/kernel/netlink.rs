//! Generic netlink messages: bytes only. Everything is in the host's byte order (`netlink.h`, `genetlink.h`).

use super::error::KernelError;

/// Of the family that knows the others.
pub(super) const GENL_ID_CTRL: u16 = 0x10;
pub(super) const CTRL_CMD_GETFAMILY: u8 = 3;
pub(super) const CTRL_ATTR_FAMILY_ID: u16 = 1;
pub(super) const CTRL_ATTR_FAMILY_NAME: u16 = 2;

const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
const NLM_F_CAPPED: u16 = 0x100;
const NLM_F_ACK_TLVS: u16 = 0x200;
const NLMSG_ERROR: u16 = 2;
const NLMSGERR_ATTR_MSG: u16 = 1;
const NLA_F_NESTED: u16 = 0x8000;
const NLA_TYPE_MASK: u16 = 0x3fff;
const HEADER_LEN: usize = 16;
const GENL_HEADER_LEN: usize = 4;
const ATTRIBUTE_HEADER_LEN: usize = 4;

/// A request under construction.
#[derive(Debug)]
pub(super) struct Message(Vec<u8>);

impl Message {
    /// A request to a family; it will be acknowledged.
    pub(super) fn new(family: u16, command: u8, sequence: u32) -> Self {
        let mut bytes = vec![0; 4];
        bytes.extend(family.to_ne_bytes());
        bytes.extend((NLM_F_REQUEST | NLM_F_ACK).to_ne_bytes());
        bytes.extend(sequence.to_ne_bytes());
        bytes.extend([0; 4]);
        bytes.extend([command, 1, 0, 0]);
        Self(bytes)
    }

    /// Appends an attribute. Values here are far shorter than the 64 KiB that its length can tell.
    pub(super) fn attribute(mut self, kind: u16, value: &[u8]) -> Self {
        let len = u16::try_from(value.len() + ATTRIBUTE_HEADER_LEN).unwrap_or(u16::MAX);
        self.0.extend(len.to_ne_bytes());
        self.0.extend(kind.to_ne_bytes());
        self.0.extend(value);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
        self
    }

    pub(super) fn u32(self, kind: u16, value: u32) -> Self {
        self.attribute(kind, &value.to_ne_bytes())
    }

    pub(super) fn u64(self, kind: u16, value: u64) -> Self {
        self.attribute(kind, &value.to_ne_bytes())
    }

    /// A string with its NUL.
    pub(super) fn string(self, kind: u16, value: &str) -> Self {
        let mut bytes = value.as_bytes().to_vec();
        bytes.push(0);
        self.attribute(kind, &bytes)
    }

    /// An attribute made of attributes.
    pub(super) fn nested(self, kind: u16, inner: impl FnOnce(Self) -> Self) -> Self {
        let inner = inner(Self(Vec::new()));
        self.attribute(kind | NLA_F_NESTED, &inner.0)
    }

    /// The bytes, with their length in front.
    pub(super) fn finish(mut self) -> Vec<u8> {
        let len = u32::try_from(self.0.len()).unwrap_or(u32::MAX);
        for (to, from) in self.0.iter_mut().zip(len.to_ne_bytes()) {
            *to = from;
        }
        self.0
    }
}

/// What came back for one request.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Answer {
    attributes: Vec<(u16, Vec<u8>)>,
    /// Present once the acknowledgement came.
    pub(super) result: Option<Result<(), KernelError>>,
}

impl Answer {
    /// Takes in the messages of a datagram that answer the request of that number. What is cut off is ignored.
    pub(super) fn take(&mut self, mut datagram: &[u8], sequence: u32) {
        while let Some((len, header)) = Header::decode(datagram) {
            let Some(message) = datagram.get(HEADER_LEN..len) else { return };
            if header.sequence == sequence && header.kind == NLMSG_ERROR {
                self.result = Some(acknowledgement(message, header.flags));
            } else if header.sequence == sequence {
                let found = attributes(message.get(GENL_HEADER_LEN..).unwrap_or_default());
                self.attributes.extend(found.into_iter().map(|(kind, value)| (kind, value.to_vec())));
            }
            datagram = datagram.get(len.next_multiple_of(4)..).unwrap_or_default();
        }
    }

    pub(super) fn u16(&self, kind: u16) -> Option<u16> {
        Some(u16::from_ne_bytes(*self.value(kind)?.first_chunk()?))
    }

    pub(super) fn u32(&self, kind: u16) -> Option<u32> {
        Some(u32::from_ne_bytes(*self.value(kind)?.first_chunk()?))
    }

    fn value(&self, kind: u16) -> Option<&[u8]> {
        self.attributes.iter().find(|(k, _)| *k == kind).map(|(_, value)| value.as_slice())
    }
}

struct Header {
    kind: u16,
    flags: u16,
    sequence: u32,
}

impl Header {
    /// The header and the length of the message with it.
    fn decode(bytes: &[u8]) -> Option<(usize, Self)> {
        let len = usize::try_from(u32_at(bytes, 0)?).ok().filter(|len| *len >= HEADER_LEN)?;
        Some((len, Self { kind: u16_at(bytes, 4)?, flags: u16_at(bytes, 6)?, sequence: u32_at(bytes, 8)? }))
    }
}

/// The meaning of NLMSG_ERROR: an errno (0 is success), the request (whole or its header), attributes.
fn acknowledgement(message: &[u8], flags: u16) -> Result<(), KernelError> {
    let Some(error) = message.first_chunk().map(|b| i32::from_ne_bytes(*b)) else {
        return Err(KernelError { errno: nix::libc::EPROTO, text: Some("a short acknowledgement".into()) });
    };
    if error == 0 {
        return Ok(());
    }
    let text = (flags & NLM_F_ACK_TLVS != 0).then(|| extended_text(message, flags)).flatten();
    Err(KernelError { errno: error.saturating_neg(), text })
}

fn extended_text(message: &[u8], flags: u16) -> Option<String> {
    let request = if flags & NLM_F_CAPPED != 0 { HEADER_LEN } else { usize::try_from(u32_at(message, 4)?).ok()? };
    let extra = message.get(4..)?.get(request.checked_next_multiple_of(4)?..)?;
    let (_, text) = attributes(extra).into_iter().find(|(kind, _)| *kind == NLMSGERR_ATTR_MSG)?;
    let text = text.split(|b| *b == 0).next().unwrap_or_default();
    Some(String::from_utf8_lossy(text).into_owned())
}

fn attributes(mut bytes: &[u8]) -> Vec<(u16, &[u8])> {
    let mut found = Vec::new();
    while let (Some(len), Some(kind)) = (u16_at(bytes, 0), u16_at(bytes, 2)) {
        let Some(value) = bytes.get(ATTRIBUTE_HEADER_LEN..usize::from(len)) else { break };
        found.push((kind & NLA_TYPE_MASK, value));
        bytes = bytes.get(usize::from(len).next_multiple_of(4)..).unwrap_or_default();
    }
    found
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(*bytes.get(at..)?.first_chunk()?))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(*bytes.get(at..)?.first_chunk()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[cfg(target_endian = "little")]
    #[test]
    fn a_request_has_these_bytes() {
        let message = Message::new(0x1c, 1, 7).u32(1, 3).string(10, "ab").nested(7, |m| m.nested(1, |m| m.u32(1, 9)));
        assert_eq!(
            message.finish(),
            b"\x34\0\0\0\x1c\0\x05\0\x07\0\0\0\0\0\0\0\x01\x01\0\0\
              \x08\0\x01\0\x03\0\0\0\
              \x07\0\x0a\0ab\0\0\
              \x10\0\x07\x80\x0c\0\x01\x80\x08\0\x01\0\x09\0\0\0"
        );
    }

    /// An NLMSG_ERROR for request 7 whose own header and 4 bytes of payload follow.
    fn refusal(errno: i32, flags: u16, text: &str) -> Vec<u8> {
        let request = Message::new(0x1c, 1, 7).finish();
        let echoed = if flags & NLM_F_CAPPED != 0 { &request[..HEADER_LEN] } else { &request[..] };
        let mut body = (-errno).to_ne_bytes().to_vec();
        body.extend(echoed);
        let body = Message(body).string(NLMSGERR_ATTR_MSG, text).0;
        let mut out = u32::try_from(HEADER_LEN + body.len()).unwrap().to_ne_bytes().to_vec();
        out.extend(NLMSG_ERROR.to_ne_bytes());
        out.extend(flags.to_ne_bytes());
        out.extend(7_u32.to_ne_bytes());
        out.extend([0; 4]);
        out.extend(body);
        out
    }

    #[test]
    fn a_refusal_carries_the_kernels_own_words() {
        for flags in [NLM_F_ACK_TLVS, NLM_F_ACK_TLVS | NLM_F_CAPPED] {
            let mut answer = Answer::default();
            answer.take(&refusal(16, flags, "nbd0 already in use"), 7);
            let expected = KernelError { errno: 16, text: Some("nbd0 already in use".into()) };
            assert_eq!(answer.result, Some(Err(expected)));
        }
        let mut answer = Answer::default();
        answer.take(&refusal(22, 0, "not announced by the flag"), 7);
        assert_eq!(answer.result, Some(Err(KernelError { errno: 22, text: None })));
    }

    #[test]
    fn a_reply_and_its_acknowledgement_may_share_a_datagram() {
        let mut datagram = Message::new(0x1c, 1, 7).u32(1, 12).finish();
        datagram.extend(refusal(0, NLM_F_CAPPED, ""));
        let mut answer = Answer::default();
        answer.take(&datagram, 7);
        assert_eq!((answer.u32(1), answer.result), (Some(12), Some(Ok(()))));
    }

    #[test]
    fn answers_to_other_requests_are_ignored() {
        let mut answer = Answer::default();
        answer.take(&refusal(16, 0, ""), 8);
        assert_eq!(answer, Answer::default());
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(mut bytes in proptest::collection::vec(any::<u8>(), 0..200), len in 0_u32..210) {
            Answer::default().take(&bytes, 7);
            let mut header = len.to_ne_bytes().to_vec();
            header.extend(NLMSG_ERROR.to_ne_bytes());
            header.extend(NLM_F_ACK_TLVS.to_ne_bytes());
            header.extend(7_u32.to_ne_bytes());
            header.extend([0; 4]);
            header.append(&mut bytes);
            Answer::default().take(&header, 7);
        }
    }
}
