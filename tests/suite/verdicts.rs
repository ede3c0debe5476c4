//! Whose fault it was: the legs as seen from here, the legs to instances, and what is told of a drop. The drills have the
//! verdicts themselves.

use std::time::Duration;

use rustix::process::Signal;
use serde_json::{Value, json};
use tokio::net::TcpStream;

use crate::common::dispatcher::{Setup, program, wait_for};
use crate::common::frames::{CLOSE, Frame, PING, PONG};
use crate::common::http::{self, Client, HANDSHAKE, Head};
use crate::common::raw::{MASK, reset, rest, say};
use crate::tunnels::Place;
use crate::world::World;

const TOKEN: &str = "a-token-for-the-tests";

/// Time constants of a client in a hurry, and a token.
fn hurried(setup: Setup) -> Setup {
    setup
        .set("tunnels.client_heartbeat", "200ms")
        .set("tunnels.client_watchdog", "1s")
        .set("probe", json!({ "token": TOKEN, "heartbeat": "300ms" }))
}

/// A WebSocket to `target` with these headers, and the head of its 101.
async fn leg(place: &Place, target: &str, headers: &[(&str, &str)]) -> (TcpStream, Head) {
    let mut client = Client::connect(place.dispatcher.address()).await.unwrap();
    let all = [&HANDSHAKE, headers].concat();
    client
        .send(http::head("GET", target, &all, 0))
        .await
        .unwrap();
    let (status, head) = client.read_head().await.unwrap();
    assert_eq!(status, 101, "{target}");
    assert!(client.unread.is_empty());
    (client.stream, head)
}

async fn known_leg(place: &Place, name: &str) -> TcpStream {
    let bearer = format!("Bearer {TOKEN}");
    let target = format!("/probe/ws?leg={name}");
    let (stream, head) = leg(place, &target, &[("Authorization", &bearer)]).await;
    assert_eq!(head.get("x-t3-leg"), Some(name));
    stream
}

/// Answers so many of the pings that come.
async fn answer(leg: &mut TcpStream, pings: usize) {
    for _ in 0..pings {
        let frame = Frame::read(leg).await.unwrap();
        assert_eq!(frame.opcode, PING);
        Frame::new(PONG, frame.payload)
            .write(leg, MASK)
            .await
            .unwrap();
    }
}

/// The exit status of a command, its answer, and its complaints.
fn said(output: std::process::Output) -> (Option<i32>, String, String) {
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (
        output.status.code(),
        text(output.stdout),
        text(output.stderr),
    )
}

/// A WebSocket of this person's that `side`'s reset ended.
async fn drop_one(place: &mut Place, user: &str, client_resets: bool) {
    let (client, instance) = place.tunnel(user).await;
    let (goes, mut stays) = if client_resets {
        (client, instance)
    } else {
        (instance, client)
    };
    reset(goes);
    rest(&mut stays).await;
}

fn heartbeat(uptime_ms: u64, legs: Value) -> Frame {
    let text = json!({ "leg": "internal", "seq": 1, "heartbeat_ms": 250, "uptime_ms": uptime_ms, "legs": legs });
    Frame::text(&text.to_string())
}

