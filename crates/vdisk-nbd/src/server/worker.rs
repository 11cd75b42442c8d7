//! A worker thread's own runtime.

use std::io;

use tokio::runtime::Builder;
use tokio::task::LocalSet;

/// Runs a future on this thread, on a runtime of its own, where tasks stay on this thread.
pub(crate) fn run_on_this_thread<T>(future: impl Future<Output = T>) -> io::Result<T> {
    let runtime = Builder::new_current_thread().enable_all().build()?;
    Ok(LocalSet::new().block_on(&runtime, future))
}
