//! Opening a stream-optimized extent: where its grain directory is, or an index of its grains where there is none.
//!
//! A stream is written from its front to its end, so the directory may be known only at the end, by the footer. Without
//! either everything is found by walking over the records. Source: VMware Virtual Disk Format 1.1, "Stream-Optimized
//! Compressed Sparse Extents".

use crate::coding::Entry;
use crate::disk::size;
use crate::error::{DiskError, ErrorKind};
use crate::file_io::{FileId, Files, read_bytes};
use crate::image::Mapping;
use crate::inflate::Record;
use vmdk_parse::{
    Compression, GTE_SIZE, GdOffset, GrainRecord, Marker, SECTOR_SIZE, Sectors, SparseHeader, TableGeometry,
};

/// Footer marker, footer, end-of-stream marker.
const FOOTER_BYTES: u64 = 3 * SECTOR_SIZE;

/// How far from the end of the file the footer is looked for: something may have padded the file.
const SLACK: u64 = 1 << 20;

/// Bytes that are read at once while walking over the records.
const WALK: u64 = 16 << 10;

/// Grains that an index holds at most: 16 MiB of memory (twice that while it is made), 128 GiB of a disk with grains of 64 KiB.
const MAX_INDEXED: usize = if cfg!(test) { 1000 } else { 2 << 20 };

/// What a compressed extent has beside its header.
#[derive(Debug)]
pub(crate) struct Stream {
    geometry: TableGeometry,
    /// In place of the tables, where the file has none that can be used.
    pub(crate) index: Option<Index>,
}

/// Where the grains are, as found by walking over the records.
#[derive(Debug)]
pub(crate) struct Index {
    /// (grain, sector), in order of the grains, each once.
    grains: Box<[(u32, u32)]>,
}

impl Stream {
    /// Where part of the grain is that has its record at byte `at`.
    pub(crate) fn mapping(&self, file: FileId, file_len: u64, at: u64, grain: u64, skip: u64, len: u64) -> Mapping {
        let lba = Sectors(grain * self.geometry.grain_size().0);
        Mapping::Compressed { file, record: Record { at, file_len, lba, geometry: self.geometry }, skip, len }
    }
}

impl Index {
    /// The grains that there are, in order.
    pub(crate) fn grains(&self) -> impl Iterator<Item = u64> {
        self.grains.iter().map(|g| u64::from(g.0))
    }

    /// How many grains are absent from this one on.
    pub(crate) fn absent(&self, grain: u64) -> u64 {
        let next = self.grains.partition_point(|g| u64::from(g.0) < grain);
        self.grains.get(next).map_or(u64::MAX, |g| u64::from(g.0) - grain)
    }

    /// The grain's entry, as a table would have it.
    pub(crate) fn entry(&self, grain: u64) -> Entry {
        let found = self.grains.binary_search_by_key(&grain, |g| u64::from(g.0)).ok();
        found.and_then(|n| self.grains.get(n)).map_or(Entry::Absent, |g| Entry::At(u64::from(g.1) * SECTOR_SIZE))
    }
}

