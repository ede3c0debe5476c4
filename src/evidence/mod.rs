//! What was seen of the legs, the instances and this process itself: what verdicts lean on.
//!
//! It is kept in memory for a while, and in a file beside the ledger, from which the other process learns what happened
//! after a handover, and `explain` what happened around a drop.

mod follow;

use std::collections::VecDeque;
use std::sync::{LazyLock, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::ledger;
use crate::tunnel::live::Record;
pub use follow::Follower;

/// A time: milliseconds since 1970.
pub type Millis = i64;

/// How long evidence is kept in memory.
const KEPT: Millis = 15 * 60 * 1000;

/// Most connections and troubles of one kind that are kept.
const MOST: usize = 4096;

/// A leg's connection that ended no longer before its prober was started ended with the prober before that one.
const RESTART: Millis = 60_000;

/// The time now.
pub fn now() -> Millis {
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    now.as_millis() as Millis
}

/// The last time that can be written: the end of the year 9999.
const LAST: Millis = 253_402_300_799_999;

/// The same as a time that can be written.
pub fn system(at: Millis) -> SystemTime {
    UNIX_EPOCH + Duration::from_millis(at.clamp(0, LAST) as u64)
}

/// Whether a line of the ledger, or of the evidence, can be ours: sums of its numbers stay in range.
pub fn is_ours(line: &Value) -> bool {
    match line {
        Value::Number(number) => number
            .as_f64()
            .is_some_and(|number| number.abs() <= LAST as f64),
        Value::Array(values) => values.iter().all(is_ours),
        Value::Object(fields) => fields.values().all(is_ours),
        _ => true,
    }
}

/// A time of day for a sentence.
pub fn clock(at: Millis) -> String {
    let text = humantime::format_rfc3339_millis(system(at)).to_string();
    text.get(11..23).unwrap_or(&text).to_owned() + " UTC"
}

/// What a trouble was.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// A connection was ended, or not made.
    Cut,
    /// Nothing came, or too late.
    Stall,
}

/// A bad time of a leg or an instance.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Trouble {
    /// The earliest that it can have begun.
    pub earliest: Millis,
    /// The latest.
    pub latest: Millis,
    /// When it was over; nothing while it is not.
    pub until: Option<Millis>,
    /// What it was.
    pub kind: Kind,
    /// The same in words that follow the name of who had it.
    pub what: String,
}

/// One connection of a leg, as seen from here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Conn {
    /// The process that saw it.
    pub pid: u32,
    /// Its number there.
    pub id: u64,
    /// The leg's name.
    pub leg: String,
    /// When it was opened.
    pub opened: Millis,
    /// Up to when it was known to be well, or was at least answered again.
    pub heard: Millis,
    /// When the prober last said something by itself.
    pub spoke: Option<Millis>,
    /// Its stalls, the oldest first.
    pub stalls: Vec<Trouble>,
    /// How it ended.
    pub end: Option<Trouble>,
    /// Whether it ended because this service or the prober wanted it to.
    pub left: bool,
    /// When the prober that holds it was started.
    pub prober: Option<Millis>,
    /// Whether the prober was restarted at its end, which then says nothing about the way.
    excused: bool,
}

impl Conn {
    fn new(pid: u32, id: u64, leg: &str, at: Millis) -> Conn {
        Conn {
            pid,
            id,
            leg: leg.into(),
            opened: at,
            heard: at,
            spoke: None,
            stalls: Vec::new(),
            end: None,
            left: false,
            prober: None,
            excused: false,
        }
    }

    /// A connection that was opened then.
    #[cfg(test)]
    pub(crate) fn of(leg: &str, opened: Millis) -> Conn {
        Conn::new(1, 1, leg, opened)
    }

    /// Its stalls and its end.
    pub fn troubles(&self) -> impl Iterator<Item = &Trouble> {
        self.stalls.iter().chain(&self.end)
    }

    /// Whether it owes an answer that is overdue.
    pub fn is_stalled(&self) -> bool {
        self.stalls.iter().any(|stall| stall.until.is_none())
    }

