//! From what is known of a tunnel's end, and of everything around it, to the segment that was at fault: pure.
//!
//! The legs of a prober take the same way as people's traffic and differ only in where they begin, so a break that one of
//! them felt and the other did not lies between their beginnings. Nothing is convicted by absence: where the evidence is
//! missing or contradicts itself, the verdict is [`Segment::Unknown`] and says why.

mod leg;
#[cfg(test)]
mod tests;
mod weigh;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::evidence::{Conn, InstanceHistory, Kind, Millis, Trouble, clock};
use crate::tunnel::live::Record;
use crate::tunnel::{Ender, How};
use leg::{Break, Says, find_break, says};

/// A part of the way between a person and their instance.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Segment {
    /// None: it ended as ends should.
    None,
    /// From the person to the edge: their device and their network.
    LastMile,
    /// From the edge to the load balancer.
    Edge,
    /// From the load balancer to this service.
    Internal,
    /// The instance.
    Serve,
    /// This service.
    Dispatch,
    /// Not known.
    Unknown,
}

impl Segment {
    /// Every segment.
    pub const ALL: [Segment; 7] = [
        Segment::None,
        Segment::LastMile,
        Segment::Edge,
        Segment::Internal,
        Segment::Serve,
        Segment::Dispatch,
        Segment::Unknown,
    ];

    /// Its name in the ledger and the metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Segment::None => "none",
            Segment::LastMile => "last_mile",
            Segment::Edge => "edge",
            Segment::Internal => "internal",
            Segment::Serve => "serve",
            Segment::Dispatch => "dispatch",
            Segment::Unknown => "unknown",
        }
    }
}

/// How sure a verdict is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Confidence {
    /// One witness, and nothing that speaks against it.
    Low,
    /// Direct evidence, unconfirmed.
    Medium,
    /// Direct evidence that something else confirms.
    High,
}

impl Confidence {
    /// Its name in the ledger.
    pub fn as_str(self) -> &'static str {
        match self {
            Confidence::Low => "low",
            Confidence::Medium => "medium",
            Confidence::High => "high",
        }
    }
}

/// What is held to be at fault, and why.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verdict {
    /// The segment.
    pub segment: Segment,
    /// How sure that is.
    pub confidence: Confidence,
    /// What speaks for it, each in a sentence.
    pub evidence: Vec<String>,
}

/// What the client does, and what follows from it for how evidence is weighed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rules {
    /// How often a client says something by itself.
    pub heartbeat: Duration,
    /// After how long without an answer it gives up.
    pub watchdog: Duration,
}

impl Default for Rules {
    fn default() -> Rules {
        Rules {
            heartbeat: Duration::from_secs(5),
            watchdog: Duration::from_secs(20),
        }
    }
}

impl Rules {
    /// How far apart two signs of one event may be.
    pub fn slack(&self) -> Millis {
        millis(self.watchdog / 20).clamp(300, 1000)
    }

    /// A leg that has not answered for so long has stalled.
    pub fn stall(&self) -> Duration {
        (self.watchdog / 4).clamp(Duration::from_millis(300), Duration::from_secs(5))
    }

    /// A silence that may have made a client give up.
    pub fn gap(&self) -> Duration {
        (self.watchdog / 2).max(self.watchdog.saturating_sub(self.heartbeat))
    }

    /// How long after an end evidence may still come in.
    pub fn window(&self) -> Duration {
        self.watchdog * 3 / 2
    }

    fn heartbeat(&self) -> Millis {
        millis(self.heartbeat)
    }

    fn watchdog(&self) -> Millis {
        millis(self.watchdog)
    }
}

fn millis(duration: Duration) -> Millis {
    duration.as_millis() as Millis
}

/// Everything that is known around an end.
#[derive(Debug, Clone, Default)]
pub struct Around {
    /// The leg over the whole way.
    pub edge: Leg,
    /// The leg from the load balancer.
    pub internal: Leg,
    /// The instance.
    pub instance: InstanceHistory,
    /// When this process stood still: from, to.
    pub lags: Vec<(Millis, Millis)>,
    /// What the host's tasks waited for around the end, in words.
    pub pressure: Vec<String>,
    /// Everybody's tunnels.
    pub others: Arc<Everybody>,
    /// Whether somebody has come in over the same way since, while the legs were away.
    pub opened_since: bool,
    /// When this is judged.
    pub now: Millis,
}

/// A leg as seen from here.
#[derive(Debug, Clone, Default)]
pub struct Leg {
    /// Its name.
    pub name: String,
    /// Its connections, the oldest first.
    pub conns: Vec<Conn>,
    /// When one of its ends stood still: from, to.
    pub stood: Vec<(Millis, Millis)>,
}

