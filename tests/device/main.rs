//! End to end on real block devices: one suite for all transports, one file per behaviour.
//!
//! Needs root, a kernel with the transport that `VDISK_TRANSPORT` names, and a host file system that punches holes under
//! `VDISK_SCRATCH`. `VDISK_MODE` holds options for attach. `tests/vm/run` gives it all three, in a VM; `tests/device/native` runs it here, over fuse.

#![allow(clippy::unwrap_used, clippy::panic, clippy::cast_possible_truncation, reason = "a test fails by it")]

mod attach_detach;
mod bad_input;
mod data;
mod discard;
mod faults;
mod grow;
mod lab;
mod log_writes;
mod many;
mod power_cut;
mod queue;
mod recover;
mod server_death;
mod syncs;
