//! The buffers of operations on a ring: memory, or the pages of a request that stay in the kernel (zero copy).

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::ptr;
use std::rc::Rc;

use crate::buf::Buf;

/// What an operation on a ring moves bytes to or from.
///
/// The functions that take a part of a buffer panic if it is none, as those of [`Buf`].
pub trait RingBuf: Clone + sealed::Sealed {
    /// A zeroed buffer in this process's own memory.
    fn alloc(len: usize) -> Self;

    /// As [`vdisk_image::FileIo::copy_in`].
    ///
    /// # Errors
    ///
    /// The kernel's, for a buffer that is not memory; so do the next two.
    fn copy_in(&self, at: usize, bytes: &[u8]) -> io::Result<()>;

    /// As [`vdisk_image::FileIo::copy_out`].
    ///
    /// # Errors
    ///
    /// The kernel's.
    fn copy_out(&self, at: usize, bytes: &mut [u8]) -> io::Result<()>;

    /// As [`vdisk_image::FileIo::fill_zero`].
    ///
    /// # Errors
    ///
    /// The kernel's.
    fn fill_zero(&self, part: Range<usize>) -> io::Result<()>;

    /// What an operation has for the address of a part: of memory; of registered pages the offset in them.
    fn part_ptr(&self, part: &Range<usize>) -> *mut u8;

    /// The memory, or the pages.
    fn kind(&self) -> Kind<'_>;
}

/// Only this module says what is valid memory.
mod sealed {
    pub trait Sealed {}
    impl Sealed for super::Buf {}
    impl Sealed for super::RequestBuf {}
}

/// The two kinds of buffers.
#[derive(Clone, Copy, Debug)]
pub enum Kind<'a> {
    /// Memory of this process.
    Memory(&'a Buf),
    /// Pages that are known to the ring.
    Registered(&'a Pages),
}

impl RingBuf for Buf {
    fn alloc(len: usize) -> Self {
        Self::new(len)
    }

    fn copy_in(&self, at: usize, bytes: &[u8]) -> io::Result<()> {
        self.copy_in(at, bytes);
        Ok(())
    }

    fn copy_out(&self, at: usize, bytes: &mut [u8]) -> io::Result<()> {
        self.copy_out(at, bytes);
        Ok(())
    }

    fn fill_zero(&self, part: Range<usize>) -> io::Result<()> {
        self.fill_zero(part);
        Ok(())
    }

    fn part_ptr(&self, part: &Range<usize>) -> *mut u8 {
        self.part_ptr(part)
    }

    fn kind(&self) -> Kind<'_> {
        Kind::Memory(self)
    }
}

/// The pages of a request in the kernel: an entry of the ring's table of buffers, and a file through which the same bytes can be
/// read and written (`UBLK_F_AUTO_BUF_REG` and `UBLK_F_USER_COPY`: include/uapi/linux/ublk_cmd.h).
#[derive(Clone, Debug)]
pub struct Pages {
    index: u16,
    len: usize,
    file: Rc<File>,
    pos: u64,
}

/// Zeroes to copy from: what is not in the processor's cache costs more than the copy.
static ZEROES: [u8; 16 << 10] = [0; 16 << 10];

impl Pages {
    /// Up to `len` bytes in entry `index` of the ring's table, which begin at `pos` of `file`.
    ///
    /// The entry names pages while a request is served, and then others: whoever makes the request's answer known sees to it that
    /// no operation is in flight.
    pub fn new(index: u16, len: usize, file: Rc<File>, pos: u64) -> Self {
        Self { index, len, file, pos }
    }

    /// The entry of the ring's table.
    pub fn index(&self) -> u16 {
        self.index
    }

    /// Stores `bytes` from byte `at` on.
    ///
    /// # Errors
    ///
    /// The kernel's, also past the end of the request.
    pub fn copy_in(&self, at: usize, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all_at(bytes, self.at(at, bytes.len()))
    }

    /// Reads bytes from byte `at` on.
    ///
    /// # Errors
    ///
    /// As of [`Pages::copy_in`].
    pub fn copy_out(&self, at: usize, bytes: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(bytes, self.at(at, bytes.len()))
    }

