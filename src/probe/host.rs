//! How this process and its host are: whether the event loop keeps up, and what tasks wait for.

use std::collections::VecDeque;
use std::sync::Once;
use std::time::Duration;

use nix::time::{ClockId, clock_gettime};

use crate::events;
use crate::evidence::{self, Event, Millis};

/// How often the event loop is looked at.
const LOOK: Duration = Duration::from_millis(100);

/// A loop that is later than that has stood still.
pub const STILL: Duration = Duration::from_millis(250);

/// How many looks the gauge looks back over, which is also how often the pressure is read.
const LOOKS: usize = 100;

/// From this share of the time on, waiting is worth being remembered.
const PRESSED: f64 = 0.1;

/// Watches the event loop that it is called on, from the first call on.
pub fn watch() {
    static STARTED: Once = Once::new();
    STARTED.call_once(|| {
        tokio::spawn(look());
    });
}

/// The time since the host was started. It goes on while the host sleeps, and nobody sets it.
fn uptime() -> Duration {
    // Linux has had that clock since 2.6.39, so there is no other error to speak of.
    clock_gettime(ClockId::CLOCK_BOOTTIME).map_or(Duration::ZERO, Duration::from)
}

/// By how much the event loop is late, found in a tenth of a second.
pub async fn lag() -> Duration {
    let before = uptime();
    tokio::time::sleep(LOOK).await;
    uptime().saturating_sub(before).saturating_sub(LOOK)
}

async fn look() {
    let mut lags = VecDeque::with_capacity(LOOKS);
    let mut pressures = ["cpu", "io", "memory"].map(Pressure::new);
    let mut looks = 0;
    loop {
        let lag = lag().await;
        if lag >= STILL {
            let since = evidence::now() - lag.as_millis() as Millis;
            evidence::record(Event::Lagged { since });
        }
        if lags.len() == LOOKS {
            lags.pop_front();
        }
        lags.push_back(lag);
        events::loop_lag(lags.iter().max().copied().unwrap_or_default());
        looks += 1;
        if looks % LOOKS == 0 {
            pressures.iter_mut().for_each(Pressure::read);
        }
    }
}

/// The time that tasks of the host have spent waiting for a resource (the kernel's Documentation/accounting/psi.rst).
struct Pressure {
    resource: &'static str,
    before: Option<(u64, Duration)>,
}

impl Pressure {
    fn new(resource: &'static str) -> Pressure {
        // Until there is a reading of our own, the kernel's, which is of about the same length.
        if let Some(share) = waiting(resource, "avg10=").and_then(|text| text.parse::<f64>().ok()) {
            events::pressure(resource, share / 100.0);
        }
        Pressure {
            resource,
            before: total(resource).zip(Some(uptime())),
        }
    }

    fn read(&mut self) {
        // Not every kernel has it.
        let Some(now) = total(self.resource).zip(Some(uptime())) else {
            return;
        };
        if let Some((total, at)) = self.before.replace(now) {
            let waited = Duration::from_micros(now.0.saturating_sub(total));
            let within = now.1.saturating_sub(at).max(LOOK);
            let share = (waited.as_secs_f64() / within.as_secs_f64()).min(1.0);
            events::pressure(self.resource, share);
            if share >= PRESSED {
                evidence::record(Event::Pressed {
                    resource: self.resource.into(),
                    share,
                });
            }
        }
    }
}

/// Microseconds in which some task has waited.
fn total(resource: &str) -> Option<u64> {
    waiting(resource, "total=")?.parse().ok()
}

/// A value of the line about times in which some task has waited.
fn waiting(resource: &str, key: &str) -> Option<String> {
    let text = std::fs::read_to_string(format!("/proc/pressure/{resource}")).ok()?;
    let some = text.lines().find(|line| line.starts_with("some"))?;
    let value = some.split(' ').find_map(|word| word.strip_prefix(key));
    value.map(str::to_owned)
}
