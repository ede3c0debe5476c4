//! `t3-dispatch probe`: the real binary, its legs to the real dispatcher and to servers that misbehave.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::Value;
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::common::dispatcher::{own_address, program, wait_for};
use crate::common::frames::{CLOSE, Frame, PING, PONG, TEXT};
use crate::common::http;
use crate::common::prober::{
    Pki, Setup, TlsEcho, doh, echo, echo_next, listen, next_socket, read_head, upgrade,
};
use crate::world::World;

const TOKEN: &str = "a-token-that-nobody-may-see";

const HTTP1: &[u8] = b"http/1.1";

fn closed(code: u16, reason: &str) -> Frame {
    let mut payload = code.to_be_bytes().to_vec();
    payload.extend(reason.as_bytes());
    Frame::new(CLOSE, payload)
}

/// What a finished `--once` printed.
fn printed(output: &std::process::Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

#[tokio::test]
async fn legs_to_the_real_dispatcher_and_to_an_instance() {
    let mut world = World::new().await;
    let instance = format!("http://127.0.0.1:{}/api/auth/session", world.alice.port());
    let setup = Setup::new()
        .plain("internal", world.dispatcher.address())
        .leg("t3serve", "http", instance, "system");

    let output = setup.once().await;
    let table = printed(&output);
    assert_eq!(output.status.code(), Some(0), "{table}");
    let rows: Vec<Vec<&str>> = table
        .lines()
        .map(|line| line.split_whitespace().collect())
        .collect();
    assert_eq!(
        rows[0],
        ["LEG", "DNS", "CONNECT", "TLS", "UPGRADE", "ECHO", "RESULT"]
    );
    assert_eq!(
        (rows[1][0], rows[1][1], rows[1][2]),
        ("ok", "internal", "-")
    );
    assert_eq!((rows[2][0], rows[2][1], rows[2][2]), ("ok", "t3serve", "-"));
    // Connect, upgrade and echo have times; an HTTP leg has no echo.
    assert_eq!(
        rows[1].iter().filter(|part| **part == "ms").count(),
        3,
        "{table}"
    );
    assert_eq!(
        rows[2].iter().filter(|part| **part == "ms").count(),
        2,
        "{table}"
    );
    let ends: Vec<usize> = table
        .lines()
        .map(|line| line.rfind("RESULT").or(line.rfind("up")).unwrap())
        .collect();
    assert!(ends.iter().all(|end| *end == ends[0]), "{table}");
    // Colours are for terminals.
    assert!(!table.contains('\x1b'), "{table}");

    let prober = setup.start().await;
    for leg in ["internal", "t3serve"] {
        prober
            .wait_for(&format!("rtt_seconds_count{{leg=\"{leg}\"}}"), 3.0)
            .await;
        prober
            .wait_for(&format!("connected{{leg=\"{leg}\"}}"), 1.0)
            .await;
    }
    world.dispatcher.signal(Signal::TERM);
    prober
        .wait_for(
            "disconnects_total{leg=\"internal\",reason=\"closed_1001\"}",
            1.0,
        )
        .await;
    world.dispatcher.exited().await;
    // It goes on trying.
    prober
        .wait_for(
            "disconnects_total{leg=\"internal\",reason=\"connect_failed\"}",
            2.0,
        )
        .await;
    assert_eq!(
        prober.metric("connected{leg=\"internal\"}").await,
        Some(0.0)
    );
    assert_eq!(prober.metric("connected{leg=\"t3serve\"}").await, Some(1.0));
    assert_eq!(
        prober
            .metric("connection_age_seconds_count{leg=\"internal\"}")
            .await,
        Some(1.0)
    );
    assert!(
        prober
            .metric("last_disconnect_timestamp{leg=\"internal\"}")
            .await
            .unwrap()
            > 1.7e9
    );
    assert_eq!(
        prober
            .metric("last_disconnect_timestamp{leg=\"t3serve\"}")
            .await,
        Some(0.0)
    );
    // Once each, however often it tried.
    for (line, count) in [
        ("leg-up leg=internal rtt_ms=", 1),
        ("leg-up leg=t3serve rtt_ms=", 1),
        ("leg-down leg=internal reason=closed_1001 age_s=", 1),
        ("leg-down", 1),
    ] {
        assert_eq!(prober.logged(line).len(), count, "{line}");
    }
    // And an instance that goes away takes its leg with it.
    drop(world);
    prober
        .wait_for(
            "disconnects_total{leg=\"t3serve\",reason=\"connect_failed\"}",
            1.0,
        )
        .await;
    assert_eq!(
        prober
            .metric("connection_age_seconds_count{leg=\"t3serve\"}")
            .await,
        Some(1.0)
    );
}

/// All that a leg says, and what it does not say without an echo.
#[tokio::test]
async fn heartbeats_and_the_request_before_them() {
    let (listener, address) = listen().await;
    let silent = std::net::SocketAddr::from((own_address(), 1));
    let prober = Setup::new()
        .set("token", TOKEN)
        .set("rtt_timeout", "20s")
        .leg(
            "internal",
            "websocket",
            format!("ws://{address}/probe/ws?a=b"),
            "system",
        )
        .leg("t3serve", "http", format!("http://{silent}/"), "system")
        .start()
        .await;
    let (mut stream, head) = next_socket(&listener, "X-T3-Leg: internal\r\n").await;
    assert_eq!(head.line, "GET /probe/ws?a=b&leg=internal HTTP/1.1");
    assert_eq!(
        head.get("authorization"),
        Some(format!("Bearer {TOKEN}").as_str())
    );
    assert_eq!(head.get("host"), Some(address.to_string().as_str()));
    assert_eq!(head.get("sec-websocket-version"), Some("13"));
    assert!(head.get("user-agent").unwrap().starts_with("t3-dispatch/"));
    assert_eq!(
        prober.metric("connected{leg=\"internal\"}").await,
        Some(0.0)
    );

    prober
        .wait_for_log("leg-down leg=t3serve reason=connect_failed age_s=0")
        .await;
    let mut last_uptime = 0;
    for seq in 1..=4 {
        let frame = Frame::read(&mut stream).await.unwrap();
        assert_eq!((frame.opcode, frame.fin), (TEXT, true));
        assert!((1000..=1100).contains(&frame.payload.len()), "{frame:?}");
        let said: Value = serde_json::from_slice(&frame.payload).unwrap();
        let mut keys: Vec<&String> = said.as_object().unwrap().keys().collect();
        keys.sort();
        let all = [
            "heartbeat_ms",
            "leg",
            "legs",
            "pad",
            "rtt_ms",
            "seq",
            "uptime_ms",
        ];
        assert_eq!(keys, all);
        assert_eq!(said["leg"], "internal");
        // The next ones come although the first was not echoed.
        assert_eq!(said["seq"], seq);
        assert_eq!(said["heartbeat_ms"], 200);
        let uptime = said["uptime_ms"].as_u64().unwrap();
        assert!(uptime >= last_uptime);
        last_uptime = uptime;
        assert!(said["rtt_ms"].is_null());
        let legs = said["legs"].as_array().unwrap();
        assert_eq!(legs.len(), 2);
        assert_eq!(
            (&legs[0]["leg"], &legs[1]["leg"]),
            (&"internal".into(), &"t3serve".into())
        );
        assert_eq!(
            (&legs[0]["up"], &legs[1]["up"]),
            (&false.into(), &false.into())
        );
        assert!(legs[0]["for_ms"].is_u64() && legs[0]["reason"].is_null());
        if seq > 2 {
            assert_eq!(legs[1]["reason"], "connect_failed");
        }
        // What is no echo is none; a later one is.
        let echo = match seq {
            2 => Frame::text("{\"seq\":1}"),
            4 => frame,
            _ => continue,
        };
        echo.write(&mut stream, None).await.unwrap();
    }
    prober.wait_for_log("leg-up leg=internal rtt_ms=").await;
    let later = timeout(Duration::from_secs(20), async {
        loop {
            let frame = echo_next(&mut stream).await.unwrap();
            let said: Value = serde_json::from_slice(&frame.payload).unwrap();
            if said["rtt_ms"].is_u64() {
                return said;
            }
        }
    });
    let said = later.await.unwrap();
    assert_eq!(said["legs"][0]["up"], true);
    assert_eq!(
        prober.metric("connected{leg=\"internal\"}").await,
        Some(1.0)
    );
    assert!(prober.logged("leg-unknown").is_empty());
}

/// A dispatcher that does not take the token is told of once a connection, and the leg works.
#[tokio::test]
async fn an_unknown_leg_is_told_of_and_works() {
    let (listener, address) = listen().await;
    let setup = || Setup::new().set("token", TOKEN).plain("internal", address);
    tokio::spawn(async move {
        for answer in ["", "X-T3-Leg: another\r\n", "X-T3-Leg: internal\r\n"] {
            let (stream, _) = next_socket(&listener, answer).await;
            echo(stream).await;
        }
    });
    let output = setup().once().await;
    let table = printed(&output);
    assert_eq!(output.status.code(), Some(0), "{table}");
    assert!(table.contains("did not accept the token"), "{table}");
    for warnings in [1, 0] {
        let prober = setup().start().await;
        prober
            .wait_for("rtt_seconds_count{leg=\"internal\"}", 2.0)
            .await;
        let told = prober.logged("WARN leg-unknown leg=internal ");
        assert_eq!(told.len(), warnings);
    }
}

/// At the finest log level, through success and failure.
#[tokio::test]
async fn the_token_is_nowhere_to_be_seen() {
    let world = World::new().await;
    let (listener, address) = listen().await;
    // One that throws back all that it was sent.
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            if let Some(head) = read_head(&mut stream).await {
                let token = head.get("authorization").unwrap_or_default();
                let answer = format!(
                    "HTTP/1.1 302 Found\r\nLocation: https://auth.example.com/?rd={token}\r\nContent-Length: 0\r\n\r\n"
                );
                let _ = stream.write_all(answer.as_bytes()).await;
            }
        }
    });
    let folder = TempDir::new().unwrap();
    let file = folder.path().join("token");
    std::fs::write(&file, format!("{TOKEN}\n")).unwrap();
    let mut setup = Setup::new()
        .set("token_file", file.display().to_string())
        .plain("internal", world.dispatcher.address())
        .plain("refused", address)
        .plain("nobody", (own_address(), 1).into());
    setup.log_level = "trace".into();
    let output = setup.once().await;
    assert_eq!(output.status.code(), Some(1));
    let mut shown = printed(&output) + &String::from_utf8_lossy(&output.stderr);
    let prober = setup.start().await;
    prober.wait_for("connected{leg=\"internal\"}", 1.0).await;
    prober
        .wait_for(
            "disconnects_total{leg=\"refused\",reason=\"http_302\"}",
            2.0,
        )
        .await;
    shown += &prober.log();
    shown += &prober.metrics().await;
    assert!(shown.contains("leg-still-down leg=refused"));
    assert!(!shown.contains(TOKEN), "{shown}");
}

