//! A disk that is driven by random requests, through the same door as a transport's.

use crate::engine::Engine;
use crate::model::Model;
use crate::tape::Tape;
use futures_util::future::join_all;
use std::cell::RefCell;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Wake, Waker};
use vdisk_image::{
    CheckWatch, CompactWatch, Disk, DiskError, Fault, FaultKind, FileIo, Flags, Format, Op, OpenOptions, Request,
};

/// Bytes of a request at most. More is no fault of the image: whoever asks for a terabyte of zeroes gets it.
const MAX_LEN: u64 = 256 << 10;

/// Requests that are under way together at most.
const TOGETHER: usize = 4;

/// How to open the image: a byte of the input.
pub fn options(byte: u8, read_only: bool) -> OpenOptions {
    OpenOptions {
        read_only: read_only || byte & 1 != 0,
        format: [None, Some(Format::Vmdk), None, Some(Format::Raw)][usize::from(byte >> 1 & 3)],
        cache_bytes: if byte & 8 != 0 { 0 } else { 1 << 20 },
        zeroout_unmaps: byte & 16 != 0,
        ignore_parent_content_id: byte & 32 != 0,
        examine: false,
        drop_change_tracking: byte & 64 != 0,
        keep_content_id: false,
        new_content_id: 0x1234_5678,
    }
}

/// What an input asks of a disk.
#[derive(Clone, Copy, Debug)]
pub struct Ask {
    what: What,
    flags: Flags,
    /// With the next one.
    together: bool,
    len: u64,
    scale: u8,
    place: u32,
    fill: u8,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum What {
    Do(Op),
    Map,
    Span,
    Reopen,
}

impl Ask {
    /// The next request of the tape, which takes 8 bytes.
    pub fn next(tape: &mut Tape<'_>) -> Self {
        let (first, len) = (tape.byte(), u64::from(tape.byte()));
        let what = match first & 7 {
            0 => What::Do(Op::Read),
            1 => What::Do(Op::Write),
            2 => What::Do(Op::Discard),
            3 => What::Do(Op::WriteZeroes),
            4 => What::Do(Op::Flush),
            5 => What::Map,
            6 => What::Span,
            _ => What::Reopen,
        };
        Self {
            what,
            flags: Flags { fua: first & 8 != 0, no_unmap: first & 16 != 0 },
            together: first & 32 != 0,
            len: (len * [1, 512, 512, 4096][usize::from(first >> 6)]).min(MAX_LEN),
            scale: tape.byte(),
            place: tape.u32(),
            fill: tape.byte(),
        }
    }

    /// As many as a byte of the tape says.
    pub fn some(tape: &mut Tape<'_>) -> Vec<Self> {
        let count = tape.byte() % 33;
        (0..count).map(|_| Self::next(tape)).collect()
    }

    /// Where it is on a disk, and how long there.
    fn range(&self, size: u64) -> (u64, u64) {
        let place = u64::from(self.place);
        let offset = match self.scale >> 6 {
            // Near the front, in units of which most borders are multiples.
            0 | 1 => place.checked_shl(u32::from(self.scale % 24)).unwrap_or(0),
            // Anywhere.
            2 => ((u128::from(size) * u128::from(place)) >> 32) as u64,
            // Near the end.
            _ => size - (place & 0xffff).min(size),
        };
        let offset = offset % size.max(1);
        (offset, self.len.min(size - offset))
    }

    fn bytes(&self, offset: u64, len: u64) -> Vec<u8> {
        (offset..offset + len).map(|n| self.fill ^ (n as u8) ^ (n / 512) as u8).collect()
    }
}

/// What came of an ask.
struct Done {
    ask: Ask,
    offset: u64,
    len: u64,
    result: Result<Vec<u8>, DiskError>,
}

impl Done {
    fn changes(&self) -> bool {
        matches!(self.ask.what, What::Do(Op::Write | Op::Discard | Op::WriteZeroes))
    }

