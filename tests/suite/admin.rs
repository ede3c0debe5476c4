//! The operator's listener.

use serde_json::json;

use crate::common::http::{self, Reply};
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
    let requests = async |outcome: &str, status: &str| {
        let series =
            format!("t3dispatch_requests_total{{outcome=\"{outcome}\",status=\"{status}\"}}");
        world.dispatcher.metric(&series).await
    };
    let health_before = requests("health", "2xx").await;
    assert!(health_before >= 1.0);
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
    world.alice.set(|vices| vices.closes_unanswered = true);
    world
        .dispatcher
        .get("alice", "/", &[("Cookie", &session)])
        .await;
    assert_eq!(requests("proxied", "2xx").await, 1.0);
    assert_eq!(requests("proxied", "4xx").await, 1.0);
    assert_eq!(requests("paired", "3xx").await, 1.0);
    assert_eq!(requests("refused", "4xx").await, 1.0);
    assert_eq!(requests("failed", "5xx").await, 1.0);
    let first_byte = "t3dispatch_time_to_first_byte_seconds_count{status=\"2xx\"}";
    assert_eq!(world.dispatcher.metric(first_byte).await, 1.0);
    assert_eq!(
        world
            .dispatcher
            .metric("t3dispatch_session_checks_total{result=\"alive\"}")
            .await,
        0.0
    );
    world.alice.set(|vices| *vices = Default::default());
    world.dispatcher.navigate("alice", &session).await;
    assert_eq!(
        world
            .dispatcher
            .metric("t3dispatch_session_checks_total{result=\"alive\"}")
            .await,
        1.0
    );
    let build = format!(
        "t3dispatch_build_info{{version=\"{}\"}}",
        env!("CARGO_PKG_VERSION")
    );
    assert_eq!(world.dispatcher.metric(&build).await, 1.0);
}

/// What is served and what is documented are the same.
#[tokio::test]
async fn every_metric_is_documented_and_no_other() {
    let world = World::new().await;
    let session = world.alice.new_session();
    world.dispatcher.navigate("alice", "").await;
    world.dispatcher.navigate("alice", &session).await;
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
