//! Handshake and option haggling with one client.

use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use vdisk_image::Geometry;

use super::reader::Reader;
use crate::codec::{
    ClientFlags, GREETING, Info, InfoRequest, OptionError, OptionHeader, OptionReply, OptionRequest,
    PAYLOAD_ADVERTISED, TransmissionFlags, export_name_reply,
};
use crate::error::ConnectionError;
use crate::export::Export;
use crate::stop::Stop;

/// How the handshake ended.
#[derive(Clone, Copy, Debug)]
pub(super) enum Agreed {
    Transmission { structured: bool },
    Leave,
}

pub(super) async fn handshake<R: AsyncRead + Unpin, W: AsyncWrite + Unpin>(
    reader: &mut Reader<R>,
    write: &mut W,
    geometry: &Geometry,
    export: &Export,
    stop: &Stop,
) -> Result<Agreed, ConnectionError> {
    write.write_all(&GREETING).await?;
    let Some(client) = next_frame(reader, stop).await? else { return Ok(Agreed::Leave) };
    let client = ClientFlags::decode(client)?;
    let mut haggling = Haggling { geometry, export, client, structured: false, out: Vec::new() };
    let mut data = Vec::new();
    loop {
        let Some(header) = next_frame(reader, stop).await? else { return Ok(Agreed::Leave) };
        let header = OptionHeader::decode(&header)?;
        data.resize(usize::try_from(header.len).unwrap_or_default(), 0);
        reader.exact(&mut data).await?;
        let agreed = haggling.option(header.option, &data, stop.is_stopped())?;
        write.write_all(&haggling.out).await?;
        haggling.out.clear();
        if let Some(agreed) = agreed {
            return Ok(agreed);
        }
    }
}

/// The next frame; `None` when the client has left, or is idle while the server stops.
async fn next_frame<const N: usize, R: AsyncRead + Unpin>(
    reader: &mut Reader<R>,
    stop: &Stop,
) -> Result<Option<[u8; N]>, ConnectionError> {
    loop {
        if let Some(bytes) = reader.take() {
            return Ok(Some(bytes));
        }
        tokio::select! {
            biased;
            n = reader.fill() => if n? == 0 {
                return if reader.is_empty() { Ok(None) } else { Err(eof()) };
            },
            () = stop.wait(), if reader.is_empty() => return Ok(None),
        }
    }
}

fn eof() -> ConnectionError {
    std::io::Error::from(std::io::ErrorKind::UnexpectedEof).into()
}

/// What is agreed so far, and the replies to be sent.
struct Haggling<'a> {
    geometry: &'a Geometry,
    export: &'a Export,
    client: ClientFlags,
    structured: bool,
    out: Vec<u8>,
}

impl Haggling<'_> {
    fn option(&mut self, option: u32, data: &[u8], stopping: bool) -> Result<Option<Agreed>, ConnectionError> {
        let request = match OptionRequest::parse(option, data) {
            Ok(OptionRequest::Abort) => {
                self.reply(option, OptionReply::Ack);
                return Ok(Some(Agreed::Leave));
            }
            Ok(OptionRequest::ExportName(_)) if stopping => return Err(ConnectionError::Stopping),
            _ if stopping => {
                self.reply(option, OptionReply::Error(OptionError::Shutdown, "the server is stopping"));
                return Ok(None);
            }
            Ok(request) => request,
            Err(refusal) => {
                self.reply(option, OptionReply::Error(refusal.error, refusal.text));
                return Ok(None);
            }
        };
        match request {
            OptionRequest::ExportName(name) if self.export.answers_to(name) => {
                self.out.extend(export_name_reply(self.geometry.size, self.flags(), !self.client.no_zeroes));
                return Ok(Some(Agreed::Transmission { structured: self.structured }));
            }
            OptionRequest::ExportName(name) => {
                let name = name.get(..name.len().min(256)).unwrap_or_default();
                return Err(ConnectionError::UnknownExport(String::from_utf8_lossy(name).into_owned()));
            }
            OptionRequest::Go(wanted) => {
                if self.info(option, &wanted) {
                    return Ok(Some(Agreed::Transmission { structured: self.structured }));
                }
            }
            OptionRequest::Info(wanted) => {
                self.info(option, &wanted);
            }
            OptionRequest::List => {
                let (name, description) = (self.export.name(), self.export.description());
                OptionReply::Server { name, description }.encode(option, &mut self.out);
                self.reply(option, OptionReply::Ack);
            }
            OptionRequest::StructuredReply => {
                self.structured = true;
                self.reply(option, OptionReply::Ack);
            }
            OptionRequest::Unsupported(_) => {
                self.reply(option, OptionReply::Error(OptionError::Unsup, "not supported"));
            }
            OptionRequest::Abort => return Ok(Some(Agreed::Leave)),
        }
        Ok(None)
    }

    /// Answers INFO and GO; whether the export exists.
    fn info(&mut self, option: u32, wanted: &InfoRequest<'_>) -> bool {
        if !self.export.answers_to(wanted.name) {
            self.reply(option, OptionReply::Error(OptionError::Unknown, "no such export"));
            return false;
        }
        self.reply(option, OptionReply::Info(Info::Export { size: self.geometry.size, flags: self.flags() }));
        if wanted.wants_name {
            OptionReply::Info(Info::Name(self.export.name())).encode(option, &mut self.out);
        }
        if let Some(text) = self.export.description().filter(|_| wanted.wants_description) {
            OptionReply::Info(Info::Description(text)).encode(option, &mut self.out);
        }
        // Also to those who did not ask: the preferred size helps, and they may ignore it.
        let preferred = preferred_block(self.geometry);
        self.reply(option, OptionReply::Info(Info::BlockSize { min: 1, preferred, max: PAYLOAD_ADVERTISED }));
        self.reply(option, OptionReply::Ack);
        true
    }

    fn flags(&self) -> TransmissionFlags {
        TransmissionFlags::of(self.geometry, self.structured)
    }

    fn reply(&mut self, option: u32, reply: OptionReply<'_>) {
        reply.encode(option, &mut self.out);
    }
}

/// A power of two between 512 and the maximum (proto.md, "Block size constraints").
fn preferred_block(geometry: &Geometry) -> u32 {
    geometry.preferred_block.clamp(512, PAYLOAD_ADVERTISED).next_power_of_two()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_preferred_block_keeps_the_rules() {
        for (image, told) in [(0, 512), (512, 512), (65536, 65536), (65537, 131_072), (u32::MAX, 32 << 20)] {
            let geometry = Geometry { size: 0, read_only: false, preferred_block: image };
            assert_eq!(preferred_block(&geometry), told);
        }
    }
}
