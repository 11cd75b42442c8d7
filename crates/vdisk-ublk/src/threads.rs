//! The queue threads of a device: set up one after the other, started together, ended together.

use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use libublk::ctrl::UblkCtrl;
use libublk::io::UblkDev;
use libublk::sys;

use crate::error::{Error, host_error};
use crate::node;
use crate::queue::{self, Served};
use crate::server::Event;
use crate::stop::{RunningQueue, Stop};

/// The queue threads of a device.
pub(crate) struct Queues {
    dev: Arc<UblkDev>,
    threads: Vec<Queue>,
}

struct Queue {
    tid: i32,
    /// Dropped unused, it tells the thread to end.
    begin: Option<Sender<()>>,
    thread: JoinHandle<()>,
}

impl Queues {
    /// Starts the threads and waits until each has set itself up.
    pub(crate) fn set_up(
        dev: &Arc<UblkDev>,
        served: &Arc<Served>,
        stop: &Stop,
        events: &Sender<Event>,
    ) -> Result<Self, Error> {
        let mut queues = Self { dev: Arc::clone(dev), threads: Vec::new() };
        let mut failure = None;
        for number in 0..dev.dev_info.nr_hw_queues {
            match queues.spawn(number, served, stop.queue(), events.clone()) {
                Ok(queue) => queues.threads.push(queue),
                Err(e) => {
                    failure = Some(e);
                    break;
                }
            }
        }
        match failure {
            None => Ok(queues),
            Some(e) => {
                queues.threads.iter_mut().for_each(|q| q.begin = None);
                queues.join();
                Err(e)
            }
        }
    }

    fn spawn(
        &self,
        number: u16,
        served: &Arc<Served>,
        running: RunningQueue,
        events: Sender<Event>,
    ) -> Result<Queue, Error> {
        let (begin, go) = mpsc::channel();
        let (tell, told) = mpsc::channel();
        let (dev, served) = (Arc::clone(&self.dev), Arc::clone(served));
        let thread = thread::Builder::new()
            .name(format!("ublk-queue-{number}"))
            .spawn(move || {
                let _running = running;
                queue_thread(&served, &dev, number, &tell, &go, &events);
            })
            .map_err(Error::Thread)?;
        // The thread tells one or the other; if it is gone without a word, it has printed why.
        match told.recv() {
            Ok(Ok(tid)) => Ok(Queue { tid, begin: Some(begin), thread }),
            Ok(Err(e)) => Err(e),
            Err(_) => Err(Error::Thread(std::io::Error::other("it ended early"))),
        }
    }

    /// Lets the threads fetch requests and starts the device.
    pub(crate) fn start(&mut self, control: &UblkCtrl) -> Result<(), Error> {
        for (number, queue) in (0..).zip(&mut self.threads) {
            control.set_thread_affinity(number, queue.tid);
            // Only notes the thread in libublk's file.
            let _ = control.configure_queue(&self.dev, number, queue.tid);
            // libublk waits for this before START_DEV: it counts buffers of its own kind only.
            self.dev.notify_buffer_registration_complete(false);
            if let Some(begin) = queue.begin.take() {
                let _ = begin.send(());
            }
        }
        control.start_dev(&self.dev).map_err(Error::control("START_DEV or END_USER_RECOVERY"))?;
        // libublk takes EBUSY for success, which is what the driver answers when the device is stopped meanwhile.
        control.read_dev_info().map_err(Error::control("GET_DEV_INFO"))?;
        let info = control.dev_info();
        if u32::from(info.state) != sys::UBLK_S_DEV_LIVE || !node::wait_for_device(info.dev_id) {
            return Err(Error::NotLive { path: node::path(info.dev_id).display().to_string() });
        }
        node::shorten_timeout(info.dev_id);
        node::wait_for_partition_scan(info.dev_id);
        Ok(())
    }

    /// Stops the device. The queue threads end by that; only here, for without it they would not.
    pub(crate) fn stop(&self, control: &UblkCtrl) {
        while let Err(e) = control.kill_dev() {
            if self.threads.iter().all(|q| q.thread.is_finished()) {
                break;
            }
            tracing::error!(device = self.dev.dev_info.dev_id, "STOP_DEV: {}", host_error(e));
            thread::sleep(Duration::from_secs(1));
        }
    }

    pub(crate) fn join(self) {
        for queue in self.threads {
            // A panic of such a thread ends the process.
            let _ = queue.thread.join();
        }
    }

    /// Ends the threads of a device that did not start, by stopping it until every thread has noticed: a fetch that
    /// arrives after a stop is not answered by that one. Whether they have ended: after a while they are given up.
    pub(crate) fn abandon(self, control: &UblkCtrl) -> bool {
        let deadline = Instant::now() + Duration::from_secs(10);
        while self.threads.iter().any(|q| !q.thread.is_finished()) {
            if Instant::now() > deadline {
                tracing::error!("queue threads of a device that did not start go on");
                return false;
            }
            if let Err(e) = control.kill_dev() {
                tracing::warn!("STOP_DEV: {}", host_error(e));
            }
            thread::sleep(Duration::from_millis(20));
        }
        self.join();
        true
    }
}

fn queue_thread(
    served: &Served,
    dev: &UblkDev,
    number: u16,
    tell: &Sender<Result<i32, Error>>,
    go: &Receiver<()>,
    events: &Sender<Event>,
) {
    let tid = UblkCtrl::init_queue_thread();
    let begin = || tell.send(Ok(tid)).is_ok() && go.recv().is_ok();
    let fault = |e| {
        let _ = events.send(Event::Fault(e));
    };
    if let Err(e) = queue::serve(served, dev, number, begin, &fault)
        && let Err(unheard) = tell.send(Err(e))
        && let Err(e) = unheard.0
    {
        // Nobody listens for the set-up any more: it had succeeded.
        fault(e);
    }
}
