//! Transmission, seen by a client.
#![allow(clippy::unwrap_used, reason = "a test")]

mod support;

use std::cell::Cell;
use std::rc::Rc;
use std::time::Duration;

use support::{Memory, talk};
use tokio::sync::{Notify, oneshot};
use vdisk_image::{DiskError, ErrorKind, Flags, Op};
use vdisk_nbd::codec::{Command, ProtocolError, RequestHeader};
use vdisk_nbd::{ConnectionError, End, Stop, serve_transmission, stop_channel};

const FUA: u16 = 1;
const NO_HOLE: u16 = 2;
const DF: u16 = 4;
const EPERM: u32 = 1;
const EIO: u32 = 5;
const EINVAL: u32 = 22;
const ENOSPC: u32 = 28;
const ESHUTDOWN: u32 = 108;

#[tokio::test]
async fn what_is_written_is_read_and_what_is_zeroed_is_zero() {
    talk(Memory::new(1 << 20), Stop::never(), async |mut client| {
        client.go(false).await;
        // Longer than the reader's buffer, and at no boundary.
        let data: Vec<u8> = (0..200_000_u32).map(|n| n.to_be_bytes()[2]).collect();
        assert_eq!(client.write(0, 1001, &data).await.error, 0);
        assert_eq!(client.simple(Command::Read, 0, 1001, 200_000).await.data, data);
        assert_eq!(client.simple(Command::Flush, 0, 0, 0).await.error, 0);
        assert_eq!(client.simple(Command::Trim, 0, 1001, 1).await.error, 0);
        assert_eq!(client.simple(Command::WriteZeroes, NO_HOLE, 1003, 2).await.error, 0);
        let read = client.simple(Command::Read, 0, 1001, 6).await.data;
        assert_eq!(read, [0, data[1], 0, 0, data[4], data[5]]);
        client.disc().await;
    })
    .await
    .0
    .unwrap();
}

#[tokio::test]
async fn fua_is_accepted_on_every_command_and_reaches_the_changes() {
    let memory = Memory::new(4096);
    let seen = Rc::clone(&memory.seen);
    talk(memory, Stop::never(), async |mut client| {
        client.go(false).await;
        assert_eq!(client.simple(Command::Read, FUA, 0, 512).await.error, 0);
        assert_eq!(client.write(FUA, 0, &[1; 512]).await.error, 0);
        assert_eq!(client.simple(Command::Flush, FUA, 0, 0).await.error, 0);
        assert_eq!(client.simple(Command::Trim, FUA, 0, 512).await.error, 0);
        assert_eq!(client.simple(Command::WriteZeroes, FUA | NO_HOLE, 0, 512).await.error, 0);
        assert_eq!(client.simple(Command::WriteZeroes, 0, 0, 512).await.error, 0);
        client.disc().await;
    })
    .await
    .0
    .unwrap();
    let flags = |fua, no_unmap| Flags { fua, no_unmap };
    assert_eq!(
        *seen.borrow(),
        [
            (Op::Read, flags(false, false)),
            (Op::Write, flags(true, false)),
            (Op::Flush, flags(false, false)),
            (Op::Discard, flags(true, false)),
            (Op::WriteZeroes, flags(true, true)),
            (Op::WriteZeroes, flags(false, false)),
        ]
    );
}

