//! Buffers of one connection, kept for the next request.

use std::cell::RefCell;

use vdisk_io::Buf;

const SMALLEST: usize = 4 << 10;
/// Larger buffers are not kept: zeroing them costs little beside filling them.
const LARGEST_KEPT: usize = 1 << 20;
/// Bytes that are kept at most.
const MAX_KEPT: usize = 16 << 20;
const CLASSES: usize = (LARGEST_KEPT / SMALLEST).ilog2() as usize + 1;

/// Free buffers by size: powers of two from 4 KiB to 1 MiB.
#[derive(Debug, Default)]
pub(super) struct Pool(RefCell<Kept>);

#[derive(Debug, Default)]
struct Kept {
    classes: [Vec<Buf>; CLASSES],
    bytes: usize,
}

/// How long the buffer is that [`Pool::take`] gives for `len` bytes.
pub(super) fn capacity_for(len: usize) -> usize {
    if len <= LARGEST_KEPT { len.next_power_of_two().max(SMALLEST) } else { len.next_multiple_of(SMALLEST) }
}

/// The class of buffers of `capacity` bytes, if such are kept.
fn class_of(capacity: usize) -> Option<usize> {
    if !capacity.is_power_of_two() || !(SMALLEST..=LARGEST_KEPT).contains(&capacity) {
        return None;
    }
    usize::try_from((capacity / SMALLEST).ilog2()).ok()
}

impl Pool {
    /// A buffer of [`capacity_for`] `len` bytes, with anything in it.
    pub(super) fn take(&self, len: usize) -> Buf {
        let capacity = capacity_for(len);
        let mut kept = self.0.borrow_mut();
        let free = class_of(capacity).and_then(|class| kept.classes.get_mut(class)?.pop());
        match free {
            Some(buf) => {
                kept.bytes -= capacity;
                buf
            }
            None => Buf::new(capacity),
        }
    }

    /// Keeps a buffer that nobody else holds.
    pub(super) fn give(&self, mut buf: Buf) {
        let mut kept = self.0.borrow_mut();
        let len = buf.len();
        if kept.bytes + len > MAX_KEPT || buf.get_mut().is_none() {
            return;
        }
        if let Some(class) = class_of(len).and_then(|class| kept.classes.get_mut(class)) {
            class.push(buf);
            kept.bytes += len;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_comes_back_for_a_request_of_its_class() {
        let pool = Pool::default();
        let buf = pool.take(5000);
        assert_eq!(buf.len(), 8192);
        let at = buf.as_ptr();
        pool.give(buf);
        assert_ne!(pool.take(4096).as_ptr(), at);
        assert_eq!(pool.take(8192).as_ptr(), at);
    }

    #[test]
    fn what_is_kept_is_bounded() {
        let pool = Pool::default();
        for buf in (0..40).map(|_| pool.take(LARGEST_KEPT)).collect::<Vec<_>>() {
            pool.give(buf);
        }
        pool.give(pool.take(LARGEST_KEPT + 1));
        assert_eq!(pool.0.borrow().bytes, MAX_KEPT);
    }

    #[test]
    fn a_buffer_is_never_shorter_than_asked() {
        for len in [0, 1, 4095, 4096, 4097, 1 << 20, (1 << 20) + 1, 64 << 20] {
            assert!(capacity_for(len) >= len);
        }
        assert_eq!(capacity_for(64 << 20), 64 << 20);
    }
}