    /// Zeroes a part.
    ///
    /// # Errors
    ///
    /// As of [`Pages::copy_in`].
    pub fn fill_zero(&self, part: Range<usize>) -> io::Result<()> {
        let mut at = part.start;
        while at < part.end {
            let zeroes = &ZEROES[..ZEROES.len().min(part.end - at)];
            self.copy_in(at, zeroes)?;
            at += zeroes.len();
        }
        Ok(())
    }

    /// The offset in the file.
    fn at(&self, at: usize, len: usize) -> u64 {
        assert!(at.checked_add(len).is_some_and(|end| end <= self.len), "{len} bytes at {at} of {}", self.len);
        self.pos + at as u64
    }
}

/// The buffer of a request: memory that it was copied to, or its pages themselves.
#[derive(Clone, Debug)]
pub enum RequestBuf {
    /// Memory.
    Memory(Buf),
    /// The pages.
    Pages(Pages),
}

impl RingBuf for RequestBuf {
    fn alloc(len: usize) -> Self {
        Self::Memory(Buf::new(len))
    }

    fn copy_in(&self, at: usize, bytes: &[u8]) -> io::Result<()> {
        match self {
            Self::Memory(buf) => RingBuf::copy_in(buf, at, bytes),
            Self::Pages(pages) => pages.copy_in(at, bytes),
        }
    }

    fn copy_out(&self, at: usize, bytes: &mut [u8]) -> io::Result<()> {
        match self {
            Self::Memory(buf) => RingBuf::copy_out(buf, at, bytes),
            Self::Pages(pages) => pages.copy_out(at, bytes),
        }
    }

    fn fill_zero(&self, part: Range<usize>) -> io::Result<()> {
        match self {
            Self::Memory(buf) => RingBuf::fill_zero(buf, part),
            Self::Pages(pages) => pages.fill_zero(part),
        }
    }

    fn part_ptr(&self, part: &Range<usize>) -> *mut u8 {
        match self {
            Self::Memory(buf) => buf.part_ptr(part),
            Self::Pages(pages) => {
                assert!(part.start <= part.end && part.end <= pages.len, "{part:?} of {} bytes", pages.len);
                ptr::without_provenance_mut(part.start)
            }
        }
    }

    fn kind(&self) -> Kind<'_> {
        match self {
            Self::Memory(buf) => Kind::Memory(buf),
            Self::Pages(pages) => Kind::Registered(pages),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pages(bytes: &[u8]) -> Pages {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(bytes, 100).unwrap();
        Pages::new(3, bytes.len(), Rc::new(file), 100)
    }

    #[test]
    fn bytes_of_pages_go_through_the_file() {
        let pages = pages(b"0123456789");
        pages.copy_in(0, b"a").unwrap();
        pages.copy_in(9, b"z").unwrap();
        pages.fill_zero(4..6).unwrap();
        pages.fill_zero(10..10).unwrap();
        let mut all = [0; 10];
        pages.copy_out(0, &mut all).unwrap();
        assert_eq!(&all, b"a123\0\x00678z");
        let mut around = [1; 100];
        pages.file.read_exact_at(&mut around, 0).unwrap();
        assert_eq!(around, [0; 100]);
    }

    #[test]
    fn a_long_part_is_zeroed_to_its_last_byte() {
        let pages = pages(&[7; 100_001]);
        pages.fill_zero(1..100_000).unwrap();
        let mut all = vec![0; 100_001];
        pages.copy_out(0, &mut all).unwrap();
        assert_eq!((all[0], all[100_000]), (7, 7));
        assert!(all[1..100_000].iter().all(|b| *b == 0));
    }

    #[test]
    fn the_address_of_pages_is_the_offset_in_them_and_ends_with_them() {
        let buf = RequestBuf::Pages(pages(b"0123456789"));
        assert_eq!(buf.part_ptr(&(3..10)).addr(), 3);
        let refused = |part: Range<usize>| {
            std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| buf.part_ptr(&part))).is_err()
        };
        assert!(refused(3..11) && !refused(10..10) && refused(11..11));
    }
}