/// The tunnels of each person.
pub type Everybody = HashMap<String, Vec<Witness>>;

/// A tunnel, for what it shows of its person's connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Witness {
    /// Where they come from.
    pub ip: String,
    /// When it was opened.
    pub opened: Millis,
    /// When the client was heard last.
    pub heard: Millis,
    /// The client's last long silence.
    pub gap: Option<(Millis, Millis)>,
    /// Whether the client speaks regularly, so that its silence means something.
    pub talkative: bool,
    /// When it ended, and whether badly on the client's side.
    pub ended: Option<(Millis, bool)>,
}

/// The verdict that no later evidence can change, if there is one.
pub fn at_once(record: &Record, rules: &Rules) -> Option<Verdict> {
    let Some((ender, how)) = record.first() else {
        return Some(ended_by_us(record));
    };
    match (ender, how) {
        (Ender::Dispatch, _) => Some(ended_by_us(record)),
        (Ender::Instance, How::Refused) => Some(verdict(
            Segment::Serve,
            Confidence::High,
            vec!["the instance did not take the WebSocket".into()],
        )),
        (Ender::Instance, How::Close) if !ordinary(record.code) => Some(verdict(
            Segment::Serve,
            Confidence::High,
            vec![format!(
                "the instance closed the WebSocket with code {}",
                record.code.unwrap_or(1005)
            )],
        )),
        (Ender::Instance, How::Close) => None,
        (Ender::Instance, how) => Some(verdict(
            Segment::Serve,
            Confidence::High,
            vec![format!(
                "the instance {} without a Close frame",
                match how {
                    How::Fin => "closed its connection",
                    How::Rst => "reset its connection",
                    _ => "was gone",
                }
            )],
        )),
        (Ender::Client, How::Close) if record.opened && !gave_up(record, rules) => {
            Some(ordinary_end(record))
        }
        (Ender::Client, _) => None,
    }
}

/// Whether the tunnel itself shows that its client may have given up rather than left.
fn gave_up(record: &Record, rules: &Rules) -> bool {
    hangs(record, rules)
        || record.code != Some(1001)
            && (!ordinary(record.code) || closed_gap(record, rules).is_some())
}

/// A code with which either side may end a WebSocket that is not needed any more.
fn ordinary(code: Option<u16>) -> bool {
    matches!(code, None | Some(1000 | 1005))
}

fn ordinary_end(record: &Record) -> Verdict {
    let code = record.code.unwrap_or(1005);
    let what = match code {
        1001 => {
            "the browser left the page (Close 1001: a tab closed, a reload, another page)".into()
        }
        code => format!("the client closed the WebSocket (code {code})"),
    };
    verdict(Segment::None, Confidence::High, vec![what])
}

fn ended_by_us(record: &Record) -> Verdict {
    let what = match record.how {
        Some(How::Revoked) => "the dispatch table took the instance away from the person",
        Some(How::Shutdown) => "this service was told to end",
        _ => "this service failed the WebSocket; please report it",
    };
    verdict(Segment::Dispatch, Confidence::High, vec![what.into()])
}

fn verdict(segment: Segment, confidence: Confidence, evidence: Vec<String>) -> Verdict {
    Verdict {
        segment,
        confidence,
        evidence,
    }
}

/// Whether the instance has left the client without an answer, or its bytes untaken, for as long as a client waits.
fn hangs(record: &Record, rules: &Rules) -> bool {
    let limit = (rules.watchdog() - rules.heartbeat() * 6 / 5).max(rules.watchdog() / 2);
    let over = |waited: Option<u64>| waited.is_some_and(|waited| waited as Millis >= limit);
    let untaken_by_client = record.client.untaken_ms.unwrap_or(0);
    // It has answered after all, while the client's goodbye was on its way.
    let just_now = record
        .hang
        .is_some_and(|hang| hang.ago_ms as Millis <= rules.slack() && over(Some(hang.length_ms)));
    // A client that is not answered goes on asking; one that falls silent itself is cut off.
    let silent = closed_gap(record, rules).map_or(0, |(from, to)| to - from);
    let silent = silent.max(record.unheard_ms as Millis);
    let asks = silent <= rules.heartbeat() * 3 / 2 + rules.slack();
    just_now && asks
        || over(record.instance.untaken_ms)
        // What the instance answered may be waiting here for a client that takes nothing.
        || over(record.unanswered_ms)
            && asks
            && untaken_by_client < record.unanswered_ms.unwrap_or(0) / 2
}

