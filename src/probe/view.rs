//! The live view: all legs, redrawn in place, for whoever stands at a terminal. Log lines go above it.

use std::fmt::Write as _;
use std::io::{self, IsTerminal, Write};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anstyle::{AnsiColor, Style};
use terminal_size::{Height, Width, terminal_size_of};
use tokio::time::{MissedTickBehavior, interval};

use super::board::{Board, Status};
use super::once::shown;

const EVERY: Duration = Duration::from_secs(1);

const BARS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];

/// Log lines that wait for the next redrawing.
static LINES: Mutex<Vec<u8>> = Mutex::new(Vec::new());

/// Whether somebody is there to look: standard output is a terminal that can do more than a typewriter.
pub fn is_wanted() -> bool {
    io::stdout().is_terminal() && std::env::var_os("TERM").is_some_and(|term| term != "dumb")
}

/// Takes log lines in place of standard error, where that is the same terminal.
pub struct Above;

impl Write for Above {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut lines = LINES.lock().unwrap_or_else(PoisonError::into_inner);
        lines.extend(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The terminal while the view is on it. Dropping it gives the terminal back as it was.
struct Screen {
    /// The widths of the lines that are on the screen.
    drawn: Vec<usize>,
    coloured: bool,
}

impl Screen {
    fn open() -> Screen {
        // No cursor in the way; and a line that is too long is cut, so that the view keeps its number of lines.
        print!("\x1b[?25l\x1b[?7l");
        let choice = anstream::AutoStream::choice(&io::stdout());
        Screen {
            drawn: Vec::new(),
            coloured: choice != anstream::ColorChoice::Never,
        }
    }

    /// Puts `view` in the place of the one before, and what was logged meanwhile above it.
    fn draw(&mut self, view: &[Line], columns: usize) {
        let mut text = String::new();
        // A terminal that has become narrower has folded what was on it.
        let folded = |width: &usize| width.div_ceil(columns.max(1)).max(1);
        let rows: usize = self.drawn.iter().map(folded).sum();
        if rows > 0 {
            // Writing to a String cannot fail, here and below.
            let _ = write!(text, "\x1b[{rows}A");
        }
        text += "\r\x1b[J";
        let logged = std::mem::take(&mut *LINES.lock().unwrap_or_else(PoisonError::into_inner));
        // Log lines may be longer than the terminal is wide.
        let _ = write!(text, "\x1b[?7h{}\x1b[?7l", String::from_utf8_lossy(&logged));
        for line in view {
            let _ = writeln!(text, "{}", line.text);
        }
        self.drawn = view.iter().map(|line| line.width).collect();
        // A terminal that is gone is noticed by its signal.
        let _ = io::stdout().write_all(text.as_bytes());
        let _ = io::stdout().flush();
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        let logged = std::mem::take(&mut *LINES.lock().unwrap_or_else(PoisonError::into_inner));
        let _ = io::stdout().write_all(b"\x1b[?7h\x1b[?25h");
        let _ = io::stdout().write_all(&logged);
        let _ = io::stdout().flush();
    }
}

/// Draws until it is dropped.
pub async fn show(board: Arc<Board>) {
    let mut screen = Screen::open();
    let mut ticks = interval(EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let (columns, lines) = terminal_size_of(io::stdout())
            .map_or((80, 24), |(Width(columns), Height(lines))| (columns, lines));
        let mut view = lay_out(&board.snapshot(), columns.into(), screen.coloured);
        // The cursor cannot go back above the first line of the screen.
        view.truncate(usize::from(lines).saturating_sub(1).max(1));
        screen.draw(&view, columns.into());
    }
}

/// A line as it is written, and how wide it then is.
#[derive(Debug)]
struct Line {
    text: String,
    width: usize,
}

/// The view's lines, none wider than `columns`. What does not fit is left out from the right.
fn lay_out(legs: &[Status], columns: usize, coloured: bool) -> Vec<Line> {
    let name = |leg: &Status| leg.name.chars().count();
    let width = legs.iter().map(name).max().unwrap_or(0).max("LEG".len());
    let rest = 53 + width;
    let bars = columns
        .saturating_sub(rest + 2)
        .clamp(8, super::board::RTTS);
    let mut lines = vec![cut(
        &[(
            format!(
                "{:width$}  {:5}  {:>8}  {:>9}  {:bars$}  {:>5}  LAST REASON",
                "LEG", "STATE", "SINCE", "RTT", "", "DROPS"
            ),
            Style::new().bold(),
        )],
        columns,
        coloured,
    )];
    for leg in legs {
        let (state, colour) = match (leg.up, leg.last) {
            (true, _) => ("up", AnsiColor::Green),
            (false, None) => ("…", AnsiColor::Yellow),
            (false, Some(_)) => ("down", AnsiColor::Red),
        };
        let reason = leg.last.map_or("-".into(), |reason| reason.to_string());
        let rtt = leg
            .rtts
            .back()
            .filter(|_| leg.up)
            .map_or("-".into(), |rtt| shown(*rtt));
        let plain = Style::new();
        let parts = [
            (format!("{:width$}  ", leg.name), plain),
            (
                format!("{state:5}  "),
                plain.bold().fg_color(Some(colour.into())),
            ),
            (
                format!("{:>8}  {rtt:>9}  ", since(leg.since.elapsed().as_secs())),
                plain,
            ),
            (
                format!("{:>bars$}  ", sparkline(leg.rtts.iter().copied(), bars)),
                plain.fg_color(Some(AnsiColor::Cyan.into())),
            ),
            (format!("{:>5}  {reason}", leg.drops), plain),
        ];
        lines.push(cut(&parts, columns, coloured));
    }
    lines
}

/// The parts' first `columns` characters, each in its style.
fn cut(parts: &[(String, Style)], columns: usize, coloured: bool) -> Line {
    let mut left = columns;
    let mut line = String::new();
    for (text, style) in parts {
        let fitting: String = text.chars().take(left).collect();
        left -= fitting.chars().count();
        if coloured {
            let _ = write!(line, "{style}{fitting}{style:#}");
        } else {
            line += &fitting;
        }
    }
    Line {
        text: line,
        width: columns - left,
    }
}

/// The newest RTTs as bars, each against the longest that is shown.
fn sparkline(rtts: impl ExactSizeIterator<Item = Duration> + Clone, columns: usize) -> String {
    let skipped = rtts.len().saturating_sub(columns);
    let rtts = rtts.skip(skipped);
    let longest = rtts.clone().max().unwrap_or_default().as_secs_f64();
    rtts.map(|rtt| {
        let share = rtt.as_secs_f64() / longest.max(f64::MIN_POSITIVE);
        let bar = (share * BARS.len() as f64).ceil() as usize;
        BARS[bar.clamp(1, BARS.len()) - 1]
    })
    .collect()
}

/// A time in its two largest units.
fn since(seconds: u64) -> String {
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3600 => format!("{}m {:02}s", seconds / 60, seconds % 60),
        3600..86_400 => format!("{}h {:02}m", seconds / 3600, seconds / 60 % 60),
        _ => format!("{}d {:02}h", seconds / 86_400, seconds / 3600 % 24),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;
    use crate::probe::reason::Reason;

    fn status(name: &str, rtts: &[u64]) -> Status {
        Status {
            name: name.into(),
            up: !rtts.is_empty(),
            since: Instant::now(),
            rtts: rtts.iter().copied().map(Duration::from_millis).collect(),
            drops: 3,
            went_down: None,
            last: Some(Reason::RttTimeout),
        }
    }

    #[test]
    fn a_terminal_of_any_width_gets_no_line_wider() {
        let legs = [
            status("cloudflare", &[20; 40]),
            status("a-name-that-has-thirty-two-signs", &[]),
        ];
        for columns in 0..200 {
            let lines = lay_out(&legs, columns, false);
            assert_eq!(lines.len(), 3);
            for line in lines {
                assert_eq!(line.text.chars().count(), line.width);
                assert!(line.width <= columns, "{columns}: {line:?}");
            }
        }
        let wide = lay_out(&legs, 200, false);
        assert!(wide[1].text.ends_with("3  rtt_timeout"), "{wide:#?}");
        assert!(wide[1].text.contains(&"█".repeat(40)), "{wide:#?}");
        // Colours take no room.
        assert!(lay_out(&legs, 80, true)[1].text.contains("\x1b["));
    }

    #[test]
    fn bars_are_as_tall_as_their_share() {
        let line = |rtts: &[u64], columns| {
            sparkline(rtts.iter().map(|rtt| Duration::from_millis(*rtt)), columns)
        };
        assert_eq!(line(&[0, 10, 20, 40, 80], 8), "▁▁▂▄█");
        assert_eq!(line(&[80, 10, 20], 2), "▄█");
        assert_eq!(line(&[0, 0], 8), "▁▁");
        assert_eq!(line(&[], 8), "");
    }

    #[test]
    fn times_in_their_two_largest_units() {
        assert_eq!(since(59), "59s");
        assert_eq!(since(61), "1m 01s");
        assert_eq!(since(7_260), "2h 01m");
        assert_eq!(since(90_000), "1d 01h");
    }
}
