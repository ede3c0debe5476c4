//! The operator's listener.

use serde_json::json;

use crate::common::dispatcher::wait_for;
use crate::common::http::{self, Reply};
use crate::common::raw::ask as ask_for_socket;
use crate::world::World;

async fn ask(world: &World, path: &str) -> Reply {
    http::request(world.dispatcher.admin(), "GET", path, &[], b"")
        .await
        .unwrap()
}

#[tokio::test]
async fn health_and_readiness() {
    let world = World::new().await;
    assert_eq!(ask(&world, "/healthz").await.text(), "ok\n");
    let ready = ask(&world, "/readyz").await;
    assert_eq!((ready.status, ready.text().as_str()), (200, "ready\n"));
    assert_eq!(ask(&world, "/").await.status, 404);
    // The operator's paths are nothing special on the main listener.
    assert_eq!(
        world
            .dispatcher
            .get("mallory", "/metrics", &[])
            .await
            .status,
        403
    );

    let world =
        World::with(|setup| setup.set("pairing.mint", json!(["/nonexistent/t3-mint"]))).await;
    let ready = ask(&world, "/readyz").await;
    assert_eq!(ready.status, 503);
    assert!(
        ready.text().contains("dispatch.pairing.mint")
            && ready.text().contains("/nonexistent/t3-mint")
    );
    assert_eq!(ask(&world, "/healthz").await.status, 200);
}

#[tokio::test]
async fn requests_are_counted_by_outcome_and_status() {
    let world = World::new().await;
    let session = world.alice.new_session();
    // A request is counted when it is over, which its client may know a moment earlier.
    let counted = async |series: &str, count: f64| {
        wait_for(&format!("{count} of {series}"), async || {
            world.dispatcher.metric(series).await == count
        })
        .await;
    };
    let requests = |outcome: &str, status: &str| {
        format!("t3dispatch_requests_total{{outcome=\"{outcome}\",status=\"{status}\"}}")
    };
    let health = requests("health", "2xx");
    wait_for("health check", async || {
        world.dispatcher.metric(&health).await >= 1.0
    })
    .await;
    world
        .dispatcher
        .get("alice", "/", &[("Cookie", &session)])
        .await;
    world
        .dispatcher
        .request("alice", "POST", "/api/unknown", &[("Cookie", &session)])
        .await;
    world.dispatcher.navigate("alice", "").await;
    world.dispatcher.get("mallory", "/", &[]).await;
    world.dispatcher.get("mallory", "/probe/ws", &[]).await;
    world.alice.set(|vices| vices.closes_unanswered = true);
    world
        .dispatcher
        .get("alice", "/", &[("Cookie", &session)])
        .await;
    counted(&requests("proxied", "2xx"), 1.0).await;
    counted(&requests("proxied", "4xx"), 1.0).await;
    counted(&requests("paired", "3xx"), 1.0).await;
    counted(&requests("refused", "4xx"), 2.0).await;
    counted(&requests("failed", "5xx"), 1.0).await;
    counted(
        "t3dispatch_time_to_first_byte_seconds_count{status=\"2xx\"}",
        1.0,
    )
    .await;
    let alive = "t3dispatch_session_checks_total{result=\"alive\"}";
    counted(alive, 0.0).await;
    world.alice.set(|vices| *vices = Default::default());
    world.dispatcher.navigate("alice", &session).await;
    counted(alive, 1.0).await;
    counted(
        &format!(
            "t3dispatch_build_info{{version=\"{}\"}}",
            env!("CARGO_PKG_VERSION")
        ),
        1.0,
    )
    .await;
}

/// What is served and what is documented are the same.
#[tokio::test]
async fn every_metric_is_documented_and_no_other() {
    let world = World::with(|setup| {
        setup.set("tunnels.per_user_metrics", true).set(
            "probe",
            serde_json::json!({ "token": "a-token-for-the-tests" }),
        )
    })
    .await;
    let session = world.alice.new_session();
    world.dispatcher.navigate("alice", "").await;
    world.dispatcher.navigate("alice", &session).await;
    let (status, client) =
        ask_for_socket(world.dispatcher.address(), "alice", &[("Cookie", &session)]).await;
    assert_eq!(status, 101);
    drop(client);
    world.dispatcher.wait_for_records(1).await;
    world.alice.set(|vices| vices.closes_unanswered = true);
    world
        .dispatcher
        .get("alice", "/", &[("Cookie", &session)])
        .await;
    let docs = include_str!("../../docs/metrics.md");
    let metrics = world.dispatcher.metrics().await;
    let served: Vec<&str> = metrics
        .lines()
        .filter_map(|line| line.strip_prefix("# TYPE ")?.split(' ').next())
        .collect();
    let documented: Vec<&str> = docs
        .lines()
        .filter_map(|line| line.strip_prefix("| `")?.split('`').next())
        .collect();
    assert!(served.len() >= 10 && served.iter().all(|name| name.starts_with("t3dispatch_")));
    for name in &served {
        assert!(
            documented.contains(name),
            "{name} is not in docs/metrics.md"
        );
    }
    for name in documented {
        assert!(served.contains(&name), "{name} is only in docs/metrics.md");
    }
}
