//! The queue's ring, for the image's own I/O: libublk keeps one for each thread.

use io_uring::squeue;
use libublk::UblkUringData;
use libublk::uring_async::ublk_submit_sqe_async;
use vdisk_io::{Buf, Ring};

/// Puts operations on the ring of the calling queue thread, beside the ublk commands: one system call for both.
///
/// To be used on a thread whose ring was set up (`queue::set_up_ring`), by tasks that somebody drives.
///
/// libublk's futures must not be dropped before they are ready: the operation goes on, its slot is never freed, and the
/// memory that was lent to it would be. Nothing here drops one: tasks run to their end, and a queue thread that has to
/// give up leaks them. Should it happen all the same, the buffer is leaked rather than freed.
#[derive(Clone, Copy, Debug)]
pub(crate) struct QueueRing;

#[expect(unsafe_code, reason = "a ring lends memory to the kernel")]
// SAFETY: `keep` is given up when libublk's future is ready, which is when it has seen the completion, or when it says
// that nothing was submitted. A future that is dropped earlier leaks it (`Lent`), also when the thread and its ring end.
unsafe impl Ring for QueueRing {
    async unsafe fn submit(&self, sqe: squeue::Entry, keep: Option<Buf>) -> i32 {
        let mut lent = Lent(keep);
        let result = match ublk_submit_sqe_async(sqe, UblkUringData::Target as u64).await {
            Ok(result) => result,
            // Only for user data with bits that are libublk's own: not the ones above.
            Err(_) => -libc::EINVAL,
        };
        lent.0 = None;
        result
    }
}

/// Memory that the kernel may use until the operation is complete.
struct Lent(Option<Buf>);

impl Drop for Lent {
    fn drop(&mut self) {
        if let Some(buf) = self.0.take() {
            tracing::error!("an operation was abandoned: its buffer is leaked");
            std::mem::forget(buf);
        }
    }
}
