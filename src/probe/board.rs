//! What is known of all legs: the one place where a leg goes up or down, with its metrics and its log lines.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde::Serialize;

use super::host;
use super::metrics::Metrics;
use super::reason::{Failure, Reason};
use super::settings::Leg;

/// How long it is told that this process stood still.
const REMEMBERED: Duration = Duration::from_secs(60);

/// RTTs that are kept to be shown.
pub const RTTS: usize = 40;

/// What is known of one leg.
#[derive(Debug, Clone)]
pub struct Status {
    /// Its name.
    pub name: String,
    /// Whether its last heartbeats came back.
    pub up: bool,
    /// Since when it has been up, or down.
    pub since: Instant,
    /// The newest RTTs, the newest last.
    pub rtts: VecDeque<Duration>,
    /// How often it went down after it had been up.
    pub drops: u64,
    /// Why it last went down; for one that was never up, why it did not come up at first.
    pub went_down: Option<Reason>,
    /// Why it last failed, tries to come up again included.
    pub last: Option<Reason>,
}

/// The state of all legs, in the order of the settings.
pub struct Board {
    started: Instant,
    /// When this process last stood still until, and for how long.
    stood: Mutex<Option<(Instant, Duration)>>,
    legs: Mutex<Vec<Status>>,
    metrics: Metrics,
}

/// A heartbeat as it is sent. docs/probe.md has its shape.
#[derive(Serialize)]
struct Heartbeat<'a> {
    leg: &'a str,
    seq: u64,
    heartbeat_ms: u64,
    uptime_ms: u64,
    rtt_ms: Option<u64>,
    legs: Vec<Told<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    stood_still: Option<Stood>,
    pad: String,
}

/// When this process stood still, and what it then missed says nothing about a path.
#[derive(Serialize)]
struct Stood {
    ago_ms: u64,
    for_ms: u64,
}

/// What a heartbeat says of one leg.
#[derive(Serialize)]
struct Told<'a> {
    leg: &'a str,
    up: bool,
    for_ms: u64,
    reason: Option<String>,
}

/// The size of a heartbeat, so that a path is felt that lets small packets through only.
const HEARTBEAT: usize = 1024;

impl Board {
    /// All legs are down, without a reason.
    pub fn new(legs: &[Leg], metrics: Metrics) -> Board {
        let now = Instant::now();
        let legs = legs
            .iter()
            .map(|leg| Status {
                name: leg.name.clone(),
                up: false,
                since: now,
                rtts: VecDeque::with_capacity(RTTS),
                drops: 0,
                went_down: None,
                last: None,
            })
            .collect();
        Board {
            started: now,
            stood: Mutex::default(),
            legs: Mutex::new(legs),
            metrics,
        }
    }

    fn legs(&self) -> MutexGuard<'_, Vec<Status>> {
        self.legs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// All legs as they are now.
    pub fn snapshot(&self) -> Vec<Status> {
        self.legs().clone()
    }

    /// The metrics that this keeps.
    pub fn metrics(&self) -> &Metrics {
        &self.metrics
    }

    /// A heartbeat of the leg at `place` came back.
    pub fn echoed(&self, place: usize, rtt: Duration) {
        let mut legs = self.legs();
        let Some(leg) = legs.get_mut(place) else {
            return;
        };
        if leg.rtts.len() == RTTS {
            leg.rtts.pop_front();
        }
        leg.rtts.push_back(rtt);
        self.metrics.echoed(&leg.name, rtt);
        if !leg.up {
            leg.up = true;
            leg.since = Instant::now();
            log::info!("leg-up leg={} rtt_ms={}", leg.name, millis(rtt));
        }
    }

    /// The leg at `place` failed, with a connection of this `age` or before it had one. Only the first failure after it
    /// was up, or after the start, is worth a line.
    pub fn failed(&self, place: usize, failure: &Failure, age: Option<Duration>) {
        let mut legs = self.legs();
        let Some(leg) = legs.get_mut(place) else {
            return;
        };
        let reason = failure.reason;
        self.metrics.failed(&leg.name, reason, age);
        let first = leg.up || leg.last.is_none();
        leg.last = Some(reason);
        if first {
            let age_s = if leg.up {
                leg.since.elapsed().as_secs()
            } else {
                0
            };
            leg.drops += u64::from(leg.up);
            leg.up = false;
            leg.since = Instant::now();
            leg.went_down = Some(reason);
            log::info!(
                "leg-down leg={} reason={reason} age_s={age_s} error={:?}",
                leg.name,
                failure.what
            );
        } else {
            log::debug!(
                "leg-still-down leg={} reason={reason} error={:?}",
                leg.name,
                failure.what
            );
        }
    }

    /// Watches whether this process keeps up.
    pub async fn watch(&self) {
        loop {
            let lag = host::lag().await;
            if lag >= host::STILL {
                let mut stood = self.stood.lock().unwrap_or_else(PoisonError::into_inner);
                *stood = Some((Instant::now(), lag));
            }
        }
    }

    fn stood_still(&self) -> Option<Stood> {
        let stood = *self.stood.lock().unwrap_or_else(PoisonError::into_inner);
        let (until, lag) = stood.filter(|(until, _)| until.elapsed() < REMEMBERED)?;
        Some(Stood {
            ago_ms: millis(until.elapsed()),
            for_ms: millis(lag),
        })
    }

    /// The text of a heartbeat of the leg at `place`.
    pub fn heartbeat(&self, place: usize, seq: u64, every: Duration) -> String {
        let legs = self.legs();
        let own = legs.get(place);
        let mut heartbeat = Heartbeat {
            leg: own.map_or("", |leg| leg.name.as_str()),
            seq,
            heartbeat_ms: millis(every),
            uptime_ms: millis(self.started.elapsed()),
            rtt_ms: own.and_then(|leg| leg.rtts.back()).copied().map(millis),
            legs: legs
                .iter()
                .map(|leg| Told {
                    leg: &leg.name,
                    up: leg.up,
                    for_ms: millis(leg.since.elapsed()),
                    reason: leg.went_down.map(|reason| reason.to_string()),
                })
                .collect(),
            stood_still: self.stood_still(),
            pad: String::new(),
        };
        // Names, numbers and labels can be written in any case.
        let length = serde_json::to_string(&heartbeat).map_or(0, |text| text.len());
        heartbeat.pad = "x".repeat(HEARTBEAT.saturating_sub(length));
        serde_json::to_string(&heartbeat).unwrap_or_default()
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
