//! What is left of a read or a write: which piece comes next, and what the kernel's answer to it means.

use std::io;
use std::ops::Range;

use crate::buf::Buf;
use crate::pages::RingBuf;

/// Bytes of one system call at most: a round number below the kernel's own bound (`MAX_RW_COUNT`, 2 GiB less a page).
const MAX_PIECE: usize = 1 << 30;

/// How often in a row EAGAIN is taken for "once more". A regular file or a block device has no reason to say it twice.
const MAX_AGAIN: u32 = 100;

/// Which way the bytes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Direction {
    /// From the file into the buffer.
    Read,
    /// From the buffer into the file.
    Write,
}

/// A read or write that ends whole or failed, however the kernel cuts it.
#[derive(Debug)]
pub(crate) struct Transfer<'a, B = Buf> {
    pub(crate) direction: Direction,
    buf: &'a B,
    rest: Range<usize>,
    offset: u64,
    refused_direct: bool,
    again: u32,
}

/// One system call's worth: `len` bytes at `start`, which lie inside the buffer (see [`RingBuf::part_ptr`]).
#[derive(Clone, Copy, Debug)]
pub(crate) struct Piece {
    pub(crate) start: *mut u8,
    pub(crate) len: u32,
    pub(crate) offset: u64,
    /// The file may go around the page cache, if it can for this piece.
    pub(crate) may_be_direct: bool,
}

impl<'a, B: RingBuf> Transfer<'a, B> {
    /// # Errors
    ///
    /// [`io::ErrorKind::InvalidInput`] for a range that ends past 2^63 - 1, which no file has (and io_uring would take
    /// the offset 2^64 - 1 for "where the file stands").
    pub(crate) fn new(direction: Direction, buf: &'a B, part: Range<usize>, offset: u64) -> io::Result<Self> {
        let _ = buf.part_ptr(&part);
        check_range(offset, part.len() as u64)?;
        Ok(Self { direction, buf, rest: part, offset, refused_direct: false, again: 0 })
    }

    /// What to ask the kernel next; `None` when everything is done.
    pub(crate) fn next_piece(&self) -> Option<Piece> {
        if self.rest.is_empty() {
            return None;
        }
        let len = u32::try_from(self.rest.len().min(MAX_PIECE)).expect("1 GiB fits");
        let start = self.buf.part_ptr(&self.rest);
        Some(Piece { start, len, offset: self.offset, may_be_direct: !self.refused_direct })
    }

    /// The part of the buffer that is left.
    pub(crate) fn rest(&self) -> Range<usize> {
        self.rest.clone()
    }

    /// Takes the kernel's answer to a piece: bytes, or an errno negated.
    ///
    /// # Errors
    ///
    /// What ends the transfer: the host's error, or the end of the file.
    pub(crate) fn advance(&mut self, piece: Piece, direct: bool, answer: i64) -> io::Result<()> {
        match answer {
            0 if self.direction == Direction::Read => Err(io::ErrorKind::UnexpectedEof.into()),
            0 => Err(io::ErrorKind::WriteZero.into()),
            1.. => {
                let bytes = answer.cast_unsigned().min(piece.len.into());
                self.offset += bytes;
                self.rest.start += usize::try_from(bytes).expect("at most a u32");
                self.again = 0;
                Ok(())
            }
            _ => self.failed(direct, i32::try_from(-answer).unwrap_or(libc::EIO)),
        }
    }

    fn failed(&mut self, direct: bool, errno: i32) -> io::Result<()> {
        match errno {
            libc::EINTR => Ok(()),
            libc::EAGAIN if self.again < MAX_AGAIN => {
                self.again += 1;
                Ok(())
            }
            // Its alignment is another than it says: open(2), NOTES, O_DIRECT.
            libc::EINVAL if direct => {
                self.refused_direct = true;
                Ok(())
            }
            _ => Err(io::Error::from_raw_os_error(errno)),
        }
    }
}

/// # Errors
///
/// [`io::ErrorKind::InvalidInput`] for a range that ends past 2^63 - 1.
pub(crate) fn check_range(offset: u64, len: u64) -> io::Result<()> {
    if offset.checked_add(len).is_none_or(|end| i64::try_from(end).is_err()) {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("{len} bytes at {offset}: no file is that large"),
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Answers the pieces of a transfer of `len` bytes at 100 in turn; what was asked for, and the end.
    fn run(direction: Direction, len: usize, answers: &[i64]) -> (Vec<(u64, u32)>, io::Result<()>) {
        let buf = Buf::new(len);
        let mut transfer = Transfer::new(direction, &buf, 0..len, 100).unwrap();
        let mut asked = Vec::new();
        for answer in answers {
            let piece = transfer.next_piece().expect("not at the end yet");
            assert_eq!(piece.start.addr() - buf.as_ptr().addr(), usize::try_from(piece.offset).unwrap() - 100);
            asked.push((piece.offset, piece.len));
            if let Err(e) = transfer.advance(piece, false, *answer) {
                return (asked, Err(e));
            }
        }
        assert!(transfer.next_piece().is_none());
        (asked, Ok(()))
    }

    #[test]
    fn a_short_transfer_goes_on_where_it_stopped() {
        for direction in [Direction::Read, Direction::Write] {
            let (asked, end) = run(direction, 10, &[3, 1, -4, -11, 6]);
            end.unwrap();
            assert_eq!(asked, [(100, 10), (103, 7), (104, 6), (104, 6), (104, 6)]);
        }
    }

    #[test]
    fn nothing_read_is_the_end_and_nothing_written_an_error() {
        let end = |direction| run(direction, 10, &[9, 0]).1.unwrap_err().kind();
        assert_eq!(end(Direction::Read), io::ErrorKind::UnexpectedEof);
        assert_eq!(end(Direction::Write), io::ErrorKind::WriteZero);
    }

    #[test]
    fn errors_of_the_host_end_it_and_so_does_eagain_without_end() {
        for errno in [libc::EIO, libc::ENOSPC, libc::EINVAL] {
            let (_, end) = run(Direction::Write, 10, &[5, i64::from(-errno)]);
            assert_eq!(end.unwrap_err().raw_os_error(), Some(errno));
        }
        let (asked, end) = run(Direction::Read, 10, &[-11; 200]);
        assert_eq!((asked.len(), end.unwrap_err().raw_os_error()), (101, Some(libc::EAGAIN)));
    }

    #[test]
    fn direct_io_that_is_refused_goes_through_the_page_cache() {
        let buf = Buf::new(512);
        let mut transfer = Transfer::new(Direction::Read, &buf, 0..512, 0).unwrap();
        let piece = transfer.next_piece().unwrap();
        assert!(piece.may_be_direct);
        transfer.advance(piece, true, i64::from(-libc::EINVAL)).unwrap();
        let piece = transfer.next_piece().unwrap();
        assert!(!piece.may_be_direct && (piece.offset, piece.len) == (0, 512));
    }

    #[test]
    fn the_last_byte_that_a_file_can_have_is_2_to_the_63_less_2() {
        let max = i64::MAX as u64;
        for (offset, len, ok) in [(max, 0, true), (max - 1, 1, true), (max, 1, false), (u64::MAX, 1, false)] {
            assert_eq!(check_range(offset, len).is_ok(), ok, "{len} at {offset}");
        }
    }
}