#[tokio::test]
async fn a_leg_is_known_by_its_token_and_by_nothing_else() {
    let place = Place::with(|setup| {
        let mut setup = hurried(setup);
        setup.log_level = "trace".into();
        setup
    })
    .await;
    let right = format!("Bearer {TOKEN}");
    let longer = format!("Bearer {TOKEN}x");
    let posers: [(&str, Vec<(&str, &str)>); 8] = [
        ("/probe/ws?leg=internal", vec![]),
        (
            "/probe/ws?leg=internal",
            vec![("Authorization", "Bearer wrong-token-of-some-length")],
        ),
        ("/probe/ws?leg=internal", vec![("Authorization", "Bearer ")]),
        ("/probe/ws?leg=internal", vec![("Authorization", &longer)]),
        ("/probe/ws?leg=internal", vec![("Authorization", TOKEN)]),
        (
            "/probe/ws?leg=internal",
            vec![("Authorization", &right), ("Authorization", &right)],
        ),
        ("/probe/ws?leg=In%20ternal", vec![("Authorization", &right)]),
        ("/probe/ws", vec![("Authorization", &right)]),
    ];
    for (target, headers) in posers {
        let (mut stream, head) = leg(&place, target, &headers).await;
        assert_eq!(head.get("x-t3-leg"), None, "{target} {headers:?}");
        // A plain echo, which is not pinged.
        let frame = Frame::text("hello");
        frame.write(&mut stream, MASK).await.unwrap();
        assert_eq!(Frame::read(&mut stream).await.unwrap(), frame);
    }
    let connected = "t3dispatch_leg_connected{leg=\"internal\"}";
    assert!(place.dispatcher.metrics().await.contains(connected));
    assert_eq!(place.dispatcher.metric(connected).await, 0.0);
    for header in [right.clone(), format!("bearer {TOKEN}")] {
        let headers = [("Authorization", header.as_str())];
        let (mut stream, head) = leg(&place, "/probe/ws?x=1&leg=internal", &headers).await;
        assert_eq!(head.get("x-t3-leg"), Some("internal"));
        answer(&mut stream, 2).await;
    }
    assert!(!place.dispatcher.log().contains(TOKEN));
}

#[tokio::test]
async fn without_a_token_in_the_settings_nobody_is_a_leg() {
    let place = Place::new().await;
    let bearer = format!("Bearer {TOKEN}");
    let (_stream, head) = leg(
        &place,
        "/probe/ws?leg=internal",
        &[("Authorization", &bearer)],
    )
    .await;
    assert_eq!(head.get("x-t3-leg"), None);
}

#[tokio::test]
async fn the_far_end_sees_a_leg_stall_come_back_break_and_leave() {
    let place = Place::with(hurried).await;
    let metric = async |series: &str| place.dispatcher.metric(series).await;
    let mut leg = known_leg(&place, "internal").await;
    heartbeat(60_000, json!([]))
        .write(&mut leg, MASK)
        .await
        .unwrap();
    wait_for("the echo", async || true).await;
    // The echo of the heartbeat comes between the pings.
    let mut echoes = 0;
    for _ in 0..6 {
        let frame = Frame::read(&mut leg).await.unwrap();
        if frame.opcode == PING {
            Frame::new(PONG, frame.payload)
                .write(&mut leg, MASK)
                .await
                .unwrap();
        } else {
            echoes += 1;
        }
    }
    assert_eq!(echoes, 1);
    let connected = "t3dispatch_leg_connected{leg=\"internal\"}";
    let stalls = "t3dispatch_leg_troubles_total{leg=\"internal\",kind=\"stall\"}";
    let stalls = if place.dispatcher.metrics().await.contains(stalls) {
        stalls
    } else {
        "t3dispatch_leg_troubles_total{kind=\"stall\",leg=\"internal\"}"
    };
    let cuts = "t3dispatch_leg_troubles_total{kind=\"cut\",leg=\"internal\"}";
    assert_eq!(
        (
            metric(connected).await,
            metric(stalls).await,
            metric(cuts).await
        ),
        (1.0, 0.0, 0.0)
    );
    // It stops answering, then catches up.
    wait_for("the stall", async || metric(stalls).await == 1.0).await;
    let evidence = async |part: &str| {
        wait_for(&format!("evidence with {part}"), async || {
            let file = place.dispatcher.base.join("closes.evidence.jsonl");
            std::fs::read_to_string(file).is_ok_and(|text| text.contains(part))
        })
        .await;
    };
    evidence("stopped answering").await;
    let (mut read, mut write) = leg.split();
    let answering = async {
        loop {
            let frame = Frame::read(&mut read).await.unwrap();
            if frame.opcode == PING {
                Frame::new(PONG, frame.payload)
                    .write(&mut write, MASK)
                    .await
                    .unwrap();
            }
        }
    };
    tokio::select! {
        () = answering => {}
        () = evidence("\"until\":1") => {}
    }
    reset(leg);
    wait_for("the cut", async || metric(cuts).await == 1.0).await;
    wait_for("the end", async || metric(connected).await == 0.0).await;
    // One that says goodbye has not broken.
    let mut leaver = known_leg(&place, "internal").await;
    Frame::close(1001).write(&mut leaver, MASK).await.unwrap();
    while Frame::read(&mut leaver)
        .await
        .is_ok_and(|frame| frame.opcode != CLOSE)
    {}
    wait_for("the goodbye", async || metric(connected).await == 0.0).await;
    assert_eq!((metric(stalls).await, metric(cuts).await), (1.0, 1.0));
}

