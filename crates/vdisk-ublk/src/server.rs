//! The control thread: the life of a device from ADD_DEV, or from its server's death, to DEL_DEV.

use std::sync::Arc;
use std::sync::mpsc::{self, Sender};
use std::time::Duration;

use libublk::ctrl::{UblkCtrl, UblkCtrlBuilder};
use libublk::io::UblkDev;
use libublk::{UblkError, UblkFlags};
use vdisk_image::Disk;
use vdisk_io::FileSet;

use crate::control::{self, delete_device};
use crate::device::End;
use crate::doors::Doors;
use crate::error::Error;
use crate::features::{RECOVERY, available};
use crate::params::params;
use crate::queue::Served;
use crate::stop::{Stop, Word};
use crate::threads::Queues;
use crate::{node, run_dir};

/// What the control thread tells.
pub(crate) enum Event {
    /// The device has a number. It is started at the word; deleted again, or left to wait, if the word does not come.
    Added(u32, Sender<()>),
    /// The device is there and answers.
    Live,
    /// A queue cannot be served any more: somebody else has to stop the device, for this thread may be waiting for it.
    Fault(Error),
    /// The last event: the device is gone, or was let go of.
    Ended(Result<End, Error>),
}

/// A device to be.
pub(crate) struct Plan {
    pub(crate) disk: Arc<Disk>,
    pub(crate) files: Arc<FileSet>,
    pub(crate) origin: Origin,
    pub(crate) stop: Stop,
}

/// Where the device comes from.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Origin {
    /// It is made.
    New {
        queues: u16,
        depth: u16,
        io_buf_bytes: u32,
        /// `UBLK_F_*`
        flags: u64,
        cookie: u64,
    },
    /// It waits for a server.
    Waiting(u32),
}

/// How long requests under way may take when the device is to be let go of.
const DRAIN: Duration = Duration::from_secs(30);

/// The files' slots in a ring: libublk has 32, the first of which is the char device.
const SLOTS: usize = 31;

impl Plan {
    /// Makes the device, serves it, and deletes it, whatever happens. Or takes a waiting one over; and lets go of it, which it
    /// does by itself if it could not take it over.
    ///
    /// libublk's ring for control commands belongs to a thread: all of this device's are given here, but for the stop.
    pub(crate) fn run(self, events: Sender<Event>) {
        let result = self.device(&events);
        self.stop.end();
        // Before the news: whoever waits for them may want to be the only owner of the disk.
        drop(self);
        let _ = events.send(Event::Ended(result));
    }

    fn device(&self, events: &Sender<Event>) -> Result<End, Error> {
        // Marks the thread as one that block devices depend on (PR_SET_IO_FLUSHER); those that it starts inherit it.
        UblkCtrl::init_queue_thread();
        let control = self.origin.control()?;
        let id = control.dev_info().dev_id;
        run_dir::forget(id);
        let (go, word) = mpsc::channel();
        let mut is_ours = matches!(self.origin, Origin::New { .. });
        let result = match events.send(Event::Added(id, go)) {
            Ok(()) if word.recv().is_ok() => self.serve(&control, events, &mut is_ours),
            // Stopped already. Or nobody waits for the device any more: the driver took too long.
            Ok(()) | Err(_) => Ok(End::Gone),
        };
        if !is_ours {
            return result;
        }
        if let Ok(End::LetGo) = result {
            // Otherwise it deletes the device when it is dropped.
            control.disown();
            return result;
        }
        // Also removes libublk's file. The device has stopped already, or was never started.
        let _ = control.stop_dev();
        match (result, delete_device(&control)) {
            (Err(e), Err(also)) => {
                tracing::error!(device = id, "{also}");
                Err(e.may_live())
            }
            (Ok(end), Ok(())) => Ok(end),
            (Err(e), Ok(())) | (Ok(_), Err(e)) => Err(e),
        }
    }

