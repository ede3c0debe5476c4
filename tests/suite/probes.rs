//! `/probe/ws`: an echo for anybody, by the book.

use std::time::Duration;

use rustix::process::Signal;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;

use crate::common::frames::{self, BINARY, CLOSE, Frame, PING, PONG, TEXT};
use crate::common::http::{self, Client, HANDSHAKE};
use crate::common::raw::{MASK, rest};
use crate::world::World;

async fn try_probe(world: &World, extra: &[(&str, &str)]) -> (u16, TcpStream) {
    let mut client = Client::connect(world.dispatcher.address()).await.unwrap();
    let headers = [&HANDSHAKE[..], extra].concat();
    client
        .send(http::head("GET", "/probe/ws?leg=internal", &headers, 0))
        .await
        .unwrap();
    let (status, head) = client.read_head().await.unwrap();
    if status == 101 {
        assert_eq!(
            head.get("sec-websocket-accept"),
            Some("s3pPLMBiTxaQ9kYGzzhZRbK+xOo=")
        );
        assert_eq!(
            (
                head.get("sec-websocket-extensions"),
                head.get("sec-websocket-protocol")
            ),
            (None, None)
        );
    }
    (status, client.stream)
}

async fn probe(world: &World) -> TcpStream {
    let (status, stream) = try_probe(world, &[]).await;
    assert_eq!(status, 101);
    stream
}

fn part(fin: bool, opcode: u8, payload: &[u8]) -> Frame {
    Frame {
        fin,
        ..Frame::new(opcode, payload)
    }
}

/// What comes back for these bytes, up to the end.
async fn answer(world: &World, bytes: &[u8]) -> Vec<Frame> {
    let mut stream = probe(world).await;
    stream.write_all(bytes).await.unwrap();
    let mut frames = Vec::new();
    while let Ok(frame) = Frame::read(&mut stream).await {
        let closes = frame.opcode == CLOSE;
        frames.push(frame);
        if closes {
            break;
        }
    }
    frames
}

#[tokio::test]
async fn it_echoes_and_reaches_no_instance() {
    // Nobody needs to be trusted or known.
    let world =
        World::with(|setup| setup.set("identity.trusted_proxies", vec!["192.0.2.0/24"])).await;
    let mut stream = probe(&world).await;
    for size in [0, 1, 125, 126, 127, 65_535, 65_536] {
        for opcode in [TEXT, BINARY] {
            let frame = Frame::new(opcode, vec![b'x'; size]);
            frame.write(&mut stream, MASK).await.unwrap();
            assert_eq!(Frame::read(&mut stream).await.unwrap(), frame, "{size}");
        }
    }
    for size in [0, 1, 125] {
        Frame::new(PING, vec![b'p'; size])
            .write(&mut stream, MASK)
            .await
            .unwrap();
        assert_eq!(
            Frame::read(&mut stream).await.unwrap(),
            Frame::new(PONG, vec![b'p'; size])
        );
    }
    // A pong that nobody asked for is nothing.
    Frame::new(PONG, "unasked")
        .write(&mut stream, MASK)
        .await
        .unwrap();
    // Byte by byte.
    for byte in Frame::text("slow").encode(MASK) {
        stream.write_all(&[byte]).await.unwrap();
    }
    assert_eq!(Frame::read(&mut stream).await.unwrap(), Frame::text("slow"));
    Frame::close(1000).write(&mut stream, MASK).await.unwrap();
    assert_eq!(Frame::read(&mut stream).await.unwrap(), Frame::close(1000));
    assert!(rest(&mut stream).await.is_empty());
    assert!(world.alice.seen().is_empty() && world.bob.seen().is_empty());
    assert!(world.dispatcher.records().is_empty());
}

/// Many messages sent without waiting for their echoes, in both directions at once.
#[tokio::test]
async fn a_flood_is_echoed_in_its_order() {
    let world = World::new().await;
    let stream = probe(&world).await;
    let (mut read, mut write) = stream.into_split();
    let sender = tokio::spawn(async move {
        for number in 0..200_u32 {
            let mut payload = vec![0; 50_000];
            payload[..4].copy_from_slice(&number.to_be_bytes());
            Frame::new(BINARY, payload)
                .write(&mut write, MASK)
                .await
                .unwrap();
        }
        write
    });
    // The echo must not wait for the sender, nor the other way round.
    tokio::time::sleep(Duration::from_millis(300)).await;
    for number in 0..200_u32 {
        let frame = Frame::read(&mut read).await.unwrap();
        assert_eq!(
            (frame.payload.len(), &frame.payload[..4]),
            (50_000, &number.to_be_bytes()[..])
        );
    }
    sender.await.unwrap();
}

