//! What a repair changes, kept in a file: written before the image, put back by `vdisk check --undo`.
//!
//! Everything in the file begins at a multiple of 512 bytes. First comes a text, then records: a line of JSON, with as many spaces before
//! its end as fill up the sector, and the bytes that it is about, filled up with zeroes. Bytes, and how to put them back without this
//! program:
//! `{"file":"disk.vmdk","offset":11264,"len":512,"at":1024,"crc32":..,"crc32_after":..}` and
//! `dd conv=notrunc bs=512 if=BACKUP of=disk.vmdk skip=$((1024/512)) seek=$((11264/512)) count=$((512/512))`. The length of a file:
//! `{"file":"disk.vmdk","file_len":131072,"file_len_after":65536}`. What was kept last is put back first. The text has the image's CID: whoever
//! writes to it changes that, and grains may be by then where an old entry would find them.

use std::fs::{File, OpenOptions};
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use flate2::Crc;
use serde::{Deserialize, Serialize};
use vdisk_image::{Backup, ContentId, FileId, FileIo, Kept};
use vdisk_io::{BlockingIo, FileSet, block_on};

use crate::failure::{Failure, Result};

const SECTOR_LEN: usize = 512;
const SECTOR: u64 = SECTOR_LEN as u64;
const MAGIC: &str = "vdisk repair backup, version 1\n";
/// In front of the CID, in the text.
const CONTENT_ID: &str = "CID of the image: ";
/// A record's line at most: a name of 255 bytes, escaped.
const MAX_LINE: usize = 4096;

/// What a record is about.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged, deny_unknown_fields)]
enum Record {
    Bytes {
        /// As the image's directory has it, or with its whole path.
        file: String,
        offset: u64,
        len: u64,
        /// Where the bytes are in the backup.
        at: u64,
        crc32: u32,
        /// Of what the repair wrote there.
        crc32_after: u32,
    },
    Len {
        file: String,
        file_len: u64,
        file_len_after: u64,
    },
}

/// A backup that is being written. Made when there is something to keep.
pub(crate) struct BackupFile {
    names: Vec<String>,
    content_id: Option<ContentId>,
    wanted: Wanted,
    open: Option<(PathBuf, BufWriter<File>)>,
    len: u64,
    /// Something in it is durable, and so may be changed.
    used: bool,
}

/// Which file to write.
#[derive(Clone, Debug)]
pub(crate) enum Wanted {
    None,
    /// This one, which is not there yet.
    File(PathBuf),
    /// The first that is free of `IMAGE.repair-1`, `IMAGE.repair-2` and so on.
    Beside(PathBuf),
}

impl BackupFile {
    /// Of an image with this CID, which a repair leaves as it is.
    pub(crate) fn new(wanted: Wanted, files: &FileSet, content_id: Option<ContentId>) -> Self {
        Self { names: names(files), content_id, wanted, open: None, len: 0, used: false }
    }

    /// The file, if one was needed.
    pub(crate) fn path(&self) -> Option<&Path> {
        self.open.as_ref().map(|(path, _)| &**path).filter(|_| self.used)
    }

    fn open(&mut self) -> io::Result<&mut BufWriter<File>> {
        if self.open.is_none() {
            let (path, file) = self.wanted.create()?;
            self.open = Some((path, BufWriter::with_capacity(1 << 20, file)));
            let text = "Records follow, each a line of JSON and the bytes that were at \"offset\" of \"file\": here they are at byte \"at\".\n\
                        vdisk check --undo puts them back, the last one first.";
            let id = self.content_id.map_or_else(String::new, |id| format!("\n{CONTENT_ID}{id}\n"));
            self.write_line(&format!("{MAGIC}{text}{id}"), SECTOR)?;
        }
        match &mut self.open {
            Some((_, file)) => Ok(file),
            None => Err(io::ErrorKind::NotFound.into()),
        }
    }

