//! Memory for requests, shared by the connections of a server.

use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Bytes that are counted as one: the smallest buffer.
const UNIT: usize = 4 << 10;

/// Bytes that connections on any thread take shares of, first come, first served. Clones share the same bytes.
#[derive(Clone, Debug)]
pub(super) struct Budget {
    units: Arc<Semaphore>,
    total: u32,
}

/// A share; comes back when it is dropped.
pub(super) type Share = OwnedSemaphorePermit;

impl Budget {
    pub(super) fn new(bytes: usize) -> Self {
        // Far below Semaphore::MAX_PERMITS, on every machine.
        let total = u32::try_from(bytes / UNIT).unwrap_or(u32::MAX).clamp(1, u32::MAX >> 4);
        Self { units: Arc::new(Semaphore::new(usize::try_from(total).unwrap_or(1))), total }
    }

    /// Waits for a share. One that is larger than all there is gets all there is.
    pub(super) async fn share(&self, bytes: usize) -> Option<Share> {
        let units = u32::try_from(bytes.div_ceil(UNIT)).unwrap_or(u32::MAX).min(self.total);
        // It is never closed.
        Arc::clone(&self.units).acquire_many_owned(units).await.ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_share_larger_than_the_budget_is_all_of_it() {
        let budget = Budget::new(1 << 20);
        let all = budget.share(64 << 20).await.unwrap();
        assert_eq!((all.num_permits(), budget.units.available_permits()), (256, 0));
        drop(all);
        assert_eq!(budget.share(1).await.unwrap().num_permits(), 1);
    }

    #[test]
    fn a_share_that_comes_back_wakes_another_thread() {
        let budget = Budget::new(1 << 20);
        let wait = || tokio::runtime::Builder::new_current_thread().build().unwrap();
        let all = wait().block_on(budget.share(1 << 20));
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| wait().block_on(budget.share(4096)).is_some());
            std::thread::sleep(std::time::Duration::from_millis(50));
            drop(all);
            assert!(waiting.join().unwrap());
        });
    }
}