#[tokio::test]
async fn a_pinned_leg_keeps_the_name() {
    let pki = Pki::new();
    let server = TlsEcho::start(pki.acceptor("t3.example.com", HTTP1)).await;
    let url = "wss://t3.example.com/probe/ws".to_owned();
    let setup =
        Setup::new()
            .trusting(&pki)
            .leg("internal", "websocket", url, &server.address.to_string());
    let output = setup.once().await;
    assert_eq!(output.status.code(), Some(0), "{}", printed(&output));
    let prober = setup.start().await;
    prober.wait_for("connected{leg=\"internal\"}", 1.0).await;
    for seen in server.seen.lock().unwrap().iter() {
        assert_eq!(seen.sni.as_deref(), Some("t3.example.com"));
        assert_eq!(seen.head.get("host"), Some("t3.example.com"));
        assert_eq!(seen.head.get("authorization"), None);
    }
}

#[tokio::test]
async fn a_certificate_has_to_be_right() {
    let (pki, other) = (Pki::new(), Pki::new());
    let right = TlsEcho::start(pki.acceptor("t3.example.com", HTTP1)).await;
    let wrong = TlsEcho::start(pki.acceptor("other.example.com", HTTP1)).await;
    let unknown = TlsEcho::start(other.acceptor("t3.example.com", HTTP1)).await;
    let (listener, plain) = listen().await;
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let _ = stream.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").await;
        }
    });
    let mut setup = Setup::new().trusting(&pki);
    for (name, address) in [
        ("right", right.address),
        ("wrong", wrong.address),
        ("unknown", unknown.address),
        ("plain", plain),
    ] {
        let url = "wss://t3.example.com/probe/ws".to_owned();
        setup = setup.leg(name, "websocket", url, &address.to_string());
    }
    let output = setup.once().await;
    let table = printed(&output);
    assert_eq!(output.status.code(), Some(1), "{table}");
    assert!(table.contains("ok    right"), "{table}");
    for text in [
        "wrong: tls_failed: the certificate is not valid for name t3.example.com, but for other.example.com\n",
        "unknown: tls_failed: TLS: invalid peer certificate: UnknownIssuer",
        "name its authority's file in probe.ca_file",
        "plain: tls_failed: ",
    ] {
        assert!(table.contains(text), "{text:?} is not in\n{table}");
    }
    let prober = setup.start().await;
    for leg in ["wrong", "unknown", "plain"] {
        prober
            .wait_for(
                &format!("disconnects_total{{leg=\"{leg}\",reason=\"tls_failed\"}}"),
                1.0,
            )
            .await;
    }
    assert!(wrong.seen.lock().unwrap().is_empty());
}

