// SPDX-License-Identifier: Apache-2.0
//! A command with a time limit, its output as it comes, and the way it ended.
//!
//! Every process that the tests start goes through here, on the host and inside L1, so that nothing runs
//! without a limit and nothing outlives its job: the whole process group is killed when the job's first
//! process ends.

use std::io::Read;
use std::io::Write;
use std::os::unix::process::CommandExt;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::Child;
use std::process::ChildStdin;
use std::process::Command;
use std::process::Stdio;
use std::sync::Arc;
use std::sync::Mutex;
use std::thread;
use std::time::Duration;
use std::time::Instant;

use rustix::process::Pid;
use rustix::process::Signal;
use rustix::process::kill_process_group;
use serde::Deserialize;
use serde::Serialize;

/// How often a running job is looked at: bounds the error of its measured time.
const POLL: Duration = Duration::from_millis(5);

/// What to run.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Job {
    /// Program and arguments; the program is looked up in `PATH` if it holds no slash.
    pub argv: Vec<String>,
    /// The whole environment.
    pub env: Vec<(String, String)>,
    /// Working directory.
    pub cwd: PathBuf,
    /// Killed after this time.
    pub limit: Duration,
    /// Keep standard input open for [`Control::write_stdin`]; otherwise it is `/dev/null`.
    pub stdin: bool,
}

/// How a job ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Ending {
    /// With this exit code.
    Code(i32),
    /// By this signal, sent by somebody else than the harness's time limit.
    Signal(i32),
    /// Killed because the time limit passed.
    TimedOut,
    /// It could not be started, or the machine that ran it went away.
    Lost(String),
}

impl std::fmt::Display for Ending {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Ending::Code(code) => write!(f, "exit code {code}"),
            Ending::Signal(signal) => write!(f, "killed by signal {signal}"),
            Ending::TimedOut => write!(f, "killed: the time limit passed"),
            Ending::Lost(why) => write!(f, "lost: {why}"),
        }
    }
}

/// What a job does over time. `Ended` is the last event.
#[derive(Clone, Debug)]
pub enum Event {
    /// Bytes from its standard output.
    Stdout(Vec<u8>),
    /// Bytes from its standard error.
    Stderr(Vec<u8>),
    /// Its end, and how long it took.
    Ended(Ending, Duration),
}

/// Acts on a running job.
#[derive(Clone)]
pub struct Control {
    pid: Option<Pid>,
    stdin: Arc<Mutex<Option<ChildStdin>>>,
    ended: Arc<Mutex<bool>>,
}

impl Control {
    /// Number of the job's first process; `None` if it could not be started.
    pub fn id(&self) -> Option<u32> {
        self.pid.map(|pid| pid.as_raw_nonzero().get().cast_unsigned())
    }

    /// Sends `signal` to the job's process group; nothing happens once the job has ended.
    pub fn signal(&self, signal: i32) {
        let ended = lock(&self.ended);
        if let (false, Some(pid), Some(signal)) = (*ended, self.pid, Signal::from_named_raw(signal)) {
            // A group that is gone has nothing left to be told.
            let _ = kill_process_group(pid, signal);
        }
    }

    /// Writes to the job's standard input; a closed pipe is the job's choice, not an error.
    pub fn write_stdin(&self, bytes: &[u8]) {
        if let Some(pipe) = lock(&self.stdin).as_mut() {
            let _ = pipe.write_all(bytes).and_then(|()| pipe.flush());
        }
    }

    /// Closes the job's standard input.
    pub fn close_stdin(&self) {
        *lock(&self.stdin) = None;
    }
}

/// Starts `job`; `sink` gets its events from other threads, `Ended` last and exactly once.
pub fn start(job: &Job, sink: impl Fn(Event) + Send + Sync + 'static) -> Control {
    let started = Instant::now();
    let sink = Arc::new(sink);
    match spawn(job) {
        Ok(child) => supervise(child, started, job.limit, sink),
        Err(error) => {
            let program = job.argv.first().map_or("(empty command)", String::as_str);
            sink(Event::Ended(Ending::Lost(format!("cannot start {program}: {error}")), started.elapsed()));
            Control { pid: None, stdin: Arc::default(), ended: Arc::new(Mutex::new(true)) }
        }
    }
}

fn spawn(job: &Job) -> std::io::Result<Child> {
    let (program, args) = job.argv.split_first().ok_or(std::io::ErrorKind::InvalidInput)?;
    Command::new(program)
        .args(args)
        .env_clear()
        .envs(job.env.iter().map(|(name, value)| (name, value)))
        .current_dir(&job.cwd)
        .stdin(if job.stdin { Stdio::piped() } else { Stdio::null() })
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0)
        .spawn()
}