#[tokio::test]
async fn what_the_prober_tells_of_its_other_legs_is_kept() {
    let place = Place::with(hurried).await;
    let mut leg = known_leg(&place, "internal").await;
    let told = json!([
        { "leg": "cloudflare", "up": false, "for_ms": 5000, "reason": "rtt_timeout" },
        { "leg": "internal", "up": true, "for_ms": 5000, "reason": null },
        { "leg": "un\"quoted\n", "up": false, "for_ms": 1, "reason": "x" },
    ]);
    heartbeat(60_000, told).write(&mut leg, MASK).await.unwrap();
    let file = place.dispatcher.base.join("closes.evidence.jsonl");
    wait_for("what was told", async || {
        std::fs::read_to_string(&file).is_ok_and(|text| text.contains("leg_told"))
    })
    .await;
    let text = std::fs::read_to_string(&file).unwrap();
    let lines: Vec<Value> = text
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .filter(|line: &Value| line["event"] == "leg_told")
        .collect();
    assert_eq!(lines.len(), 1, "{text}");
    assert_eq!(
        (&lines[0]["leg"], &lines[0]["reason"]),
        (&json!("cloudflare"), &json!("rtt_timeout"))
    );
}

/// Every instance with an open WebSocket is asked, and no other.
#[tokio::test]
async fn instances_in_use_are_asked_for_a_sign_of_life() {
    let world = World::with(hurried).await;
    let session = world.alice.new_session();
    let asked = || world.alice.seen_at("/api/auth/session").len();
    let (_, client) =
        crate::common::raw::ask(world.dispatcher.address(), "alice", &[("Cookie", &session)]).await;
    let before = asked();
    wait_for("signs of life", async || asked() >= before + 3).await;
    assert!(
        world
            .alice
            .seen_at("/api/auth/session")
            .iter()
            .all(|seen| seen.head.get("cookie").is_none()),
        "a sign of life carries no cookie"
    );
    assert!(world.bob.seen().is_empty());
    world.alice.set(|vices| vices.silent = true);
    let late = "t3dispatch_serve_leg_troubles_total{kind=\"late\"}";
    wait_for("lateness", async || {
        world.dispatcher.metric(late).await >= 1.0
    })
    .await;
    world.alice.set(|vices| vices.silent = false);
    drop(client);
    wait_for("the end", async || {
        world.dispatcher.metric("t3dispatch_tunnels_open").await == 0.0
    })
    .await;
    // Once more, for the verdict; then never again.
    tokio::time::sleep(Duration::from_millis(500)).await;
    let after = asked();
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(asked(), after);
}

