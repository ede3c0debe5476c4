//! Keeps each drop until its window has closed, gathers the evidence, and has the verdict written.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use pingora::server::ShutdownWatch;
use pingora::services::background::BackgroundService;

use crate::config;
use crate::events;
use crate::evidence::{self, Conn, Event, Follower, Millis};
use crate::ledger::Ledger;
use crate::probe::serve;
use crate::server::{Phase, phase};
use crate::table::Instance;
use crate::tunnel::live::{Record, witnesses};
use crate::tunnel::{Ender, How};
use crate::verdict::{self, Around, Everybody, Leg, Rules, Verdict, Witness, is_talkative};

/// How often it is looked for windows that have closed, and for what other processes have seen.
const LOOK: Duration = Duration::from_millis(100);

/// How much longer than its window a drop may wait for legs to come back: a prober tries again after three seconds, then six.
fn for_legs(rules: &Rules) -> Millis {
    let watchdog = rules.watchdog.as_millis() as Millis;
    (watchdog * 3 / 5).clamp(5000, 12_000)
}

/// How old a record without a verdict may be that a process has left behind which was killed.
const ORPHANED: Duration = Duration::from_secs(10 * 60);

/// Ends that are remembered, and for how long beyond the window of the last of them.
const RECENT: usize = 20_000;
const REMEMBERED: Millis = 60_000;

/// Most drops that wait; more are judged at once, with what is known.
const WAITING: usize = 20_000;

#[derive(Debug, Default)]
struct Docket {
    waiting: VecDeque<(Record, Millis)>,
    /// Whose tunnels have ended of late, to see who fell together.
    recent: VecDeque<(String, Witness)>,
}

static DOCKET: Mutex<Docket> = Mutex::new(Docket {
    waiting: VecDeque::new(),
    recent: VecDeque::new(),
});
static SETTINGS: OnceLock<(Rules, String, String)> = OnceLock::new();
static LAST_OPENED: AtomicI64 = AtomicI64::new(0);
static REPLACED: AtomicBool = AtomicBool::new(false);

impl Docket {
    /// The drops whose windows have closed.
    fn take_due(&mut self, now: Millis) -> Vec<(Record, Millis)> {
        // Thousands may wait for half a minute, and are left in their places meanwhile.
        if !self.waiting.iter().any(|(_, due)| is_due(*due, now)) {
            return Vec::new();
        }
        let (due, waiting): (Vec<_>, Vec<_>) = std::mem::take(&mut self.waiting)
            .into_iter()
            .partition(|(_, due)| is_due(*due, now));
        self.waiting = waiting.into();
        due
    }

    /// Forgets the ends that no drop needs any more.
    fn forget(&mut self, now: Millis) {
        let kept = SETTINGS.get().map_or(0, |(rules, ..)| {
            rules.window().as_millis() as Millis + for_legs(rules)
        });
        let old = now - kept - REMEMBERED;
        let is_old = |(_, end): &(_, Witness)| end.ended.is_some_and(|(at, _)| at < old);
        while self.recent.front().is_some_and(is_old) {
            self.recent.pop_front();
        }
        if self.recent.is_empty() {
            self.recent.shrink_to_fit();
        }
    }
}

fn docket() -> MutexGuard<'static, Docket> {
    DOCKET.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The rules that the settings make.
pub fn rules(tunnels: &config::Tunnels) -> Rules {
    Rules {
        heartbeat: tunnels.client_heartbeat,
        watchdog: tunnels.client_watchdog,
    }
}

/// A tunnel was opened now.
pub fn opened() {
    LAST_OPENED.store(evidence::now(), Ordering::Relaxed);
}

/// The verdict that needs no more evidence, if there is one.
pub fn at_once(record: &Record) -> Option<Verdict> {
    let (rules, edge, internal) = SETTINGS.get()?;
    let verdict = verdict::at_once(record, rules)?;
    // A goodbye while a leg has stalled may be that of a client that has heard nothing.
    let has_stalled = |leg: &String| evidence::conns(leg).last().is_some_and(Conn::is_stalled);
    let goodbye = record.first() == Some((Ender::Client, How::Close)) && record.code != Some(1001);
    if goodbye && (has_stalled(edge) || has_stalled(internal)) {
        return None;
    }
    events::judged(&verdict);
    Some(verdict)
}

