//! Every WebSocket that ended is accounted for: exactly one record, with the right cause and first ender.

use serde_json::{Value, json};
use std::time::Duration;
use tempfile::TempDir;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;

use rustix::process::Signal;

use crate::common::dispatcher::{Dispatcher, Setup, wait_for};
use crate::common::frames::{self, Frame};
use crate::common::http;
use crate::common::mint;
use crate::common::raw::{self, MASK, RawInstance, ask, open, reset, rest, say};

/// A dispatcher in front of an instance that the test drives.
pub struct Place {
    pub dispatcher: Dispatcher,
    pub instance: RawInstance,
    _base: TempDir,
}

impl Place {
    pub async fn new() -> Place {
        Place::with(|setup| setup).await
    }

    pub async fn with(change: impl FnOnce(Setup) -> Setup) -> Place {
        let base = TempDir::new().unwrap();
        let instance = RawInstance::start().await;
        let setup = Setup::new(base.path(), mint::working(base.path()))
            .user("alice", "alice", instance.port)
            .user("bob", "alice", instance.port);
        Place {
            dispatcher: change(setup).start().await,
            instance,
            _base: base,
        }
    }

    /// Both ends of an open WebSocket of `user`'s.
    pub async fn tunnel(&mut self, user: &str) -> (TcpStream, TcpStream) {
        let client = open(self.dispatcher.address(), user).await;
        (client, self.instance.next().await)
    }

    fn table(&self, users: &[&str]) {
        let entry = json!({ "os_user": "alice", "port": self.instance.port });
        let table: serde_json::Map<_, _> = users
            .iter()
            .map(|user| ((*user).to_owned(), entry.clone()))
            .collect();
        self.dispatcher.write_table(&Value::Object(table));
    }
}

/// One row of the close matrix: what `side` does, and what the record must say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    CloseThenFin,
    CloseAlone,
    Fin,
    Rst,
    HalfFrameThenFin,
    HalfFrameThenRst,
    FinWithDataInFlight,
    RstWithDataInFlight,
}

async fn end(how: End, mut near: TcpStream, mut far: TcpStream, mask: Option<[u8; 4]>) {
    match how {
        End::CloseThenFin => {
            Frame::close(1000).write(&mut near, mask).await.unwrap();
            near.shutdown().await.unwrap();
            rest(&mut far).await;
        }
        End::CloseAlone => {
            Frame::close(4001).write(&mut near, mask).await.unwrap();
            assert_eq!(Frame::read(&mut far).await.unwrap(), Frame::close(4001));
            // The other side answers, and is the one whose connection ends first.
            let answer = if mask.is_some() { None } else { MASK };
            Frame::close(4001).write(&mut far, answer).await.unwrap();
            drop(far);
            rest(&mut near).await;
        }
        // The far side goes only when it is told: who went first must not be a race.
        End::Fin => {
            near.shutdown().await.unwrap();
            rest(&mut far).await;
        }
        End::Rst => {
            reset(near);
            rest(&mut far).await;
        }
        End::HalfFrameThenFin | End::HalfFrameThenRst => {
            let frame = Frame::new(frames::BINARY, vec![1; 1000]).encode(mask);
            raw::write(&mut near, &frame[..500]).await;
            let mut start = vec![0; 500];
            tokio::io::AsyncReadExt::read_exact(&mut far, &mut start)
                .await
                .unwrap();
            if how == End::HalfFrameThenFin {
                near.shutdown().await.unwrap()
            } else {
                reset(near)
            }
            rest(&mut far).await;
        }
        End::FinWithDataInFlight | End::RstWithDataInFlight => {
            let other = if mask.is_some() { None } else { MASK };
            for _ in 0..20 {
                Frame::new(frames::BINARY, vec![1; 10_000])
                    .write(&mut near, mask)
                    .await
                    .unwrap();
                Frame::new(frames::BINARY, vec![2; 10_000])
                    .write(&mut far, other)
                    .await
                    .unwrap();
            }
            if how == End::FinWithDataInFlight {
                near.shutdown().await.unwrap()
            } else {
                reset(near)
            }
            rest(&mut far).await;
        }
    }
}

