//! The unit of every number in a VMDK.

use std::fmt;

/// Bytes in a sector: always 512 in VMDK, whatever the logical block of a device is
/// (VMware Virtual Disk Format 1.1).
pub const SECTOR_SIZE: u64 = 512;

/// A number of 512-byte sectors, or a position counted in them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Sectors(pub u64);

impl Sectors {
    /// The most sectors whose bytes still fit in a `u64`.
    pub const MAX: Self = Self(u64::MAX / SECTOR_SIZE);

    /// The same in bytes; `None` above [`Sectors::MAX`].
    pub const fn bytes(self) -> Option<u64> {
        self.0.checked_mul(SECTOR_SIZE)
    }

    /// The whole sectors in so many bytes: the sector that holds byte `bytes`.
    pub const fn from_bytes_floor(bytes: u64) -> Self {
        Self(bytes / SECTOR_SIZE)
    }

    /// The sectors it takes to hold so many bytes.
    pub const fn from_bytes_ceil(bytes: u64) -> Self {
        Self(bytes.div_ceil(SECTOR_SIZE))
    }

    /// The sum; `None` if it does not fit in a `u64` number of sectors.
    pub const fn checked_add(self, other: Self) -> Option<Self> {
        match self.0.checked_add(other.0) {
            Some(sum) => Some(Self(sum)),
            None => None,
        }
    }

    /// The difference; `None` if `other` is larger.
    pub const fn checked_sub(self, other: Self) -> Option<Self> {
        match self.0.checked_sub(other.0) {
            Some(rest) => Some(Self(rest)),
            None => None,
        }
    }
}

impl fmt::Display for Sectors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} sectors", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_of_the_largest_count_fit_and_one_more_does_not() {
        assert_eq!(Sectors(0).bytes(), Some(0));
        assert_eq!(Sectors(Sectors::MAX.0 - 1).bytes(), Some(u64::MAX - 1023));
        assert_eq!(Sectors::MAX.bytes(), Some(u64::MAX - 511));
        assert_eq!(Sectors(Sectors::MAX.0 + 1).bytes(), None);
    }

    #[test]
    fn rounds_bytes_down_and_up() {
        for (bytes, floor, ceil) in [(0, 0, 0), (1, 0, 1), (511, 0, 1), (512, 1, 1), (513, 1, 2)] {
            assert_eq!(Sectors::from_bytes_floor(bytes), Sectors(floor));
            assert_eq!(Sectors::from_bytes_ceil(bytes), Sectors(ceil));
        }
        assert_eq!(Sectors::from_bytes_ceil(u64::MAX), Sectors(Sectors::MAX.0 + 1));
    }

    #[test]
    fn sums_and_differences_are_checked() {
        assert_eq!(Sectors(1).checked_add(Sectors(2)), Some(Sectors(3)));
        assert_eq!(Sectors(u64::MAX).checked_add(Sectors(0)), Some(Sectors(u64::MAX)));
        assert_eq!(Sectors(u64::MAX).checked_add(Sectors(1)), None);
        assert_eq!(Sectors(2).checked_sub(Sectors(2)), Some(Sectors(0)));
        assert_eq!(Sectors(2).checked_sub(Sectors(3)), None);
    }
}
