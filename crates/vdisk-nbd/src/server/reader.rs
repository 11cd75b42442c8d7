//! Reads frames: many small ones by one system call, large payloads straight into place.

use std::io;

use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt};

use super::terms::progress;

/// Fifteen writes of 4 KiB and their headers.
const CAPACITY: usize = 64 << 10;
/// What a client does that stalls.
const SENT: &str = "sent";

/// A stream with what was read from it and not taken yet.
#[derive(Debug)]
pub(super) struct Reader<R> {
    stream: R,
    buffer: Box<[u8]>,
    start: usize,
    end: usize,
    /// How long a payload may make no progress.
    stall: Option<Duration>,
}

impl<R: AsyncRead + Unpin> Reader<R> {
    pub(super) fn new(stream: R, stall: Option<Duration>) -> Self {
        Self { stream, buffer: vec![0; CAPACITY].into_boxed_slice(), start: 0, end: 0, stall }
    }

    fn ready(&self) -> &[u8] {
        self.buffer.get(self.start..self.end).unwrap_or_default()
    }

    /// Whether nothing is left of what was read.
    pub(super) fn is_empty(&self) -> bool {
        self.start == self.end
    }

    /// Takes `N` bytes, if that many were read.
    pub(super) fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let bytes = *self.ready().first_chunk()?;
        self.start += N;
        Some(bytes)
    }

    /// Reads some more. 0 is the end of the stream. Nothing is lost if the future is dropped.
    pub(super) async fn fill(&mut self) -> io::Result<usize> {
        if self.is_empty() {
            (self.start, self.end) = (0, 0);
        } else if self.end == self.buffer.len() {
            self.buffer.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        let n = self.stream.read(self.buffer.get_mut(self.end..).unwrap_or_default()).await?;
        self.end += n;
        Ok(n)
    }

    /// Fills `to`.
    pub(super) async fn exact(&mut self, to: &mut [u8]) -> io::Result<()> {
        let n = to.len().min(self.ready().len());
        let (head, mut tail) = to.split_at_mut(n);
        head.copy_from_slice(self.ready().get(..n).unwrap_or_default());
        self.start += n;
        while !tail.is_empty() {
            let n = progress(self.stall, SENT, self.stream.read(tail)).await?;
            if n == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            tail = tail.get_mut(n..).unwrap_or_default();
        }
        Ok(())
    }

    /// Throws `len` bytes away.
    pub(super) async fn skip(&mut self, mut len: u64) -> io::Result<()> {
        loop {
            let n = self.ready().len().min(usize::try_from(len).unwrap_or(usize::MAX));
            self.start += n;
            len -= n as u64;
            if len == 0 {
                return Ok(());
            }
            if progress(self.stall, SENT, self.fill()).await? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn frames_and_payloads_come_out_whole_whatever_the_stream_gives_at_once() {
        let bytes: Vec<u8> = (0..300_000_u32).map(|n| n.to_be_bytes()[3]).collect();
        let mut reader = Reader::new(&bytes[..], None);
        let mut at = 0_usize;
        for len in [1, 4096, 70_000, 3, 65_536, 100_000] {
            let frame: [u8; 28] = loop {
                match reader.take() {
                    Some(frame) => break frame,
                    None => assert_ne!(reader.fill().await.unwrap(), 0),
                }
            };
            assert_eq!(frame[..], bytes[at..at + 28]);
            let mut payload = vec![0; len];
            reader.exact(&mut payload).await.unwrap();
            assert_eq!(payload, bytes[at + 28..at + 28 + len]);
            reader.skip(5).await.unwrap();
            at += 28 + len + 5;
        }
        let left = (bytes.len() - at) as u64;
        assert!(reader.skip(left + 1).await.is_err());
    }
}