#[tokio::test]
async fn the_close_matrix() {
    let mut place = Place::new().await;
    let mut expected = Vec::new();
    for side in ["client", "instance"] {
        for how in [
            End::CloseThenFin,
            End::CloseAlone,
            End::Fin,
            End::Rst,
            End::HalfFrameThenFin,
            End::HalfFrameThenRst,
            End::FinWithDataInFlight,
            End::RstWithDataInFlight,
        ] {
            let (mut client, mut instance) = place.tunnel("alice").await;
            say(&mut client, &mut instance, "hello", MASK).await;
            say(&mut instance, &mut client, "welcome", None).await;
            match side {
                "client" => end(how, client, instance, MASK).await,
                _ => end(how, instance, client, None).await,
            }
            expected.push((side, how));
            let record = place
                .dispatcher
                .wait_for_records(expected.len())
                .await
                .pop()
                .unwrap();
            let gone = if side == "client" {
                "downstream_closed"
            } else {
                "upstream_closed"
            };
            let (cause, sign, code, half) = match how {
                End::CloseThenFin => ("graceful", "close", json!(1000), false),
                End::CloseAlone => ("graceful", "close", json!(4001), false),
                End::Fin | End::FinWithDataInFlight => (gone, "fin", Value::Null, false),
                End::Rst | End::RstWithDataInFlight => (gone, "rst", Value::Null, false),
                End::HalfFrameThenFin => (gone, "fin", Value::Null, true),
                End::HalfFrameThenRst => (gone, "rst", Value::Null, true),
            };
            let told = [
                &record["cause"],
                &record["ended_by"],
                &record["how"],
                &record["code"],
                &record["opened"],
            ];
            assert_eq!(
                told,
                [
                    &json!(cause),
                    &json!(side),
                    &json!(sign),
                    &code,
                    &json!(true)
                ],
                "{side} {how:?} {record:#}"
            );
            if half {
                assert_eq!(record[side]["mid_frame"], true, "{side} {how:?}");
            }
            assert!(record["client"]["messages"].as_u64().unwrap() >= 1);
            assert!(record["instance"]["messages"].as_u64().unwrap() >= 1);
        }
    }
    // One record each, also when the process ends, and the numbers agree.
    let count = expected.len();
    assert_eq!(
        place
            .dispatcher
            .logged("ws open user=alice ip=127.0.0.1 id=")
            .len(),
        count
    );
    assert_eq!(
        place
            .dispatcher
            .logged("ws close user=alice ip=127.0.0.1 id=")
            .len(),
        count
    );
    assert_eq!(
        place
            .dispatcher
            .metric("t3dispatch_tunnels_opened_total")
            .await,
        count as f64
    );
    assert_eq!(
        place.dispatcher.metric("t3dispatch_tunnels_open").await,
        0.0
    );
    for (cause, number) in [
        ("graceful", 4.0),
        ("downstream_closed", 6.0),
        ("upstream_closed", 6.0),
    ] {
        let series = format!("t3dispatch_tunnel_closes_total{{cause=\"{cause}\"}}");
        assert_eq!(place.dispatcher.metric(&series).await, number, "{cause}");
    }
    place.dispatcher.signal(Signal::TERM);
    place.dispatcher.exited().await;
    assert_eq!(place.dispatcher.records().len(), count);
}

#[tokio::test]
async fn the_record_says_what_there_is_to_say() {
    let mut place = Place::with(|setup| setup.set("tunnels.per_user_metrics", true)).await;
    let headers = [
        ("X-Forwarded-For", "203.0.113.9, 10.0.0.7"),
        ("X-Request-Id", "req-42"),
    ];
    let (status, client) = ask(place.dispatcher.address(), "alice", &headers).await;
    assert_eq!(status, 101);
    let (mut client, mut instance) = (client.stream, place.instance.next().await);
    say(&mut client, &mut instance, "one", MASK).await;
    say(&mut instance, &mut client, "answer", None).await;
    say(&mut client, &mut instance, "two", MASK).await;
    say(&mut client, &mut instance, "three", MASK).await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    instance.shutdown().await.unwrap();
    rest(&mut client).await;
    let record = place.dispatcher.wait_for_records(1).await.pop().unwrap();
    assert_eq!(
        (&record["user"], &record["os_user"], &record["port"]),
        (
            &json!("alice"),
            &json!("alice"),
            &json!(place.instance.port)
        )
    );
    assert_eq!(
        (&record["ip"], &record["id"]),
        (&json!("203.0.113.9"), &json!("req-42"))
    );
    assert_eq!(
        record["chain"],
        json!(["203.0.113.9", "10.0.0.7", "127.0.0.1"])
    );
    assert_eq!(
        (
            &record["client"]["messages"],
            &record["instance"]["messages"]
        ),
        (&json!(3), &json!(1))
    );
    assert_eq!(
        (&record["client"]["bytes"], &record["instance"]["bytes"]),
        (&json!(6 * 3 + 11), &json!(2 + 6))
    );
    let at_least =
        |value: &Value, least: u64| assert!(value.as_u64().unwrap() >= least, "{record:#}");
    at_least(&record["dur_ms"], 300);
    at_least(&record["client"]["silence_ms"], 300);
    at_least(&record["instance"]["longest_silence_ms"], 300);
    // Two messages have waited since the last answer: the older one counts.
    at_least(&record["unanswered_ms"], 300);
    let age = humantime::parse_rfc3339(record["time"].as_str().unwrap())
        .unwrap()
        .elapsed()
        .unwrap();
    assert!(age < Duration::from_secs(20));
    let line = place.dispatcher.logged("ws close").pop().unwrap();
    assert!(
        line.contains("ws close user=alice ip=203.0.113.9 id=req-42 dur_ms="),
        "{line}"
    );
    assert!(
        line.contains(" cause=upstream_closed ended_by=instance how=fin "),
        "{line}"
    );
    let series = "t3dispatch_user_tunnel_closes_total{cause=\"upstream_closed\",user=\"alice\"}";
    assert_eq!(place.dispatcher.metric(series).await, 1.0);
    assert_eq!(
        place
            .dispatcher
            .metric("t3dispatch_tunnel_messages_total{from=\"client\"}")
            .await,
        3.0
    );
    assert_eq!(
        place
            .dispatcher
            .metric("t3dispatch_tunnel_bytes_total{from=\"instance\"}")
            .await,
        8.0
    );
    assert_eq!(
        place
            .dispatcher
            .metric("t3dispatch_tunnel_duration_seconds_count")
            .await,
        1.0
    );
}