/// The answer of DNS over HTTPS leads the leg, which the system's DNS could not.
#[tokio::test]
async fn a_leg_by_dns_over_https() {
    let pki = Pki::new();
    let server = TlsEcho::start(pki.acceptor("t3.example.com", HTTP1)).await;
    let std::net::IpAddr::V4(ip) = server.address.ip() else {
        panic!()
    };
    // Nobody is at the first address.
    let ips = [own_address(), ip];
    let (good, asked) = doh(&pki, None, "t3.example.com", ips).await;
    let (named, _) = doh(&pki, Some("localhost"), "t3.example.com", ips).await;
    let other = Some("other.example.com");
    let (wrong, never_asked) = doh(&pki, other, "t3.example.com", ips).await;
    let url = |name: &str| {
        format!(
            "wss://{name}.example.com:{}/probe/ws",
            server.address.port()
        )
    };
    let (good, named, wrong) = (
        format!("https://{good}/dns-query"),
        format!("https://localhost:{}/dns-query", named.port()),
        format!("https://{wrong}/dns-query"),
    );
    let setup = Setup::new()
        .trusting(&pki)
        .leg("cloudflare", "websocket", url("t3"), &good)
        .leg("by-name", "websocket", url("t3"), &named)
        .leg("nowhere", "websocket", url("nowhere"), &good)
        .leg("wrong", "websocket", url("t3"), &wrong)
        .leg("system", "websocket", url("t3"), "system");
    let output = setup.once().await;
    let table = printed(&output);
    assert!(table.contains("ok    cloudflare"), "{table}");
    assert!(table.contains("ok    by-name"), "{table}");
    assert!(
        table.contains("nowhere: dns_failed: nowhere.example.com by https://"),
        "{table}"
    );
    assert!(table.contains("there is no such name"), "{table}");
    assert!(table.contains("system: dns_failed: "), "{table}");
    // The certificate of this server is for another name than the one that it is asked by.
    assert!(table.contains("wrong: dns_failed: "), "{table}");
    assert!(
        table.contains("the server cannot be reached: invalid peer certificate"),
        "{table}"
    );
    let prober = setup.start().await;
    prober.wait_for("connected{leg=\"cloudflare\"}", 1.0).await;
    let seen = server.seen.lock().unwrap().clone();
    let port = server.address.port();
    assert_eq!(seen[0].sni.as_deref(), Some("t3.example.com"));
    assert_eq!(
        seen[0].head.get("host"),
        Some(format!("t3.example.com:{port}").as_str())
    );
    let asked = asked.lock().unwrap().clone();
    assert!(asked.len() >= 4 && asked.iter().all(|path| path == "/dns-query"));
    assert!(never_asked.lock().unwrap().is_empty());
}

