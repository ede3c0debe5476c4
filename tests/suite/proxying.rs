//! What passes through: everything, as it came.

use std::time::Duration;

use tokio::io::AsyncWriteExt;

use crate::common::dispatcher::wait_for;
use crate::common::frames::{self, Frame};
use crate::common::http::{self, Client, HANDSHAKE};
use crate::common::instance::{Instance, Version};
use crate::common::mint;
use crate::world::{World, from};

/// A world, and the headers of a request of alice's that has a session.
async fn signed_in() -> (World, String) {
    let world = World::new().await;
    let session = world.alice.new_session();
    // So that later requests are not preceded by the question for the cookie's name.
    assert_eq!(
        world
            .dispatcher
            .get("alice", "/warm-up", &[("Cookie", &session)])
            .await
            .status,
        200
    );
    (world, session)
}

#[tokio::test]
async fn method_target_headers_and_body_arrive_as_they_came() {
    let (world, session) = signed_in().await;
    for (method, target, body) in [
        ("GET", "/a/b%2Fc/../d?x=1&y=%20&z", &b""[..]),
        ("POST", "/__test/echo?q=%E2%82%AC", b"\x00\xff body"),
        ("PUT", "/__test/echo", b"put"),
        ("PATCH", "/__test/echo", b"patch"),
        ("DELETE", "/__test/echo", b"delete"),
        ("OPTIONS", "/__test/echo", b""),
        ("GET", "//double//slash", b""),
        ("GET", "/;semi=1,comma/~tilde?a[]=1&b={x}|y", b""),
    ] {
        let headers = [
            ("X-authentik-username", "alice"),
            ("Cookie", session.as_str()),
            ("Host", "alice.example.com:8443"),
            ("Origin", "https://alice.example.com:8443"),
            ("X-Custom", "one"),
            ("X-Custom", "two"),
            ("Accept-Encoding", "br"),
        ];
        let reply = http::request(world.dispatcher.address(), method, target, &headers, body)
            .await
            .unwrap();
        assert_eq!(reply.status, 200, "{method} {target}");
        if target.starts_with("/__test/echo") {
            assert_eq!(reply.body, body);
        }
        let seen = world.alice.seen().last().unwrap().head.clone();
        assert_eq!((seen.method(), seen.target()), (method, target));
        assert_eq!(
            seen.all("host").collect::<Vec<_>>(),
            ["alice.example.com:8443"]
        );
        assert_eq!(seen.all("x-custom").collect::<Vec<_>>(), ["one", "two"]);
        assert_eq!(seen.get("origin"), Some("https://alice.example.com:8443"));
        assert_eq!(seen.get("accept-encoding"), Some("br"));
        assert_eq!(seen.get("x-authentik-username"), Some("alice"));
    }
}

/// `GET http://host/path` asks for the same as `GET /path`; instances know only the latter.
#[tokio::test]
async fn absolute_targets_become_paths() {
    let (world, session) = signed_in().await;
    let headers = [
        ("X-authentik-username", "alice"),
        ("Cookie", session.as_str()),
        ("Host", "alice.example.com"),
    ];
    let target = "http://alice.example.com/a?b=c";
    let reply = http::request(world.dispatcher.address(), "GET", target, &headers, b"")
        .await
        .unwrap();
    assert_eq!(reply.status, 200);
    let seen = world.alice.seen().last().unwrap().head.clone();
    assert_eq!(
        (seen.target(), seen.get("host")),
        ("/a?b=c", Some("alice.example.com"))
    );
}

#[tokio::test]
async fn forwarded_for_is_appended() {
    let (world, session) = signed_in().await;
    for (sent, expected) in [
        (&[][..], "127.0.0.1"),
        (&["192.0.2.7"], "192.0.2.7, 127.0.0.1"),
        (
            &["192.0.2.7, 198.51.100.1", "203.0.113.9"],
            "192.0.2.7, 198.51.100.1, 203.0.113.9, 127.0.0.1",
        ),
    ] {
        let mut headers = vec![("Cookie", session.as_str()), ("X-Forwarded-Proto", "https")];
        headers.extend(sent.iter().map(|value| ("X-Forwarded-For", *value)));
        world.dispatcher.get("alice", "/", &headers).await;
        let seen = world.alice.seen().last().unwrap().head.clone();
        assert_eq!(seen.all("x-forwarded-for").collect::<Vec<_>>(), [expected]);
        assert_eq!(seen.get("x-forwarded-proto"), Some("https"));
    }
}

