//! Drills: a laboratory, something that breaks in it, and what every verdict has to be.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rustix::process::Signal;
use serde_json::{Value, json};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use crate::common::dispatcher::wait_for;
use crate::common::instance::{Instance, Version};
use crate::common::lab::{Does, Lab, NAMES, WATCHDOG, Way};
use crate::common::mint;
use crate::common::successor::Successor;

/// What is broken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Where {
    LastMile,
    Edge,
    Internal,
    Serve,
}

impl Where {
    const ALL: [Where; 4] = [Where::LastMile, Where::Edge, Where::Internal, Where::Serve];

    fn segment(self) -> &'static str {
        match self {
            Where::LastMile => "last_mile",
            Where::Edge => "edge",
            Where::Internal => "internal",
            Where::Serve => "serve",
        }
    }
}

/// What happens in a drill.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum What {
    /// One segment breaks in one way.
    Break(Where, Way),
    /// Everybody's last mile at once, all of them in one place.
    Office(Way),
    /// Everybody's last mile at once, in different places.
    Everybody(Way),
    /// One person's device sleeps.
    Sleep,
    /// The tab is closed while the edge is down.
    LeaveInOutage,
    /// The tab is closed while the instance hangs, before anybody would give up.
    LeaveHangingInstance,
    /// The instance is restarted while the edge blinks.
    RestartInBlip,
    /// The instance is restarted.
    Restart,
    /// The dispatcher is replaced while the edge has stalled.
    ReloadInEdgeStall,
    /// The dispatcher is replaced while an instance hangs.
    ReloadInServeStall,
    /// One person's last mile, and a moment later the edge.
    LastMileThenEdge,
    /// The edge, and a moment later the load balancer.
    EdgeThenInternal,
    /// An instance hangs and somebody else's last mile is cut.
    ServeAndLastMile,
    /// The dispatcher stands still for longer than any client waits.
    DispatchStalls,
    /// The dispatcher is told to end.
    DispatchEnds,
    /// The table takes an instance away.
    Revoked,
    /// The prober is killed and a last mile cut at the same moment.
    ProberKilled,
    /// There is no prober, and everybody is cut off.
    NoProber,
    /// A blink of the edge that nobody gives up for, and then a last mile.
    BlinkThenLastMile,
    /// The prober alone loses its way.
    ProberOnly,
    /// Everybody reloads the page.
    Reloads,
    /// The prober has stood still for a while, and then the edge resets everybody.
    ProberStandsThenEdge,
    /// The prober has stood still for a while, and then two last miles are reset.
    ProberStandsThenLastMiles,
    /// The edge stalls for less than a client waits, and a while later somebody goes, in good order.
    HealedThenGoodbye,
    /// The edge stalls for less than a client waits, and a while later a last mile is reset.
    HealedThenLastMile,
    /// The dispatcher stands still for less than a client waits, and a while later a last mile is reset.
    DispatchHealedThenLastMile,
}

/// A drill.
#[derive(Debug, Clone, Copy)]
pub struct Drill {
    what: What,
    people: usize,
    busy: bool,
}

/// One drop and its verdict.
#[derive(Debug, Clone)]
struct Drop {
    drill: String,
    /// The segments that are right, the best first.
    right: &'static [&'static str],
    got: String,
    record: Value,
}

impl fmt::Display for Drill {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let busy = if self.busy { "busy" } else { "idle" };
        write!(f, "{:?}, {} people, {busy}", self.what, self.people)
    }
}

