//! The members of a tar archive: where they are, by the headers alone. No data is read.
//!
//! Our own walk, for the `tar` crate (0.4.46) cannot be bounded: it reads GNU names, pax records and sparse maps into
//! memory however long a header says they are (`Entry::read_all`; a sparse file has gigabytes of them for nothing), and
//! its raw mode, which does not, does not know a pax size either, which members from 8 GiB on have.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use crate::window::Window;

mod header;
mod pax;

use header::Header;
use pax::Extension;

const BLOCK: u64 = header::BLOCK as u64;

/// Members of an archive, at most. An appliance has some ten.
const MAX_MEMBERS: usize = 4096;

/// Blocks that are read as headers, at most: those of members, of extensions and of sparse maps.
const MAX_HEADERS: u32 = 4 * 4096;

/// Bytes of one extension, at most: far more than a path and some extended attributes take.
const MAX_EXTENSION: u64 = 1 << 20;

/// Bytes of all extensions together, at most.
const MAX_EXTENSIONS: u64 = 16 << 20;

/// A member of an archive.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Member {
    /// As the archive has it; what is not UTF-8 is replaced.
    pub(crate) name: String,
    pub(crate) kind: Kind,
    /// Its data, in the archive; begins at a multiple of 512.
    pub(crate) data: Window,
}

/// What a member is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// A regular file, whose bytes are the data.
    File,
    /// A regular file, whose data are its bytes without the holes.
    Sparse,
    HardLink,
    SymbolicLink,
    Directory,
    /// A device, a FIFO, or what only some tar knows.
    Other,
}

/// Finds the members of an archive of `len` bytes.
///
/// # Errors
///
/// The host's; [`io::ErrorKind::InvalidData`], with the offset of the header in bytes, if it is no archive, compressed,
/// damaged or cut short, or beyond all measure.
pub(crate) fn members(file: &File, len: u64) -> io::Result<Vec<Member>> {
    let mut walk = Walk { file, len, at: 0, header_at: 0, headers: 0, extensions: 0 };
    let mut members = Vec::new();
    let mut extension = Extension::default();
    while let Some(header) = walk.next_header()? {
        let size = header.size().ok_or_else(|| walk.damaged("its size is no number"))?;
        match header.flag() {
            b'L' => {
                let name = walk.take_extension(size)?;
                extension.add_long_name(&name).map_err(|e| walk.damaged(e))?;
            }
            // X is Solaris's word for x.
            b'x' | b'X' => {
                let records = walk.take_extension(size)?;
                extension.add_records(&records).map_err(|e| walk.damaged(e))?;
            }
            b'g' => walk.take_global_extension(size)?,
            // Where a link leads to does not matter.
            b'K' => drop(walk.take_data(size)?),
            flag => {
                let member = walk.take_member(flag, &header, size, &std::mem::take(&mut extension))?;
                if members.len() == MAX_MEMBERS {
                    return Err(walk.damaged(&format!("it is one more than {MAX_MEMBERS} members")));
                }
                members.push(member);
            }
        }
    }
    Ok(members)
}

/// Where the walk through the headers is. Every step takes it ahead by a block at least.
struct Walk<'a> {
    file: &'a File,
    /// Bytes of the archive.
    len: u64,
    /// The next byte.
    at: u64,
    /// The header that was read last, for messages.
    header_at: u64,
    headers: u32,
    extensions: u64,
}