#[tokio::test]
async fn hop_by_hop_headers_stay_on_their_hop() {
    let (world, session) = signed_in().await;
    let headers = [
        ("Cookie", session.as_str()),
        ("Connection", "keep-alive, X-Nominated"),
        ("X-Nominated", "1"),
        ("Keep-Alive", "timeout=9"),
        ("Proxy-Connection", "keep-alive"),
        ("Proxy-Authorization", "Basic eA=="),
        ("TE", "gzip"),
        ("Trailer", "X-Checksum"),
        ("X-Kept", "1"),
    ];
    let reply = world
        .dispatcher
        .get("alice", "/__test/hop-by-hop", &headers)
        .await;
    let seen = world.alice.seen().last().unwrap().head.clone();
    for name in [
        "x-nominated",
        "keep-alive",
        "proxy-connection",
        "proxy-authorization",
        "te",
        "trailer",
        "upgrade",
    ] {
        assert_eq!(seen.get(name), None, "request {name}");
    }
    assert_eq!(seen.get("x-kept"), Some("1"));
    for name in ["x-nominated", "keep-alive", "proxy-connection", "trailer"] {
        assert_eq!(reply.get(name), None, "response {name}");
    }
    assert_eq!(reply.get("x-kept"), Some("1"));
    assert_eq!(
        reply.head.all("connection").collect::<Vec<_>>(),
        ["keep-alive"]
    );
    // Each by itself, as none may depend on another's being there.
    for (name, value) in [
        ("Connection", "X-Nominated"),
        ("Connection", "close"),
        ("HTTP2-Settings", "AAMAAABk"),
        ("Keep-Alive", "timeout=9"),
        ("Proxy-Authenticate", "Basic"),
        ("Proxy-Authorization", "Basic eA=="),
        ("Proxy-Connection", "keep-alive"),
        ("TE", "trailers"),
        ("Trailer", "X-Checksum"),
        ("Upgrade", "h2c"),
    ] {
        let headers = [
            ("Cookie", session.as_str()),
            ("X-Nominated", "1"),
            (name, value),
        ];
        world.dispatcher.get("alice", "/", &headers).await;
        let seen = world.alice.seen().last().unwrap().head.clone();
        assert_eq!(seen.get(name), None, "{name}: {value}");
        let nominated = seen.get("x-nominated").is_none();
        assert_eq!(nominated, value == "X-Nominated", "{name}: {value}");
    }
}

/// Bodies stream: memory does not grow with them.
#[tokio::test]
async fn two_hundred_megabytes_up_and_down() {
    const SIZE: usize = 200 * 1024 * 1024;
    let (world, session) = signed_in().await;
    let headers = from("alice", &session);
    let before = world.dispatcher.memory();
    let mut peak = 0;

    let mut client = Client::connect(world.dispatcher.address()).await.unwrap();
    client
        .send(http::head("POST", "/__test/upload", &headers, SIZE))
        .await
        .unwrap();
    let block = vec![b'x'; 1024 * 1024];
    for _ in 0..SIZE / block.len() {
        client.stream.write_all(&block).await.unwrap();
        peak = peak.max(world.dispatcher.memory());
    }
    let reply = client.read_reply("POST").await.unwrap();
    assert_eq!((reply.status, reply.text()), (200, SIZE.to_string()));

    client
        .send(http::head(
            "GET",
            &format!("/__test/download?{SIZE}"),
            &headers,
            0,
        ))
        .await
        .unwrap();
    let (status, head) = client.read_head().await.unwrap();
    assert_eq!(
        (status, head.get("content-length")),
        (200, Some(SIZE.to_string().as_str()))
    );
    for _ in 0..SIZE / block.len() {
        client.read_exact(block.len()).await.unwrap();
        peak = peak.max(world.dispatcher.memory());
    }
    assert!(peak < before + 32 * 1024, "from {before} KiB to {peak} KiB");
}