/// The client's long silence before the end, if it may be why it ended.
fn closed_gap(record: &Record, rules: &Rules) -> Option<(Millis, Millis)> {
    let gap = record.gap?;
    let (length, ago) = (gap.length_ms as Millis, gap.ago_ms as Millis);
    let to = record.ended() - ago;
    // What a client has borne is over, unless everything comes late: then its goodbye comes a watchdog after what it last
    // heard, which was about a heartbeat before its first late word.
    let soonest = rules.watchdog() - rules.heartbeat() * 3 / 2 - rules.slack();
    let late =
        length >= rules.watchdog() && (soonest..=rules.watchdog() + rules.slack()).contains(&ago);
    let is_why = ago <= rules.slack() || late;
    (is_why && speaks(record, rules)).then_some((to - length, to))
}

/// Whether the person had another tunnel right after this one.
fn came_back(record: &Record, around: &Around, rules: &Rules) -> bool {
    let end = record.ended();
    let own = around.others.get(&record.user);
    own.into_iter().flatten().any(|other| {
        other.ip == record.ip && (end..=end + rules.watchdog()).contains(&other.opened)
    })
}

/// Whether the client spoke regularly, so that its silence means something.
fn speaks(record: &Record, rules: &Rules) -> bool {
    let silences = record.unheard_ms + record.gap.map_or(0, |gap| gap.length_ms);
    is_talkative(
        record.client.messages,
        record.dur_ms.saturating_sub(silences) as Millis,
        rules,
    )
}

/// Whether so many messages in so long a time are those of a client with a heartbeat.
pub fn is_talkative(messages: u64, within: Millis, rules: &Rules) -> bool {
    messages >= 2 && within <= (messages as Millis + 1) * rules.heartbeat() * 2
}

/// The verdict, from all evidence.
pub fn judge(record: &Record, around: &Around, rules: &Rules) -> Verdict {
    let goodbye = record.first() == Some((Ender::Client, How::Close));
    if let Some(verdict) = at_once(record, rules).filter(|_| !goodbye) {
        return verdict;
    }
    match record.first() {
        Some((Ender::Instance, _)) => return closed_by_instance(record, around, rules),
        _ if !record.opened => return never_opened(record, around, rules),
        _ => {}
    }
    if let Some(verdict) = we_stalled(record, around, rules) {
        return verdict;
    }
    if hangs(record, rules) {
        let since = record.ended() - rules.watchdog();
        let trouble = trouble_at(&around.instance, since, record.ended(), rules);
        // Not everything that is said wants an answer; a heartbeat does.
        if trouble.is_some() || record.instance.untaken_ms.is_some() || speaks(record, rules) {
            return instance_hangs(record, around, trouble);
        }
    }
    let is_close = matches!(record.how, Some(How::Close));
    let break_ = find_break(record, rules);
    let (edge, internal) = (
        says(&around.edge, &break_, record, around.now, rules),
        says(&around.internal, &break_, record, around.now, rules),
    );
    if is_close
        && let Some(verdict) = goodbye_meant(record, around, rules, &break_, [&edge, &internal])
    {
        return verdict;
    }
    if edge.broke().or(internal.broke()).is_none()
        && let Some(verdict) = slow_instance(record, around, rules, &break_)
    {
        return verdict;
    }
    weigh::weigh(record, around, rules, &break_, edge, internal)
}

/// The verdict on a goodbye, unless it is that of a client which the way has made give up: it says goodbye as one that
/// leaves does, so then the way has to show it, or the client's own long silence.
fn goodbye_meant(
    record: &Record,
    around: &Around,
    rules: &Rules,
    break_: &Break,
    [edge, internal]: [&Says; 2],
) -> Option<Verdict> {
    // A tab that is closed has no watchdog.
    if record.code == Some(1001) {
        return Some(ordinary_end(record));
    }
    // Where only what we send is lost, nothing but the legs shows it.
    let one_way = edge.broke().or(internal.broke()) == Some(Kind::Stall) && !break_.silent;
    if one_way || closed_gap(record, rules).is_some() {
        return None;
    }
    // A code of its own is what a page gives up with; then it comes back at once. In full flow that is no leg's doing.
    let gave_up = !ordinary(record.code)
        && [edge, internal] == [&Says::Clean, &Says::Clean]
        && came_back(record, around, rules);
    if !gave_up {
        return Some(ordinary_end(record));
    }
    let what = format!(
        "the client closed it at {} with code {} and came back at once, as one does that has heard nothing",
        clock(record.ended()),
        record.code.unwrap_or(1005)
    );
    let legs = "both legs were clean at that moment".to_owned();
    Some(verdict(
        Segment::LastMile,
        Confidence::Low,
        vec![what, legs],
    ))
}

