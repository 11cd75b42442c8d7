//! Which way to the kernel: the only place that knows all transports.

use std::path::Path;

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use crate::failure::{Failure, Result};
use crate::open::Opened;
use crate::options::ZeroCopy;
use crate::signals::Stop;
use crate::state::State;
use crate::{attach_fuse, attach_nbd, modules, serve_ublk};

/// What makes the block device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Transport {
    Ublk,
    Nbd,
    Fuse,
}

/// `--transport`
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Choice {
    Auto,
    Ublk,
    Nbd,
    Fuse,
}

/// How to make the device.
#[derive(Clone, Copy, Debug)]
pub(crate) struct DeviceOptions {
    pub(crate) queues: Option<u16>,
    pub(crate) depth: Option<u16>,
    pub(crate) zero_copy: ZeroCopy,
    /// It shall outlive its server, if it can.
    pub(crate) recoverable: bool,
    /// To know it again.
    pub(crate) cookie: u64,
}

/// How the serving of a device ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// There is no device any more.
    Gone,
    /// It waits for another server. This process must end now.
    LetGo,
}

/// What is to be told of a device on its way.
pub(crate) struct Callbacks {
    /// It is known by what name the device will have, so that it can be found whatever happens next.
    pub(crate) added: OnAdded,
    /// It can be used; and what else there is to say.
    pub(crate) ready: OnReady,
    /// Why no other server could go on with it, if it is to be let go of now.
    pub(crate) kept: WhyKept,
}

type OnAdded = Box<dyn FnOnce(&Path) + Send>;
type OnReady = Box<dyn FnOnce(&Path, Vec<String>) + Send>;
pub(crate) type WhyKept = Box<dyn Fn() -> Option<String> + Send>;

/// Which process serves which image: what a device is known by where the kernel keeps a name for us.
pub(crate) struct ServerId<'a> {
    pub(crate) pid: u32,
    pub(crate) start_time: u64,
    pub(crate) image: &'a str,
}

/// Why a device was not made, or ended before it was stopped.
pub(crate) struct ServeFailure {
    pub(crate) failure: Failure,
    /// The kernel may still send requests.
    pub(crate) device_may_live: bool,
    /// There is no device that would have to be removed.
    pub(crate) device_gone: bool,
}

impl ServeFailure {
    /// Nothing has happened to the device yet.
    fn before(failure: Failure) -> Self {
        Self { failure, device_may_live: false, device_gone: false }
    }
}

