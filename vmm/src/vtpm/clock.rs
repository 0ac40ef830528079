// SPDX-License-Identifier: Apache-2.0
//! The guest's clock, kept by the service from one run to the next.
//!
//! The device tells how far ahead the guest has set it; a thread stores that, so that a service that hangs
//! holds no vCPU. Of several settings in a row only the last one matters, and only that one need reach the
//! service.

use std::io;
use std::sync::Arc;
use std::sync::Condvar;
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::PoisonError;
use std::time::Duration;

use devices::rtc::Store;
use vtpm_svc::control::client::ClientError;
use vtpm_svc::control::client::Control;

use super::error::VtpmError;
use crate::events::Events;
use crate::lock::lock;
use crate::threads::spawn;

/// How long the end of a run waits for the last setting to be stored.
const SETTLE: Duration = Duration::from_secs(2);

/// What the guest set, and whether the service has it.
#[derive(Default)]
struct State {
    /// How far the guest's clock is ahead of the host's, in units of 100 ns.
    ahead: i64,
    /// The service does not have it yet.
    dirty: bool,
    /// The thread is to end.
    over: bool,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

/// The clock of one guest, for all its lives.
pub struct Clock(Arc<Shared>);

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    /// Waits until there is something to store; `None` at the end.
    fn next(&self) -> Option<i64> {
        let state = self.lock();
        let state = self.changed.wait_while(state, |state| !state.dirty && !state.over);
        let state = state.unwrap_or_else(PoisonError::into_inner);
        state.dirty.then_some(state.ahead)
    }

    /// `ahead` has been stored, or cannot be: nobody needs to wait for it.
    fn done(&self, ahead: i64) {
        let mut state = self.lock();
        state.dirty = state.ahead != ahead;
        self.changed.notify_all();
    }
}

impl Clock {
    /// The clock that the service knows; `None` if it keeps none, as swtpm does.
    pub fn new(control: &Control, events: &Events) -> Result<Option<Self>, VtpmError> {
        let ahead = match control.clock() {
            Ok(ahead) => ahead.unwrap_or_default(),
            Err(ClientError::Refused { .. }) => return Ok(None),
            Err(e) => return Err(e.into()),
        };
        let control = control.clone();
        let clock =
            Self::start(ahead, events, move |ahead| control.set_clock(ahead).map_err(|e| e.to_string()));
        Ok(Some(clock.map_err(|source| VtpmError::Host { what: "a thread", source })?))
    }

    fn start(
        ahead: i64,
        events: &Events,
        set: impl Fn(i64) -> Result<(), String> + Send + 'static,
    ) -> io::Result<Self> {
        let shared =
            Arc::new(Shared { state: Mutex::new(State { ahead, ..State::default() }), ..Shared::default() });
        let (its, events) = (Arc::clone(&shared), events.clone());
        spawn("tpm-clock".into(), move || {
            // A guest may set its clock as often as it likes.
            let mut complaint = String::new();
            while let Some(ahead) = its.next() {
                let problem = set(ahead).err().unwrap_or_default();
                if !problem.is_empty() && problem != complaint {
                    events.warn(format_args!("what the guest set its clock to is not kept: {problem}"));
                }
                complaint = problem;
                its.done(ahead);
            }
        })
        .map_err(|e| e.0)?;
        Ok(Clock(shared))
    }

    /// How far the guest's clock is ahead of the host's, in units of 100 ns.
    pub fn ahead(&self) -> i64 {
        self.0.lock().ahead
    }

    /// What the device calls when the guest has set its clock.
    pub fn store(&self) -> Store {
        let shared = Arc::clone(&self.0);
        Box::new(move |ahead| {
            let mut state = shared.lock();
            (state.ahead, state.dirty) = (ahead, true);
            shared.changed.notify_all();
        })
    }

    /// Waits a little until the service has the last setting.
    pub fn settle(&self) {
        let state = self.0.lock();
        let waited = self.0.changed.wait_timeout_while(state, SETTLE, |state| state.dirty);
        drop(waited.unwrap_or_else(PoisonError::into_inner));
    }
}

impl Drop for Clock {
    fn drop(&mut self) {
        let mut state = self.0.lock();
        (state.over, state.dirty) = (true, false);
        self.0.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[test]
    fn the_last_setting_reaches_the_service_before_the_end() {
        let (sender, stored) = mpsc::channel();
        let (go, gate) = mpsc::channel();
        let clock = Clock::start(7, &Events::silent(), move |ahead| {
            gate.recv().map_err(|e| e.to_string())?;
            sender.send(ahead).map_err(|e| e.to_string())
        })
        .unwrap();
        assert_eq!(clock.ahead(), 7);
        let mut store = clock.store();
        store(1);
        // While the service is busy with the first, two more come.
        store(2);
        store(3);
        assert_eq!(clock.ahead(), 3);
        for _ in 0..3 {
            go.send(()).unwrap();
        }
        clock.settle();
        assert_eq!(stored.try_iter().last(), Some(3));
    }

    #[test]
    fn a_service_that_refuses_holds_nobody() {
        let clock = Clock::start(0, &Events::silent(), |_| Err("gone".into())).unwrap();
        clock.store()(5);
        clock.settle();
        assert!(!clock.0.lock().dirty);
        assert_eq!(clock.ahead(), 5, "the next VM of this run still sees it");
    }

    #[test]
    fn the_thread_ends_with_the_clock() {
        let (sender, ended) = mpsc::channel::<()>();
        drop(Clock::start(0, &Events::silent(), move |_| sender.send(()).map_err(|e| e.to_string())));
        // The thread drops its end of the channel.
        assert!(
            ended
                .recv_timeout(Duration::from_secs(5))
                .is_err_and(|e| e == mpsc::RecvTimeoutError::Disconnected)
        );
    }
}