impl Drill {
    /// All of them: every segment in every way, with one person and with many, idle and busy; and the confusing ones.
    pub fn all() -> Vec<Drill> {
        let mut drills = Vec::new();
        for (people, busy) in [(1, false), (1, true), (4, false), (4, true)] {
            for place in Where::ALL {
                for way in Way::ALL {
                    // A polite goodbye over a way on which only its answers are lost is like any other.
                    if (place, way) != (Where::LastMile, Way::LoseDown) {
                        let what = What::Break(place, way);
                        drills.push(Drill { what, people, busy });
                    }
                }
            }
        }
        for (people, busy) in [(1, false), (4, true)] {
            for what in [
                What::Sleep,
                What::LeaveInOutage,
                What::LeaveHangingInstance,
                What::RestartInBlip,
                What::Restart,
                What::ReloadInEdgeStall,
                What::ReloadInServeStall,
                What::LastMileThenEdge,
                What::EdgeThenInternal,
                What::DispatchStalls,
                What::DispatchEnds,
                What::Revoked,
                What::ProberKilled,
                What::NoProber,
                What::BlinkThenLastMile,
                What::ProberOnly,
                What::Reloads,
            ] {
                drills.push(Drill { what, people, busy });
            }
        }
        for what in [
            What::ServeAndLastMile,
            What::ProberStandsThenEdge,
            What::ProberStandsThenLastMiles,
            What::HealedThenGoodbye,
            What::HealedThenLastMile,
            What::DispatchHealedThenLastMile,
            What::Office(Way::Cut),
            What::Office(Way::Freeze),
            What::Everybody(Way::Cut),
        ] {
            let (people, busy) = (4, false);
            drills.push(Drill { what, people, busy });
        }
        drills
    }

    /// Runs it, and gives every drop.
    async fn run(self) -> Vec<Drop> {
        let mut lab = Lab::new(self.people, self.busy, matches!(self.what, What::Office(_))).await;
        // Records tell whole milliseconds.
        let began = SystemTime::now() - Duration::from_millis(1);
        let right = self.happen(&mut lab).await;
        let over = SystemTime::now();
        let records = match self.what {
            What::DispatchEnds => lab.judged().await,
            _ => lab.finish().await,
        };
        let mut drops = Vec::new();
        for record in records {
            let ended = humantime::parse_rfc3339(record["time"].as_str().unwrap()).unwrap();
            let user = record["user"].as_str().unwrap();
            let got = record["verdict"]["segment"].as_str().unwrap().to_owned();
            let right = right.get(user).copied().unwrap_or(NONE);
            // What the drill itself ends when it is over, and attempts in between that nobody has waited for.
            let ordinary =
                got == "none" && (ended > over || right != NONE && record["opened"] == false);
            if ended >= began && !ordinary {
                drops.push(Drop {
                    drill: self.to_string(),
                    right,
                    got,
                    record,
                });
            }
        }
        drops
    }

