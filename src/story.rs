//! A drop as it is told to people: its record with its verdict, in words.

use std::collections::HashMap;
use std::io;
use std::time::{Duration, SystemTime};

use serde_json::Value;

use crate::config::Dispatch;
use crate::evidence::Millis;
use crate::judge;
use crate::ledger::Ledger;
use crate::tunnel::live::Record;
use crate::verdict::{Confidence, Segment, Verdict};

/// How much longer than its window a verdict may take to be written.
const LATE: Duration = Duration::from_secs(15);

/// Most records that are looked through.
const MOST: usize = 50_000;

/// One WebSocket that ended, and what is said of it.
#[derive(Debug, Clone)]
pub struct Drop {
    /// The record.
    pub record: Record,
    /// What is held to be at fault.
    pub verdict: Verdict,
    /// Whether that can still change.
    pub is_final: bool,
    /// How long the person was without a WebSocket, in milliseconds, where they are back.
    pub back: Option<Millis>,
}

/// The records of a time, told.
#[derive(Debug, Default)]
pub struct Story {
    /// What ended otherwise than it should, the newest first.
    pub drops: Vec<Drop>,
    /// How many ended as they should.
    pub ended_well: usize,
    /// Lines that were no records.
    pub unreadable: usize,
    /// Whether there were more records than are looked through.
    pub is_cut: bool,
}

impl Story {
    /// Reads what the ledger has of `user`, or of everybody, since then.
    ///
    /// # Errors
    /// When the ledger cannot be read.
    pub fn read(
        ledger: &Ledger,
        settings: &Dispatch,
        user: Option<&str>,
        since: SystemTime,
    ) -> io::Result<Story> {
        let now = SystemTime::now();
        let window = judge::rules(&settings.tunnels).window() + LATE;
        let mut story = Story::default();
        // The earliest tunnel of each person among those that have been read, which are the newer ones.
        let mut opened: HashMap<String, Millis> = HashMap::new();
        let found = ledger.newest(user, Some(since), MOST)?;
        story.is_cut = found.records.len() >= MOST;
        story.unreadable = found.unreadable;
        for line in found.records {
            let back = line["back_after_ms"].as_i64();
            let Ok(mut record) = serde_json::from_value::<Record>(line) else {
                story.unreadable += 1;
                continue;
            };
            let ended = record.ended();
            let (verdict, is_final) = match record.verdict.take() {
                Some(verdict) => (verdict, true),
                None => pending(&record, now, window),
            };
            let later = opened.get(&record.user).filter(|at| **at >= ended);
            let came_back = later.map(|at| at - ended);
            if record.opened {
                opened.insert(record.user.clone(), ended - record.dur_ms as Millis);
            }
            if verdict.segment == Segment::None {
                story.ended_well += 1;
                continue;
            }
            story.drops.push(Drop {
                record,
                verdict,
                is_final,
                back: back.or(came_back),
            });
        }
        Ok(story)
    }
}

/// What is said of a drop without a verdict.
fn pending(record: &Record, now: SystemTime, window: Duration) -> (Verdict, bool) {
    let ended = std::time::UNIX_EPOCH + Duration::from_millis(record.ended().max(0) as u64);
    let open = now.duration_since(ended).unwrap_or_default() < window;
    let why = if open {
        "the evidence is still coming in"
    } else {
        "no verdict was written: the process was killed before the evidence was in"
    };
    let verdict = Verdict {
        segment: Segment::Unknown,
        confidence: Confidence::Low,
        evidence: vec![why.into()],
    };
    (verdict, !open)
}

impl Drop {
    /// The sentence to send to the person who asked. `at` is the time as they would say it.
    pub fn sentence(&self, at: &str, edge: &str) -> String {
        let away = match self.back {
            Some(back) if self.record.opened => {
                format!(
                    " You were back after {:.0} s.",
                    (back as f64 / 1000.0).max(1.0)
                )
            }
            _ => String::new(),
        };
        if !self.is_final {
            return format!("Your connection dropped at {at}; the evidence is still coming in.");
        }
        let what = match self.verdict.segment {
            Segment::None => {
                format!("Your connection ended at {at} as it should: nothing was broken.")
            }
            Segment::LastMile => format!(
                "Your connection dropped at {at} between your device and {edge}. Our own connections over the rest of the \
                 way were well at that moment, so it was on your side: the network, a VPN, or a device that slept."
            ),
            Segment::Edge => format!(
                "Your connection dropped at {at} at {edge}. Our own connection through it broke at the same moment, while \
                 the one from behind it stayed up: it was neither your network nor the server."
            ),
            Segment::Internal => format!(
                "Your connection dropped at {at} between our load balancer and the service: both of our own connections \
                 over it broke at the same moment. It was on our side."
            ),
            Segment::Serve if !self.record.opened => format!(
                "At {at} your workspace's server process did not take your connection. It was on our side."
            ),
            Segment::Serve => format!(
                "Your connection dropped at {at} because your workspace's server process ended it or did not answer. It was \
                 on our side, and not your network."
            ),
            Segment::Dispatch => format!(
                "Your connection dropped at {at} because this service ended it or stood still. It was on our side."
            ),
            Segment::Unknown => format!(
                "Your connection dropped at {at}, and what we have seen does not say where: {}.",
                self.verdict
                    .evidence
                    .last()
                    .map_or("there is no evidence", String::as_str)
            ),
        };
        what + &away
    }
}

/// What the edge is called, by the name of its leg: a name, so it begins with a capital.
pub fn edge_name(leg: &str) -> String {
    let mut letters = leg.chars();
    letters
        .next()
        .map(|first| first.to_uppercase().chain(letters).collect())
        .unwrap_or_default()
}

/// A record as JSON, with its verdict and whether that is final.
pub fn json(drop: &Drop) -> Value {
    let mut object = serde_json::to_value(&drop.record).unwrap_or_default();
    object["verdict"] = serde_json::to_value(&drop.verdict).unwrap_or_default();
    object["verdict"]["final"] = drop.is_final.into();
    object["back_after_ms"] = drop.back.into();
    object
}