impl Walk<'_> {
    /// The next header; `None` at the end of the archive.
    fn next_header(&mut self) -> io::Result<Option<Header>> {
        self.header_at = self.at;
        // Not every writer ends with the two blocks of zeroes, or fills up the last data.
        if self.at >= self.len && self.at > 0 {
            return Ok(None);
        }
        let header = self.take_block()?;
        match header {
            _ if header.is_zero() => Ok(None),
            _ if header.is_sound() => Ok(Some(header)),
            _ if self.header_at > 0 => Err(self.damaged("its checksum is wrong")),
            _ => Err(invalid(match header.compression() {
                Some(by) => {
                    format!("compressed ({by}): only an uncompressed tar archive can be served, unpack it first")
                }
                None => "no tar archive".to_owned(),
            })),
        }
    }

    fn take_block(&mut self) -> io::Result<Header> {
        if self.len.saturating_sub(self.at) < BLOCK {
            return Err(invalid(match self.at {
                0 => "no tar archive, it is too short".to_owned(),
                at => format!("cut short: the archive has {} bytes, and a header begins at byte {at}", self.len),
            }));
        }
        self.headers += 1;
        if self.headers > MAX_HEADERS {
            return Err(self.damaged(&format!("it is one more than {MAX_HEADERS} headers")));
        }
        let mut header = Header([0; header::BLOCK]);
        self.file.read_exact_at(&mut header.0, self.at)?;
        self.at += BLOCK;
        Ok(header)
    }

    /// What is behind a header; the walk goes on behind it.
    fn take_data(&mut self, size: u64) -> io::Result<Window> {
        let data = Window::new(self.at, size).filter(|data| data.end() <= self.len).ok_or_else(|| {
            self.damaged(&format!("it announces {size} bytes, but the archive ends at byte {}: cut short?", self.len))
        })?;
        // Below 2^63 and less than a block more.
        self.at = data.end().next_multiple_of(BLOCK);
        Ok(data)
    }

    fn take_extension(&mut self, size: u64) -> io::Result<Vec<u8>> {
        self.extensions = self.extensions.saturating_add(size);
        if size > MAX_EXTENSION || self.extensions > MAX_EXTENSIONS {
            return Err(self.damaged(&format!("{size} bytes of names and attributes are too many")));
        }
        let data = self.take_data(size)?;
        let mut bytes = vec![0; usize::try_from(size).expect("not above MAX_EXTENSION")];
        self.file.read_exact_at(&mut bytes, data.start())?;
        Ok(bytes)
    }

    /// Comments and the like. What would change every member is not known to be in use, and refused.
    fn take_global_extension(&mut self, size: u64) -> io::Result<()> {
        let mut global = Extension::default();
        let records = self.take_extension(size)?;
        global.add_records(&records).map_err(|e| self.damaged(e))?;
        if global != Extension::default() {
            return Err(self.damaged("it sets names or sizes for all members, which is not supported"));
        }
        Ok(())
    }

    fn take_member(&mut self, flag: u8, header: &Header, size: u64, extension: &Extension) -> io::Result<Member> {
        let name = extension.name().map_or_else(|| header.name(), <[u8]>::to_vec);
        let kind = match flag {
            // Archives from before ustar know directories by the slash only.
            b'0' | 0 if name.ends_with(b"/") => Kind::Directory,
            b'0' | b'7' | 0 if extension.sparse => Kind::Sparse,
            b'0' | b'7' | 0 => Kind::File,
            b'S' => Kind::Sparse,
            b'1' => Kind::HardLink,
            b'2' => Kind::SymbolicLink,
            b'5' => Kind::Directory,
            _ => Kind::Other,
        };
        if flag == b'S' {
            let mut goes_on = header.map_goes_on();
            while goes_on {
                goes_on = self.take_block()?.map_goes_on_again();
            }
        }
        let size = match flag {
            // Their sizes mean something else, if anything: pax, "ustar Interchange Format", typeflag.
            b'1'..=b'6' => 0,
            _ => extension.size.unwrap_or(size),
        };
        let data = self.take_data(size)?;
        Ok(Member { name: String::from_utf8_lossy(&name).into_owned(), kind, data })
    }

    fn damaged(&self, what: &str) -> io::Error {
        invalid(format!("the tar header at byte {} is not usable: {what}", self.header_at))
    }
}

fn invalid(text: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, text)
}

#[cfg(test)]
pub(crate) mod tests {
    use std::io::{Seek, SeekFrom, Write};

    use super::*;

    /// A sound header of GNU's kind.
    pub(crate) fn header(name: &str, flag: u8, size: u64) -> [u8; 512] {
        let mut block = [0; 512];
        block[..name.len()].copy_from_slice(name.as_bytes());
        block[124] = 0x80;
        block[128..136].copy_from_slice(&size.to_be_bytes());
        block[156] = flag;
        block[257..265].copy_from_slice(b"ustar  \0");
        sealed(block)
    }

    fn sealed(mut block: [u8; 512]) -> [u8; 512] {
        block[148..156].fill(b' ');
        let sum: u32 = block.iter().map(|b| u32::from(*b)).sum();
        block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        block
    }

    /// Data, filled up to blocks.
    pub(crate) fn padded(data: &[u8]) -> Vec<u8> {
        let mut data = data.to_vec();
        data.resize(data.len().next_multiple_of(512), 0);
        data
    }

