//! What the next server of a device has to know, should its server die: kept in the books.

use std::path::{Path, absolute};

use serde::{Deserialize, Serialize};

use crate::attach::Args;
use crate::failure::{Failure, Result};
use crate::identity::Identity;
use crate::open::Opened;
use crate::options::{DirectIo, ImageOptions, ZeroCopy};
use crate::overlay::Overlay;
use crate::state::{State, StateDir};
use crate::transport::{Choice, Transport};
use crate::{grow, size};

/// The options with paths that do not depend on the working directory.
pub(crate) fn anywhere(options: &ImageOptions) -> Result<ImageOptions> {
    let anywhere =
        |path: &Path| absolute(path).map_err(|e| Failure::doing(format_args!("find {}", path.display()), &e));
    let overlay = match &options.overlay {
        Some(Overlay::File(overlay)) => Some(Overlay::File(anywhere(overlay)?)),
        other => other.clone(),
    };
    Ok(ImageOptions { image: anywhere(&options.image)?, overlay, ..options.clone() })
}

/// How the image was opened, and what makes sure that it and the device still belong together.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Resume {
    /// With absolute paths.
    pub(crate) image: ImageOptions,
    direct_io: DirectIo,
    /// Kept by the driver with the device, whose number others may have by now.
    pub(crate) cookie: u64,
    /// The image has one of these, or somebody else has changed it.
    content_ids: Vec<u32>,
    /// Its files, the one that is named first, and those below it, by device and inode: a copy of them is not what the server had.
    pub(crate) files: Vec<(u64, u64)>,
    /// Why no other server can go on with what this one has answered.
    pub(crate) impossible: Option<String>,
    /// A server is taking the device over.
    pub(crate) taking_over: bool,
    /// It has told the driver.
    pub(crate) begun: bool,
    /// The server has let go of the device, and ends as soon as the image is closed.
    #[serde(default)]
    pub(crate) letting_go: bool,
}

impl Resume {
    /// Of a device that is about to be made, by options with absolute paths.
    pub(crate) fn new(options: ImageOptions, direct_io: DirectIo, image: &Opened) -> Self {
        Self {
            image: options,
            direct_io,
            cookie: cookie(),
            content_ids: image.disk.content_ids().map(|id| id.0).collect(),
            files: image.all_files(),
            impossible: None,
            taking_over: false,
            begun: false,
            letting_go: false,
        }
    }

    /// The same with the image's ledger kept or not.
    pub(crate) fn with_ledger_of(self, image: &Opened) -> Self {
        let impossible = match (&self.image.overlay, &image.ledger) {
            (Some(Overlay::Temporary), _) => {
                Some("the changes were in a temporary overlay, which is gone with its server")
            }
            (_, None) if image.disk.may_lose_entries() => Some("there was no ledger, and what was not flushed is lost"),
            _ => None,
        };
        Self { impossible: impossible.map(str::to_owned), ..self }
    }

    /// Of a device that waits, and that the process with these options takes over.
    pub(crate) fn take_over(mut self, dead: &Self) -> Self {
        self.cookie = dead.cookie;
        self.content_ids.extend(&dead.content_ids);
        self.content_ids.sort_unstable();
        self.content_ids.dedup();
        Self { taking_over: true, ..self }
    }

    /// What is known when the take-over has failed.
    pub(crate) fn left_by(self, dead: &Self) -> Self {
        Self { content_ids: self.content_ids, ..dead.clone() }
    }

    /// How the dead server was started.
    pub(crate) fn args(&self) -> Args {
        Args {
            image: self.image.clone(),
            direct_io: self.direct_io,
            transport: Choice::Ublk,
            queues: None,
            depth: None,
            // The device has it or not.
            zero_copy: ZeroCopy::Auto,
            foreground: false,
        }
    }
}

impl State {
    /// Makes sure that this image is what the waiting device was left with.
    pub(crate) fn check_fits(&self, image: &Opened) -> Result<()> {
        let device = self.device.display();
        let geometry = image.geometry();
        let size = grow::size_of(self);
        // A raw image may have grown meanwhile, or before its server could tell the device.
        let has_size = geometry.size == size || geometry.size > size && image.disk.can_grow();
        if !has_size || geometry.read_only != self.read_only {
            let what = |size, read_only| {
                format!("{}, {}", size::human(size), if read_only { "read-only" } else { "read-write" })
            };
            let (was, is) = (what(size, self.read_only), what(geometry.size, geometry.read_only));
            return Err(Failure::new(format!(
                "{device} waits for a server of this image ({was}), and this would be {is}"
            ))
            .hint(format_args!("vdisk recover {device} goes on with it, vdisk detach {device} removes it")));
        }
        let changed = image.disk.info().content_id.is_some_and(|id| !self.resume.content_ids.contains(&id.0));
        let marked = StateDir::host().why_poisoned(self.resume.cookie);
        let what = if let Some(why) = self.poisoned.as_ref().or(marked.as_ref()) {
            format!("a sync had failed ({why})")
        } else if self.resume.files != image.all_files() {
            "is another file than the one that was served".to_owned()
        } else if changed {
            "was changed by another program since its server died".to_owned()
        } else if image.is_ledger_lost() {
            "what was acknowledged and not flushed is lost (a sync failed, or another program closed it)".to_owned()
        } else {
            return Ok(());
        };
        Err(Failure::new(format!("{what}: it is not what {device} was")))
    }
}

