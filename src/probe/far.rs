//! The far end of a leg: what this service sees of a connection that a prober holds to it.
//!
//! The prober measures from its end. Here each leg is pinged several times a heartbeat, so that a break is noticed, and
//! dated, from this end as well, whichever direction it is in.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use http::HeaderMap;
use serde::{Deserialize, Deserializer};

use crate::config::Probe;
use crate::events;
use crate::evidence::{self, Event, Kind, Millis, Trouble, clock};
use crate::table::unique;

/// How often a leg is pinged that has not told its heartbeat, and the least often.
const PING: Duration = Duration::from_secs(2);

/// The most often.
const PING_LEAST: Duration = Duration::from_millis(50);

/// Connections of legs at once.
const MOST: usize = 32;

static OPEN: AtomicUsize = AtomicUsize::new(0);

/// Names that legs may have in one process's life: each has series of its own.
const NAMES: usize = 16;

fn is_known_or_new(name: &str, settings: &Probe) -> bool {
    if name == settings.edge_leg || name == settings.internal_leg {
        return true;
    }
    static KNOWN: Mutex<Vec<String>> = Mutex::new(Vec::new());
    let mut known = KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
    if known.iter().any(|one| one == name) {
        return true;
    }
    let room = known.len() < NAMES;
    if room {
        known.push(name.to_owned());
    }
    room
}

/// The leg that a request names and proves to be.
pub fn leg(query: Option<&str>, headers: &HeaderMap, settings: &Probe) -> Option<String> {
    let token = settings.token.as_ref()?;
    let mut bearers = headers.get_all(http::header::AUTHORIZATION).iter();
    let (Some(bearer), None) = (bearers.next(), bearers.next()) else {
        return None;
    };
    let (scheme, shown) = bearer.as_bytes().split_at_checked(7)?;
    if !scheme.eq_ignore_ascii_case(b"bearer ") || !token.is(shown) {
        return None;
    }
    let named = query?
        .split('&')
        .find_map(|pair| pair.strip_prefix("leg="))?;
    let name = crate::config::section::leg_name(named.to_owned()).ok()?;
    is_known_or_new(&name, settings).then_some(name)
}

/// The longest time that a prober's word is taken for, in milliseconds.
const LONGEST: Millis = 10 * 365 * 24 * 60 * 60 * 1000;

/// How long something lasted, or was ago.
fn span<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Millis, D::Error> {
    Ok(Millis::deserialize(deserializer)?.clamp(0, LONGEST))
}

/// What a prober says in each heartbeat.
#[derive(Debug, Deserialize)]
struct Heartbeat {
    heartbeat_ms: u64,
    #[serde(deserialize_with = "span")]
    uptime_ms: Millis,
    #[serde(default)]
    rtt_ms: Option<f64>,
    #[serde(default)]
    legs: Vec<Told>,
    #[serde(default)]
    stood_still: Option<Stood>,
}

/// When the prober itself stood still.
#[derive(Debug, Deserialize)]
struct Stood {
    #[serde(deserialize_with = "span")]
    ago_ms: Millis,
    #[serde(deserialize_with = "span")]
    for_ms: Millis,
}

/// What it says of one of its legs.
#[derive(Debug, Deserialize)]
struct Told {
    leg: String,
    up: bool,
    #[serde(deserialize_with = "span")]
    for_ms: Millis,
    #[serde(default)]
    reason: Option<String>,
}

/// A ping that has not been answered.
#[derive(Debug)]
struct Sent {
    number: u64,
    at: Millis,
    then: Instant,
}

/// One connection of a leg. However it ends, its end is told exactly once.
#[derive(Debug)]
pub struct Far {
    leg: String,
    conn: u64,
    stall: Duration,
    ping: Duration,
    sent: VecDeque<Sent>,
    next: u64,
    /// When the last answer came.
    answered: Millis,
    rtt: Duration,
    stalled: Option<Trouble>,
    /// When a sign of life was last put into the file.
    noted: Instant,
    heartbeat: Duration,
    ticked: Instant,
    prober_started: Option<Millis>,
    ended: bool,
}

