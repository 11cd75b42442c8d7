//! What the device mapper's target log-writes has logged, and what a power cut at any point of it may leave.
//!
//! The log (`drivers/md/dm-log-writes.c`): a sector with the super block, then for each entry a sector with its head, in which the text
//! of a mark lies too, and the bytes that were written. A write enters the log when a flush that came after it is done, or at once if
//! it went around the disk's cache (FUA): what lies before a flush in the log was durable when the flush was.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

const MAGIC: u64 = 0x006a_7366_7773_6872;
const FLUSH: u64 = 1;
const FUA: u64 = 1 << 1;
const DISCARD: u64 = 1 << 2;
const MARK: u64 = 1 << 3;
/// What a disk writes whole or not at all, at least.
const ATOM: u64 = 512;

/// A log in memory but for the bytes that were written.
pub(crate) struct Log {
    file: File,
    pub(crate) entries: Vec<Entry>,
}

#[derive(Debug)]
pub(crate) struct Entry {
    /// On the disk, in bytes.
    to: u64,
    len: u64,
    /// Where the bytes are in the log.
    from: u64,
    flags: u64,
    /// Of a mark.
    pub(crate) mark: Option<String>,
}

impl Log {
    pub(crate) fn read(path: &Path) -> io::Result<Self> {
        let file = File::open(path)?;
        let mut head = [0; 512];
        file.read_exact_at(&mut head, 0)?;
        let word = |head: &[u8; 512], n: usize| u64::from_le_bytes(head[n * 8..n * 8 + 8].try_into().unwrap());
        assert_eq!(word(&head, 0), MAGIC, "no log");
        let (count, sector) = (word(&head, 2), word(&head, 3) & u64::from(u32::MAX));
        let mut entries = Vec::new();
        let mut at = sector;
        for _ in 0..count {
            file.read_exact_at(&mut head, at)?;
            let (flags, text) = (word(&head, 2), word(&head, 3) as usize);
            let mark = (flags & MARK != 0).then(|| String::from_utf8_lossy(&head[32..32 + text]).into_owned());
            let (to, len) = (word(&head, 0) * sector, word(&head, 1) * sector);
            entries.push(Entry { to, len, from: at + sector, flags, mark });
            at += sector + if flags & DISCARD == 0 { len } else { 0 };
        }
        Ok(Self { file, entries })
    }

    /// The texts of the marks among the first so many entries.
    pub(crate) fn marks(&self, point: usize) -> impl Iterator<Item = &str> {
        self.entries[..point].iter().filter_map(|e| e.mark.as_deref())
    }

    /// Does to a disk, which is as it was when the log began, what is left of it if the power goes after the first so many entries:
    /// everything up to the last flush, and of the sectors written after it those that `kept` says.
    pub(crate) fn replay(&self, disk: &File, point: usize, mut kept: impl FnMut() -> bool) -> io::Result<()> {
        let entries = &self.entries[..point];
        let flushed = entries.iter().rposition(|e| e.flags & FLUSH != 0).map_or(0, |n| n + 1);
        for (n, entry) in entries.iter().enumerate().filter(|(_, e)| e.mark.is_none()) {
            let mut bytes = vec![0; entry.len as usize];
            if entry.flags & DISCARD == 0 {
                self.file.read_exact_at(&mut bytes, entry.from)?;
            }
            if n < flushed || entry.flags & FUA != 0 {
                disk.write_all_at(&bytes, entry.to)?;
                continue;
            }
            for (atom, at) in bytes.chunks(ATOM as usize).zip((entry.to..).step_by(ATOM as usize)) {
                if kept() {
                    disk.write_all_at(atom, at)?;
                }
            }
        }
        Ok(())
    }
}