    /// Whether its end says nothing about the way, because the prober itself ended.
    pub fn is_excused(&self) -> bool {
        self.excused
    }
}

/// What is known of an instance.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct InstanceHistory {
    /// When it last answered.
    pub well: Option<Millis>,
    /// Its bad times, the oldest first.
    pub troubles: Vec<Trouble>,
}

/// One observation.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// A leg connected.
    LegOpened {
        /// The leg.
        leg: String,
        /// Which of its connections.
        conn: u64,
    },
    /// A leg answered.
    LegWell {
        /// The leg.
        leg: String,
        /// Which of its connections.
        conn: u64,
        /// How long its answer took.
        rtt_ms: f64,
    },
    /// A leg had a bad time, which may not be over.
    LegStalled {
        /// The leg.
        leg: String,
        /// Which of its connections.
        conn: u64,
        /// What it was.
        trouble: Trouble,
    },
    /// A leg's connection ended.
    LegEnded {
        /// The leg.
        leg: String,
        /// Which of its connections.
        conn: u64,
        /// What it was.
        trouble: Trouble,
        /// Whether this service or the prober wanted it.
        left: bool,
    },
    /// The prober told when it was started.
    ProberStarted {
        /// The leg that it told it over.
        leg: String,
        /// Which of its connections.
        conn: u64,
        /// When.
        at: Millis,
    },
    /// The prober told of another leg that it is down.
    LegTold {
        /// The leg that is down.
        leg: String,
        /// Since when.
        since: Millis,
        /// Why, in the prober's words.
        reason: String,
    },
    /// The prober itself stood still, so that its legs say nothing about the way.
    ProberStood {
        /// The leg that it told it over.
        leg: String,
        /// Since when.
        since: Millis,
        /// Until when.
        until: Millis,
    },
    /// An instance answered.
    InstanceWell {
        /// Its port.
        port: u16,
    },
    /// An instance had a bad time, which may not be over.
    InstanceTrouble {
        /// Its port.
        port: u16,
        /// What it was.
        trouble: Trouble,
    },
    /// This process stood still.
    Lagged {
        /// Since when.
        since: Millis,
    },
    /// Tasks of the host waited for a resource.
    Pressed {
        /// `cpu`, `io` or `memory`.
        resource: String,
        /// The share of the time, from 0 to 1.
        share: f64,
    },
    /// The process ends before the window of this drop has closed; its successor judges it.
    Entrusted {
        /// The drop.
        record: Box<Record>,
        /// When the window closes.
        due: Millis,
    },
}

/// An observation with its time and the process that made it: a line of the file.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Entry {
    /// When, RFC 3339 in UTC.
    pub time: String,
    /// The process.
    pub pid: u32,
    /// What.
    #[serde(flatten)]
    pub event: Event,
}

impl Entry {
    /// What a line of the file says, if it is one of ours.
    pub fn read(line: Value) -> Option<Entry> {
        let line = Some(line).filter(is_ours)?;
        serde_json::from_value(line).ok()
    }

    /// When.
    pub fn at(&self) -> Millis {
        humantime::parse_rfc3339(&self.time)
            .ok()
            .and_then(|time| time.duration_since(UNIX_EPOCH).ok())
            .map_or(0, |since| since.as_millis() as Millis)
    }
}

/// Everything that is remembered.
#[derive(Debug, Default)]
pub struct Memory {
    conns: VecDeque<Conn>,
    instances: std::collections::HashMap<u16, InstanceHistory>,
    lags: VecDeque<(Millis, Millis)>,
    pressed: VecDeque<(Millis, String, f64)>,
    told: VecDeque<(String, Millis)>,
    stood: VecDeque<(String, Millis, Millis)>,
    entrusted: Vec<(Record, Millis)>,
}

static MEMORY: LazyLock<Mutex<Memory>> = LazyLock::new(Mutex::default);