    /// Writes a line that takes `len` bytes: more than it has.
    fn write_line(&mut self, line: &str, len: u64) -> io::Result<()> {
        let width = usize::try_from(len).unwrap_or(0).saturating_sub(1);
        self.write(format!("{line:width$}\n").as_bytes())
    }

    /// Writes bytes, and fills up the last sector.
    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        let len = bytes.len() as u64;
        let padding = vec![0; usize::try_from(len.next_multiple_of(SECTOR) - len).unwrap_or(0)];
        let file = self.open()?;
        file.write_all(bytes)?;
        file.write_all(&padding)?;
        self.len += len.next_multiple_of(SECTOR);
        Ok(())
    }

    fn name(&self, file: FileId) -> String {
        usize::try_from(file.0).ok().and_then(|n| self.names.get(n)).cloned().unwrap_or_default()
    }

    fn try_keep(&mut self, kept: Kept<'_>) -> io::Result<()> {
        self.open()?;
        // With its end.
        let room = |line: &str| (line.len() as u64 + 1).next_multiple_of(SECTOR);
        match kept {
            Kept::Len { file, before, after } => {
                let record = Record::Len { file: self.name(file), file_len: before, file_len_after: after };
                let line = serde_json::to_string(&record)?;
                self.write_line(&line, room(&line))
            }
            Kept::Bytes { file, offset, before, after } => {
                let (file, len) = (self.name(file), before.len() as u64);
                let (crc32, crc32_after) = (crc(before), crc(after));
                let line = |at| {
                    let file = file.clone();
                    serde_json::to_string(&Record::Bytes { file, offset, len, at, crc32, crc32_after })
                };
                // Where the bytes are is a part of the line before them: with the largest number, it is as long as it can be.
                let room = room(&line(u64::MAX)?);
                self.write_line(&line(self.len + room)?, room)?;
                self.write(before)
            }
        }
    }

    fn try_sync(&mut self) -> io::Result<()> {
        let used = self.used;
        let Some((path, file)) = &mut self.open else { return Ok(()) };
        file.flush()?;
        file.get_ref().sync_data()?;
        if !used {
            // The name as well.
            let above = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
            File::open(above)?.sync_all()?;
            self.used = true;
        }
        Ok(())
    }

    /// What failed, with the file's name.
    fn explain(&self, e: &io::Error) -> io::Error {
        let path = match (&self.open, &self.wanted) {
            (Some((path, _)), _) | (None, Wanted::File(path) | Wanted::Beside(path)) => path.display().to_string(),
            (None, Wanted::None) => String::new(),
        };
        let kind = e.kind();
        io::Error::new(
            kind,
            format!("{path}: {} (--backup names another file, --no-backup does without)", crate::failure::chain(e)),
        )
    }
}

impl Backup for BackupFile {
    fn keep(&mut self, kept: Kept<'_>) -> io::Result<()> {
        match self.wanted {
            Wanted::None => Ok(()),
            Wanted::File(_) | Wanted::Beside(_) => self.try_keep(kept).map_err(|e| self.explain(&e)),
        }
    }

    fn sync(&mut self) -> io::Result<()> {
        self.try_sync().map_err(|e| self.explain(&e))
    }
}

impl Drop for BackupFile {
    /// One that nothing was changed after helps nobody.
    fn drop(&mut self) {
        if let Some((path, _)) = self.open.as_ref().filter(|_| !self.used)
            && let Err(e) = std::fs::remove_file(path)
        {
            tracing::warn!("remove {}: {e}", path.display());
        }
    }
}

impl Wanted {
    fn create(&self) -> io::Result<(PathBuf, File)> {
        // It has what was in the image.
        let create = |path: &Path| OpenOptions::new().write(true).create_new(true).mode(0o600).open(path);
        match self {
            Self::None => Err(io::ErrorKind::NotFound.into()),
            Self::File(path) => Ok((path.clone(), create(path)?)),
            Self::Beside(image) => {
                for n in 1.. {
                    let mut name = image.clone().into_os_string();
                    name.push(format!(".repair-{n}"));
                    match create(Path::new(&name)) {
                        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
                        made => return Ok((name.into(), made?)),
                    }
                }
                Err(io::ErrorKind::AlreadyExists.into())
            }
        }
    }
}

