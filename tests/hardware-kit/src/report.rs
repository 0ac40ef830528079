// SPDX-License-Identifier: Apache-2.0
//! The one file that comes back: for programs all of it, for people a table.

use std::fmt;
use std::fs;
use std::fs::File;
use std::io::Write as _;
use std::path::PathBuf;

use anyhow::Context as _;
use anyhow::Result;
use serde_json::Map;
use serde_json::Value;
use serde_json::json;

use crate::steps::Kit;

/// Version of the file's format.
const FORMAT: u32 = 1;

/// What a step found.
pub enum Found {
    /// It holds; what was seen.
    Passed(Value),
    /// It could not be tried, and why.
    Skipped(String),
}

struct Step {
    name: String,
    verdict: Result<Found>,
    seconds: f64,
}

/// The report of one run. It is in its file from the beginning, and up to date before and after each step: a
/// host on which this runs for the first time may go down.
pub struct Report {
    file: PathBuf,
    /// The step that is being done.
    current: Option<String>,
    complete: bool,
    rehearsal: bool,
    refused: Option<String>,
    cvmm: Option<String>,
    notes: Vec<String>,
    diagnosis: Value,
    steps: Vec<Step>,
    /// Consoles, messages, attestation reports in hexadecimal, by name.
    evidence: Map<String, Value>,
    kernel_log: Option<Vec<String>>,
}

impl Report {
    /// A report of nothing yet, which will be in `file`.
    pub fn new(kit: &Kit, diagnosis: Value, file: PathBuf) -> Self {
        Report {
            file,
            current: None,
            complete: false,
            rehearsal: kit.rehearsal,
            refused: None,
            cvmm: kit.version(),
            notes: Vec::new(),
            diagnosis,
            steps: Vec::new(),
            evidence: Map::new(),
            kernel_log: None,
        }
    }

    /// Nothing was tried.
    pub fn refused(&mut self, why: &str) {
        self.refused = Some(why.to_owned());
    }

    /// Something to know about every step.
    pub fn note(&mut self, text: impl Into<String>) {
        self.notes.push(text.into());
    }

    /// What doctor found KVM to answer about a capability.
    pub fn capability(&self, name: &str) -> Option<u64> {
        self.diagnosis["facts"]["kvm"]["Ok"]["capabilities"][name].as_u64()
    }

    /// Keeps a text.
    pub fn keep(&mut self, name: &str, text: String) {
        self.evidence.insert(name.to_owned(), Value::String(text));
    }

    /// Keeps the kernel's log lines.
    pub fn kernel_log(&mut self, lines: Option<Vec<String>>) {
        self.kernel_log = lines;
    }

    /// Notes that a step begins.
    pub fn begins(&mut self, name: &str) {
        self.current = Some(name.to_owned());
        self.save();
    }

    /// Notes how a step ended.
    pub fn step(&mut self, name: &str, seconds: f64, verdict: Result<Found>) {
        self.current = None;
        self.steps.push(Step { name: name.to_owned(), verdict, seconds });
        self.save();
    }

    /// Notes that nothing more will come, and writes the file for the last time.
    pub fn ends(&mut self) -> Result<()> {
        self.complete = true;
        self.write()
    }

    fn save(&self) {
        if let Err(error) = self.write() {
            eprintln!("warning: {error:#}");
        }
    }

    /// Whether a step failed.
    pub fn failed(&self) -> bool {
        self.steps.iter().any(|step| step.verdict.is_err())
    }

    fn json(&self) -> Value {
        let steps: Vec<Value> = self
            .steps
            .iter()
            .map(|step| {
                let (state, detail) = state(&step.verdict);
                json!({ "step": step.name, "state": state, "seconds": step.seconds, "detail": detail })
            })
            .collect();
        json!({
            "format": FORMAT,
            "cvmm": self.cvmm,
            "rehearsal": self.rehearsal,
            "refused": self.refused,
            "failed": self.failed(),
            "complete": self.complete,
            "in_progress": self.current,
            "notes": self.notes,
            "steps": steps,
            "kernel_log": self.kernel_log,
            "evidence": self.evidence,
            "doctor": self.diagnosis,
        })
    }

    /// Writes the file anew, whole or not at all.
    pub fn write(&self) -> Result<()> {
        let mut part = self.file.clone().into_os_string();
        part.push(".part");
        let text = serde_json::to_string_pretty(&self.json())? + "\n";
        let save = || {
            let mut file = File::create(&part)?;
            file.write_all(text.as_bytes())?;
            file.sync_all()?;
            fs::rename(&part, &self.file)
        };
        save().with_context(|| format!("cannot write {}", self.file.display()))
    }
}

fn state(verdict: &Result<Found>) -> (&'static str, Value) {
    match verdict {
        Ok(Found::Passed(value)) => ("passed", value.clone()),
        Ok(Found::Skipped(why)) => ("skipped", json!(why)),
        Err(error) => ("FAILED", json!(format!("{error:#}"))),
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let title = match self.rehearsal {
            true => "REHEARSAL on the emulated platform: says nothing about this host's SNP",
            false => "cvmm hardware acceptance",
        };
        let facts = &self.diagnosis["facts"];
        let text = |value: &Value| value.as_str().unwrap_or("unknown").to_owned();
        writeln!(f, "{title}")?;
        writeln!(f, "host: {}, Linux {}", text(&facts["cpu_model"]), text(&facts["kernel"]))?;
        for note in &self.notes {
            writeln!(f, "note: {note}")?;
        }
        for step in &self.steps {
            let (state, detail) = state(&step.verdict);
            let detail = detail.as_str().map_or_else(|| detail.to_string(), str::to_owned);
            writeln!(f, "{state:8} {:18} {:7.1} s  {detail}", step.name, step.seconds)?;
        }
        match &self.kernel_log {
            None => writeln!(f, "kernel log: not readable; run as root to have it in the report"),
            Some(lines) => writeln!(f, "kernel log: {} lines about SEV and KVM meanwhile", lines.len()),
        }
    }
}
