// SPDX-License-Identifier: Apache-2.0
//! A machine that runs jobs: this host, or L1. Tests do not see which.

use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::Receiver;
use std::sync::mpsc::RecvTimeoutError;
use std::sync::mpsc::channel;
use std::time::Duration;
use std::time::Instant;

use guest_init::job;
use guest_init::job::Ending;
use guest_init::job::Event;
use guest_init::job::Job;

use crate::nested::Nested;

/// How much longer than a job's own limit its machine may be silent before it counts as hung.
const GRACE: Duration = Duration::from_secs(30);

/// A job with the usual surroundings: the caller's `PATH` and home, the working directory, one minute.
pub fn job(program: impl AsRef<Path>) -> Job {
    let keep = ["PATH", "HOME", "LANG", "LD_LIBRARY_PATH"];
    let mut env: Vec<(String, String)> =
        keep.iter().filter_map(|name| Some((name.to_string(), std::env::var(name).ok()?))).collect();
    env.push(("TMPDIR".into(), "/dev/shm".into()));
    Job {
        argv: vec![program.as_ref().display().to_string()],
        env,
        cwd: std::env::current_dir().unwrap_or_else(|_| "/".into()),
        limit: Duration::from_secs(60),
        stdin: false,
    }
}

/// Everything that a finished job left.
#[derive(Clone, Debug)]
pub struct Output {
    /// How it ended.
    pub ending: Ending,
    /// Its standard output.
    pub stdout: Vec<u8>,
    /// Its standard error.
    pub stderr: Vec<u8>,
    /// From start to end, on the machine that ran it.
    pub elapsed: Duration,
}

impl Output {
    /// Standard output as text, carriage returns dropped: a guest's console has them.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).replace('\r', "")
    }

    /// Standard error as text.
    pub fn errors(&self) -> String {
        String::from_utf8_lossy(&self.stderr).into_owned()
    }
}

/// Where jobs run.
#[derive(Clone)]
pub enum Machine {
    /// On this host.
    Host,
    /// In the outer guest of a nested run.
    Nested(Arc<Nested>),
}

impl Machine {
    /// Starts `job`.
    pub fn start(&self, job: &Job) -> Running {
        let (sender, events) = channel();
        let control = match self {
            Machine::Host => Control::Host(job::start(job, move |event| {
                let _ = sender.send(event);
            })),
            Machine::Nested(nested) => Control::Nested(Arc::clone(nested), nested.start_job(job, sender)),
        };
        let patience = match self {
            Machine::Host => job.limit,
            Machine::Nested(nested) => nested.patience(job.limit),
        };
        let deadline = Instant::now() + patience + GRACE;
        Running { control, events, deadline, stdout: Vec::new(), stderr: Vec::new(), ended: None }
    }

    /// Runs `job` to its end.
    pub fn run(&self, job: &Job) -> Output {
        self.start(job).wait()
    }
}

enum Control {
    Host(job::Control),
    Nested(Arc<Nested>, u32),
}

/// A job that has been started.
pub struct Running {
    control: Control,
    events: Receiver<Event>,
    deadline: Instant,
    stdout: Vec<u8>,
    stderr: Vec<u8>,
    ended: Option<(Ending, Duration)>,
}

impl Running {
    /// Waits for the job's end.
    pub fn wait(self) -> Output {
        self.wait_watching(|_| {})
    }

    /// Waits for the job's end and shows each event to `watch` as it comes.
    pub fn wait_watching(mut self, mut watch: impl FnMut(&Event)) -> Output {
        while self.ended.is_none() {
            let event = self.next(self.deadline);
            watch(&event);
        }
        let (ending, elapsed) = self.ended.unwrap_or((Ending::TimedOut, Duration::ZERO));
        Output { ending, stdout: self.stdout, stderr: self.stderr, elapsed }
    }

    /// Waits until the job's standard output holds `text`; false if it ended or `patience` ran out before.
    pub fn wait_for(&mut self, text: &str, patience: Duration) -> bool {
        let until = Instant::now() + patience;
        loop {
            let found = self.stdout.windows(text.len().max(1)).any(|window| window == text.as_bytes());
            if found || self.ended.is_some() || Instant::now() >= until {
                return found;
            }
            match self.events.recv_timeout(until.saturating_duration_since(Instant::now())) {
                Ok(event) => self.take(event),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => self.take(lost(&self.control)),
            }
        }
    }

    /// Sends a signal to the job's process group.
    pub fn signal(&self, signal: i32) {
        match &self.control {
            Control::Host(control) => control.signal(signal),
            Control::Nested(nested, job) => nested.signal(*job, signal),
        }
    }

    /// Writes to the job's standard input.
    pub fn write_stdin(&self, bytes: &[u8]) {
        match &self.control {
            Control::Host(control) => control.write_stdin(bytes),
            Control::Nested(nested, job) => nested.write_stdin(*job, bytes),
        }
    }

    fn next(&mut self, deadline: Instant) -> Event {
        let event = match self.events.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(event) => event,
            Err(RecvTimeoutError::Disconnected) => lost(&self.control),
            Err(RecvTimeoutError::Timeout) => {
                if let Control::Nested(nested, _) = &self.control {
                    nested.give_up("a job did not end long after its time limit");
                }
                lost(&self.control)
            }
        };
        self.take(event.clone());
        event
    }

    fn take(&mut self, event: Event) {
        match event {
            Event::Stdout(bytes) => self.stdout.extend_from_slice(&bytes),
            Event::Stderr(bytes) => self.stderr.extend_from_slice(&bytes),
            Event::Ended(ending, elapsed) => self.ended = Some((ending, elapsed)),
        }
    }
}

fn lost(control: &Control) -> Event {
    let why = match control {
        Control::Host(_) => "its end was not reported".into(),
        Control::Nested(nested, _) => nested.why_gone(),
    };
    Event::Ended(Ending::Lost(why), Duration::ZERO)
}
