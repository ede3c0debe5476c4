//! Who is asking, and health checks for anybody.

use crate::common::http::{self, Client, HANDSHAKE};
use crate::world::World;

#[tokio::test]
async fn health_is_for_anybody() {
    let world =
        World::with(|setup| setup.set("identity.trusted_proxies", vec!["192.0.2.0/24"])).await;
    for path in ["/healthz", "/probe/healthz", "/healthz?deep=1"] {
        let reply = http::request(world.dispatcher.address(), "GET", path, &[], b"")
            .await
            .unwrap();
        assert_eq!(
            (reply.status, reply.text().as_str()),
            (200, "ok\n"),
            "{path}"
        );
        assert_eq!(reply.get("content-type"), Some("text/plain; charset=utf-8"));
    }
    let head = http::request(world.dispatcher.address(), "HEAD", "/healthz", &[], b"")
        .await
        .unwrap();
    assert_eq!((head.status, head.get("content-length")), (200, Some("3")));
    assert!(world.alice.seen().is_empty() && world.bob.seen().is_empty());
}

#[tokio::test]
async fn only_trusted_proxies_name_people() {
    let world =
        World::with(|setup| setup.set("identity.trusted_proxies", vec!["192.0.2.0/24", "::1/128"]))
            .await;
    // What instances, or what people run in them, may take for a name or an address.
    let forwarded = [
        ("Forwarded", "for=192.0.2.1;by=192.0.2.1"),
        ("X-Forwarded-For", "192.0.2.1"),
        ("X-Forwarded-Host", "t3.example.com"),
        ("X-Forwarded-User", "alice"),
    ];
    for extra in [&[][..], &HANDSHAKE, &forwarded] {
        let reply = world.dispatcher.get("alice", "/", extra).await;
        assert_eq!(reply.status, 403);
        assert_eq!(reply.get("x-t3-dispatch-error"), Some("untrusted-proxy"));
        assert_eq!(
            reply.text(),
            "127.0.0.1 may not say who is asking: add it to dispatch.identity.trusted_proxies if it is the sign-on edge\n"
        );
    }
    assert!(world.alice.seen().is_empty() && world.mints() == 0);
}

#[tokio::test]
async fn ambiguous_identities_are_refused() {
    let world = World::new().await;
    for (name, value) in [
        ("X-authentik-username", "alice@example.com"),
        ("x-authentik-username", "bob"),
        ("X_authentik_username", "bob"),
        ("X-Authentik.Username", "bob"),
        ("X_Authentik-Username", "alice"),
    ] {
        for extra in [&[][..], &HANDSHAKE] {
            let reply = world
                .dispatcher
                .get("alice", "/", &[&[(name, value)], extra].concat())
                .await;
            assert_eq!(
                (reply.status, reply.get("x-t3-dispatch-error")),
                (400, Some("ambiguous-identity")),
                "{name}"
            );
        }
    }
    // A look-alike alone names nobody either.
    let alone = [("X_authentik_username", "alice")];
    let reply = http::request(world.dispatcher.address(), "GET", "/", &alone, b"")
        .await
        .unwrap();
    assert_eq!(reply.status, 400);
    assert!(world.alice.seen().is_empty() && world.bob.seen().is_empty() && world.mints() == 0);
}

#[tokio::test]
async fn missing_empty_and_unknown_names_have_no_instance() {
    let world = World::new().await;
    for identity in [
        None,
        Some(""),
        Some("@example.com"),
        Some("mallory@example.com"),
        Some("Alice"),
        Some("älice"),
    ] {
        for extra in [&[][..], &HANDSHAKE] {
            let mut headers: Vec<_> = identity
                .map(|name| ("X-authentik-username", name))
                .into_iter()
                .collect();
            headers.extend(extra);
            let reply = http::request(world.dispatcher.address(), "GET", "/", &headers, b"")
                .await
                .unwrap();
            assert_eq!(reply.status, 403, "{identity:?}");
            assert_eq!(reply.get("x-t3-dispatch-error"), Some("unknown-user"));
            assert_eq!(reply.text(), "no t3 instance provisioned for this user\n");
        }
    }
    assert!(world.alice.seen().is_empty() && world.bob.seen().is_empty());
}

#[tokio::test]
async fn the_header_and_the_networks_are_settings() {
    let world = World::with(|setup| {
        setup
            .set("identity.header", "Remote-User")
            .set("identity.trusted_proxies", vec!["127.0.0.1"])
    })
    .await;
    let session = world.alice.new_session();
    let headers = [
        ("Remote-User", "alice"),
        ("Cookie", session.as_str()),
        ("X-authentik-username", "bob"),
    ];
    let reply = http::request(world.dispatcher.address(), "GET", "/", &headers, b"")
        .await
        .unwrap();
    assert!(reply.text().contains("alice's workspace"));
}

/// One connection from the edge carries many people's requests; each is judged by itself.
#[tokio::test]
async fn a_kept_connection_carries_several_people() {
    let world = World::new().await;
    let (alice, bob) = (world.alice.new_session(), world.bob.new_session());
    let mut client = Client::connect(world.dispatcher.address()).await.unwrap();
    for _ in 0..3 {
        for (user, cookie, body) in [
            ("alice", alice.as_str(), "alice's workspace"),
            ("bob", bob.as_str(), "bob's workspace"),
            ("mallory", alice.as_str(), "no t3 instance provisioned"),
        ] {
            let headers = [("X-authentik-username", user), ("Cookie", cookie)];
            let reply = client.request("GET", "/", &headers, b"").await.unwrap();
            assert!(reply.text().contains(body), "{user}: {}", reply.text());
        }
    }
}

/// Requests that a client sends without waiting are answered in their order, each under its own name.
#[tokio::test]
async fn pipelined_requests_keep_their_order_and_identity() {
    let world = World::new().await;
    let (alice, bob) = (world.alice.new_session(), world.bob.new_session());
    let mut client = Client::connect(world.dispatcher.address()).await.unwrap();
    let alice = http::head(
        "GET",
        "/",
        &[("X-authentik-username", "alice"), ("Cookie", &alice)],
        0,
    );
    let bob = http::head(
        "GET",
        "/",
        &[("X-authentik-username", "bob"), ("Cookie", &bob)],
        0,
    );
    client.send(format!("{alice}{bob}{alice}")).await.unwrap();
    for name in ["alice", "bob", "alice"] {
        let reply = client.read_reply("GET").await.unwrap();
        assert!(
            reply.text().contains(&format!("{name}'s workspace")),
            "{}",
            reply.text()
        );
    }
}
