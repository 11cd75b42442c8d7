//! What the fuzz targets share: inputs to images, an engine in memory, requests and what they may not do.
//!
//! A target fails by a panic: of the code under test, of an assertion here, or of a bound on memory that was exceeded.
//! libFuzzer itself ends what takes too long.

pub mod drive;
pub mod engine;
pub mod links;
pub mod memory;
pub mod model;
pub mod streams;
pub mod tape;