/// Every way to fail, each with its own reason.
#[tokio::test]
async fn every_reason_is_told_apart() {
    let mut setup = Setup::new()
        .set("rtt_timeout", "1500ms")
        .set("connect_timeout", "1500ms");
    let mut expected = Vec::new();
    let mut legs: Vec<(&str, String, String)> = Vec::new();
    let nobody = std::net::SocketAddr::from((own_address(), 1));
    legs.push((
        "refused",
        format!("ws://{nobody}/"),
        "connect_failed".into(),
    ));
    legs.push((
        "nameless",
        "ws://nowhere.invalid/".into(),
        "dns_failed".into(),
    ));
    // A listener whose queue is full drops what comes.
    let full = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    let at = std::net::SocketAddr::from((own_address(), 4000));
    full.bind(&at.into()).unwrap();
    full.listen(0).unwrap();
    let mut queued = Vec::new();
    for _ in 0..4 {
        queued.push(tokio::spawn(TcpStream::connect(at)));
    }
    wait_for("full queue", async || {
        timeout(Duration::from_millis(300), TcpStream::connect(at))
            .await
            .is_err()
    })
    .await;
    legs.push(("blackhole", format!("ws://{at}/"), "connect_timeout".into()));

    type Act = fn(TcpStream) -> std::pin::Pin<Box<dyn Future<Output = ()> + Send>>;
    async fn answer(mut stream: TcpStream, answer: &str) {
        read_head(&mut stream).await;
        let _ = stream.write_all(answer.as_bytes()).await;
        let _ = stream.read_to_end(&mut Vec::new()).await;
    }
    async fn up_then(mut stream: TcpStream, last: Option<Frame>) {
        upgrade(&mut stream, "").await;
        echo_next(&mut stream).await;
        if let Some(last) = last {
            let _ = last.write(&mut stream, None).await;
            let _ = stream.read_to_end(&mut Vec::new()).await;
        }
    }
    let acts: [(&str, &str, Act); 11] = [
        ("mute", "connect_timeout", |mut stream| {
            Box::pin(async move {
                let _ = stream.read_to_end(&mut Vec::new()).await;
            })
        }),
        ("echoless", "rtt_timeout", |mut stream| {
            Box::pin(async move {
                upgrade(&mut stream, "").await;
                let _ = stream.read_to_end(&mut Vec::new()).await;
            })
        }),
        ("ends", "io_error", |stream| Box::pin(up_then(stream, None))),
        ("ends-early", "io_error", |mut stream| {
            Box::pin(async move {
                read_head(&mut stream).await;
            })
        }),
        ("garbage", "io_error", |stream| {
            Box::pin(answer(stream, "SSH-2.0-OpenSSH_9.9\r\n\r\n"))
        }),
        ("leaves", "closed_1001", |stream| {
            Box::pin(up_then(stream, Some(closed(1001, ""))))
        }),
        ("closes", "closed_4321", |stream| {
            Box::pin(up_then(stream, Some(closed(4321, "because"))))
        }),
        ("codeless", "closed_1005", |stream| {
            Box::pin(up_then(stream, Some(Frame::new(CLOSE, ""))))
        }),
        ("sign-on", "http_302", |stream| {
            Box::pin(answer(
                stream,
                "HTTP/1.1 302 Found\r\nLocation: https://auth.example.com/login?next=1\r\nContent-Length: 0\r\n\r\n",
            ))
        }),
        ("barred", "http_403", |stream| {
            Box::pin(answer(
                stream,
                "HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n",
            ))
        }),
        ("busy", "http_503", |stream| {
            Box::pin(answer(
                stream,
                "HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n",
            ))
        }),
    ];
    for (name, reason, act) in acts {
        let (listener, address) = listen().await;
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(act(stream));
            }
        });
        legs.push((name, format!("ws://{address}/"), reason.into()));
    }
    for (name, url, reason) in legs {
        setup = setup.leg(name, "websocket", url, "system");
        expected.push((name, reason));
    }
    let output = setup.once().await;
    let table = printed(&output);
    for text in [
        "sign-on: http_302: answered with 302 Found to https://auth.example.com/login\n  /probe is behind the sign-on: leave it \
         out at the edge",
        "barred: http_403: answered with 403 Forbidden\n",
        "echoless: rtt_timeout: no echo within 1.5s",
        "mute: connect_timeout: no answer to the WebSocket handshake within 1.5s",
        "refused: connect_failed: ",
    ] {
        assert!(table.contains(text), "{text:?} is not in\n{table}");
    }
    let prober = setup.start().await;
    for (name, reason) in &expected {
        let series = format!("disconnects_total{{leg=\"{name}\",reason=\"{reason}\"}}");
        // Again and again.
        prober.wait_for(&series, 2.0).await;
    }
    for (name, reason) in &expected {
        let line = format!("leg-down leg={name} reason={reason} ");
        assert!(!prober.logged(&line).is_empty(), "{line}");
        // And for no other reason.
        let metrics = prober.metrics().await;
        let others: Vec<&str> = metrics
            .lines()
            .filter(|line| line.starts_with(&format!("t3probe_disconnects_total{{leg=\"{name}\"")))
            .filter(|line| !line.ends_with(" 0") && !line.contains(&format!("\"{reason}\"")))
            .collect();
        assert!(others.is_empty(), "{others:?}");
    }
    assert!(
        prober.log().contains("saying \\\"because\\\""),
        "{}",
        prober.log()
    );
    drop((queued, full));
}

