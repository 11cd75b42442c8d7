//! The executor of a queue thread: a fixed set of tasks, one thread, no system call but to be woken from elsewhere.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Wake, Waker};

use crate::kick::Kick;

thread_local! {
    /// Number of the executor that runs on this thread; 0 for none.
    static HERE: Cell<usize> = const { Cell::new(0) };
    /// Tasks of that executor that were woken on this thread.
    static READY: RefCell<VecDeque<usize>> = const { RefCell::new(VecDeque::new()) };
}

/// Tasks and which of them can go on.
///
/// A wake from the executor's own thread puts the task on a list that no lock guards, as nearly every wake is one for a completion on
/// the thread's ring. One from another thread puts it on a second list, and kicks the thread out of its sleep if that was empty. The
/// thread never sleeps while either is not empty: whoever drives it calls [`Executor::run_ready`] after everything that may wake a
/// task, and before each sleep.
pub(crate) struct Executor<'a> {
    tasks: Vec<Task<'a>>,
    unfinished: usize,
    ready: Arc<Ready>,
}

struct Task<'a> {
    /// `None` when it has finished.
    future: Option<Pin<Box<dyn Future<Output = ()> + 'a>>>,
    wake: Arc<TaskWake>,
    waker: Waker,
}

struct Ready {
    /// Woken on other threads.
    elsewhere: Mutex<Vec<usize>>,
    /// That list is not empty.
    some_elsewhere: AtomicBool,
    executor: usize,
    kick: Arc<Kick>,
}

struct TaskWake {
    task: usize,
    /// On the ready list: not to be put there twice.
    queued: AtomicBool,
    ready: Arc<Ready>,
}

impl Wake for TaskWake {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        if !self.queued.swap(true, Ordering::AcqRel) {
            self.ready.push(self.task);
        }
    }
}

impl Ready {
    fn push(&self, task: usize) {
        if HERE.get() == self.executor {
            READY.with_borrow_mut(|list| list.push_back(task));
            return;
        }
        let mut list = self.elsewhere.lock().unwrap_or_else(PoisonError::into_inner);
        let was_empty = list.is_empty();
        list.push(task);
        self.some_elsewhere.store(true, Ordering::Release);
        drop(list);
        // Of a list that was not empty, the first entry's wake has kicked or is about to.
        if was_empty {
            self.kick.kick();
        }
    }

    /// The executor's own thread alone.
    fn pop(&self) -> Option<usize> {
        debug_assert_eq!(HERE.get(), self.executor, "another executor runs on this thread");
        // Both are looked at each time: tasks that wake one another here must not keep out those that are woken elsewhere.
        if self.some_elsewhere.load(Ordering::Acquire) {
            let mut list = self.elsewhere.lock().unwrap_or_else(PoisonError::into_inner);
            self.some_elsewhere.store(false, Ordering::Relaxed);
            READY.with_borrow_mut(|here| here.extend(list.drain(..)));
        }
        READY.with_borrow_mut(VecDeque::pop_front)
    }
}

impl<'a> Executor<'a> {
    /// The executor of the calling thread, without tasks. The one before it must have ended.
    ///
    /// # Errors
    ///
    /// No more file descriptors.
    pub(crate) fn new() -> io::Result<Self> {
        static NUMBER: AtomicUsize = AtomicUsize::new(1);
        let executor = NUMBER.fetch_add(1, Ordering::Relaxed);
        HERE.set(executor);
        READY.with_borrow_mut(VecDeque::clear);
        let kick = Arc::new(Kick::new()?);
        let ready =
            Arc::new(Ready { elsewhere: Mutex::default(), some_elsewhere: AtomicBool::new(false), executor, kick });
        Ok(Self { tasks: Vec::new(), unfinished: 0, ready })
    }

    /// Where other threads' wakes announce themselves. Somebody has to run [`Kick::answer`].
    pub(crate) fn kick(&self) -> Arc<Kick> {
        Arc::clone(&self.ready.kick)
    }

    /// Adds a task, to be polled by the next [`Executor::run_ready`].
    pub(crate) fn add(&mut self, future: impl Future<Output = ()> + 'a) {
        let wake = Arc::new(TaskWake {
            task: self.tasks.len(),
            queued: AtomicBool::new(false),
            ready: Arc::clone(&self.ready),
        });
        let waker = Waker::from(Arc::clone(&wake));
        waker.wake_by_ref();
        self.tasks.push(Task { future: Some(Box::pin(future)), wake, waker });
        self.unfinished += 1;
    }

    /// Polls tasks until none is ready.
    pub(crate) fn run_ready(&mut self) {
        while let Some(index) = self.ready.pop() {
            let Some(task) = self.tasks.get_mut(index) else { continue };
            // Before the poll: a wake during it counts. A swap, as what the poll looks at must not be read before this is seen elsewhere.
            task.wake.queued.swap(false, Ordering::AcqRel);
            let Some(future) = &mut task.future else { continue };
            if future.as_mut().poll(&mut Context::from_waker(&task.waker)).is_ready() {
                task.future = None;
                self.unfinished -= 1;
            }
        }
    }

