// SPDX-License-Identifier: Apache-2.0
//! Runs one parser on changed copies of valid inputs until its time is over.
//!
//! Nothing here follows which code a case reaches. Instead every seed is a valid input, most cases change
//! only a few bytes where the format's fields are, and `repair` makes checksums right again; the line that
//! each target prints says how many cases were accepted, so it can be seen that the changes get behind the
//! first check.
//!
//! The whole process has an address space of [`MEMORY`]: a parser that believes a length of some gigabytes
//! dies. The input of the case that runs lies in `target/cvmm/fuzz/TARGET.input`, so that it is there after
//! an abort as well.

use std::fs::File;
use std::io::Write as _;
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::Once;
use std::time::Duration;
use std::time::Instant;

use cvmm_tests::workspace::Workspace;
use rustix::process::Resource;
use rustix::process::Rlimit;

use crate::mutate::Rng;
use crate::mutate::mutate;

/// Address space of the process.
const MEMORY: u64 = 2 << 30;
/// The seed unless `CVMM_FUZZ_SEED` says otherwise: a change is judged by the cases that the one before it
/// passed.
const SEED: u64 = 1;
/// Of so many refusals one may say neither place nor expectation: a text that nobody foresaw is a flaw, not a
/// failure.
const UNCLEAR_ONE_IN: u64 = 1000;
/// Seconds for each target unless `CVMM_FUZZ_SECONDS` says otherwise.
const SECONDS: f64 = 0.3;
/// No parser of a few kilobytes may take longer; a busy machine has to fit in.
const LONGEST_CASE: Duration = Duration::from_secs(20);
/// A refusal is a message for a person.
const LONGEST_TEXT: usize = 16 << 10;

/// A valid input, and where in it a change matters.
pub struct Seed {
    /// The input.
    pub bytes: Vec<u8>,
    /// Where three of four changes go.
    pub fields: Vec<Range<usize>>,
}

impl Seed {
    /// An input that is all fields.
    pub fn new(bytes: impl Into<Vec<u8>>) -> Self {
        Seed { bytes: bytes.into(), fields: Vec::new() }
    }

    /// An input with its fields in `fields`.
    pub fn with_fields(bytes: impl Into<Vec<u8>>, fields: impl Into<Vec<Range<usize>>>) -> Self {
        Seed { bytes: bytes.into(), fields: fields.into() }
    }
}

/// A parser under test.
pub struct Target<'a> {
    /// For messages and file names.
    pub name: &'static str,
    /// Valid inputs; each is tried unchanged first and must be accepted.
    pub seeds: Vec<Seed>,
    /// Makes checksums right after a change; called for seven of eight cases.
    pub repair: fn(&mut [u8]),
    /// Reads the input, and uses what it read; a refusal's text is the error.
    pub parse: &'a dyn Fn(&[u8]) -> Result<(), String>,
    /// Every refusal's text has one of these; empty if anything that is not empty will do.
    pub says: &'a [&'a str],
}

/// For formats without checksum.
pub fn no_repair(_: &mut [u8]) {}

/// The number in a variable of the environment, decimal.
fn setting<T: std::str::FromStr>(name: &str) -> Option<T> {
    let text = std::env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{name}={text}: expected a number")))
}

fn limit_memory() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let limit =
            Rlimit { current: Some(MEMORY), maximum: rustix::process::getrlimit(Resource::As).maximum };
        rustix::process::setrlimit(Resource::As, limit).expect("RLIMIT_AS");
    });
}

/// Ends the process when one case lasts forever. The target stops it by dropping its handle.
struct Watchdog(Arc<Mutex<Instant>>);

impl Watchdog {
    fn start(name: &'static str) -> Self {
        let began = Arc::new(Mutex::new(Instant::now()));
        let watched = Arc::downgrade(&began);
        std::thread::spawn(move || {
            loop {
                std::thread::sleep(Duration::from_secs(1));
                let Some(began) = watched.upgrade() else { return };
                if began.lock().expect("clock").elapsed() > 3 * LONGEST_CASE {
                    say(&format!("fuzz {name}: FAILED: one case does not end; its input is {name}.input"));
                    std::process::abort();
                }
            }
        });
        Watchdog(began)
    }
}

/// A line on standard error that `cargo test` does not withhold when the test passes.
fn say(line: &str) {
    let _ = std::io::stderr().write_all(format!("{line}\n").as_bytes());
}

/// What the cases did.
#[derive(Default)]
struct Counts {
    cases: u64,
    accepted: u64,
    unclear: u64,
    longest: Duration,
}

