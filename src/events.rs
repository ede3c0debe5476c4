//! What is seen from outside: one function per event, which writes its log line and moves its metrics together.
//!
//! Every room writes here and none reads. Log lines are `event key=value …`; metrics begin with `t3dispatch_` and are
//! listed in `docs/metrics.md`. No cookie, credential or request path ever gets here.

use std::fmt;
use std::path::Path;
use std::sync::LazyLock;
use std::time::{Duration, SystemTime};

use http::StatusCode;
use log::{error, info, warn};
use prometheus::{
    Encoder, Gauge, Histogram, HistogramOpts, HistogramVec, IntCounterVec, IntGauge, IntGaugeVec,
    Opts, Registry, TextEncoder,
};

use crate::pair::{PairError, Paired};
use crate::refuse::Refusal;
use crate::session::Verdict;
use crate::table::TableError;

struct Metrics {
    registry: Registry,
    requests: IntCounterVec,
    first_byte: HistogramVec,
    pairings: IntCounterVec,
    mint: Histogram,
    session_checks: IntCounterVec,
    table_reloads: IntCounterVec,
    table_good: Gauge,
    table_users: IntGauge,
    upstream_errors: IntCounterVec,
}

static METRICS: LazyLock<Metrics> = LazyLock::new(|| {
    let registry = Registry::new();
    let counter = |name: &str, help: &str, labels: &[&str]| {
        let counter = IntCounterVec::new(Opts::new(name, help), labels).expect("a valid metric");
        register(&registry, &counter);
        counter
    };
    let seconds = |name: &str, help: &str, buckets: &[f64]| {
        HistogramOpts::new(name, help).buckets(buckets.to_vec())
    };
    let build = IntGaugeVec::new(
        Opts::new("t3dispatch_build_info", "Always 1; the version is a label."),
        &["version"],
    )
    .expect("a valid metric");
    register(&registry, &build);
    build.with_label_values(&[env!("CARGO_PKG_VERSION")]).set(1);

    let metrics = Metrics {
        requests: counter(
            "t3dispatch_requests_total",
            "Requests by what became of them and by class of status.",
            &["outcome", "status"],
        ),
        first_byte: HistogramVec::new(
            seconds(
                "t3dispatch_time_to_first_byte_seconds",
                "From a proxied request's head to its response's head; WebSockets are left out.",
                &[
                    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0,
                    30.0, 60.0,
                ],
            ),
            &["status"],
        )
        .expect("a valid metric"),
        pairings: counter(
            "t3dispatch_pairings_total",
            "Pairings by result and by the endpoint that gave it.",
            &["result", "endpoint"],
        ),
        mint: Histogram::with_opts(seconds(
            "t3dispatch_mint_seconds",
            "How long the mint command ran.",
            &[0.05, 0.1, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 5.0, 7.5, 10.0],
        ))
        .expect("a valid metric"),
        session_checks: counter(
            "t3dispatch_session_checks_total",
            "Session checks on document navigations by result.",
            &["result"],
        ),
        table_reloads: counter(
            "t3dispatch_table_reloads_total",
            "Readings of a changed dispatch table by result.",
            &["result"],
        ),
        table_good: Gauge::with_opts(Opts::new(
            "t3dispatch_table_last_good_load_timestamp_seconds",
            "When the dispatch table was last read and found good, in Unix time.",
        ))
        .expect("a valid metric"),
        table_users: IntGauge::with_opts(Opts::new(
            "t3dispatch_table_users",
            "Users in the dispatch table in force.",
        ))
        .expect("a valid metric"),
        upstream_errors: counter(
            "t3dispatch_upstream_errors_total",
            "Requests that an instance did not answer, by kind of error.",
            &["kind"],
        ),
        registry: registry.clone(),
    };
    register(&registry, &metrics.first_byte);
    register(&registry, &metrics.mint);
    register(&registry, &metrics.table_good);
    register(&registry, &metrics.table_users);
    // A series that appears only with its first event makes rate() miss that event.
    for result in ["ok", "failed"] {
        metrics.table_reloads.with_label_values(&[result]);
    }
    for result in ["alive", "dead", "unknown"] {
        metrics.session_checks.with_label_values(&[result]);
    }
    metrics
});

fn register(registry: &Registry, metric: &(impl prometheus::core::Collector + Clone + 'static)) {
    registry
        .register(Box::new(metric.clone()))
        .expect("each metric has a name of its own");
}

/// All metrics in Prometheus' text format, and its content type.
pub fn exposition() -> (Vec<u8>, &'static str) {
    let mut text = Vec::new();
    // Encoding into memory does not fail.
    let _ = TextEncoder::new().encode(&METRICS.registry.gather(), &mut text);
    (text, prometheus::TEXT_FORMAT)
}

/// What became of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// Answered by us, for a health check.
    Health,
    /// Answered by us with a fresh session cookie.
    Paired,
    /// Answered by us with a refusal.
    Refused,
    /// Answered by the instance.
    Proxied,
    /// The instance did not answer, or broke off.
    Failed,
    /// The client left before there was an answer.
    Aborted,
}