#[tokio::test]
async fn fragments_and_control_frames_between_them() {
    let world = World::new().await;
    let mut stream = probe(&world).await;
    for frame in [
        part(false, TEXT, b"fra"),
        part(false, 0, b""),
        Frame::new(PING, "between"),
        part(false, 0, b"gmen"),
    ] {
        frame.write(&mut stream, MASK).await.unwrap();
    }
    assert_eq!(
        Frame::read(&mut stream).await.unwrap(),
        Frame::new(PONG, "between")
    );
    part(true, 0, b"ted")
        .write(&mut stream, MASK)
        .await
        .unwrap();
    assert_eq!(
        Frame::read(&mut stream).await.unwrap(),
        Frame::text("fragmented")
    );
    // A character may be split between fragments.
    for frame in [part(false, TEXT, b"\xe2\x82"), part(true, 0, b"\xac")] {
        frame.write(&mut stream, MASK).await.unwrap();
    }
    assert_eq!(Frame::read(&mut stream).await.unwrap(), Frame::text("€"));
}

/// What RFC 6455 forbids is answered with the Close code that it names.
#[tokio::test]
async fn violations_are_closed_with_their_code() {
    let world = World::new().await;
    let frame = |first: u8, payload: &[u8]| {
        let mut bytes = Frame::new(0, payload).encode(MASK);
        bytes[0] = first;
        bytes
    };
    let fragmented = |frames: &[(u8, &[u8])]| {
        frames
            .iter()
            .flat_map(|(first, payload)| frame(*first, payload))
            .collect::<Vec<_>>()
    };
    for (bytes, code, what) in [
        (frame(0x81, b"\xff\xfe"), 1007, "bad UTF-8"),
        (frame(0x81, b"\xed\xa0\x80"), 1007, "a surrogate in UTF-8"),
        (
            fragmented(&[(0x01, b"\xe2\x82"), (0x80, b"x")]),
            1007,
            "bad UTF-8 across fragments",
        ),
        (frame(0xc1, b"x"), 1002, "RSV1"),
        (frame(0xa1, b"x"), 1002, "RSV2"),
        (frame(0x91, b"x"), 1002, "RSV3"),
        (frame(0x83, b"x"), 1002, "a reserved data opcode"),
        (frame(0x8b, b"x"), 1002, "a reserved control opcode"),
        (frame(0x89, &[b'x'; 126]), 1002, "an oversized ping"),
        (frame(0x88, &[3; 126]), 1002, "an oversized close"),
        (frame(0x09, b"x"), 1002, "a fragmented ping"),
        (frame(0x80, b"x"), 1002, "a continuation of nothing"),
        (
            fragmented(&[(0x01, b"a"), (0x81, b"b")]),
            1002,
            "a new message within a fragmented one",
        ),
        (
            Frame::text("unmasked").encode(None),
            1002,
            "a frame without a mask",
        ),
        (
            Frame::new(BINARY, vec![0; 65_537]).encode(MASK),
            1009,
            "a message over 64 KiB",
        ),
        (
            fragmented(&[(0x02, &[0; 40_000]), (0x80, &[0; 40_000])]),
            1009,
            "fragments over 64 KiB",
        ),
        (frame(0x88, b"x"), 1002, "a Close frame of one byte"),
        (
            frame(0x88, b"\x03\xe8\xff"),
            1007,
            "a Close frame with a reason that is no UTF-8",
        ),
    ] {
        let frames = answer(&world, &bytes).await;
        let told = frames
            .last()
            .filter(|frame| frame.opcode == CLOSE)
            .map(|frame| frame.payload.get(..2).map(<[u8]>::to_vec));
        assert_eq!(
            told,
            Some(Some((code as u16).to_be_bytes().to_vec())),
            "{what}: {frames:?}"
        );
    }
}