#[tokio::test]
async fn a_tunnel_that_the_instance_refuses_leaves_a_record() {
    let world = crate::world::World::new().await;
    let session = world.alice.new_session();
    assert_eq!(
        world
            .dispatcher
            .get("alice", "/", &[("Cookie", &session)])
            .await
            .status,
        200
    );
    world.alice.forget_sessions();
    let (status, _client) = ask(world.dispatcher.address(), "alice", &[("Cookie", &session)]).await;
    assert_eq!(status, 401);
    let crate::world::World {
        dispatcher, alice, ..
    } = world;
    alice.kill().await;
    let (status, _client) = ask(dispatcher.address(), "alice", &[("Cookie", &session)]).await;
    assert_eq!(status, 502);
    for record in dispatcher.wait_for_records(2).await {
        let told = [
            &record["cause"],
            &record["ended_by"],
            &record["how"],
            &record["opened"],
        ];
        assert_eq!(
            told,
            [
                &json!("upstream_closed"),
                &json!("instance"),
                &json!("refused"),
                &json!(false)
            ],
            "{record:#}"
        );
    }
    assert_eq!(
        dispatcher.metric("t3dispatch_tunnels_opened_total").await,
        0.0
    );
    assert_eq!(dispatcher.metric("t3dispatch_tunnels_open").await, 0.0);
}

/// An answer to a handshake may go on and on: the record is written when it is clear that there will be no tunnel.
#[tokio::test]
async fn a_refusal_without_an_end_is_recorded_at_once() {
    let endless = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n";
    let (port, _asked) = raw::canned(endless.into(), true).await;
    let base = TempDir::new().unwrap();
    let setup = Setup::new(base.path(), mint::working(base.path()));
    let setup = setup.user("alice", "alice", port);
    let dispatcher = setup.set("session.check_timeout", "200ms").start().await;
    let (status, client) = ask(dispatcher.address(), "alice", &[]).await;
    assert_eq!(status, 200);
    let record = dispatcher.wait_for_records(1).await.pop().unwrap();
    assert_eq!(
        (&record["how"], &record["opened"]),
        (&json!("refused"), &json!(false))
    );
    drop(client);
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert_eq!(dispatcher.records().len(), 1);
}

/// A head has room for thousands of addresses, and the ledger is everybody's.
#[tokio::test]
async fn a_made_up_chain_is_not_recorded_whole() {
    let mut place = Place::new().await;
    let made_up = "::1,".repeat(10_000);
    let chain = format!("{made_up} 203.0.113.9");
    let headers = [("X-Forwarded-For", chain.as_str())];
    let (status, client) = ask(place.dispatcher.address(), "alice", &headers).await;
    assert_eq!(status, 101);
    drop((client, place.instance.next().await));
    let record = place.dispatcher.wait_for_records(1).await.pop().unwrap();
    let told = record["chain"].as_array().unwrap();
    assert_eq!(told.len(), 17);
    assert_eq!(told[15..], [json!("203.0.113.9"), json!("127.0.0.1")]);
}