/// The reasons of an HTTP leg.
#[tokio::test]
async fn an_http_leg_and_its_reasons() {
    let (slow, slow_at) = listen().await;
    let (broken, broken_at) = listen().await;
    let (missing, missing_at) = listen().await;
    let (good, good_at) = listen().await;
    let asked = Arc::new(Mutex::new(Vec::new()));
    let noted = asked.clone();
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = good.accept().await.unwrap();
            let head = read_head(&mut stream).await.unwrap();
            noted.lock().unwrap().push(head);
            let _ = stream
                .write_all(
                    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",
                )
                .await;
        }
    });
    tokio::spawn(async move {
        let mut held = Vec::new();
        loop {
            let (mut stream, _) = slow.accept().await.unwrap();
            // The head is quick, the rest never comes.
            let _ = stream
                .write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nno")
                .await;
            held.push(stream);
        }
    });
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = broken.accept().await.unwrap();
            read_head(&mut stream).await;
            let _ = stream
                .write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nno")
                .await;
        }
    });
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = missing.accept().await.unwrap();
            read_head(&mut stream).await;
            let _ = stream
                .write_all(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
                .await;
        }
    });
    let url = |address: std::net::SocketAddr| format!("http://{address}/api/auth/session");
    let prober = Setup::new()
        .set("token", TOKEN)
        .set("rtt_timeout", "500ms")
        .leg("slow", "http", url(slow_at), "system")
        .leg("broken", "http", url(broken_at), "system")
        .leg("missing", "http", url(missing_at), "system")
        .leg(
            "good",
            "http",
            "http://t3.example.com/api/auth/session?a=b".into(),
            &good_at.to_string(),
        )
        .start()
        .await;
    for (leg, reason) in [
        ("slow", "rtt_timeout"),
        ("broken", "io_error"),
        ("missing", "http_404"),
    ] {
        let series = format!("disconnects_total{{leg=\"{leg}\",reason=\"{reason}\"}}");
        prober.wait_for(&series, 2.0).await;
    }
    prober
        .wait_for("rtt_seconds_count{leg=\"good\"}", 3.0)
        .await;
    let head = asked.lock().unwrap()[0].clone();
    assert_eq!(head.line, "GET /api/auth/session?a=b HTTP/1.1");
    assert_eq!(head.get("host"), Some("t3.example.com"));
    // It is the dispatcher's token, and nobody else's business.
    assert_eq!(head.get("authorization"), None);
}

