// SPDX-License-Identifier: Apache-2.0
//! A program that is run to its end within a time limit.

use std::path::Path;
use std::path::PathBuf;
use std::sync::mpsc::channel;
use std::time::Duration;
use std::time::Instant;

use anyhow::Result;
use anyhow::ensure;
use guest_init::job;
use guest_init::job::Ending;
use guest_init::job::Event;
use guest_init::job::Job;

/// A program, here always cvmm.
pub struct Program(PathBuf);

/// What it left.
pub struct Output {
    /// How it ended.
    pub ending: Ending,
    /// Its standard output.
    pub stdout: Vec<u8>,
    /// Its standard error.
    pub stderr: Vec<u8>,
    /// From start to end.
    pub seconds: f64,
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

    /// An error with what it said, if it did not end with `code`.
    pub fn expect_code(&self, what: &str, code: i32) -> Result<()> {
        let ending = &self.ending;
        ensure!(
            *ending == Ending::Code(code),
            "{what} ended with {ending}, not {code}: {}",
            self.errors().trim()
        );
        Ok(())
    }
}

impl Program {
    /// The program in this file.
    pub fn new(path: PathBuf) -> Self {
        Program(path)
    }

    /// Its file.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// It, with arguments, as a job.
    pub fn job(&self, arguments: &[impl AsRef<str>], limit: Duration) -> Job {
        let mut argv = vec![self.0.display().to_string()];
        argv.extend(arguments.iter().map(|a| a.as_ref().to_owned()));
        let keep = ["PATH", "HOME", "LANG", "TMPDIR"];
        let env =
            keep.iter().filter_map(|name| Some(((*name).to_owned(), std::env::var(name).ok()?))).collect();
        let cwd = std::env::current_dir().unwrap_or_else(|_| "/".into());
        Job { argv, env, cwd, limit, stdin: false }
    }

    /// Runs it to its end.
    pub fn run(&self, arguments: &[impl AsRef<str>], limit: Duration) -> Output {
        let started = Instant::now();
        let (sender, events) = channel();
        job::start(&self.job(arguments, limit), move |event| {
            // A receiver that is gone has all that it wanted.
            let _ = sender.send(event);
        });
        let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
        let mut ending = Ending::Lost("its end was not reported".into());
        for event in events {
            match event {
                Event::Stdout(bytes) => stdout.extend_from_slice(&bytes),
                Event::Stderr(bytes) => stderr.extend_from_slice(&bytes),
                Event::Ended(how, _) => {
                    ending = how;
                    break;
                }
            }
        }
        Output { ending, stdout, stderr, seconds: started.elapsed().as_secs_f64() }
    }
}