/// Access ends when the table says so; everybody else's tunnels stay.
#[tokio::test]
async fn a_person_removed_loses_their_tunnels() {
    let mut place = Place::new().await;
    let (mut alice, mut alices) = place.tunnel("alice").await;
    let (mut bob, mut bobs) = place.tunnel("bob").await;
    say(&mut alice, &mut alices, "hello", MASK).await;
    let start = std::time::Instant::now();
    place.table(&["bob"]);
    assert_eq!(Frame::read(&mut alice).await.unwrap(), Frame::close(1008));
    assert!(start.elapsed() < Duration::from_secs(2));
    assert!(rest(&mut alice).await.is_empty());
    assert_eq!(Frame::read(&mut alices).await.unwrap(), Frame::close(1008));
    let record = place.dispatcher.wait_for_records(1).await.pop().unwrap();
    let told = [
        &record["cause"],
        &record["ended_by"],
        &record["how"],
        &record["code"],
    ];
    assert_eq!(
        told,
        [
            &json!("dispatch_revoked"),
            &json!("dispatch"),
            &json!("revoked"),
            &json!(1008)
        ]
    );
    say(&mut bob, &mut bobs, "still here", MASK).await;
    say(&mut bobs, &mut bob, "me too", None).await;
    // Moved to another instance: the same.
    place
        .dispatcher
        .write_table(&json!({ "bob": { "os_user": "carol", "port": place.instance.port } }));
    assert_eq!(Frame::read(&mut bob).await.unwrap(), Frame::close(1008));
    place.dispatcher.wait_for_records(2).await;
}

/// The Close frame comes between two frames, not within one.
#[tokio::test]
async fn a_revocation_waits_for_the_end_of_a_frame() {
    let mut place = Place::new().await;
    let (mut idle, _idles) = place.tunnel("alice").await;
    let (mut alice, mut alices) = place.tunnel("alice").await;
    let frame = Frame::new(frames::BINARY, vec![5; 100_000]);
    let bytes = frame.encode(None);
    raw::write(&mut alices, &bytes[..60_000]).await;
    let mut start = vec![0; 60_000];
    tokio::io::AsyncReadExt::read_exact(&mut alice, &mut start)
        .await
        .unwrap();
    place.table(&["bob"]);
    // Her other tunnel tells that it has come to that.
    assert_eq!(Frame::read(&mut idle).await.unwrap(), Frame::close(1008));
    tokio::time::sleep(Duration::from_millis(50)).await;
    // What follows the frame must not pass any more.
    raw::write(
        &mut alices,
        &[&bytes[60_000..], &Frame::text("too late").encode(None)].concat(),
    )
    .await;
    let mut whole = resumed(start, &mut alice);
    assert_eq!(Frame::read(&mut whole).await.unwrap(), frame);
    assert_eq!(Frame::read(&mut whole).await.unwrap(), Frame::close(1008));
    assert!(rest(&mut alice).await.is_empty());

    // A frame that never ends does not hold it up.
    place.table(&["alice"]);
    wait_for("return of alice", async || {
        place
            .dispatcher
            .get("alice", "/", &[("Cookie", "t3_session=x")])
            .await
            .status
            == 200
    })
    .await;
    let (mut alice, mut alices) = place.tunnel("alice").await;
    raw::write(&mut alices, &bytes[..10]).await;
    let mut start = vec![0; 10];
    tokio::io::AsyncReadExt::read_exact(&mut alice, &mut start)
        .await
        .unwrap();
    let begin = std::time::Instant::now();
    place.table(&["bob"]);
    assert!(rest(&mut alice).await.is_empty());
    assert!(begin.elapsed() < Duration::from_secs(2));
    let record = place.dispatcher.wait_for_records(3).await.pop().unwrap();
    assert_eq!(record["cause"], "dispatch_revoked");
}

/// A stream of which some bytes have been read already.
fn resumed<S: tokio::io::AsyncRead>(
    read: Vec<u8>,
    stream: S,
) -> tokio::io::Chain<std::io::Cursor<Vec<u8>>, S> {
    tokio::io::AsyncReadExt::chain(std::io::Cursor::new(read), stream)
}

#[tokio::test]
async fn sigterm_closes_both_sides_and_writes_every_record() {
    let mut place = Place::new().await;
    let mut tunnels = Vec::new();
    for _ in 0..20 {
        tunnels.push(place.tunnel("alice").await);
    }
    // One client does not listen any more; it must not hold up the end.
    let (stuck, mut stucks) = place.tunnel("bob").await;
    let flood = async {
        let block = Frame::new(frames::BINARY, vec![0; 60_000]).encode(None);
        loop {
            if tokio::time::timeout(Duration::from_millis(300), stucks.write_all(&block))
                .await
                .is_err()
            {
                break;
            }
        }
    };
    flood.await;
    let start = std::time::Instant::now();
    place.dispatcher.signal(Signal::TERM);
    for (client, instance) in &mut tunnels {
        assert_eq!(Frame::read(client).await.unwrap(), Frame::close(1001));
        assert_eq!(Frame::read(instance).await.unwrap(), Frame::close(1001));
    }
    assert!(place.dispatcher.exited().await.success());
    assert!(
        start.elapsed() < Duration::from_secs(10),
        "{:?}",
        start.elapsed()
    );
    drop(stuck);
    let records = place.dispatcher.records();
    assert_eq!(records.len(), 21);
    for record in records {
        assert_eq!(
            (&record["cause"], &record["code"]),
            (&json!("dispatch_shutdown"), &json!(1001)),
            "{record:#}"
        );
    }
}

