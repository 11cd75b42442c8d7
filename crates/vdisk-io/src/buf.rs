//! Memory that the kernel may write to while this process looks elsewhere.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::ops::Range;
use std::ptr::NonNull;
use std::rc::Rc;

/// Alignment of every buffer in bytes: enough for direct I/O on any file system seen so far, and for ublk.
pub const BUF_ALIGN: usize = 4096;

/// A handle to zeroed memory of a fixed length that starts at a multiple of [`BUF_ALIGN`].
///
/// Clones are handles to the same memory, which is freed with the last one: an operation in flight holds one. Bytes go
/// in and out by copies through raw pointers, for the kernel may change other parts of the memory at the same time.
#[derive(Clone, Debug)]
pub struct Buf(Rc<Memory>);

#[derive(Debug)]
struct Memory {
    /// What the allocator gave: up to [`BUF_ALIGN`] bytes more than are used. The allocator zeroes memory of a large alignment
    /// by writing it, which would make all of it resident; ordinary memory comes from the kernel zeroed and untouched.
    allocation: NonNull<u8>,
    start: NonNull<u8>,
    len: usize,
}

impl Buf {
    /// A zeroed buffer of `len` bytes. Aborts when there is no memory, as `Vec` does.
    pub fn new(len: usize) -> Self {
        let layout = layout(len);
        #[expect(unsafe_code, reason = "memory of a given alignment")]
        // SAFETY: the layout's size is not zero (see `layout`).
        let allocation = unsafe { alloc_zeroed(layout) };
        let Some(allocation) = NonNull::new(allocation) else { handle_alloc_error(layout) };
        let skip = allocation.addr().get().next_multiple_of(BUF_ALIGN) - allocation.addr().get();
        #[expect(unsafe_code, reason = "memory of a given alignment")]
        // SAFETY: `skip` is below BUF_ALIGN, and the allocation has BUF_ALIGN + `len` bytes (see `layout`).
        let start = unsafe { allocation.add(skip) };
        Self(Rc::new(Memory { allocation, start, len }))
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.0.len
    }

    /// Whether the length is 0.
    pub fn is_empty(&self) -> bool {
        self.0.len == 0
    }

    /// Where the memory starts: valid for reads and writes of [`Buf::len`] bytes as long as a handle exists, and
    /// provided that nothing holds the slice of [`Buf::get_mut`].
    pub fn as_ptr(&self) -> *mut u8 {
        self.0.start.as_ptr()
    }

    /// Stores `bytes` from byte `at` on.
    ///
    /// # Panics
    ///
    /// If they end past the end of the buffer; so do the other functions that take a part of the buffer.
    pub fn copy_in(&self, at: usize, bytes: &[u8]) {
        let to = self.part_ptr(&part(at, bytes.len()));
        #[expect(unsafe_code, reason = "the kernel may write to other parts: no reference to the memory may exist")]
        // SAFETY: `part_ptr` checked that `bytes.len()` bytes from `to` on lie inside the allocation, which `self`
        // keeps alive. They do not overlap `bytes`: a reference to this memory comes from `get_mut` alone, whose
        // borrow excludes `&self` on the only handle. Bytes have no alignment.
        unsafe {
            to.copy_from_nonoverlapping(bytes.as_ptr(), bytes.len());
        }
    }

    /// Reads bytes from byte `at` on.
    pub fn copy_out(&self, at: usize, bytes: &mut [u8]) {
        let from = self.part_ptr(&part(at, bytes.len()));
        #[expect(unsafe_code, reason = "the kernel may write to other parts: no reference to the memory may exist")]
        // SAFETY: as in `copy_in`, with the roles changed; the memory was initialised when it was allocated.
        unsafe {
            from.copy_to_nonoverlapping(bytes.as_mut_ptr(), bytes.len());
        }
    }

    /// Zeroes a part.
    pub fn fill_zero(&self, part: Range<usize>) {
        let to = self.part_ptr(&part);
        #[expect(unsafe_code, reason = "the kernel may write to other parts: no reference to the memory may exist")]
        // SAFETY: `part_ptr` checked that the part lies inside the allocation, which `self` keeps alive.
        unsafe {
            to.write_bytes(0, part.len());
        }
    }