    /// What is found in an archive of these bytes; the hole behind makes it longer.
    fn found(parts: &[&[u8]], hole: u64) -> Result<Vec<Member>, String> {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&parts.concat()).unwrap();
        let len = file.seek(SeekFrom::End(0)).unwrap() + hole;
        file.set_len(len).unwrap();
        members(&file, len).map_err(|e| {
            assert_eq!(e.kind(), io::ErrorKind::InvalidData);
            e.to_string()
        })
    }

    fn file(name: &str, start: u64, len: u64) -> Member {
        Member { name: name.to_owned(), kind: Kind::File, data: Window::new(start, len).unwrap() }
    }

    #[test]
    fn members_are_found_with_and_without_an_end() {
        let (a, b) = (header("a", b'0', 700), header("b", 0, 0));
        let archive: [&[u8]; 3] = [&a, &padded(&[1; 700]), &b];
        let expected = Ok(vec![file("a", 512, 700), file("b", 2048, 0)]);
        for hole in [0, 512, 1024, 10240, 10241] {
            assert_eq!(found(&archive, hole), expected, "{hole}");
        }
        assert_eq!(found(&[&a, &[1; 700]], 0), Ok(vec![file("a", 512, 700)]), "not filled up");
        assert_eq!(found(&[], 1024), Ok(vec![]));
    }

    #[test]
    fn what_is_no_archive_is_refused_by_name() {
        for (bytes, text) in [
            (&b""[..], "no tar archive, it is too short"),
            (b"x", "no tar archive, it is too short"),
            (&[b'x'; 512], "no tar archive"),
            (&padded(b"# Disk DescriptorFile"), "no tar archive"),
            (
                &padded(b"\x1f\x8b\x08"),
                "compressed (gzip): only an uncompressed tar archive can be served, unpack it first",
            ),
        ] {
            assert_eq!(found(&[bytes], 0), Err(text.to_owned()));
        }
        for (magic, name) in [(&b"BZh9"[..], "bzip2"), (b"\xfd7zXZ\0", "xz"), (b"\x28\xb5\x2f\xfd", "zstd")] {
            assert!(found(&[&padded(magic)], 0).unwrap_err().starts_with(&format!("compressed ({name})")));
        }
    }

    #[test]
    fn a_size_past_the_end_is_refused() {
        for (size, hole, ok) in [
            (1024, 1024, true),
            (1024, 1023, false),
            (1, 0, false),
            (u64::MAX, 1024, false),
            (i64::MAX as u64, 1024, false),
            (i64::MAX as u64 - 1023, 1024, false),
        ] {
            let found = found(&[&header("a", b'0', size)], hole);
            assert_eq!(found.is_ok(), ok, "{size} {hole}: {found:?}");
            if let Err(e) = found {
                assert!(e.contains("header at byte 0") && e.contains(&format!("announces {size} bytes")), "{e}");
            }
        }
    }

    #[test]
    fn a_damaged_header_is_named_by_its_offset() {
        let a = header("a", b'0', 3);
        let mut b = header("b", b'0', 3);
        b[0] = b'c';
        let e = found(&[&a, &padded(b"123"), &b], 1024).unwrap_err();
        assert_eq!(e, "the tar header at byte 1024 is not usable: its checksum is wrong");
        let e = found(&[&a, &padded(b"123"), &b[..511]], 0).unwrap_err();
        assert_eq!(e, "cut short: the archive has 1535 bytes, and a header begins at byte 1024");
        b[124..136].copy_from_slice(b"99999999999\0");
        let e = found(&[&sealed(b)], 1024).unwrap_err();
        assert_eq!(e, "the tar header at byte 0 is not usable: its size is no number");
    }

    #[test]
    fn names_of_gigabytes_are_not_read() {
        for flag in [b'L', b'x', b'X', b'g'] {
            for size in [MAX_EXTENSION + 1, 4 << 30, i64::MAX as u64, u64::MAX] {
                let e = found(&[&header("././@LongLink", flag, size)], 5 << 30).unwrap_err();
                assert!(e.ends_with(&format!("{size} bytes of names and attributes are too many")), "{e}");
            }
        }
        // The name of a link's target is skipped, whatever its length.
        assert_eq!(found(&[&header("././@LongLink", b'K', 4 << 30)], 5 << 30), Ok(vec![]));
        let (many, one) = (header("x", b'x', MAX_EXTENSION), padded(&[0; MAX_EXTENSION as usize]));
        let parts = [&many[..], &one].repeat(17);
        let e = found(&parts, 0).unwrap_err();
        assert!(e.ends_with("1048576 bytes of names and attributes are too many"), "{e}");
    }

    #[test]
    fn members_and_headers_are_counted() {
        let all = |block: [u8; 512], n: usize| found(&vec![&block[..]; n], 0);
        assert_eq!(all(header("a", b'0', 0), MAX_MEMBERS).unwrap().len(), MAX_MEMBERS);
        let e = all(header("a", b'5', 0), MAX_MEMBERS + 1).unwrap_err();
        assert_eq!(e, "the tar header at byte 2097152 is not usable: it is one more than 4096 members");
        for flag in [b'L', b'x', b'g', b'K'] {
            assert_eq!(all(header("a", flag, 0), MAX_HEADERS as usize), Ok(vec![]));
            let e = all(header("a", flag, 0), MAX_HEADERS as usize + 1).unwrap_err();
            assert!(e.ends_with("one more than 16384 headers"), "{e}");
        }
    }

    #[test]
    fn a_sparse_map_is_stepped_over_and_ends() {
        let mut sparse = header("s", b'S', 512);
        sparse[482] = 1;
        let sparse = sealed(sparse);
        let mut more = [7; 512];
        let mut last = more;
        (more[504], last[504]) = (1, 0);
        let members = found(&[&sparse, &more, &last, &[9; 512], &header("b", b'0', 0)], 0).unwrap();
        let data = Window::new(3 * 512, 512).unwrap();
        let expected = Member { name: "s".to_owned(), kind: Kind::Sparse, data };
        assert_eq!(members, [expected, file("b", 5 * 512, 0)]);
        let e = found(&[&sparse, &more], 0).unwrap_err();
        assert!(e.starts_with("cut short"), "{e}");
        let endless = vec![&more[..]; MAX_HEADERS as usize];
        let e = found(&[&sparse[..], &endless.concat()], 0).unwrap_err();
        assert!(e.ends_with("one more than 16384 headers"), "{e}");
    }

    #[test]
    fn an_extension_is_for_the_next_member_not_for_the_next_header() {
        // What tar readers disagreed about: a pax size before a long name.
        let archive: [&[u8]; 8] = [
            &header("x", b'x', 12),
            &padded(b"12 size=700\n"),
            &header("././@LongLink", b'L', 5),
            &padded(b"long\0"),
            &header("short", b'0', 0),
            &padded(&[1; 700]),
            &header("b", b'0', 1),
            &padded(b"b"),
        ];
        assert_eq!(found(&archive, 0), Ok(vec![file("long", 5 * 512, 700), file("b", 8 * 512, 1)]));
        let e = found(&[&header("g", b'g', 12), &padded(b"12 size=700\n")], 0).unwrap_err();
        assert!(e.ends_with("it sets names or sizes for all members, which is not supported"), "{e}");
        let comment: [&[u8]; 3] = [&header("g", b'g', 14), &padded(b"14 comment=hi\n"), &header("a", b'0', 0)];
        assert_eq!(found(&comment, 0), Ok(vec![file("a", 1536, 0)]));
    }

    #[test]
    fn links_have_no_data_whatever_their_size() {
        let kinds = [
            (b'1', Kind::HardLink),
            (b'2', Kind::SymbolicLink),
            (b'3', Kind::Other),
            (b'5', Kind::Directory),
            (b'6', Kind::Other),
        ];
        for (flag, kind) in kinds {
            let members = found(&[&header("a", flag, 1 << 40), &header("b", b'0', 0)], 0).unwrap();
            assert_eq!((members[0].kind, members[0].data.len(), members.len()), (kind, 0, 2));
        }
        assert_eq!(found(&[&header("a/", 0, 0)], 0).unwrap()[0].kind, Kind::Directory);
        assert_eq!(found(&[&header("a", b'V', 0)], 0).unwrap()[0].kind, Kind::Other);
    }

    #[test]
    fn arbitrary_damage_to_a_sound_archive_never_panics() {
        let pax = padded(b"10 path=p\n10 size=3\n");
        let archive = [&header("x", b'x', 20)[..], &pax, &header("a", b'0', 3), &padded(b"123")].concat();
        for at in 0..archive.len() {
            for value in [0, 1, b'9', 0x80, 0xff] {
                let mut damaged = archive.clone();
                damaged[at] = value;
                // Sound again, so that what follows the checksum is reached.
                for header in [0, 1024] {
                    let block: [u8; 512] = damaged[header..header + 512].try_into().unwrap();
                    damaged[header..header + 512].copy_from_slice(&sealed(block));
                }
                if let Ok(members) = found(&[&damaged], 0) {
                    assert!(members.iter().all(|m| m.data.end() <= damaged.len() as u64));
                }
            }
        }
    }
}