/// For some seconds after SIGTERM a connection that a client keeps is still answered, a handshake on it too.
#[tokio::test]
async fn a_tunnel_that_comes_after_sigterm_is_closed_like_the_others() {
    let mut place = Place::new().await;
    let (mut held, _instance) = place.tunnel("bob").await;
    let mut client = http::Client::connect(place.dispatcher.address())
        .await
        .unwrap();
    let headers = [
        ("X-authentik-username", "alice"),
        ("Cookie", "t3_session=x"),
    ];
    let reply = client.request("GET", "/", &headers, b"").await.unwrap();
    assert_eq!(reply.status, 200);
    place.dispatcher.signal(Signal::TERM);
    // By now it is ending.
    assert_eq!(Frame::read(&mut held).await.unwrap(), Frame::close(1001));
    let headers = [&headers[..], &http::HANDSHAKE].concat();
    client
        .send(http::head("GET", "/ws", &headers, 0))
        .await
        .unwrap();
    assert_eq!(client.read_head().await.unwrap().0, 101);
    let closed = Frame::read(&mut client.stream).await.unwrap();
    assert_eq!(closed, Frame::close(1001));
    assert!(place.dispatcher.exited().await.success());
    for record in place.dispatcher.records() {
        assert_eq!(record["code"], json!(1001), "{record:#}");
    }
}

#[tokio::test]
async fn sigint_writes_every_record_too() {
    let mut place = Place::new().await;
    let _tunnels = [place.tunnel("alice").await, place.tunnel("alice").await];
    place.dispatcher.signal(Signal::INT);
    assert!(place.dispatcher.exited().await.success());
    let causes: Vec<Value> = place
        .dispatcher
        .records()
        .into_iter()
        .map(|record| record["cause"].clone())
        .collect();
    assert_eq!(causes, ["dispatch_shutdown", "dispatch_shutdown"]);
}

/// The outage as felt: from a bad end to the same person's next tunnel from the same address.
#[tokio::test]
async fn a_reconnect_tells_how_long_the_gap_was() {
    let mut place = Place::new().await;
    let (alice, _alices) = place.tunnel("alice").await;
    reset(alice);
    place.dispatcher.wait_for_records(1).await;
    tokio::time::sleep(Duration::from_millis(200)).await;
    // Somebody else's is no reconnect.
    let (mut bob, _bobs) = place.tunnel("bob").await;
    bob.shutdown().await.unwrap();
    assert_eq!(
        place.dispatcher.wait_for_records(2).await[1]["ws_gap_seconds"],
        Value::Null
    );
    let (mut alice, mut alices) = place.tunnel("alice").await;
    Frame::close(1000).write(&mut alice, MASK).await.unwrap();
    alice.shutdown().await.unwrap();
    rest(&mut alices).await;
    let gap = place.dispatcher.wait_for_records(3).await[2]["ws_gap_seconds"]
        .as_f64()
        .unwrap();
    assert!((0.2..20.0).contains(&gap), "{gap}");
    assert_eq!(
        place
            .dispatcher
            .metric("t3dispatch_ws_gap_seconds_count")
            .await,
        1.0
    );
    // That one ended as it should, so there is no gap before the next.
    let (mut alice, _alices) = place.tunnel("alice").await;
    alice.shutdown().await.unwrap();
    assert_eq!(
        place.dispatcher.wait_for_records(4).await[3]["ws_gap_seconds"],
        Value::Null
    );
}

