//! Positioned file I/O on the host's files: what [`vdisk_image::FileIo`] asks for, by blocking calls and by io_uring.
//!
//! [`HostFiles`] opens the files of an image, through a gate that keeps hostile names inside the image's directory, and
//! locks them as qemu does; an image may also lie inside a tar archive. [`HostFiles::into_set`] ends the opening: any number of threads share the [`FileSet`], each
//! with an engine of its own, [`BlockingIo`] or [`UringIo`] on some [`Ring`].
//!
//! The unsafe code of buffers and of what the kernel does with them lives here; see [`Buf`] and [`Ring`].

#![cfg_attr(
    test,
    allow(
        clippy::unwrap_used,
        clippy::panic,
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a test that panics has failed, as it should"
    )
)]

/// The methods of [`vdisk_image::FileIo`] about buffers, the same for every engine that knows memory only.
macro_rules! buf_methods {
    () => {
        fn alloc(&self, len: usize) -> Buf {
            Buf::new(len)
        }

        fn copy_in(&self, buf: &Buf, at: usize, bytes: &[u8]) -> io::Result<()> {
            buf.copy_in(at, bytes);
            Ok(())
        }

        fn copy_out(&self, buf: &Buf, at: usize, bytes: &mut [u8]) -> io::Result<()> {
            buf.copy_out(at, bytes);
            Ok(())
        }

        fn fill_zero(&self, buf: &Buf, part: Range<usize>) -> io::Result<()> {
            buf.fill_zero(part);
            Ok(())
        }
    };
}

mod archive;
mod blocking;
mod buf;
mod compute;
mod direct;
mod files;
mod gate;
mod host_file;
mod in_flight;
mod ledger_file;
mod locks;
mod log;
mod own_ring;
mod pages;
mod tar;
mod transfer;
mod turns;
mod uring;
mod window;

#[cfg(test)]
mod archive_tests;
#[cfg(test)]
mod engine_tests;

pub use blocking::{BlockingIo, block_on};
pub use buf::{BUF_ALIGN, Buf};
pub use files::{FileSet, HostFiles, OpenMode};
pub use host_file::HostFile;
pub use ledger_file::LedgerFile;
pub use log::{LeftOut, Limited, chain};
pub use own_ring::OwnRing;
pub use pages::{Pages, RequestBuf, RingBuf};
pub use turns::Counts;
pub use uring::{Ring, UringIo};
