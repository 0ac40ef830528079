// SPDX-License-Identifier: Apache-2.0
//! Places for clients: a number of them is served at a time, and a new one gets the place of one that says
//! nothing.
//!
//! A client that connects and is silent must not keep the others out. So when all places are taken, one that
//! has never said anything goes, else one that has been idle for a minute: the one that came last, because a
//! monitor's connection is there from the start and may be silent for days.
//!
//! A client that sends and never reads is no better: its answers pile up until the socket is full. So who
//! takes an answer counts as idle from the moment that the answer is there, and who does not take any of it
//! for [`READING`] loses its connection.

use std::io;
use std::sync::Arc;
use std::sync::Condvar;
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::PoisonError;
use std::time::Duration;
use std::time::Instant;

use crate::lock::lock;

use super::socket::Stream;

/// Clients of one kind that are served at a time.
pub(super) const MAX_CLIENTS: usize = 16;
/// How long a client may take to say its first word when another wants its place.
const FIRST_WORD: Duration = Duration::from_secs(2);
/// How long one that has spoken may be idle then.
const IDLE: Duration = Duration::from_secs(60);
/// How long a client may leave an answer untouched when there is no room for it.
const READING: Duration = Duration::from_secs(10);
/// A client that has just left, or was sent away, may not be counted off yet.
const PATIENCE: Duration = Duration::from_secs(2);

/// What one client does.
#[derive(Debug)]
struct Place {
    number: u64,
    stream: Stream,
    spoken: bool,
    busy: bool,
    quiet_since: Instant,
}

#[derive(Debug, Default)]
struct Table {
    next: u64,
    places: Vec<Place>,
}

/// The places of one listening socket.
#[derive(Debug, Default)]
pub(super) struct Clients {
    table: Mutex<Table>,
    left: Condvar,
}

/// A place that is taken; given back when dropped.
#[derive(Debug)]
pub(super) struct Seat {
    clients: Arc<Clients>,
    number: u64,
}

/// Which client has to go, by the rule at the top.
fn dispensable(places: &[Place], now: Instant) -> Option<&Place> {
    let idle = |p: &Place, least| !p.busy && now.duration_since(p.quiet_since) >= least;
    let silent = places.iter().filter(|p| !p.spoken && idle(p, FIRST_WORD)).min_by_key(|p| p.number);
    silent.or_else(|| places.iter().filter(|p| p.spoken && idle(p, IDLE)).max_by_key(|p| p.number))
}

impl Clients {
    fn table(&self) -> MutexGuard<'_, Table> {
        lock(&self.table)
    }

    /// A place for a client, if there is one or one can be made.
    pub(super) fn admit(self: &Arc<Self>, stream: &Stream) -> io::Result<Option<Seat>> {
        stream.set_writing_patience(READING)?;
        let stream = stream.try_clone()?;
        let mut table = self.table();
        if table.places.len() >= MAX_CLIENTS
            && let Some(place) = dispensable(&table.places, Instant::now())
        {
            // Its thread sees the end of the connection, and gives the place back.
            place.stream.shutdown();
        }
        let full = |table: &mut Table| table.places.len() >= MAX_CLIENTS;
        let waited = self.left.wait_timeout_while(table, PATIENCE, full);
        (table, _) = waited.unwrap_or_else(PoisonError::into_inner);
        if full(&mut table) {
            return Ok(None);
        }
        let number = table.next;
        table.next += 1;
        table.places.push(Place { number, stream, spoken: false, busy: false, quiet_since: Instant::now() });
        Ok(Some(Seat { clients: self.clone(), number }))
    }

    fn with(&self, number: u64, change: impl FnOnce(&mut Place)) {
        if let Some(place) = self.table().places.iter_mut().find(|p| p.number == number) {
            change(place);
        }
    }
}

impl Seat {
    /// The client has said something, which is being done.
    pub(super) fn busy(&self) {
        self.clients.with(self.number, |place| (place.spoken, place.busy) = (true, true));
    }

    /// Its answer is there, and it only has to take it.
    pub(super) fn answered(&self) {
        self.clients.with(self.number, |place| (place.busy, place.quiet_since) = (false, Instant::now()));
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.clients.table().places.retain(|p| p.number != self.number);
        self.clients.left.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixStream;

    fn place(number: u64, spoken: bool, busy: bool, quiet_for: u64, now: Instant) -> Place {
        let stream = Stream::Unix(UnixStream::pair().expect("pair").0);
        Place { number, stream, spoken, busy, quiet_since: now - Duration::from_secs(quiet_for) }
    }

    #[test]
    fn the_silent_go_first_then_the_idle_who_came_last() {
        let now = Instant::now() + Duration::from_secs(1000);
        let who = |places: &[Place]| dispensable(places, now).map(|p| p.number);
        let monitor = || place(0, true, false, 900, now);
        assert_eq!(
            who(&[monitor(), place(1, false, false, 5, now), place(2, false, false, 3, now)]),
            Some(1)
        );
        assert_eq!(
            who(&[monitor(), place(1, true, false, 70, now), place(2, true, false, 61, now)]),
            Some(2)
        );
        assert_eq!(who(&[place(0, false, false, 1, now), place(1, true, false, 59, now)]), None);
        assert_eq!(who(&[place(0, true, true, 900, now)]), None, "what it asked for is being done");
    }
}