#[tokio::test]
async fn requests_that_make_no_sense_get_an_error_and_the_connection_goes_on() {
    let (end, ()) = talk(Memory::new(4096), Stop::never(), async |mut client| {
        client.go(false).await;
        // Past the end; the payload is thrown away.
        assert_eq!(client.simple(Command::Read, 0, 4095, 2).await.error, EINVAL);
        assert_eq!(client.simple(Command::Trim, 0, 4096, 1).await.error, EINVAL);
        assert_eq!(client.simple(Command::WriteZeroes, 0, u64::MAX, 1).await.error, ENOSPC);
        assert_eq!(client.write(0, 4095, &[9; 70_000]).await.error, ENOSPC);
        // Flags that are not defined, for anybody or for this command.
        assert_eq!(client.simple(Command::Read, 1 << 9, 0, 1).await.error, EINVAL);
        assert_eq!(client.simple(Command::Read, DF, 0, 1).await.error, EINVAL);
        assert_eq!(client.simple(Command::Trim, NO_HOLE, 0, 1).await.error, EINVAL);
        assert_eq!(client.write(NO_HOLE, 0, &[9; 512]).await.error, EINVAL);
        // Commands that were not offered, and lengths beyond everything.
        for command in [Command::Other(5), Command::Other(7), Command::Other(999)] {
            assert_eq!(client.simple(command, 0, 0, u32::MAX).await.error, EINVAL);
        }
        assert_eq!(client.simple(Command::Read, 0, 0, u32::MAX).await.error, EINVAL);
        assert_eq!(client.simple(Command::Trim, 0, 0, u32::MAX).await.error, EINVAL);
        // Lengths of zero do nothing.
        for command in [Command::Read, Command::Trim, Command::WriteZeroes] {
            assert_eq!(client.simple(command, 0, 4096, 0).await.error, 0);
        }
        assert_eq!(client.write(0, 0, &[]).await.error, 0);
        assert_eq!(client.simple(Command::Read, 0, 4092, 4).await.data.len(), 4);
        client.disc().await;
    })
    .await;
    assert_eq!(end.unwrap(), End::Disconnected);
}

#[tokio::test]
async fn a_read_only_disk_refuses_changes_with_eperm() {
    talk(Memory::new(4096).read_only(), Stop::never(), async |mut client| {
        client.go(false).await;
        assert_eq!(client.write(0, 0, &[1; 512]).await.error, EPERM);
        assert_eq!(client.simple(Command::Trim, 0, 0, 512).await.error, EPERM);
        assert_eq!(client.simple(Command::WriteZeroes, 0, 0, 512).await.error, EPERM);
        assert_eq!(client.simple(Command::Flush, 0, 0, 0).await.error, 0);
        assert_eq!(client.simple(Command::Read, 0, 0, 512).await.error, 0);
        client.disc().await;
    })
    .await
    .0
    .unwrap();
}

#[tokio::test]
async fn structured_replies_carry_the_offset_and_the_reason() {
    let memory = Memory::new(4096).before(async |request| match request.op() {
        Op::Flush => Err(DiskError::new(ErrorKind::HostIo, "sync /srv/secret.vmdk")),
        _ => Ok(()),
    });
    let expected = memory.bytes.lock().unwrap()[512..515].to_vec();
    talk(memory, Stop::never(), async |mut client| {
        client.go(true).await;
        client.request(Command::Read, DF, 5, 512, 3).await;
        let (kind, reply) = client.structured().await;
        assert_eq!((kind, reply.cookie), (1, 5));
        assert_eq!(reply.data, [&512_u64.to_be_bytes()[..], &expected].concat());
        client.request(Command::Read, 0, 6, 512, 0).await;
        let (kind, reply) = client.structured().await;
        assert_eq!((kind, reply.cookie, reply.error), (0, 6, 0));
        client.request(Command::Read, 0, 7, 4096, 1).await;
        let (kind, reply) = client.structured().await;
        assert_eq!((kind, reply.error), (0x8001, EINVAL));
        assert_eq!(reply.text, "Read of 1 bytes at 4096 ends past the end of the disk at 4096");
        client.request(Command::Flush, 0, 8, 0, 0).await;
        let (kind, reply) = client.structured().await;
        assert_eq!((kind, reply.error), (0x8001, EIO));
        assert!(!reply.text.contains("secret"), "the host's paths are not the client's business: {}", reply.text);
        client.disc().await;
    })
    .await
    .0
    .unwrap();
}