/// Takes note of an end, and keeps it until its window has closed if it has no verdict yet.
pub fn ended(record: Record, instance: Arc<Instance>) {
    let Some((rules, ..)) = SETTINGS.get() else {
        return;
    };
    let mut docket = docket();
    if docket.recent.len() >= RECENT {
        docket.recent.pop_front();
    }
    if record.opened {
        let witness = witness(&record, rules);
        docket.recent.push_back((record.user.clone(), witness));
    }
    if record.verdict.is_some() {
        return;
    }
    serve::ask(instance, record.ended_by == Some(Ender::Instance));
    let due = record.ended() + rules.window().as_millis() as Millis;
    docket.waiting.push_back((record, due));
    let early = if docket.waiting.len() > WAITING {
        docket.waiting.pop_front()
    } else {
        None
    };
    drop(docket);
    pronounce(early.iter().map(|(record, _)| record));
}

/// Somebody else has taken over, and will judge what this process leaves behind.
pub fn replaced() {
    REPLACED.store(true, Ordering::Release);
}

/// The process ends: what still waits is left to the successor, or judged with what is known.
pub fn last_words() {
    let waiting = std::mem::take(&mut docket().waiting);
    if !REPLACED.load(Ordering::Acquire) {
        return pronounce(waiting.iter().map(|(record, _)| record));
    }
    for (record, due) in waiting {
        let record = Box::new(record);
        evidence::record(Event::Entrusted { record, due });
    }
}

/// The background task.
pub struct Judge {
    ledger: Ledger,
    started: Millis,
    follower: tokio::sync::Mutex<Follower>,
}

impl Judge {
    /// Judges by these settings from now on.
    pub fn new(settings: &config::Dispatch, ledger: &Ledger) -> Judge {
        let probe = &settings.probe;
        let _ = SETTINGS.set((
            rules(&settings.tunnels),
            probe.edge_leg.clone(),
            probe.internal_leg.clone(),
        ));
        if probe.token.is_some() {
            events::legs_expected([&probe.edge_leg, &probe.internal_leg]);
        }
        Judge {
            ledger: ledger.clone(),
            started: evidence::now(),
            follower: Follower::new(ledger.evidence().path).into(),
        }
    }
}

#[async_trait]
impl BackgroundService for Judge {
    async fn start(&self, _shutdown: ShutdownWatch) {
        let mut follower = self.follower.lock().await;
        // What a predecessor has left before this process was there has been judged, or is lost.
        if let Ok(entries) = follower.read() {
            evidence::learn(entries.into_iter());
            evidence::take_entrusted();
        }
        let ledger = self.ledger.clone();
        let started = self.started;
        let orphans = tokio::task::spawn_blocking(move || orphans(&ledger, started)).await;
        docket().waiting.extend(orphans.unwrap_or_default());
        let phase = phase();
        loop {
            tokio::time::sleep(LOOK).await;
            // A file that cannot be read costs what other processes have seen, which the verdict then lacks.
            if let Ok(entries) = follower.read() {
                evidence::learn(entries.into_iter());
            }
            let entrusted = evidence::take_entrusted();
            if *phase.borrow() == Phase::Serving {
                docket().waiting.extend(entrusted);
            }
            let now = evidence::now();
            let due = {
                let mut docket = docket();
                docket.forget(now);
                docket.take_due(now)
            };
            let away = if due.is_empty() { None } else { legs_away() };
            let (wait, due): (Vec<_>, Vec<_>) = due.into_iter().partition(|(record, due)| {
                let wait = |(away, (rules, ..)): (Millis, &(Rules, _, _))| {
                    may_wait(record, *due, now, away, rules)
                };
                away.zip(SETTINGS.get()).is_some_and(wait)
            });
            docket().waiting.extend(wait);
            pronounce(due.iter().map(|(record, _)| record));
        }
    }
}

/// Whether a window has closed by now. One that is further away than windows are long was opened before the clock was set
/// back: nobody waits for that time to come again.
fn is_due(due: Millis, now: Millis) -> bool {
    let window = SETTINGS
        .get()
        .map_or(0, |(rules, ..)| rules.window().as_millis() as Millis);
    due <= now || due > now + window
}

/// Whether a leg is there through this connection.
fn is_connected(conn: &Conn) -> bool {
    conn.end.is_none() && !conn.left && !conn.is_stalled()
}

/// Since when both legs have been away, if they are: then a drop of that time is worth waiting for, because their return
/// tells more.
fn legs_away() -> Option<Millis> {
    let (_, edge, internal) = SETTINGS.get()?;
    let away = |leg: &String| {
        let conns = evidence::conns(leg);
        let ends = conns.iter().filter_map(|conn| conn.end.as_ref());
        let since = ends.map(|end| end.latest).max();
        since.filter(|_| !conns.iter().any(is_connected))
    };
    Some(away(edge)?.min(away(internal)?))
}