fn memory() -> MutexGuard<'static, Memory> {
    MEMORY.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Takes note of an observation, in memory and, unless it is only a sign of life, in the file.
pub fn record(event: Event) {
    let at = now();
    let pid = std::process::id();
    let durable = !matches!(event, Event::InstanceWell { .. });
    if durable {
        let time = UNIX_EPOCH + Duration::from_millis(at as u64);
        let entry = Entry {
            time: humantime::format_rfc3339_millis(time).to_string(),
            pid,
            event: event.clone(),
        };
        if let Ok(line) = serde_json::to_string(&entry) {
            ledger::append_evidence(line);
        }
    }
    memory().apply(pid, at, event);
}

/// A leg's answer, in memory alone.
pub fn heard(leg: &str, conn: u64) {
    let at = now();
    memory().conn(std::process::id(), conn, leg, at).heard = at;
}

/// What other processes have told since the last time: their observations become ours.
pub fn learn(entries: impl Iterator<Item = Entry>) {
    let own = std::process::id();
    let mut memory = memory();
    for entry in entries.filter(|entry| entry.pid != own) {
        let at = entry.at();
        memory.apply(entry.pid, at, entry.event);
    }
}

/// The drops that other processes have left to be judged.
pub fn take_entrusted() -> Vec<(Record, Millis)> {
    std::mem::take(&mut memory().entrusted)
}

/// A leg's prober has said something by itself.
pub fn spoke(leg: &str, conn: u64) {
    let at = now();
    memory().conn(std::process::id(), conn, leg, at).spoke = Some(at);
}

/// When the prober of a leg stood still.
pub fn stood(leg: &str) -> Vec<(Millis, Millis)> {
    let memory = memory();
    let of_leg = memory.stood.iter().filter(|(name, ..)| name == leg);
    of_leg.map(|(_, since, until)| (*since, *until)).collect()
}

/// The connections of a leg.
pub fn conns(leg: &str) -> Vec<Conn> {
    memory().conns_of(leg)
}

/// What is known of an instance.
pub fn instance(port: u16) -> InstanceHistory {
    memory().instances.get(&port).cloned().unwrap_or_default()
}

/// When this process stood still, and what the host's tasks waited for between these times.
pub fn host(from: Millis, to: Millis) -> (Vec<(Millis, Millis)>, Vec<String>) {
    let memory = memory();
    let lags = memory.lags.iter().copied().collect();
    let pressed = memory
        .pressed
        .iter()
        .filter(|(at, ..)| (from..=to + 10_000).contains(at))
        .map(|(at, resource, share)| {
            format!(
                "tasks on this host waited for {resource} {:.0} % of the time before {}",
                share * 100.0,
                clock(*at)
            )
        });
    (lags, pressed.collect())
}

/// Whether the prober, which repeats itself, has told already that this leg went down then.
pub fn is_told(leg: &str, since: Millis) -> bool {
    let memory = memory();
    let mut told = memory.told.iter();
    told.any(|(name, at)| name == leg && (at - since).abs() < 2000)
}

impl Memory {
    /// The connections of a leg.
    pub fn conns_of(&self, leg: &str) -> Vec<Conn> {
        let of_leg = self.conns.iter().filter(|conn| conn.leg == leg);
        of_leg.cloned().collect()
    }

    fn conn(&mut self, pid: u32, id: u64, leg: &str, at: Millis) -> &mut Conn {
        let known = self
            .conns
            .iter()
            .rposition(|conn| conn.pid == pid && conn.id == id);
        let position = known.unwrap_or_else(|| {
            self.conns.push_back(Conn::new(pid, id, leg, at));
            self.conns.len() - 1
        });
        &mut self.conns[position]
    }

