//! Handshake and option haggling, seen by a client.
#![allow(clippy::unwrap_used, reason = "a test")]

mod support;

use std::time::Duration;

use support::{Memory, info_data, talk};
use tokio::time::Instant;
use vdisk_nbd::codec::{Command, ProtocolError, option};
use vdisk_nbd::{ConnectionError, End, Stop, stop_channel};

const ACK: u32 = 1;
const UNSUP: u32 = 0x8000_0001;
const INVALID: u32 = 0x8000_0003;
const UNKNOWN: u32 = 0x8000_0006;
const SHUTDOWN: u32 = 0x8000_0007;

#[tokio::test]
async fn go_tells_size_flags_block_sizes_and_what_was_asked_for_and_info_tells_the_same() {
    let (end, ()) = talk(Memory::new(1 << 20), Stop::never(), async |mut client| {
        client.hello(3).await;
        let wanted = info_data("", &[1, 2, 3, 99]);
        let (ack, info) = client.ask(option::INFO, &wanted).await;
        assert_eq!(ack, ACK);
        assert_eq!(
            info,
            [
                b"\0\0\0\0\0\0\0\x10\0\0\x01\x6d".to_vec(),
                b"\0\x01disk".to_vec(),
                b"\0\x02a disk for tests".to_vec(),
                b"\0\x03\0\0\0\x01\0\x01\0\0\x02\0\0\0".to_vec(),
            ]
        );
        assert_eq!(client.ask(option::GO, &wanted).await, (ACK, info));
        assert_eq!(client.simple(Command::Read, 0, 0, 4).await.data.len(), 4);
        client.disc().await;
    })
    .await;
    assert_eq!(end.unwrap(), End::Disconnected);
}

#[tokio::test]
async fn structured_replies_add_the_df_flag_and_a_read_only_disk_says_so() {
    talk(Memory::new(512).read_only(), Stop::never(), async |mut client| {
        client.hello(3).await;
        assert_eq!(client.ask(option::STRUCTURED_REPLY, b"x").await.0, INVALID);
        assert_eq!(client.ask(option::STRUCTURED_REPLY, &[]).await.0, ACK);
        let (_, info) = client.ask(option::INFO, &info_data("disk", &[])).await;
        assert_eq!(info[0][10..], [0x01, 0x8f]);
    })
    .await
    .0
    .unwrap();
}

#[tokio::test]
async fn options_that_are_not_supported_get_an_answer_and_the_next_one_is_read() {
    let (end, ()) = talk(Memory::new(512), Stop::never(), async |mut client| {
        client.hello(3).await;
        for unsupported in [4, option::STARTTLS, 9, option::SET_META_CONTEXT, option::EXTENDED_HEADERS, 12, u32::MAX] {
            assert_eq!(client.ask(unsupported, &[]).await.0, UNSUP);
            assert_eq!(client.ask(unsupported, &[7; 5000]).await.0, UNSUP);
        }
        assert_eq!(client.ask(option::LIST, &[1]).await.0, INVALID);
        let (ack, exports) = client.ask(option::LIST, &[]).await;
        assert_eq!((ack, exports), (ACK, vec![b"\0\0\0\x04diska disk for tests".to_vec()]));
        assert_eq!(client.ask(option::GO, &info_data("other", &[])).await.0, UNKNOWN);
        assert_eq!(client.ask(option::INFO, &[0; 3]).await.0, INVALID);
        assert_eq!(client.ask(option::ABORT, b"bye").await.0, ACK);
        assert!(client.is_closed().await);
    })
    .await;
    assert_eq!(end.unwrap(), End::Aborted);
}

#[tokio::test]
async fn export_name_begins_transmission_with_and_without_zeroes() {
    for (flags, zeroes) in [(0, 124), (1, 124), (3, 0)] {
        let (end, ()) = talk(Memory::new(4096), Stop::never(), async |mut client| {
            client.hello(flags).await;
            client.option(option::EXPORT_NAME, b"disk").await;
            assert_eq!(client.bytes().await, *b"\0\0\0\0\0\0\x10\0\x01\x6d");
            assert_eq!(client.many(zeroes).await, vec![0; zeroes as usize]);
            assert_eq!(client.simple(Command::Read, 0, 1, 3).await.data.len(), 3);
            client.disc().await;
        })
        .await;
        assert_eq!(end.unwrap(), End::Disconnected);
    }
}

#[tokio::test]
async fn an_unknown_name_in_export_name_hangs_up() {
    let (end, ()) = talk(Memory::new(512), Stop::never(), async |mut client| {
        client.hello(3).await;
        client.option(option::EXPORT_NAME, b"other").await;
        assert!(client.is_closed().await);
    })
    .await;
    assert!(matches!(end, Err(ConnectionError::UnknownExport(name)) if name == "other"));
}

#[tokio::test]
async fn bytes_that_are_no_protocol_hang_up() {
    let cases: [(&[u8], ProtocolError); 4] = [
        (b"\0\0\0\x07", ProtocolError::UnknownClientFlags(7)),
        (b"\x80\0\0\x03", ProtocolError::UnknownClientFlags(0x8000_0003)),
        (b"\0\0\0\x03IHAVEOPS\0\0\0\x07\0\0\0\0", ProtocolError::BadOptionMagic(0x4948_4156_454f_5053)),
        (b"\0\0\0\x03IHAVEOPT\0\0\0\x07\xff\xff\xff\xff", ProtocolError::OptionTooLong { option: 7, len: u32::MAX }),
    ];
    for (bytes, expected) in cases {
        let (end, ()) = talk(Memory::new(512), Stop::never(), async |mut client| {
            let _: [u8; 18] = client.bytes().await;
            client.send(bytes).await;
            assert!(client.is_closed().await);
        })
        .await;
        assert!(matches!(end, Err(ConnectionError::Protocol(e)) if e == expected), "{expected}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_handshake_that_takes_more_than_10_seconds_is_cut() {
    // However busy the client is meanwhile.
    let (end, ()) = talk(Memory::new(512), Stop::never(), async |mut client| {
        let started = Instant::now();
        client.hello(3).await;
        for _ in 0..9 {
            tokio::time::sleep(Duration::from_secs(1)).await;
            assert_eq!(client.ask(option::LIST, &[]).await.0, ACK);
        }
        assert!(client.is_closed().await);
        assert_eq!(started.elapsed().as_secs(), 10);
    })
    .await;
    assert!(matches!(end, Err(ConnectionError::HandshakeDeadline(10))));
}

#[tokio::test(start_paused = true)]
async fn transmission_has_no_deadline() {
    let (end, ()) = talk(Memory::new(512), Stop::never(), async |mut client| {
        client.go(false).await;
        tokio::time::sleep(Duration::from_secs(3600)).await;
        client.disc().await;
    })
    .await;
    assert_eq!(end.unwrap(), End::Disconnected);
}

#[tokio::test]
async fn a_server_that_stops_says_so_to_options_and_then_leaves() {
    let (stopper, stop) = stop_channel();
    let (end, ()) = talk(Memory::new(512), stop, async |mut client| {
        client.hello(3).await;
        assert_eq!(client.ask(option::LIST, &[]).await.0, ACK);
        // Both are there before the server looks again.
        client.option(option::GO, &info_data("disk", &[])).await;
        stopper.stop();
        assert_eq!(client.option_reply(option::GO).await.0, SHUTDOWN);
        assert!(client.is_closed().await);
    })
    .await;
    assert_eq!(end.unwrap(), End::Aborted);
}
