//! Mint, exchange, relay: what a person gets, what it costs, and what happens when a part of it fails.

use std::time::{Duration, Instant};

use crate::common::dispatcher::{Setup, wait_for};
use crate::common::http::{self, Reply};
use crate::common::instance::{Instance, Version};
use crate::common::mint;
use crate::common::raw::canned;
use crate::world::World;

/// A world whose mint command is `body`.
async fn minting(body: &str) -> World {
    World::with(|setup| {
        let script = mint::script(&setup.base, "mint-test", body);
        setup
            .set("pairing.mint", script)
            .set("pairing.mint_timeout", "1s")
    })
    .await
}

fn assert_refused(reply: &Reply, status: u16, code: &str, sentence: &str) {
    assert_eq!(reply.status, status);
    assert_eq!(reply.get("x-t3-dispatch-error"), Some(code));
    assert_eq!(reply.text(), format!("{sentence}\n"));
    assert!(reply.cookies().is_empty());
}

#[tokio::test]
async fn a_first_visit_lands_with_a_session() {
    let world = World::new().await;
    for (user, endpoint, fallback) in [
        ("alice", "/api/auth/browser-session", false),
        ("bob", "/api/auth/bootstrap", true),
    ] {
        let reply = world.dispatcher.navigate(user, "").await;
        assert_eq!((reply.status, reply.get("location")), (302, Some("/")));
        assert_eq!(reply.get("cache-control"), Some("no-store"));
        let line = reply.get("set-cookie").unwrap().to_owned();
        // As it came, attributes and all.
        assert!(
            line.ends_with(
                "; Path=/; Expires=Wed, 31 Dec 2098 00:00:00 GMT; HttpOnly; SameSite=Lax"
            ),
            "{line}"
        );
        let landed = world.dispatcher.navigate(user, &reply.cookies()[0]).await;
        assert!(landed.text().contains(&format!("{user}'s workspace")));
        let logged = world.dispatcher.logged(&format!("paired user={user} "));
        assert_eq!(logged.len(), 1);
        let expected =
            format!("paired user={user} endpoint={endpoint} fallback={fallback} dur_ms=");
        let (_, duration) = logged[0].split_once(&expected).unwrap();
        duration.parse::<u64>().unwrap();
        let series = format!("t3dispatch_pairings_total{{endpoint=\"{endpoint}\",result=\"ok\"}}");
        assert_eq!(world.dispatcher.metric(&series).await, 1.0);
    }
    let posted = world.alice.seen_at("/api/auth/browser-session");
    assert_eq!(posted.len(), 1);
    assert_eq!(posted[0].head.get("content-type"), Some("application/json"));
    assert_eq!(
        world
            .dispatcher
            .metric("t3dispatch_mint_seconds_count")
            .await,
        2.0
    );
}

#[tokio::test]
async fn every_set_cookie_is_relayed_as_it_came() {
    // The stand-in sets one; this instance is written by hand to set three, one of them odd.
    let base = tempfile::TempDir::new().unwrap();
    let answer = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\nSet-Cookie: a=1; Path=/x; Priority=High\r\n\
                  Set-Cookie: t3_session=p.s==; Path=/; HttpOnly\r\nset-cookie: \"odd\"\r\n\r\n{}";
    let (port, _) = canned(answer.into(), false).await;
    let dispatcher = Setup::new(base.path(), mint::working(base.path()))
        .user("alice", "alice", port)
        .start()
        .await;
    let reply = dispatcher.navigate("alice", "").await;
    assert_eq!(reply.status, 302);
    let lines: Vec<&str> = reply.head.all("set-cookie").collect();
    assert_eq!(
        lines,
        [
            "a=1; Path=/x; Priority=High",
            "t3_session=p.s==; Path=/; HttpOnly",
            "\"odd\""
        ]
    );
}

#[tokio::test]
async fn a_mint_command_that_fails() {
    for body in ["exit 1", &format!("{}\nexit 3", mint::MINT), "kill -9 $$"] {
        let world = minting(body).await;
        let reply = world.dispatcher.get("alice", "/", &[]).await;
        assert_refused(&reply, 500, "mint-failed", "pairing mint failed");
        assert!(world.alice.seen_at("/api/auth/browser-session").is_empty());
    }
    let world = World::with(|setup| setup.set("pairing.mint", vec!["/nonexistent/t3-mint"])).await;
    let reply = world.dispatcher.get("alice", "/", &[]).await;
    assert_refused(&reply, 500, "mint-failed", "pairing mint failed");
}

