// SPDX-License-Identifier: Apache-2.0
//! What happens while a guest is put together and runs, for whoever asked for it: a user at a terminal, a
//! program, a test.
//!
//! The library prints nothing. Who calls it hands it a [`Sink`]; the command line's writes to standard error.
//! A guest can cause events, by resets for example, so a sink must neither wait nor panic, whatever becomes
//! of its output.

use std::fmt;
use std::sync::Arc;

/// Something that happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// It is worth knowing.
    Note(String),
    /// Something is wrong, and the monitor goes on.
    Warning(String),
    /// The guest is in another state.
    State(State),
}

/// How far a guest has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Its VM number `life`, counted from 1, is created and launched.
    Launching {
        /// Which one.
        life: u32,
    },
    /// The vCPUs run.
    Running {
        /// In which VM.
        life: u32,
    },
    /// The vCPUs of that VM have stopped.
    Stopped {
        /// Which one.
        life: u32,
    },
}

/// Takes events.
pub trait Sink: Send + Sync {
    /// Called from any thread, in the order in which things happen in it.
    fn event(&self, event: Event);
}

/// A way to a sink, for everything that has something to tell.
#[derive(Clone)]
pub struct Events(Arc<dyn Sink>);

impl Events {
    /// To `sink`.
    pub fn to(sink: impl Sink + 'static) -> Self {
        Events(Arc::new(sink))
    }

    /// To nobody.
    pub fn silent() -> Self {
        struct Nobody;
        impl Sink for Nobody {
            fn event(&self, _: Event) {}
        }
        Events::to(Nobody)
    }

    /// Hands on what happened.
    pub fn tell(&self, event: Event) {
        self.0.event(event);
    }

    /// Says that something happened.
    pub fn note(&self, text: impl fmt::Display) {
        self.tell(Event::Note(text.to_string()));
    }

    /// Says that something is wrong, and that the monitor goes on.
    pub fn warn(&self, text: impl fmt::Display) {
        self.tell(Event::Warning(text.to_string()));
    }

    /// Says how far the guest has come.
    pub fn state(&self, state: State) {
        self.tell(Event::State(state));
    }
}

impl fmt::Debug for Events {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Events")
    }
}
