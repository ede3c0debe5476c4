//! What is seen from outside: one function per event, which writes its log line and moves its metrics together.
//!
//! Every room writes here and none reads. Log lines are `event key=value …`; metrics begin with `t3dispatch_` and are
//! listed in `docs/metrics.md`. No cookie, credential or request path ever gets here.

mod evidence;

use std::fmt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{LazyLock, OnceLock};
use std::time::{Duration, SystemTime};

use http::StatusCode;
use log::{error, info, warn};
use prometheus::{
    Encoder, Gauge, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge,
    IntGaugeVec, Opts, Registry, TextEncoder,
};

use crate::close::Cause;
use crate::config::Jwks;
use crate::jwt::KeyError;
use crate::ledger;
use crate::pair::{PairError, Paired};
use crate::refuse::Refusal;
use crate::session::Verdict;
use crate::table::TableError;
use crate::tunnel::Side;
use crate::tunnel::live::{About, Record};
use crate::upgrade::UpgradeError;

pub use evidence::{
    judged, leg_answered, leg_closed, leg_opened, leg_trouble, legs_expected, loop_lag, pressure,
    pronounced, serve_leg_answered, serve_leg_trouble,
};

struct Metrics {
    registry: Registry,
    requests: IntCounterVec,
    connections: IntGauge,
    connections_refused: IntCounterVec,
    first_byte: HistogramVec,
    pairings: IntCounterVec,
    mint: Histogram,
    session_checks: IntCounterVec,
    table_reloads: IntCounterVec,
    table_good: Gauge,
    table_users: IntGauge,
    keys: IntGauge,
    key_refreshes: IntCounterVec,
    upstream_errors: IntCounterVec,
    tunnels_open: IntGauge,
    tunnels_opened: IntCounter,
    tunnel_closes: IntCounterVec,
    tunnel_duration: Histogram,
    tunnel_traffic: [(IntCounter, IntCounter); 2],
    tunnel_user_closes: IntCounterVec,
    ws_gap: Histogram,
    ledger_lost: IntCounter,
}