    /// Lets it happen, and gives what is right for whom; for everybody else nothing should have dropped.
    async fn happen(self, lab: &mut Lab) -> HashMap<&'static str, &'static [&'static str]> {
        let everybody = |right| NAMES.iter().map(|name| (*name, right)).collect();
        let alice = |right| HashMap::from([("alice", right)]);
        match self.what {
            What::Break(place, way) => {
                let relay = match place {
                    Where::LastMile => &lab.people[0].last_mile,
                    Where::Edge => &lab.edge,
                    Where::Internal => &lab.balancer,
                    Where::Serve => &lab.serve[0],
                };
                let affected = match place {
                    Where::LastMile | Where::Serve => 1,
                    Where::Edge | Where::Internal => self.people,
                };
                relay.break_(way);
                lost(lab, 0..affected).await;
                if !matches!(way, Way::Cut | Way::Reset) {
                    tokio::time::sleep(WATCHDOG / 2).await;
                    relay.mend();
                }
                lab.wait_until_well().await;
                let right = right(place.segment());
                if affected == 1 {
                    alice(right)
                } else {
                    everybody(right)
                }
            }
            What::Office(way) | What::Everybody(way) => {
                for person in &lab.people {
                    person.last_mile.break_(way);
                }
                lost(lab, 0..self.people).await;
                for person in &lab.people {
                    person.last_mile.mend();
                }
                lab.wait_until_well().await;
                if matches!(self.what, What::Office(_)) {
                    everybody(right("last_mile"))
                } else {
                    // They have nothing in common but us, and no leg felt it: the evidence contradicts itself.
                    everybody(&["last_mile", "unknown"])
                }
            }
            What::Sleep => {
                lab.people[0].does(Does::Sleep);
                tokio::time::sleep(WATCHDOG * 2).await;
                // It wakes somewhere else.
                lab.people[0].last_mile.break_(Way::Reset);
                lab.people[0].does(Does::Work);
                lost(lab, 0..1).await;
                lab.wait_until_well().await;
                alice(right("last_mile"))
            }
            What::LeaveInOutage => {
                lab.edge.break_(Way::Freeze);
                tokio::time::sleep(WATCHDOG / 4).await;
                lab.people[0].does(Does::Leave);
                tokio::time::sleep(WATCHDOG / 4).await;
                lab.edge.mend();
                ended(lab, 1).await;
                alice(right("none"))
            }
            What::LeaveHangingInstance => {
                lab.serve[0].break_(Way::Freeze);
                tokio::time::sleep(WATCHDOG / 4).await;
                lab.people[0].does(Does::Leave);
                ended(lab, 1).await;
                lab.serve[0].mend();
                alice(right("none"))
            }
            What::RestartInBlip => {
                lab.edge.break_(Way::Freeze);
                restart(lab).await;
                lab.edge.mend();
                lost(lab, 0..1).await;
                lab.wait_until_well().await;
                alice(right("serve"))
            }
            What::Restart => {
                restart(lab).await;
                lost(lab, 0..1).await;
                lab.wait_until_well().await;
                alice(right("serve"))
            }
            What::ReloadInEdgeStall => {
                lab.edge.break_(Way::Freeze);
                reload(lab).await;
                lost(lab, 0..self.people).await;
                lab.edge.mend();
                tokio::time::sleep(WATCHDOG / 2).await;
                lab.wait_until_well().await;
                everybody(right("edge"))
            }
            What::ReloadInServeStall => {
                lab.serve[0].break_(Way::Freeze);
                reload(lab).await;
                lost(lab, 0..1).await;
                lab.serve[0].mend();
                lab.wait_until_well().await;
                alice(right("serve"))
            }
            What::LastMileThenEdge => {
                lab.people[0].last_mile.break_(Way::Cut);
                tokio::time::sleep(Duration::from_millis(800)).await;
                lab.edge.break_(Way::Cut);
                lost(lab, 0..self.people).await;
                lab.wait_until_well().await;
                let mut right = everybody(right("edge"));
                right.insert("alice", &["last_mile", "edge"]);
                right
            }
            What::EdgeThenInternal => {
                lab.edge.break_(Way::Cut);
                lost(lab, 0..self.people).await;
                lab.wait_until_well().await;
                lab.balancer.break_(Way::Cut);
                tokio::time::sleep(Duration::from_millis(100)).await;
                lab.wait_until_well().await;
                everybody(&["edge", "internal"])
            }
            What::ServeAndLastMile => {
                lab.serve[0].break_(Way::Freeze);
                lab.people[1].last_mile.break_(Way::Cut);
                lost(lab, 0..2).await;
                lab.serve[0].mend();
                lab.wait_until_well().await;
                HashMap::from([("alice", right("serve")), ("bob", right("last_mile"))])
            }
            What::DispatchStalls => {
                lab.dispatcher.signal(Signal::STOP);
                tokio::time::sleep(WATCHDOG * 3 / 2).await;
                lab.dispatcher.signal(Signal::CONT);
                lost(lab, 0..self.people).await;
                lab.wait_until_well().await;
                everybody(right("dispatch"))
            }
            What::DispatchEnds => {
                lab.dispatcher.signal(Signal::TERM);
                lab.dispatcher.exited().await;
                everybody(right("dispatch"))
            }
            What::Revoked => {
                let mut table: Value = serde_json::from_str(
                    &std::fs::read_to_string(lab.base.path().join("dispatch.json")).unwrap(),
                )
                .unwrap();
                table.as_object_mut().unwrap().remove("alice");
                lab.dispatcher.write_table(&table);
                lost(lab, 0..1).await;
                lab.people[0].does(Does::Finish);
                alice(right("dispatch"))
            }
            What::ProberKilled => {
                lab.signal_prober(Signal::KILL).await;
                lab.people[0].last_mile.break_(Way::Cut);
                lost(lab, 0..1).await;
                lab.start_prober();
                lab.wait_until_well().await;
                alice(&["last_mile", "unknown"])
            }
            What::NoProber => {
                lab.signal_prober(Signal::TERM).await;
                lab.edge.break_(Way::Cut);
                lost(lab, 0..self.people).await;
                lab.wait_until_well().await;
                everybody(&["edge", "unknown"])
            }
            What::BlinkThenLastMile => {
                lab.edge.break_(Way::Freeze);
                tokio::time::sleep(WATCHDOG / 3).await;
                lab.edge.mend();
                tokio::time::sleep(Duration::from_millis(600)).await;
                lab.people[0].last_mile.break_(Way::Cut);
                lost(lab, 0..1).await;
                lab.wait_until_well().await;
                alice(right("last_mile"))
            }
            What::ProberOnly => {
                lab.signal_prober(Signal::STOP).await;
                tokio::time::sleep(WATCHDOG).await;
                lab.signal_prober(Signal::CONT).await;
                lab.wait_until_well().await;
                HashMap::new()
            }
            What::ProberStandsThenEdge => {
                lab.signal_prober(Signal::STOP).await;
                tokio::time::sleep(WATCHDOG * 4 / 5).await;
                lab.edge.break_(Way::Reset);
                lost(lab, 0..self.people).await;
                tokio::time::sleep(WATCHDOG).await;
                lab.signal_prober(Signal::CONT).await;
                lab.wait_until_well().await;
                everybody(&["edge", "unknown"])
            }
            What::ProberStandsThenLastMiles => {
                lab.signal_prober(Signal::STOP).await;
                tokio::time::sleep(WATCHDOG * 4 / 5).await;
                lab.people[0].last_mile.break_(Way::Reset);
                lab.people[1].last_mile.break_(Way::Reset);
                lost(lab, 0..2).await;
                tokio::time::sleep(WATCHDOG).await;
                lab.signal_prober(Signal::CONT).await;
                lab.wait_until_well().await;
                let right: &[_] = &["last_mile", "unknown"];
                HashMap::from([("alice", right), ("bob", right)])
            }
            What::HealedThenGoodbye | What::HealedThenLastMile => {
                lab.edge.break_(Way::Freeze);
                tokio::time::sleep(WATCHDOG * 7 / 10).await;
                lab.edge.mend();
                tokio::time::sleep(WATCHDOG * 2 / 5).await;
                if self.what == What::HealedThenGoodbye {
                    lab.people[0].does(Does::Finish);
                    ended(lab, 1).await;
                    alice(right("none"))
                } else {
                    lab.people[0].last_mile.break_(Way::Reset);
                    lost(lab, 0..1).await;
                    lab.wait_until_well().await;
                    alice(right("last_mile"))
                }
            }
            What::DispatchHealedThenLastMile => {
                lab.dispatcher.signal(Signal::STOP);
                tokio::time::sleep(WATCHDOG * 7 / 10).await;
                lab.dispatcher.signal(Signal::CONT);
                tokio::time::sleep(WATCHDOG / 2).await;
                lab.people[0].last_mile.break_(Way::Reset);
                lost(lab, 0..1).await;
                lab.wait_until_well().await;
                alice(right("last_mile"))
            }
            What::Reloads => {
                for person in &lab.people {
                    person.does(Does::Leave);
                }
                ended(lab, self.people).await;
                everybody(right("none"))
            }
        }
    }
}

