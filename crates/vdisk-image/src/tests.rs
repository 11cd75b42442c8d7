//! Tests of the whole backend on the in-memory engine.

#![allow(clippy::cast_possible_truncation, reason = "sizes in tests are small, and a wrong one fails the test")]

mod chain;
mod check;
mod compact;
mod cowd;
mod crash;
mod create;
mod doubly_used;
mod faults;
mod fixtures;
mod grow;
mod hostile;
mod map;
mod memory_limits;
mod model;
mod opening;
mod repair;
mod reuse;
mod se_sparse;
mod stream;