static METRICS: LazyLock<Metrics> =
    LazyLock::new(|| {
        let registry = Registry::new();
        let counter = |name: &str, help: &str, labels: &[&str]| {
            let counter =
                IntCounterVec::new(Opts::new(name, help), labels).expect("a valid metric");
            register(&registry, &counter);
            counter
        };
        let single = |name: &str, help: &str| {
            let counter = IntCounter::new(name, help).expect("a valid metric");
            register(&registry, &counter);
            counter
        };
        let bytes = counter(
            "t3dispatch_tunnel_bytes_total",
            "Bytes in WebSockets, by who sent them.",
            &["from"],
        );
        let messages = counter(
            "t3dispatch_tunnel_messages_total",
            "Messages in WebSockets, by who sent them.",
            &["from"],
        );
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
        connections: IntGauge::new("t3dispatch_connections_open", "Connections that clients hold.")
            .expect("a valid metric"),
        connections_refused: counter(
            "t3dispatch_connections_refused_total",
            "Connections that were ended before there was a whole request on them, by error code.",
            &["code"],
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
            "How long mints took.",
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
        keys: IntGauge::new(
            "t3dispatch_identity_keys",
            "Keys in force that tokens are verified with.",
        )
        .expect("a valid metric"),
        key_refreshes: counter(
            "t3dispatch_identity_key_refreshes_total",
            "Times that the keys were asked for, by result.",
            &["result"],
        ),
        upstream_errors: counter(
            "t3dispatch_upstream_errors_total",
            "Requests that an instance did not answer, by kind of error.",
            &["kind"],
        ),
        tunnels_open: IntGauge::new("t3dispatch_tunnels_open", "WebSockets that are open.")
            .expect("a valid metric"),
        tunnels_opened: single(
            "t3dispatch_tunnels_opened_total",
            "WebSockets that were opened.",
        ),
        tunnel_closes: counter(
            "t3dispatch_tunnel_closes_total",
            "WebSockets that ended, those included that the instance refused, by cause.",
            &["cause"],
        ),
        tunnel_duration: Histogram::with_opts(seconds(
            "t3dispatch_tunnel_duration_seconds",
            "How long WebSockets were open.",
            &[
                1.0, 5.0, 15.0, 60.0, 300.0, 900.0, 1800.0, 3600.0, 7200.0, 14400.0, 28800.0,
                43200.0, 86400.0,
            ],
        ))
        .expect("a valid metric"),
        tunnel_traffic: ["client", "instance"].map(|from| {
            (
                bytes.with_label_values(&[from]),
                messages.with_label_values(&[from]),
            )
        }),
        tunnel_user_closes: counter(
            "t3dispatch_user_tunnel_closes_total",
            "WebSockets that ended by user and cause, where tunnels.per_user_metrics asks for it.",
            &["user", "cause"],
        ),
        ws_gap: Histogram::with_opts(seconds(
            "t3dispatch_ws_gap_seconds",
            "From a bad end of a user's WebSocket to their next one from the same address.",
            &[
                0.5, 1.0, 2.0, 3.0, 5.0, 8.0, 13.0, 20.0, 30.0, 60.0, 120.0, 300.0, 900.0,
            ],
        ))
        .expect("a valid metric"),
        ledger_lost: single(
            "t3dispatch_ledger_lines_lost_total",
            "Records that could not be written to the ledger.",
        ),
        registry: registry.clone(),
    };
        register(&registry, &metrics.connections);
        register(&registry, &metrics.tunnels_open);
        register(&registry, &metrics.tunnel_duration);
        register(&registry, &metrics.ws_gap);
        for cause in Cause::ALL {
            metrics.tunnel_closes.with_label_values(&[cause.as_str()]);
        }
        register(&registry, &metrics.first_byte);
        register(&registry, &metrics.mint);
        register(&registry, &metrics.table_good);
        register(&registry, &metrics.table_users);
        register(&registry, &metrics.keys);
        // A series that appears only with its first event makes rate() miss that event.
        for code in [
            "bad-request",
            "head-too-large",
            "head-too-slow",
            "too-many-connections",
        ] {
            metrics.connections_refused.with_label_values(&[code]);
        }
        for result in ["ok", "failed"] {
            metrics.table_reloads.with_label_values(&[result]);
            metrics.key_refreshes.with_label_values(&[result]);
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
    evidence::register_all();
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
    /// An echo to a probe.
    Probe,
    /// Answered by us, with the person's own page or what it shows.
    Page,
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
    /// How many there are.
    const ALL: usize = Outcome::Aborted as usize + 1;

    fn label(self) -> &'static str {
        match self {
            Outcome::Health => "health",
            Outcome::Probe => "probe",
            Outcome::Page => "page",
            Outcome::Paired => "paired",
            Outcome::Refused => "refused",
            Outcome::Proxied => "proxied",
            Outcome::Failed => "failed",
            Outcome::Aborted => "aborted",
        }
    }
}

/// The classes of a status, as labels; the first where no response was sent.
const CLASSES: [&str; 6] = ["none", "1xx", "2xx", "3xx", "4xx", "5xx"];

/// The place in `CLASSES` of a status.
fn class(status: Option<StatusCode>) -> usize {
    let class = status.map_or(0, |status| usize::from(status.as_u16() / 100));
    if class < CLASSES.len() { class } else { 0 }
}

/// The series that every request counts in, so that none need be looked up twice. They appear when they are first of use.
#[derive(Default)]
struct Found {
    requests: [[OnceLock<IntCounter>; CLASSES.len()]; Outcome::ALL],
    first_byte: [OnceLock<Histogram>; CLASSES.len()],
}

static FOUND: LazyLock<Found> = LazyLock::new(Found::default);

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

/// Nobody took over; the process goes on serving.
pub fn upgrade_failed(error: &UpgradeError) {
    error!("upgrade-failed serving=on error={:?}", error.to_string());
}

/// A new process took over; this one keeps what it has.
pub fn replaced(pid: u32) {
    info!("replaced by={pid} tunnels={}", METRICS.tunnels_open.get());
}

/// The process gives up before it serves.
pub fn not_serving(error: &dyn std::error::Error) {
    error!("not-serving error={:?}", error.to_string());
}

/// The process that was to be taken over from did not answer.
pub fn predecessor_silent(error: &UpgradeError) {
    warn!("predecessor-silent error={:?}", error.to_string());
}

/// `t3-dispatch reload` cannot reach this process.
pub fn control_failed(upgrade_sock: &str, error: &std::io::Error) {
    error!(
        "control-failed socket={upgrade_sock}.control error={:?}",
        error.to_string()
    );
}

/// systemd could not be told something.
pub fn notify_failed(error: &std::io::Error) {
    warn!("notify-failed error={:?}", error.to_string());
}

/// The process leaves after a signal.
pub fn stopped(in_flight: usize) {
    info!("stopped in_flight={in_flight}");
}

/// A request is over.
pub fn request(outcome: Outcome, status: Option<StatusCode>) {
    let class = class(status);
    let labels = [outcome.label(), CLASSES[class]];
    FOUND.requests[outcome as usize][class]
        .get_or_init(|| METRICS.requests.with_label_values(&labels))
        .inc();
}

/// The head of a proxied response has come.
pub fn first_byte(status: StatusCode, after: Duration) {
    let class = class(Some(status));
    FOUND.first_byte[class]
        .get_or_init(|| METRICS.first_byte.with_label_values(&[CLASSES[class]]))
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

/// The keys that tokens are verified with are fresh.
pub fn keys_refreshed(source: &Jwks, keys: usize) {
    METRICS.key_refreshes.with_label_values(&["ok"]).inc();
    // The first time, and when their number changes: the rest is a matter for metrics.
    if METRICS.keys.get() != keys as i64 {
        info!(
            "identity-keys keys={keys} source={}",
            Word(&source.to_string())
        );
    }
    METRICS.keys.set(keys as i64);
}

/// Their source has none; those that there were stay in force.
pub fn keys_failed(source: &Jwks, error: &KeyError, kept: usize) {
    METRICS.key_refreshes.with_label_values(&["failed"]).inc();
    warn!(
        "identity-keys-failed kept={kept} source={} error={:?}",
        Word(&source.to_string()),
        error.to_string()
    );
}

/// A connection of a client's, which counts until this is dropped.
pub struct OpenConnection(());

impl Drop for OpenConnection {
    fn drop(&mut self) {
        METRICS.connections.dec();
    }
}

/// A client has connected.
pub fn connection_open() -> OpenConnection {
    METRICS.connections.inc();
    OpenConnection(())
}

/// A connection was ended before there was a whole request on it. Whoever floods us does not flood the log.
pub fn connection_refused(refusal: &Refusal) {
    METRICS
        .connections_refused
        .with_label_values(&[refusal.code()])
        .inc();
}

/// There are as many connections as there may be.
pub fn full(connections: usize) {
    warn!("full connections={connections}");
}

/// A mint has ended, one way or the other.
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

/// A WebSocket is open; `gap` is how long its user had been without one.
pub fn tunnel_opened(about: &About, gap: Option<Duration>) {
    METRICS.tunnels_open.inc();
    METRICS.tunnels_opened.inc();
    let (user, ip, id) = (Word(&about.user), Word(&about.ip), Word(&about.id));
    match gap {
        Some(gap) => {
            METRICS.ws_gap.observe(gap.as_secs_f64());
            info!("ws open user={user} ip={ip} id={id} gap_ms={}", millis(gap));
        }
        None => info!("ws open user={user} ip={ip} id={id}"),
    }
}

/// Bytes have come through a WebSocket.
pub fn tunnel_bytes(from: Side, bytes: u64, messages: u64) {
    let (all_bytes, all_messages) = &METRICS.tunnel_traffic[from as usize];
    all_bytes.inc_by(bytes);
    if messages > 0 {
        all_messages.inc_by(messages);
    }
}

static PER_USER: AtomicBool = AtomicBool::new(false);

/// Counts the ends of WebSockets by user from now on.
pub fn count_by_user() {
    PER_USER.store(true, Ordering::Relaxed);
}

/// A WebSocket has ended, or was refused.
pub fn tunnel_closed(record: &Record) {
    let cause = record.cause.as_str();
    METRICS.tunnel_closes.with_label_values(&[cause]).inc();
    if PER_USER.load(Ordering::Relaxed) {
        METRICS
            .tunnel_user_closes
            .with_label_values(&[record.user.as_str(), cause])
            .inc();
    }
    if record.opened {
        METRICS.tunnels_open.dec();
        METRICS
            .tunnel_duration
            .observe(record.dur_ms as f64 / 1000.0);
    }
    let json = serde_json::to_value(record).unwrap_or_default();
    let said = |key: &str| json[key].as_str().unwrap_or("none").to_owned();
    info!(
        "ws close user={} ip={} id={} dur_ms={} cause={cause} ended_by={} how={} code={} in_bytes={} out_bytes={} \
         client_silence_ms={} instance_silence_ms={} unanswered_ms={}",
        Word(&record.user),
        Word(&record.ip),
        Word(&record.id),
        record.dur_ms,
        said("ended_by"),
        said("how"),
        record.code.unwrap_or(0),
        record.client.bytes,
        record.instance.bytes,
        record.client.silence_ms,
        record.instance.silence_ms,
        record.unanswered_ms.unwrap_or(0),
    );
    ledger::append(json.to_string());
}

/// A record could not be written.
pub fn ledger_line_lost() {
    METRICS.ledger_lost.inc();
}

/// The ledger cannot be written; said once until it can be again.
pub fn ledger_failing(path: &Path, error: &std::io::Error) {
    error!(
        "ledger-failing file={} error={:?}",
        path.display(),
        error.to_string()
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

/// A changed table is in force, or somebody asked for it to be read again, which took so long.
pub fn table_reloaded(users: usize, took: Duration) {
    METRICS.table_reloads.with_label_values(&["ok"]).inc();
    info!("table-reloaded users={users} dur_ms={}", millis(took));
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
