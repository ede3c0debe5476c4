//! Is there a session? The cookie's name is the instance's to say, and only a navigation is checked.

use serde_json::json;

use crate::common::dispatcher::Setup;
use crate::common::instance::{Instance, Version};
use crate::common::mint;
use crate::world::World;

const NAVIGATION: (&str, &str) = ("Sec-Fetch-Dest", "document");

#[tokio::test]
async fn the_cookie_is_called_as_the_instance_says() {
    for version in [Version::V0_0_24, Version::V0_0_28, Version::V0_0_33] {
        let base = tempfile::TempDir::new().unwrap();
        let instance = Instance::start(&mint::home(base.path(), "alice"), version).await;
        let setup = Setup::new(base.path(), mint::working(base.path())).user(
            "alice",
            "alice",
            instance.port(),
        );
        let dispatcher = setup.start().await;
        // Cookies of other instances on the same site do not count.
        let others = "t3_session_1_000000000000=x.y; theme=dark";
        assert_eq!(
            dispatcher
                .get("alice", "/", &[("Cookie", others)])
                .await
                .status,
            302
        );
        let ours = format!("{others}; {}", instance.new_session());
        assert_eq!(
            dispatcher
                .get("alice", "/", &[("Cookie", &ours)])
                .await
                .status,
            200
        );
        // It was asked once, before the first decision, and without a cookie.
        let asked = instance.seen_at("/api/auth/session");
        assert_eq!(asked.len(), 1);
        assert_eq!(asked[0].head.get("cookie"), None);
        assert_eq!(instance.seen()[0].head.target(), "/api/auth/session");
    }
}

#[tokio::test]
async fn a_readable_answer_without_a_name_means_the_old_name() {
    let world = World::new().await;
    world.bob.set(|vices| vices.hides_cookie_name = true);
    let other = "t3_session_1_000000000000=x.y";
    assert_eq!(
        world
            .dispatcher
            .get("bob", "/", &[("Cookie", other)])
            .await
            .status,
        302
    );
    let session = world.bob.new_session();
    assert_eq!(
        world
            .dispatcher
            .get("bob", "/", &[("Cookie", &session)])
            .await
            .status,
        200
    );
}

/// While the instance cannot be asked, every possible name counts, so nobody is paired anew for nothing.
#[tokio::test]
async fn an_instance_that_cannot_be_asked_costs_no_session() {
    let world = World::new().await;
    let session = world.alice.new_session();
    world.alice.set(|vices| vices.check_breaks = true);
    for cookie in [
        session.as_str(),
        "t3_session=x.y",
        "t3_session_9_abcdefabcdef=x.y",
    ] {
        assert_eq!(
            world
                .dispatcher
                .get("alice", "/", &[("Cookie", cookie)])
                .await
                .status,
            200,
            "{cookie}"
        );
        assert_eq!(
            world.dispatcher.navigate("alice", cookie).await.status,
            200,
            "{cookie}"
        );
    }
    assert_eq!(world.mints(), 0);
    // Without any such cookie there is nothing to lose.
    assert_eq!(
        world
            .dispatcher
            .get("alice", "/", &[("Cookie", "t3_sessions=x.y")])
            .await
            .status,
        302
    );
}

#[tokio::test]
async fn a_restart_of_either_side_keeps_the_session() {
    let base = tempfile::TempDir::new().unwrap();
    let home = mint::home(base.path(), "alice");
    let instance = Instance::start(&home, Version::V0_0_33).await;
    let port = instance.port();
    let setup = || Setup::new(base.path(), mint::working(base.path())).user("alice", "alice", port);
    let dispatcher = setup().start().await;
    let session = dispatcher.navigate("alice", "").await.cookies().join("; ");
    assert_eq!(dispatcher.navigate("alice", &session).await.status, 200);

    instance.kill().await;
    assert_eq!(dispatcher.navigate("alice", &session).await.status, 502);
    drop(dispatcher);
    // The dispatcher starts before the instance: it knows no name yet.
    let dispatcher = setup().start().await;
    assert_eq!(dispatcher.navigate("alice", &session).await.status, 502);
    let instance = Instance::start_with(
        &home,
        Version::V0_0_33,
        port,
        std::time::Duration::from_secs(5),
    )
    .await;
    assert_eq!(dispatcher.navigate("alice", &session).await.status, 200);
    assert_eq!(mint::count(base.path(), "alice"), 1);
    drop(instance);
}

