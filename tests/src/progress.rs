// SPDX-License-Identifier: Apache-2.0
//! Says what is still going on when nothing has been printed about it for a while: a quiet minute looks like
//! a hang.
//!
//! Whoever does something long holds a [`Doing`]. Every 30 s a line names the innermost one, and how long it
//! has taken.

use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::Once;
use std::sync::PoisonError;
use std::thread;
use std::time::Duration;
use std::time::Instant;

/// From one line to the next.
const PERIOD: Duration = Duration::from_secs(30);

/// One of the things being done.
struct Entry {
    number: u64,
    what: String,
    since: Instant,
    /// Periods that have been told.
    told: u64,
}

static DOING: Mutex<Vec<Entry>> = Mutex::new(Vec::new());
static SPEAKER: Once = Once::new();

/// Something is being done until this is dropped.
pub struct Doing(u64);

impl Doing {
    /// Begins with `what`.
    pub fn start(what: &str) -> Self {
        SPEAKER.call_once(|| {
            thread::spawn(|| {
                loop {
                    thread::sleep(Duration::from_secs(1));
                    let line = due(&mut lock(), Instant::now());
                    if let Some(line) = line {
                        println!("     ... {line}");
                    }
                }
            });
        });
        let mut doing = lock();
        let number = doing.iter().map(|entry| entry.number + 1).max().unwrap_or(0);
        doing.push(Entry { number, what: what.into(), since: Instant::now(), told: 0 });
        Doing(number)
    }
}

impl Drop for Doing {
    fn drop(&mut self) {
        lock().retain(|entry| entry.number != self.0);
    }
}

fn lock() -> MutexGuard<'static, Vec<Entry>> {
    DOING.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The line that is due at `now`, once for each period.
fn due(doing: &mut [Entry], now: Instant) -> Option<String> {
    let entry = doing.last_mut()?;
    let seconds = now.saturating_duration_since(entry.since).as_secs();
    let periods = seconds / PERIOD.as_secs();
    let is_new = periods > entry.told;
    entry.told = periods;
    is_new.then(|| format!("{}, {seconds} s", entry.what))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_innermost_is_named_every_thirty_seconds() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let entry = |number, what: &str, since| Entry { number, what: what.into(), since, told: 0 };
        let mut doing = vec![entry(0, "tests", start), entry(1, "a case", at(20))];
        assert_eq!(due(&mut doing, at(30)), None);
        assert_eq!(due(&mut doing, at(51)).unwrap(), "a case, 31 s");
        assert_eq!(due(&mut doing, at(52)), None);
        doing.pop();
        assert_eq!(due(&mut doing, at(90)).unwrap(), "tests, 90 s");
        assert_eq!(due(&mut [], at(90)), None);
    }
}