    /// Whether both are about a sector that one of them changes.
    fn clashes(&self, other: &Self) -> bool {
        let sectors = |d: &Self| (d.offset / 512, (d.offset + d.len).div_ceil(512));
        let ((a, b), (c, d)) = (sectors(self), sectors(other));
        (self.changes() || other.changes()) && a < d && c < b
    }
}

/// Opens the image and serves what is asked. What is read is what was written or read before, or what the model knew. In an image
/// that is `sound` nothing fails, and nothing contradicts the format afterwards.
///
/// # Panics
///
/// If the disk does what it must not.
pub fn drive(engine: &Engine, options: &OpenOptions, asks: &[Ask], sound: bool, mut model: Model) {
    let Some(mut disk) = open(engine, options, sound) else { return };
    let mut asks = asks;
    while let Some(first) = asks.first() {
        if first.what == What::Reopen {
            asks = &asks[1..];
            close(&disk, engine, &mut model, sound);
            if first.flags.fua && !disk.geometry().read_only {
                drop(disk);
                compact(engine, options, first.flags.no_unmap, sound);
            }
            match open(engine, options, sound) {
                Some(again) => disk = again,
                None => return,
            }
            assert!(disk.info().clean || !sound, "closed, and not clean");
            check_some(&disk, engine, &mut model, sound);
            continue;
        }
        let count = asks.iter().take(TOGETHER).take_while(|a| a.together && a.what != What::Reopen).count() + 1;
        let count = asks.iter().take(count).take_while(|a| a.what != What::Reopen).count();
        let (group, rest) = asks.split_at(count);
        asks = rest;
        let done = run(join_all(group.iter().map(|ask| serve(&disk, engine, *ask))));
        judge(&disk, &mut model, &done, sound);
    }
    check_some(&disk, engine, &mut model, sound);
    close(&disk, engine, &mut model, sound);
    drop(disk);
    if let Some(disk) = open(engine, options, sound) {
        check_some(&disk, engine, &mut model, sound);
    }
    let examine = OpenOptions { read_only: true, examine: true, ..options.clone() };
    if let Some(disk) = open(engine, &examine, sound) {
        run(disk.check(engine, &mut Watch { sound }));
    }
}

/// Compacts the image, or only looks what that would give. Whatever comes of it, the disk reads as before.
fn compact(engine: &Engine, options: &OpenOptions, dry_run: bool, sound: bool) {
    let options = OpenOptions { keep_content_id: true, ..options.clone() };
    let Some(disk) = open(engine, &options, sound) else { return };
    let done = run(disk.compact(engine, dry_run, &mut Watch { sound }));
    let closed = if dry_run { Ok(()) } else { run(disk.close(engine)) };
    if let Err(e) = done.map(drop).and(closed) {
        assert!(!sound, "{}", chain(&e));
    }
}

/// Closes the disk. What could not be made durable may be anything from then on.
fn close(disk: &Disk, engine: &Engine, model: &mut Model, sound: bool) {
    if let Err(e) = run(disk.close(engine)) {
        assert!(!sound, "{}", chain(&e));
        *model = Model::default();
    }
}

/// What is told of a check.
struct Watch {
    sound: bool,
}

impl CheckWatch for Watch {
    fn fault(&mut self, fault: Fault) {
        // What a stream was made without is known, and it is read all the same.
        assert!(!self.sound || fault.kind == FaultKind::NoDirectory, "{fault:?}");
    }

    fn progress(&mut self, done: u64, total: u64) {
        assert!(done <= total);
    }
}

impl CompactWatch for Watch {
    fn progress(&mut self, done: u64, total: u64) {
        assert!(done <= total);
    }