    /// How many tasks have not finished.
    pub(crate) fn unfinished(&self) -> usize {
        self.unfinished
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::RefCell;
    use std::future::poll_fn;
    use std::rc::Rc;
    use std::task::Poll;
    use std::thread;

    use io_uring::squeue;
    use vdisk_io::{Buf, Ring};

    /// A task that counts its polls, keeps its waker and ends when told.
    fn counting(polls: &Rc<Cell<usize>>, waker: &Rc<RefCell<Option<Waker>>>, end: usize) -> impl Future<Output = ()> {
        let (polls, waker) = (Rc::clone(polls), Rc::clone(waker));
        poll_fn(move |cx| {
            polls.set(polls.get() + 1);
            *waker.borrow_mut() = Some(cx.waker().clone());
            if polls.get() == end { Poll::Ready(()) } else { Poll::Pending }
        })
    }

    fn waker(of: &Rc<RefCell<Option<Waker>>>) -> Waker {
        of.borrow().clone().expect("polled before")
    }

    #[test]
    fn a_task_is_polled_once_at_first_and_once_for_many_wakes() {
        let (polls, w) = (Rc::default(), Rc::default());
        let mut executor = Executor::new().unwrap();
        executor.add(counting(&polls, &w, 3));
        executor.run_ready();
        executor.run_ready();
        assert_eq!((polls.get(), executor.unfinished()), (1, 1));
        for _ in 0..1000 {
            waker(&w).wake();
        }
        executor.run_ready();
        assert_eq!(polls.get(), 2);
        waker(&w).wake();
        executor.run_ready();
        assert_eq!((polls.get(), executor.unfinished()), (3, 0));
        // A late wake finds nobody.
        waker(&w).wake();
        executor.run_ready();
        assert_eq!(polls.get(), 3);
    }

    #[test]
    fn a_wake_during_the_poll_leads_to_another_poll() {
        let polls = Cell::new(0);
        let mut executor = Executor::new().unwrap();
        executor.add(poll_fn(|cx| {
            polls.set(polls.get() + 1);
            cx.waker().wake_by_ref();
            if polls.get() == 5 { Poll::Ready(()) } else { Poll::Pending }
        }));
        executor.run_ready();
        assert_eq!((polls.get(), executor.unfinished()), (5, 0));
    }

    #[test]
    fn a_wake_from_the_own_thread_does_not_kick_and_one_from_another_does() {
        let (polls, w) = (Rc::default(), Rc::default());
        let mut executor = Executor::new().unwrap();
        executor.add(counting(&polls, &w, 9));
        executor.run_ready();
        let kicked = |e: &Executor<'_>| e.ready.kick.was_kicked();
        waker(&w).wake();
        assert!(!kicked(&executor));
        executor.run_ready();
        let other = waker(&w);
        thread::spawn(move || other.wake()).join().unwrap();
        assert!(kicked(&executor));
        executor.run_ready();
        assert_eq!(polls.get(), 3);
    }

    /// A ring whose only operation is the poll of the eventfd, waited for by blocking.
    struct BlockingRing<'a> {
        kick: &'a Kick,
        asleep: Cell<bool>,
    }

    #[expect(unsafe_code, reason = "the trait asks for it")]
    // SAFETY: nothing is submitted anywhere.
    unsafe impl Ring for BlockingRing<'_> {
        async unsafe fn submit(&self, _: squeue::Entry, _: Option<Buf>) -> i32 {
            let mut first = true;
            poll_fn(|_| {
                self.asleep.set(true);
                if std::mem::take(&mut first) { Poll::Pending } else { Poll::Ready(1) }
            })
            .await
        }
    }

    #[test]
    fn wakes_from_many_threads_are_all_seen_although_the_thread_sleeps_between() {
        const THREADS: usize = 8;
        const WAKES: usize = 2000;
        let counter = Arc::new(AtomicUsize::new(0));
        let done = THREADS * WAKES;
        let mut executor = Executor::new().unwrap();
        let kick = executor.kick();
        let (send, receive) = std::sync::mpsc::channel();
        let mut send = Some(send);
        let seen = Arc::clone(&counter);
        executor.add(poll_fn(move |cx| {
            if let Some(send) = send.take() {
                send.send(cx.waker().clone()).unwrap();
            }
            if seen.load(Ordering::Acquire) == done { Poll::Ready(()) } else { Poll::Pending }
        }));
        executor.run_ready();
        let waker = receive.recv().unwrap();
        let threads: Vec<_> = (0..THREADS)
            .map(|_| {
                let (waker, counter) = (waker.clone(), Arc::clone(&counter));
                thread::spawn(move || {
                    for _ in 0..WAKES {
                        counter.fetch_add(1, Ordering::AcqRel);
                        waker.wake_by_ref();
                    }
                })
            })
            .collect();
        while executor.unfinished() > 0 {
            kick.wait();
            kick.drain();
            executor.run_ready();
        }
        threads.into_iter().for_each(|t| t.join().unwrap());
    }

    #[test]
    fn the_kick_task_ends_when_closed_and_not_before() {
        let kick = Kick::new().unwrap();
        let ring = BlockingRing { kick: &kick, asleep: Cell::new(false) };
        let mut answer = std::pin::pin!(kick.answer(&ring));
        let mut cx = Context::from_waker(Waker::noop());
        assert!(answer.as_mut().poll(&mut cx).is_pending());
        assert!(ring.asleep.get());
        kick.kick();
        assert!(answer.as_mut().poll(&mut cx).is_pending());
        assert!(!ring.kick.was_kicked(), "the kick was drained and the poll renewed");
        kick.close();
        assert!(answer.as_mut().poll(&mut cx).is_ready());
    }
}