/// What is plain at once is said at once, in the record's own line.
#[tokio::test]
async fn a_plain_end_is_judged_at_once() {
    let mut place = Place::with(hurried).await;
    let (mut client, mut instance) = place.tunnel("alice").await;
    say(&mut client, &mut instance, "x", MASK).await;
    Frame::close(1001).write(&mut client, MASK).await.unwrap();
    Frame::read(&mut instance).await.unwrap();
    drop((client, instance));
    // Two that end at once may be written in either order.
    place.dispatcher.wait_for_records(1).await;
    drop_one(&mut place, "bob", false).await;
    place.dispatcher.wait_for_records(2).await;
    let text = std::fs::read_to_string(place.dispatcher.base.join("closes.jsonl")).unwrap();
    let lines: Vec<Value> = text
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert_eq!(lines.len(), 2);
    for (line, segment, part) in [
        (&lines[0], "none", "Close 1001"),
        (&lines[1], "serve", "reset its connection"),
    ] {
        assert_eq!(line["verdict"]["segment"], segment);
        assert!(
            line["verdict"]["evidence"][0]
                .as_str()
                .unwrap()
                .contains(part),
            "{line:#}"
        );
        let series = format!("t3dispatch_tunnel_verdicts_total{{segment=\"{segment}\"}}");
        assert_eq!(place.dispatcher.metric(&series).await, 1.0);
    }
}

/// Without legs there is no evidence, and the verdict says so once the window has closed; so does `explain`, also when
/// the dispatcher is gone.
#[tokio::test]
async fn drops_are_explained_also_with_the_dispatcher_down() {
    let mut place = Place::with(hurried).await;
    drop_one(&mut place, "alice", true).await;
    let (bobs, instance) = place.tunnel("bob").await;
    drop(instance);
    rest(&mut { bobs }).await;
    place.dispatcher.wait_for_records(2).await;
    let file = place.dispatcher.base.join("t3-dispatch.yaml");
    let explain = |words: &[&str]| {
        let output = program()
            .arg("explain")
            .args(words)
            .arg("-c")
            .arg(&file)
            .output()
            .unwrap();
        said(output)
    };
    let (code, said, _) = explain(&["alice"]);
    assert_eq!(code, Some(0));
    assert!(said.contains("(open)"), "{said}");
    wait_for("the verdict", async || {
        !place
            .dispatcher
            .records()
            .iter()
            .any(|record| record["verdict"].is_null())
    })
    .await;
    place.dispatcher.signal(Signal::KILL);
    place.dispatcher.exited().await;

    let (code, said, _) = explain(&[]);
    assert_eq!(code, Some(0));
    assert!(
        said.contains("alice") && said.contains("bob") && said.contains("unknown"),
        "{said}"
    );
    assert!(
        said.contains("2 drops: ") && said.contains("1 serve") && said.contains("1 unknown"),
        "{said}"
    );
    let (_, said, _) = explain(&["bob", "--since", "1h"]);
    assert!(
        !said.contains("alice") && said.contains("1 drop: 1 serve"),
        "{said}"
    );
    // Longer ago than any clock knows is since ever.
    let (_, ever, _) = explain(&["bob", "--since", "500000000000years"]);
    assert_eq!(ever, said);
    let (_, said, _) = explain(&["mallory"]);
    assert!(said.starts_with("No drops of mallory"), "{said}");
    let (_, said, _) = explain(&["--json"]);
    let told: Value = serde_json::from_str(&said).unwrap();
    let drops = told["drops"].as_array().unwrap();
    assert_eq!(drops.len(), 2);
    let alices = drops.iter().find(|drop| drop["user"] == "alice").unwrap();
    assert_eq!(
        (&alices["verdict"]["segment"], &alices["verdict"]["final"]),
        (&json!("unknown"), &json!(true))
    );
    let why = alices["verdict"]["evidence"].to_string();
    assert!(why.contains("there is no leg cloudflare"), "{why}");

    let at = alices["time"].as_str().unwrap();
    let (_, said, _) = explain(&["alice", "--at", at]);
    for part in [
        "unknown",
        "What happened around it",
        "To send",
        "ended: by client, rst",
        "of bob ended",
    ] {
        assert!(said.contains(part), "{part}: {said}");
    }
    let (_, said, _) = explain(&["alice", "--at", at, "--json"]);
    let told: Value = serde_json::from_str(&said).unwrap();
    assert_eq!(told["drop"]["key"], alices["key"]);
    assert!(!told["timeline"].as_array().unwrap().is_empty());
    assert!(
        told["sentence"]
            .as_str()
            .unwrap()
            .contains("does not say where")
    );
    for (words, part) in [
        (
            &["--at", "soon"][..],
            "--at soon: write a time such as 14:05",
        ),
        (
            &["--at", "2001-01-01T00:00:00Z"],
            "no drop within 15 minutes",
        ),
    ] {
        let (code, _, said) = explain(words);
        assert_eq!(code, Some(1));
        assert!(said.contains(part), "{said}");
    }
}