#[tokio::test]
async fn closes_are_told_by_user_time_and_number() {
    let mut place = Place::new().await;
    for (before, user) in ["alice", "bob", "alice", "bob", "alice"].iter().enumerate() {
        let (mut client, _instance) = place.tunnel(user).await;
        client.shutdown().await.unwrap();
        place.dispatcher.wait_for_records(before + 1).await;
    }
    let records = place.dispatcher.wait_for_records(5).await;
    let admin = place.dispatcher.admin();
    let ask = async |query: &str| {
        let path = format!("/closes{query}");
        crate::common::http::request(admin, "GET", &path, &[], b"")
            .await
            .unwrap()
    };
    let told = async |query: &str| -> Vec<Value> {
        serde_json::from_slice(&ask(query).await.body).unwrap()
    };
    let newest: Vec<Value> = records.iter().rev().cloned().collect();
    assert_eq!(told("").await, newest);
    assert_eq!(told("?limit=2").await, newest[..2]);
    assert_eq!(told("?user=bob").await.len(), 2);
    assert_eq!(told("?user=bob&limit=1").await, [newest[1].clone()]);
    assert_eq!(told("?user=mallory").await.len(), 0);
    assert_eq!(told("?since=1h").await.len(), 5);
    let since = records[3]["time"].as_str().unwrap().replace(':', "%3A");
    assert!(told(&format!("?since={since}")).await.len() >= 2);
    assert_eq!(told("?since=2999-01-01T00:00:00Z").await.len(), 0);
    for wrong in ["?since=yesterday", "?limit=0", "?limit=x", "?who=alice"] {
        assert_eq!(ask(wrong).await.status, 400, "{wrong}");
    }
}

#[tokio::test]
async fn a_full_ledger_is_moved_aside_and_one_predecessor_kept() {
    let mut place = Place::with(|setup| setup.set("tunnels.ledger_max_mb", 1)).await;
    let ledger = place.dispatcher.base.join("closes.jsonl");
    let old = place.dispatcher.base.join("closes.jsonl.1");
    std::fs::write(&old, "older\n").unwrap();
    // A line that a crash has cut short, and no room left.
    let mut filled = "{\"user\":\"alice\"}\n".repeat(61_680);
    filled.push_str("{\"cut\":");
    std::fs::write(&ledger, &filled).unwrap();
    let (mut client, _instance) = place.tunnel("alice").await;
    client.shutdown().await.unwrap();
    wait_for("rotation", async || {
        std::fs::read_to_string(&old).unwrap() == filled
    })
    .await;
    place.dispatcher.wait_for_records(1).await;
    // Now there is rubbish with room left, cut short: the next line begins on its own.
    let mut file = std::fs::OpenOptions::new()
        .append(true)
        .open(&ledger)
        .unwrap();
    std::io::Write::write_all(&mut file, b"\xff\xfe[]\nnull\n{\"cut\":").unwrap();
    let (mut client, _instance) = place.tunnel("alice").await;
    client.shutdown().await.unwrap();
    let text = || String::from_utf8_lossy(&std::fs::read(&ledger).unwrap()).into_owned();
    wait_for("second record", async || text().lines().count() == 5).await;
    assert_eq!(text().lines().nth(3), Some("{\"cut\":"));
    let _: Value = serde_json::from_str(text().lines().nth(4).unwrap()).unwrap();
    let closes = crate::common::http::request(place.dispatcher.admin(), "GET", "/closes", &[], b"")
        .await
        .unwrap();
    let closes: Vec<Value> = serde_json::from_slice(&closes.body).unwrap();
    assert_eq!(
        closes
            .iter()
            .filter(|record| record["cause"].is_string())
            .count(),
        2
    );
}

/// A disk that cannot be written costs lines, which are counted, and nothing else.
#[tokio::test]
async fn a_ledger_that_cannot_be_written_harms_nothing() {
    let mut place = Place::with(|setup| {
        let full = "/dev/full/closes.jsonl";
        setup.set("tunnels.ledger", full)
    })
    .await;
    for _ in 0..3 {
        let (mut client, mut instance) = place.tunnel("alice").await;
        say(&mut client, &mut instance, "hello", MASK).await;
        client.shutdown().await.unwrap();
    }
    let lost = async || {
        place
            .dispatcher
            .metric("t3dispatch_ledger_lines_lost_total")
            .await
    };
    wait_for("lost lines", async || lost().await == 3.0).await;
    assert_eq!(place.dispatcher.logged("ledger-failing").len(), 1);
    assert_eq!(place.dispatcher.logged("ws close").len(), 3);
}

#[tokio::test]
async fn pages_of_other_origins_open_no_sockets() {
    let mut place = Place::with(|setup| {
        setup.set(
            "tunnels.allowed_origins",
            vec!["https://Other.example.com:443"],
        )
    })
    .await;
    let host = ("Host", "t3.example.com");
    for origin in [
        "https://t3.example.com",
        "http://t3.example.com",
        "https://other.example.com",
    ] {
        let (status, _client) = ask(
            place.dispatcher.address(),
            "alice",
            &[host, ("Origin", origin)],
        )
        .await;
        assert_eq!(status, 101, "{origin}");
        place.instance.next().await;
    }
    for origin in [
        "https://evil.example.com",
        "null",
        "https://t3.example.com:8443",
    ] {
        let (status, _client) = ask(
            place.dispatcher.address(),
            "alice",
            &[host, ("Origin", origin)],
        )
        .await;
        assert_eq!(status, 403, "{origin}");
    }
    assert_eq!(
        place
            .dispatcher
            .logged("refused code=cross-origin status=403 user=alice")
            .len(),
        3
    );
    // Only WebSockets are looked at: a form of another site is the instance's business, as it was.
    let reply = place
        .dispatcher
        .get(
            "alice",
            "/",
            &[
                ("Cookie", "t3_session=x"),
                ("Origin", "https://evil.example.com"),
            ],
        )
        .await;
    assert_eq!(reply.status, 200);
}