/// An instance that is upgraded under a running dispatcher changes the name of its cookie.
#[tokio::test]
async fn an_upgrade_of_the_instance_is_learnt_from_the_next_check() {
    let base = tempfile::TempDir::new().unwrap();
    let instance = Instance::start(&mint::home(base.path(), "alice"), Version::V0_0_28).await;
    let setup =
        Setup::new(base.path(), mint::working(base.path())).user("alice", "alice", instance.port());
    let dispatcher = setup.start().await;
    let old = dispatcher.navigate("alice", "").await.cookies().join("; ");
    assert!(old.starts_with("t3_session="));
    instance.set(|vices| vices.upgraded_to = Some(Version::V0_0_33));
    // The browser has a cookie under either name: the check under the old one teaches the new one.
    let both = format!("{old}; {}", instance.new_session());
    assert_eq!(dispatcher.navigate("alice", &both).await.status, 200);
    // Another browser has the old one only, and is paired.
    let reply = dispatcher.navigate("alice", &old).await;
    assert_eq!(reply.status, 302);
    assert!(reply.cookies()[0].starts_with(&instance.cookie_name()));
}

#[tokio::test]
async fn a_dead_session_is_paired_anew_only_on_a_navigation() {
    let world = World::new().await;
    let session = world
        .dispatcher
        .navigate("alice", "")
        .await
        .cookies()
        .join("; ");
    world.alice.forget_sessions();
    let cookie = ("Cookie", session.as_str());
    // Sub-requests get the instance's own answer, whatever it is.
    for headers in [
        &[cookie][..],
        &[cookie, ("Sec-Fetch-Dest", "empty"), ("Accept", "text/html")],
        &[cookie, ("Accept", "application/json")],
    ] {
        let reply = world
            .dispatcher
            .get("alice", "/api/auth/session", headers)
            .await;
        assert!(reply.text().contains("\"authenticated\":false"));
    }
    for method in ["POST", "HEAD", "PUT"] {
        let reply = world
            .dispatcher
            .request("alice", method, "/api/thing", &[cookie, NAVIGATION])
            .await;
        assert!(
            matches!(reply.status, 200 | 404),
            "{method}: {}",
            reply.status
        );
    }
    assert_eq!(world.mints(), 1);
    for headers in [
        &[cookie, NAVIGATION][..],
        &[cookie, ("Accept", "text/html,application/xhtml+xml")],
    ] {
        world.alice.forget_sessions();
        let reply = world.dispatcher.get("alice", "/deep/link", headers).await;
        assert_eq!((reply.status, reply.get("location")), (302, Some("/")));
    }
    assert_eq!(world.mints(), 3);
}

/// No session at all: every kind of request is paired.
#[tokio::test]
async fn without_a_cookie_every_request_is_paired() {
    let world = World::with(|setup| setup.set("pairing.per_user_per_minute", 100)).await;
    for method in ["GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS"] {
        let reply = world
            .dispatcher
            .request("alice", method, "/api/thing?x=1", &[])
            .await;
        assert_eq!(
            (reply.status, reply.get("location")),
            (302, Some("/")),
            "{method}"
        );
        assert_eq!(reply.cookies().len(), 1);
    }
    let upgrade = [
        ("Connection", "Upgrade"),
        ("Upgrade", "websocket"),
        ("Sec-WebSocket-Key", "a"),
        ("Sec-WebSocket-Version", "13"),
    ];
    assert_eq!(
        world.dispatcher.get("alice", "/ws", &upgrade).await.status,
        302
    );
}

#[tokio::test]
async fn the_check_carries_the_session_cookie_alone() {
    let world = World::new().await;
    let session = world.alice.new_session();
    let cookies = format!("theme=dark; {session}; csrf=1; {session}-second");
    assert_eq!(
        world.dispatcher.navigate("alice", &cookies).await.status,
        200
    );
    let checks = world.alice.seen_at("/api/auth/session");
    let check = &checks.last().unwrap().head;
    assert_eq!(check.get("cookie"), Some(session.as_str()));
    assert_eq!(check.get("x-authentik-username"), None);
    // What is proxied is untouched.
    assert_eq!(
        world.alice.seen().last().unwrap().head.get("cookie"),
        Some(cookies.as_str())
    );
}

