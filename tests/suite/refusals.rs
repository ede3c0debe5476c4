//! What a refused person sees.

use crate::common::http::Client;
use crate::world::World;

const PAGE: [(&str, &str); 2] = [
    ("Sec-Fetch-Dest", "document"),
    ("Accept", "text/html,application/xhtml+xml,*/*;q=0.8"),
];

#[tokio::test]
async fn a_navigation_gets_a_page_and_everything_else_a_sentence() {
    let world = World::new().await;
    let page = world.dispatcher.get("mallory", "/", &PAGE).await;
    assert_eq!(page.status, 403);
    assert_eq!(page.get("x-t3-dispatch-error"), Some("unknown-user"));
    assert_eq!(page.get("content-type"), Some("text/html; charset=utf-8"));
    assert_eq!(page.get("cache-control"), Some("no-store"));
    let text = page.text();
    assert!(
        text.contains("no t3 instance provisioned for this user") && text.contains("unknown-user")
    );
    assert!(text.contains("mallory") && text.contains("prefers-color-scheme: dark"));
    // Self-contained: nothing is loaded from anywhere.
    assert!(
        !text.contains("src=")
            && !text.contains("http://")
            && !text.contains("https://")
            && !text.contains("url(")
    );

    for headers in [
        &[("Accept", "*/*")][..],
        &[("Sec-Fetch-Dest", "empty"), ("Accept", "text/html")],
        &[
            ("Sec-Fetch-Dest", "document"),
            ("Accept", "application/json"),
        ],
    ] {
        let reply = world.dispatcher.get("mallory", "/", headers).await;
        assert_eq!(reply.get("content-type"), Some("text/plain; charset=utf-8"));
        assert_eq!(reply.text(), "no t3 instance provisioned for this user\n");
    }
    let post = world
        .dispatcher
        .request("mallory", "POST", "/", &PAGE)
        .await;
    assert_eq!(post.get("content-type"), Some("text/plain; charset=utf-8"));
}

#[tokio::test]
async fn a_name_cannot_write_into_the_page_or_the_log() {
    let world = World::new().await;
    let name = "<script>alert(1)</script> \"x\" refused code=none";
    let page = world.dispatcher.get(name, "/", &PAGE).await;
    assert!(!page.text().contains("<script>"));
    assert!(
        page.text()
            .contains("&lt;script&gt;alert(1)&lt;/script&gt;")
    );
    let lines = world.dispatcher.logged("unknown-user");
    assert_eq!(lines.len(), 1);
    assert!(
        lines[0].ends_with(r#"user="<script>alert(1)</script> \"x\" refused code=none""#),
        "{}",
        lines[0]
    );
}

#[tokio::test]
async fn a_page_tries_again_by_itself_where_waiting_helps() {
    let world = World::new().await;
    let session = world.alice.new_session();
    assert_eq!(
        world.dispatcher.navigate("alice", &session).await.status,
        200
    );
    let World {
        dispatcher, alice, ..
    } = world;
    alice.kill().await;
    let page = dispatcher.navigate("alice", &session).await;
    assert_eq!(
        (page.status, page.get("x-t3-dispatch-error")),
        (502, Some("instance-unreachable"))
    );
    assert!(page.text().contains("http-equiv=\"refresh\""));
    let page = dispatcher.get("mallory", "/", &PAGE).await;
    assert!(!page.text().contains("http-equiv=\"refresh\""));
}

#[tokio::test]
async fn a_refusal_to_head_has_no_body() {
    let world = World::new().await;
    let mut client = Client::connect(world.dispatcher.address()).await.unwrap();
    for _ in 0..2 {
        let reply = client
            .request("HEAD", "/", &[("X-authentik-username", "mallory")], b"")
            .await
            .unwrap();
        assert_eq!(
            (reply.status, reply.get("content-length")),
            (403, Some("41"))
        );
    }
}

/// A refused upload gets its answer, though nobody wants the body.
#[tokio::test]
async fn a_refused_upload_is_answered() {
    let world = World::new().await;
    let body = vec![b'x'; 200_000];
    for _ in 0..20 {
        let mut client = Client::connect(world.dispatcher.address()).await.unwrap();
        let reply = client
            .request("POST", "/", &[("X-authentik-username", "mallory")], &body)
            .await
            .unwrap();
        assert_eq!(reply.status, 403);
    }
    // Every code has its section.
    let docs = include_str!("../../docs/errors.md");
    let source = include_str!("../../src/refuse.rs");
    let codes: Vec<&str> = source
        .lines()
        .filter_map(|line| line.trim().split_once(" => \"")?.1.strip_suffix("\","))
        .collect();
    assert!(codes.len() >= 14, "{codes:?}");
    for code in codes {
        assert!(
            docs.contains(&format!("\n## {code}\n")),
            "docs/errors.md has no section for {code}"
        );
    }
}
