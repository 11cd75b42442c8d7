//! What the backend itself costs: a request of 4 KiB whose grain table is in memory, without a kernel, sparse against raw.
//!
//! `cargo bench -p vdisk-image` measures nanoseconds. `tests/bench/image` counts instructions: it runs the program of this file under
//! valgrind as `request --count KIND OP N`, for two N.

#![allow(missing_docs, clippy::unwrap_used, clippy::cast_possible_truncation, reason = "a benchmark")]

use std::cell::RefCell;
use std::hint::black_box;
use std::io;
use std::ops::Range;
use std::pin::pin;
use std::task::{Context, Poll, Waker};

use criterion::Criterion;
use vdisk_image::{ContentId, Disk, FileId, FileIo, Files, Flags, Format, NewImage, Op, OpenOptions, Request, Stored};

/// Files in memory, as plain as can be: what is measured is what lies above them.
struct Plain(RefCell<Vec<u8>>);

impl FileIo for Plain {
    type Buf = RefCell<Vec<u8>>;

    fn alloc(&self, len: usize) -> Self::Buf {
        RefCell::new(vec![0; len])
    }

    fn copy_in(&self, buf: &Self::Buf, at: usize, bytes: &[u8]) -> io::Result<()> {
        buf.borrow_mut()[at..at + bytes.len()].copy_from_slice(bytes);
        Ok(())
    }

    fn copy_out(&self, buf: &Self::Buf, at: usize, bytes: &mut [u8]) -> io::Result<()> {
        bytes.copy_from_slice(&buf.borrow()[at..at + bytes.len()]);
        Ok(())
    }

    fn fill_zero(&self, buf: &Self::Buf, part: Range<usize>) -> io::Result<()> {
        buf.borrow_mut()[part].fill(0);
        Ok(())
    }

    async fn read_at(&self, _: FileId, buf: &Self::Buf, part: Range<usize>, offset: u64) -> io::Result<()> {
        let file = self.0.borrow();
        let bytes =
            file.get(offset as usize..).and_then(|f| f.get(..part.len())).ok_or(io::ErrorKind::UnexpectedEof)?;
        self.copy_in(buf, part.start, bytes)
    }

    async fn write_at(&self, _: FileId, buf: &Self::Buf, part: Range<usize>, offset: u64) -> io::Result<()> {
        let (mut file, offset) = (self.0.borrow_mut(), offset as usize);
        if file.len() < offset + part.len() {
            file.resize(offset + part.len(), 0);
        }
        self.copy_out(buf, part.start, &mut file[offset..offset + part.len()])
    }

    async fn sync_data(&self, _: FileId) -> io::Result<()> {
        Ok(())
    }

    async fn punch_hole(&self, _: FileId, offset: u64, len: u64) -> io::Result<()> {
        self.0.borrow_mut()[offset as usize..(offset + len) as usize].fill(0);
        Ok(())
    }

    async fn zero_range(&self, file: FileId, offset: u64, len: u64) -> io::Result<()> {
        self.punch_hole(file, offset, len).await
    }

    async fn reserve(&self, _: FileId, _: u64, _: u64) -> io::Result<()> {
        Ok(())
    }

    async fn stored_at(&self, _: FileId, offset: u64) -> io::Result<Stored> {
        Ok(Stored { hole: false, len: u64::MAX - offset })
    }

    async fn set_len(&self, _: FileId, len: u64) -> io::Result<()> {
        self.0.borrow_mut().resize(len as usize, 0);
        Ok(())
    }
}

impl Files for Plain {
    fn open(&self, _: FileId, _: &str, _: bool) -> io::Result<FileId> {
        Ok(FileId(0))
    }

    fn open_parent(&self, _: FileId, _: &str) -> io::Result<FileId> {
        Err(io::ErrorKind::NotFound.into())
    }

    fn len(&self, _: FileId) -> io::Result<u64> {
        Ok(self.0.borrow().len() as u64)
    }

    fn name(&self, _: FileId) -> String {
        "disk.vmdk".to_owned()
    }
}

/// Nothing here waits.
fn now<T>(future: impl Future<Output = T>) -> T {
    match pin!(future).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(value) => value,
        Poll::Pending => unreachable!("the engine answers at once"),
    }
}

/// Bytes of the disk: 1024 grains, as many as the cache's memory would take, or 2 grain tables.
const SIZE: u64 = 64 << 20;
const BLOCK: u64 = 4096;

/// A disk whose every block was written.
struct Bench {
    engine: Plain,
    disk: Disk,
    buf: RefCell<Vec<u8>>,
    at: u64,
}

impl Bench {
    fn new(kind: &str) -> Self {
        let mut file = Vec::new();
        let format = match kind {
            "raw" => {
                file.resize(SIZE as usize, 0);
                Format::Raw
            }
            "sparse" => {
                let image =
                    NewImage { size: SIZE, content_id: ContentId(1), parent: None, file_name: "disk.vmdk".to_owned() };
                for (at, bytes) in image.pieces().unwrap() {
                    file.resize(at as usize, 0);
                    file.extend(bytes);
                }
                Format::Vmdk
            }
            _ => unreachable!("raw or sparse"),
        };
        let engine = Plain(RefCell::new(file));
        let options = OpenOptions {
            read_only: false,
            format: Some(format),
            // As it is by default. Reads are spread so wide that none of them finds its grain there.
            cache_bytes: 1 << 20,
            zeroout_unmaps: false,
            ignore_parent_content_id: false,
            examine: false,
            drop_change_tracking: false,
            keep_content_id: false,
            new_content_id: 2,
        };
        let disk = now(Disk::open(&engine, FileId(0), &options)).unwrap();
        let buf = engine.alloc(BLOCK as usize);
        let mut bench = Self { engine, disk, buf, at: 0 };
        (0..SIZE / BLOCK).for_each(|_| bench.request(Op::Write));
        // As one attaches it later.
        now(bench.disk.close(&bench.engine)).unwrap();
        bench.disk = now(Disk::open(&bench.engine, FileId(0), &options)).unwrap();
        (0..SIZE / BLOCK).for_each(|_| bench.request(Op::Read));
        bench
    }

    /// The next request: each in another grain than the last.
    fn request(&mut self, op: Op) {
        // Odd, so that every block has its turn.
        self.at = (self.at + 4_001 * BLOCK) % SIZE;
        let request = Request::check(&self.disk.geometry(), op, self.at, BLOCK, Flags::default()).unwrap();
        now(self.disk.serve(black_box(&self.engine), request, black_box(&self.buf))).unwrap();
    }
}

fn main() {
    let args: Vec<String> = std::env::args().collect();
    if let Some([kind, op, n]) = args.iter().position(|a| a == "--count").and_then(|at| args.get(at + 1..at + 4)) {
        let mut bench = Bench::new(kind);
        let op = if op == "read" { Op::Read } else { Op::Write };
        return (0..n.parse().unwrap()).for_each(|_: u64| bench.request(op));
    }
    let mut criterion = Criterion::default().configure_from_args();
    for (name, op) in [("read", Op::Read), ("write", Op::Write)] {
        let mut group = criterion.benchmark_group(format!("{name} 4 KiB"));
        for kind in ["raw", "sparse"] {
            let mut bench = Bench::new(kind);
            group.bench_function(kind, |b| b.iter(|| bench.request(op)));
        }
        group.finish();
    }
    criterion.final_summary();
}