/// Only a definite "no" costs a session; everything else fails open.
#[tokio::test]
async fn a_check_without_a_clear_answer_proxies() {
    let world = World::with(|setup| setup.set("session.check_timeout", "300ms")).await;
    let dead = world.alice.new_session();
    assert_eq!(world.dispatcher.navigate("alice", &dead).await.status, 200);
    world.alice.forget_sessions();
    for (status, body) in [
        (500, "{\"authenticated\":false}"),
        (401, "{\"authenticated\":false}"),
        (200, "<!doctype html>"),
        (200, "{\"authenticated\":fal"),
        (200, "{\"authenticated\":\"no\"}"),
        (200, "[]"),
        (200, ""),
    ] {
        world
            .alice
            .set(|vices| vices.check_says = Some((status, body.into())));
        assert_eq!(
            world.dispatcher.navigate("alice", &dead).await.status,
            200,
            "{status} {body}"
        );
    }
    world.alice.set(|vices| vices.check_breaks = true);
    assert_eq!(world.dispatcher.navigate("alice", &dead).await.status, 200);
    world.alice.set(|vices| vices.check_breaks = false);
    assert_eq!(world.mints(), 0);
    for body in [
        json!({ "authenticated": false }),
        json!({}),
        json!({ "authenticated": null }),
    ] {
        world
            .alice
            .set(|vices| vices.check_says = Some((200, body.to_string())));
        let cookie = format!(
            "{dead}; {}",
            dead.replace(&world.alice.cookie_name(), "t3_session")
        );
        assert_eq!(
            world.dispatcher.navigate("alice", &cookie).await.status,
            302,
            "{body}"
        );
    }
}

/// A check that is not answered in time proxies, and the person waits for the limit and no longer.
#[tokio::test]
async fn a_silent_instance_is_not_waited_for_beyond_the_limit() {
    let world = World::with(|setup| setup.set("session.check_timeout", "300ms")).await;
    let session = world.alice.new_session();
    assert_eq!(
        world.dispatcher.navigate("alice", &session).await.status,
        200
    );
    world.alice.set(|vices| vices.silent = true);
    let navigation = world.dispatcher.navigate("alice", &session);
    // The request itself hangs at the instance after that, as it would without us.
    assert!(
        tokio::time::timeout(std::time::Duration::from_secs(2), navigation)
            .await
            .is_err()
    );
    let checks = world.alice.seen_at("/api/auth/session").len();
    assert_eq!(
        checks, 3,
        "one to learn the name, one alive, one unanswered"
    );
    assert_eq!(world.alice.seen().last().unwrap().head.target(), "/");
    assert_eq!(
        world
            .dispatcher
            .metric("t3dispatch_session_checks_total{result=\"unknown\"}")
            .await,
        1.0
    );
}

/// Only the first question about the cookie's name is waited for. While the instance does not answer it, requests go on.
#[tokio::test]
async fn a_check_that_hangs_holds_up_nobody_twice() {
    let world = World::with(|setup| setup.set("session.check_timeout", "2s")).await;
    world.alice.set(|vices| vices.check_hangs = true);
    let cookie = [("Cookie", "t3_session_1_000000000000=x")];
    assert_eq!(
        world.dispatcher.navigate("alice", cookie[0].1).await.status,
        200
    );
    // The navigation that has waited for the name is not made to wait for a check as well.
    assert_eq!(world.alice.seen_at("/api/auth/session").len(), 1);
    for _ in 0..30 {
        let reply = world.dispatcher.get("alice", "/__test/next", &cookie);
        let reply = tokio::time::timeout(std::time::Duration::from_millis(1500), reply).await;
        assert_eq!(reply.expect("an answer at once").status, 200);
        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
    }
    assert!(
        world.alice.seen_at("/api/auth/session").len() >= 2,
        "asked again meanwhile"
    );
}
