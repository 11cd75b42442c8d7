//! The operations of a ring between their submission and the moment somebody takes their result.

use std::task::Waker;

use crate::buf::Buf;

/// Operations by key; a key goes into an SQE's `user_data` and is not reused before both the completion was seen and
/// the future is done with it.
#[derive(Debug, Default)]
pub(crate) struct InFlight {
    slots: Vec<Slot>,
    free: Vec<usize>,
}

#[derive(Debug)]
enum Slot {
    Free,
    /// Not complete; `wanted` ends with the future. The buffer stays for the kernel's sake.
    Pending {
        wanted: bool,
        waker: Option<Waker>,
        _keep: Option<Buf>,
    },
    Done(i32),
}

impl InFlight {
    pub(crate) fn insert(&mut self, keep: Option<Buf>) -> u64 {
        let slot = Slot::Pending { wanted: true, waker: None, _keep: keep };
        let index = self.free.pop().unwrap_or(self.slots.len());
        if index == self.slots.len() {
            self.slots.push(slot);
        } else {
            self.slots[index] = slot;
        }
        index as u64
    }

    /// The completion was seen: the buffer is let go. The waker is for the caller to wake when nothing is borrowed.
    pub(crate) fn complete(&mut self, key: u64, result: i32) -> Option<Waker> {
        match self.replace(key, Slot::Done(result)) {
            Slot::Pending { wanted: true, waker, .. } => waker,
            Slot::Pending { wanted: false, .. } | Slot::Free | Slot::Done(_) => {
                self.forget(key);
                None
            }
        }
    }

    /// The result if there is one, which ends the operation; else `waker` is woken when there is.
    pub(crate) fn poll(&mut self, key: u64, waker: &Waker) -> Option<i32> {
        match self.slot(key) {
            Slot::Done(result) => {
                let result = *result;
                self.forget(key);
                Some(result)
            }
            Slot::Pending { waker: stored, .. } => {
                match stored {
                    Some(stored) => stored.clone_from(waker),
                    None => *stored = Some(waker.clone()),
                }
                None
            }
            Slot::Free => None,
        }
    }

    /// The future is gone. Its buffer stays until the completion.
    pub(crate) fn abandon(&mut self, key: u64) {
        match self.slot(key) {
            Slot::Pending { wanted, .. } => *wanted = false,
            Slot::Free | Slot::Done(_) => self.forget(key),
        }
    }

    /// Ends an operation that the kernel knows nothing of.
    pub(crate) fn forget(&mut self, key: u64) {
        if !matches!(self.replace(key, Slot::Free), Slot::Free) {
            self.free.push(index(key));
        }
    }

    fn slot(&mut self, key: u64) -> &mut Slot {
        &mut self.slots[index(key)]
    }

    fn replace(&mut self, key: u64, slot: Slot) -> Slot {
        std::mem::replace(self.slot(key), slot)
    }
}

fn index(key: u64) -> usize {
    usize::try_from(key).expect("a key was an index")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_abandoned_operation_keeps_its_buffer_until_it_completes() {
        let mut ops = InFlight::default();
        let mut buf = Buf::new(1);
        let key = ops.insert(Some(buf.clone()));
        ops.abandon(key);
        assert!(buf.get_mut().is_none());
        assert_ne!(ops.insert(None), key, "the kernel still has the key");
        assert!(ops.complete(key, 1).is_none());
        assert!(buf.get_mut().is_some());
        assert_eq!(ops.insert(None), key);
    }

    #[test]
    fn a_key_is_not_reused_before_the_result_was_taken() {
        let mut ops = InFlight::default();
        let (first, second) = (ops.insert(None), ops.insert(None));
        assert_eq!(ops.poll(first, Waker::noop()), None);
        assert!(ops.complete(first, -5).is_some() && ops.complete(second, 6).is_none());
        let third = ops.insert(None);
        assert!(third != first && third != second);
        assert_eq!(ops.poll(first, Waker::noop()), Some(-5));
        ops.abandon(second);
        let mut reused = [ops.insert(None), ops.insert(None)];
        reused.sort_unstable();
        assert_eq!(reused, [first, second]);
    }
}