#[tokio::test]
async fn a_mint_command_that_prints_no_credential() {
    for output in [
        "",
        "credential",
        "{}",
        "{\"credential\":\"\"}",
        "{\"credential\":7}",
        "[]",
        "{\"credential\":\"x\"} y",
    ] {
        let world = minting(&format!("printf '%s' '{output}'")).await;
        let reply = world.dispatcher.get("alice", "/", &[]).await;
        assert_refused(
            &reply,
            500,
            "mint-unparseable",
            "unparseable pairing output",
        );
        assert!(world.alice.seen_at("/api/auth/browser-session").is_empty());
    }
}

/// Whether a process whose command line holds `mark` is alive.
fn alive(mark: &str) -> bool {
    std::fs::read_dir("/proc").unwrap().flatten().any(|entry| {
        let line = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
        String::from_utf8_lossy(&line)
            .replace('\0', " ")
            .contains(mark)
    })
}

#[tokio::test]
async fn a_mint_command_that_hangs_is_killed_with_all_its_children() {
    // The odd numbers make the processes recognisable.
    let world = minting("sleep 7301.25 &\nsleep 7302.25").await;
    let start = Instant::now();
    let reply = world.dispatcher.get("alice", "/", &[]).await;
    assert_refused(&reply, 500, "mint-failed", "pairing mint failed");
    assert!(start.elapsed() >= Duration::from_secs(1));
    wait_for("end of the mint's processes", async || {
        !alive("7301.25") && !alive("7302.25")
    })
    .await;
}

#[tokio::test]
async fn a_mint_command_that_prints_too_much_is_stopped() {
    let world = minting("head -c 10000000 /dev/zero | tr '\\0' x; sleep 7303.25").await;
    let reply = world.dispatcher.get("alice", "/", &[]).await;
    assert_refused(
        &reply,
        500,
        "mint-unparseable",
        "unparseable pairing output",
    );
    wait_for("end of the mint's processes", async || !alive("7303.25")).await;
}

#[tokio::test]
async fn a_mint_command_that_leaves_a_child_behind_still_pairs() {
    // The child holds the output open for far longer than a mint may take.
    let world = minting(&format!("sleep 7304.25 &\n{}", mint::MINT)).await;
    let reply = world.dispatcher.get("alice", "/", &[]).await;
    assert_eq!(reply.status, 302);
    wait_for("end of the mint's child", async || !alive("7304.25")).await;
}

#[tokio::test]
async fn the_os_user_is_the_last_argument() {
    let world = World::with(|setup| {
        let body = format!(
            "printf '[%s]' \"$@\" > \"$base/arguments\"\nfor user; do :; done\n{}",
            mint::MINT
        );
        let mut mint = mint::script(&setup.base, "mint-arguments", &body);
        mint.extend(["-n".into(), "two words".into()]);
        setup.set("pairing.mint", mint)
    })
    .await;
    assert_eq!(world.dispatcher.get("alice", "/", &[]).await.status, 302);
    let arguments = std::fs::read_to_string(world.base().join("arguments")).unwrap();
    assert_eq!(arguments, "[-n][two words][alice]");
}

#[tokio::test]
async fn an_exchange_that_fails() {
    let world = World::with(|setup| {
        setup
            .set("pairing.exchange_timeout", "400ms")
            .set("pairing.per_user_per_minute", 100)
    })
    .await;
    let first_visit = async || world.dispatcher.get("alice", "/", &[]).await;
    for status in [400, 401, 403, 415, 500, 503, 201, 302] {
        world.alice.set(|vices| vices.exchange_says = Some(status));
        assert_refused(
            &first_visit().await,
            502,
            "bootstrap-rejected",
            "bootstrap rejected",
        );
    }
    // Absent everywhere.
    world.alice.set(|vices| vices.exchange_says = Some(404));
    assert_refused(
        &first_visit().await,
        502,
        "bootstrap-failed",
        "bootstrap request failed",
    );
    world.alice.set(|vices| vices.exchange_says = None);

    world.alice.set(|vices| vices.pairs_without_cookie = true);
    assert_refused(
        &first_visit().await,
        502,
        "bootstrap-no-cookie",
        "bootstrap set no session cookie",
    );
    world.alice.set(|vices| vices.pairs_without_cookie = false);

    world.alice.set(|vices| vices.silent = true);
    assert_refused(
        &first_visit().await,
        502,
        "bootstrap-failed",
        "bootstrap request failed",
    );
    world.alice.set(|vices| vices.silent = false);
    assert_eq!(first_visit().await.status, 302);

    world.alice.kill().await;
    let reply = world.dispatcher.get("alice", "/", &[]).await;
    assert_refused(&reply, 502, "bootstrap-failed", "bootstrap request failed");
}