/// What to call the files of an image: by their place in the directory of the first one.
fn names(files: &FileSet) -> Vec<String> {
    // The image may be named in another way the next time, and from another directory.
    let real = |path: &Path| std::fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    let first = files.iter().next().map(|(_, first)| real(first.path()));
    let above = first.as_deref().and_then(Path::parent).unwrap_or(Path::new(""));
    let name = |path: PathBuf| path.strip_prefix(above).unwrap_or(&path).display().to_string();
    files.iter().map(|(_, file)| name(real(file.path()))).collect()
}

fn crc(bytes: &[u8]) -> u32 {
    let mut crc = Crc::new();
    crc.update(bytes);
    crc.sum()
}

/// A backup that is to be put back.
pub(crate) struct Undo {
    file: File,
    /// As the text has it.
    content_id: Option<String>,
    records: Vec<Record>,
}

impl Undo {
    /// Reads a backup. A last record that is not whole does not count: what it is about was not changed.
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let failed = |e: io::Error| Failure::doing(format_args!("backup {}", path.display()), &e);
        let file = File::open(path).map_err(failed)?;
        let mut reader = BufReader::with_capacity(1 << 20, file.try_clone().map_err(failed)?);
        let mut sector = [0; SECTOR_LEN];
        let is_ours = reader.read_exact(&mut sector).is_ok() && sector.starts_with(MAGIC.as_bytes());
        if !is_ours {
            return Err(Failure::new(format!("{} is no backup of a repair", path.display())));
        }
        let text = String::from_utf8_lossy(&sector);
        let content_id = text.lines().find_map(|line| line.strip_prefix(CONTENT_ID)).map(str::to_owned);
        let mut records = Vec::new();
        while let Some(record) = read_record(&mut reader).map_err(failed)? {
            records.push(record);
        }
        Ok(Self { file, content_id, records })
    }

    /// Puts everything back, and answers how many bytes. Nothing is changed unless the image is as the repair has left it.
    pub(crate) fn run(&self, files: &Arc<FileSet>, content_id: Option<ContentId>) -> Result<u64> {
        let names = names(files);
        let find = |name: &str| -> Result<FileId> {
            let n = names.iter().position(|n| n == name).and_then(|n| u32::try_from(n).ok());
            n.map(FileId).ok_or_else(|| Failure::new(format!("the backup is of another image: it has {name:?}")))
        };
        for record in &self.records {
            find(record.file())?;
        }
        if self.content_id != content_id.map(|id| id.to_string()) {
            let what = "the image was written since the repair, or is another one (its CID differs)";
            return Err(Failure::new(what).hint("nothing was put back"));
        }
        let io = BlockingIo::new(Arc::clone(files));
        for record in &self.records {
            let id = find(record.file())?;
            if !self.is_as_left(&io, files, id, record)? {
                let what = format!("{}: was changed since the repair", files.get(id).path().display());
                return Err(Failure::new(what).hint("nothing was put back"));
            }
        }
        let mut bytes = 0;
        for record in self.records.iter().rev() {
            let id = find(record.file())?;
            let failed = |e: io::Error| Failure::doing(files.get(id).path().display(), &e);
            match record {
                Record::Len { file_len, .. } => block_on(io.set_len(id, *file_len)).map_err(failed)?,
                Record::Bytes { offset, len, at, .. } => {
                    let mut data = vec![0; usize::try_from(*len).unwrap_or(0)];
                    self.file.read_exact_at(&mut data, *at).map_err(failed)?;
                    let buf = io.alloc(data.len());
                    io.copy_in(&buf, 0, &data).map_err(failed)?;
                    block_on(io.write_at(id, &buf, 0..data.len(), *offset)).map_err(failed)?;
                    bytes += len;
                }
            }
        }
        for (id, file) in files.iter().filter(|(_, file)| file.is_writable()) {
            block_on(io.sync_data(id)).map_err(|e| Failure::doing(file.path().display(), &e))?;
        }
        Ok(bytes)
    }

    /// Whether a file is as it was before or after a record.
    fn is_as_left(&self, io: &BlockingIo, files: &FileSet, id: FileId, record: &Record) -> Result<bool> {
        let failed = |e: io::Error| Failure::doing(files.get(id).path().display(), &e);
        let now = files.get(id).len().map_err(failed)?;
        match record {
            Record::Len { .. } => Ok(self.of_same(record).any(|r| match r {
                Record::Len { file_len, file_len_after, .. } => [*file_len, *file_len_after].contains(&now),
                Record::Bytes { .. } => false,
            })),
            // It was cut off: the length is looked at by itself.
            Record::Bytes { offset, len, .. } if offset + len > now => {
                Ok(self.records.iter().any(|r| matches!(r, Record::Len { file, .. } if file == record.file())))
            }
            Record::Bytes { offset, len, .. } => {
                let len = usize::try_from(*len).unwrap_or(0);
                let buf = io.alloc(len);
                block_on(io.read_at(id, &buf, 0..len, *offset)).map_err(failed)?;
                let mut data = vec![0; len];
                io.copy_out(&buf, 0, &mut data).map_err(failed)?;
                let now = crc(&data);
                Ok(self.of_same(record).any(|r| match r {
                    Record::Bytes { crc32, crc32_after, .. } => [*crc32, *crc32_after].contains(&now),
                    Record::Len { .. } => false,
                }))
            }
        }
    }

    /// Records about the same thing: a repair may change a sector more than once.
    fn of_same<'a>(&'a self, record: &'a Record) -> impl Iterator<Item = &'a Record> {
        self.records.iter().filter(move |other| match (record, other) {
            (Record::Len { file, .. }, Record::Len { file: other, .. }) => file == other,
            (Record::Bytes { file, offset, .. }, Record::Bytes { file: other, offset: at, .. }) => {
                file == other && offset == at
            }
            (Record::Len { .. }, Record::Bytes { .. }) | (Record::Bytes { .. }, Record::Len { .. }) => false,
        })
    }
}

