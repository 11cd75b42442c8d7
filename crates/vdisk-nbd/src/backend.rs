//! What a connection serves.

#![allow(async_fn_in_trait, reason = "the futures stay on the thread that made them: no Send is wanted")]

use std::sync::Arc;

use vdisk_image::{Disk, DiskError, FileIo, Geometry, Request};
use vdisk_io::Buf;

/// A disk together with the engine of this thread.
///
/// Futures of [`Backend::serve`] are always polled to the end, whatever becomes of the connection.
pub trait Backend: 'static {
    /// Size and limits; the size may grow.
    fn geometry(&self) -> Geometry;

    /// Serves one request, as [`Disk::serve`] does: `buf` holds at least `request.len()` bytes for reads and writes.
    async fn serve(&self, request: Request, buf: &Buf) -> Result<(), DiskError>;
}

/// A [`Disk`], shared by all threads, and one thread's engine.
#[derive(Debug)]
pub struct DiskBackend<I> {
    disk: Arc<Disk>,
    engine: I,
}

impl<I> DiskBackend<I> {
    /// Serves `disk` through `engine`.
    pub fn new(disk: Arc<Disk>, engine: I) -> Self {
        Self { disk, engine }
    }
}

impl<I: FileIo<Buf = Buf> + 'static> Backend for DiskBackend<I> {
    fn geometry(&self) -> Geometry {
        self.disk.geometry()
    }

    async fn serve(&self, request: Request, buf: &Buf) -> Result<(), DiskError> {
        self.disk.serve(&self.engine, request, buf).await
    }
}