impl Far {
    /// A leg has connected; one that does not answer for `stall` has stalled. There may be too many.
    pub fn open(leg: String, stall: Duration) -> Option<Far> {
        if OPEN.fetch_add(1, Ordering::AcqRel) >= MOST {
            OPEN.fetch_sub(1, Ordering::AcqRel);
            return None;
        }
        let conn = unique();
        evidence::record(Event::LegOpened {
            leg: leg.clone(),
            conn,
        });
        events::leg_opened(&leg);
        let now = Instant::now();
        Some(Far {
            leg,
            conn,
            stall,
            ping: PING.min(stall / 2),
            sent: VecDeque::new(),
            next: 0,
            answered: evidence::now(),
            rtt: Duration::ZERO,
            stalled: None,
            noted: now,
            heartbeat: PING * 5,
            ticked: now,
            prober_started: None,
            ended: false,
        })
    }

    /// The leg's name.
    pub fn name(&self) -> &str {
        &self.leg
    }

    /// How long to wait for the next [`Far::tick`].
    pub fn pause(&self) -> Duration {
        self.ping
    }

    /// Looks whether the leg has stalled; gives the payload of the ping that is to be sent now.
    pub fn tick(&mut self) -> [u8; 8] {
        // Where this process itself was late, the leg has had no chance to answer.
        let late = self.ticked.elapsed().saturating_sub(self.ping);
        self.ticked = Instant::now();
        if late > self.stall / 4 {
            self.sent.clear();
        }
        self.look();
        self.next += 1;
        self.sent.push_back(Sent {
            number: self.next,
            at: evidence::now(),
            then: Instant::now(),
        });
        self.next.to_be_bytes()
    }

    /// Whether the leg owes an answer that is not overdue yet.
    pub fn owes(&mut self) -> bool {
        self.look();
        !self.ended && self.stalled.is_none() && !self.sent.is_empty()
    }

    fn look(&mut self) {
        let Some(oldest) = self.sent.front().filter(|_| !self.ended) else {
            return;
        };
        if self.stalled.is_none() && oldest.then.elapsed() >= self.stall {
            let trouble = Trouble {
                earliest: self.answered,
                latest: oldest.at + self.rtt.as_millis() as Millis,
                until: None,
                kind: Kind::Stall,
                what: format!("stopped answering at {}", clock(self.answered)),
            };
            events::leg_trouble(&self.leg, "stall");
            self.stall(trouble);
        }
        // A leg that has stalled for long is owed no endless list.
        if self.sent.len() > 1024 {
            self.sent.pop_back();
        }
    }

    fn stall(&mut self, trouble: Trouble) {
        self.stalled = trouble.until.is_none().then(|| trouble.clone());
        evidence::record(Event::LegStalled {
            leg: self.leg.clone(),
            conn: self.conn,
            trouble,
        });
    }

    /// The leg has answered a ping.
    pub fn pong(&mut self, payload: &[u8]) {
        let Ok(number) = payload.try_into().map(u64::from_be_bytes) else {
            return;
        };
        let mut answered = None;
        while self.sent.front().is_some_and(|sent| sent.number <= number) {
            answered = self.sent.pop_front();
        }
        let Some(sent) = answered else { return };
        let rtt = sent.then.elapsed();
        events::leg_answered(&self.leg, rtt);
        if rtt >= self.stall {
            return;
        }
        self.answered = evidence::now();
        self.rtt = rtt;
        if let Some(mut trouble) = self.stalled.take() {
            let lasted = (self.answered - trouble.earliest) as f64 / 1000.0;
            trouble.until = Some(self.answered);
            trouble.what = format!("{} for {lasted:.1} s", trouble.what);
            self.stall(trouble);
        }
        if self.noted.elapsed() >= self.heartbeat {
            self.noted = Instant::now();
            evidence::record(Event::LegWell {
                leg: self.leg.clone(),
                conn: self.conn,
                rtt_ms: rtt.as_secs_f64() * 1000.0,
            });
        } else {
            evidence::heard(&self.leg, self.conn);
        }
    }