#[tokio::test]
async fn two_hundred_requests_are_in_flight_and_answered_in_any_order() {
    // The n-th request is held until the one after it is done: they finish in reverse.
    let (waiting, arrived) = (Rc::new(std::cell::RefCell::new(Vec::new())), Rc::new(Cell::new(0)));
    let memory = Memory::new(200 * 4096).before(move |_| {
        let (tell, told) = oneshot::channel::<()>();
        arrived.set(arrived.get() + 1);
        waiting.borrow_mut().push(tell);
        let all = (arrived.get() == 200).then(|| waiting.take());
        async move {
            match all {
                Some(all) => {
                    for tell in all.into_iter().rev() {
                        let _ = tell.send(());
                    }
                }
                None => told.await.unwrap(),
            }
            Ok(())
        }
    });
    let bytes = memory.bytes.lock().unwrap().clone();
    talk(memory, Stop::never(), async |mut client| {
        client.go(false).await;
        for n in 0..200 {
            client.request(Command::Read, 0, n, n * 4096, 4096).await;
        }
        let mut order = Vec::new();
        for _ in 0..200 {
            let reply = client.reply(4096).await;
            let at = usize::try_from(reply.cookie * 4096).unwrap();
            assert_eq!((reply.error, reply.data.as_slice()), (0, &bytes[at..at + 4096]));
            order.push(reply.cookie);
        }
        assert_ne!(order, (0..200).collect::<Vec<_>>());
        order.sort_unstable();
        assert_eq!(order, (0..200).collect::<Vec<_>>());
        client.disc().await;
    })
    .await
    .0
    .unwrap();
}

/// How many requests began, and how many of them were finished.
type Count = Rc<Cell<(u32, u32)>>;

/// A disk whose requests wait for `open`, and which counts those that began and those that were finished.
fn gated(size: usize) -> (Memory, Rc<Notify>, Count) {
    let (open, count) = (Rc::new(Notify::new()), Rc::new(Cell::new((0, 0))));
    let (gate, counter) = (Rc::clone(&open), Rc::clone(&count));
    let memory = Memory::new(size).before(move |_| {
        let (gate, counter) = (Rc::clone(&gate), Rc::clone(&counter));
        counter.set((counter.get().0 + 1, counter.get().1));
        async move {
            gate.notified().await;
            gate.notify_one();
            counter.set((counter.get().0, counter.get().1 + 1));
            Ok(())
        }
    });
    (memory, open, count)
}