fn supervise<S>(mut child: Child, started: Instant, limit: Duration, sink: Arc<S>) -> Control
where
    S: Fn(Event) + Send + Sync + 'static,
{
    let control = Control {
        pid: i32::try_from(child.id()).ok().and_then(Pid::from_raw),
        stdin: Arc::new(Mutex::new(child.stdin.take())),
        ended: Arc::default(),
    };
    let readers = [
        child.stdout.take().map(|pipe| forward(pipe, Arc::clone(&sink), Event::Stdout)),
        child.stderr.take().map(|pipe| forward(pipe, Arc::clone(&sink), Event::Stderr)),
    ];
    let watched = control.clone();
    thread::spawn(move || {
        let ending = wait(&mut child, &watched, started + limit);
        for reader in readers.into_iter().flatten() {
            let _ = reader.join();
        }
        sink(Event::Ended(ending, started.elapsed()));
    });
    control
}

/// Waits for the child's end or its deadline, then kills what is left of its group.
fn wait(child: &mut Child, control: &Control, deadline: Instant) -> Ending {
    let mut timed_out = false;
    loop {
        // Held over the reaping, so that `Control::signal` never reaches a reused process number.
        let mut ended = lock(&control.ended);
        match child.try_wait() {
            Ok(None) => {}
            result => {
                if let Some(pid) = control.pid {
                    let _ = kill_process_group(pid, Signal::KILL);
                }
                *ended = true;
                return match result {
                    _ if timed_out => Ending::TimedOut,
                    Ok(Some(status)) => match (status.code(), status.signal()) {
                        (Some(code), _) => Ending::Code(code),
                        (None, signal) => Ending::Signal(signal.unwrap_or(0)),
                    },
                    Ok(None) | Err(_) => Ending::Lost("its state could not be read".into()),
                };
            }
        }
        drop(ended);
        if !timed_out && Instant::now() >= deadline {
            timed_out = true;
            control.signal(Signal::KILL.as_raw());
        }
        thread::sleep(POLL);
    }
}

fn forward<S>(
    mut pipe: impl Read + Send + 'static,
    sink: Arc<S>,
    event: fn(Vec<u8>) -> Event,
) -> thread::JoinHandle<()>
where
    S: Fn(Event) + Send + Sync + 'static,
{
    thread::spawn(move || {
        let mut buffer = [0; 16384];
        while let Ok(n @ 1..) = pipe.read(&mut buffer) {
            sink(event(buffer[..n].to_vec()));
        }
    })
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    fn run(script: &str, limit: Duration) -> (String, Ending, Duration) {
        let (sender, events) = mpsc::channel();
        let job = Job {
            argv: ["/bin/sh", "-c", script].map(String::from).into(),
            env: vec![("GREETING".into(), "hello".into())],
            cwd: "/".into(),
            limit,
            stdin: false,
        };
        start(&job, move |event| sender.send(event).unwrap());
        let mut text = String::new();
        for event in events {
            match event {
                Event::Stdout(bytes) | Event::Stderr(bytes) => text += &String::from_utf8_lossy(&bytes),
                Event::Ended(ending, time) => return (text, ending, time),
            }
        }
        panic!("no end was reported");
    }

    #[test]
    fn output_and_exit_code_come_back() {
        let (text, ending, _) = run("echo $GREETING; exit 7", Duration::from_secs(20));
        assert_eq!((text.as_str(), ending), ("hello\n", Ending::Code(7)));
    }

    #[test]
    fn a_job_over_its_limit_is_killed_with_its_children() {
        let (text, ending, time) = run("echo begun; sleep 60 & sleep 60", Duration::from_millis(300));
        assert_eq!((text.as_str(), ending), ("begun\n", Ending::TimedOut));
        assert!(time < Duration::from_secs(20), "took {time:?}");
    }

    #[test]
    fn a_child_left_behind_does_not_hold_the_job_open() {
        let (_, ending, time) = run("sleep 60 & exit 0", Duration::from_secs(30));
        assert_eq!(ending, Ending::Code(0));
        assert!(time < Duration::from_secs(20), "took {time:?}");
    }

    #[test]
    fn a_program_that_is_missing_is_named() {
        let job = Job {
            argv: vec!["/no/such/program".into()],
            env: vec![],
            cwd: "/".into(),
            limit: Duration::from_secs(1),
            stdin: false,
        };
        let (sender, events) = mpsc::channel();
        start(&job, move |event| sender.send(event).unwrap());
        let Ok(Event::Ended(Ending::Lost(why), _)) = events.recv() else { panic!("no Lost event") };
        assert!(why.contains("/no/such/program"), "{why}");
    }
}
