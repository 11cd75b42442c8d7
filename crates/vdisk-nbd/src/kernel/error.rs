//! Why the kernel's client could not be set up.

use std::fmt;
use std::io;

/// A step of attaching that failed.
#[derive(Debug, thiserror::Error)]
#[error("{step}")]
pub struct AttachError {
    step: String,
    source: Box<dyn std::error::Error + Send + Sync>,
}

impl AttachError {
    pub(super) fn new(step: impl Into<String>, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        Self { step: step.into(), source: source.into() }
    }

    /// The host's error number, if the kernel itself refused.
    pub fn errno(&self) -> Option<i32> {
        let kernel = self.source.downcast_ref::<KernelError>().map(|e| e.errno);
        kernel.or_else(|| self.source.downcast_ref::<io::Error>().and_then(io::Error::raw_os_error))
    }
}

/// A refusal by netlink: an error number and, from kernels that give one, the reason.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KernelError {
    /// Positive, as in `errno.h`.
    pub errno: i32,
    /// The kernel's own words (extended ack, NLMSGERR_ATTR_MSG).
    pub text: Option<String>,
}

impl fmt::Display for KernelError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let host = io::Error::from_raw_os_error(self.errno);
        match &self.text {
            Some(text) => write!(f, "{host}: {text}"),
            None => write!(f, "{host}"),
        }
    }
}

impl std::error::Error for KernelError {}
