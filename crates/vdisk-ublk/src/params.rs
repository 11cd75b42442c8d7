//! What the kernel is told about the disk.

use libublk::sys;
use vdisk_image::Geometry;

/// Most bytes of one discard or write zeroes request: 1 GiB, in sectors of 512 bytes.
const MAX_DISCARD_SECTORS: u32 = 1 << 21;
/// The host's block in bytes: discarding less frees nothing.
const HOST_BLOCK: u32 = 4096;

/// Parameters for `UBLK_U_CMD_SET_PARAMS`.
///
/// A volatile cache always, for otherwise the kernel sends no flushes; no FUA ever, so that the kernel sends a write and
/// a flush instead, which is what an image with tables has to do anyway. A discard's whole range is one segment.
pub(crate) fn params(geometry: &Geometry, io_buf_bytes: u32) -> sys::ublk_params {
    let read_only = if geometry.read_only { sys::UBLK_ATTR_READ_ONLY } else { 0 };
    sys::ublk_params {
        types: sys::UBLK_PARAM_TYPE_BASIC | sys::UBLK_PARAM_TYPE_DISCARD,
        basic: sys::ublk_param_basic {
            attrs: sys::UBLK_ATTR_VOLATILE_CACHE | read_only,
            logical_bs_shift: 9,
            physical_bs_shift: shift(HOST_BLOCK),
            io_min_shift: shift(HOST_BLOCK),
            io_opt_shift: shift(geometry.preferred_block),
            max_sectors: io_buf_bytes >> 9,
            dev_sectors: geometry.size >> 9,
            ..Default::default()
        },
        discard: sys::ublk_param_discard {
            discard_granularity: HOST_BLOCK,
            max_discard_sectors: MAX_DISCARD_SECTORS,
            max_write_zeroes_sectors: MAX_DISCARD_SECTORS,
            max_discard_segments: 1,
            ..Default::default()
        },
        ..Default::default()
    }
}

/// A power of two by its exponent; anything else by that of the next, within what the block layer takes.
fn shift(bytes: u32) -> u8 {
    let bytes = bytes.clamp(HOST_BLOCK, 1 << 28).next_power_of_two();
    u8::try_from(bytes.ilog2()).unwrap_or(12)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_has_a_volatile_cache_and_no_fua_and_is_read_only_if_asked() {
        let g = Geometry { size: 10 << 20, read_only: false, preferred_block: 65536 };
        let p = params(&g, 512 << 10);
        assert_eq!(p.basic.attrs, sys::UBLK_ATTR_VOLATILE_CACHE);
        assert_eq!((p.basic.dev_sectors, p.basic.max_sectors, p.basic.io_opt_shift), (20480, 1024, 16));
        let p = params(&Geometry { read_only: true, ..g }, 512 << 10);
        assert_eq!(p.basic.attrs, sys::UBLK_ATTR_VOLATILE_CACHE | sys::UBLK_ATTR_READ_ONLY);
    }

    #[test]
    fn the_preferred_block_is_kept_within_limits() {
        for (bytes, expected) in [(0, 12), (512, 12), (4096, 12), (4097, 13), (65536, 16), (u32::MAX, 28)] {
            assert_eq!(shift(bytes), expected, "{bytes}");
        }
    }
}
