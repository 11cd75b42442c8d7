//! The engine that needs nothing: blocking calls, futures ready at once.

use std::io;
use std::ops::Range;
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll, Wake, Waker};
use std::thread::{self, Thread};

use vdisk_image::{FileId, FileIo, Stored};

use crate::buf::Buf;
use crate::files::FileSet;

/// [`FileIo`] by pread(2), pwrite(2) and their like. A future blocks its thread when it is polled, once.
#[derive(Clone, Debug)]
pub struct BlockingIo(Arc<FileSet>);

impl BlockingIo {
    /// An engine on these files.
    pub fn new(files: Arc<FileSet>) -> Self {
        Self(files)
    }
}

impl FileIo for BlockingIo {
    type Buf = Buf;

    buf_methods!();

    async fn read_at(&self, file: FileId, buf: &Buf, part: Range<usize>, offset: u64) -> io::Result<()> {
        self.0.find(file)?.read_exact_at(buf, part, offset)
    }

    async fn write_at(&self, file: FileId, buf: &Buf, part: Range<usize>, offset: u64) -> io::Result<()> {
        self.0.find(file)?.write_all_at(buf, part, offset)
    }

    async fn sync_data(&self, file: FileId) -> io::Result<()> {
        self.0.find(file)?.sync_data()
    }

    async fn punch_hole(&self, file: FileId, offset: u64, len: u64) -> io::Result<()> {
        self.0.find(file)?.punch_hole(offset, len)
    }

    async fn zero_range(&self, file: FileId, offset: u64, len: u64) -> io::Result<()> {
        self.0.find(file)?.zero_range(offset, len)
    }

    async fn reserve(&self, file: FileId, offset: u64, len: u64) -> io::Result<()> {
        self.0.find(file)?.reserve(offset, len)
    }

    async fn reserve_fresh(&self, file: FileId, offset: u64, len: u64) -> io::Result<()> {
        self.0.find(file)?.reserve_fresh(offset, len)
    }

    async fn stored_at(&self, file: FileId, offset: u64) -> io::Result<Stored> {
        Ok(self.0.find(file)?.stored_at(offset))
    }

    async fn set_len(&self, file: FileId, len: u64) -> io::Result<()> {
        self.0.find(file)?.set_len(len)
    }
}

/// Runs a future to its end on this thread, which sleeps while there is nothing to do. For futures on an engine whose
/// calls block ([`BlockingIo`], [`crate::HostFiles`]), and any whose wakers are called from other threads; a future
/// that needs a reactor on this thread would sleep for ever.
pub fn block_on<F: Future>(future: F) -> F::Output {
    let waker = Waker::from(Arc::new(Unpark(thread::current())));
    let mut context = Context::from_waker(&waker);
    let mut future = pin!(future);
    loop {
        match future.as_mut().poll(&mut context) {
            Poll::Ready(value) => return value,
            // A wake since the poll left a token: park returns at once.
            Poll::Pending => thread::park(),
        }
    }
}

struct Unpark(Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.0.unpark();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn block_on_sleeps_until_another_thread_wakes_it() {
        let mut polls = 0;
        let value = block_on(std::future::poll_fn(|context| {
            polls += 1;
            if polls == 3 {
                return Poll::Ready(7);
            }
            let waker = context.waker().clone();
            thread::spawn(move || waker.wake());
            Poll::Pending
        }));
        assert_eq!(value, 7);
    }
}
