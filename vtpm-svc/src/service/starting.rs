// SPDX-License-Identifier: Apache-2.0
//! A start that waits for others: for a hook that has the key, for whoever holds the image or its anchor.
//!
//! A thread says after two seconds what is waited for (of a key hook, the code that runs it tells first), and
//! ends the process when whoever started it, and alone can use it, is gone. It is over before the cage
//! closes, which must hold every thread.

use std::os::fd::AsFd;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::Condvar;
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::PoisonError;
use std::thread::JoinHandle;
use std::time::Duration;
use std::time::Instant;

use rustix::event::PollFd;
use rustix::event::PollFlags;

use crate::lock::lock;
use crate::log;

/// When something is said, and how often it is repeated.
const QUIET: Duration = Duration::from_secs(2);
const AGAIN: Duration = Duration::from_secs(30);
/// How often the client is looked at.
const LOOK: Duration = Duration::from_millis(200);

#[derive(Default)]
struct Shared {
    /// What is waited for; nothing any more when the start is over.
    what: Mutex<Option<String>>,
    over: Condvar,
}

impl Shared {
    fn what(&self) -> MutexGuard<'_, Option<String>> {
        lock(&self.what)
    }
}

/// The thread, ended when dropped.
pub(super) struct Starting {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Starting {
    /// Begins to watch. `client` is the connection of the only one who can use the service; `told` says that
    /// somebody else tells of the wait first.
    pub(super) fn watch(what: &str, told: bool, client: Option<OwnedFd>) -> std::io::Result<Self> {
        let shared = Arc::new(Shared { what: Mutex::new(Some(what.to_owned())), over: Condvar::new() });
        let theirs = shared.clone();
        let thread = std::thread::Builder::new().name("start".into()).stack_size(256 << 10);
        let first = if told { AGAIN } else { QUIET };
        let thread = thread.spawn(move || look_after(&theirs, first, client.as_ref()))?;
        Ok(Self { shared, thread: Some(thread) })
    }
}

impl Drop for Starting {
    fn drop(&mut self) {
        *self.shared.what() = None;
        self.shared.over.notify_all();
        if let Some(thread) = self.thread.take() {
            // It has nothing to say about its end.
            let _ = thread.join();
        }
    }
}

fn look_after(shared: &Shared, first: Duration, client: Option<&OwnedFd>) {
    let mut next = Instant::now() + first;
    let mut what = shared.what();
    while let Some(text) = what.as_ref() {
        if Instant::now() >= next {
            log::info(&format!("starting: waiting for {text}"));
            next = Instant::now() + AGAIN;
        }
        if client.is_some_and(is_gone) {
            log::error("whoever started the service is gone, so it ends");
            std::process::exit(1);
        }
        (what, _) = shared.over.wait_timeout(what, LOOK).unwrap_or_else(PoisonError::into_inner);
    }
}

fn is_gone(client: &OwnedFd) -> bool {
    let mut fds = [PollFd::from_borrowed_fd(client.as_fd(), PollFlags::empty())];
    let now = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
    rustix::event::poll(&mut fds, Some(&now)).is_ok() && fds[0].revents().contains(PollFlags::HUP)
}
