//! How long a leg waits before it connects again.

use std::time::Duration;

use super::reason::Reason;

/// How long to wait before the next try.
#[derive(Debug)]
pub struct Delay {
    step: Duration,
    most: Duration,
    /// The next wait.
    pub wait: Duration,
    /// The wait after the next try, should that fail too.
    next: Duration,
    /// Whether the last wait was none at all.
    at_once: bool,
}

impl Delay {
    /// Grows by `step` up to `most`.
    pub fn new(step: Duration, most: Duration) -> Delay {
        Delay {
            step,
            most,
            wait: step,
            next: step,
            at_once: false,
        }
    }

    /// A try came to nothing.
    pub fn failed(&mut self) {
        self.at_once = false;
        self.wait = self.next.min(self.most);
        self.next = (self.next + self.step).min(self.most);
    }

    /// A connection ended.
    pub fn ended(&mut self, reason: Reason, echoed: bool, age: Duration) {
        if echoed {
            self.next = self.step;
        }
        // The dispatcher was replaced, and its successor serves already. One that says so on and on is not rushed at.
        let replaced = echoed && matches!(reason, Reason::Closed(1001 | 1012));
        if replaced && !(self.at_once && age < self.step) {
            self.at_once = true;
            self.wait = Duration::ZERO;
        } else {
            self.failed();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NONE: Duration = Duration::ZERO;

    fn waits(delay: &mut Delay, count: usize) -> Vec<u64> {
        let mut waits = Vec::new();
        for _ in 0..count {
            delay.failed();
            waits.push(delay.wait.as_secs());
        }
        waits
    }

    fn delay() -> Delay {
        Delay::new(Duration::from_secs(3), Duration::from_secs(10))
    }

    #[test]
    fn waits_grow_with_each_failure_and_begin_again_after_an_echo() {
        let mut delay = delay();
        assert_eq!(waits(&mut delay, 5), [3, 6, 9, 10, 10]);
        delay.ended(Reason::IoError, false, NONE);
        assert_eq!(delay.wait.as_secs(), 10);
        delay.ended(Reason::IoError, true, NONE);
        assert_eq!(delay.wait.as_secs(), 3);
        assert_eq!(waits(&mut delay, 2), [6, 9]);
    }

    #[test]
    fn a_dispatcher_that_was_replaced_is_called_at_once() {
        for code in [1001, 1012] {
            let mut delay = delay();
            delay.ended(Reason::Closed(code), true, NONE);
            assert_eq!(delay.wait, NONE);
            assert_eq!(waits(&mut delay, 2), [3, 6]);
        }
        // Not one that never worked, nor for another reason.
        for (reason, echoed) in [
            (Reason::Closed(1001), false),
            (Reason::Closed(1000), true),
            (Reason::RttTimeout, true),
        ] {
            let mut delay = delay();
            delay.ended(reason, echoed, NONE);
            assert_eq!(delay.wait.as_secs(), 3, "{reason}");
        }
    }

    #[test]
    fn a_dispatcher_that_is_replaced_on_and_on_is_not_rushed_at() {
        let mut delay = delay();
        let away = Reason::Closed(1001);
        delay.ended(away, true, NONE);
        delay.ended(away, true, Duration::from_secs(1));
        assert_eq!(delay.wait.as_secs(), 3);
        delay.ended(away, true, Duration::from_secs(1));
        assert_eq!(delay.wait, NONE);
        delay.ended(away, true, Duration::from_secs(60));
        assert_eq!(delay.wait, NONE);
    }
}