/// Pingora would end a silent socket after a minute.
#[tokio::test]
async fn a_silent_socket_stays_up() {
    let mut place = Place::new().await;
    let (mut client, mut instance) = place.tunnel("alice").await;
    tokio::time::sleep(Duration::from_secs(65)).await;
    say(&mut client, &mut instance, "still there?", MASK).await;
    say(&mut instance, &mut client, "yes", None).await;
}

/// Bytes that come right with the 101, or right after the handshake, are part of the conversation.
#[tokio::test]
async fn bytes_that_come_with_the_101_are_not_lost() {
    let base = TempDir::new().unwrap();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let mut request = vec![0; 4096];
            let length = tokio::io::AsyncReadExt::read(&mut stream, &mut request)
                .await
                .unwrap_or(0);
            if String::from_utf8_lossy(&request[..length]).contains("pgrade") {
                let switch = b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\nHTTP/1.1 101 Switching Protocols\r\n\
                               Upgrade: websocket\r\nConnection: Upgrade\r\n\r\n";
                let bytes = [&switch[..], &Frame::text("at once").encode(None)].concat();
                let _ = stream.write_all(&bytes).await;
                let _ = tokio::io::AsyncReadExt::read(&mut stream, &mut request).await;
            }
        }
    });
    let dispatcher = Setup::new(base.path(), mint::working(base.path()))
        .user("alice", "alice", port)
        .start()
        .await;
    for _ in 0..20 {
        let (status, client) = ask(dispatcher.address(), "alice", &[]).await;
        assert_eq!(status, 101);
        let mut stream = resumed(client.unread, client.stream);
        assert_eq!(
            Frame::read(&mut stream).await.unwrap(),
            Frame::text("at once")
        );
    }
    wait_for("records", async || dispatcher.records().len() == 20).await;
    for record in dispatcher.records() {
        assert_eq!(
            (
                &record["instance"]["messages"],
                &record["instance"]["bytes"]
            ),
            (&json!(1), &json!(9)),
            "{record:#}"
        );
    }
}

#[tokio::test]
async fn an_instance_that_is_killed_ends_its_tunnels() {
    let world = crate::world::World::new().await;
    let session = world.alice.new_session();
    let mut clients = Vec::new();
    for _ in 0..5 {
        let (status, client) =
            ask(world.dispatcher.address(), "alice", &[("Cookie", &session)]).await;
        assert_eq!(status, 101);
        clients.push(client.stream);
    }
    let crate::world::World {
        dispatcher, alice, ..
    } = world;
    alice.kill().await;
    for client in &mut clients {
        assert!(rest(client).await.is_empty());
    }
    for record in dispatcher.wait_for_records(5).await {
        assert_eq!(
            (&record["cause"], &record["ended_by"]),
            (&json!("upstream_closed"), &json!("instance")),
            "{record:#}"
        );
    }
}

/// A session that takes long to look for gives no tunnel to somebody who has lost the instance meanwhile.
#[tokio::test]
async fn no_tunnel_escapes_a_revocation() {
    let world = crate::world::World::with(|setup| setup.set("session.check_timeout", "3s")).await;
    world.alice.set(|vices| vices.check_hangs = true);
    let address = world.dispatcher.address();
    let asking =
        tokio::spawn(async move { ask(address, "alice", &[("Cookie", "t3_session=x")]).await.0 });
    wait_for("question", async || !world.alice.seen().is_empty()).await;
    world.dispatcher.write_table(&json!({}));
    assert_eq!(asking.await.unwrap(), 403);
    assert!(world.alice.seen_at("/ws").is_empty());
    let record = world.dispatcher.wait_for_records(1).await.pop().unwrap();
    assert_eq!(
        (&record["cause"], &record["opened"]),
        (&json!("dispatch_revoked"), &json!(false))
    );
}