/// A chunked upload of unknown length streams too.
#[tokio::test]
async fn an_upload_without_a_length_streams() {
    let (world, session) = signed_in().await;
    let mut client = Client::connect(world.dispatcher.address()).await.unwrap();
    let head = format!(
        "POST /__test/upload HTTP/1.1\r\nHost: t3.example.com\r\nX-authentik-username: alice\r\nCookie: {session}\r\n\
         Transfer-Encoding: chunked\r\n\r\n"
    );
    client.send(head).await.unwrap();
    for part in 1..=10 {
        client.send("5\r\nhello\r\n").await.unwrap();
        wait_for("part at the instance", async || {
            world.alice.body_bytes() == part * 5
        })
        .await;
    }
    client.send("0\r\n\r\n").await.unwrap();
    assert_eq!(client.read_reply("POST").await.unwrap().text(), "50");
}

/// A part of a response is there before the next one is sent: the instance waits for us to have seen it.
#[tokio::test]
async fn a_streamed_response_arrives_as_it_is_sent() {
    let (world, session) = signed_in().await;
    let headers = from("alice", &session);
    let mut client = Client::connect(world.dispatcher.address()).await.unwrap();
    client
        .send(http::head("GET", "/__test/stream?9", &headers, 0))
        .await
        .unwrap();
    client.read_head().await.unwrap();
    for part in 0..9 {
        world
            .dispatcher
            .get("alice", "/__test/next", &[("Cookie", &session)])
            .await;
        assert_eq!(
            client.read_chunk().await.unwrap(),
            format!("part {part}").as_bytes()
        );
    }
    assert!(client.read_chunk().await.unwrap().is_empty());
}

/// The instance closes idle connections at just the pace of the requests; no POST may fall into that gap.
#[tokio::test]
async fn ten_thousand_posts_around_the_keep_alive_timeout() {
    let keep_alive = Duration::from_millis(60);
    let base = tempfile::TempDir::new().unwrap();
    let instance = Instance::start_with(
        &mint::home(base.path(), "alice"),
        Version::V0_0_33,
        0,
        keep_alive,
    )
    .await;
    let setup = crate::common::dispatcher::Setup::new(base.path(), mint::working(base.path()));
    let dispatcher = setup.user("alice", "alice", instance.port()).start().await;
    let (address, session) = (dispatcher.address(), instance.new_session());
    let mut workers = tokio::task::JoinSet::new();
    for worker in 0..50_u64 {
        let session = session.clone();
        workers.spawn(async move {
            let mut client = Client::connect(address).await.unwrap();
            let headers = from("alice", &session);
            for round in 0..200 {
                let reply = client
                    .request("POST", "/__test/echo", &headers, b"x")
                    .await
                    .unwrap();
                assert_eq!((reply.status, reply.body.as_slice()), (200, &b"x"[..]));
                // A GET leaves a kept connection behind for the next POST to fall upon.
                let reply = client
                    .request("GET", "/__test/next", &headers, b"")
                    .await
                    .unwrap();
                assert_eq!(reply.status, 200);
                // From 58 to 62 ms, in steps of a tenth.
                tokio::time::sleep(Duration::from_micros(
                    58_000 + (worker * 37 + round * 100) % 4_000,
                ))
                .await;
            }
        });
    }
    workers.join_all().await;
    assert_eq!(instance.seen_at("/__test/echo").len(), 10_000);
}

/// Connections are kept for requests that may be repeated, and for less time than the instance keeps them.
#[tokio::test]
async fn connections_are_kept_but_not_for_long() {
    let (world, session) = signed_in().await;
    let get = async || {
        world
            .dispatcher
            .get("alice", "/__test/next", &[("Cookie", &session)])
            .await;
        world.alice.seen().last().unwrap().connection
    };
    // An answer may be there a moment before its connection is free again.
    wait_for("a kept connection", async || get().await == get().await).await;
    let last = get().await;
    tokio::time::sleep(Duration::from_millis(4_200)).await;
    assert_ne!(get().await, last);
}