/// Nothing but an ordinary end is right.
const NONE: &[&str] = &["none"];

fn right(segment: &'static str) -> &'static [&'static str] {
    match segment {
        "none" => NONE,
        "last_mile" => &["last_mile"],
        "edge" => &["edge"],
        "internal" => &["internal"],
        "serve" => &["serve"],
        _ => &["dispatch"],
    }
}

/// Waits until these people have lost their WebSockets.
async fn lost(lab: &Lab, people: std::ops::Range<usize>) {
    wait_for("the drops", async || {
        lab.people[people.clone()]
            .iter()
            .all(|person| person.counts().lost > 0)
    })
    .await;
}

/// Waits until so many records are there.
async fn ended(lab: &Lab, count: usize) {
    wait_for("the ends", async || lab.dispatcher.records().len() >= count).await;
}

/// Ends alice's instance and starts it again, which takes a moment.
async fn restart(lab: &mut Lab) {
    let old = lab.instances.remove(0);
    let port = old.kill().await;
    tokio::time::sleep(Duration::from_millis(500)).await;
    let home = mint::home(lab.base.path(), "alice");
    let new = Instance::start_with(&home, Version::V0_0_33, port, Duration::from_secs(5)).await;
    lab.instances.insert(0, new);
}

/// Replaces the dispatcher.
async fn reload(lab: &mut Lab) {
    let settings = lab.base.path().join("t3-dispatch.yaml");
    lab.successor = Some(Successor::of(&settings).await);
}

/// What was broken, against what the verdict says.
#[derive(Default)]
pub struct Matrix {
    drops: Vec<Drop>,
    failed: Vec<String>,
}

impl Matrix {
    /// Runs the drills, so many at once; `told` hears of each that is done.
    pub async fn of(drills: Vec<Drill>, at_once: usize, told: impl Fn(&Drill)) -> Matrix {
        let places = Arc::new(Semaphore::new(at_once));
        let mut running = JoinSet::new();
        for drill in drills {
            let places = places.clone();
            // A runtime for each, so that one laboratory's load is not another's.
            running.spawn(async move {
                let _place = places.acquire_owned().await.unwrap();
                let run = move || {
                    let runtime = tokio::runtime::Builder::new_current_thread()
                        .enable_all()
                        .build()
                        .unwrap();
                    (drill, runtime.block_on(drill.run()))
                };
                (drill, tokio::task::spawn_blocking(run).await)
            });
        }
        let mut matrix = Matrix::default();
        while let Some(done) = running.join_next().await {
            match done.unwrap() {
                (drill, Ok((_, drops))) => {
                    told(&drill);
                    matrix.drops.extend(drops);
                }
                (drill, Err(panic)) => matrix.failed.push(format!("{drill}: {panic}")),
            }
        }
        matrix
    }

    /// Drills that did not run as they should.
    pub fn failed(&self) -> &[String] {
        &self.failed
    }

    /// Drops of which the evidence can tell where they come from.
    pub fn drops(&self) -> usize {
        let telling = |drop: &&Drop| !drop.right.contains(&"unknown");
        self.drops.iter().filter(telling).count()
    }

    /// Those of them that were given the segment that was broken.
    pub fn right(&self) -> usize {
        let is_right = |drop: &&Drop| drop.right.contains(&drop.got.as_str());
        let telling = self
            .drops
            .iter()
            .filter(|drop| !drop.right.contains(&"unknown"));
        telling.filter(is_right).count()
    }

    fn wrong(&self) -> impl Iterator<Item = &Drop> {
        self.drops
            .iter()
            .filter(|drop| !drop.right.contains(&drop.got.as_str()))
    }

    /// Drops for which infrastructure was convicted that was not at fault.
    pub fn false_convictions(&self) -> Vec<String> {
        self.wrong()
            .filter(|drop| matches!(drop.got.as_str(), "edge" | "internal" | "dispatch"))
            .map(|drop| format!("{}: {:#}", drop.drill, drop.record))
            .collect()
    }
}

impl fmt::Display for Matrix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const SEGMENTS: [&str; 7] = [
            "none",
            "last_mile",
            "edge",
            "internal",
            "serve",
            "dispatch",
            "unknown",
        ];
        let mut counts = BTreeMap::new();
        for drop in &self.drops {
            *counts
                .entry((drop.right[0], drop.got.as_str()))
                .or_insert(0) += 1;
        }
        write!(f, "{:<12}", "broken")?;
        for segment in SEGMENTS {
            write!(f, "{segment:>10}")?;
        }
        writeln!(f)?;
        for broken in SEGMENTS {
            if counts.keys().any(|(right, _)| *right == broken) {
                write!(f, "{broken:<12}")?;
                for got in SEGMENTS {
                    match counts.get(&(broken, got)) {
                        Some(count) => write!(f, "{count:>10}")?,
                        None => write!(f, "{:>10}", "·")?,
                    }
                }
                writeln!(f)?;
            }
        }
        writeln!(
            f,
            "{} of {} drops were given the segment that was broken; for {} more the evidence is missing or contradicts itself",
            self.right(),
            self.drops(),
            self.drops.len() - self.drops()
        )?;
        for failed in &self.failed {
            writeln!(f, "failed: {failed}")?;
        }
        for drop in self.wrong() {
            let evidence = &drop.record["verdict"]["evidence"];
            let shown = json!({
                "user": drop.record["user"], "how": drop.record["how"], "code": drop.record["code"],
                "dur_ms": drop.record["dur_ms"], "time": drop.record["time"], "opened": drop.record["opened"],
                "client": drop.record["client"], "instance": drop.record["instance"],
                "unanswered_ms": drop.record["unanswered_ms"], "gap": drop.record["gap"],
            });
            writeln!(
                f,
                "{} → {} (right: {:?})\n  {evidence}\n  {shown}",
                drop.drill, drop.got, drop.right
            )?;
        }
        Ok(())
    }
}
