//! Listeners: paths, places, and the end.
#![allow(clippy::unwrap_used, reason = "a test")]

mod support;

use std::io::{self, Read};
use std::net::TcpStream;
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::thread;
use std::time::Duration;

use nix::sys::socket::{AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, listen, socket};
use support::{Client, Memory};
use vdisk_nbd::codec::Command;
use vdisk_nbd::{Export, ServeError, Server, ServerOptions, stop_channel};

fn memory() -> io::Result<Memory> {
    Ok(Memory::new(4096))
}

#[test]
fn a_socket_that_is_in_use_is_not_replaced_and_a_stale_one_is() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("nbd.sock");
    let options = ServerOptions { unix: Some(path.clone()), ..Default::default() };

    let other = UnixListener::bind(&path).unwrap();
    assert!(matches!(Server::bind(&options), Err(ServeError::SocketInUse(p)) if p == path));
    drop(other);
    assert!(path.exists());
    let server = Server::bind(&options).unwrap();
    assert!(UnixStream::connect(&path).is_ok());
    drop(server);
    assert!(!path.exists(), "a server removes its own socket");
}

#[test]
fn a_socket_whose_backlog_is_full_is_in_use() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("nbd.sock");
    let listener = socket(AddressFamily::Unix, SockType::Stream, SockFlag::empty(), None).unwrap();
    bind(listener.as_raw_fd(), &UnixAddr::new(&path).unwrap()).unwrap();
    listen(&listener, Backlog::new(0).unwrap()).unwrap();
    let _waiting = UnixStream::connect(&path).unwrap();
    let options = ServerOptions { unix: Some(path.clone()), ..Default::default() };
    // It would wait for ever for an accept.
    let (told, tell) = std::sync::mpsc::channel();
    thread::spawn(move || told.send(Server::bind(&options).map(drop)));
    let bound = tell.recv_timeout(Duration::from_secs(10)).unwrap();
    assert!(matches!(bound, Err(ServeError::SocketInUse(p)) if p == path));
}

#[test]
fn connections_on_different_threads_share_the_memory() {
    let options =
        ServerOptions { tcp: Some(([127, 0, 0, 1], 0).into()), workers: 2, memory: 8 << 20, ..Default::default() };
    let server = Server::bind(&options).unwrap();
    let address = server.tcp_address().unwrap();
    let (stopper, stop) = stop_channel();
    thread::scope(|scope| {
        let served = scope.spawn(|| server.run(&Export::new("disk"), || Ok(Memory::new(16 << 20)), &stop));
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let mut clients = Vec::new();
            for _ in 0..2 {
                let mut client = Client::new(tokio::net::TcpStream::connect(address).await.unwrap());
                client.go(false).await;
                clients.push(client);
            }
            let (mut greedy, mut other) = (clients.remove(0), clients.remove(0));
            // A payload that does not come, in a buffer of all there is.
            greedy.request(Command::Write, 0, 1, 0, 8 << 20).await;
            tokio::time::sleep(Duration::from_millis(200)).await;
            // One request of up to 4 MiB is always served, a larger one waits,
            assert_eq!(other.simple(Command::Read, 0, 0, 4 << 20).await.error, 0);
            other.request(Command::Read, 0, 2, 0, 5 << 20).await;
            let early = tokio::time::timeout(Duration::from_millis(300), other.bytes::<1>()).await;
            assert!(early.is_err(), "served without memory");
            // until the memory comes back, on another thread.
            drop(greedy);
            assert_eq!(other.reply(5 << 20).await.error, 0);
            other.disc().await;
        });
        stopper.stop();
        served.join().unwrap().unwrap();
    });
}

#[test]
fn a_file_that_is_no_socket_is_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("precious");
    std::fs::write(&path, "data").unwrap();
    let options = ServerOptions { unix: Some(path.clone()), ..Default::default() };
    assert!(matches!(Server::bind(&options), Err(ServeError::NotASocket(p)) if p == path));
    assert_eq!(std::fs::read(&path).unwrap(), b"data");
}

#[test]
fn a_socket_that_somebody_else_put_there_since_is_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("nbd.sock");
    let server = Server::bind(&ServerOptions { unix: Some(path.clone()), ..Default::default() }).unwrap();
    std::fs::rename(&path, dir.path().join("moved")).unwrap();
    let _other = UnixListener::bind(&path).unwrap();
    drop(server);
    assert!(path.exists());
}

#[test]
fn a_server_needs_a_place_to_listen_and_its_backends() {
    assert!(matches!(Server::bind(&ServerOptions::default()), Err(ServeError::NothingToListenOn)));
    let tcp = ServerOptions { tcp: Some(([127, 0, 0, 1], 0).into()), workers: 3, ..Default::default() };
    let (_stopper, stop) = stop_channel();
    let failed =
        Server::bind(&tcp).unwrap().run(&Export::new(""), || Err::<Memory, _>(io::Error::other("no engine")), &stop);
    assert!(matches!(failed, Err(ServeError::Worker(e)) if e.to_string() == "no engine"));
}

#[test]
fn connections_by_tcp_and_unix_are_served_and_closed_at_the_signal() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("nbd.sock");
    let server = Server::bind(&ServerOptions {
        unix: Some(path.clone()),
        tcp: Some(([127, 0, 0, 1], 0).into()),
        workers: 2,
        max_connections: 3,
        ..Default::default()
    })
    .unwrap();
    let address = server.tcp_address().unwrap();
    let (stopper, stop) = stop_channel();
    thread::scope(|scope| {
        let served = scope.spawn(|| server.run(&Export::new("disk"), memory, &stop));
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let mut by_tcp = Client::new(tokio::net::TcpStream::connect(address).await.unwrap());
            let mut by_unix = Client::new(tokio::net::UnixStream::connect(&path).await.unwrap());
            for client in [&mut by_tcp, &mut by_unix] {
                client.go(false).await;
                assert_eq!(client.simple(Command::Read, 0, 0, 512).await.data.len(), 512);
            }
            // The third place is taken by one that says nothing; the fourth client finds none.
            let mut silent = Client::new(tokio::net::UnixStream::connect(&path).await.unwrap());
            let _: [u8; 18] = silent.bytes().await;
            let mut refused = Client::new(tokio::net::TcpStream::connect(address).await.unwrap());
            assert!(refused.is_closed().await);
            // A place that becomes free is given away again.
            by_tcp.disc().await;
            loop {
                let mut stream = tokio::net::UnixStream::connect(&path).await.unwrap();
                let mut greeting = [0; 18];
                if tokio::io::AsyncReadExt::read_exact(&mut stream, &mut greeting).await.is_ok() {
                    break;
                }
            }
            stopper.stop();
            assert!(by_unix.is_closed().await);
            assert!(silent.is_closed().await);
        });
        served.join().unwrap().unwrap();
    });
    assert!(!path.exists());
    let closed = TcpStream::connect(address).map_or(true, |mut s| s.read(&mut [0]).is_ok_and(|n| n == 0));
    assert!(closed, "nobody listens any more");
}