#[tokio::test]
async fn a_refused_upgrade_is_relayed_and_its_connection_not_kept() {
    let (world, session) = signed_in().await;
    for (target, status) in [("/ws?wsTicket=bad", 401), ("/not-ws", 200)] {
        let headers = [&[("Cookie", session.as_str())][..], &HANDSHAKE].concat();
        let reply = world.dispatcher.get("alice", target, &headers).await;
        assert_eq!((reply.status, reply.text().as_str()), (status, "refused\n"));
        let refused = world.alice.seen().last().unwrap().connection;
        for _ in 0..5 {
            let reply = world
                .dispatcher
                .get("alice", "/", &[("Cookie", &session)])
                .await;
            assert_eq!(reply.status, 200);
            assert_ne!(world.alice.seen().last().unwrap().connection, refused);
        }
    }
}

/// What is not a whole WebSocket handshake is an ordinary request, and no tunnel comes of it.
#[tokio::test]
async fn half_a_handshake_is_no_upgrade() {
    let (world, session) = signed_in().await;
    for headers in [
        &[("Upgrade", "websocket")][..],
        &[("Upgrade", "h2c"), ("Connection", "Upgrade")],
        &[("Connection", "Upgrade")],
    ] {
        let headers = [&[("Cookie", session.as_str())], headers].concat();
        let reply = world.dispatcher.get("alice", "/ws", &headers).await;
        assert_eq!(reply.status, 200);
        let seen = world.alice.seen().last().unwrap().head.clone();
        assert_eq!((seen.target(), seen.get("upgrade")), ("/ws", None));
    }
    // With a body, or in an older version, it is none either.
    for line in [
        "GET /ws HTTP/1.1\r\nTransfer-Encoding: chunked",
        "GET /ws HTTP/1.0",
        "POST /ws HTTP/1.1\r\nContent-Length: 5",
    ] {
        let mut client = Client::connect(world.dispatcher.address()).await.unwrap();
        let rest =
            "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: a\r\n\r\n0\r\n\r\n";
        let head = format!(
            "{line}\r\nHost: a\r\nX-authentik-username: alice\r\nCookie: {session}\r\n{rest}"
        );
        client.send(head).await.unwrap();
        let (status, _) = client.read_head().await.unwrap();
        assert!(matches!(status, 200 | 404), "{line}: {status}");
        assert_eq!(
            world.alice.seen().last().unwrap().head.get("upgrade"),
            None,
            "{line}"
        );
    }
}

/// A client may offer more than one protocol (RFC 9110, section 7.8): the instance is asked for the WebSocket.
#[tokio::test]
async fn a_websocket_may_be_one_offer_of_several() {
    let (world, session) = signed_in().await;
    for offers in [&["websocket, h2c"][..], &["h2c", "WebSocket"]] {
        let mut headers = [&from("alice", &session)[..], &HANDSHAKE].concat();
        headers.retain(|(name, _)| *name != "Upgrade");
        headers.extend(offers.iter().map(|offer| ("Upgrade", *offer)));
        let mut client = Client::connect(world.dispatcher.address()).await.unwrap();
        let handshake = http::head("GET", "/ws", &headers, 0);
        client.send(handshake).await.unwrap();
        assert_eq!(client.read_head().await.unwrap().0, 101, "{offers:?}");
        let seen = world.alice.seen_at("/ws").last().unwrap().head.clone();
        assert!(seen.all("upgrade").eq(["websocket"]), "{offers:?}");
    }
}

