//! What the operator installs beside the service: rules, scrape jobs, a dashboard and a runbook.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

fn root() -> PathBuf {
    env!("CARGO_MANIFEST_DIR").into()
}

fn read(path: impl AsRef<Path>) -> String {
    let path = root().join(path);
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// The alerts fire when they should and not else, by promtool, and the scrape jobs are what Prometheus takes.
#[test]
fn the_rules_pass_their_tests() {
    let output = Command::new(root().join("packaging/prometheus/tests/run"))
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
}

/// All strings under `key`, wherever.
fn under<'a>(value: &'a Value, key: &str, found: &mut Vec<&'a str>) {
    match value {
        Value::Object(map) => {
            for (name, value) in map {
                match value.as_str() {
                    Some(text) if name == key => found.push(text),
                    _ => under(value, key, found),
                }
            }
        }
        Value::Array(list) => list.iter().for_each(|value| under(value, key, found)),
        _ => {}
    }
}

/// The metrics that a query names: words that are no label, function or keyword have one of these beginnings.
fn metrics(query: &str) -> BTreeSet<String> {
    let mut plain = String::new();
    for (place, part) in query.split('"').enumerate() {
        // Every other part is a string, which may look like anything.
        plain += if place % 2 == 0 { part } else { "" };
    }
    let is_word = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == ':';
    plain
        .split(|c| !is_word(c))
        .filter(|word| {
            ["t3dispatch_", "t3probe_", "node_", "probe_"]
                .iter()
                .any(|start| word.starts_with(start))
        })
        .map(|word| {
            let base = word.strip_suffix("_bucket");
            let base = base.or_else(|| {
                word.strip_suffix("_seconds_count")
                    .map(|_| &word[..word.len() - 6])
            });
            base.unwrap_or(word).to_owned()
        })
        .collect()
}

#[test]
fn every_query_names_a_metric_that_exists() {
    let rules: Value =
        yaml_serde::from_str(&read("packaging/prometheus/t3-dispatch.rules.yml")).unwrap();
    let dashboard: Value =
        serde_json::from_str(&read("packaging/grafana/t3-dispatch.json")).unwrap();
    let mut queries = Vec::new();
    under(&rules, "expr", &mut queries);
    let of_rules = queries.len();
    under(&dashboard, "expr", &mut queries);
    assert!(
        of_rules >= 8 && queries.len() - of_rules >= 30,
        "{}",
        queries.len()
    );
    let docs = read("docs/metrics.md") + &read("docs/probe.md");
    // Of node_exporter and blackbox_exporter.
    let foreign = [
        "node_pressure_cpu_waiting_seconds_total",
        "node_pressure_io_waiting_seconds_total",
        "node_pressure_memory_waiting_seconds_total",
        "probe_success",
        "probe_http_status_code",
        "probe_failed_due_to_regex",
        "probe_duration_seconds",
    ];
    let mut own = BTreeSet::new();
    for query in queries {
        let named = metrics(query);
        assert!(!named.is_empty() || query.contains("up{"), "{query}");
        for metric in named {
            let known = docs.contains(&format!("| `{metric}`"));
            assert!(
                known || foreign.contains(&metric.as_str()),
                "{metric} in {query}"
            );
            if known {
                own.insert(metric);
            }
        }
    }
    assert!(own.len() >= 20, "{own:?}");
}

#[test]
fn every_alert_has_its_place_in_the_runbook() {
    let rules: Value =
        yaml_serde::from_str(&read("packaging/prometheus/t3-dispatch.rules.yml")).unwrap();
    let runbook = read("docs/runbooks/t3-drop-attribution.md");
    let (mut alerts, mut urls) = (Vec::new(), Vec::new());
    under(&rules, "alert", &mut alerts);
    under(&rules, "runbook_url", &mut urls);
    for name in [
        "T3ProbeLegDown",
        "T3ProbeDropBurst",
        "T3EgressOnly",
        "T3PairingBroken",
        "T3PairFallbackHigh",
        "T3TableStale",
        "T3LedgerLosing",
        "T3ProbeBehindSignOn",
    ] {
        assert!(alerts.contains(&name), "{name}");
    }
    assert_eq!(alerts.len(), urls.len());
    for (alert, url) in alerts.iter().zip(urls) {
        let anchor = format!(
            "docs/runbooks/t3-drop-attribution.md#{}",
            alert.to_lowercase()
        );
        assert_eq!(url, anchor);
        assert!(runbook.contains(&format!("### {alert}\n")), "{alert}");
    }
}