impl Outcome {
    fn label(self) -> &'static str {
        match self {
            Outcome::Health => "health",
            Outcome::Paired => "paired",
            Outcome::Refused => "refused",
            Outcome::Proxied => "proxied",
            Outcome::Failed => "failed",
            Outcome::Aborted => "aborted",
        }
    }
}

/// The class of a status as a label; `none` where no response was sent.
fn class(status: Option<StatusCode>) -> &'static str {
    match status.map(|status| status.as_u16() / 100) {
        Some(1) => "1xx",
        Some(2) => "2xx",
        Some(3) => "3xx",
        Some(4) => "4xx",
        Some(5) => "5xx",
        _ => "none",
    }
}

/// A value on a log line: quoted where it could be taken for more than one word or break the line, and cut where it is
/// longer than any name.
struct Word<'a>(&'a str);

/// Characters of a value that are logged at most.
const WORD: usize = 64;

impl fmt::Display for Word<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let plain = |byte: u8| byte.is_ascii_graphic() && !matches!(byte, b'"' | b'=' | b'\\');
        if !self.0.is_empty() && self.0.len() <= WORD && self.0.bytes().all(plain) {
            return f.write_str(self.0);
        }
        let short: String = self.0.chars().take(WORD).collect();
        let cut = if short.len() < self.0.len() {
            "…"
        } else {
            ""
        };
        write!(f, "{short:?}{cut}")
    }
}

fn millis(duration: Duration) -> u128 {
    duration.as_millis()
}

/// The settings have oddities that are no faults.
pub fn settings_warning(text: &str) {
    warn!("settings {text}");
}

/// The service is about to take requests.
pub fn started(listen: &str, users: usize) {
    info!(
        "started version={} listen={listen} users={users}",
        env!("CARGO_PKG_VERSION")
    );
}

/// SIGQUIT came with nobody there to take over; the process goes on serving.
pub fn upgrade_refused(socket: &str) {
    error!(
        "upgrade-refused socket={socket} error=\"no process waits to take over; start one with --upgrade first\""
    );
}

/// The process leaves after a signal.
pub fn stopped(in_flight: usize) {
    info!("stopped in_flight={in_flight}");
}

/// A request is over.
pub fn request(outcome: Outcome, status: Option<StatusCode>) {
    METRICS
        .requests
        .with_label_values(&[outcome.label(), class(status)])
        .inc();
}

/// The head of a proxied response has come.
pub fn first_byte(status: StatusCode, after: Duration) {
    METRICS
        .first_byte
        .with_label_values(&[class(Some(status))])
        .observe(after.as_secs_f64());
}

/// A request was refused.
pub fn refused(refusal: &Refusal, user: Option<&str>) {
    let (code, status) = (refusal.code(), refusal.status().as_u16());
    match user {
        Some(user) => info!("refused code={code} status={status} user={}", Word(user)),
        None => info!("refused code={code} status={status}"),
    }
}

/// The mint command has ended, one way or the other.
pub fn minted(took: Duration) {
    METRICS.mint.observe(took.as_secs_f64());
}

/// A browser was paired.
pub fn paired(user: &str, paired: &Paired, took: Duration) {
    METRICS
        .pairings
        .with_label_values(&["ok", &paired.endpoint])
        .inc();
    info!(
        "paired user={} endpoint={} fallback={} dur_ms={}",
        Word(user),
        paired.endpoint,
        paired.fallback,
        millis(took)
    );
}

/// A pairing failed.
pub fn pairing_failed(user: &str, error: &PairError, took: Duration) {
    let endpoint = error.endpoint().unwrap_or("none");
    METRICS
        .pairings
        .with_label_values(&[error.label(), endpoint])
        .inc();
    warn!(
        "pairing-failed user={} result={} endpoint={endpoint} dur_ms={} error={:?}",
        Word(user),
        error.label(),
        millis(took),
        error.to_string()
    );
}

/// An instance was asked whether a session is alive.
pub fn session_checked(verdict: Verdict) {
    let result = match verdict {
        Verdict::Alive => "alive",
        Verdict::Dead => "dead",
        Verdict::Unknown => "unknown",
    };
    METRICS.session_checks.with_label_values(&[result]).inc();
}

/// An instance did not answer a request.
pub fn upstream_failed(user: &str, port: u16, kind: &str) {
    METRICS.upstream_errors.with_label_values(&[kind]).inc();
    warn!(
        "upstream-failed user={} port={port} kind={kind}",
        Word(user)
    );
}

/// The table's file was read and is good, changed or not.
pub fn table_good(users: usize) {
    METRICS.table_users.set(users as i64);
    let now = SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or_default();
    METRICS.table_good.set(now.as_secs_f64());
}

/// A changed table is in force, or somebody asked for it to be read again.
pub fn table_reloaded(users: usize) {
    METRICS.table_reloads.with_label_values(&["ok"]).inc();
    info!("table-reloaded users={users}");
}

/// The table's file is bad; the last good table stays in force.
pub fn table_rejected(path: &Path, error: &TableError) {
    METRICS.table_reloads.with_label_values(&["failed"]).inc();
    // One line, whatever the number of faults.
    let error = error.to_string().replace("\n  ", "; ");
    error!(
        "table-rejected file={} kept=last-good error={error:?}",
        path.display()
    );
}