impl Transport {
    /// In the order in which they are tried.
    const ALL: [Self; 3] = [Self::Ublk, Self::Nbd, Self::Fuse];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Ublk => "ublk",
            Self::Nbd => "nbd",
            Self::Fuse => "fuse",
        }
    }

    /// Picks a transport that this kernel has, loading its module if need be. The text says why it is not the first.
    pub(crate) fn choose(choice: Choice) -> Result<(Self, Option<String>)> {
        let wanted = match choice {
            Choice::Auto => &Self::ALL[..],
            Choice::Ublk => &[Self::Ublk],
            Choice::Nbd => &[Self::Nbd],
            Choice::Fuse => &[Self::Fuse],
        };
        first_available(wanted, Self::prepare)
    }

    fn prepare(self) -> Result<(), String> {
        modules::load_for(self);
        match self {
            Self::Ublk => serve_ublk::available(),
            Self::Nbd => attach_nbd::available(),
            Self::Fuse => attach_fuse::available(),
        }
    }

    /// What `--direct-io auto` comes to: docs/measurements.md.
    pub(crate) fn is_faster_through_page_cache(self) -> bool {
        match self {
            Self::Ublk | Self::Nbd => false,
            // Each of its few threads waits for its own request: what the page cache answers at once is worth more than room.
            Self::Fuse => true,
        }
    }

    /// Serves until `stop` is given. On return the device is gone, unless the answer says otherwise.
    pub(crate) fn serve(
        self,
        image: &Opened,
        server: &ServerId<'_>,
        options: DeviceOptions,
        callbacks: Callbacks,
        stop: &Stop,
    ) -> Result<End, ServeFailure> {
        match self {
            Self::Ublk => serve_ublk::serve(image, options, callbacks, stop),
            Self::Nbd => attach_nbd::serve(image, server, options, callbacks, stop).map(|()| End::Gone),
            Self::Fuse => attach_fuse::serve(image, server, options, callbacks, stop).map(|()| End::Gone),
        }
    }

    /// Goes on with the device of a dead server, as [`Self::serve`] would.
    pub(crate) fn take_over(
        self,
        image: &Opened,
        dead: &State,
        callbacks: Callbacks,
        stop: &Stop,
    ) -> Result<End, ServeFailure> {
        let taken = self.number(dead).map(|number| match self {
            Self::Ublk => serve_ublk::take_over(image, number, callbacks, stop),
            Self::Nbd | Self::Fuse => {
                Err(ServeFailure::before(Failure::new("only devices of ublk outlive their server")))
            }
        });
        taken.unwrap_or_else(|failure| Err(ServeFailure::before(failure)))
    }

    /// Whether the device of a dead server waits for another one; `None`: that cannot be said yet.
    pub(crate) fn waits(self, dead: &State) -> Result<Option<bool>> {
        match self {
            Self::Ublk => serve_ublk::waits(self.number(dead)?, dead),
            Self::Nbd | Self::Fuse => Ok(Some(false)),
        }
    }

    /// The same, as soon as it can be said, which may take more than a minute.
    pub(crate) fn is_waiting(self, dead: &State) -> Result<bool> {
        match self {
            Self::Ublk => serve_ublk::is_waiting(self.number(dead)?, dead),
            Self::Nbd | Self::Fuse => Ok(false),
        }
    }

    /// Removes a device whose serving process has died. That there is none is no error.
    pub(crate) fn remove(self, state: &State) -> Result<()> {
        let number = self.number(state)?;
        match self {
            Self::Ublk => serve_ublk::remove(number, state),
            Self::Nbd => attach_nbd::remove(number, state),
            Self::Fuse => attach_fuse::remove(number, state),
        }
    }

    /// Waits until a device is gone whose server has exited and that nobody holds any more.
    pub(crate) fn wait_until_gone(self, state: &State) -> Result<()> {
        let number = self.number(state)?;
        match self {
            // Their servers wait for it.
            Self::Ublk | Self::Nbd => Ok(()),
            Self::Fuse => attach_fuse::wait_until_gone(number, state),
        }
    }

    pub(crate) fn number(self, state: &State) -> Result<u32> {
        let device_name = state.device_name();
        let number = device_name.trim_start_matches(|c: char| !c.is_ascii_digit()).parse();
        number.map_err(|_| Failure::new(format!("{device_name} is not a device of {}", self.name())))
    }
}

fn first_available(
    wanted: &[Transport],
    prepare: impl Fn(Transport) -> Result<(), String>,
) -> Result<(Transport, Option<String>)> {
    let mut reasons = Vec::new();
    for &transport in wanted {
        match prepare(transport) {
            Ok(()) if reasons.is_empty() => return Ok((transport, None)),
            Ok(()) => return Ok((transport, Some(format!("{}: using {}", reasons.join(", "), transport.name())))),
            Err(reason) => reasons.push(format!("no {} in this kernel ({reason})", transport.name())),
        }
    }
    Err(Failure::no_transport(reasons.join(", "))
        .hint("--transport auto takes any that there is; vdisk serve needs none of them, NBD clients can use it"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::failure::Exit;

    #[test]
    fn the_first_transport_needs_no_words() {
        assert_eq!(first_available(&Transport::ALL, |_| Ok(())).unwrap(), (Transport::Ublk, None));
    }

    #[test]
    fn another_transport_is_taken_and_says_why() {
        let only = |has| move |t| if t == has { Ok(()) } else { Err("no module".to_owned()) };
        let (transport, notice) = first_available(&Transport::ALL, only(Transport::Nbd)).unwrap();
        assert_eq!(transport, Transport::Nbd);
        assert_eq!(notice.unwrap(), "no ublk in this kernel (no module): using nbd");
        let (transport, notice) = first_available(&Transport::ALL, only(Transport::Fuse)).unwrap();
        assert_eq!(transport, Transport::Fuse);
        assert!(notice.unwrap().ends_with("no nbd in this kernel (no module): using fuse"));
    }

    #[test]
    fn no_transport_is_told_with_every_reason() {
        let failure = first_available(&Transport::ALL, |t| Err(format!("r-{}", t.name()))).unwrap_err();
        assert_eq!(failure.exit, Exit::NoTransport);
        let text = failure.to_string();
        assert!(
            text.contains(
                "no ublk in this kernel (r-ublk), no nbd in this kernel (r-nbd), no fuse in this kernel (r-fuse)"
            ),
            "{text}"
        );
        assert!(text.contains("vdisk serve"), "{text}");
    }
}