#[tokio::test]
async fn a_websocket_passes_through() {
    let (world, session) = signed_in().await;
    let mut client = Client::connect(world.dispatcher.address()).await.unwrap();
    let headers = [
        ("X-authentik-username", "alice"),
        ("Cookie", session.as_str()),
        ("Connection", "keep-alive, Upgrade"),
        ("Upgrade", "websocket"),
        ("Sec-WebSocket-Version", "13"),
        ("Sec-WebSocket-Key", "dGhlIHNhbXBsZSBub25jZQ=="),
        ("Sec-WebSocket-Protocol", "t3.v1, other"),
        (
            "Sec-WebSocket-Extensions",
            "permessage-deflate; client_max_window_bits",
        ),
    ];
    client
        .send(http::head("GET", "/ws", &headers, 0))
        .await
        .unwrap();
    let (status, head) = client.read_head().await.unwrap();
    assert_eq!(status, 101);
    assert_eq!(
        head.get("sec-websocket-accept"),
        Some("s3pPLMBiTxaQ9kYGzzhZRbK+xOo=")
    );
    assert_eq!(head.get("sec-websocket-protocol"), Some("t3.v1"));
    assert!(
        head.get("sec-websocket-extensions")
            .unwrap()
            .starts_with("permessage-deflate")
    );
    let seen = world.alice.seen().last().unwrap().head.clone();
    assert_eq!(seen.get("sec-websocket-protocol"), Some("t3.v1, other"));
    assert_eq!(
        seen.get("sec-websocket-extensions"),
        Some("permessage-deflate; client_max_window_bits")
    );
    // Some server may look for them by hand. Pingora writes `upgrade` anew.
    for (name, _) in headers.iter().filter(|(name, _)| *name != "Upgrade") {
        assert!(seen.headers.iter().any(|(seen, _)| seen == name), "{name}");
    }

    let mask = Some([1, 2, 3, 4]);
    // Beyond 64 KiB, Pingora's buffers do not hold a message at once.
    for size in [1, 125, 126, 65_536, 1_000_000] {
        Frame::new(frames::BINARY, vec![7; size])
            .write(&mut client.stream, mask)
            .await
            .unwrap();
        let echo = Frame::read(&mut client.stream).await.unwrap();
        assert_eq!((echo.opcode, echo.rsv1), (frames::BINARY, true));
    }
    Frame::new(frames::PING, "still there?")
        .write(&mut client.stream, mask)
        .await
        .unwrap();
    assert_eq!(
        Frame::read(&mut client.stream).await.unwrap(),
        Frame::new(frames::PONG, "still there?")
    );
    Frame::close(1000)
        .write(&mut client.stream, mask)
        .await
        .unwrap();
    assert_eq!(
        Frame::read(&mut client.stream).await.unwrap(),
        Frame::close(1000)
    );
    client.wait_for_end().await;
    // A WebSocket's life is not a request's latency.
    assert_eq!(
        world
            .dispatcher
            .metric("t3dispatch_time_to_first_byte_seconds_count{status=\"1xx\"}")
            .await,
        0.0
    );
}

#[tokio::test]
async fn an_early_answer_to_an_upload_is_relayed() {
    let (world, session) = signed_in().await;
    let headers = from("alice", &session);
    for size in [1_000, 5_000_000] {
        let mut client = Client::connect(world.dispatcher.address()).await.unwrap();
        client
            .send(http::head("POST", "/api/unknown", &headers, size))
            .await
            .unwrap();
        // The answer comes though the body has not been sent.
        let (status, _) = client.read_head().await.unwrap();
        assert_eq!(status, 404, "{size}");
    }
}

#[tokio::test]
async fn http_1_0_clients_get_a_body_that_ends_with_the_connection() {
    let (world, session) = signed_in().await;
    for (target, body) in [
        ("/__test/chunked", "chunks"),
        ("/__test/until-close", "until close"),
        ("/__test/next", "next\n"),
    ] {
        let mut client = Client::connect(world.dispatcher.address()).await.unwrap();
        let head = format!(
            "GET {target} HTTP/1.0\r\nHost: a\r\nX-authentik-username: alice\r\nCookie: {session}\r\n\r\n"
        );
        client.send(head).await.unwrap();
        let reply = client.read_reply("GET").await.unwrap();
        assert_eq!(
            (reply.status, reply.text().as_str()),
            (200, body),
            "{target}"
        );
        assert_eq!(reply.get("transfer-encoding"), None);
        client.wait_for_end().await;
    }
}

