//! Work that takes longer than a queue may be away: a pool of threads, one for each processor, that all queues share.

use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::{Pid, getpid};
use rayon::{ThreadPool, ThreadPoolBuilder};
use std::sync::OnceLock;
use tokio::sync::oneshot;

/// Does the work on a thread of the pool, or here where there is none to spare. On any executor.
pub(crate) async fn compute<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    let Some(pool) = pool() else { return work() };
    let (done, result) = oneshot::channel();
    pool.spawn(move || {
        // Nobody waits any more: nobody wants it.
        let _ = done.send(work());
    });
    result.await.expect("a panic in the pool ends the process")
}

/// The pool, which begins with the first work. `None`: there is only one processor, or the host gives no more threads.
fn pool() -> Option<&'static ThreadPool> {
    static POOL: OnceLock<Option<ThreadPool>> = OnceLock::new();
    let start = || {
        // The first thread's: a queue has its own.
        let processors = sched_getaffinity(getpid()).ok()?;
        let threads = (0..CpuSet::count()).filter(|n| processors.is_set(*n) == Ok(true)).count();
        if threads < 2 {
            return None;
        }
        let pool = ThreadPoolBuilder::new()
            .num_threads(threads)
            .thread_name(|n| format!("compute {n}"))
            // A thread that a queue starts has the queue's processors, and its flag that keeps it from waiting for the device
            // (PR_SET_IO_FLUSHER). The flag is right.
            .start_handler(move |n| {
                if let Err(e) = sched_setaffinity(Pid::from_raw(0), &processors) {
                    tracing::debug!("thread {n} of the pool stays with the processors that it has: {e}");
                }
            })
            .build();
        pool.inspect_err(|e| tracing::warn!("grains are inflated by the queues alone: {e}")).ok()
    };
    POOL.get_or_init(start).as_ref()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::block_on;
    use futures_util::future::join_all;
    use std::sync::{Arc, Barrier};

    #[test]
    fn work_is_done_at_the_same_time_and_its_results_come_back() {
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        // Each waits for all others: one after the other they would wait for ever.
        let together = Arc::new(Barrier::new(processors.min(2)));
        let work = |n: usize| {
            let together = Arc::clone(&together);
            compute(move || {
                together.wait();
                n * 2
            })
        };
        assert_eq!(
            block_on(join_all((0..processors.min(2)).map(work))),
            (0..processors.min(2)).map(|n| n * 2).collect::<Vec<_>>()
        );
    }
}
