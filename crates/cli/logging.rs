//! Where messages for the log go.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::panic;
use std::path::Path;

use tracing_subscriber::filter::{EnvFilter, LevelFilter};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

use crate::failure::{Failure, Result};
use crate::state::StateDir;

/// What `list` calls the journal.
pub(crate) const JOURNAL: &str = "journal";

fn filter(verbose: bool, default: LevelFilter) -> EnvFilter {
    let level = if verbose { LevelFilter::DEBUG } else { default };
    EnvFilter::builder().with_env_var("VDISK_LOG").with_default_directive(level.into()).from_env_lossy()
}

/// Logs to stderr: for what runs in the foreground.
pub(crate) fn to_stderr(verbose: bool) {
    let layer = tracing_subscriber::fmt::layer().with_writer(std::io::stderr).with_target(false);
    tracing_subscriber::registry().with(filter(verbose, LevelFilter::WARN)).with(layer).init();
}

/// Logs to the journal where there is one, else to a file. Answers with the place.
pub(crate) fn to_background(verbose: bool, dir: &StateDir) -> Result<String> {
    let registry = tracing_subscriber::registry().with(filter(verbose, LevelFilter::INFO));
    let place = if let Ok(journal) = tracing_journald::layer() {
        registry.with(journal.with_syslog_identifier("vdisk".to_owned())).init();
        JOURNAL.to_owned()
    } else {
        dir.create()?;
        let path = dir.path().join(format!("{}.log", std::process::id()));
        let layer = tracing_subscriber::fmt::layer().with_writer(open(&path)?).with_ansi(false).with_target(false);
        registry.with(layer).init();
        path.to_string_lossy().into_owned()
    };
    panic::set_hook(Box::new(|panic| tracing::error!("{panic}")));
    Ok(place)
}

fn open(path: &Path) -> Result<File> {
    // A log that an earlier process with the same number left is of no use any more.
    let file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o644).open(path);
    file.map_err(|e| Failure::doing(format_args!("create {}", path.display()), &e))
}

/// Removes a log that nobody will look for.
pub(crate) fn discard(place: &str) {
    if place.starts_with('/') {
        let _ = std::fs::remove_file(place);
    }
}
