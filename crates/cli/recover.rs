//! `vdisk recover`: goes on where a server was killed. A device that waits for another server gets one; of others, what the server
//! left is put into the image.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use vdisk_io::{BlockingIo, block_on};

use crate::failure::{Failure, Result};
use crate::identity::Identity;
use crate::location::Location;
use crate::open::{Opened, real_path};
use crate::options::{DirectIo, ImageOptions};
use crate::overlay::Overlay;
use crate::process::Process;
use crate::report::Reporter;
use crate::state::{State, StateDir};
use crate::transport::Transport;
use crate::{attach, detach, in_use, resume, serve_ublk, server};

/// Take over a device whose serving process died
///
/// A device of ublk outlives its server: whoever uses it waits, and goes on without an error when another server has taken it over, with
/// the options of the dead one. Prints the device.
///
/// Otherwise, what the server had acknowledged and not flushed when it was killed is put into the image. The next attach or serve of the
/// image does the same. After a power cut there is nothing to recover: what was flushed is in the image, the rest is gone.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  sudo vdisk recover /dev/ublkb0\n  \
    sudo vdisk recover --upgrade /dev/ublkb0\n  \
    vdisk recover disk.vmdk")]
pub(crate) struct Args {
    /// The device, or its image
    #[arg(value_name = "DEVICE|IMAGE")]
    pub(crate) image: PathBuf,
    /// Take the device over from a server that lives, too: this program serves it from then on, and whoever uses it sees a pause
    #[arg(long, conflicts_with_all = ["overlay", "trust_paths"])]
    upgrade: bool,
    /// What was served was this overlay of the image
    #[arg(long, value_name = "FILE")]
    overlay: Option<PathBuf>,
    /// Follow extent and parent names that leave the image's directory
    #[arg(long)]
    trust_paths: bool,
}

/// How long the end of a server may take that was killed just now.
const DYING: Duration = Duration::from_secs(3);
/// How long a server may take to let go. It gives up after 30 s.
const LETTING_GO: Duration = Duration::from_secs(90);
/// After this the user is told what is waited for.
const PATIENCE: Duration = Duration::from_secs(5);
const STEP: Duration = Duration::from_millis(200);

pub(crate) fn run(args: &Args, verbose: bool, ready_pipe: bool) -> Result<()> {
    if ready_pipe {
        return take_over(args, verbose);
    }
    crate::logging::to_stderr(verbose);
    let Some(state) = find(args)? else { return recover_image(args) };
    if !rustix::process::geteuid().is_root() {
        return Err(Failure::new("needs root (it is attached as a device): use sudo"));
    }
    if let Some(server) = state.process()? {
        let died = !args.upgrade && server.wait(DYING).map_err(|e| Failure::doing("wait for the server", &e))?;
        if !died && !args.upgrade {
            return Err(Failure::new(format!("{} is served by pid {}", state.device.display(), state.pid))
                .hint("there is nothing to recover; --upgrade has this program serve it from now on"));
        }
        if args.upgrade {
            upgrade(&state, &server)?;
        }
    }
    if !state.transport.is_waiting(&state)? {
        if args.upgrade {
            return Err(Failure::new(format!("{} does not wait for another server", state.device.display())));
        }
        if state.resume.image.overlay == Some(Overlay::Temporary) {
            return Err(temporary(&state));
        }
        return print_told(&close_image(&state.resume.image, true)?);
    }
    attach::in_background()
}

/// Has a process in the background go on with a device that waits.
pub(crate) fn go_on(state: &State) -> Result<PathBuf> {
    attach::background(["recover".into(), state.device.clone().into()], |_, _| Ok(()))
}

fn temporary(state: &State) -> Failure {
    let text = "the changes were in a temporary overlay, which is gone with its server: there is nothing to recover";
    Failure::new(text).hint(format_args!("vdisk detach {} and attach the image anew", state.device.display()))
}

/// In the background process.
fn take_over(args: &Args, verbose: bool) -> Result<()> {
    let found = find(args).and_then(|state| state.ok_or_else(|| Failure::new("is not attached any more")));
    match found {
        Ok(state) => server::run(&state.resume.args(), Some(&state), verbose, true),
        Err(failure) => {
            let _ = Reporter::new(true).failed(&failure);
            Err(failure)
        }
    }
}

/// The device that is meant, if it is not an image without one.
fn find(args: &Args) -> Result<Option<State>> {
    let states = StateDir::host().list()?;
    let named = states.iter().find(|state| state.device == args.image);
    if let Some(state) = named {
        return Ok(Some(state.clone()));
    }
    if in_use::rdev(&args.image).is_some() || args.image.parent() == Some(Path::new("/dev")) {
        let hint = match detach::whole_of(&args.image) {
            Some(whole) => format!("name the whole device: {}", whole.display()),
            None => "vdisk list".to_owned(),
        };
        return Err(Failure::new("is no device of vdisk").hint(hint));
    }
    let options = options(args);
    // A missing image is told by whoever opens it, but for one whose device is there.
    let path = real_path(&options).or_else(|failure| std::path::absolute(&args.image).map_err(|_| failure))?;
    let image = Identity::at(&path);
    if args.upgrade {
        let state = states.into_iter().find(|s| image.is_of(s));
        return state.map(Some).ok_or_else(|| Failure::new("is not attached").hint("vdisk list shows what is"));
    }
    resume::device_of(&image)
}

