//! `vdisk`: attaches VMware and raw disk images as Linux block devices.
//!
//! One verb, one file. The command line decides nothing about blocks: it opens an image, gives it to a transport and
//! keeps the books on what is attached.

#![forbid(unsafe_code)]

mod attach;
mod attach_fuse;
mod attach_nbd;
mod backup;
mod block_queue;
mod check;
mod compact;
mod detach;
mod failure;
mod grow;
mod hygiene;
mod identity;
mod in_use;
mod info;
mod ledger;
mod list;
mod location;
mod logging;
mod map;
mod modules;
mod open;
mod options;
mod overlay;
mod partitions;
mod process;
mod progress;
mod recover;
mod repair;
mod report;
mod resume;
mod serve;
mod serve_fuse;
mod serve_nbd;
mod serve_ublk;
mod server;
mod service;
mod session;
mod signals;
mod size;
mod state;
mod table;
mod transport;

use std::io::{self, Write};
use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::failure::{Failure, Result};

/// Attach VMware and raw disk images as Linux block devices
#[derive(Debug, Parser)]
#[command(version, max_term_width = 100, after_help = "Exit status: 0 ok, 1 failed, 2 usage, 3 no transport.")]
struct Cli {
    /// Log more (also by VDISK_LOG=debug)
    #[arg(short, long, global = true)]
    verbose: bool,
    /// This is the background process of `attach` or `recover`; its stdout is the pipe on which it reports.
    #[arg(long, hide = true)]
    ready_pipe: bool,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    Attach(attach::Args),
    Detach(detach::Args),
    List(list::Args),
    Serve(serve::Args),
    Info(info::Args),
    Map(map::Args),
    Check(check::Args),
    Compact(compact::Args),
    Recover(recover::Args),
    Grow(grow::Args),
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let done = match &cli.verb {
        Verb::Attach(args) => attach::run(args, cli.verbose, cli.ready_pipe)
            .map_err(|e| (format!("attach {}", args.image.image.display()), e)),
        Verb::Detach(args) => detach::run(args, cli.verbose),
        Verb::List(args) => list::run(args).map_err(|e| ("list".to_owned(), e)),
        Verb::Serve(args) => {
            serve::run(args, cli.verbose).map_err(|e| (format!("serve {}", args.image.image.display()), e))
        }
        Verb::Info(args) => {
            info::run(args, cli.verbose).map_err(|e| (format!("info {}", args.image.image.display()), e))
        }
        Verb::Recover(args) => recover::run(args, cli.verbose, cli.ready_pipe)
            .map_err(|e| (format!("recover {}", args.image.display()), e)),
        Verb::Grow(args) => grow::run(args, cli.verbose).map_err(|e| (format!("grow {}", args.what.display()), e)),
        Verb::Check(args) => {
            check::run(args, cli.verbose).map_err(|e| (format!("check {}", args.image.image.display()), e))
        }
        Verb::Compact(args) => {
            compact::run(args, cli.verbose).map_err(|e| (format!("compact {}", args.image.image.display()), e))
        }
        Verb::Map(args) => map::run(args, cli.verbose).map_err(|e| (format!("map {}", args.image.image.display()), e)),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err((what, failure)) => {
            complain(&what, &failure);
            ExitCode::from(failure.exit as u8)
        }
    }
}

/// The one line on stderr that a failure gets.
fn complain(what: &str, failure: &Failure) {
    let _ = writeln!(io::stderr(), "vdisk: {}: {failure}", failure::one_line(what));
}

/// Something worth knowing that is no failure.
fn notice(text: &str) {
    let _ = writeln!(io::stderr(), "vdisk: notice: {}", failure::one_line(text));
}

/// Writes data to stdout. A reader that has seen enough is no failure.
fn print(text: &str) -> Result<()> {
    match write_out(text) {
        Err(e) if e.kind() != io::ErrorKind::BrokenPipe => Err(Failure::doing("write to stdout", &e)),
        _ => Ok(()),
    }
}

/// Writes data to stdout that somebody has to read.
fn print_all(text: &str) -> Result<()> {
    write_out(text).map_err(|e| Failure::doing("write to stdout", &e))
}

fn write_out(text: &str) -> io::Result<()> {
    let mut out = io::stdout();
    out.write_all(text.as_bytes()).and_then(|()| out.flush())
}

/// Writes one JSON document to stdout.
fn print_json(value: &impl serde::Serialize) -> Result<()> {
    let text = serde_json::to_string_pretty(value).map_err(|e| Failure::from_error(&e))?;
    print(&(text + "\n"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }
}