#[tokio::test]
async fn standing_still_is_noticed() {
    let place = Place::with(hurried).await;
    // The loop is watched from the first connection on, which starting has made.
    wait_for("the first look", async || {
        place.dispatcher.metric("t3dispatch_loop_lag_seconds").await > 0.0
    })
    .await;
    place.dispatcher.signal(Signal::STOP);
    tokio::time::sleep(Duration::from_secs(1)).await;
    place.dispatcher.signal(Signal::CONT);
    wait_for("the lag", async || {
        place.dispatcher.metric("t3dispatch_loop_lag_seconds").await >= 0.5
    })
    .await;
    let file = place.dispatcher.base.join("closes.evidence.jsonl");
    wait_for("its evidence", async || {
        std::fs::read_to_string(&file).is_ok_and(|text| text.contains("lagged"))
    })
    .await;
}

/// The person's page: theirs alone, behind the same identity, and without a session.
#[tokio::test]
async fn everybody_sees_their_own_drops_and_nobody_elses() {
    let mut place = Place::with(hurried).await;
    for user in ["alice", "alice", "bob"] {
        drop_one(&mut place, user, false).await;
    }
    place.dispatcher.wait_for_records(3).await;
    let page = place.dispatcher.get("alice", "/.t3-dispatch/", &[]).await;
    assert_eq!(page.status, 200);
    assert!(page.get("content-type").unwrap().starts_with("text/html"));
    let policy = page.get("content-security-policy").unwrap().to_owned();
    let nonce = policy
        .split("script-src 'nonce-")
        .nth(1)
        .unwrap()
        .split('\'')
        .next()
        .unwrap();
    assert!(nonce.len() >= 22 && page.text().contains(&format!("<script nonce=\"{nonce}\">")));
    assert!(!page.text().contains("NONCE"));
    let again = place.dispatcher.get("alice", "/.t3-dispatch/", &[]).await;
    assert_ne!(again.get("content-security-policy"), Some(policy.as_str()));
    for (user, count) in [("alice", 2), ("bob", 1)] {
        let drops = place.dispatcher.get(user, "/.t3-dispatch/drops", &[]).await;
        assert_eq!(
            (drops.status, drops.get("cache-control")),
            (200, Some("no-store"))
        );
        let told: Value = serde_json::from_slice(&drops.body).unwrap();
        assert_eq!(
            (&told["user"], told["drops"].as_array().unwrap().len()),
            (&json!(user), count)
        );
        assert_eq!(told["names"]["edge"], "Cloudflare");
        for drop in told["drops"].as_array().unwrap() {
            assert_eq!(
                (&drop["segment"], &drop["final"]),
                (&json!("serve"), &json!(true))
            );
        }
    }
    assert_eq!(
        place
            .dispatcher
            .get("mallory", "/.t3-dispatch/", &[])
            .await
            .status,
        403
    );
    assert_eq!(
        place
            .dispatcher
            .get("mallory", "/.t3-dispatch/drops", &[])
            .await
            .status,
        403
    );
    assert_eq!(
        place
            .dispatcher
            .get("alice", "/.t3-dispatch", &[])
            .await
            .get("location"),
        Some("/.t3-dispatch/")
    );
    assert_eq!(
        place
            .dispatcher
            .get("alice", "/.t3-dispatch/other", &[])
            .await
            .status,
        404
    );
    assert_eq!(
        place
            .dispatcher
            .request("alice", "POST", "/.t3-dispatch/", &[])
            .await
            .status,
        405
    );
    let served = "t3dispatch_requests_total{outcome=\"paired\",status=\"3xx\"}";
    assert_eq!(place.dispatcher.metric(served).await, 0.0);
    // What only begins like it is the instance's.
    let other = place
        .dispatcher
        .get("alice", "/.t3-dispatcher", &[("Cookie", "t3_session=x")])
        .await;
    assert!(other.text().contains("authenticated"), "{}", other.text());
}