/// The device of an image that would outlive its server and is there: first of all one whose server is dead. Needs no privileges: the
/// driver takes the devices away that do not wait.
pub(crate) fn device_of(image: &Identity) -> Result<Option<State>> {
    let is_there = |s: &State| {
        let there = Path::new("/sys/block").join(s.device_name()).exists();
        s.transport == Transport::Ublk && image.is_of(s) && !s.device_gone && there
    };
    Ok(StateDir::host().list()?.into_iter().filter(is_there).min_by_key(State::is_live))
}

/// Refuses to change an image under a device that waits. The image is locked: if there is a server, it is about to end.
pub(crate) fn refuse_waiting(image: &Identity) -> Result<()> {
    let Some(state) = device_of(image)? else { return Ok(()) };
    let device = state.device.display();
    Err(Failure::new(format!("{device} waits for its next server, and this would change its image"))
        .hint(format_args!("vdisk recover {device} goes on with it, vdisk detach {device} removes it")))
}

fn cookie() -> u64 {
    let mut bytes = [0; 8];
    match rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty()) {
        // 0 is what other programs' devices have.
        Ok(_) => u64::from_ne_bytes(bytes).max(1),
        Err(_) => u64::from(std::process::id()),
    }
}

/// A path as text, or as its bytes if they are no UTF-8.
pub(crate) mod path {
    use std::ffi::OsString;
    use std::os::unix::ffi::{OsStrExt, OsStringExt};
    use std::path::{Path, PathBuf};

    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Form {
        Text(PathBuf),
        Bytes(Vec<u8>),
    }

    pub(crate) fn serialize<S: Serializer>(path: &Path, serializer: S) -> Result<S::Ok, S::Error> {
        match path.to_str() {
            Some(text) => text.serialize(serializer),
            None => path.as_os_str().as_bytes().serialize(serializer),
        }
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<PathBuf, D::Error> {
        Ok(match Form::deserialize(deserializer)? {
            Form::Text(path) => path,
            Form::Bytes(bytes) => OsString::from_vec(bytes).into(),
        })
    }
}

#[cfg(test)]
impl Resume {
    /// Of an image that is not opened.
    pub(crate) fn of_path(image: std::path::PathBuf) -> Self {
        Self {
            image: ImageOptions::of(image),
            direct_io: DirectIo::Auto,
            cookie: 7,
            content_ids: vec![1],
            files: vec![(1, u64::MAX)],
            impossible: None,
            taking_over: false,
            begun: false,
            letting_go: false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;
    use std::path::PathBuf;

    #[test]
    fn what_the_books_keep_comes_back_whatever_the_name_is() {
        for name in [b"/a \"b\"\n.vmdk".as_slice(), b"/\xff.vmdk"] {
            let name = PathBuf::from(OsStr::from_bytes(name));
            let mut resume = Resume::of_path(name.clone());
            resume.image.overlay = Some(Overlay::File(name));
            resume.image.trust_paths = true;
            resume.cookie = u64::MAX;
            let text = serde_json::to_string(&resume).unwrap();
            assert_eq!(serde_json::from_str::<Resume>(&text).unwrap(), resume, "{text}");
        }
    }

    #[test]
    fn options_are_kept_with_absolute_paths() {
        let overlay = Some(Overlay::File("o.vmdk".into()));
        let kept = anywhere(&ImageOptions { overlay, ..ImageOptions::of("box.ova:d.vmdk".into()) }).unwrap();
        let here = std::env::current_dir().unwrap();
        assert_eq!(kept.image, here.join("box.ova:d.vmdk"));
        assert_eq!(kept.overlay, Some(Overlay::File(here.join("o.vmdk"))));
        let temporary = ImageOptions { overlay: Some(Overlay::Temporary), ..ImageOptions::of("/d".into()) };
        assert_eq!(anywhere(&temporary).unwrap(), temporary);
    }

    #[test]
    fn the_next_server_keeps_the_device_and_knows_every_content_id_that_the_image_may_have() {
        let dead = Resume { content_ids: vec![1, 2], ..Resume::of_path("/a".into()) };
        let next = Resume { content_ids: vec![2, 3], cookie: 9, ..Resume::of_path("/b".into()) };
        let taken = next.take_over(&dead);
        assert_eq!((taken.cookie, taken.taking_over, taken.image.image), (7, true, "/b".into()));
        assert_eq!(taken.content_ids, [1, 2, 3]);
        assert!(matches!(dead.args().transport, Choice::Ublk));
    }
}
