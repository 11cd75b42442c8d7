//! The one error of the image backend: what kind, on which file, at which offset, during what.

use std::fmt;
use std::io;

/// What went wrong, in as few kinds as a caller can act upon.
///
/// Transports translate a kind into an errno or an NBD error by a table without a `_` arm, so that a new kind
/// does not compile until every table has an answer for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ErrorKind {
    /// The file is not an image that is known here, or one of another format.
    NotAnImage,
    /// An image that is known, but uses something that is not supported (or not for writing).
    Unsupported,
    /// The image contradicts itself or the format.
    Corrupt,
    /// A file does not exist.
    NotFound,
    /// The host refused access to a file.
    PermissionDenied,
    /// Somebody else has the image open.
    Busy,
    /// A change was asked for on a disk, or a part of it, that is read-only.
    ReadOnly,
    /// The range ends past the end of the disk.
    OutOfRange,
    /// The request itself makes no sense (a length that no buffer can have, say).
    InvalidRequest,
    /// The host file system, or the image's own address space, is full.
    NoSpace,
    /// The host failed to read, write or sync a file.
    HostIo,
    /// An earlier failure left it unknown what is durable: no more changes until the image is attached again.
    Poisoned,
}

impl ErrorKind {
    /// Every kind, for tests of the total tables.
    pub const ALL: [Self; 12] = [
        Self::NotAnImage,
        Self::Unsupported,
        Self::Corrupt,
        Self::NotFound,
        Self::PermissionDenied,
        Self::Busy,
        Self::ReadOnly,
        Self::OutOfRange,
        Self::InvalidRequest,
        Self::NoSpace,
        Self::HostIo,
        Self::Poisoned,
    ];
}

/// An error of the image backend. Its text is one line, lower case, for people.
#[derive(Debug)]
pub struct DiskError {
    kind: ErrorKind,
    context: String,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

impl ErrorKind {
    /// What an error of the host is to a disk.
    pub(crate) fn of(source: &io::Error) -> Self {
        match source.kind() {
            io::ErrorKind::NotFound => ErrorKind::NotFound,
            io::ErrorKind::PermissionDenied => ErrorKind::PermissionDenied,
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge => {
                ErrorKind::NoSpace
            }
            io::ErrorKind::ResourceBusy | io::ErrorKind::WouldBlock => ErrorKind::Busy,
            io::ErrorKind::ReadOnlyFilesystem => ErrorKind::ReadOnly,
            _ => ErrorKind::HostIo,
        }
    }
}

impl DiskError {
    /// An error of `kind`; `context` says what failed, on which file, at which offset.
    pub fn new(kind: ErrorKind, context: impl Into<String>) -> Self {
        Self { kind, context: context.into(), source: None }
    }

    /// Wraps an error of the host. Its kind follows from the host's: full is [`ErrorKind::NoSpace`], and so on.
    pub fn host(context: impl Into<String>, source: io::Error) -> Self {
        Self { kind: ErrorKind::of(&source), context: context.into(), source: Some(Box::new(source)) }
    }

    /// Adds the error that caused this one.
    #[must_use]
    pub fn because(mut self, source: impl std::error::Error + Send + Sync + 'static) -> Self {
        self.source = Some(Box::new(source));
        self
    }

    /// Whether the host's file ended before what was asked for.
    pub(crate) fn is_end_of_file(&self) -> bool {
        let host = self.source.as_deref().and_then(|e| e.downcast_ref::<io::Error>());
        host.is_some_and(|e| e.kind() == io::ErrorKind::UnexpectedEof)
    }

    /// What kind of error this is.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }
}

impl fmt::Display for DiskError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.context)
    }
}

impl std::error::Error for DiskError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source.as_deref().map(|e| e as _)
    }
}

/// An error and its causes, in one line.
pub(crate) fn chain(error: &DiskError) -> String {
    let mut line = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(e) = cause {
        line = format!("{line}: {e}");
        cause = e.source();
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_host_is_no_space_whatever_it_calls_itself() {
        // ENOSPC, EDQUOT, EFBIG
        for errno in [28, 122, 27] {
            let e = DiskError::host("write", io::Error::from_raw_os_error(errno));
            assert_eq!(e.kind(), ErrorKind::NoSpace, "errno {errno}");
        }
    }

    #[test]
    fn an_unreadable_sector_is_a_host_error() {
        assert_eq!(DiskError::host("read", io::Error::from_raw_os_error(5)).kind(), ErrorKind::HostIo);
    }
}