#[tokio::test]
async fn close_codes_valid_and_invalid() {
    let world = World::new().await;
    assert_eq!(
        answer(&world, &Frame::new(CLOSE, "").encode(MASK)).await,
        [Frame::new(CLOSE, "")]
    );
    for code in [
        1000, 1001, 1002, 1003, 1007, 1008, 1009, 1010, 1011, 3000, 3999, 4000, 4999,
    ] {
        let frames = answer(&world, &Frame::close(code).encode(MASK)).await;
        assert_eq!(frames, [Frame::close(code)], "{code}");
    }
    let with_reason = Frame::new(CLOSE, b"\x03\xe8bye".to_vec());
    assert_eq!(
        answer(&world, &with_reason.encode(MASK)).await[0].payload[..2],
        1000_u16.to_be_bytes()
    );
    for code in [0, 999, 1004, 1005, 1006, 1015, 1016, 2999, 5000, 65_535] {
        let frames = answer(&world, &Frame::close(code).encode(MASK)).await;
        assert_eq!(frames.len(), 1, "{code}");
        assert_eq!(
            (frames[0].opcode, &frames[0].payload[..2]),
            (CLOSE, &1002_u16.to_be_bytes()[..]),
            "{code}"
        );
    }
}

#[tokio::test]
async fn what_is_no_websocket_is_refused() {
    let world = World::new().await;
    for (method, headers) in [
        ("GET", &[][..]),
        ("POST", &HANDSHAKE),
        ("GET", &HANDSHAKE[..2]),
        ("GET", &[HANDSHAKE[1], HANDSHAKE[2], HANDSHAKE[3]]),
        (
            "GET",
            &[
                HANDSHAKE[0],
                HANDSHAKE[1],
                HANDSHAKE[3],
                ("Sec-WebSocket-Version", "8"),
            ],
        ),
    ] {
        let reply = http::request(
            world.dispatcher.address(),
            method,
            "/probe/ws",
            headers,
            b"",
        )
        .await
        .unwrap();
        assert_eq!(
            (reply.status, reply.get("x-t3-dispatch-error")),
            (400, Some("not-a-websocket")),
            "{headers:?}"
        );
        assert_eq!(reply.text(), "this address takes WebSockets only\n");
    }
}

/// Sixteen for one client address as the edge forwards it, and 256 in all.
#[tokio::test]
async fn places_are_bounded() {
    let world = World::new().await;
    let from = async |address: &str| try_probe(&world, &[("X-Forwarded-For", address)]).await;
    let mut held = Vec::new();
    for host in 0..16 {
        let mut address = format!("198.51.100.{host}");
        for place in 0..16 {
            // A household has as many IPv6 addresses as it likes.
            if host == 1 {
                address = format!("2001:db8::{place:x}");
            }
            // What a client writes before the edge does not help it.
            let chain = format!("203.0.113.{place}, {address}");
            let (status, stream) = from(&chain).await;
            assert_eq!(status, 101);
            held.push(stream);
        }
        if host == 0 {
            assert_eq!(from(&address).await.0, 503);
        }
        if host == 1 {
            assert_eq!(from("2001:db8::ffff").await.0, 503);
        }
    }
    // All are taken.
    assert_eq!(from("192.0.2.1").await.0, 503);
    let mut last = held.pop().unwrap();
    Frame::close(1000).write(&mut last, MASK).await.unwrap();
    rest(&mut last).await;
    wait_for_place(&world).await;
    let mut first = held.remove(0);
    Frame::text("still here")
        .write(&mut first, MASK)
        .await
        .unwrap();
    assert_eq!(
        Frame::read(&mut first).await.unwrap(),
        Frame::text("still here")
    );
}

async fn wait_for_place(world: &World) {
    crate::common::dispatcher::wait_for("free place", async || {
        try_probe(world, &[("X-Forwarded-For", "192.0.2.1")])
            .await
            .0
            == 101
    })
    .await;
}

#[tokio::test]
async fn a_shutdown_says_goodbye() {
    let mut world = World::new().await;
    let mut stream = probe(&world).await;
    world.dispatcher.signal(Signal::TERM);
    assert_eq!(Frame::read(&mut stream).await.unwrap(), Frame::close(1001));
    Frame::close(1001).write(&mut stream, MASK).await.unwrap();
    assert!(rest(&mut stream).await.is_empty());
    assert!(world.dispatcher.exited().await.success());
}

/// A client that is gone, or says nothing for a minute and a half, keeps no place.
#[tokio::test]
async fn silence_ends_it() {
    let world = World::new().await;
    let mut silent = probe(&world).await;
    let mut lively = probe(&world).await;
    for _ in 0..10 {
        tokio::time::sleep(Duration::from_secs(10)).await;
        Frame::new(frames::PING, "")
            .write(&mut lively, MASK)
            .await
            .unwrap();
        assert_eq!(
            Frame::read(&mut lively).await.unwrap(),
            Frame::new(PONG, "")
        );
    }
    assert_eq!(Frame::read(&mut silent).await.unwrap(), Frame::close(1001));
}
