//! Listeners: paths, places, and the end.
#![allow(clippy::unwrap_used, reason = "a test")]

mod support;

use std::io::{self, Read};
use std::net::TcpStream;
use std::os::unix::net::{UnixListener, UnixStream};
use std::thread;

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