    /// Takes note of what `pid` has seen then.
    pub fn apply(&mut self, pid: u32, at: Millis, event: Event) {
        match event {
            Event::LegOpened { leg, conn } => {
                self.conn(pid, conn, &leg, at);
            }
            Event::LegWell { leg, conn, .. } => {
                let conn = self.conn(pid, conn, &leg, at);
                conn.heard = conn.heard.max(at);
            }
            Event::LegStalled { leg, conn, trouble } => {
                let conn = self.conn(pid, conn, &leg, at);
                note(&mut conn.stalls, trouble);
            }
            Event::LegEnded {
                leg,
                conn,
                trouble,
                left,
            } => {
                let conn = self.conn(pid, conn, &leg, at);
                if left {
                    conn.heard = conn.heard.max(trouble.earliest);
                    conn.left = true;
                } else {
                    conn.end = Some(trouble);
                }
            }
            Event::ProberStarted {
                leg,
                conn,
                at: started,
            } => {
                self.conn(pid, conn, &leg, at).prober = Some(started);
                // What an earlier prober held ended with it.
                for conn in self.conns.iter_mut().filter(|conn| conn.leg == leg) {
                    let held_by_another = conn.prober.is_some_and(|prober| prober + 1000 < started);
                    let ended = conn.end.as_ref().map(|end| started - end.earliest);
                    conn.excused |= held_by_another && ended.is_some_and(|ago| ago < RESTART);
                }
            }
            Event::LegTold { leg, since, .. } => push(&mut self.told, (leg, since)),
            Event::ProberStood { leg, since, until } => push(&mut self.stood, (leg, since, until)),
            Event::InstanceWell { port } => {
                let instance = self.instances.entry(port).or_default();
                instance.well = Some(at);
                for trouble in &mut instance.troubles {
                    trouble.until.get_or_insert(at);
                }
            }
            Event::InstanceTrouble { port, trouble } => {
                note(
                    &mut self.instances.entry(port).or_default().troubles,
                    trouble,
                );
            }
            Event::Lagged { since } => push(&mut self.lags, (since, at)),
            Event::Pressed { resource, share } => push(&mut self.pressed, (at, resource, share)),
            Event::Entrusted { record, due } => {
                if due + KEPT > now() {
                    self.entrusted.push((*record, due));
                }
            }
        }
        self.forget(at - KEPT);
    }

    /// Forgets what was over before `old`.
    fn forget(&mut self, old: Millis) {
        // Not from the front alone: a leg that stays up would keep all of one that flaps behind it.
        self.conns.retain(|conn| conn.heard >= old);
        if self.conns.len() > MOST {
            self.conns.pop_front();
        }
        while self.lags.front().is_some_and(|(_, to)| *to < old) {
            self.lags.pop_front();
        }
        while self.pressed.front().is_some_and(|(at, ..)| *at < old) {
            self.pressed.pop_front();
        }
    }
}

/// Adds a trouble, or brings the one that is known of that beginning up to date.
fn note(troubles: &mut Vec<Trouble>, trouble: Trouble) {
    match troubles
        .iter_mut()
        .find(|known| known.earliest == trouble.earliest)
    {
        Some(known) => *known = trouble,
        None => {
            if troubles.len() >= 64 {
                troubles.remove(0);
            }
            troubles.push(trouble);
        }
    }
}

fn push<T>(queue: &mut VecDeque<T>, one: T) {
    if queue.len() >= MOST {
        queue.pop_front();
    }
    queue.push_back(one);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_number_can_be_told_as_a_time() {
        assert_eq!(clock(Millis::MIN), "00:00:00.000 UTC");
        assert_eq!(clock(1_500), "00:00:01.500 UTC");
        assert_eq!(clock(Millis::MAX), "23:59:59.999 UTC");
    }

    #[test]
    fn a_line_with_a_number_that_is_no_time_is_not_ours() {
        let line = |since: i64| {
            let text = format!(
                r#"{{"time":"2026-01-02T14:05:00.000Z","pid":1,"event":"lagged","since":{since}}}"#
            );
            Entry::read(serde_json::from_str(&text).unwrap())
        };
        assert!(line(1_767_362_690_000).is_some());
        assert!(line(Millis::MIN).is_none());
        assert!(line(Millis::MAX).is_none());
    }
}
