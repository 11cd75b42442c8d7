//! `vdisk serve`: an NBD server in the foreground.

use std::io::{self, Write};
use std::net::{SocketAddr, ToSocketAddrs};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use crate::failure::{Failure, Result};
use crate::open::Opened;
use crate::options::{DirectIo, ImageOptions};
use crate::signals::{self, Stop};
use crate::{logging, serve_nbd};

/// Serve an image to NBD clients, in the foreground, until SIGINT, SIGTERM or SIGHUP
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  vdisk serve disk.vmdk --socket /tmp/disk.sock\n  \
    nbdcopy 'nbd+unix:///?socket=/tmp/disk.sock' disk.raw")]
#[group(id = "where", required = true, multiple = true, args = ["socket", "listen"])]
pub(crate) struct Args {
    #[command(flatten)]
    pub(crate) image: ImageOptions,
    /// Listen on a Unix socket of this name
    #[arg(long, value_name = "PATH")]
    pub(crate) socket: Option<PathBuf>,
    /// Listen on a TCP address, without encryption or passwords
    #[arg(long, value_name = "ADDR:PORT", value_parser = address)]
    pub(crate) listen: Option<SocketAddr>,
}

fn address(text: &str) -> Result<SocketAddr, String> {
    let mut found = text.to_socket_addrs().map_err(|e| format!("{e} (such as 127.0.0.1:10809)"))?;
    found.next().ok_or_else(|| "no such host".to_owned())
}

pub(crate) fn run(args: &Args, verbose: bool) -> Result<()> {
    let held = signals::hold(false).map_err(|e| Failure::doing("block signals", &e))?;
    logging::to_stderr(verbose);
    let image = Opened::open(&args.image, DirectIo::Off)?;
    let stop = Stop::default();
    let given = stop.clone();
    held.on_end(move || given.give()).map_err(|e| Failure::doing("start a thread", &e))?;
    let listening = |tcp: Option<SocketAddr>| {
        for uri in args.socket.as_deref().map(unix_uri).into_iter().chain(tcp.map(tcp_uri)) {
            let _ = writeln!(io::stderr(), "vdisk: listening on {uri}");
        }
        for notice in &image.disk.info().notices {
            crate::notice(notice);
        }
        crate::service::tell_ready();
    };
    let served = serve_nbd::serve(&image, args.socket.clone(), args.listen, listening, &stop);
    let closed = image.close();
    if let (Err(_), Err(also)) = (&served, &closed) {
        tracing::error!("{also}");
    }
    served.and(closed)
}

/// As clients take it: doc/uri.md of the NetworkBlockDevice/nbd project.
fn unix_uri(socket: &Path) -> String {
    let path = std::path::absolute(socket).unwrap_or_else(|_| socket.to_owned());
    let mut uri = "nbd+unix:///?socket=".to_owned();
    for &byte in path.as_os_str().as_bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'/' | b'-' | b'.' | b'_' | b'~' => uri.push(byte.into()),
            _ => uri.push_str(&format!("%{byte:02X}")),
        }
    }
    uri
}

fn tcp_uri(address: SocketAddr) -> String {
    format!("nbd://{address}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_becomes_a_uri_with_escapes() {
        assert_eq!(unix_uri(Path::new("/tmp/a b&c.sock")), "nbd+unix:///?socket=/tmp/a%20b%26c.sock");
    }

    #[test]
    fn an_address_becomes_a_uri() {
        assert_eq!(tcp_uri(address("127.0.0.1:10809").unwrap()), "nbd://127.0.0.1:10809");
        assert_eq!(tcp_uri(address("[::1]:1").unwrap()), "nbd://[::1]:1");
        assert!(address("127.0.0.1").is_err());
    }
}
