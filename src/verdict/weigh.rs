//! The verdict on a break of the client's side, from what the legs and other people say.

use super::leg::{Break, Says};
use super::{Around, Confidence, Leg, Rules, Segment, Verdict, seconds, verdict};
use crate::evidence::{Kind, Millis, Trouble, clock};
use crate::tunnel::How;
use crate::tunnel::live::Record;

/// The verdict on a break of the client's side, from what the legs and the other people say.
pub(super) fn weigh(
    record: &Record,
    around: &Around,
    rules: &Rules,
    break_: &Break,
    edge: Says,
    internal: Says,
) -> Verdict {
    let Company {
        fell,
        elsewhere,
        lived,
    } = company(record, around, rules, break_);
    let mut evidence = vec![how_it_ended(record, break_)];
    let people = |count: usize| match count {
        1 => "1 other person".to_owned(),
        count => format!("{count} other people"),
    };
    if fell > 0 {
        evidence.push(format!("{} broke off at the same moment", people(fell)));
    }
    if lived > 0 {
        evidence.push(format!("{} stayed connected", people(lived)));
    }
    let clean = |leg: &Leg| format!("the leg {} was clean at that moment", leg.name);
    let unknown = |mut evidence: Vec<String>, why: String| {
        evidence.push(why);
        verdict(Segment::Unknown, Confidence::Low, evidence)
    };
    match (edge, internal) {
        (Says::Broke(edge, kind), Says::Clean) => {
            evidence.extend([edge, clean(&around.internal)]);
            if kind == Kind::Cut && lived > 0 && fell == 0 {
                return unknown(
                    evidence,
                    "that contradicts itself: the leg broke and other people did not".into(),
                );
            }
            let confidence = if fell == 0 {
                Confidence::Medium
            } else {
                Confidence::High
            };
            verdict(Segment::Edge, confidence, evidence)
        }
        (Says::Broke(edge, _), Says::Broke(internal, _)) => {
            evidence.extend([edge, internal]);
            if lived > 0 {
                return unknown(
                    evidence,
                    "that contradicts itself: the legs broke and other people did not".into(),
                );
            }
            if around.opened_since {
                return unknown(
                    evidence,
                    "the legs have not come back though people have: the prober itself may be gone"
                        .into(),
                );
            }
            let after = |trouble: &&Trouble| trouble.until.is_none_or(|until| until >= break_.from);
            if let Some(trouble) = around.instance.troubles.iter().find(after) {
                let why = format!("the instance was in trouble as well: it {}", trouble.what);
                return unknown(evidence, why);
            }
            if around.instance.well.is_none_or(|well| well < break_.from) {
                let why = "nothing shows that the instance was well then".into();
                return unknown(evidence, why);
            }
            evidence.push("the instance answered all the while".into());
            let confidence = if fell == 0 {
                Confidence::Medium
            } else {
                Confidence::High
            };
            verdict(Segment::Internal, confidence, evidence)
        }
        (Says::Clean, Says::Clean) => {
            evidence.push(format!(
                "the legs {} and {} were clean at that moment",
                around.edge.name, around.internal.name
            ));
            if lived == 0 && fell >= 2 && elsewhere {
                return unknown(
                    evidence,
                    "that contradicts itself: so many people at once have something in common, which no leg has felt"
                        .into(),
                );
            }
            let confidence = if lived > 0 {
                Confidence::High
            } else {
                Confidence::Medium
            };
            verdict(Segment::LastMile, confidence, evidence)
        }
        (Says::Broke(edge, _), Says::Unclear(internal)) => {
            evidence.push(edge);
            let why =
                format!("whether it was the edge or what is behind it is not known: {internal}");
            unknown(evidence, why)
        }
        (Says::Clean, Says::Broke(internal, _) | Says::Unclear(internal)) => {
            evidence.push(clean(&around.edge));
            unknown(evidence, internal)
        }
        (Says::Unclear(edge), internal) => {
            evidence.push(match internal {
                Says::Clean => clean(&around.internal),
                Says::Broke(told, _) | Says::Unclear(told) => told,
            });
            unknown(evidence, edge)
        }
    }
}

/// The other people.
#[derive(Debug, Default)]
struct Company {
    /// How many broke off in the same moment.
    fell: usize,
    /// Whether one of them came from another address.
    elsewhere: bool,
    /// How many others lived through it.
    lived: usize,
}

/// What became of the other people. Where thousands fall together, this looks at all of them for each.
fn company(record: &Record, around: &Around, rules: &Rules, break_: &Break) -> Company {
    let (ended, slack) = (record.ended(), rules.slack());
    let mut company = Company::default();
    let others = around.others.iter();
    for (_, tunnels) in others.filter(|(user, _)| **user != record.user) {
        let (mut fell, mut lived) = (false, false);
        for other in tunnels.iter().filter(|other| other.opened <= break_.from) {
            let silent_since_then = other.talkative
                && other.heard <= break_.to
                && other.heard >= break_.from - rules.heartbeat()
                && around.now - other.heard >= rules.heartbeat() * 5 / 2;
            let gap_then = other.gap.is_some_and(|(from, _)| {
                from >= break_.from - rules.heartbeat() && from <= break_.to
            });
            // Who had the same silence and has borne it neither fell nor says that nothing was.
            if gap_then && !other.ended.is_some_and(|(_, badly)| badly) {
                continue;
            }
            let ended_then = other.ended.is_some_and(|(at, badly)| {
                badly && (at - ended).abs() <= slack.max(rules.heartbeat() / 2)
            });
            if ended_then || silent_since_then || gap_then {
                fell = true;
                company.elsewhere |= other.ip != record.ip;
            } else if other.heard > break_.to + slack {
                lived = true;
            }
        }
        company.fell += usize::from(fell);
        company.lived += usize::from(lived && !fell);
    }
    company
}

pub(super) fn how_it_ended(record: &Record, break_: &Break) -> String {
    let end = clock(record.ended());
    let ended = match record.how {
        Some(How::Close) => format!("the client closed it at {end}"),
        Some(How::Fin) => {
            format!("the client's side closed its connection at {end}, without a Close frame")
        }
        Some(How::Timeout) => format!("the client's side was given up at {end}"),
        _ => format!("the client's side reset its connection at {end}"),
    };
    if !break_.silent {
        return match record.unheard_ms {
            0..1000 => format!("{ended}, in full flow"),
            _ => ended,
        };
    }
    let (silence, gap) = (record.unheard_ms, record.gap);
    match gap.filter(|gap| gap.length_ms > silence) {
        Some(gap) => format!(
            "{ended}, after a silence of {} which was over {} before",
            seconds(gap.length_ms as Millis),
            seconds(gap.ago_ms as Millis)
        ),
        None => format!("{ended}, after a silence of {}", seconds(silence as Millis)),
    }
}