impl Record {
    fn file(&self) -> &str {
        match self {
            Self::Bytes { file, .. } | Self::Len { file, .. } => file,
        }
    }
}

/// The next record. `None` at the end, and for one that is not whole.
fn read_record(reader: &mut impl Read) -> io::Result<Option<Record>> {
    let mut line = Vec::new();
    while line.last() != Some(&b'\n') {
        let mut sector = [0; SECTOR_LEN];
        if line.len() > MAX_LINE || !is_whole(reader.read_exact(&mut sector))? {
            return Ok(None);
        }
        line.extend(sector);
    }
    let Ok(record) = serde_json::from_slice::<Record>(&line) else { return Ok(None) };
    if let Record::Bytes { len, crc32, .. } = &record {
        let padded = len.checked_next_multiple_of(SECTOR).and_then(|len| usize::try_from(len).ok());
        // A repair keeps no more than this at once.
        let Some(padded) = padded.filter(|len| *len <= 1 << 24) else { return Ok(None) };
        let mut data = vec![0; padded];
        let whole = is_whole(reader.read_exact(&mut data))?;
        if !whole || data.get(..usize::try_from(*len).unwrap_or(0)).map(crc) != Some(*crc32) {
            return Ok(None);
        }
    }
    Ok(Some(record))
}

fn is_whole(read: io::Result<()>) -> io::Result<bool> {
    match read {
        Ok(()) => Ok(true),
        Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
        Err(e) => Err(e),
    }
}
