//! `t3-dispatch explain`: from "I was disconnected at 14:05" to an answer, from the ledger alone.

use std::fmt::Write as _;
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anstyle::{AnsiColor, Style};
use jiff::tz::TimeZone;
use jiff::{Timestamp, Zoned, civil};
use serde_json::{Value, json};

use crate::config::{ConfigError, Dispatch, Settings};
use crate::evidence::{Entry, Event, Millis, system};
use crate::judge;
use crate::ledger::Ledger;
use crate::story::{self, Drop, Story, edge_name};
use crate::verdict::Segment;

/// How far back it looks where that is not said.
const SINCE: Duration = Duration::from_secs(24 * 60 * 60);

/// How far from the time that was named a drop may be.
const NEAR: Millis = 15 * 60 * 1000;

/// What was asked.
#[derive(Debug, Clone, Default)]
pub struct Question {
    /// Whose drops.
    pub user: Option<String>,
    /// How far back.
    pub since: Option<Duration>,
    /// The drop at which time.
    pub at: Option<String>,
    /// Whether the answer is to be JSON.
    pub json: bool,
}

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum ExplainError {
    /// The settings cannot be used.
    #[error(transparent)]
    Settings(#[from] ConfigError),
    /// The ledger cannot be read.
    #[error(
        "{file} cannot be read: {error}\n  it is named by dispatch.tunnels.ledger, and its group may read it"
    )]
    Ledger {
        /// The ledger.
        file: String,
        /// What the system said.
        error: std::io::Error,
    },
    /// The time cannot be read.
    #[error(
        "--at {0}: write a time such as 14:05, 14:05:30, 2026-01-02T14:05 or 2026-01-02T14:05:30Z"
    )]
    Time(String),
    /// There is no drop near that time.
    #[error(
        "no drop within 15 minutes of {0}: leave --at out to see all, or look further back with --since"
    )]
    Nothing(String),
}

/// A line of the answer.
macro_rules! say {
    ($out:expr, $($line:tt)*) => {{
        // Writing into memory does not fail.
        let _ = writeln!($out, $($line)*);
    }};
}

/// The answer, with the colours of a terminal.
///
/// # Errors
/// When there is none.
pub fn run(conf: Option<&Path>, question: &Question) -> Result<String, ExplainError> {
    let settings = Settings::load(conf)?.dispatch;
    let ledger = Ledger {
        path: settings.tunnels.ledger.clone(),
        limit: u64::MAX,
    };
    let zone = TimeZone::system();
    let at = match &question.at {
        Some(text) => {
            let now = Timestamp::now().to_zoned(zone.clone());
            let at = read_time(text, &now).ok_or_else(|| ExplainError::Time(text.clone()))?;
            Some((at, text))
        }
        None => None,
    };
    let since = question.since.unwrap_or(SINCE);
    let mut since = SystemTime::now().checked_sub(since).unwrap_or(UNIX_EPOCH);
    if let Some((at, _)) = at {
        since = since.min(system(at - NEAR));
    }
    // A file that is not there is one that nothing was written to, unless even its folder is missing.
    let there = ledger.path.parent().is_none_or(Path::exists);
    let missing = || std::io::Error::from(std::io::ErrorKind::NotFound);
    let failed = |error| ExplainError::Ledger {
        file: ledger.path.display().to_string(),
        error,
    };
    if !there {
        return Err(failed(missing()));
    }
    let story = Story::read(&ledger, &settings, question.user.as_deref(), since).map_err(failed)?;
    if story.unreadable > 0 {
        let file = ledger.path.display();
        let count = story.unreadable;
        eprintln!("t3-dispatch: {file}: {count} lines are no records and were left out");
    }
    let teller = Teller {
        zone,
        edge: edge_name(&settings.probe.edge_leg),
        settings: &settings,
    };
    let mut out = String::new();
    match at {
        None => teller.table(&mut out, &story, question),
        Some((at, text)) => {
            let near = |drop: &&Drop| (drop.record.ended() - at).abs() <= NEAR;
            let chosen = story
                .drops
                .iter()
                .filter(near)
                .min_by_key(|drop| (drop.record.ended() - at).abs())
                .ok_or_else(|| ExplainError::Nothing(text.clone()))?;
            let others = story.drops.iter().filter(near).count() - 1;
            let timeline = teller.timeline(&ledger, chosen).map_err(failed)?;
            teller.one(&mut out, chosen, &timeline, others, question.json);
        }
    }
    Ok(out)
}