/// Access ends in time also where one side takes nothing any more, so that no Close frame gets through.
#[tokio::test]
async fn a_revocation_does_not_wait_for_who_is_stuck() {
    let mut place = Place::new().await;
    let block = Frame::new(frames::BINARY, vec![0; 60_000]);
    let fill = async |stream: &mut TcpStream, bytes: &[u8]| {
        while tokio::time::timeout(Duration::from_millis(500), stream.write_all(bytes))
            .await
            .is_ok()
        {}
    };
    // One client does not read, and one instance does not.
    let (_client, mut sends) = place.tunnel("alice").await;
    fill(&mut sends, &block.encode(None)).await;
    let (mut client, _stuck) = place.tunnel("alice").await;
    fill(&mut client, &block.encode(MASK)).await;
    let start = std::time::Instant::now();
    place.table(&["bob"]);
    let records = place.dispatcher.wait_for_records(2).await;
    assert!(
        start.elapsed() < Duration::from_millis(2500),
        "{:?}",
        start.elapsed()
    );
    assert!(
        records
            .iter()
            .all(|record| record["cause"] == "dispatch_revoked"),
        "{records:#?}"
    );
    // The client that listens is told.
    assert_eq!(Frame::read(&mut client).await.unwrap(), Frame::close(1008));
}

/// A client must not, but what some say before the 101 gets to the tunnel.
#[tokio::test]
async fn frames_before_the_101_wait_for_it() {
    let base = TempDir::new().unwrap();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let setup = Setup::new(base.path(), mint::working(base.path())).user("alice", "alice", port);
    let dispatcher = setup.start().await;
    let mut client = crate::common::http::Client::connect(dispatcher.address())
        .await
        .unwrap();
    let headers = [
        ("X-authentik-username", "alice"),
        ("Cookie", "t3_session=x"),
        ("Connection", "Upgrade"),
        ("Upgrade", "websocket"),
    ];
    client
        .send(crate::common::http::head("GET", "/ws", &headers, 0))
        .await
        .unwrap();
    // The question for the cookie's name goes unanswered, then the handshake comes.
    drop(listener.accept().await.unwrap());
    let (mut instance, _) = listener.accept().await.unwrap();
    let early = ["too early", "and once more"].map(Frame::text);
    for frame in &early {
        tokio::time::sleep(Duration::from_millis(200)).await;
        client.send(frame.encode(MASK)).await.unwrap();
    }
    let handshake = raw::head(&mut instance).await;
    assert!(handshake.starts_with("GET /ws "), "{handshake:?}");
    instance.write_all(raw::SWITCH.as_bytes()).await.unwrap();
    assert_eq!(client.read_head().await.unwrap().0, 101);
    for frame in early {
        assert_eq!(Frame::read(&mut instance).await.unwrap(), frame);
    }
    say(&mut client.stream, &mut instance, "later", MASK).await;
    say(&mut instance, &mut client.stream, "back", None).await;
}

/// Makes one end deaf: the kernel throws away whatever comes for it, acknowledgements included, and never answers. To the
/// other end that is a pulled cable, on loopback too.
fn deafen(stream: &TcpStream) {
    // BPF: return 0 bytes of every packet.
    let nothing = [socket2::SockFilter::new(0x06, 0, 0, 0)];
    socket2::SockRef::from(stream)
        .attach_filter(&nothing)
        .unwrap();
}

/// The silent rows of the close matrix: either side gone without a word, while the other is silent or sends.
#[tokio::test]
async fn silent_death_of_either_side_is_noticed_within_a_minute() {
    let mut place = Place::new().await;
    let mut held = Vec::new();
    for side in ["client", "instance"] {
        for sending in [false, true] {
            let (mut client, mut instance) = place.tunnel("alice").await;
            say(&mut client, &mut instance, "hello", MASK).await;
            say(&mut instance, &mut client, side, None).await;
            // What is not acknowledged yet a deaf end would send again, which is a sign of life.
            tokio::time::sleep(Duration::from_millis(200)).await;
            deafen(if side == "client" { &client } else { &instance });
            match (side, sending) {
                ("client", true) => Frame::text("there?")
                    .write(&mut instance, None)
                    .await
                    .unwrap(),
                ("instance", true) => Frame::text("there?")
                    .write(&mut client, MASK)
                    .await
                    .unwrap(),
                _ => {}
            }
            held.push((client, instance));
        }
    }
    let start = std::time::Instant::now();
    while place.dispatcher.records().len() < 4 {
        assert!(
            start.elapsed() < Duration::from_secs(60),
            "{:#?}",
            place.dispatcher.records()
        );
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let told = |record: &Value| {
        [&record["cause"], &record["ended_by"], &record["how"]]
            .map(|told| told.as_str().unwrap().to_owned())
    };
    let mut told: Vec<_> = place
        .dispatcher
        .wait_for_records(4)
        .await
        .iter()
        .map(told)
        .collect();
    told.sort();
    let (down, up) = (
        ["downstream_closed", "client", "timeout"],
        ["upstream_closed", "instance", "timeout"],
    );
    assert_eq!(told, [down, down, up, up]);
}