/// Whether the verdict on a drop whose window has closed leans on legs that have been away since then.
fn may_wait(record: &Record, due: Millis, now: Millis, away: Millis, rules: &Rules) -> bool {
    let watchdog = (rules.watchdog + rules.heartbeat).as_millis() as Millis;
    record.opened
        && record.ended_by == Some(Ender::Client)
        && (due..due + for_legs(rules)).contains(&now)
        && away >= record.ended() - watchdog - record.unheard_ms as Millis
}

/// The drops that a process has left without a verdict which is there no more.
fn orphans(ledger: &Ledger, started: Millis) -> Vec<(Record, Millis)> {
    let since = SystemTime::now() - ORPHANED;
    let found = ledger.newest(None, Some(since), WAITING);
    let records = found.unwrap_or_default().records;
    let orphaned = |record: &Record| {
        // A key begins with a time and the process.
        let pid = record
            .key
            .split('-')
            .nth(1)
            .and_then(|pid| pid.parse().ok());
        let pid = pid.and_then(rustix::process::Pid::from_raw);
        let is_gone = |pid| {
            // In a container, the process before this one may have had the same number.
            pid == rustix::process::getpid() || rustix::process::test_kill_process(pid).is_err()
        };
        record.verdict.is_none() && record.ended() < started && pid.is_some_and(is_gone)
    };
    let now = evidence::now();
    records
        .into_iter()
        .filter_map(|line| serde_json::from_value::<Record>(line).ok())
        .filter(orphaned)
        .map(|record| (record, now))
        .collect()
}

/// Judges drops and has the verdicts written.
fn pronounce<'a>(records: impl Iterator<Item = &'a Record>) {
    let Some((rules, edge, internal)) = SETTINGS.get() else {
        return;
    };
    let mut others = None;
    for record in records {
        // Everybody's tunnels are looked at once for all drops that are due together.
        let others = others.get_or_insert_with(|| Arc::new(everybody(rules)));
        let around = around(record, rules, edge, internal, others.clone());
        let verdict = verdict::judge(record, &around, rules);
        let own = others.get(&record.user).into_iter().flatten();
        let back = own
            .filter(|other| is_later(other, record, rules))
            .map(|other| (other.opened - record.ended()).max(0))
            .min();
        events::judged(&verdict);
        events::pronounced(record, &verdict, back);
    }
}

/// Whether somebody's tunnel came after this one. The next one may be there before the last one's end is known.
fn is_later(other: &Witness, record: &Record, rules: &Rules) -> bool {
    let asked = record.ended() - record.dur_ms as Millis;
    other.opened >= record.ended() - rules.slack() && other.opened > asked + 5
}

/// The tunnels that are open, and those that have ended of late.
fn everybody(rules: &Rules) -> Everybody {
    let recent: Vec<_> = docket().recent.iter().cloned().collect();
    let mut everybody = Everybody::new();
    for (user, witness) in witnesses(rules).into_iter().chain(recent) {
        everybody.entry(user).or_default().push(witness);
    }
    everybody
}

fn around(
    record: &Record,
    rules: &Rules,
    edge: &str,
    internal: &str,
    others: Arc<Everybody>,
) -> Around {
    let ended = record.ended();
    let watchdog = rules.watchdog.as_millis() as Millis;
    let (lags, pressure) = evidence::host(ended - watchdog, ended);
    let leg = |name: &str| Leg {
        name: name.to_owned(),
        conns: evidence::conns(name),
        // Where this process stood still, it was not the leg that did not answer.
        stood: [evidence::stood(name), lags.clone()].concat(),
    };
    let (edge, internal) = (leg(edge), leg(internal));
    let away = |leg: &Leg| !leg.conns.iter().any(is_connected);
    let opened_since = LAST_OPENED.load(Ordering::Relaxed) > ended + rules.slack();
    Around {
        opened_since: opened_since && away(&edge) && away(&internal),
        edge,
        internal,
        instance: evidence::instance(record.port),
        lags,
        pressure,
        others,
        now: evidence::now(),
    }
}

/// What an end shows of its person's connection.
fn witness(record: &Record, rules: &Rules) -> Witness {
    let ended = record.ended();
    let lived = record.dur_ms as Millis;
    let silence = record.unheard_ms as Millis;
    let gap = record.gap.map(|gap| {
        let to = ended - gap.ago_ms as Millis;
        (to - gap.length_ms as Millis, to)
    });
    let badly = record.ended_by == Some(Ender::Client)
        && (record.how != Some(How::Close) || record.verdict.is_none());
    Witness {
        ip: record.ip.clone(),
        opened: ended - lived,
        heard: ended - silence,
        gap,
        talkative: is_talkative(
            record.client.messages,
            lived - silence - gap.map_or(0, |(from, to)| to - from),
            rules,
        ),
        ended: Some((ended, badly)),
    }
}