/// A connection that breaks at the preferred endpoint is tried again at the other one, as the original does.
#[tokio::test]
async fn a_broken_connection_falls_back() {
    let world = World::new().await;
    world.bob.set(|vices| vices.exchange_breaks = true);
    assert_eq!(world.dispatcher.get("bob", "/", &[]).await.status, 302);
    assert_eq!(
        world
            .dispatcher
            .logged("paired user=bob endpoint=/api/auth/bootstrap fallback=true")
            .len(),
        1
    );
}

/// Fifty tabs restored at once mint once, and all of them land.
#[tokio::test]
async fn fifty_first_visits_of_one_user_mint_once() {
    let world = World::with(|setup| {
        let slow = mint::slow(&setup.base, 0.5);
        setup.set("pairing.mint", slow)
    })
    .await;
    let address = world.dispatcher.address();
    let mut visits = tokio::task::JoinSet::new();
    for _ in 0..50 {
        visits.spawn(async move {
            http::request(
                address,
                "GET",
                "/",
                &[("X-authentik-username", "alice")],
                b"",
            )
            .await
            .unwrap()
        });
    }
    for reply in visits.join_all().await {
        assert_eq!(reply.status, 302);
        let landed = world
            .dispatcher
            .navigate("alice", &reply.cookies()[0])
            .await;
        assert!(landed.text().contains("alice's workspace"));
    }
    assert_eq!(world.mints(), 1);
    assert_eq!(world.dispatcher.logged("paired user=alice").len(), 1);
}

/// Those who wait share a failure too: a mint that hangs does not hang once for each of them.
#[tokio::test]
async fn visits_that_wait_share_a_failure() {
    let world = minting("echo \"start $user\" >> \"$base/mints\"\nsleep 7305.25").await;
    let address = world.dispatcher.address();
    let mut visits = tokio::task::JoinSet::new();
    for _ in 0..10 {
        visits.spawn(async move {
            http::request(
                address,
                "GET",
                "/",
                &[("X-authentik-username", "alice")],
                b"",
            )
            .await
            .unwrap()
        });
    }
    for reply in visits.join_all().await {
        assert_refused(&reply, 500, "mint-failed", "pairing mint failed");
    }
    assert_eq!(world.mints(), 1);
}

/// Two at once by default, whoever asks; the others wait their turn, in the order they came in.
#[tokio::test]
async fn mints_are_bounded_in_all_and_turns_are_fair() {
    const USERS: [&str; 6] = ["u0", "u1", "u2", "u3", "u4", "u5"];
    let base = tempfile::TempDir::new().unwrap();
    let mut setup = Setup::new(base.path(), mint::slow(base.path(), 0.4));
    let mut instances = Vec::new();
    for user in USERS {
        let instance = Instance::start(&mint::home(base.path(), user), Version::V0_0_33).await;
        setup = setup.user(user, user, instance.port());
        instances.push(instance);
    }
    let dispatcher = setup.start().await;
    let address = dispatcher.address();
    let mut visits = tokio::task::JoinSet::new();
    for (position, user) in USERS.into_iter().enumerate() {
        visits.spawn(async move {
            http::request(address, "GET", "/", &[("X-authentik-username", user)], b"")
                .await
                .unwrap()
                .status
        });
        // The next one asks only when this one is known to wait: the first step of each is the question for the name.
        let instance = &instances[position];
        wait_for("question for the cookie's name", async || {
            !instance.seen().is_empty()
        })
        .await;
        tokio::time::sleep(Duration::from_millis(30)).await;
    }
    assert!(
        visits
            .join_all()
            .await
            .into_iter()
            .all(|status| status == 302)
    );
    let notes = mint::notes(base.path());
    let mut running = 0_i32;
    for note in &notes {
        running += if note.starts_with("start") { 1 } else { -1 };
        assert!((0..=2).contains(&running), "{notes:?}");
    }
    let starts: Vec<&str> = notes
        .iter()
        .filter_map(|note| note.strip_prefix("start "))
        .collect();
    // Two begin together, so only pairs have an order.
    for (pair, expected) in starts.chunks(2).zip(USERS.chunks(2)) {
        assert!(
            expected.iter().all(|user| pair.contains(user)),
            "{starts:?}"
        );
    }
}

