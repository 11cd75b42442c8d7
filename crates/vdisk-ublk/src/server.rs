//! The control thread: the life of a device from ADD_DEV to DEL_DEV.

use std::sync::Arc;
use std::sync::mpsc::{self, Sender};

use libublk::UblkFlags;
use libublk::ctrl::{UblkCtrl, UblkCtrlBuilder};
use libublk::io::UblkDev;
use vdisk_image::Disk;
use vdisk_io::FileSet;

use crate::control::delete_device;
use crate::error::Error;
use crate::params::params;
use crate::queue::Served;
use crate::run_dir;
use crate::stop::Stop;
use crate::threads::Queues;

/// What the control thread tells.
pub(crate) enum Event {
    /// The device has a number. It is started at the word; deleted again if the word does not come.
    Added(u32, Sender<()>),
    /// The device is there and answers.
    Live,
    /// A queue cannot be served any more: somebody else has to stop the device, for this thread may be waiting for it.
    Fault(Error),
    /// The last event: the device is gone.
    Ended(Result<(), Error>),
}

/// A device to be.
pub(crate) struct Plan {
    pub(crate) disk: Arc<Disk>,
    pub(crate) files: Arc<FileSet>,
    pub(crate) queues: u16,
    pub(crate) depth: u16,
    pub(crate) io_buf_bytes: u32,
    /// `UBLK_F_*`
    pub(crate) flags: u64,
    pub(crate) stop: Stop,
}

/// The files' slots in a ring: libublk has 32, the first of which is the char device.
const SLOTS: usize = 31;

impl Plan {
    /// Makes the device, serves it, and deletes it, whatever happens.
    ///
    /// libublk's ring for control commands belongs to a thread: all of this device's are given here, but for the stop.
    pub(crate) fn run(self, events: Sender<Event>) {
        let result = self.device(&events);
        // Before the news: whoever waits for them may want to be the only owner of the disk.
        drop(self);
        let _ = events.send(Event::Ended(result));
    }

    fn device(&self, events: &Sender<Event>) -> Result<(), Error> {
        // Marks the thread as one that block devices depend on (PR_SET_IO_FLUSHER); those that it starts inherit it.
        UblkCtrl::init_queue_thread();
        // The driver chooses the number. libublk cannot be asked for a certain one: when that is taken, its ADD_DEV
        // fails and the clean-up deletes the other's device.
        let control = UblkCtrlBuilder::default()
            .name("vdisk")
            .nr_queues(self.queues)
            .depth(self.depth)
            .io_buf_bytes(self.io_buf_bytes)
            .ctrl_flags(self.flags)
            .dev_flags(UblkFlags::UBLK_DEV_F_ADD_DEV | UblkFlags::UBLK_DEV_F_DEL_DEV_ASYNC)
            .build()
            .map_err(Error::control("ADD_DEV"))?;
        let id = control.dev_info().dev_id;
        run_dir::forget(id);
        let (go, word) = mpsc::channel();
        let result = match events.send(Event::Added(id, go)) {
            Ok(()) if word.recv().is_ok() => self.serve(&control, events),
            // Stopped already. Or nobody waits for the device any more: the driver took too long.
            Ok(()) | Err(_) => Ok(()),
        };
        // Also removes libublk's file. The device has stopped already, or was never started.
        let _ = control.stop_dev();
        match (result, delete_device(&control)) {
            (Err(e), Err(also)) => {
                tracing::error!(device = id, "{also}");
                Err(e.may_live())
            }
            (result, deleted) => result.and(deleted),
        }
    }

    fn serve(&self, control: &UblkCtrl, events: &Sender<Event>) -> Result<(), Error> {
        let info = control.dev_info();
        let (fixed_files, fds) = self.files.fixed_fds(SLOTS);
        let init = |dev: &mut UblkDev| {
            for (slot, fd) in dev.tgt.fds.iter_mut().skip(1).zip(&fds) {
                *slot = *fd;
            }
            dev.tgt.nr_fds = i32::try_from(fds.len() + 1).unwrap_or(1);
            dev.tgt.dev_size = self.disk.geometry().size;
            dev.tgt.params = params(self.disk.geometry(), info.max_io_buf_bytes);
            Ok(())
        };
        let dev = UblkDev::new("vdisk".to_owned(), init, control).map_err(Error::control("open of /dev/ublkc"))?;
        let served = Arc::new(Served { disk: Arc::clone(&self.disk), files: Arc::clone(&self.files), fixed_files });
        let mut queues = Queues::set_up(&Arc::new(dev), &served, &self.stop, events)?;
        match queues.start(control) {
            Ok(()) => {
                let _ = events.send(Event::Live);
                if self.stop.wait() {
                    queues.stop(control);
                }
                queues.join();
                Ok(())
            }
            Err(e) => {
                let ended = queues.abandon(control);
                Err(if ended { e } else { e.may_live() })
            }
        }
    }
}
