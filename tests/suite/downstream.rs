//! Clients' connections: how many, how long, and how large a head may be; and Unix sockets to listen on.

use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream, UnixStream};

use crate::common::dispatcher::{Setup, wait_for};
use crate::common::frames::Frame;
use crate::common::http::{self, Client};
use crate::common::raw::{MASK, RawInstance, say};
use crate::common::successor::Successor;
use crate::world::{World, from};

/// So many sockets are more than the usual soft limit of 1024.
fn use_all_descriptors() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    let all = Rlimit {
        current: maximum,
        maximum,
    };
    setrlimit(Resource::Nofile, all).unwrap();
}

/// Everything that comes until the other side closes, which it does within `limit`.
async fn until_closed(stream: &mut TcpStream, limit: Duration) -> String {
    let mut bytes = Vec::new();
    let read = stream.read_to_end(&mut bytes);
    let _ = tokio::time::timeout(limit, read)
        .await
        .expect("the connection is closed in time");
    String::from_utf8_lossy(&bytes).into_owned()
}

async fn connect_from(ip: Ipv4Addr, to: SocketAddr) -> TcpStream {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind((ip, 0).into()).unwrap();
    socket.connect(to).await.unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_thousand_slow_heads_are_ended_and_disturb_nobody() {
    use_all_descriptors();
    let world = World::new().await;
    let address = world.dispatcher.address();
    let slow: Vec<_> = (0..2000)
        .map(|_| {
            tokio::spawn(async move {
                let mut stream = TcpStream::connect(address).await.unwrap();
                let started = Instant::now();
                let mut said = Vec::new();
                // A byte a second. What is left behind by the other side tells that it has closed.
                let head = "GET / HTTP/1.1\r\nX: "
                    .bytes()
                    .chain(std::iter::repeat(b'y'));
                for byte in head {
                    if stream.write_all(&[byte]).await.is_err() {
                        break;
                    }
                    let mut bytes = [0; 1024];
                    let pause = Duration::from_secs(1);
                    match tokio::time::timeout(pause, stream.read(&mut bytes)).await {
                        Err(_) => {}
                        Ok(Ok(length)) if length > 0 => said.extend_from_slice(&bytes[..length]),
                        Ok(_) => break,
                    }
                    assert!(started.elapsed() < Duration::from_secs(60), "never ended");
                }
                (
                    started.elapsed(),
                    String::from_utf8_lossy(&said).into_owned(),
                )
            })
        })
        .collect();
    // Alice works on, on connections that are there and on new ones.
    let session = world.alice.new_session();
    let mut kept = Client::connect(address).await.unwrap();
    while !slow.iter().all(tokio::task::JoinHandle::is_finished) {
        let headers = from("alice", &session);
        let reply = kept.request("GET", "/", &headers, b"").await.unwrap();
        assert_eq!(reply.status, 200);
        let reply = http::request(address, "GET", "/", &headers, b"")
            .await
            .unwrap();
        assert_eq!(reply.status, 200);
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    for one in slow {
        let (took, said) = one.await.unwrap();
        assert!(took >= Duration::from_secs(14), "ended after {took:?}");
        assert!(said.starts_with("HTTP/1.1 408 "), "{said:?}");
        assert!(
            said.contains("X-T3-Dispatch-Error: head-too-slow"),
            "{said:?}"
        );
    }
    let refused = r#"t3dispatch_connections_refused_total{code="head-too-slow"}"#;
    assert_eq!(world.dispatcher.metric(refused).await, 2000.0);
    drop(kept);
    wait_for("no open connection", async || {
        world.dispatcher.metric("t3dispatch_connections_open").await == 0.0
    })
    .await;
}

#[tokio::test]
async fn a_connection_on_which_nothing_is_said_is_closed_without_a_word() {
    let world = World::new().await;
    let mut stream = TcpStream::connect(world.dispatcher.address())
        .await
        .unwrap();
    assert_eq!(until_closed(&mut stream, Duration::from_secs(40)).await, "");
}

#[tokio::test]
async fn a_kept_connection_may_be_silent_for_75_seconds() {
    let world = World::new().await;
    let session = world.alice.new_session();
    let mut client = Client::connect(world.dispatcher.address()).await.unwrap();
    let headers = from("alice", &session);
    // Longer than a head may take, and in all longer than either limit.
    for pause in [0, 20, 65] {
        tokio::time::sleep(Duration::from_secs(pause)).await;
        let reply = client.request("GET", "/", &headers, b"").await.unwrap();
        assert_eq!(reply.status, 200, "after {pause} s");
    }
    assert_eq!(
        until_closed(&mut client.stream, Duration::from_secs(90)).await,
        ""
    );
}

#[tokio::test]
async fn a_large_head_is_refused_however_large() {
    let world = World::new().await;
    let session = world.alice.new_session();
    let identity =
        format!("X-authentik-username: alice\r\nCookie: {session}\r\nHost: t3.example.com\r\n");
    let lines = |count: usize| "X: y\r\n".repeat(count);
    let bytes = |count: usize| format!("X: {}\r\n", "y".repeat(count));
    // An instance takes no more than 16 KiB.
    for (path, more) in [
        ("/", lines(128 - 3)),
        ("/", bytes(12 * 1024)),
        ("/healthz", bytes(63 * 1024)),
    ] {
        let mut client = Client::connect(world.dispatcher.address()).await.unwrap();
        let head = format!("GET {path} HTTP/1.1\r\n{identity}{more}\r\n");
        client.send(head).await.unwrap();
        assert_eq!(client.read_reply("GET").await.unwrap().status, 200);
    }
    let before = world.alice.seen().len();
    for (more, what) in [
        (lines(129 - 3), "129 lines"),
        (lines(300), "300 lines"),
        (lines(5000), "5000 lines"),
        (bytes(64 * 1024), "64 KiB"),
        (bytes(512 * 1024), "512 KiB"),
        (bytes(8 * 1024 * 1024), "8 MiB"),
        (lines(100) + &bytes(2 * 1024 * 1024), "lines, then bytes"),
    ] {
        for kept in [false, true] {
            let mut client = Client::connect(world.dispatcher.address()).await.unwrap();
            if kept {
                let reply = client.request("GET", "/healthz", &[], b"").await.unwrap();
                assert_eq!(reply.status, 200);
            }
            // The answer comes before the head has been written, so that writing it fails in the end.
            let head = format!("GET / HTTP/1.1\r\n{identity}{more}\r\n");
            let _ = client.send(head).await;
            let said = until_closed(&mut client.stream, Duration::from_secs(10)).await;
            assert!(
                said.starts_with("HTTP/1.1 431 "),
                "{what}, kept {kept}: {said:?}"
            );
            assert!(said.contains("head-too-large"), "{what}: {said:?}");
        }
    }
    assert_eq!(world.alice.seen().len(), before);
}

/// The head of a request of alice's, with more lines.
fn head(start: &str, session: &str, more: &str) -> String {
    format!(
        "{start} HTTP/1.1\r\nHost: t3.example.com\r\nX-authentik-username: alice\r\nCookie: {session}\r\n{more}\r\n"
    )
}

/// Heads that come together are read one by one: none is refused for how it was cut up, and none hides behind another.
#[tokio::test]
async fn pipelined_heads_are_held_to_the_same_rules() {
    let world = World::new().await;
    let session = world.alice.new_session();
    let head = |path: &str, more: &str| head(&format!("GET {path}"), &session, more);
    // Lengths at which a head begins in one read and ends in another.
    for length in [200, 600, 1500, 7000] {
        let mut client = Client::connect(world.dispatcher.address()).await.unwrap();
        let words = format!("X: {}\r\n", "k=v; ".repeat(length / 5));
        client.send(head("/", &words).repeat(40)).await.unwrap();
        for number in 0..40 {
            let reply = client.read_reply("GET").await.unwrap();
            assert_eq!(reply.status, 200, "{length}, {number}: {}", reply.text());
        }
    }
    let before = world.alice.seen().len();
    for (second, status) in [
        (head("/x y", ""), 400),
        (head("/\x0b", ""), 400),
        (head("/\0", ""), 400),
        (head("/x", &"X: y\r\n".repeat(200)), 431),
        (head("/x", &format!("X: {}\r\n", "y".repeat(70_000))), 431),
    ] {
        let mut client = Client::connect(world.dispatcher.address()).await.unwrap();
        let _ = client.send(head("/", "") + &second).await;
        assert_eq!(client.read_reply("GET").await.unwrap().status, 200);
        assert_eq!(client.read_reply("GET").await.unwrap().status, status);
        until_closed(&mut client.stream, Duration::from_secs(10)).await;
    }
    assert_eq!(world.alice.seen().len(), before + 5);
    // Its beginning came with another head, and the rest never does.
    let mut client = Client::connect(world.dispatcher.address()).await.unwrap();
    let half = head("/", "") + "GET / HTTP/1.1\r\nHo";
    client.send(half).await.unwrap();
    assert_eq!(client.read_reply("GET").await.unwrap().status, 200);
    let said = until_closed(&mut client.stream, Duration::from_secs(40)).await;
    assert!(said.starts_with("HTTP/1.1 408 "), "{said:?}");
    // An empty line behind a request begins nothing.
    let mut client = Client::connect(world.dispatcher.address()).await.unwrap();
    client.send(head("/", "") + "\r\n").await.unwrap();
    assert_eq!(client.read_reply("GET").await.unwrap().status, 200);
    tokio::time::sleep(Duration::from_secs(20)).await;
    client.send(head("/", "")).await.unwrap();
    assert_eq!(client.read_reply("GET").await.unwrap().status, 200);
}

/// A request that comes with the body of another is read from its first byte, wherever it is cut.
#[tokio::test]
async fn a_request_behind_a_body_is_read_as_any_other() {
    let world = World::new().await;
    let session = world.alice.new_session();
    let head = |start: &str, more: &str| head(start, &session, more);
    let upload = head("POST /__test/echo", "Content-Length: 5\r\n") + "hello";
    let next = head("GET /", "X: a b c d e f\r\n");
    // The first ends within its body, with it, within the next head, and with that.
    let cuts = (upload.len() - 3..upload.len() + next.len()).step_by(3);
    let sent = upload.clone() + &next;
    for cut in cuts.chain([sent.len()]) {
        let mut client = Client::connect(world.dispatcher.address()).await.unwrap();
        for part in [&sent[..cut], &sent[cut..]] {
            client.send(part).await.unwrap();
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        for method in ["POST", "GET"] {
            let reply = client.read_reply(method).await.unwrap();
            assert_eq!(reply.status, 200, "{cut}, {method}: {}", reply.text());
        }
    }
    let many = head("GET /", &"X: y\r\n".repeat(200));
    for (second, status) in [(many, 431), (head("GET /x y", ""), 400)] {
        let mut client = Client::connect(world.dispatcher.address()).await.unwrap();
        client.send(upload.clone() + &second).await.unwrap();
        assert_eq!(client.read_reply("POST").await.unwrap().status, 200);
        assert_eq!(client.read_reply("GET").await.unwrap().status, status);
        until_closed(&mut client.stream, Duration::from_secs(10)).await;
    }
}

/// A client must not, but some send with their handshake what is for the tunnel: it gets there.
#[tokio::test]
async fn what_comes_with_a_handshake_waits_for_the_tunnel() {
    let mut instance = RawInstance::start().await;
    let base = tempfile::TempDir::new().unwrap();
    let setup = Setup::new(base.path(), crate::common::mint::working(base.path()));
    let dispatcher = setup.user("alice", "alice", instance.port).start().await;
    let mut client = Client::connect(dispatcher.address()).await.unwrap();
    let handshake = "GET /ws HTTP/1.1\r\nHost: t3.example.com\r\nX-authentik-username: alice\r\nCookie: t3_session=x\r\n\
         Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n\
         Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n";
    let mut early = Vec::new();
    Frame::text("early").write(&mut early, MASK).await.unwrap();
    client
        .send([handshake.as_bytes(), &early].concat())
        .await
        .unwrap();
    assert_eq!(client.read_head().await.unwrap().0, 101);
    let mut instance = instance.next().await;
    assert_eq!(
        Frame::read(&mut instance).await.unwrap(),
        Frame::text("early")
    );
    say(&mut client.stream, &mut instance, "later", MASK).await;
}

#[tokio::test]
async fn the_operators_listener_takes_no_connection_from_people() {
    let world = World::with(|setup| setup.set("max_connections", 8)).await;
    let mut held = Vec::new();
    for _ in 0..64 {
        let mut client = Client::connect(world.dispatcher.admin()).await.unwrap();
        let reply = client.request("GET", "/healthz", &[], b"").await.unwrap();
        assert_eq!(reply.status, 200);
        held.push(client);
    }
    let mut more = TcpStream::connect(world.dispatcher.admin()).await.unwrap();
    let said = until_closed(&mut more, Duration::from_secs(10)).await;
    assert!(said.starts_with("HTTP/1.1 503 "), "{said:?}");
    let reply = http::request(world.dispatcher.address(), "GET", "/healthz", &[], b"").await;
    assert_eq!(reply.unwrap().status, 200);
}

#[tokio::test]
async fn connections_have_their_number() {
    let world = World::with(|setup| setup.set("max_connections", 8)).await;
    let address = world.dispatcher.address();
    let mut held = Vec::new();
    for _ in 0..8 {
        let mut client = Client::connect(address).await.unwrap();
        let reply = client.request("GET", "/healthz", &[], b"").await.unwrap();
        assert_eq!(reply.status, 200);
        held.push(client);
    }
    let mut ninth = TcpStream::connect(address).await.unwrap();
    let said = until_closed(&mut ninth, Duration::from_secs(10)).await;
    assert!(said.starts_with("HTTP/1.1 503 "), "{said:?}");
    assert!(
        said.contains("X-T3-Dispatch-Error: too-many-connections"),
        "{said:?}"
    );
    assert!(said.contains("Retry-After: 5"), "{said:?}");
    assert_eq!(world.dispatcher.logged(" full connections=8").len(), 1);
    held.pop();
    wait_for("a place", async || {
        http::request(address, "GET", "/healthz", &[], b"")
            .await
            .is_ok_and(|reply| reply.status == 200)
    })
    .await;
}

#[tokio::test]
async fn an_address_that_may_not_name_people_has_few_connections() {
    let edge = Ipv4Addr::new(127, 0, 0, 1);
    let mallory = Ipv4Addr::new(127, 9, 9, 9);
    let world = World::with(|setup| {
        setup
            .set("identity.trusted_proxies", json!([format!("{edge}/32")]))
            .set("max_connections_per_address", 3)
    })
    .await;
    let address = world.dispatcher.address();
    let ask = async |from: Ipv4Addr| {
        let mut stream = connect_from(from, address).await;
        stream
            .write_all(b"GET /healthz HTTP/1.1\r\nHost: t3.example.com\r\n\r\n")
            .await
            .unwrap();
        let mut start = [0; 12];
        stream.read_exact(&mut start).await.unwrap();
        (stream, String::from_utf8_lossy(&start).into_owned())
    };
    let mut held = Vec::new();
    for _ in 0..3 {
        let (stream, status) = ask(mallory).await;
        assert_eq!(status, "HTTP/1.1 200");
        held.push(stream);
    }
    assert_eq!(ask(mallory).await.1, "HTTP/1.1 503");
    // Neither another address nor the edge feels anything of it.
    assert_eq!(ask(Ipv4Addr::new(127, 9, 9, 8)).await.1, "HTTP/1.1 200");
    for _ in 0..10 {
        let (stream, status) = ask(edge).await;
        assert_eq!(status, "HTTP/1.1 200");
        held.push(stream);
    }
}

/// The status of an answer over a Unix socket.
async fn ask_over(socket: &Path, head: &str) -> std::io::Result<String> {
    let mut stream = UnixStream::connect(socket).await?;
    stream.write_all(head.as_bytes()).await?;
    let mut start = vec![0; 12];
    stream.read_exact(&mut start).await?;
    Ok(String::from_utf8_lossy(&start).into_owned())
}

#[tokio::test]
async fn an_edge_on_the_same_machine_may_come_over_a_socket() {
    let mut socket = std::path::PathBuf::new();
    let world = World::with(|mut setup| {
        socket = setup.base.join("http.sock");
        // What a process that was killed has left is no obstacle.
        drop(std::os::unix::net::UnixListener::bind(&socket).unwrap());
        let tcp = setup.dispatch["listen"][0].clone();
        setup = setup.set("listen", json!([tcp, format!("unix:{}", socket.display())]));
        setup
            .set("listen_mode", "0620")
            .set("listen_group", "daemon")
    })
    .await;
    let file = std::fs::metadata(&socket).unwrap();
    assert!(file.file_type().is_socket());
    assert_eq!(file.permissions().mode() & 0o777, 0o620);
    let daemon = nix_group("daemon");
    assert_eq!(file.gid(), daemon);

    let session = world.alice.new_session();
    let head = format!(
        "GET /over-a-socket HTTP/1.1\r\nHost: t3.example.com\r\nX-authentik-username: alice\r\nCookie: {session}\r\n\
         X-Forwarded-For: 198.51.100.7\r\n\r\n"
    );
    assert_eq!(ask_over(&socket, &head).await.unwrap(), "HTTP/1.1 200");
    let seen = world.alice.seen_at("/over-a-socket");
    assert_eq!(seen[0].head.get("x-forwarded-for"), Some("198.51.100.7"));
    let nobody = "GET / HTTP/1.1\r\nHost: t3.example.com\r\n\r\n";
    assert_eq!(ask_over(&socket, nobody).await.unwrap(), "HTTP/1.1 403");

    // It is handed over like any other: nobody is ever turned away.
    let before = std::fs::metadata(&socket).unwrap().ino();
    let conf = world.dispatcher.base.join("t3-dispatch.yaml");
    let handover = wait_for("the handover", async || {
        assert_eq!(ask_over(&socket, &head).await.unwrap(), "HTTP/1.1 200");
        !world.dispatcher.logged(" replaced by=").is_empty()
    });
    let (_successor, ()) = tokio::join!(Successor::of(&conf), handover);
    assert_eq!(ask_over(&socket, &head).await.unwrap(), "HTTP/1.1 200");
    let file = std::fs::metadata(&socket).unwrap();
    assert_eq!(
        (file.ino(), file.gid(), file.permissions().mode() & 0o777),
        (before, daemon, 0o620)
    );
}

/// A group's number, from the system's own list.
fn nix_group(name: &str) -> u32 {
    let text = std::fs::read_to_string("/etc/group").unwrap();
    let line = text
        .lines()
        .find(|line| line.split(':').next() == Some(name))
        .unwrap();
    line.split(':').nth(2).unwrap().parse().unwrap()
}