    /// The bytes themselves, if this is the only handle: no operation is in flight then.
    pub fn get_mut(&mut self) -> Option<&mut [u8]> {
        let memory = Rc::get_mut(&mut self.0)?;
        #[expect(unsafe_code, reason = "a slice of memory that was allocated by hand")]
        // SAFETY: the allocation has `len` initialised bytes (`len` is at most isize::MAX, see `layout`). This is the
        // only handle, borrowed exclusively for as long as the slice lives; an operation in flight would hold another
        // (the contract of `Ring::submit`).
        Some(unsafe { std::slice::from_raw_parts_mut(memory.start.as_ptr(), memory.len) })
    }

    /// Where a part starts.
    ///
    /// # Panics
    ///
    /// If the part is no part of the buffer.
    pub(crate) fn part_ptr(&self, part: &Range<usize>) -> *mut u8 {
        assert!(part.start <= part.end && part.end <= self.len(), "{part:?} of a buffer of {} bytes", self.len());
        self.as_ptr().wrapping_add(part.start)
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        #[expect(unsafe_code, reason = "memory of a given alignment")]
        // SAFETY: `allocation` came from `alloc_zeroed` with this very layout and is freed only here, with the last handle.
        unsafe {
            dealloc(self.allocation.as_ptr(), layout(self.len));
        }
    }
}

/// `len` bytes at `at`.
fn part(at: usize, len: usize) -> Range<usize> {
    at..at.saturating_add(len)
}

/// Memory that has room for a buffer of `len` bytes at a multiple of [`BUF_ALIGN`].
fn layout(len: usize) -> Layout {
    Layout::from_size_align(len.saturating_add(BUF_ALIGN), 1).expect("a buffer is smaller than isize::MAX")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_is_aligned_and_zeroed() {
        for len in [0, 1, 511, 512, 4096, 1 << 20] {
            let mut buf = Buf::new(len);
            assert_eq!(buf.as_ptr().addr() % BUF_ALIGN, 0);
            assert_eq!((buf.len(), buf.is_empty()), (len, len == 0));
            assert!(buf.get_mut().is_some_and(|bytes| bytes.len() == len && bytes.iter().all(|b| *b == 0)));
        }
    }

    #[test]
    fn bytes_go_in_and_out_at_every_edge() {
        let buf = Buf::new(10);
        buf.copy_in(0, b"0123456789");
        buf.copy_in(0, b"a");
        buf.copy_in(9, b"z");
        buf.copy_in(10, b"");
        buf.fill_zero(4..6);
        buf.fill_zero(10..10);
        let mut all = [0; 10];
        buf.copy_out(0, &mut all);
        assert_eq!(&all, b"a123\0\x00678z");
        let mut last = [0];
        buf.copy_out(9, &mut last);
        assert_eq!(&last, b"z");
    }

    #[test]
    fn a_part_that_ends_past_the_end_is_refused() {
        let refused = |f: &dyn Fn(&Buf)| {
            let buf = Buf::new(10);
            std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| f(&buf))).is_err()
        };
        assert!(refused(&|b| b.copy_in(10, b"x")));
        assert!(refused(&|b| b.copy_in(usize::MAX, b"xx")));
        assert!(refused(&|b| b.copy_out(9, &mut [0; 2])));
        assert!(refused(&|b| b.fill_zero(0..11)));
        #[expect(clippy::reversed_empty_ranges, reason = "that is the point")]
        let reversed = 6..5;
        assert!(refused(&|b| b.fill_zero(reversed.clone())));
    }

    #[test]
    fn the_bytes_themselves_are_there_for_the_only_handle() {
        let mut buf = Buf::new(3);
        let other = buf.clone();
        assert!(buf.get_mut().is_none());
        other.copy_in(0, b"abc");
        drop(other);
        assert_eq!(buf.get_mut().map(|b| b.to_vec()), Some(b"abc".to_vec()));
    }
}