/// A time as people write it; a time of day is the last one that has been.
fn read_time(text: &str, now: &Zoned) -> Option<Millis> {
    if let Ok(at) = text.parse::<Timestamp>() {
        return Some(at.as_millisecond());
    }
    let zone = now.time_zone().clone();
    if let Ok(at) = text.parse::<civil::DateTime>()
        && text.contains(':')
    {
        return Some(at.to_zoned(zone).ok()?.timestamp().as_millisecond());
    }
    let time: civil::Time = text.parse().ok()?;
    let today = now.date().to_datetime(time).to_zoned(zone.clone()).ok()?;
    // Somebody whose clock is a little ahead means today, too.
    let slack = jiff::Span::new().minutes(2);
    let at = if today > now.checked_add(slack).ok()? {
        now.date()
            .yesterday()
            .ok()?
            .to_datetime(time)
            .to_zoned(zone)
            .ok()?
    } else {
        today
    };
    Some(at.timestamp().as_millisecond())
}

/// One thing that happened around a drop.
struct Happened {
    at: Millis,
    who: String,
    what: String,
}

struct Teller<'a> {
    zone: TimeZone,
    edge: String,
    settings: &'a Dispatch,
}

impl Teller<'_> {
    fn local(&self, at: Millis, format: &str) -> String {
        Timestamp::from_millisecond(at).map_or_else(
            |_| "?".into(),
            |at| at.to_zoned(self.zone.clone()).strftime(format).to_string(),
        )
    }

    /// Times of day in a sentence are in UTC; here they become the operator's.
    fn localise(&self, text: &str, near: Millis) -> String {
        let mut told = String::new();
        let mut rest = text;
        while let Some(end) = rest.find(" UTC") {
            let clock = end.checked_sub(12).and_then(|start| rest.get(start..end));
            let time = clock.and_then(|clock| clock.parse::<civil::Time>().ok());
            let day = Timestamp::from_millisecond(near).map(|at| at.to_zoned(TimeZone::UTC).date());
            match (time, day) {
                (Some(time), Ok(day)) => {
                    let at = day.to_datetime(time).to_zoned(TimeZone::UTC);
                    let at = at.map_or(near, |at| at.timestamp().as_millisecond());
                    // The day before, or after, around midnight.
                    let day = 24 * 60 * 60 * 1000;
                    let at = at + day * ((near - at + day / 2).div_euclid(day));
                    told += &rest[..end - 12];
                    told += &self.local(at, "%H:%M:%S%.3f");
                }
                _ => told += &rest[..end + 4],
            }
            rest = &rest[end + 4..];
        }
        told + rest
    }

    fn json(&self, drop: &Drop) -> Value {
        let mut object = story::json(drop);
        object["sentence"] = self.sentence(drop).into();
        object
    }

    fn sentence(&self, drop: &Drop) -> String {
        let at = drop.record.ended();
        let text = drop.sentence(&self.local(at, "%H:%M:%S"), &self.edge);
        self.localise(&text, at)
    }

    fn table(&self, out: &mut String, story: &Story, question: &Question) {
        if question.json {
            let drops: Vec<Value> = story.drops.iter().map(|drop| self.json(drop)).collect();
            say!(
                out,
                "{:#}",
                json!({ "drops": drops, "ended_well": story.ended_well, "more": story.is_cut })
            );
            return;
        }
        if story.is_cut {
            say!(
                out,
                "Only the newest {} records were looked at: say --since or a user to see others.\n",
                story.drops.len() + story.ended_well
            );
        }
        let whose = question.user.as_deref().unwrap_or("everybody");
        let drops: Vec<&Drop> = story
            .drops
            .iter()
            .filter(|drop| drop.record.opened)
            .collect();
        if story.drops.is_empty() {
            say!(
                out,
                "No drops of {whose}; {} ended well.",
                ended(story.ended_well)
            );
            return;
        }
        let mut rows =
            vec![["time", "user", "verdict", "sure", "away", "how", "address"].map(str::to_owned)];
        for drop in &story.drops {
            let record = &drop.record;
            let away = drop
                .back
                .map_or("-".into(), |back| format!("{:.1} s", back as f64 / 1000.0));
            let how = json!(record.how).as_str().unwrap_or("-").to_owned();
            let by = json!(record.ended_by)
                .as_str()
                .unwrap_or("nobody")
                .to_owned();
            let verdict = if drop.is_final {
                drop.verdict.segment.as_str()
            } else {
                "(open)"
            };
            rows.push([
                self.local(record.ended(), "%Y-%m-%d %H:%M:%S"),
                record.user.clone(),
                verdict.into(),
                drop.verdict.confidence.as_str().into(),
                away,
                format!("{by} {how}"),
                record.ip.clone(),
            ]);
        }
        let mut widths = [0; 7];
        for row in &rows {
            for (width, cell) in widths.iter_mut().zip(row) {
                *width = (*width).max(cell.chars().count());
            }
        }
        for (number, row) in rows.iter().enumerate() {
            let style = match number.checked_sub(1) {
                None => Style::new().bold(),
                Some(place) => colour(story.drops[place].verdict.segment),
            };
            let mut line = String::new();
            for (column, (cell, width)) in row.iter().zip(widths).enumerate() {
                let width = if column + 1 < widths.len() { width } else { 0 };
                let cell = format!("{cell:width$}");
                line += &if number == 0 || column == 2 {
                    format!("{style}{cell}{style:#}  ")
                } else {
                    format!("{cell}  ")
                };
            }
            say!(out, "{}", line.trim_end());
        }
        say!(out, "");
        say!(out, "{}", self.summary(&drops, story));
        say!(
            out,
            "The story of one: t3-dispatch explain [USER] --at TIME"
        );
    }

    fn summary(&self, drops: &[&Drop], story: &Story) -> String {
        let mut counts: Vec<(Segment, usize)> = Vec::new();
        for drop in drops {
            match counts
                .iter_mut()
                .find(|(known, _)| *known == drop.verdict.segment)
            {
                Some((_, count)) => *count += 1,
                None => counts.push((drop.verdict.segment, 1)),
            }
        }
        counts.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
        let parts: Vec<String> = counts
            .iter()
            .map(|(segment, count)| format!("{count} {}", segment.as_str()))
            .collect();
        let number = match drops.len() {
            1 => "1 drop".to_owned(),
            count => format!("{count} drops"),
        };
        let mut text = match parts.is_empty() {
            true => number,
            false => format!("{number}: {}", parts.join(", ")),
        };
        let refused = story.drops.len() - drops.len();
        if refused > 0 {
            text += &format!("; {refused} that the instance did not take");
        }
        format!("{text}; {} ended well", ended(story.ended_well))
    }

    fn one(
        &self,
        out: &mut String,
        drop: &Drop,
        timeline: &[Happened],
        others: usize,
        as_json: bool,
    ) {
        let record = &drop.record;
        if as_json {
            let timeline: Vec<Value> = timeline
                .iter()
                .map(|one| {
                    let at = humantime::format_rfc3339_millis(system(one.at)).to_string();
                    json!({ "time": at, "who": one.who, "what": one.what })
                })
                .collect();
            say!(
                out,
                "{:#}",
                json!({ "drop": self.json(drop), "timeline": timeline, "sentence": self.sentence(drop) })
            );
            return;
        }
        let style = colour(drop.verdict.segment);
        say!(
            out,
            "{}, {}: {style}{}{style:#} ({} confidence{})",
            record.user,
            self.local(record.ended(), "%Y-%m-%d %H:%M:%S%.3f %Z"),
            drop.verdict.segment.as_str(),
            drop.verdict.confidence.as_str(),
            if drop.is_final { "" } else { ", not final" }
        );
        for line in &drop.verdict.evidence {
            say!(out, "  - {}", self.localise(line, record.ended()));
        }
        say!(
            out,
            "\n  from {} over {}, id {}, open for {}",
            record.ip,
            record.chain.join(" → "),
            record.id,
            humantime::format_duration(Duration::from_secs(record.dur_ms / 1000))
        );
        say!(out, "\nWhat happened around it");
        let width = timeline
            .iter()
            .map(|one| one.who.chars().count())
            .max()
            .unwrap_or(0);
        for one in timeline {
            say!(
                out,
                "  {}  {:width$}  {}",
                self.local(one.at, "%H:%M:%S%.3f"),
                one.who,
                self.localise(&one.what, record.ended())
            );
        }
        say!(out, "\nTo send\n  {}", self.sentence(drop));
        if others > 0 {
            say!(
                out,
                "\n{others} more within 15 minutes of that time: leave --at out to see them."
            );
        }
    }

    /// What the legs, the instance, this service and the tunnels did around a drop.
    fn timeline(&self, ledger: &Ledger, drop: &Drop) -> std::io::Result<Vec<Happened>> {
        let record = &drop.record;
        let rules = judge::rules(&self.settings.tunnels);
        let (watchdog, window) = (
            rules.watchdog.as_millis() as Millis,
            rules.window().as_millis() as Millis,
        );
        let end = record.ended();
        let from = end - watchdog - record.unheard_ms.min(120_000) as Millis - 10_000;
        let to = end + window + 15_000;
        let mut timeline = Vec::new();
        let mut add = |at: Millis, who: &str, what: String| {
            timeline.push(Happened {
                at,
                who: who.into(),
                what,
            });
        };
        for line in ledger.evidence().between(system(from), system(to))? {
            if let Some(entry) = Entry::read(line)
                && let Some((who, what)) = told(&entry.event, record.port)
            {
                add(entry.at(), &who, what);
            }
        }
        let start = end - record.dur_ms as Millis;
        if start >= from {
            add(start, "tunnel", "was asked for".into());
        }
        if record.opened {
            add(
                end - record.unheard_ms as Millis,
                "client",
                "was heard last".into(),
            );
            add(
                end - record.instance.silence_ms as Millis,
                "instance",
                "was heard last".into(),
            );
        }
        if let Some(gap) = record.gap {
            let over = end - gap.ago_ms as Millis;
            add(
                over,
                "client",
                format!(
                    "was heard again after {:.1} s",
                    gap.length_ms as f64 / 1000.0
                ),
            );
        }
        let by = json!(record.ended_by)
            .as_str()
            .unwrap_or("nobody")
            .to_owned();
        let how = json!(record.how).as_str().unwrap_or("no sign").to_owned();
        let code = record
            .code
            .map(|code| format!(" {code}"))
            .unwrap_or_default();
        add(end, "tunnel", format!("ended: by {by}, {how}{code}"));
        if let Some(back) = drop.back {
            add(end + back, "client", "was back".into());
        }
        for other in ledger.between(system(from), system(to))? {
            if other["user"].is_null() || other["key"] == record.key.as_str() {
                continue;
            }
            let at = other["time"]
                .as_str()
                .and_then(|time| time.parse::<Timestamp>().ok());
            let word = |key: &str| other[key].as_str().unwrap_or("?").to_owned();
            if let Some(at) = at {
                let whose = match word("user") {
                    user if user == record.user => "of the same person".to_owned(),
                    user => format!("of {user}"),
                };
                let what = format!("{} {whose} ended: {}", word("id"), word("cause"));
                add(at.as_millisecond(), "others", what);
            }
        }
        timeline.sort_by_key(|one| one.at);
        Ok(timeline)
    }
}

