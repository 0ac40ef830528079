// SPDX-License-Identifier: Apache-2.0
//! Visible progress: each step says what begins and, every half minute, how long it has taken; a table at the
//! end says what took how long.

use std::process::Command;
use std::time::Duration;
use std::time::Instant;

use anyhow::Context;
use anyhow::Result;
use anyhow::bail;
use cvmm_tests::progress::Doing;

/// The steps of one chore.
pub struct Steps {
    started: Instant,
    done: Vec<(String, Duration)>,
}

impl Steps {
    /// No step yet.
    pub fn new() -> Self {
        Steps { started: Instant::now(), done: Vec::new() }
    }

    /// Announces `name`, does `work`, and notes its time.
    pub fn step<T>(&mut self, name: &str, work: impl FnOnce() -> Result<T>) -> Result<T> {
        println!("[{:6.1} s] {name}", self.started.elapsed().as_secs_f64());
        let began = Instant::now();
        let _doing = Doing::start(name);
        let result = work().with_context(|| format!("step failed: {name}"));
        self.done.push((name.into(), began.elapsed()));
        result
    }

    /// Prints the table of steps and their times.
    pub fn print_table(&self) {
        let width = self.done.iter().map(|(name, _)| name.chars().count()).max().unwrap_or(0).max(5);
        println!("\n{:width$}  {:>9}", "step", "seconds");
        for (name, time) in &self.done {
            println!("{name:width$}  {:9.2}", time.as_secs_f64());
        }
        println!("{:width$}  {:9.2}", "total", self.started.elapsed().as_secs_f64());
    }
}

/// Runs a command with its output shown; an exit code other than 0 is an error that names the command.
pub fn show(command: &mut Command) -> Result<()> {
    let line = command_line(command);
    let status = command.status().with_context(|| format!("cannot start: {line}"))?;
    if !status.success() {
        bail!("`{line}` failed: {status}");
    }
    Ok(())
}

/// Runs a command and returns its standard output.
pub fn capture(command: &mut Command) -> Result<String> {
    let line = command_line(command);
    let output = command.output().with_context(|| format!("cannot start: {line}"))?;
    if !output.status.success() {
        bail!("`{line}` failed: {}: {}", output.status, String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn command_line(command: &Command) -> String {
    std::iter::once(command.get_program())
        .chain(command.get_args())
        .map(|word| word.to_string_lossy())
        .collect::<Vec<_>>()
        .join(" ")
}
