//! When the way to a client broke, as far as its tunnel tells, and what a leg says of that moment.

use super::{Leg, Rules, closed_gap, millis, speaks};
use crate::evidence::{Conn, Kind, Millis, Trouble};
use crate::tunnel::How;
use crate::tunnel::live::Record;

/// When the way to the client broke, as far as the tunnel itself tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Break {
    pub from: Millis,
    pub to: Millis,
    /// Whether it went silent, as opposed to being ended in the open.
    pub silent: bool,
}

/// What a leg says of a break.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Says {
    Clean,
    Broke(String, Kind),
    Unclear(String),
}

impl Says {
    /// How it broke, if it did.
    pub fn broke(&self) -> Option<Kind> {
        match self {
            Says::Broke(_, kind) => Some(*kind),
            Says::Clean | Says::Unclear(_) => None,
        }
    }
}

/// When the client's side broke.
pub(super) fn find_break(record: &Record, rules: &Rules) -> Break {
    let (end, slack) = (record.ended(), rules.slack());
    let silence = record.unheard_ms as Millis;
    let speaks = speaks(record, rules);
    if speaks && silence >= rules.heartbeat() * 2 + slack {
        let last = end - silence;
        return Break {
            from: last - slack,
            to: last + rules.heartbeat() + slack,
            silent: true,
        };
    }
    if let Some((from, _)) = closed_gap(record, rules) {
        return Break {
            from: from - slack,
            to: from + rules.heartbeat() + slack,
            silent: true,
        };
    }
    if matches!(record.how, Some(How::Timeout)) {
        // Keepalive needs 20 s to begin with and three probes ten seconds apart; the user timeout has 45 s.
        return Break {
            from: (end - 56_000).max(end - silence) - slack,
            to: end - 15_000,
            silent: true,
        };
    }
    Break {
        from: end - slack,
        to: end + slack,
        silent: false,
    }
}

/// What a leg says of the break.
pub(super) fn says(leg: &Leg, break_: &Break, record: &Record, now: Millis, rules: &Rules) -> Says {
    let (end, start) = (record.ended(), record.ended() - record.dur_ms as Millis);
    let since = break_.from.min(end - rules.watchdog());
    let well_to = if break_.silent { end } else { break_.to };
    if leg.conns.iter().any(|conn| is_well(conn, since, well_to)) {
        return Says::Clean;
    }
    let mut unclear = None;
    for (position, conn) in leg.conns.iter().enumerate() {
        for trouble in conn.troubles() {
            let back = leg.conns[position + 1..].iter().map(|later| later.opened);
            let until = trouble.until.or_else(|| back.min()).unwrap_or(now);
            let lasted = until - trouble.earliest;
            let told = format!("the leg {} {}", leg.name, trouble.what);
            // A moment in which an end stood still does not explain a long trouble.
            let stood_still = leg.stood.iter().any(|(from, to)| {
                let overlap = until.min(to + rules.slack()) - trouble.earliest.max(*from);
                overlap >= 0 && (trouble.kind == Kind::Cut || overlap * 3 >= lasted)
            });
            if conn.is_excused() || stood_still {
                if trouble.earliest <= break_.to && until >= break_.from {
                    let why = if stood_still {
                        "while one of its ends stood still"
                    } else {
                        "because the prober was restarted"
                    };
                    unclear = Some(format!("{told}, {why}"));
                }
                continue;
            }
            let began_then = trouble.earliest <= break_.to && trouble.latest >= break_.from;
            let as_long_as_a_watchdog =
                trouble.earliest <= end - millis(rules.gap()) + millis(rules.stall());
            let still_on = until >= end - rules.heartbeat();
            let began_with_it = trouble.latest
                >= end - rules.watchdog() - rules.heartbeat() - millis(rules.stall());
            let short_life = record.dur_ms as Millis <= rules.watchdog() * 3;
            let convicts = match (trouble.kind, break_.silent) {
                (Kind::Cut, _) => began_then,
                // A stall that is over before any client would give up has ended nothing.
                (Kind::Stall, true) => {
                    began_then && lasted >= millis(rules.gap())
                        // All its short life was within the stall.
                        || short_life && trouble.earliest <= start && until >= end - rules.slack()
                }
                // Ended in the open after a stall: the client has given up what it did not hear. Then the other direction
                // works, and the prober is heard as well as the client.
                (Kind::Stall, false) => {
                    conn.spoke
                        .is_some_and(|at| at >= trouble.latest + (end - trouble.latest) / 3)
                        && as_long_as_a_watchdog
                        && still_on
                        && (began_with_it && trouble.earliest >= start - rules.slack()
                            || short_life && trouble.earliest <= start)
                }
            };
            if convicts {
                return Says::Broke(told, trouble.kind);
            }
            // It may have taken small packets a while longer than the tunnel's.
            let later = break_.silent
                && trouble.earliest > break_.to
                && trouble.earliest <= end
                && lasted >= millis(rules.gap());
            if trouble.earliest <= break_.to && until >= break_.from || later {
                unclear = Some(told);
            }
        }
    }
    match unclear {
        Some(told) => Says::Unclear(told),
        None if covers(&leg.conns, break_, millis(rules.stall())) => Says::Clean,
        None if leg.conns.is_empty() => {
            Says::Unclear(format!("there is no leg {} to tell", leg.name))
        }
        None => Says::Unclear(format!("the leg {} was not connected then", leg.name)),
    }
}

/// Whether this one connection was well all the time. With two probers one may hang while the other is well.
fn is_well(conn: &Conn, from: Millis, to: Millis) -> bool {
    let touches = |trouble: &Trouble| {
        trouble.earliest <= to && trouble.until.is_none_or(|until| until >= from)
    };
    conn.opened <= from && conn.heard >= to && !conn.troubles().any(touches)
}

/// Whether the connections together were heard all through the break. One that was moved may leave a small hole.
fn covers(conns: &[Conn], break_: &Break, hole: Millis) -> bool {
    let mut reached = break_.from;
    let mut spans: Vec<_> = conns.iter().map(|conn| (conn.opened, conn.heard)).collect();
    spans.sort_unstable();
    let mut covered = false;
    for (opened, heard) in spans {
        let hole = if covered { hole } else { 0 };
        if opened <= reached + hole && heard >= reached {
            reached = heard;
            covered = true;
        }
    }
    covered && reached >= break_.to
}
