//! The one check at the door: who holds a [`Request`] knows that it lies inside the disk and is allowed on it.

use crate::error::{DiskError, ErrorKind};

/// What a disk looks like from outside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Size in bytes, a multiple of 512.
    pub size: u64,
    /// No request may change anything.
    pub read_only: bool,
    /// Bytes in which the image allocates: the best size and alignment for large requests (64 KiB for most VMDKs).
    pub preferred_block: u32,
}

/// What a request does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Op {
    /// Fill the buffer.
    Read,
    /// Store the buffer.
    Write,
    /// Make every write durable whose reply was sent before this request arrived.
    Flush,
    /// The range is not needed any more. A hint: afterwards it reads as its old content or as zeroes.
    Discard,
    /// The range reads as zeroes afterwards.
    WriteZeroes,
}

/// What a request asks for besides.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Flags {
    /// Durable before the reply (force unit access).
    pub fua: bool,
    /// [`Op::WriteZeroes`] only: keep the space allocated (`REQ_NOUNMAP`, `NBD_CMD_FLAG_NO_HOLE`).
    pub no_unmap: bool,
}

/// A request that was checked. Any byte range inside the disk is allowed; nothing behind the door checks again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    op: Op,
    offset: u64,
    len: u64,
    flags: Flags,
}

impl Request {
    /// Checks a request against the disk's geometry. `offset` and `len` are in bytes; a flush has neither.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::OutOfRange`] if it ends past the end of the disk, [`ErrorKind::ReadOnly`] if it would change a
    /// read-only disk, [`ErrorKind::InvalidRequest`] if the buffer it needs cannot exist.
    pub fn check(geometry: &Geometry, op: Op, offset: u64, len: u64, flags: Flags) -> Result<Self, DiskError> {
        let (offset, len) = if op == Op::Flush { (0, 0) } else { (offset, len) };
        if geometry.read_only && matches!(op, Op::Write | Op::Discard | Op::WriteZeroes) {
            return Err(DiskError::new(ErrorKind::ReadOnly, format!("{op:?} at {offset}: the disk is read-only")));
        }
        if offset.checked_add(len).is_none_or(|end| end > geometry.size) {
            return Err(DiskError::new(
                ErrorKind::OutOfRange,
                format!("{op:?} of {len} bytes at {offset} ends past the end of the disk at {}", geometry.size),
            ));
        }
        if matches!(op, Op::Read | Op::Write) && usize::try_from(len).is_err() {
            return Err(DiskError::new(ErrorKind::InvalidRequest, format!("{op:?} of {len} bytes at {offset}")));
        }
        Ok(Self { op, offset, len, flags })
    }

    /// What to do.
    pub fn op(&self) -> Op {
        self.op
    }

    /// First byte on the disk.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Bytes; 0 is a request that does nothing.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether the range is empty.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// What else was asked for.
    pub fn flags(&self) -> Flags {
        self.flags
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DISK: Geometry = Geometry { size: 4096, read_only: false, preferred_block: 512 };

    fn kind(op: Op, offset: u64, len: u64) -> Option<ErrorKind> {
        Request::check(&DISK, op, offset, len, Flags::default()).err().map(|e| e.kind())
    }

    #[test]
    fn the_last_byte_is_inside_and_the_next_is_not() {
        for op in [Op::Read, Op::Write, Op::Discard, Op::WriteZeroes] {
            assert_eq!(kind(op, 0, 4096), None);
            assert_eq!(kind(op, 4095, 1), None);
            assert_eq!(kind(op, 4096, 0), None);
            assert_eq!(kind(op, 4095, 2), Some(ErrorKind::OutOfRange));
            assert_eq!(kind(op, 4096, 1), Some(ErrorKind::OutOfRange));
            assert_eq!(kind(op, 4097, 0), Some(ErrorKind::OutOfRange));
        }
    }

    #[test]
    fn a_sum_that_overflows_is_out_of_range() {
        assert_eq!(kind(Op::Read, u64::MAX, 1), Some(ErrorKind::OutOfRange));
        assert_eq!(kind(Op::Discard, 1, u64::MAX), Some(ErrorKind::OutOfRange));
    }

    #[test]
    fn a_read_only_disk_takes_reads_and_flushes_only() {
        let g = Geometry { read_only: true, ..DISK };
        for (op, allowed) in
            [(Op::Read, true), (Op::Flush, true), (Op::Write, false), (Op::Discard, false), (Op::WriteZeroes, false)]
        {
            let r = Request::check(&g, op, 0, 512, Flags::default());
            assert_eq!(r.is_ok(), allowed, "{op:?}");
            assert!(allowed || r.is_err_and(|e| e.kind() == ErrorKind::ReadOnly));
        }
    }

    #[test]
    fn a_flush_has_no_range() {
        let r = Request::check(&DISK, Op::Flush, 1 << 40, 7, Flags::default()).unwrap();
        assert_eq!((r.offset(), r.len()), (0, 0));
    }
}
