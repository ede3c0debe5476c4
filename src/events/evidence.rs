//! The events of legs, of the host, and of verdicts.

use std::sync::LazyLock;
use std::time::{Duration, SystemTime};

use log::info;
use prometheus::{
    Gauge, GaugeVec, Histogram, HistogramOpts, HistogramVec, IntCounterVec, IntGaugeVec, Opts,
};
use serde_json::json;

use super::{METRICS, Word, register};
use crate::evidence::Millis;
use crate::ledger;
use crate::tunnel::live::Record;
use crate::verdict::{Segment, Verdict};

/// Bounds of round trips: a loopback's to those that a client takes for a break.
const RTT: [f64; 13] = [
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0,
];

struct Metrics {
    leg_connected: IntGaugeVec,
    leg_rtt: HistogramVec,
    leg_troubles: IntCounterVec,
    serve_leg_rtt: Histogram,
    serve_leg_troubles: IntCounterVec,
    loop_lag: Gauge,
    pressure: GaugeVec,
    verdicts: IntCounterVec,
}

static OWN: LazyLock<Metrics> = LazyLock::new(|| {
    let registry = &METRICS.registry;
    let counter = |name: &str, help: &str, labels: &[&str]| {
        let counter = IntCounterVec::new(Opts::new(name, help), labels).expect("a valid metric");
        register(registry, &counter);
        counter
    };
    let seconds = |name: &str, help: &str| HistogramOpts::new(name, help).buckets(RTT.to_vec());
    let metrics = Metrics {
        leg_connected: IntGaugeVec::new(
            Opts::new(
                "t3dispatch_leg_connected",
                "Connections of a prober's leg as seen from here.",
            ),
            &["leg"],
        )
        .expect("a valid metric"),
        leg_rtt: HistogramVec::new(
            seconds(
                "t3dispatch_leg_rtt_seconds",
                "Round trips of pings to a leg.",
            ),
            &["leg"],
        )
        .expect("a valid metric"),
        leg_troubles: counter(
            "t3dispatch_leg_troubles_total",
            "Legs that broke or stalled, as seen from here.",
            &["leg", "kind"],
        ),
        serve_leg_rtt: Histogram::with_opts(seconds(
            "t3dispatch_serve_leg_rtt_seconds",
            "How long instances took to give a sign of life.",
        ))
        .expect("a valid metric"),
        serve_leg_troubles: counter(
            "t3dispatch_serve_leg_troubles_total",
            "Instances that gave no sign of life in time.",
            &["kind"],
        ),
        loop_lag: Gauge::with_opts(Opts::new(
            "t3dispatch_loop_lag_seconds",
            "By how much the event loop was late at worst in the last 10 s.",
        ))
        .expect("a valid metric"),
        pressure: GaugeVec::new(
            Opts::new(
                "t3dispatch_pressure_ratio",
                "Share of the last 10 s in which some task of the host waited for a resource.",
            ),
            &["resource"],
        )
        .expect("a valid metric"),
        verdicts: counter(
            "t3dispatch_tunnel_verdicts_total",
            "WebSockets that ended, by the segment that was at fault.",
            &["segment"],
        ),
    };
    register(registry, &metrics.leg_connected);
    register(registry, &metrics.leg_rtt);
    register(registry, &metrics.serve_leg_rtt);
    register(registry, &metrics.loop_lag);
    register(registry, &metrics.pressure);
    // A series that appears only with its first event makes rate() miss that event.
    for segment in Segment::ALL {
        metrics.verdicts.with_label_values(&[segment.as_str()]);
    }
    for kind in ["late", "refused", "failed"] {
        metrics.serve_leg_troubles.with_label_values(&[kind]);
    }
    metrics
});

/// Makes all series that are known beforehand.
pub(super) fn register_all() {
    LazyLock::force(&OWN);
}

/// Legs of these names may connect: their series are there from now on.
pub fn legs_expected(legs: [&str; 2]) {
    for leg in legs {
        OWN.leg_connected.with_label_values(&[leg]);
        OWN.leg_rtt.with_label_values(&[leg]);
        for kind in ["cut", "stall"] {
            OWN.leg_troubles.with_label_values(&[leg, kind]);
        }
    }
}

/// A leg has connected.
pub fn leg_opened(leg: &str) {
    OWN.leg_connected.with_label_values(&[leg]).inc();
    for kind in ["cut", "stall"] {
        OWN.leg_troubles.with_label_values(&[leg, kind]);
    }
    info!("leg open leg={leg}");
}

/// The connection of a leg is over.
pub fn leg_closed(leg: &str) {
    OWN.leg_connected.with_label_values(&[leg]).dec();
    info!("leg close leg={leg}");
}

/// A leg has answered a ping.
pub fn leg_answered(leg: &str, rtt: Duration) {
    OWN.leg_rtt
        .with_label_values(&[leg])
        .observe(rtt.as_secs_f64());
}

/// A leg has stalled or broken.
pub fn leg_trouble(leg: &str, kind: &str) {
    OWN.leg_troubles.with_label_values(&[leg, kind]).inc();
    info!("leg trouble leg={leg} kind={kind}");
}

/// An instance has given a sign of life.
pub fn serve_leg_answered(rtt: Duration) {
    OWN.serve_leg_rtt.observe(rtt.as_secs_f64());
}

/// An instance has given no sign of life in time.
pub fn serve_leg_trouble(kind: &str) {
    OWN.serve_leg_troubles.with_label_values(&[kind]).inc();
}

/// How late the event loop was at worst of late.
pub fn loop_lag(lag: Duration) {
    OWN.loop_lag.set(lag.as_secs_f64());
}

/// What share of the time tasks waited for a resource.
pub fn pressure(resource: &str, share: f64) {
    OWN.pressure.with_label_values(&[resource]).set(share);
}

/// A verdict is final.
pub fn judged(verdict: &Verdict) {
    let segment = verdict.segment.as_str();
    OWN.verdicts.with_label_values(&[segment]).inc();
}

/// A verdict came after its record: `back` is how long the person had been away by then, if they are back.
pub fn pronounced(record: &Record, verdict: &Verdict, back: Option<Millis>) {
    info!(
        "ws verdict user={} ip={} id={} segment={} confidence={}",
        Word(&record.user),
        Word(&record.ip),
        Word(&record.id),
        verdict.segment.as_str(),
        verdict.confidence.as_str(),
    );
    let line = json!({
        "time": humantime::format_rfc3339_millis(SystemTime::now()).to_string(),
        "verdict_of": record.key,
        "verdict": verdict,
        "back_after_ms": back,
    });
    ledger::append(line.to_string());
}