/// Pings are answered and heartbeats sent while echoes are overdue, and then the leg says why it goes.
#[tokio::test]
async fn a_leg_without_an_echo_stays_awake_and_says_why_it_ends() {
    let (listener, address) = listen().await;
    let prober = Setup::new()
        .set("rtt_timeout", "3s")
        .plain("internal", address)
        .start()
        .await;
    let (mut stream, _) = next_socket(&listener, "").await;
    let begun = Instant::now();
    echo_next(&mut stream).await.unwrap();
    Frame::new(PING, "there?")
        .write(&mut stream, None)
        .await
        .unwrap();
    let mut texts = 0;
    let mut pongs = 0;
    loop {
        let frame = Frame::read(&mut stream).await.unwrap();
        match frame.opcode {
            TEXT => texts += 1,
            PONG => {
                assert_eq!(frame.payload, b"there?");
                assert!(begun.elapsed() < Duration::from_secs(2));
                pongs += 1;
            }
            _ => {
                assert_eq!(frame, closed(4000, "rtt_timeout"));
                break;
            }
        }
    }
    assert!(begun.elapsed() >= Duration::from_secs(3));
    assert_eq!(pongs, 1);
    assert!(texts >= 8, "{texts}");
    // It does not wait for an answer.
    assert_eq!(stream.read(&mut [0; 16]).await.unwrap_or(0), 0);
    prober
        .wait_for(
            "disconnects_total{leg=\"internal\",reason=\"rtt_timeout\"}",
            1.0,
        )
        .await;
    assert_eq!(
        prober.metric("rtt_seconds_count{leg=\"internal\"}").await,
        Some(1.0)
    );
    assert_eq!(
        prober
            .metric("connection_age_seconds_count{leg=\"internal\"}")
            .await,
        Some(1.0)
    );
}

/// Whoever was closed because the dispatcher was replaced comes back at once, everybody else after the wait.
#[tokio::test]
async fn a_replaced_dispatcher_is_called_at_once() {
    let (listener, address) = listen().await;
    let prober = Setup::new()
        .set("reconnect", "5s")
        .set("reconnect_max", "30s")
        .plain("internal", address)
        .start()
        .await;
    let mut gaps = Vec::new();
    for code in [1012, 1000, 1000] {
        let (mut stream, _) = next_socket(&listener, "").await;
        gaps.push(Instant::now());
        let heartbeat = Frame::read(&mut stream).await.unwrap();
        heartbeat.write(&mut stream, None).await.unwrap();
        closed(code, "").write(&mut stream, None).await.unwrap();
    }
    assert!(
        gaps[1] - gaps[0] < Duration::from_millis(4900),
        "{:?}",
        gaps[1] - gaps[0]
    );
    assert!(
        gaps[2] - gaps[1] >= Duration::from_secs(5),
        "{:?}",
        gaps[2] - gaps[1]
    );
    prober
        .wait_for(
            "disconnects_total{leg=\"internal\",reason=\"closed_1012\"}",
            1.0,
        )
        .await;
}