#[tokio::test]
async fn responses_of_every_framing_are_relayed() {
    let (world, session) = signed_in().await;
    let headers = from("alice", &session);
    let mut client = Client::connect(world.dispatcher.address()).await.unwrap();
    for (target, body) in [
        ("/__test/chunked", "chunks"),
        ("/__test/until-close", "until close"),
        ("/__test/echo", ""),
    ] {
        let reply = client.request("GET", target, &headers, b"").await.unwrap();
        assert_eq!(
            (reply.status, reply.text().as_str()),
            (200, body),
            "{target}"
        );
    }
    let reply = client.request("HEAD", "/", &headers, b"").await.unwrap();
    assert!(
        reply
            .get("content-length")
            .unwrap()
            .parse::<usize>()
            .unwrap()
            > 0
    );
    let reply = client.request("GET", "/", &headers, b"").await.unwrap();
    assert_eq!(reply.status, 200);
    // Half a response is not made to look whole.
    client
        .send(http::head("GET", "/__test/break", &headers, 0))
        .await
        .unwrap();
    assert!(client.read_reply("GET").await.is_err());
}

#[tokio::test]
async fn an_instance_that_is_down_or_breaks_off_is_a_502() {
    let (world, session) = signed_in().await;
    let cookie = [("Cookie", session.as_str())];
    world.alice.set(|vices| vices.closes_unanswered = true);
    let reply = world.dispatcher.get("alice", "/api/x", &cookie).await;
    assert_eq!(
        (reply.status, reply.get("x-t3-dispatch-error")),
        (502, Some("instance-failed"))
    );
    assert_eq!(
        reply.text(),
        "t3 instance ended the connection without an answer\n"
    );
    world.alice.set(|vices| *vices = Default::default());
    world.alice.set(|vices| vices.garbage = true);
    let reply = world.dispatcher.get("alice", "/api/x", &cookie).await;
    assert_eq!(
        (reply.status, reply.get("x-t3-dispatch-error")),
        (502, Some("instance-failed"))
    );

    let World {
        dispatcher,
        alice,
        base,
        bob,
    } = world;
    let port = alice.kill().await;
    for _ in 0..3 {
        let reply = dispatcher.get("alice", "/api/x", &cookie).await;
        assert_eq!(
            (reply.status, reply.get("x-t3-dispatch-error")),
            (502, Some("instance-unreachable"))
        );
        assert_eq!(reply.text(), "t3 instance is not reachable\n");
    }
    assert_eq!(
        dispatcher
            .metric("t3dispatch_upstream_errors_total{kind=\"ConnectRefused\"}")
            .await,
        3.0
    );
    // Nobody else notices, and all is well as soon as it is back.
    assert_eq!(
        dispatcher
            .get("bob", "/", &[("Cookie", &bob.new_session())])
            .await
            .status,
        200
    );
    let home = mint::home(base.path(), "alice");
    let _alice = Instance::start_with(&home, Version::V0_0_33, port, Duration::from_secs(5)).await;
    assert_eq!(dispatcher.get("alice", "/api/x", &cookie).await.status, 200);
}

/// `t3 serve` restarts under load: kept connections die with it, and no request is answered by a dead one.
#[tokio::test]
async fn a_restart_of_the_instance_leaves_no_stale_connection() {
    let (world, session) = signed_in().await;
    let World {
        dispatcher,
        mut alice,
        base,
        bob: _bob,
    } = world;
    let home = mint::home(base.path(), "alice");
    let cookie = [("Cookie", session.as_str())];
    for _ in 0..20 {
        assert_eq!(
            dispatcher
                .get("alice", "/__test/next", &cookie)
                .await
                .status,
            200
        );
        let port = alice.kill().await;
        alice = Instance::start_with(&home, Version::V0_0_33, port, Duration::from_secs(5)).await;
        assert_eq!(
            dispatcher
                .get("alice", "/__test/next", &cookie)
                .await
                .status,
            200
        );
        assert_eq!(
            dispatcher
                .request("alice", "POST", "/__test/echo", &cookie)
                .await
                .status,
            200
        );
    }
}

/// There is no limit on how long a response may take. A minute is Pingora's own limit in several places.
#[tokio::test]
async fn a_slow_response_is_waited_for() {
    let (world, session) = signed_in().await;
    let reply = world
        .dispatcher
        .get("alice", "/__test/slow?65000", &[("Cookie", &session)])
        .await;
    assert_eq!((reply.status, reply.text().as_str()), (200, "slow\n"));
}

