// SPDX-License-Identifier: Apache-2.0
//! A bound on what a guest can make the host do: so many times at once, and so many a second in the long run.

use std::sync::Mutex;
use std::time::Duration;
use std::time::Instant;

use crate::lock::lock;

/// A rate with room for a burst.
#[derive(Debug)]
pub struct Pace {
    interval: Duration,
    slack: Duration,
    /// When all that was allowed so far would be over at the steady rate.
    due: Mutex<Option<Instant>>,
}

impl Pace {
    /// One every `interval` in the long run, `burst` at once.
    pub const fn new(interval: Duration, burst: u32) -> Self {
        Self { interval, slack: interval.saturating_mul(burst), due: Mutex::new(None) }
    }

    /// Takes a turn if there is one now.
    pub fn allow(&self) -> bool {
        self.turn(Instant::now(), false).is_some()
    }

    /// Takes a turn and waits until it comes.
    pub fn wait(&self) {
        if let Some(delay) = self.turn(Instant::now(), true).filter(|delay| !delay.is_zero()) {
            std::thread::sleep(delay);
        }
    }

    /// How long until the next turn, which is taken if it is now or is to be waited for.
    fn turn(&self, now: Instant, patient: bool) -> Option<Duration> {
        let mut due = lock(&self.due);
        let next = due.filter(|due| *due > now).unwrap_or(now) + self.interval;
        let delay = next.duration_since(now).saturating_sub(self.slack);
        let taken = patient || delay.is_zero();
        if taken {
            *due = Some(next);
        }
        taken.then_some(delay)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_passes_and_then_the_rate_holds() {
        let pace = Pace::new(Duration::from_millis(100), 5);
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        assert_eq!((0..20).filter(|_| pace.turn(at(0), false).is_some()).count(), 5);
        assert!(pace.turn(at(99), false).is_none());
        assert!(pace.turn(at(100), false).is_some());
        assert!(pace.turn(at(100), false).is_none());
        // Ten minutes of asking every millisecond: one in 100 ms, and the burst that was saved up before it.
        let all = (10_000..610_000).filter(|ms| pace.turn(at(*ms), false).is_some()).count();
        assert!((6000..=6006).contains(&all), "{all}");
    }

    #[test]
    fn who_waits_gets_turn_after_turn() {
        let pace = Pace::new(Duration::from_millis(100), 1);
        let now = Instant::now();
        let delays: Vec<_> = (0..3).filter_map(|_| pace.turn(now, true)).collect();
        assert_eq!(delays, [0, 100, 200].map(Duration::from_millis));
    }
}