fn ended(count: usize) -> String {
    match count {
        1 => "1 WebSocket".into(),
        count => format!("{count} WebSockets"),
    }
}

/// An observation in words, if it is about the instance on that port or about everybody.
fn told(event: &Event, of: u16) -> Option<(String, String)> {
    let leg = |leg: &str| format!("leg {leg}");
    Some(match event {
        Event::LegOpened { leg: name, .. } => (leg(name), "connected".into()),
        Event::LegWell {
            leg: name, rtt_ms, ..
        } => (leg(name), format!("well, {rtt_ms:.1} ms")),
        Event::LegStalled {
            leg: name, trouble, ..
        } => (leg(name), trouble.what.clone()),
        Event::LegEnded {
            leg: name, trouble, ..
        } => (leg(name), trouble.what.clone()),
        Event::LegTold {
            leg: name, reason, ..
        } => (leg(name), format!("is down, says the prober: {reason}")),
        Event::InstanceTrouble { port, trouble } if *port == of => {
            ("instance".into(), trouble.what.clone())
        }
        Event::Lagged { since } => {
            let what = format!(
                "this process stood still since {}",
                crate::evidence::clock(*since)
            );
            ("dispatch".into(), what)
        }
        Event::Pressed { resource, share } => (
            "host".into(),
            format!(
                "tasks waited for {resource} {:.0} % of the time",
                share * 100.0
            ),
        ),
        _ => return None,
    })
}

