//! `vdisk list`: what is attached.

use std::path::Path;

use serde::Serialize;

use crate::failure::Result;
use crate::size;
use crate::state::{State, StateDir};
use crate::table::Table;

/// Show what is attached, one line per device
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  vdisk list --json | jq -r '.[] | select(.state == \"dead\") | .device'")]
pub(crate) struct Args {
    /// One JSON document, sizes in bytes
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Entry<'a> {
    device: &'a Path,
    transport: &'static str,
    image: &'a str,
    size: u64,
    read_only: bool,
    pid: u32,
    /// `live`, `dead`, `poisoned` (a sync failed: nothing more is written), `starting`: the device is there but cannot be used yet, or
    /// `recovering`: another server takes it over.
    state: &'static str,
    /// Why it is dead or poisoned, if its process could say.
    error: Option<&'a str>,
    log: &'a str,
}

impl<'a> Entry<'a> {
    fn new(state: &'a State) -> Self {
        Self {
            device: &state.device,
            transport: state.transport.name(),
            image: &state.image,
            size: state.size,
            read_only: state.read_only,
            pid: state.pid,
            state: state.word(),
            error: state.reason(),
            log: &state.log,
        }
    }
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let states = StateDir::host().list()?;
    let entries: Vec<_> = states.iter().map(Entry::new).collect();
    if args.json {
        return crate::print_json(&entries);
    }
    let mut table = Table::new(["DEVICE", "TRANSPORT", "IMAGE", "SIZE", "MODE", "PID", "STATE", "LOG"]);
    for e in &entries {
        table.row([
            e.device.display().to_string(),
            e.transport.to_owned(),
            e.image.to_owned(),
            size::human(e.size),
            if e.read_only { "ro" } else { "rw" }.to_owned(),
            e.pid.to_string(),
            e.state.to_owned(),
            e.log.to_owned(),
        ]);
    }
    crate::print(&table.to_string())
}