/// Looks for what a compressed extent needs; `None` if the extent is not compressed. `header` gets the place of the
/// directory from the footer. `notices` gets what a user should know.
///
/// # Errors
///
/// [`ErrorKind::Unsupported`] for a stream that is not `read_only`, or that no known program writes;
/// [`ErrorKind::Corrupt`] if header and footer contradict one another, or if there is neither directory nor grain.
pub(crate) async fn open<F: Files>(
    files: &F,
    file: FileId,
    header: &mut SparseHeader,
    read_only: bool,
    notices: &mut Vec<String>,
) -> Result<Option<Stream>, DiskError> {
    let name = files.name(file);
    let unsupported = |what: &str| Err(DiskError::new(ErrorKind::Unsupported, format!("{name}: {what}")));
    match (header.flags.compressed(), header.flags.markers()) {
        (false, false) => return Ok(None),
        (true, true) => {}
        (true, false) => {
            return unsupported("compressed grains without markers (flag bit 16 without 17) are not supported");
        }
        (false, true) => {
            return unsupported("markers without compressed grains (flag bit 17 without 16) are not supported");
        }
    }
    if header.compression != Compression::Deflate {
        return unsupported("compressed grains with compressAlgorithm 0 are not supported");
    }
    if !read_only {
        return unsupported(
            "a compressed (streamOptimized) image cannot be written: use --read-only, or --overlay FILE to write beside it",
        );
    }
    let wrong = |e| DiskError::new(ErrorKind::Corrupt, format!("{name}: sparse extent header")).because(e);
    let geometry = header.geometry().map_err(wrong)?;
    let len = files.len(file).map_err(|e| DiskError::host(format!("{name}: length"), e))?;
    let mut walk = Walk { files, file, name: &name, len, window: Vec::new(), window_at: 0 };
    let in_front = lies_inside(header, header.gd_offset, len);
    let footer = walk.footer(if in_front { FOOTER_BYTES } else { SLACK }).await?;
    if let Some((at, footer)) = &footer {
        check_footer(&name, header, *at, footer)?;
        header.gd_offset = footer.gd_offset;
    }
    if lies_inside(header, header.gd_offset, len) {
        return Ok(Some(Stream { geometry, index: None }));
    }
    let why = match (&footer, header.gd_offset) {
        (_, GdOffset::At(at)) => format!("the grain directory at sector {} does not lie in the file", at.0),
        (None, GdOffset::AtEnd) => "there is no footer at the end of the file".to_owned(),
        (Some(_), GdOffset::AtEnd) => "the footer does not say where the grain directory is".to_owned(),
    };
    let (index, end) = walk.index(header, &geometry).await?;
    let count = index.grains.len();
    if count == 0 {
        return Err(DiskError::new(ErrorKind::Corrupt, format!("{name}: {why}, and no grain is found without it")));
    }
    let cut = match end {
        End::Marked => String::new(),
        End::Cut(at) => format!("; the stream breaks off at byte {at}, and what is missing reads as zeroes"),
    };
    notices.push(format!("{name}: {why}; grains found by walking over the records instead: {count}{cut}"));
    Ok(Some(Stream { geometry, index: Some(index) }))
}

/// Whether the whole grain directory can be at `gd`.
fn lies_inside(header: &SparseHeader, gd: GdOffset, len: u64) -> bool {
    let GdOffset::At(gd) = gd else { return false };
    let bytes = header.directory_len().saturating_mul(GTE_SIZE);
    gd.bytes().filter(|at| *at > 0).and_then(|at| at.checked_add(bytes)).is_some_and(|end| end <= len)
}

/// Refuses a footer that is one of another extent.
fn check_footer(name: &str, header: &SparseHeader, at: u64, footer: &SparseHeader) -> Result<(), DiskError> {
    let facts = |h: &SparseHeader| {
        [
            ("version", u64::from(h.version)),
            ("capacity", h.capacity.0),
            ("grainSize", h.grain_size.0),
            ("numGTEsPerGT", u64::from(h.gtes_per_gt)),
        ]
    };
    for ((field, one), (_, other)) in facts(header).into_iter().zip(facts(footer)) {
        if one != other {
            return Err(DiskError::new(
                ErrorKind::Corrupt,
                format!("{name}: {field} is {one} in the header and {other} in the footer at byte {at}"),
            ));
        }
    }
    Ok(())
}

/// How a walk over the records ended.
enum End {
    /// At the end-of-stream marker or the footer.
    Marked,
    /// At this byte, where there is no record, or one that the file does not hold.
    Cut(u64),
}

/// A file that is looked through.
struct Walk<'a, F: Files> {
    files: &'a F,
    file: FileId,
    name: &'a str,
    len: u64,
    window: Vec<u8>,
    window_at: u64,
}

