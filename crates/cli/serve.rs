//! `vdisk serve`: an NBD server, or a file in a FUSE mount, in the foreground.

use std::fs;
use std::io::{self, Write};
use std::net::{SocketAddr, ToSocketAddrs};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::failure::{Failure, Result};
use crate::identity::Identity;
use crate::open::{Opened, real_path};
use crate::options::{DirectIo, ImageOptions};
use crate::signals::{self, Stop};
use crate::{logging, serve_fuse, serve_nbd};

/// Serve an image to NBD clients, or as a plain file, in the foreground, until SIGINT, SIGTERM or SIGHUP
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  vdisk serve disk.vmdk --socket /tmp/disk.sock\n  \
    nbdcopy 'nbd+unix:///?socket=/tmp/disk.sock' disk.raw\n  \
    vdisk serve disk.vmdk --fuse disk.raw")]
#[group(id = "where", required = true, multiple = true, args = ["socket", "listen", "fuse"])]
pub(crate) struct Args {
    #[command(flatten)]
    pub(crate) image: ImageOptions,
    /// Listen on a Unix socket of this name
    #[arg(long, value_name = "PATH")]
    pub(crate) socket: Option<PathBuf>,
    /// Listen on a TCP address, without encryption or passwords
    #[arg(long, value_name = "ADDR:PORT", value_parser = address)]
    pub(crate) listen: Option<SocketAddr>,
    /// Mount the disk's raw bytes as a file of this name, which is made if there is none. Only its user may open it. Needs
    /// /dev/fuse, and where it is not started by root fusermount3
    #[arg(long, value_name = "PATH", conflicts_with_all = ["socket", "listen"])]
    pub(crate) fuse: Option<PathBuf>,
}

fn address(text: &str) -> Result<SocketAddr, String> {
    let mut found = text.to_socket_addrs().map_err(|e| format!("{e} (such as 127.0.0.1:10809)"))?;
    found.next().ok_or_else(|| "no such host".to_owned())
}

pub(crate) fn run(args: &Args, verbose: bool) -> Result<()> {
    let held = signals::hold(false).map_err(|e| Failure::doing("block signals", &e))?;
    logging::to_stderr(verbose);
    let mut image = Opened::open(&args.image, DirectIo::Off)?;
    if !args.image.read_only {
        crate::resume::refuse_waiting(&Identity::of(&real_path(&args.image)?, &image))?;
    }
    refuse_own_file(args, &image)?;
    let taken_over = image.keep_ledger(&args.image)?;
    let stop = Stop::default();
    held.on_end(stop.clone(), None).map_err(|e| Failure::doing("start a thread", &e))?;
    let ready = |where_to_find_it: &[String]| {
        for place in where_to_find_it {
            let _ = writeln!(io::stderr(), "vdisk: {place}");
        }
        for notice in image.disk.info().notices.iter().chain(&taken_over) {
            crate::notice(notice);
        }
        crate::service::tell_ready();
    };
    let served = match &args.fuse {
        Some(place) => {
            let line = format!("serving {}", crate::failure::one_line(&place.display().to_string()));
            serve_fuse::serve(&image, place, || ready(&[line]), &stop)
        }
        None => serve_nbd::serve(&image, args.socket.clone(), args.listen, |tcp| ready(&uris(args, tcp)), &stop),
    };
    let closed = image.close();
    if let (Err(_), Err(also)) = (&served, &closed) {
        tracing::error!("{also}");
    }
    served.and(closed)
}

/// Refuses to lay the disk, or a socket, over the image that it is of: who reads or copies that would get something else.
fn refuse_own_file(args: &Args, image: &Opened) -> Result<()> {
    let place = args.fuse.as_ref().or(args.socket.as_ref());
    let Some((place, there)) = place.and_then(|place| Some((place, fs::metadata(place).ok()?))) else { return Ok(()) };
    if image.all_files().contains(&(there.dev(), there.ino())) {
        return Err(Failure::new(format!("{} is a file of the image", place.display())).hint("name another place"));
    }
    Ok(())
}

fn uris(args: &Args, tcp: Option<SocketAddr>) -> Vec<String> {
    let uris = args.socket.as_deref().map(unix_uri).into_iter().chain(tcp.map(tcp_uri));
    uris.map(|uri| format!("listening on {uri}")).collect()
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
