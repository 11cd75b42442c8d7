//! Tests of the whole backend on the in-memory engine.

#![allow(clippy::cast_possible_truncation, reason = "sizes in tests are small, and a wrong one fails the test")]

mod chain;
mod crash;
mod faults;
mod fixtures;
mod hostile;
mod map;
mod model;
mod opening;
mod stream;