/// Lets the server do what it can.
async fn settle() {
    for _ in 0..1000 {
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn disc_is_obeyed_after_everything_in_flight_is_answered() {
    let (memory, open, count) = gated(1 << 20);
    let (end, ()) = talk(memory, Stop::never(), async |mut client| {
        client.go(false).await;
        for n in 0..50 {
            client.request(Command::Read, 0, n, n * 512, 512).await;
        }
        client.request(Command::Disc, 0, 0, 0, 0).await;
        settle().await;
        assert_eq!(count.get(), (50, 0));
        open.notify_one();
        for _ in 0..50 {
            assert_eq!(client.reply(512).await.error, 0);
        }
        assert!(client.is_closed().await);
    })
    .await;
    assert_eq!(end.unwrap(), End::Disconnected);
}

#[tokio::test]
async fn a_client_that_vanishes_leaves_nothing_half_done() {
    let (memory, open, count) = gated(1 << 20);
    let counted = Rc::clone(&count);
    let (end, ()) = talk(memory, Stop::never(), async |mut client| {
        client.go(false).await;
        for n in 0..50 {
            client.request(Command::Read, 0, n, n * 512, 512).await;
        }
        settle().await;
        drop(client);
        settle().await;
        assert_eq!(counted.get(), (50, 0));
        open.notify_one();
    })
    .await;
    assert_eq!(count.get(), (50, 50), "every future was polled to the end ({end:?})");
}

#[tokio::test]
async fn a_client_cannot_have_more_than_64_mib_in_flight() {
    let (memory, open, count) = gated(64 << 20);
    talk(memory, Stop::never(), async |mut client| {
        client.go(false).await;
        for n in 0..80 {
            client.request(Command::Read, 0, n, 0, 1 << 20).await;
        }
        settle().await;
        assert_eq!(count.get().0, 64);
        open.notify_one();
        for _ in 0..80 {
            assert_eq!(client.reply(1 << 20).await.error, 0);
        }
        client.request(Command::Read, 0, 1, 0, 64 << 20).await;
        assert_eq!(client.reply(64 << 20).await.error, 0);
        client.disc().await;
    })
    .await
    .0
    .unwrap();
}

#[tokio::test]
async fn a_client_that_reads_nothing_is_read_no_further() {
    let memory = Memory::new(1 << 20);
    let seen = Rc::clone(&memory.seen);
    talk(memory, Stop::never(), async |mut client| {
        client.go(false).await;
        for n in 0..1000 {
            client.request(Command::Read, 0, n, 0, 1 << 20).await;
        }
        settle().await;
        assert!(seen.borrow().len() < 100, "{} requests were served for nobody", seen.borrow().len());
    })
    .await
    .0
    .unwrap_err();
}

#[tokio::test]
async fn a_write_of_64_mib_is_taken_and_a_longer_one_hangs_up() {
    let (end, ()) = talk(Memory::new(64 << 20), Stop::never(), async |mut client| {
        client.go(false).await;
        assert_eq!(client.write(0, 0, &vec![0x5a; 64 << 20]).await.error, 0);
        assert_eq!(client.simple(Command::Read, 0, (64 << 20) - 1, 1).await.data, [0x5a]);
        client.request(Command::Write, 0, 1, 0, (64 << 20) + 1).await;
        assert!(client.is_closed().await);
    })
    .await;
    assert!(matches!(end, Err(ConnectionError::Protocol(ProtocolError::WriteTooLong(67_108_865)))));
}

#[tokio::test]
async fn a_request_without_its_magic_hangs_up_after_what_is_in_flight() {
    let (memory, open, count) = gated(4096);
    let (end, ()) = talk(memory, Stop::never(), async |mut client| {
        client.go(false).await;
        client.request(Command::Read, 0, 1, 0, 512).await;
        client.send(&[0x25; 28]).await;
        settle().await;
        assert_eq!(count.get(), (1, 0));
        open.notify_one();
        assert_eq!(client.reply(512).await.error, 0);
        assert!(client.is_closed().await);
    })
    .await;
    assert!(matches!(end, Err(ConnectionError::Protocol(ProtocolError::BadRequestMagic(0x2525_2525)))));
}

#[tokio::test]
async fn a_server_that_stops_answers_what_is_in_flight_and_refuses_what_is_new() {
    let (memory, open, count) = gated(4096);
    let (stopper, stop) = stop_channel();
    let (end, ()) = talk(memory, stop, async |mut client| {
        client.go(false).await;
        client.request(Command::Read, 0, 1, 0, 512).await;
        settle().await;
        stopper.stop();
        client.request(Command::Write, 0, 2, 0, 512).await;
        client.send(&[0; 512]).await;
        let refused = client.reply(0).await;
        assert_eq!((refused.cookie, refused.error), (2, ESHUTDOWN));
        assert_eq!(count.get(), (1, 0));
        open.notify_one();
        let answered = client.reply(512).await;
        assert_eq!((answered.cookie, answered.error), (1, 0));
        assert!(client.is_closed().await);
    })
    .await;
    assert_eq!(end.unwrap(), End::Stopped);
}

#[tokio::test(start_paused = true)]
async fn a_server_that_stops_waits_10_seconds_for_a_client_that_does_not_read() {
    let (stopper, stop) = stop_channel();
    let (end, ()) = talk(Memory::new(8 << 20), stop, async |mut client| {
        client.go(false).await;
        client.request(Command::Read, 0, 1, 0, 8 << 20).await;
        settle().await;
        stopper.stop();
        tokio::time::sleep(Duration::from_secs(60)).await;
        drop(client);
    })
    .await;
    assert!(matches!(end, Err(ConnectionError::Drain(10))), "{end:?}");
}

#[tokio::test(start_paused = true)]
async fn a_client_that_stalls_in_a_payload_is_cut_after_60_seconds_and_an_idle_one_is_not() {
    let (end, ()) = talk(Memory::new(1 << 20), Stop::never(), async |mut client| {
        client.go(false).await;
        tokio::time::sleep(Duration::from_secs(3600)).await;
        client.request(Command::Write, 0, 1, 0, 1 << 20).await;
        for _ in 0..5 {
            tokio::time::sleep(Duration::from_secs(50)).await;
            client.send(&[1]).await;
        }
        tokio::time::sleep(Duration::from_secs(61)).await;
        assert!(client.is_closed().await);
    })
    .await;
    assert_eq!(end.unwrap_err().to_string(), "connection: the client sent nothing for 60 s");
}

#[tokio::test(start_paused = true)]
async fn a_client_that_takes_no_replies_is_cut_after_60_seconds() {
    let (end, ()) = talk(Memory::new(8 << 20), Stop::never(), async |mut client| {
        client.go(false).await;
        client.request(Command::Read, 0, 1, 0, 8 << 20).await;
        for _ in 0..5 {
            tokio::time::sleep(Duration::from_secs(50)).await;
            client.many(200 << 10).await;
        }
        tokio::time::sleep(Duration::from_secs(71)).await;
        drop(client);
    })
    .await;
    assert_eq!(end.unwrap_err().to_string(), "connection: the client took nothing for 60 s");
}

/// What becomes of requests that the kernel sent before it shut the socket.
async fn left_behind(requests: &[u8]) -> (Result<End, ConnectionError>, Vec<Op>) {
    let (mut near, far) = std::os::unix::net::UnixStream::pair().unwrap();
    std::io::Write::write_all(&mut near, requests).unwrap();
    drop(near);
    far.set_nonblocking(true).unwrap();
    let memory = Memory::new(4096);
    let seen = Rc::clone(&memory.seen);
    let local = tokio::task::LocalSet::new();
    let served = local.run_until(async move {
        let far = tokio::net::UnixStream::from_std(far).unwrap();
        serve_transmission(far, Rc::new(memory), &Stop::never()).await
    });
    let end = served.await;
    let seen = seen.borrow().iter().map(|(op, _)| *op).collect();
    (end, seen)
}

#[tokio::test]
async fn changes_of_a_socket_that_the_kernel_gave_up_are_not_begun() {
    let header = |command, len| RequestHeader { flags: 0, command, cookie: 1, offset: 0, len }.encode();
    let mut requests = [&header(Command::Write, 512)[..], &[7; 512]].concat();
    requests.extend(header(Command::Trim, 512));
    requests.extend(header(Command::WriteZeroes, 512));
    let (end, seen) = left_behind(&requests).await;
    assert_eq!((end.unwrap(), seen), (End::Closed, vec![]));

    // Whether the device was disconnected is known even if replies could not be written.
    requests.extend(header(Command::Read, 512));
    requests.extend(header(Command::Disc, 0));
    let (end, seen) = left_behind(&requests).await;
    assert_eq!((end.unwrap(), seen), (End::Disconnected, vec![Op::Read]));
}

#[tokio::test]
async fn the_kernels_end_needs_no_handshake() {
    let (near, far) = tokio::net::UnixStream::pair().unwrap();
    let local = tokio::task::LocalSet::new();
    let served = local.run_until(async {
        let server = tokio::task::spawn_local(async move {
            serve_transmission(far, Rc::new(Memory::new(4096)), &Stop::never()).await
        });
        let mut client = support::Client::new(near);
        assert_eq!(client.write(FUA, 5, b"hello").await.error, 0);
        assert_eq!(client.simple(Command::Read, 0, 5, 5).await.data, b"hello");
        drop(client);
        server.await.unwrap()
    });
    assert_eq!(served.await.unwrap(), End::Closed);
}
