// SPDX-License-Identifier: Apache-2.0
//! What the main thread waits for: signals, the end of a guest, and work that may hang.
//!
//! Signals are caught from before the first child process is started until after the last one has ended, so
//! that one that comes at any time leads to the same orderly end. For that the main thread never waits for
//! anything else than its inbox: what may take long, such as a TPM service that powers on, is done in a
//! thread of its own ([`Inbox::attend`]).

use std::io;
use std::sync::mpsc;
use std::sync::mpsc::Receiver;
use std::sync::mpsc::RecvTimeoutError;
use std::sync::mpsc::Sender;
use std::sync::mpsc::TryRecvError;
use std::time::Duration;
use std::time::Instant;

use super::signals::SignalThread;
use crate::events::Events;
use crate::run::arrival::Arrival;
use crate::run::error::MonitorError;
use crate::threads::spawn;

/// How long the monitor waits for something without saying so.
const SILENCE: Duration = Duration::from_secs(2);

/// Why attended work has no result.
#[derive(Debug, thiserror::Error)]
pub enum Unattended {
    /// The process was told to stop.
    #[error("stopped by signal {0}")]
    Signal(i32),
    /// It takes too long.
    #[error("no answer within {} seconds", .0.as_secs())]
    Deadline(Duration),
    /// It has no thread, or its thread has panicked.
    #[error("its thread: {0}")]
    Thread(io::Error),
}

/// Where events arrive.
pub struct Inbox {
    sender: Sender<Arrival>,
    receiver: Receiver<Arrival>,
    events: Events,
    _signals: SignalThread,
}

impl Inbox {
    /// An empty one. From here on no signal ends the process by itself.
    pub fn open(events: &Events) -> Result<Self, MonitorError> {
        let (sender, receiver) = mpsc::channel();
        let signals = SignalThread::start(sender.clone())?;
        Ok(Inbox { sender, receiver, events: events.clone(), _signals: signals })
    }

    /// Where is told what is waited for.
    pub(crate) fn events(&self) -> &Events {
        &self.events
    }

    /// The way in.
    pub(crate) fn sender(&self) -> &Sender<Arrival> {
        &self.sender
    }

    /// Waits for the next event.
    pub(crate) fn next(&self) -> Result<Arrival, MonitorError> {
        // There is always a sender: our own.
        self.receiver
            .recv()
            .map_err(|e| MonitorError::Host { what: "all threads ended", source: io::Error::other(e) })
    }

    /// Waits until `deadline`, or for a signal.
    pub fn signal_before(&self, deadline: Instant) -> Option<i32> {
        loop {
            match self.receiver.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(Arrival::Signal(signal)) => return Some(signal),
                Ok(Arrival::Ended { .. } | Arrival::Done) => {}
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => return None,
            }
        }
    }

    /// Has `work` done in a thread and waits for it, for a signal, or for `patience`, whichever comes first;
    /// says what it waits for if that takes some time. After the latter two the thread may go on, and its
    /// result is dropped.
    pub fn attend<T: Send + 'static>(
        &self,
        what: &str,
        patience: Duration,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, Unattended> {
        let (answer, result) = mpsc::sync_channel(1);
        let done = self.sender.clone();
        spawn("attended".into(), move || {
            let _ = answer.send(work());
            let _ = done.send(Arrival::Done);
        })
        .map_err(|e| Unattended::Thread(io::Error::other(e.to_string())))?;
        let begun = Instant::now();
        let mut silent = true;
        loop {
            match result.try_recv() {
                Ok(result) => return Ok(result),
                Err(TryRecvError::Empty) => {}
                Err(TryRecvError::Disconnected) => {
                    return Err(Unattended::Thread(io::Error::other("it ended without an answer")));
                }
            }
            let elapsed = begun.elapsed();
            if elapsed >= patience {
                return Err(Unattended::Deadline(patience));
            }
            if silent && elapsed >= SILENCE {
                silent = false;
                self.events.note(format_args!(
                    "waiting for {what} (for {} seconds at most; a signal such as Ctrl-C ends it)",
                    patience.as_secs()
                ));
            }
            // A thread that panics tells nobody, so the result is looked for now and then.
            match self.receiver.recv_timeout(SILENCE.min(patience - elapsed)) {
                Ok(Arrival::Signal(signal)) => return Err(Unattended::Signal(signal)),
                Ok(Arrival::Done | Arrival::Ended { .. }) | Err(_) => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use signal_hook::consts::SIGTERM;

    use super::*;

    #[test]
    fn work_is_waited_for_until_its_deadline() {
        let inbox = Inbox::open(&Events::silent()).unwrap();
        assert_eq!(inbox.attend("a test", Duration::from_secs(60), || 7).unwrap(), 7);
        let (gate, wait) = mpsc::channel::<()>();
        let begun = Instant::now();
        let late = inbox.attend("a test", Duration::from_millis(200), move || wait.recv());
        assert!(matches!(late, Err(Unattended::Deadline(_))), "{late:?}");
        assert!(begun.elapsed() < Duration::from_secs(30));
        drop(gate);
        // What the late thread says afterwards is not taken for the next answer.
        assert_eq!(inbox.attend("a test", Duration::from_secs(60), || 8).unwrap(), 8);
    }

    #[test]
    fn a_signal_ends_the_wait() {
        let inbox = Inbox::open(&Events::silent()).unwrap();
        let (gate, wait) = mpsc::channel::<()>();
        inbox.sender().send(Arrival::Signal(SIGTERM)).unwrap();
        let ended = inbox.attend("a test", Duration::from_secs(600), move || wait.recv());
        assert!(matches!(ended, Err(Unattended::Signal(SIGTERM))), "{ended:?}");
        drop(gate);
    }

    #[test]
    fn work_that_panics_is_an_error() {
        let inbox = Inbox::open(&Events::silent()).unwrap();
        let ended = inbox.attend("a test", Duration::from_secs(600), || assert_eq!(1, 2));
        assert!(matches!(ended, Err(Unattended::Thread(_))), "{ended:?}");
    }
}