#[tokio::test]
async fn signals_end_it_with_a_goodbye() {
    for signal in [Signal::TERM, Signal::INT, Signal::HUP] {
        let (listener, address) = listen().await;
        let (deaf, deaf_address) = listen().await;
        let mut prober = Setup::new()
            .plain("internal", address)
            .plain("deaf", deaf_address)
            .start()
            .await;
        let (mut stream, _) = next_socket(&listener, "").await;
        let (mut ignored, _) = next_socket(&deaf, "").await;
        for stream in [&mut stream, &mut ignored] {
            echo_next(stream).await.unwrap();
        }
        prober.wait_for_log("leg-up leg=deaf").await;
        let told = Instant::now();
        prober.signal(signal);
        for stream in [&mut stream, &mut ignored] {
            loop {
                let frame = Frame::read(stream).await.unwrap();
                if frame.opcode != TEXT {
                    assert_eq!(frame, Frame::close(1001));
                    break;
                }
            }
        }
        Frame::close(1001).write(&mut stream, None).await.unwrap();
        // One of them never answers.
        assert_eq!(prober.exited().await.code(), Some(0));
        assert!(told.elapsed() < Duration::from_secs(5));
        assert!(prober.logged("leg-down").is_empty());
        drop(ignored);
    }
}

/// Whatever happens to a leg first, there is no series that was not there before.
#[tokio::test]
async fn every_series_is_there_from_the_start() {
    let (listener, address) = listen().await;
    let prober = Setup::new()
        .plain("internal", address)
        .leg("t3serve", "http", format!("http://{address}/"), "system")
        .start()
        .await;
    let metrics = prober.metrics().await;
    for leg in ["internal", "t3serve"] {
        for series in [
            format!("connected{{leg=\"{leg}\"}} 0"),
            format!("rtt_seconds_count{{leg=\"{leg}\"}} 0"),
            format!("connection_age_seconds_count{{leg=\"{leg}\"}} 0"),
            format!("last_disconnect_timestamp{{leg=\"{leg}\"}} 0"),
        ] {
            assert!(
                metrics.contains(&format!("t3probe_{series}\n")),
                "{series}\n{metrics}"
            );
        }
        for bucket in [
            "0.05", "0.1", "0.25", "0.5", "1", "2.5", "5", "10", "20", "+Inf",
        ] {
            let series = format!("t3probe_rtt_seconds_bucket{{leg=\"{leg}\",le=\"{bucket}\"}} 0\n");
            assert!(metrics.contains(&series), "{series}");
        }
        for reason in [
            "connect_failed",
            "connect_timeout",
            "dns_failed",
            "tls_failed",
            "rtt_timeout",
            "io_error",
            "closed_1000",
            "closed_1001",
            "closed_1005",
            "closed_1006",
            "closed_1011",
            "closed_1012",
            "http_401",
            "http_403",
            "http_404",
            "http_429",
            "http_500",
            "http_502",
            "http_503",
            "http_504",
        ] {
            let series =
                format!("t3probe_disconnects_total{{leg=\"{leg}\",reason=\"{reason}\"}} 0\n");
            assert!(metrics.contains(&series), "{series}");
        }
    }
    let guide = include_str!("../../docs/probe.md");
    let kinds: Vec<&str> = metrics
        .lines()
        .filter_map(|line| line.strip_prefix("# TYPE ")?.split(' ').next())
        .collect();
    assert_eq!(kinds.len(), 5, "{kinds:?}");
    for kind in kinds {
        assert!(
            guide.contains(&format!("| `{kind}`")),
            "docs/probe.md lacks {kind}"
        );
    }
    drop(listener);
}