/// It is the mint that costs something. An instance that takes the credential and hangs takes nobody's turn.
#[tokio::test]
async fn an_instance_that_hangs_holds_up_nobody_else() {
    let world = World::with(|setup| {
        setup
            .set("session.check_timeout", "200ms")
            .set("pairing.max_concurrent", 1)
            .set("pairing.exchange_timeout", "5s")
    })
    .await;
    world.alice.set(|vices| vices.silent = true);
    let alice = world.dispatcher.navigate("alice", "");
    tokio::pin!(alice);
    let bob = async {
        wait_for("mint of alice's", async || world.mints() > 0).await;
        world.dispatcher.navigate("bob", "").await
    };
    tokio::select! {
        reply = &mut alice => panic!("{reply:?}"),
        reply = bob => assert_eq!(reply.status, 302),
    }
    let refused = alice.await;
    assert_eq!(refused.get("x-t3-dispatch-error"), Some("bootstrap-failed"));
}

#[tokio::test]
async fn a_turn_that_does_not_come_is_given_up() {
    let world = World::with(|setup| {
        let slow = mint::script(
            &setup.base,
            "mint-stuck",
            &format!("[ $user = bob ] && sleep 30\n{}", mint::MINT),
        );
        setup
            .set("pairing.mint", slow)
            .set("pairing.max_concurrent", 1)
            .set("pairing.mint_timeout", "28s")
    })
    .await;
    let address = world.dispatcher.address();
    let bob = tokio::spawn(async move {
        http::request(address, "GET", "/", &[("X-authentik-username", "bob")], b"").await
    });
    wait_for("bob's question", async || !world.bob.seen().is_empty()).await;
    tokio::time::sleep(Duration::from_millis(200)).await;
    let start = Instant::now();
    let reply = world.dispatcher.get("alice", "/", &[]).await;
    assert!(start.elapsed() >= Duration::from_secs(20));
    assert_refused(
        &reply,
        503,
        "pairing-busy",
        "too many pairings are waiting; try again shortly",
    );
    assert!(reply.get("retry-after").unwrap().parse::<u64>().unwrap() > 0);
    bob.abort();
}

/// A browser that drops the cookie would be paired for ever.
#[tokio::test]
async fn the_seventh_pairing_in_a_minute_is_refused() {
    let world = World::new().await;
    for _ in 0..6 {
        assert_eq!(world.dispatcher.get("alice", "/", &[]).await.status, 302);
    }
    let reply = world.dispatcher.get("alice", "/", &[]).await;
    let sentence =
        "paired too often within a minute; the browser probably does not keep the session cookie";
    assert_refused(&reply, 429, "pairing-too-often", sentence);
    let again: u64 = reply.get("retry-after").unwrap().parse().unwrap();
    assert!((1..=60).contains(&again));
    assert_eq!(world.mints(), 6);
    // Whoever has a session is not concerned, and neither is anybody else.
    let session = world.alice.new_session();
    assert_eq!(
        world.dispatcher.navigate("alice", &session).await.status,
        200
    );
    assert_eq!(world.dispatcher.get("bob", "/", &[]).await.status, 302);
}

/// Pairing takes seconds; access ends when the table says so, not after them.
#[tokio::test]
async fn a_person_removed_while_pairing_gets_no_cookie() {
    let world = World::with(|setup| {
        let slow = mint::slow(&setup.base, 2.0);
        setup.set("pairing.mint", slow)
    })
    .await;
    let address = world.dispatcher.address();
    let visit = tokio::spawn(async move {
        http::request(
            address,
            "GET",
            "/",
            &[("X-authentik-username", "alice")],
            b"",
        )
        .await
        .unwrap()
    });
    wait_for("mint", async || world.mints() == 1).await;
    world
        .dispatcher
        .write_table(&serde_json::json!({ "bob": { "os_user": "bob", "port": world.bob.port() } }));
    let reply = visit.await.unwrap();
    assert_refused(
        &reply,
        403,
        "unknown-user",
        "no t3 instance provisioned for this user",
    );
}

/// A browser that leaves does not take the pairing of the others with it.
#[tokio::test]
async fn a_visitor_who_leaves_harms_nobody() {
    let world = World::with(|setup| {
        let slow = mint::slow(&setup.base, 1.0);
        setup.set("pairing.mint", slow)
    })
    .await;
    let head = http::head("GET", "/", &[("X-authentik-username", "alice")], 0);
    let mut leaving = http::Client::connect(world.dispatcher.address())
        .await
        .unwrap();
    leaving.send(head).await.unwrap();
    wait_for("mint", async || world.mints() == 1).await;
    drop(leaving);
    assert_eq!(world.dispatcher.get("alice", "/", &[]).await.status, 302);
    assert_eq!(world.mints(), 1);
}

