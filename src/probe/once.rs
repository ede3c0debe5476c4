//! `t3-dispatch probe --once`: each leg once, as a table of its steps.

use std::sync::Arc;
use std::time::Duration;

use anstyle::{AnsiColor, Style};

use super::board::Board;
use super::dial::{Dialer, Steps};
use super::leg::echo_once;
use super::reason::Failure;
use super::resolve;
use super::settings::{Kind, Leg, Settings};

const STEPS: [&str; 5] = ["DNS", "CONNECT", "TLS", "UPGRADE", "ECHO"];

/// What one leg did.
struct Run {
    steps: Steps,
    /// Whether the dispatcher knows it; `None` where nobody asked.
    known: Option<bool>,
    outcome: Result<(), Failure>,
}

/// Tries all legs at the same time and prints them in their order. Gives whether all are up.
pub async fn run(settings: Arc<Settings>, dialer: Arc<Dialer>, board: Arc<Board>) -> bool {
    let runs: Vec<_> = (0..settings.legs.len())
        .map(|place| {
            let (settings, dialer, board) = (settings.clone(), dialer.clone(), board.clone());
            tokio::spawn(async move {
                let leg = &settings.legs[place];
                let heartbeat = board.heartbeat(place, 1, settings.heartbeat);
                try_leg(leg, &dialer, heartbeat, settings.rtt_timeout).await
            })
        })
        .collect();
    let mut done = Vec::new();
    for run in runs {
        if let Ok(run) = run.await {
            done.push(run);
        }
    }
    print(&settings.legs, &done);
    done.len() == settings.legs.len() && done.iter().all(|run| run.outcome.is_ok())
}

async fn try_leg(leg: &Leg, dialer: &Dialer, heartbeat: String, limit: Duration) -> Run {
    let mut steps = Steps::default();
    let mut known = None;
    let outcome = match leg.kind {
        Kind::Http => dialer.get(leg, limit, &mut steps).await.map(|_| ()),
        Kind::WebSocket => match dialer.upgrade(leg, &mut steps).await {
            Err(failure) => Err(failure),
            Ok((mut socket, accepted)) => {
                known = accepted;
                echo_once(&mut socket, heartbeat, limit)
                    .await
                    .map(|rtt| steps.echo = Some(rtt))
            }
        },
    };
    Run {
        steps,
        known,
        outcome,
    }
}

fn print(legs: &[Leg], runs: &[Run]) {
    let bold = Style::new().bold();
    let name = |leg: &Leg| leg.name.chars().count();
    let width = legs.iter().map(name).max().unwrap_or(0).max("LEG".len());
    let heads = STEPS.map(|step| format!("{step:>9}")).concat();
    anstream::println!("{bold}      {:width$}{heads}  RESULT{bold:#}", "LEG");
    for (leg, run) in legs.iter().zip(runs) {
        let (mark, colour, result) = match &run.outcome {
            Ok(()) => ("ok  ", AnsiColor::Green, "up".into()),
            Err(failure) => ("FAIL", AnsiColor::Red, failure.reason.to_string()),
        };
        let style = bold.fg_color(Some(colour.into()));
        let times = cells(leg, run);
        anstream::println!(
            "{style}{mark}{style:#}  {:width$}{times}  {style}{result}{style:#}",
            leg.name
        );
    }
    for (leg, run) in legs.iter().zip(runs) {
        if let Err(failure) = &run.outcome {
            anstream::println!(
                "\n{bold}{}{bold:#}: {}: {failure}",
                leg.name,
                failure.reason
            );
            if let Some(remedy) = failure.remedy() {
                anstream::println!("  {remedy}");
            }
        }
        if run.known == Some(false) {
            anstream::println!(
                "\n{bold}{}{bold:#}: the dispatcher did not accept the token\n  give dispatch.probe.token and probe.token the \
                 same value; until then the leg is a plain echo",
                leg.name
            );
        }
    }
}

/// The time of each step. What failed is the first step of those that the leg has and that has none.
fn cells(leg: &Leg, run: &Run) -> String {
    let steps = &run.steps;
    let mut failed = run.outcome.is_err();
    [
        (resolve::is_needed(leg), steps.dns),
        (true, steps.connect),
        (leg.url.tls, steps.tls),
        (true, steps.upgrade),
        (leg.kind == Kind::WebSocket, steps.echo),
    ]
    .map(|(there, time)| {
        let cell = match time {
            Some(time) => shown(time),
            None if there && std::mem::take(&mut failed) => "failed".into(),
            None => "-".into(),
        };
        format!("{cell:>9}")
    })
    .concat()
}

/// A time in milliseconds, with as many places as are worth reading.
pub fn shown(time: Duration) -> String {
    let millis = time.as_secs_f64() * 1000.0;
    if millis < 10.0 {
        format!("{millis:.1} ms")
    } else {
        format!("{millis:.0} ms")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_short_to_read() {
        let micros = |micros| shown(Duration::from_micros(micros));
        assert_eq!(micros(40), "0.0 ms");
        assert_eq!(micros(1_250), "1.2 ms");
        assert_eq!(micros(12_345), "12 ms");
        assert_eq!(micros(20_000_000), "20000 ms");
    }
}