/// The listener for metrics is not put out by anybody.
#[tokio::test]
async fn the_metrics_listener_copes() {
    let (_listener, address) = listen().await;
    let prober = Setup::new().plain("internal", address).start().await;
    let mut held = Vec::new();
    for bytes in [
        &b""[..],
        b"GET /met",
        b"\x16\x03\x01\x02\x00garbage",
        b"\r\n\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
    ] {
        for _ in 0..30 {
            let mut stream = TcpStream::connect(prober.admin).await.unwrap();
            stream.write_all(bytes).await.unwrap();
            held.push(stream);
        }
    }
    let mut long = TcpStream::connect(prober.admin).await.unwrap();
    let endless = format!("GET /metrics HTTP/1.1\r\nX: {}", "x".repeat(100_000));
    let _ = long.write_all(endless.as_bytes()).await;
    wait_for("answer in spite of all", async || {
        http::request(prober.admin, "GET", "/healthz", &[], b"")
            .await
            .is_ok_and(|reply| reply.status == 200)
    })
    .await;
    for (method, path, status) in [
        ("GET", "/metrics?x=y", 200),
        ("HEAD", "/metrics", 200),
        ("GET", "/", 404),
        ("POST", "/metrics", 405),
    ] {
        let reply = http::request(prober.admin, method, path, &[], b"")
            .await
            .unwrap();
        assert_eq!(reply.status, status, "{method} {path}");
    }
    // The slow ones are sent away.
    for mut stream in held {
        let _ = timeout(Duration::from_secs(20), stream.read_to_end(&mut Vec::new()))
            .await
            .unwrap();
    }
}

#[tokio::test]
async fn a_listener_that_is_taken_is_told() {
    let (_listener, address) = listen().await;
    let setup = Setup::new()
        .plain("internal", address)
        .set("listen", address.to_string());
    let file = setup.write();
    let output = program().args(["probe", "-c"]).arg(&file).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(
        said.contains(&format!("probe.listen: cannot listen on {address}")),
        "{said}"
    );
}

/// A server that never stops talking cannot keep a leg up without an echo.
#[tokio::test]
async fn a_flood_is_no_echo() {
    let (listener, address) = listen().await;
    let prober = Setup::new().plain("internal", address).start().await;
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = next_socket(&listener, "").await;
            while Frame::text("hello").write(&mut stream, None).await.is_ok() {}
        }
    });
    prober
        .wait_for(
            "disconnects_total{leg=\"internal\",reason=\"io_error\"}",
            2.0,
        )
        .await;
    assert_eq!(
        prober.metric("connected{leg=\"internal\"}").await,
        Some(0.0)
    );
}

/// At a terminal: the legs in place, log lines above them, and the terminal given back.
#[test]
fn a_live_view_at_a_terminal() {
    use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
    use std::io::Read;

    let ours = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
    grantpt(&ours).unwrap();
    unlockpt(&ours).unwrap();
    let name = ptsname(&ours, Vec::new()).unwrap().into_string().unwrap();
    let theirs = std::fs::File::options()
        .read(true)
        .write(true)
        .open(name)
        .unwrap();
    let nobody = std::net::SocketAddr::from((own_address(), 1));
    let setup = Setup::new().plain("internal", nobody);
    let mut child = program()
        .args(["probe", "-c"])
        .arg(setup.write())
        .env("TERM", "xterm")
        .env_remove("NO_COLOR")
        .stdout(theirs.try_clone().unwrap())
        .stderr(theirs.try_clone().unwrap())
        .spawn()
        .unwrap();
    drop(theirs);
    let mut seen = String::new();
    let mut ours = std::fs::File::from(ours);
    let mut told = false;
    let mut bytes = [0; 4096];
    // The end of a terminal whose other side is closed is an error.
    while let Ok(length @ 1..) = ours.read(&mut bytes) {
        seen += &String::from_utf8_lossy(&bytes[..length]);
        if !told && seen.matches("LAST REASON").count() >= 3 {
            told = true;
            let pid = rustix::process::Pid::from_child(&child);
            rustix::process::kill_process(pid, Signal::INT).unwrap();
        }
    }
    assert_eq!(child.wait().unwrap().code(), Some(0));
    // The view of two lines was drawn over itself.
    assert!(seen.contains("\x1b[2A\r\x1b[J"), "{seen:?}");
    assert!(seen.contains("internal"), "{seen:?}");
    assert!(seen.contains("0  connect_failed"), "{seen:?}");
    let line = seen.find("leg-down leg=internal reason=connect_failed");
    assert!(
        line.unwrap() < seen.rfind("LAST REASON").unwrap(),
        "{seen:?}"
    );
    let end = seen.rfind("\x1b[?7h\x1b[?25h").unwrap();
    assert!(seen[end..].contains(" INFO ended"), "{seen:?}");
}
