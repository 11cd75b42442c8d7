//! Hostile images, and what they cost: one test for each kind of them, on the real program. docs/hostile-input.md lists the kinds.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that fails says so by a panic")]
#![allow(clippy::cast_possible_truncation, reason = "sizes in tests are small, and a wrong one fails the test")]

mod chains;
mod descriptors;
mod headers;
mod images;
mod lab;
mod names;
mod size;
mod tables;