/// A process that is killed while the evidence is coming in leaves the drop to the next one.
#[tokio::test]
async fn what_a_killed_process_has_left_is_judged_by_the_next() {
    let mut place = Place::with(hurried).await;
    drop_one(&mut place, "alice", true).await;
    let records = place.dispatcher.wait_for_records(1).await;
    assert!(records[0]["verdict"].is_null());
    place.dispatcher.signal(Signal::KILL);
    place.dispatcher.exited().await;
    let file = place.dispatcher.base.join("t3-dispatch.yaml");
    let mut next = program().args(["serve", "-c"]).arg(file).spawn().unwrap();
    wait_for("the verdict", async || {
        !place.dispatcher.records()[0]["verdict"].is_null()
    })
    .await;
    let records = place.dispatcher.records();
    assert_eq!(records[0]["verdict"]["segment"], "unknown");
    let verdicts = "t3dispatch_tunnel_verdicts_total{segment=\"unknown\"}";
    assert_eq!(place.dispatcher.metric(verdicts).await, 1.0);
    next.kill().unwrap();
    next.wait().unwrap();
}

/// Each name has series of its own, so there are only so many, even for those who have the token.
#[tokio::test]
async fn legs_have_only_so_many_names() {
    let place = Place::with(hurried).await;
    let bearer = format!("Bearer {TOKEN}");
    let mut known = 0;
    for number in 0..20 {
        let target = format!("/probe/ws?leg=leg-{number}");
        let (_stream, head) = leg(&place, &target, &[("Authorization", &bearer)]).await;
        known += usize::from(head.get("x-t3-leg").is_some());
    }
    assert_eq!(known, 16);
}

/// The answer goes down a pipe that nobody reads to its end, to a disk that is full, and comes from a file that is not all
/// a ledger.
#[tokio::test]
async fn explain_bears_what_a_shell_does_to_it() {
    let mut place = Place::with(hurried).await;
    drop_one(&mut place, "alice", false).await;
    place.dispatcher.wait_for_records(1).await;
    let ledger = place.dispatcher.base.join("closes.jsonl");
    let line = std::fs::read_to_string(&ledger).unwrap();
    std::fs::write(
        &ledger,
        format!("rubbish\n{}\n{{\"user\":\"alice\"}}\n", line.repeat(2000)),
    )
    .unwrap();
    let shell = |script: &str| {
        let output = std::process::Command::new("sh")
            .args(["-c", script])
            .env("PROGRAM", program().get_program())
            .env("FILE", place.dispatcher.base.join("t3-dispatch.yaml"))
            .output()
            .unwrap();
        said(output)
    };
    let (_, said, complaint) = shell("\"$PROGRAM\" explain -c \"$FILE\" | head -n 1");
    assert!(said.starts_with("time "), "{said}");
    assert!(complaint.contains("2 lines are no records"), "{complaint}");
    assert!(!complaint.contains("panicked"), "{complaint}");
    let (code, _, complaint) = shell("\"$PROGRAM\" explain -c \"$FILE\" > /dev/full");
    assert_eq!(code, Some(1));
    assert!(
        complaint.contains("cannot print: No space left"),
        "{complaint}"
    );
    let (code, _, complaint) = shell("\"$PROGRAM\" explain --at 2026-01-02 -c \"$FILE\"");
    assert_eq!(code, Some(1));
    assert!(
        complaint.contains("--at 2026-01-02: write a time"),
        "{complaint}"
    );
}