fn options(args: &Args) -> ImageOptions {
    let overlay = args.overlay.clone().map(Overlay::File);
    ImageOptions { trust_paths: args.trust_paths, overlay, ..ImageOptions::of(args.image.clone()) }
}

/// Has a living server let go of its device, if another one can be expected to go on.
fn upgrade(state: &State, server: &Process) -> Result<()> {
    let device = state.device.display();
    let no = |why: String| Err(Failure::new(format!("{device} stays with its server, pid {}: {why}", state.pid)));
    if state.transport != Transport::Ublk {
        return no(format!("a device of {} ends with its server", state.transport.name()));
    }
    if let Some(why) = &state.resume.impossible {
        return no(format!("another could not go on with it: {why}"));
    }
    if let Some(why) = &state.poisoned {
        return no(format!("a sync of the image has failed: {why}"));
    }
    if !state.ready || !serve_ublk::is_recoverable(state.transport.number(state)?, state)? {
        return no("the device would not wait for another".to_owned());
    }
    if state.log == "stderr" {
        return Err(Failure::new(format!(
            "the server of {device} is in the foreground, for its service manager to start again"
        ))
        .hint(format_args!("kill -USR1 {} has it let go of the device and end", state.pid)));
    }
    let image = Location::of(&state.resume.image.image);
    if let Err(e) = std::fs::metadata(image.path()) {
        return no(format!("{}: {}", image.path().display(), crate::failure::chain(&e)));
    }
    // Not to be ended from here on before there is another server: whoever uses the device waits for that.
    crate::signals::hold(false).map_err(|e| Failure::doing("block signals", &e))?;
    server.let_go().map_err(|e| Failure::doing(format_args!("signal pid {}", state.pid), &e))?;
    await_end(state, server)
}

/// Waits for the end of a server that was told to let go: for as long as it takes, once it has.
fn await_end(state: &State, server: &Process) -> Result<()> {
    let ended = |limit| server.wait(limit).map_err(|e| Failure::doing("wait for the server", &e));
    let begun = Instant::now();
    let mut told = false;
    while !ended(STEP)? {
        if !told && begun.elapsed() >= PATIENCE {
            crate::notice(&format!(
                "waiting for pid {} to finish what is under way and to close {}",
                state.pid, state.image
            ));
            told = true;
        }
        if begun.elapsed() >= LETTING_GO && !has_let_go(state)? {
            let device = state.device.display();
            let text = format!("pid {} has not let go of {device} within {} s", state.pid, LETTING_GO.as_secs());
            return Err(Failure::new(text)
                .hint(format_args!("why, its log says; if vdisk list comes to say dead, vdisk recover {device}")));
        }
    }
    Ok(())
}

/// Whether the books say so.
fn has_let_go(state: &State) -> Result<bool> {
    let (states, _) = StateDir::host().read_all()?;
    Ok(states.iter().any(|s| s.device == state.device && s.pid == state.pid && s.resume.letting_go))
}

fn recover_image(args: &Args) -> Result<()> {
    // It would be made, and there would be nothing to recover.
    if let Some(overlay) = &args.overlay {
        std::fs::metadata(overlay).map_err(|e| Failure::doing(format_args!("overlay {}", overlay.display()), &e))?;
    }
    print_told(&close_image(&options(args), false)?)
}

fn print_told(told: &str) -> Result<()> {
    crate::print(&format!("{told}\n"))
}

/// Takes over what a killed server has left of an image, and closes it. Answers what there was. The server may have died just now.
pub(crate) fn close_image(options: &ImageOptions, is_dying: bool) -> Result<String> {
    let options = ImageOptions { cache_size: 0, ..options.clone() };
    let mut image = Opened::open_after(&options, DirectIo::Off, || is_dying)?;
    let was_clean = image.disk.info().clean;
    let needed = image.disk.needs_ledger();
    let told = image.keep_ledger(&options)?;
    if needed && image.ledger.is_none() {
        return Err(Failure::new(told.join("; ")));
    }
    if !was_clean && !options.read_only {
        let io = BlockingIo::new(Arc::clone(&image.files));
        block_on(image.disk.mend(&io)).map_err(|e| Failure::from_error(&e))?;
    }
    image.close()?;
    Ok(match (told.is_empty(), was_clean) {
        (false, _) => told.join("\n"),
        (true, true) => "nothing to recover: the image was closed".to_owned(),
        (true, false) => "nothing was left that is not in the image, which is closed now".to_owned(),
    })
}
