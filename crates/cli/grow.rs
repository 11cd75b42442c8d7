//! `vdisk grow`: an image was made longer, and its device is told so. The verb asks the server by SIGHUP and finds the answer in the books.

use std::path::PathBuf;
use std::sync::mpsc::Receiver;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use vdisk_image::Disk;
use vdisk_io::{BlockingIo, FileSet, block_on};

use crate::failure::{Failure, Result};
use crate::open::Opened;
use crate::session::Session;
use crate::signals::Stop;
use crate::size;
use crate::state::{State, StateDir};
use crate::{detach, server};

/// Tell a device that its image has become larger
///
/// Of a raw image (a file, or a block device), or of the last FLAT extent of a VMDK whose descriptor says so too: edit the descriptor in
/// place, after the extent's file was made longer. The device stays as it is otherwise, mounted or not. What is on it (a partition table, a
/// file system) has its own tools to grow. Nothing is made smaller.
///
/// SIGHUP to the serving process does the same, and logs the answer.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  truncate -s +1G disk.raw && sudo vdisk grow /dev/ublkb0 && sudo resize2fs /dev/ublkb0"
)]
pub(crate) struct Args {
    /// The device, or the image that it serves
    #[arg(value_name = "DEVICE|IMAGE")]
    pub(crate) what: PathBuf,
}

/// How long a server may take to answer.
const ANSWER: Duration = Duration::from_secs(60);
const STEP: Duration = Duration::from_millis(50);

pub(crate) fn run(args: &Args, verbose: bool) -> Result<()> {
    crate::logging::to_stderr(verbose);
    if !rustix::process::geteuid().is_root() {
        return Err(Failure::new("needs root: use sudo"));
    }
    let dir = StateDir::host();
    let state = detach::find(&args.what, dir.list()?)?;
    let (device, pid) = (state.device.display(), state.pid);
    let Some(server) = state.process()? else {
        let failure = Failure::new(format!("its server (pid {pid}) is dead"));
        return Err(match state.transport.waits(&state)? {
            Some(false) => failure.hint(format_args!("vdisk detach {device}, and attach the image anew")),
            Some(true) | None => failure.hint(format_args!("vdisk recover {device} first")),
        });
    };
    if !state.ready {
        return Err(Failure::new(format!("{device} is {}", state.word())).hint("try again when vdisk list says live"));
    }
    let Some(before) = state.answers else {
        return Err(Failure::new(format!("pid {pid} is of a vdisk that cannot do it"))
            .hint(format_args!("vdisk recover --upgrade {device} has this one serve the device")));
    };
    server.look_again().map_err(|e| Failure::doing(format_args!("signal pid {pid}"), &e))?;
    let begun = Instant::now();
    loop {
        let ended = server.wait(STEP).map_err(|e| Failure::doing(format_args!("wait for pid {pid}"), &e))?;
        let now = dir.list()?.into_iter().find(|s| s.is_of_same_process(&state) && s.answers > Some(before));
        match now.map(|now| (now.not_grown, now.size)) {
            Some((Some(why), _)) => return Err(Failure::new(why)),
            Some((None, now)) => {
                let (was, is) = (size::human(state.size), size::human(now));
                return crate::print(&format!("{device} has {is} ({now} bytes), it had {was}\n"));
            }
            None if ended => return Err(Failure::new(format!("pid {pid}, its server, has ended"))),
            None if begun.elapsed() >= ANSWER => {
                let text = format!("pid {pid} has not answered within {} s", ANSWER.as_secs());
                return Err(Failure::new(text).hint(detach::log_of(&state)));
            }
            None => {}
        }
    }
}

/// Answers each word on `asked`: in the serving process, on a thread of its own.
pub(crate) fn watch(image: &Opened, session: &Arc<Mutex<Session>>, stop: &Stop, asked: Receiver<()>) -> Result<()> {
    let (disk, files) = (Arc::clone(&image.disk), Arc::clone(&image.files));
    let (session, stop) = (Arc::clone(session), stop.clone());
    let answer = move || {
        for () in asked {
            let Some(had) = server::lock(&session).size() else {
                tracing::warn!("not looked for a larger image: the device is not there yet");
                continue;
            };
            let grown = grow(&disk, &files, had, &stop);
            if let Err(failure) = server::lock(&session).answer(grown) {
                tracing::error!("{failure}");
            }
        }
    };
    let started = thread::Builder::new().name("grow".to_owned()).spawn(answer);
    started.map(drop).map_err(|e| Failure::doing("start a thread", &e))
}

/// Looks how large the image is. The disk has that size before the kernel hears of it.
fn grow(disk: &Disk, files: &Arc<FileSet>, had: u64, stop: &Stop) -> Result<u64> {
    let io = BlockingIo::new(Arc::clone(files));
    let found = block_on(disk.find_growth(&io, |file| files.get(file).len()));
    let (size, end) = found.map_err(|e| Failure::from_error(&e))?;
    let looked = files.get(end).len_again();
    looked.map_err(|e| Failure::doing(format_args!("{}: length", files.get(end).path().display()), &e))?;
    if size == had {
        return Err(Failure::new(format!("has not grown: the image has {size} bytes, as the device")));
    }
    stop.grow(size)?;
    Ok(size)
}

/// How large the kernel says that a device is: what its dead server had written may be older.
pub(crate) fn size_of(state: &State) -> u64 {
    let sectors = std::fs::read_to_string(format!("/sys/block/{}/size", state.device_name()));
    let sectors = sectors.ok().and_then(|text| text.trim_end().parse::<u64>().ok());
    sectors.and_then(|sectors| sectors.checked_mul(512)).filter(|size| *size > 0).unwrap_or(state.size)
}