    /// `is_ours` is set when a device that waited has become this server's, to be deleted in the end.
    fn serve(&self, control: &UblkCtrl, events: &Sender<Event>, is_ours: &mut bool) -> Result<End, Error> {
        let info = control.dev_info();
        if let Origin::Waiting(id) = self.origin {
            // Waits up to 30 s until the dead server's rings are gone, and with them its last writes to the image. For libublk EBUSY
            // is no error.
            let answer = match control.start_user_recover() {
                Ok(refusal) if refusal < 0 => Err(UblkError::UringIOError(refusal)),
                answer => answer,
            };
            answer.map_err(Error::control("START_USER_RECOVERY"))?;
            tracing::info!(device = id, "taking over");
        }
        let (fixed_files, fds) = self.files.fixed_fds(SLOTS);
        let init = |dev: &mut UblkDev| {
            for (slot, fd) in dev.tgt.fds.iter_mut().skip(1).zip(&fds) {
                *slot = *fd;
            }
            dev.tgt.nr_fds = i32::try_from(fds.len() + 1).unwrap_or(1);
            dev.tgt.dev_size = self.disk.geometry().size;
            dev.tgt.params = params(&self.disk.geometry(), info.max_io_buf_bytes);
            Ok(())
        };
        let dev = UblkDev::new("vdisk".to_owned(), init, control).map_err(Error::control("open of /dev/ublkc"))?;
        let doors = Doors::new(info.nr_hw_queues);
        let (disk, files) = (Arc::clone(&self.disk), Arc::clone(&self.files));
        let served = Arc::new(Served { disk, files, fixed_files, doors });
        let mut queues = Queues::set_up(&Arc::new(dev), &served, &self.stop, events)?;
        match queues.start(control) {
            Ok(()) => {
                *is_ours = true;
                let _ = events.send(Event::Live);
                Ok(self.until_the_end(control, queues, &served.doors))
            }
            // To stop it would be the end of the device, which still waits. The queue threads end with the process.
            Err(e) if !*is_ours => Err(e.may_live()),
            Err(e) => {
                let ended = queues.abandon(control);
                Err(if ended { e } else { e.may_live() })
            }
        }
    }

    fn until_the_end(&self, control: &UblkCtrl, queues: Queues, doors: &Doors) -> End {
        let info = control.dev_info();
        let id = info.dev_id;
        loop {
            match self.stop.wait() {
                Word::LetGo if info.flags & RECOVERY != RECOVERY => {
                    tracing::error!(device = id, "is not let go of: it would not wait for another server");
                }
                Word::Stop => {
                    // The driver fails what comes after STOP_DEV, if the device could be recovered. Others it has written back itself.
                    if info.flags & RECOVERY == RECOVERY {
                        node::write_back(id);
                    }
                    queues.stop(control);
                    break;
                }
                // The queue threads keep what they have got, and end with the process.
                Word::LetGo if doors.close(DRAIN, || self.stop.is_triggered()) => return End::LetGo,
                Word::LetGo => {
                    tracing::error!(device = id, "requests are still under way: the device is not let go of")
                }
                Word::Grow => {
                    if let Some(growth) = self.stop.growth() {
                        // Nobody hears of it if whoever asked has ended.
                        let _ = growth.tell.send(grow(control, growth.size));
                    }
                }
                Word::NobodyLeft => break,
            }
        }
        queues.join();
        End::Gone
    }
}

/// Tells the driver how many bytes the device has now. Queues are served meanwhile.
fn grow(control: &UblkCtrl, size: u64) -> Result<(), Error> {
    // The driver does not look at a device's flags for that.
    if !available()?.can_grow() {
        return Err(Error::CannotGrow);
    }
    match control.update_size(size) {
        Ok(refusal) if refusal < 0 => Err(UblkError::UringIOError(refusal)),
        answer => answer.map(drop),
    }
    .map_err(Error::control("UPDATE_SIZE"))
}

impl Origin {
    fn control(self) -> Result<UblkCtrl, Error> {
        match self {
            // The driver chooses the number. libublk cannot be asked for a certain one: when that is taken, its ADD_DEV
            // fails and the clean-up deletes the other's device.
            Self::New { queues, depth, io_buf_bytes, flags, cookie } => UblkCtrlBuilder::default()
                .name("vdisk")
                .nr_queues(queues)
                .depth(depth)
                .io_buf_bytes(io_buf_bytes)
                .ctrl_flags(flags)
                .ctrl_target_flags(cookie)
                .dev_flags(UblkFlags::UBLK_DEV_F_ADD_DEV | UblkFlags::UBLK_DEV_F_DEL_DEV_ASYNC)
                .build()
                .map_err(Error::control("ADD_DEV")),
            Self::Waiting(id) => {
                let found = control::open(id)?.ok_or(Error::NotWaiting { id })?;
                let info = found.dev_info();
                if control::state(info.state) != control::State::Quiesced {
                    return Err(Error::NotWaiting { id });
                }
                run_dir::forget(id);
                let _stand_in = run_dir::stand_in(id);
                // Queues, tags and buffers are those of the device.
                UblkCtrlBuilder::default()
                    .name("vdisk")
                    .id(i32::try_from(id).map_err(|_| Error::NotWaiting { id })?)
                    .nr_queues(info.nr_hw_queues)
                    .depth(info.queue_depth)
                    .io_buf_bytes(info.max_io_buf_bytes)
                    .ctrl_flags(info.flags & RECOVERY)
                    .dev_flags(UblkFlags::UBLK_DEV_F_RECOVER_DEV | UblkFlags::UBLK_DEV_F_DEL_DEV_ASYNC)
                    .build()
                    .map_err(Error::control("GET_DEV_INFO"))
            }
        }
    }
}