/// A credential that was taken is not taken a second time: the head of a 200 is all that counts.
#[tokio::test]
async fn a_200_is_a_200_whatever_its_body() {
    for rest in [
        "Content-Length: 100\r\n\r\nshort",
        "\r\nand so on",
        "Content-Length: 9999999\r\n\r\n",
    ] {
        let base = tempfile::TempDir::new().unwrap();
        let answer = format!("HTTP/1.1 200 OK\r\nSet-Cookie: t3_session=p.s; Path=/\r\n{rest}");
        let (port, mut asked) = canned(answer, true).await;
        let dispatcher = Setup::new(base.path(), mint::working(base.path()))
            .user("alice", "alice", port)
            .set("session.check_timeout", "200ms")
            .start()
            .await;
        let reply = dispatcher.get("alice", "/", &[]).await;
        assert_eq!(
            (reply.status, reply.cookies()),
            (302, vec!["t3_session=p.s".to_owned()]),
            "{rest:?}"
        );
        // The question for the cookie's name, then one exchange and no other.
        assert!(asked.recv().await.unwrap().starts_with("GET "));
        assert!(
            asked
                .recv()
                .await
                .unwrap()
                .starts_with("POST /api/auth/browser-session ")
        );
        assert!(asked.try_recv().is_err());
    }
}

/// Nothing is minted for an instance that is down, however often its page tries again; once it is up, the next try is paired.
#[tokio::test]
async fn an_instance_that_is_down_costs_no_mint() {
    let world = World::new().await;
    let home = mint::home(world.base(), "alice");
    let World {
        dispatcher,
        alice,
        base,
        ..
    } = world;
    let port = alice.kill().await;
    for _ in 0..20 {
        let reply = dispatcher.get("alice", "/", &[]).await;
        assert_refused(&reply, 502, "bootstrap-failed", "bootstrap request failed");
    }
    assert_eq!(mint::count(base.path(), "alice"), 0);
    let _alice = Instance::start_with(&home, Version::V0_0_33, port, Duration::from_secs(5)).await;
    assert_eq!(dispatcher.get("alice", "/", &[]).await.status, 302);
}

/// Failures cost mints too: after six in a minute the same answer is given without another one.
#[tokio::test]
async fn failures_are_bounded_as_well() {
    let world = World::new().await;
    world.alice.set(|vices| vices.exchange_says = Some(401));
    for _ in 0..20 {
        let reply = world.dispatcher.get("alice", "/", &[]).await;
        assert_refused(&reply, 502, "bootstrap-rejected", "bootstrap rejected");
    }
    assert_eq!(world.mints(), 6);
    assert_eq!(world.dispatcher.get("bob", "/", &[]).await.status, 302);
}

/// The person has another instance by the time the pairing is done: the browser comes back for that one's cookie.
#[tokio::test]
async fn a_person_moved_while_pairing_is_sent_on_without_a_cookie() {
    let world = World::with(|setup| {
        let slow = mint::slow(&setup.base, 2.0);
        setup.set("pairing.mint", slow)
    })
    .await;
    let address = world.dispatcher.address();
    let visit = tokio::spawn(async move {
        http::request(
            address,
            "GET",
            "/",
            &[("X-authentik-username", "alice")],
            b"",
        )
        .await
        .unwrap()
    });
    wait_for("mint", async || world.mints() == 1).await;
    world.dispatcher.write_table(
        &serde_json::json!({ "alice": { "os_user": "bob", "port": world.bob.port() } }),
    );
    let reply = visit.await.unwrap();
    assert_eq!(
        (reply.status, reply.get("location"), reply.cookies().len()),
        (302, Some("/"), 0)
    );
    let reply = world.dispatcher.get("alice", "/", &[]).await;
    assert_eq!((reply.status, reply.cookies().len()), (302, 1));
}

/// A mint command does not outlive the service that asked for it.
#[tokio::test]
async fn a_mint_command_ends_with_the_service() {
    let mut world = World::with(|setup| {
        let script = mint::script(
            &setup.base,
            "mint-hangs",
            "echo \"start $user\" >> \"$base/mints\"\nsleep 7306.25",
        );
        setup
            .set("pairing.mint", script)
            .set("pairing.mint_timeout", "60s")
    })
    .await;
    let address = world.dispatcher.address();
    let visit = tokio::spawn(async move {
        let _ = http::request(
            address,
            "GET",
            "/",
            &[("X-authentik-username", "alice")],
            b"",
        )
        .await;
    });
    wait_for("mint", async || world.mints() == 1 && alive("7306.25")).await;
    world.dispatcher.signal(rustix::process::Signal::INT);
    world.dispatcher.exited().await;
    wait_for("end of the mint's processes", async || !alive("7306.25")).await;
    visit.await.unwrap();
}
