//! Why an image is not served as a file, or not as a loop device.

use std::io;

/// What failed, on what.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// This kernel, or this process, has no FUSE or no loop devices.
    #[error("{what}: {source}")]
    Unavailable {
        /// What there is not.
        what: &'static str,
        /// The host's error.
        source: io::Error,
    },
    /// A step failed on the way to the mount or the device.
    #[error("{what}: {source}")]
    Step {
        /// What was being done, to what.
        what: String,
        /// The host's error.
        source: io::Error,
    },
    /// The device is going away.
    #[error("the device is not served any more")]
    Ended,
    /// The place for the file cannot be used.
    #[error("{0}")]
    Place(String),
}

impl Error {
    /// For `map_err`: what was being done.
    pub(crate) fn step<E: Into<io::Error>>(what: impl Into<String>) -> impl FnOnce(E) -> Self {
        |source| Self::Step { what: what.into(), source: source.into() }
    }
}