fn colour(segment: Segment) -> Style {
    let colour = match segment {
        Segment::None => AnsiColor::Green,
        Segment::LastMile => AnsiColor::Yellow,
        Segment::Unknown => AnsiColor::BrightBlack,
        _ => AnsiColor::Red,
    };
    Style::new().bold().fg_color(Some(colour.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_of_day_is_the_last_one() {
        let now: Zoned = "2026-03-04T14:10:00[Europe/Berlin]".parse().unwrap();
        for (text, expected) in [
            ("14:05", "2026-03-04T13:05:00Z"),
            ("14:05:30", "2026-03-04T13:05:30Z"),
            ("14:11", "2026-03-04T13:11:00Z"),
            ("23:50", "2026-03-03T22:50:00Z"),
            ("2026-03-01T08:00", "2026-03-01T07:00:00Z"),
            ("2026-03-01 08:00", "2026-03-01T07:00:00Z"),
            ("2026-03-01T08:00:00Z", "2026-03-01T08:00:00Z"),
        ] {
            let expected: Timestamp = expected.parse().unwrap();
            assert_eq!(
                read_time(text, &now),
                Some(expected.as_millisecond()),
                "{text}"
            );
        }
        for text in ["", "soon", "25:00", "14:5"] {
            assert_eq!(read_time(text, &now), None, "{text}");
        }
    }

    #[test]
    fn times_in_sentences_become_the_operators() {
        let settings = Settings::parse("").unwrap().dispatch;
        let teller = Teller {
            zone: TimeZone::get("Europe/Berlin").unwrap(),
            edge: "Cloudflare".into(),
            settings: &settings,
        };
        let near: Timestamp = "2026-03-04T23:00:05Z".parse().unwrap();
        assert_eq!(
            teller.localise(
                "from 22:59:58.123 UTC to 00:00:01.000 UTC, UTC",
                near.as_millisecond()
            ),
            "from 23:59:58.123 to 01:00:01.000, UTC"
        );
    }
}
