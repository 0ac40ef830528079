// SPDX-License-Identifier: Apache-2.0
//! The walk of the main job: a guest's lives, one VM after the other, and what outlives each of them:
//! signals, the terminal, and companions such as a TPM.

use std::io;
use std::sync::Arc;
use std::sync::Mutex;
use std::time::Instant;

use signal_hook::consts::SIGINT;

use crate::console::stdio::Keyboard;
use crate::console::stdio::SharedConsole;
use crate::console::terminal;
use crate::console::terminal::RawMode;
use crate::events::State;
use crate::platform::Platform;
use crate::run::arrival::Arrival;
use crate::run::error::MonitorError;
use crate::run::guest::Guest;
use crate::run::guest::Host;
use crate::run::inbox::Inbox;
use crate::run::inbox::Unattended;
use crate::run::life;
use crate::run::outcome::Outcome;

/// Creates `guest` on `platform` and runs it to its end, in more than one VM if `host` says so.
pub fn run(platform: &dyn Platform, mut guest: Guest, mut host: Host) -> Result<Outcome, MonitorError> {
    let (interactive, restart) = (host.interactive, host.restart);
    // Signals are caught from here on at the latest, so that one that arrives during a launch is not lost.
    let inbox = host.inbox.take().map_or_else(|| Inbox::open(&host.events), Ok)?;
    let output = Arc::new(Mutex::new(std::mem::replace(&mut host.console, Box::new(io::sink()))));
    let keyboard = Keyboard::default();
    let mut raw = None;

    let mut life = 1;
    loop {
        let begun = Instant::now();
        if let Some(signal) = prepare(&mut host, life, &inbox).map_err(|e| in_life(life, e))? {
            return Ok(Outcome::Signal(signal));
        }
        host.events.state(State::Launching { life });
        let console = SharedConsole::new(&output);
        let booted = life::boot(platform, &guest, Box::new(console.clone()), &mut host, life);
        let booted = booted.map_err(|e| in_life(life, e))?;
        if restart.is_none() {
            guest.forget_contents();
        }
        if interactive && life == 1 {
            if terminal::in_background() {
                host.events
                    .note("runs in the background of its terminal, so the guest gets no input from it");
            } else {
                raw = RawMode::enter().map_err(MonitorError::Terminal)?;
                let events = inbox.sender().clone();
                keyboard.listen(raw.is_some(), move || drop(events.send(Arrival::Signal(SIGINT))))?;
            }
        }
        keyboard.connect(Some(Arc::clone(&booted.shared.machine.serial)));
        host.events.state(State::Running { life });
        let running = booted.start(life, inbox.sender())?;
        let outcome = end_of(life, &inbox);
        keyboard.connect(None);
        console.end();
        let stopped = running.stop();
        host.events.state(State::Stopped { life });
        let outcome = outcome?;
        let Some(restart) =
            restart.filter(|r| outcome == Outcome::Rebooted && r.lives.is_none_or(|n| life < n))
        else {
            drop(raw);
            return Ok(outcome);
        };
        if let Some(signal) = inbox.signal_before(begun + restart.pace) {
            return Ok(Outcome::Signal(signal));
        }
        life = life.saturating_add(1);
        if !stopped {
            return Err(in_life(life, MonitorError::Stuck));
        }
        host.events.note(format_args!("the guest asked for a reset: VM number {life} follows"));
    }
}

/// Says of an error of a later life that there were others before.
fn in_life(life: u32, source: MonitorError) -> MonitorError {
    if life > 1 { MonitorError::Restart { life, source: Box::new(source) } } else { source }
}

/// Has each companion get ready for a life. A signal ends that, and the run.
fn prepare(host: &mut Host, life: u32, inbox: &Inbox) -> Result<Option<i32>, MonitorError> {
    for companion in &mut host.companions {
        let name = companion.name();
        while let Some((patience, work)) = companion.prepare(life) {
            let problem = match inbox.attend(name, patience, work) {
                Ok(Ok(())) => break,
                Ok(Err(_)) if companion.recovers() => continue,
                Ok(Err(problem)) => problem,
                Err(Unattended::Signal(signal)) => return Ok(Some(signal)),
                Err(other) => other.into(),
            };
            return Err(MonitorError::Companion { name, problem });
        }
    }
    Ok(None)
}

/// Waits for the end of a life.
fn end_of(life: u32, inbox: &Inbox) -> Result<Outcome, MonitorError> {
    loop {
        match inbox.next()? {
            Arrival::Ended { life: ended, result } if ended == life => return Ok(result?),
            Arrival::Ended { .. } | Arrival::Done => {}
            Arrival::Signal(signal) => return Ok(Outcome::Signal(signal)),
        }
    }
}
