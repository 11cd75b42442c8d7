//! What kind of image a file is, from its first bytes.

use crate::error::{DiskError, ErrorKind};
use crate::info::Format;
use crate::{cowd, se_sparse};
use vmdk_parse::{SECTOR_SIZE, looks_like_descriptor};

/// Bytes that are enough to know.
pub(crate) const HEAD: u64 = 4096;

/// Where reading begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Raw,
    /// A hosted sparse extent's header.
    SparseExtent,
    /// A COWD extent's header.
    CowdExtent,
    /// A descriptor alone.
    Descriptor,
}

/// Formats that are recognised only to be refused by name: (byte offset, magic, what it is).
const OTHERS: [(usize, &[u8], &str); 9] = [
    (0, b"QFI\xfb", "a qcow2 image"),
    (0, b"QED\0", "a QED image"),
    (0, b"vhdxfile", "a VHDX image"),
    (0, b"conectix", "a VHD image"),
    (64, b"\x7f\x10\xda\xbe", "a VDI image"),
    (0, b"\x1f\x8b", "compressed by gzip"),
    (0, b"\xfd7zXZ\0", "compressed by xz"),
    (0, b"PK\x03\x04", "a ZIP archive"),
    (0, b"\x28\xb5\x2f\xfd", "compressed by zstd"),
];

/// Says what the file `name` of `len` bytes is that begins with `head`. `wanted` overrules what it looks like.
///
/// # Errors
///
/// [`ErrorKind::NotAnImage`] or [`ErrorKind::Unsupported`], with what to do.
pub(crate) fn probe(name: &str, len: u64, head: &[u8], wanted: Option<Format>) -> Result<Kind, DiskError> {
    let not = |what: &str| Err(DiskError::new(ErrorKind::NotAnImage, format!("{name}: {what}")));
    if len < SECTOR_SIZE && !looks_like_descriptor(head) {
        return not(&format!("{len} bytes are less than a sector: not an image"));
    }
    if wanted == Some(Format::Raw) {
        return Ok(Kind::Raw);
    }
    let lower = name.to_ascii_lowercase();
    let kind = match () {
        () if head.starts_with(b"KDMV") => Some(Kind::SparseExtent),
        () if head.starts_with(cowd::MAGIC) => Some(Kind::CowdExtent),
        () if looks_like_descriptor(head) => Some(Kind::Descriptor),
        () => None,
    };
    if let Some(kind) = kind {
        // Whoever writes to a raw disk can make its first sector look like this, and a descriptor names other files.
        if wanted.is_none() && !lower.ends_with(".vmdk") {
            return not("begins like a VMDK but is not named .vmdk: say --format vmdk or --format raw");
        }
        return Ok(kind);
    }
    if head.starts_with(&se_sparse::MAGIC) {
        return not("is a seSparse extent of an ESX image: open the .vmdk descriptor that lists it");
    }
    if wanted == Some(Format::Vmdk) {
        return not("has neither a VMDK header nor a descriptor");
    }
    for (at, magic, what) in OTHERS {
        if head.get(at..).is_some_and(|h| h.starts_with(magic)) {
            return not(&format!(
                "is {what}, not a VMDK or raw image: convert it first, or --format raw takes its bytes as they are"
            ));
        }
    }
    if head.get(257..262) == Some(b"ustar") {
        return not(&format!(
            "is a tar archive (an OVA?): name the image in it, as in {name}:disk.vmdk; --format raw takes its bytes as they are"
        ));
    }
    if lower.ends_with(".vmdk") && !lower.ends_with("-flat.vmdk") {
        return not(
            "is named .vmdk, but has neither a VMDK header nor a descriptor; --format raw takes it as raw bytes",
        );
    }
    Ok(Kind::Raw)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kind(name: &str, head: &[u8]) -> Result<Kind, String> {
        let mut file = vec![0; 4096];
        file[..head.len()].copy_from_slice(head);
        probe(name, 4096, &file, None).map_err(|e| e.to_string())
    }

    #[test]
    fn every_other_format_is_refused_by_name() {
        for (at, magic, what) in OTHERS {
            let mut head = vec![0; at];
            head.extend_from_slice(magic);
            let text = kind("disk.img", &head).unwrap_err();
            assert!(text.contains(what), "{text}");
        }
    }

    #[test]
    fn anything_else_is_raw_unless_its_name_says_vmdk() {
        assert_eq!(kind("disk.img", b"hello"), Ok(Kind::Raw));
        assert_eq!(kind("disk-flat.vmdk", b"hello"), Ok(Kind::Raw));
        assert!(kind("disk.VMDK", b"hello").unwrap_err().contains("--format raw"));
    }

    #[test]
    fn the_wanted_format_overrules_the_bytes() {
        let head = [b"KDMV".as_slice(), &[0; 4092]].concat();
        assert_eq!(probe("a.vmdk", 4096, &head, None).unwrap(), Kind::SparseExtent);
        assert_eq!(probe("a.vmdk", 4096, &head, Some(Format::Raw)).unwrap(), Kind::Raw);
        assert_eq!(probe("a.img", 4096, &[0; 4096], Some(Format::Vmdk)).unwrap_err().kind(), ErrorKind::NotAnImage);
    }

    #[test]
    fn what_a_guest_wrote_to_a_raw_disk_is_not_taken_for_a_vmdk() {
        for head in [b"KDMV".as_slice(), b"COWD", b"# Disk DescriptorFile\n"] {
            assert!(kind("disk.img", head).unwrap_err().contains("--format"));
            assert!(kind("disk.vmdk", head).is_ok());
        }
    }

    #[test]
    fn a_se_sparse_extent_is_refused_with_what_to_open() {
        let text = kind("disk-sesparse.vmdk", &se_sparse::MAGIC).unwrap_err();
        assert!(text.contains("open the .vmdk descriptor that lists it"), "{text}");
    }

    #[test]
    fn less_than_a_sector_is_no_disk() {
        assert_eq!(probe("a.img", 511, &[0; 511], None).unwrap_err().kind(), ErrorKind::NotAnImage);
        assert_eq!(probe("a.img", 0, &[], Some(Format::Raw)).unwrap_err().kind(), ErrorKind::NotAnImage);
        assert_eq!(probe("a.img", 512, &[0; 512], None).unwrap(), Kind::Raw);
    }
}