/// Neither the instance nor the client's way is convicted where the one was slow, but not for as long as a client waits.
fn slow_instance(
    record: &Record,
    around: &Around,
    rules: &Rules,
    break_: &Break,
) -> Option<Verdict> {
    let waited = record.unanswered_ms.unwrap_or(0) as Millis;
    let trouble = trouble_at(&around.instance, break_.from, record.ended(), rules)
        .filter(|_| waited >= rules.heartbeat())?;
    let evidence = vec![
        weigh::how_it_ended(record, break_),
        format!("the instance {}", trouble.what),
        format!(
            "a message of the client's had waited {} for the instance, which is less than a client waits",
            seconds(waited)
        ),
    ];
    Some(verdict(Segment::Unknown, Confidence::Low, evidence))
}

fn closed_by_instance(record: &Record, around: &Around, rules: &Rules) -> Verdict {
    let code = record.code.unwrap_or(1005);
    let closed = format!("the instance closed the WebSocket with code {code}");
    let end = record.ended();
    match trouble_at(
        &around.instance,
        end - rules.slack(),
        end + millis(rules.window()),
        rules,
    ) {
        Some(trouble) => verdict(
            Segment::Serve,
            Confidence::High,
            vec![closed, format!("the instance {}", trouble.what)],
        ),
        None => verdict(
            Segment::None,
            Confidence::Medium,
            vec![closed, "it went on answering".into()],
        ),
    }
}

fn never_opened(record: &Record, around: &Around, rules: &Rules) -> Verdict {
    let end = record.ended();
    let waited = record.dur_ms as Millis;
    let left = format!(
        "the client left {} after it had asked, before the instance had answered",
        seconds(waited)
    );
    let trouble = trouble_at(&around.instance, end - waited, end, rules);
    if trouble.is_none() && waited < rules.watchdog() / 2 {
        return verdict(Segment::None, Confidence::Low, vec![left]);
    }
    let mut evidence = vec![left];
    evidence.extend(trouble.map(|trouble| format!("the instance {}", trouble.what)));
    verdict(Segment::Serve, Confidence::Medium, evidence)
}

/// Convicts this service if it stood still for so long that clients gave up, which it then found out.
fn we_stalled(record: &Record, around: &Around, rules: &Rules) -> Option<Verdict> {
    if matches!(record.how, Some(How::Close)) && record.code == Some(1001) {
        return None;
    }
    let end = record.ended();
    let (from, to) = *around.lags.iter().find(|(from, to)| {
        to - from >= millis(rules.gap()) && *from <= end && end - to <= rules.slack()
    })?;
    let mut evidence = vec![format!(
        "this service stood still for {} from {}",
        seconds(to - from),
        clock(from)
    )];
    evidence.extend(around.pressure.iter().cloned());
    if to - from < rules.watchdog() {
        // Something else may have ended it in that time, which nobody here could see.
        evidence.push("that is a little less than a client waits".into());
        return Some(verdict(Segment::Unknown, Confidence::Low, evidence));
    }
    Some(verdict(Segment::Dispatch, Confidence::High, evidence))
}

fn instance_hangs(record: &Record, around: &Around, trouble: Option<&Trouble>) -> Verdict {
    let mut evidence = Vec::new();
    if let Some(waited) = record.unanswered_ms {
        evidence.push(format!(
            "a message of the client's had waited {} for anything from the instance",
            seconds(waited as Millis)
        ));
    }
    if let Some(hang) = record.hang.filter(|_| record.unanswered_ms.is_none()) {
        evidence.push(format!(
            "the instance had answered nothing for {} when the client gave up",
            seconds(hang.length_ms as Millis)
        ));
    }
    if let Some(waited) = record.instance.untaken_ms {
        evidence.push(format!(
            "the instance had not taken what was sent to it for {}",
            seconds(waited as Millis)
        ));
    }
    let confidence = match trouble {
        Some(_) => Confidence::High,
        None => Confidence::Medium,
    };
    match trouble {
        Some(trouble) => evidence.push(format!("the instance {}", trouble.what)),
        None => evidence.push("asked over HTTP, it did answer".into()),
    }
    evidence.extend(around.pressure.iter().cloned());
    verdict(Segment::Serve, confidence, evidence)
}

/// Trouble of the instance that touches this time.
fn trouble_at<'a>(
    instance: &'a InstanceHistory,
    from: Millis,
    to: Millis,
    rules: &Rules,
) -> Option<&'a Trouble> {
    let to = to + rules.slack();
    instance
        .troubles
        .iter()
        .find(|trouble| trouble.earliest <= to && trouble.until.is_none_or(|until| until >= from))
}

fn seconds(millis: Millis) -> String {
    format!("{:.1} s", millis as f64 / 1000.0)
}
