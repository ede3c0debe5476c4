//! Nothing that is worth a session is ever shown.

use crate::common::dispatcher::{Setup, program, wait_for};
use crate::common::http::{self, Client};
use crate::common::mint;
use crate::common::raw::canned;
use crate::world::World;

/// At the finest log level, through success and every kind of failure, no cookie and no credential is logged, counted or
/// put into a page.
#[tokio::test]
async fn no_secret_reaches_a_log_a_metric_or_a_page() {
    let world = World::with(|mut setup| {
        setup.log_level = "trace".into();
        let body = format!("echo 'mint-complaint-secret' >&2\n{}\nprintf '%s' $credential >> \"$base/credentials\"", mint::MINT);
        let script = mint::script(&setup.base, "mint-noted", &body);
        setup.set("pairing.mint", script).set("pairing.per_user_per_minute", 100).set("pairing.exchange_timeout", "1s")
    })
    .await;
    let mut shown = String::new();
    let mut secrets = vec![
        "mint-complaint-secret".to_owned(),
        "ticket-secret".into(),
        "cookie-secret".into(),
    ];
    let paired = world.dispatcher.navigate("alice", "").await;
    let session = paired.cookies().join("; ");
    secrets.push(session.split_once('=').unwrap().1.to_owned());
    let cookies = format!("{session}; other=cookie-secret");
    shown += &world.dispatcher.navigate("alice", &cookies).await.head.line;
    for vice in 0..6 {
        world.alice.set(|vices| {
            *vices = Default::default();
            match vice {
                0 => vices.garbage = true,
                1 => vices.closes_unanswered = true,
                2 => vices.exchange_says = Some(401),
                3 => vices.pairs_without_cookie = true,
                4 => vices.check_says = Some((200, "{\"authenticated\":false}".into())),
                _ => {}
            }
        });
        for cookie in [cookies.as_str(), ""] {
            let reply = world.dispatcher.navigate("alice", cookie).await;
            secrets.extend(
                reply
                    .cookies()
                    .iter()
                    .map(|pair| pair.split_once('=').unwrap().1.to_owned()),
            );
            shown += &reply.text();
            let headers = [("Cookie", cookie)];
            shown += &world
                .dispatcher
                .get("alice", "/ws?wsTicket=ticket-secret", &headers)
                .await
                .text();
        }
    }
    // Requests that cannot be read, or be passed on.
    for head in [
        format!("GET / HTTP/1.1\r\nHost: a\r\nCookie: {cookies}\r\nbad header\r\n\r\n"),
        format!("GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\nCookie: {cookies}\r\n\r\n"),
        format!(
            "GET / HTTP/1.1\r\nHost: a\r\nX-authentik-username: alice\r\nConnection: host\r\nCookie: {cookies}\r\n\r\n"
        ),
        format!("GET /?wsTicket=ticket-secret HTTP/9.9\r\nCookie: {cookies}\r\n\r\n"),
        format!("\0\x01Cookie: {cookies}\r\n\r\n"),
    ] {
        let mut client = Client::connect(world.dispatcher.address()).await.unwrap();
        client.send(head).await.unwrap();
        if let Ok(reply) = client.read_reply("GET").await {
            shown += &reply.text();
        }
    }
    // An answer of the instance that is not HTTP may hold a cookie too.
    let answer = "HTTP/1.1 200 OK\r\nSet-Cookie: t3_session=cookie-secret\r\nbad header\r\n\r\n";
    let (port, _) = canned(answer.into(), false).await;
    world
        .dispatcher
        .write_table(&serde_json::json!({ "alice": { "os_user": "alice", "port": port } }));
    world.dispatcher.wait_for_log("table-reloaded").await;
    for cookie in [cookies.as_str(), "t3_session=cookie-secret", ""] {
        shown += &world.dispatcher.navigate("alice", cookie).await.text();
    }
    let credentials = std::fs::read_to_string(world.base().join("credentials")).unwrap();
    assert!(credentials.len() >= 12 * 4);
    secrets.extend(
        credentials
            .as_bytes()
            .chunks(12)
            .map(|one| String::from_utf8(one.into()).unwrap()),
    );
    shown += &world.dispatcher.metrics().await;
    let log = world.dispatcher.log();
    assert!(log.contains("pairing-failed") && log.contains("paired user=alice"));
    for secret in secrets {
        assert!(!log.contains(&secret), "{secret:?} was logged:\n{log}");
        assert!(!shown.contains(&secret), "{secret:?} was shown");
    }
}

/// No core dump is written, and no other process of the same user reads the memory: the kernel then gives the process's
/// files in `/proc` to root, whoever it runs as.
#[tokio::test]
async fn the_process_is_not_dumpable() {
    use std::os::unix::fs::{MetadataExt, PermissionsExt};
    use std::os::unix::process::CommandExt;
    const NOBODY: u32 = 65534;
    let base = tempfile::TempDir::new().unwrap();
    std::fs::set_permissions(base.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    let setup = Setup::new(base.path(), mint::working(base.path()));
    let address = (setup.ip, 3780).into();
    let mut command = program();
    command.args(["serve", "-c"]).arg(setup.write());
    if rustix::process::getuid().is_root() {
        command.uid(NOBODY);
    }
    let mut child = command.spawn().unwrap();
    wait_for("start", async || {
        http::request(address, "GET", "/healthz", &[], b"")
            .await
            .is_ok()
    })
    .await;
    let owner = std::fs::metadata(format!("/proc/{}/fd", child.id()))
        .unwrap()
        .uid();
    child.kill().unwrap();
    child.wait().unwrap();
    assert_eq!(owner, 0);
}