impl<F: Files> Walk<'_, F> {
    async fn read(&self, at: u64, len: u64) -> Result<Vec<u8>, DiskError> {
        let len = size(len.min(self.len.saturating_sub(at)));
        read_bytes(self.files, self.file, at, len)
            .await
            .map_err(|e| DiskError::host(format!("{}: read {len} bytes at {at}", self.name), e))
    }

    /// Up to a sector at byte `at`: less where the file ends.
    async fn sector(&mut self, at: u64) -> Result<&[u8], DiskError> {
        let wanted = SECTOR_SIZE.min(self.len.saturating_sub(at));
        if at < self.window_at || at + wanted > self.window_at + self.window.len() as u64 {
            self.window = self.read(at, WALK).await?;
            self.window_at = at;
        }
        let skip = size(at - self.window_at);
        Ok(self.window.get(skip..skip + size(wanted)).unwrap_or_default())
    }

    /// The last footer in the last `within` bytes of the file, and its byte offset.
    async fn footer(&self, within: u64) -> Result<Option<(u64, SparseHeader)>, DiskError> {
        // Sectors are counted from the front, wherever the file ends.
        let start = self.len.saturating_sub(within) / SECTOR_SIZE * SECTOR_SIZE;
        let tail = self.read(start, self.len - start).await?;
        let (sectors, _) = tail.as_chunks::<512>();
        for (n, pair) in sectors.windows(2).enumerate().rev() {
            let [marker, footer] = pair else { continue };
            if footer.starts_with(b"KDMV")
                && matches!(Marker::decode(marker), Ok(Marker::Footer { .. }))
                && let Ok(decoded) = SparseHeader::decode(footer)
            {
                return Ok(Some((start + (n as u64 + 1) * SECTOR_SIZE, decoded)));
            }
        }
        Ok(None)
    }

    /// All grains, by walking over the records from the first one on.
    ///
    /// Every record takes a sector at least, so the walk ends; and a sector of zeroes ends it, so that it is no longer than
    /// the data that the file really has, whatever length it claims.
    async fn index(&mut self, header: &SparseHeader, geometry: &TableGeometry) -> Result<(Index, End), DiskError> {
        let descriptor = header.embedded_descriptor().map_or(0, |place| place.end);
        let overhead = header.overhead.bytes().unwrap_or(u64::MAX);
        let mut at = overhead.max(descriptor).max(SECTOR_SIZE);
        let name = self.name;
        let too_many = || {
            let what = format!("{name}: more than {MAX_INDEXED} grains and no directory of them");
            DiskError::new(ErrorKind::Unsupported, what)
        };
        // As many again for records of the same grains: else it would be put in order for each of them.
        let mut grains: Vec<(u32, u32)> = Vec::new();
        let len = self.len;
        let end = loop {
            if at >= len {
                break End::Cut(len);
            }
            let Ok(marker) = Marker::decode(self.sector(at).await?) else { break End::Cut(at) };
            match marker {
                Marker::EndOfStream | Marker::Footer { .. } => break End::Marked,
                Marker::Grain(record) => {
                    // The last record of a file need not be padded.
                    let bytes = GrainRecord::HEAD_LEN as u64 + u64::from(record.len);
                    if record.check(geometry).is_err() || bytes > len - at {
                        break End::Cut(at);
                    }
                    let grain = record.lba.0.checked_div(geometry.grain_size().0).unwrap_or(0);
                    let (Ok(grain), Ok(sector)) = (u32::try_from(grain), u32::try_from(at / SECTOR_SIZE)) else {
                        return Err(too_many());
                    };
                    if grains.len() == 2 * MAX_INDEXED {
                        keep_the_last(&mut grains);
                        if grains.len() > MAX_INDEXED {
                            return Err(too_many());
                        }
                    }
                    grains.push((grain, sector));
                }
                Marker::Table { .. } | Marker::Directory { .. } | Marker::Progress { .. } => {}
            }
            let next = marker.record_sectors().and_then(Sectors::bytes).and_then(|bytes| at.checked_add(bytes));
            match next.filter(|next| *next > at) {
                Some(next) => at = next,
                None => break End::Cut(at),
            }
        };
        keep_the_last(&mut grains);
        if grains.len() > MAX_INDEXED {
            return Err(too_many());
        }
        Ok((Index { grains: grains.into_boxed_slice() }, end))
    }
}

/// Puts the grains in order. Of two records for one grain the later one counts, and the sort puts it behind.
fn keep_the_last(grains: &mut Vec<(u32, u32)>) {
    grains.sort_unstable();
    grains.reverse();
    grains.dedup_by_key(|g| g.0);
    grains.reverse();
}