impl Target<'_> {
    /// Runs the target.
    pub fn run(&self) {
        limit_memory();
        if let Ok(file) = std::env::var("CVMM_FUZZ_INPUT") {
            let input = std::fs::read(Workspace::find().root().join(&file))
                .unwrap_or_else(|e| panic!("CVMM_FUZZ_INPUT={file}: {e}"));
            let answer = (self.parse)(&input);
            say(&format!("fuzz {}: {file}: {answer:?}", self.name));
            return;
        }
        let seconds = Duration::from_secs_f64(setting("CVMM_FUZZ_SECONDS").unwrap_or(SECONDS));
        let seed = setting("CVMM_FUZZ_SEED").unwrap_or(SEED);
        let folder = Workspace::find().work().join("fuzz");
        std::fs::create_dir_all(&folder).expect("target/cvmm/fuzz");
        let current = folder.join(format!("{}.input", self.name));
        let file = File::create(&current).expect("file of the current input");
        let watchdog = Watchdog::start(self.name);
        let mut counts = Counts::default();
        let begin = Instant::now();
        let mut case = 0;
        while case < self.seeds.len() as u64 || begin.elapsed() < seconds {
            let input = self.input(seed, case);
            file.set_len(input.len() as u64).expect("length of the current input");
            file.write_all_at(&input, 0).expect("current input");
            let at = Instant::now();
            *watchdog.0.lock().expect("clock") = at;
            let answer = std::panic::catch_unwind(AssertUnwindSafe(|| (self.parse)(&input)));
            counts.longest = counts.longest.max(at.elapsed());
            let wrong = match &answer {
                Err(_) => Some("a panic".into()),
                Ok(Err(text)) if case < self.seeds.len() as u64 => {
                    Some(format!("a valid input is refused: {text}"))
                }
                Ok(Err(text)) => self.complaint(text),
                Ok(Ok(())) => None,
            };
            if let Some(wrong) = wrong.or_else(|| (at.elapsed() > LONGEST_CASE).then(|| "too long".into())) {
                let kept = folder.join(format!("{}-{seed}-{case}.bin", self.name));
                std::fs::rename(&current, &kept).expect("keep the input");
                panic!("{}: seed {seed}, case {case}: {wrong}; the input is {}", self.name, kept.display());
            }
            if case >= self.seeds.len() as u64 {
                counts.cases += 1;
                counts.accepted += u64::from(matches!(answer, Ok(Ok(()))));
                if let Ok(Err(text)) = &answer
                    && !self.is_clear(text)
                {
                    counts.unclear += 1;
                    say(&format!("fuzz {}: seed {seed}, case {case}: unclear: {text}", self.name));
                }
            }
            case += 1;
        }
        let _ = std::fs::remove_file(&current);
        let refused = counts.cases - counts.accepted;
        say(&format!(
            "fuzz {:18} {:8} cases in {:5.1} s: {:8} accepted, {:8} refused; longest {:6.1} ms; seed {seed}",
            self.name,
            counts.cases,
            begin.elapsed().as_secs_f64(),
            counts.accepted,
            refused,
            counts.longest.as_secs_f64() * 1e3,
        ));
        assert!(
            counts.unclear <= 1 + refused / UNCLEAR_ONE_IN,
            "{}: {} of {refused} refusals say neither place nor expectation",
            self.name,
            counts.unclear,
        );
        // Nothing accepted means that no change got behind the first check.
        assert!(counts.cases < 2000 || counts.accepted > 0, "{}: no changed input was accepted", self.name);
    }

    /// The input of a case: the seeds unchanged, then changed ones.
    fn input(&self, seed: u64, case: u64) -> Vec<u8> {
        if let Some(seed) = self.seeds.get(case as usize) {
            return seed.bytes.clone();
        }
        let name = self.name.bytes().fold(0u64, |hash, b| hash.wrapping_mul(0x100_0000_01b3) ^ u64::from(b));
        let mut rng = Rng::new(seed ^ name.rotate_left(32) ^ case.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        let from = rng.below(self.seeds.len());
        let other = rng.below(self.seeds.len());
        let mut input = self.seeds[from].bytes.clone();
        mutate(&mut rng, &mut input, &self.seeds[from].fields, &self.seeds[other].bytes);
        if !rng.one_in(8) {
            (self.repair)(&mut input);
        }
        input
    }

    /// What is wrong with the text of a refusal.
    fn complaint(&self, text: &str) -> Option<String> {
        if text.is_empty() || text.len() > LONGEST_TEXT {
            return Some(format!("a refusal of {} bytes: {text:.200}", text.len()));
        }
        if let Some(c) = text.chars().find(|c| c.is_control() && *c != '\n') {
            return Some(format!("a refusal with the control character {c:?} of the input: {text:?}"));
        }
        None
    }

    /// Whether a refusal says where, or what was expected.
    fn is_clear(&self, text: &str) -> bool {
        self.says.is_empty() || self.says.iter().any(|part| text.contains(part))
    }
}

#[test]
fn the_address_space_is_bounded() {
    limit_memory();
    let refused = Vec::<u8>::new().try_reserve_exact(MEMORY as usize).is_err();
    assert!(refused, "an allocation of {MEMORY:#x} bytes succeeds");
}
