//! The one writer of a connection: takes what is ready and writes it by one call.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::rc::Rc;
use std::time::Duration;

use tokio::io::{AsyncWrite, AsyncWriteExt};
use tokio::sync::Notify;
use vdisk_io::Buf;

use super::flight::Permit;
use super::pool::Pool;
use super::terms::progress;

/// Replies that are joined at most.
const BATCH: usize = 32;

/// A reply that is ready.
#[derive(Debug)]
pub(super) struct Reply {
    pub(super) head: Head,
    pub(super) payload: Payload,
    /// Held until the reply is written.
    pub(super) permit: Permit,
}

/// The longest head is that of a data chunk.
#[derive(Clone, Copy, Debug)]
pub(super) struct Head {
    bytes: [u8; 28],
    len: usize,
}

impl<const N: usize> From<[u8; N]> for Head {
    fn from(head: [u8; N]) -> Self {
        const { assert!(N <= 28, "longer than the longest head") };
        let mut bytes = [0; 28];
        for (to, from) in bytes.iter_mut().zip(head) {
            *to = from;
        }
        Self { bytes, len: N }
    }
}

/// What follows the head.
#[derive(Debug)]
pub(super) enum Payload {
    None,
    Text(Box<str>),
    /// The first so many bytes of a buffer that nobody else holds.
    Data(Buf, usize),
}

/// Replies on their way to the writer.
#[derive(Debug, Default)]
pub(super) struct Queue {
    replies: RefCell<VecDeque<Reply>>,
    closed: Cell<bool>,
    changed: Notify,
}

impl Queue {
    /// Hands a reply to the writer. After [`Queue::close`] it is dropped.
    pub(super) fn push(&self, reply: Reply) {
        if !self.closed.get() {
            self.replies.borrow_mut().push_back(reply);
            self.changed.notify_one();
        }
    }

    /// The writer ends after what is in the queue.
    pub(super) fn close(&self) {
        self.closed.set(true);
        self.changed.notify_one();
    }

    async fn next(&self, batch: &mut Vec<Reply>) {
        loop {
            {
                let mut replies = self.replies.borrow_mut();
                let n = replies.len().min(BATCH);
                batch.extend(replies.drain(..n));
            }
            if !batch.is_empty() || self.closed.get() {
                return;
            }
            self.changed.notified().await;
        }
    }
}

/// Closes the queue and empties it, so that nobody waits for replies that are not going to be written.
struct CloseOnDrop(Rc<Queue>);

impl Drop for CloseOnDrop {
    fn drop(&mut self) {
        self.0.close();
        let left = self.0.replies.take();
        drop(left);
    }
}

/// Writes replies until the queue is closed and empty.
pub(super) async fn write_replies<W: AsyncWrite + Unpin>(
    mut stream: W,
    queue: Rc<Queue>,
    pool: Rc<Pool>,
    stall: Option<Duration>,
) -> io::Result<()> {
    let guard = CloseOnDrop(queue);
    let mut batch = Vec::with_capacity(BATCH);
    loop {
        guard.0.next(&mut batch).await;
        if batch.is_empty() {
            return stream.shutdown().await;
        }
        write_all(&mut stream, &mut batch, stall).await?;
        for Reply { payload, permit, .. } in batch.drain(..) {
            if let Payload::Data(buf, _) = payload {
                pool.give(buf);
            }
            drop(permit);
        }
    }
}

async fn write_all<W: AsyncWrite + Unpin>(
    stream: &mut W,
    batch: &mut [Reply],
    stall: Option<Duration>,
) -> io::Result<()> {
    let mut slices = [IoSlice::new(&[]); 2 * BATCH];
    for (pair, reply) in slices.chunks_exact_mut(2).zip(batch) {
        let payload = match &mut reply.payload {
            Payload::None => None,
            Payload::Text(text) => Some(text.as_bytes()),
            Payload::Data(buf, len) => {
                let bytes = buf.get_mut().and_then(|bytes| bytes.get(..*len));
                Some(bytes.ok_or_else(|| io::Error::other("the engine kept a buffer after its request"))?)
            }
        };
        if let [first, second] = pair {
            *first = IoSlice::new(reply.head.bytes.get(..reply.head.len).unwrap_or_default());
            *second = IoSlice::new(payload.unwrap_or_default());
        }
    }
    let mut left = slices.as_mut_slice();
    // Drops the empty ones in front.
    IoSlice::advance_slices(&mut left, 0);
    while !left.is_empty() {
        match progress(stall, "took", stream.write_vectored(left)).await? {
            0 => return Err(io::ErrorKind::WriteZero.into()),
            n => IoSlice::advance_slices(&mut left, n),
        }
    }
    Ok(())
}