/// An upload may pause for longer than Pingora's minute too.
#[tokio::test]
async fn an_upload_that_pauses_goes_on() {
    let (world, session) = signed_in().await;
    let headers = from("alice", &session);
    let mut client = Client::connect(world.dispatcher.address()).await.unwrap();
    client
        .send(http::head("POST", "/__test/echo", &headers, 10))
        .await
        .unwrap();
    client.send("first").await.unwrap();
    tokio::time::sleep(Duration::from_secs(65)).await;
    client.send("later").await.unwrap();
    assert_eq!(
        client.read_reply("POST").await.unwrap().text(),
        "firstlater"
    );
}

/// A client that leaves ends its request at the instance, whatever it has sent behind it.
#[tokio::test]
async fn a_client_that_leaves_is_counted_as_aborted() {
    let (world, session) = signed_in().await;
    let headers = from("alice", &session);
    let slow = http::head("GET", "/__test/slow?60000", &headers, 0);
    let (next, many) = (slow.clone(), slow.repeat(60_000 / slow.len()));
    for (nth, behind) in ["", "\n", &next, &many].into_iter().enumerate() {
        let mut client = Client::connect(world.dispatcher.address()).await.unwrap();
        client.send(slow.clone() + behind).await.unwrap();
        wait_for("request at the instance", async || {
            world.alice.seen_at("/__test/slow").len() == nth + 1
        })
        .await;
        drop(client);
        let aborted = "t3dispatch_requests_total{outcome=\"aborted\",status=\"none\"}";
        wait_for("aborted request", async || {
            world.dispatcher.metric(aborted).await == (nth + 1) as f64
        })
        .await;
    }
}

/// Pingora by itself ends a WebSocket now and then right after its 101, and more often the faster the instance is.
#[tokio::test]
async fn no_websocket_is_lost_right_after_it_opened() {
    let (world, session) = signed_in().await;
    let headers = [&from("alice", &session)[..], &HANDSHAKE].concat();
    let mut held = Vec::new();
    for _ in 0..400 {
        let mut client = Client::connect(world.dispatcher.address()).await.unwrap();
        client
            .send(http::head("GET", "/ws", &headers, 0))
            .await
            .unwrap();
        assert_eq!(client.read_head().await.unwrap().0, 101);
        held.push(client);
    }
    for client in &mut held {
        Frame::text("held")
            .write(&mut client.stream, Some([0; 4]))
            .await
            .unwrap();
        assert_eq!(
            Frame::read(&mut client.stream).await.unwrap(),
            Frame::text("held")
        );
    }
}

#[tokio::test]
async fn a_101_that_nobody_asked_for_is_a_502() {
    let (world, session) = signed_in().await;
    world.alice.set(|vices| vices.switches_unasked = true);
    for headers in [
        &[][..],
        &[("Upgrade", "websocket")],
        &[("Upgrade", "h2c"), ("Connection", "Upgrade")],
    ] {
        let headers = [&[("Cookie", session.as_str())], headers].concat();
        let reply = world.dispatcher.get("alice", "/ws", &headers).await;
        assert_eq!(
            (reply.status, reply.get("x-t3-dispatch-error")),
            (502, Some("instance-failed"))
        );
    }
}

#[tokio::test]
async fn a_request_names_its_host() {
    let (world, session) = signed_in().await;
    let ask = async |line: &str| {
        let mut client = Client::connect(world.dispatcher.address()).await.unwrap();
        let head = format!("{line}\r\nX-authentik-username: alice\r\nCookie: {session}\r\n\r\n");
        client.send(head).await.unwrap();
        client.read_reply("GET").await.unwrap()
    };
    let reply = ask("GET /x HTTP/1.1").await;
    assert_eq!(
        (reply.status, reply.get("x-t3-dispatch-error")),
        (400, Some("bad-request"))
    );
    assert_eq!(ask("GET /__test/next HTTP/1.0").await.status, 200);
    let seen = world.alice.seen().last().unwrap().head.clone();
    assert_eq!(
        seen.get("host"),
        Some(format!("127.0.0.1:{}", world.alice.port()).as_str())
    );
}