    fn is_stopped(&self) -> bool {
        false
    }
}

fn open(engine: &Engine, options: &OpenOptions, sound: bool) -> Option<Disk> {
    let file = engine.reopen(!options.read_only);
    match run(Disk::open(engine, file, options)) {
        Ok(disk) => Some(disk),
        Err(e) => {
            assert!(!sound, "{e:?}");
            let _ = chain(&e);
            None
        }
    }
}

/// All of an error's text, which is one line for people whatever the input has.
fn chain(e: &DiskError) -> String {
    std::iter::successors(Some(e as &dyn std::error::Error), |e| e.source()).map(|e| format!("{e}: ")).collect()
}

async fn serve(disk: &Disk, engine: &Engine, ask: Ask) -> Done {
    let (offset, len) = ask.range(disk.geometry().size);
    let mut buf = RefCell::default();
    let result = match ask.what {
        What::Do(op) => {
            buf = match op {
                Op::Write => RefCell::new(ask.bytes(offset, len)),
                // Not zeroes: a part that is not filled must be noticed.
                Op::Read => RefCell::new(vec![0xee; len as usize]),
                Op::Discard | Op::WriteZeroes | Op::Flush => engine.alloc(0),
            };
            match Request::check(&disk.geometry(), op, offset, len, ask.flags) {
                Ok(request) => disk.serve(engine, request, &buf).await,
                Err(e) => Err(e),
            }
        }
        What::Map => {
            disk.map(engine, offset, len).await.map(|run| assert!(run.len <= len && (run.len > 0 || len == 0)))
        }
        What::Span => {
            disk.span(engine, offset, len).await.map(|span| assert!(span.len <= len && (span.len > 0 || len == 0)))
        }
        What::Reopen => Ok(()),
    };
    Done { ask, offset, len, result: result.map(|()| buf.into_inner()) }
}

fn judge(disk: &Disk, model: &mut Model, done: &[Done], sound: bool) {
    for (n, d) in done.iter().enumerate() {
        let forbidden = d.changes() && disk.geometry().read_only;
        match &d.result {
            Ok(_) => assert!(!forbidden, "{:?} on a read-only disk", d.ask),
            Err(e) => {
                assert!(!sound || forbidden, "{:?}: {}", d.ask, chain(e));
                let _ = chain(e);
            }
        }
        let clash = done.iter().enumerate().any(|(m, other)| m != n && d.clashes(other));
        let What::Do(op) = d.ask.what else { continue };
        if forbidden {
            continue;
        }
        match (op, &d.result) {
            (Op::Read, Ok(bytes)) if !clash => model.read(d.offset, bytes),
            (Op::Read | Op::Flush, _) => {}
            (Op::Write, Ok(bytes)) if !clash => {
                model.wrote(d.offset, bytes);
            }
            (Op::WriteZeroes, Ok(_)) if !clash => model.wrote(d.offset, &vec![0; d.len as usize]),
            (Op::Write | Op::WriteZeroes | Op::Discard, _) => model.forget(d.offset, d.len),
        }
    }
}

/// Reads some of what is known of the disk again.
fn check_some(disk: &Disk, engine: &Engine, model: &mut Model, sound: bool) {
    let mut sectors: Vec<_> = model.known().collect();
    sectors.sort_unstable();
    for n in sectors.iter().step_by(sectors.len() / 16 + 1) {
        let request =
            Request::check(&disk.geometry(), Op::Read, n * 512, 512, Flags::default()).expect("inside the disk");
        let buf = RefCell::new(vec![0xee; 512]);
        match run(disk.serve(engine, request, &buf)) {
            Ok(()) => model.read(n * 512, &buf.borrow()),
            Err(e) => assert!(!sound, "{}", chain(&e)),
        }
    }
}

/// Runs a future that waits for nothing but itself.
///
/// # Panics
///
/// If nobody wakes it any more.
pub fn run<T>(future: impl Future<Output = T>) -> T {
    let woken = Arc::new(Woken(AtomicBool::new(true)));
    let waker = Waker::from(Arc::clone(&woken));
    let mut future = pin!(future);
    while woken.0.swap(false, Ordering::Relaxed) {
        if let Poll::Ready(value) = future.as_mut().poll(&mut Context::from_waker(&waker)) {
            return value;
        }
    }
    panic!("tasks that nobody wakes");
}

/// Whether a task is to be polled.
struct Woken(AtomicBool);

impl Wake for Woken {
    fn wake(self: Arc<Self>) {
        self.0.store(true, Ordering::Relaxed);
    }
}