    /// The leg has sent a message, which may be a prober's heartbeat.
    pub fn message(&mut self, text: &str) {
        let Ok(heartbeat) = serde_json::from_str::<Heartbeat>(text) else {
            return;
        };
        let now = evidence::now();
        evidence::spoke(&self.leg, self.conn);
        let started = self.started(now, heartbeat.uptime_ms);
        if let Some(stood) = heartbeat.stood_still {
            // What was held up on its way was said earlier than it is heard.
            self.stood((started + heartbeat.uptime_ms).min(now), &stood);
        }
        self.heartbeat = Duration::from_millis(heartbeat.heartbeat_ms.clamp(100, 60_000));
        self.ping = (self.heartbeat / 5)
            .clamp(PING_LEAST, PING)
            .min(self.stall / 2);
        // Its own messages are larger than our pings, and a narrow place is felt by them first.
        if let Some(rtt) = heartbeat
            .rtt_ms
            .map(|rtt| rtt.min(LONGEST as f64))
            .filter(|rtt| *rtt >= self.stall.as_millis() as f64)
            && self.stalled.is_none()
        {
            let sent = now - self.heartbeat.as_millis() as Millis;
            events::leg_trouble(&self.leg, "stall");
            self.stall(Trouble {
                earliest: sent - rtt as Millis,
                latest: sent,
                until: Some(now),
                kind: Kind::Stall,
                what: format!(
                    "took {:.1} s over an echo, by the prober's clock",
                    rtt / 1000.0
                ),
            });
        }
        for told in heartbeat.legs {
            self.told(now, told);
        }
    }

    /// When the prober was started, by its first heartbeat, which is noted.
    fn started(&mut self, now: Millis, uptime: Millis) -> Millis {
        if let Some(at) = self.prober_started {
            return at;
        }
        let at = now - uptime;
        self.prober_started = Some(at);
        evidence::record(Event::ProberStarted {
            leg: self.leg.clone(),
            conn: self.conn,
            at,
        });
        at
    }

    /// The prober has told that it stood still, which it repeats for a while.
    fn stood(&self, now: Millis, stood: &Stood) {
        let until = now - stood.ago_ms;
        let since = until - stood.for_ms;
        let mut known = evidence::stood(&self.leg).into_iter();
        if !known.any(|(_, then)| (then - until).abs() < 1000) {
            evidence::record(Event::ProberStood {
                leg: self.leg.clone(),
                since,
                until,
            });
        }
    }

    /// The prober has told of a leg. Each time that it went down is noted once.
    fn told(&mut self, now: Millis, told: Told) {
        let (Some(reason), false) = (told.reason, told.up) else {
            return;
        };
        let since = now - told.for_ms;
        let is_word = |text: &str| {
            text.len() <= 32
                && text
                    .bytes()
                    .all(|b| b.is_ascii_alphanumeric() || b"-_".contains(&b))
        };
        if !is_word(&told.leg) || !is_word(&reason) || evidence::is_told(&told.leg, since) {
            return;
        }
        evidence::record(Event::LegTold {
            leg: told.leg,
            since,
            reason,
        });
    }

    /// The connection has ended, as `what` says; `left` if this service or the prober wanted it to.
    pub fn end(&mut self, what: &str, left: bool) {
        if std::mem::replace(&mut self.ended, true) {
            return;
        }
        let now = evidence::now();
        if !left {
            events::leg_trouble(&self.leg, "cut");
        }
        evidence::record(Event::LegEnded {
            leg: self.leg.clone(),
            conn: self.conn,
            trouble: Trouble {
                earliest: now,
                latest: now,
                until: None,
                kind: Kind::Cut,
                what: format!("{what} at {}", clock(now)),
            },
            left,
        });
    }
}

impl Drop for Far {
    fn drop(&mut self) {
        self.end("was dropped", true);
        OPEN.fetch_sub(1, Ordering::AcqRel);
        events::leg_closed(&self.leg);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whatever_numbers_a_prober_tells_its_times_have_been() {
        let mut far = Far::open("numbers".into(), Duration::from_secs(5)).unwrap();
        let (least, most) = (i64::MIN, i64::MAX);
        for uptime in [least, most] {
            far.message(&format!(
                r#"{{"heartbeat_ms":{most},"uptime_ms":{uptime},"rtt_ms":1e300,
                "stood_still":{{"ago_ms":{uptime},"for_ms":{most}}},
                "legs":[{{"leg":"a","up":false,"for_ms":{most},"reason":"tls"}}]}}"#
            ));
        }
        let now = evidence::now();
        let conn = evidence::conns("numbers").pop().unwrap();
        assert!(conn.prober.is_some_and(|at| at <= now));
        let stall = conn.stalls.first().unwrap();
        assert!(0 < stall.earliest && stall.earliest <= stall.latest && stall.latest <= now);
        let stood = evidence::stood("numbers");
        assert!(!stood.is_empty());
        for (since, until) in stood {
            assert!(0 < since && since <= until && until <= now);
        }
    }
}
