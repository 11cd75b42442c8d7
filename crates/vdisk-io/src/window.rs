//! A stretch of a file that is served as if it were a file.

use std::io;

use vdisk_image::Stored;

/// Bytes of a file, from one offset to another, both at most 2^63 - 1. Only ever read: what changes a file does not know
/// windows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Window {
    start: u64,
    len: u64,
}

impl Window {
    /// `len` bytes from `start` on; `None` if no file has them.
    pub(crate) fn new(start: u64, len: u64) -> Option<Self> {
        let end = start.checked_add(len)?;
        i64::try_from(end).is_ok().then_some(Self { start, len })
    }

    /// Offset in the file, in bytes.
    pub(crate) fn start(self) -> u64 {
        self.start
    }

    /// Length in bytes.
    pub(crate) fn len(self) -> u64 {
        self.len
    }

    /// Offset in the file of the first byte behind the window.
    pub(crate) fn end(self) -> u64 {
        self.start + self.len
    }

    /// The offset in the file of `len` bytes at `offset` of the window.
    ///
    /// # Errors
    ///
    /// [`io::ErrorKind::UnexpectedEof`] for bytes behind the window, even if the file has some there.
    pub(crate) fn locate(self, offset: u64, len: u64) -> io::Result<u64> {
        if len == 0 {
            return Ok(self.start);
        }
        match offset.checked_add(len) {
            Some(end) if end <= self.len => Ok(self.start + offset),
            _ => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }

    /// How the bytes at `offset` of the window are stored, when `of_file` says it of an offset in the file. Behind the
    /// window is a hole, as behind the end of a file.
    pub(crate) fn stored_at(self, offset: u64, of_file: impl FnOnce(u64) -> Stored) -> Stored {
        if offset >= self.len {
            return Stored { hole: true, len: u64::MAX - offset };
        }
        let Stored { hole, len } = of_file(self.start + offset);
        Stored { hole, len: len.min(self.len - offset) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAX: u64 = i64::MAX as u64;

    #[test]
    fn a_window_ends_where_a_file_may() {
        for (start, len, ok) in [(0, 0, true), (MAX, 0, true), (512, MAX - 512, true), (512, MAX - 511, false)] {
            assert_eq!(Window::new(start, len).is_some(), ok, "{len} at {start}");
        }
        assert_eq!(Window::new(u64::MAX, 1), None);
    }

    #[test]
    fn ranges_are_shifted_and_end_with_the_window() {
        let window = Window::new(512, 100).unwrap();
        let at = |offset, len| window.locate(offset, len).map_err(|e| e.kind());
        assert_eq!((at(0, 100), at(99, 1), at(1, 99)), (Ok(512), Ok(611), Ok(513)));
        for (offset, len) in [(0, 101), (99, 2), (100, 1), (MAX, 1), (u64::MAX, 1)] {
            assert_eq!(at(offset, len), Err(io::ErrorKind::UnexpectedEof), "{len} at {offset}");
        }
        assert!(at(100, 0).is_ok() && at(u64::MAX, 0).is_ok());
    }

    #[test]
    fn what_is_stored_ends_with_the_window_and_a_hole_follows() {
        let window = Window::new(512, 100).unwrap();
        let data = |len| move |_| Stored { hole: false, len };
        assert_eq!(window.stored_at(10, data(20)), Stored { hole: false, len: 20 });
        assert_eq!(window.stored_at(10, data(5000)), Stored { hole: false, len: 90 });
        assert_eq!(window.stored_at(99, data(u64::MAX)), Stored { hole: false, len: 1 });
        assert_eq!(window.stored_at(100, data(7)), Stored { hole: true, len: u64::MAX - 100 });
        window.stored_at(99, |offset| {
            assert_eq!(offset, 611);
            data(1)(offset)
        });
    }
}
