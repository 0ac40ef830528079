// SPDX-License-Identifier: Apache-2.0
//! Who did what to an image, and why: one line of JSON for each event, in a file beside the image's anchor
//! record.
//!
//! It is a help for operators, not a proof: whoever can write the folder can write the file. At a mebibyte it
//! becomes `.log.1`, in the place of the one before, so that it never takes more than two.

use std::fs::File;
use std::io;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::time::SystemTime;

use serde_json::json;

use super::AnchorFolder;
use super::findings::Finding;
use super::findings::sentences;
use super::mark::uuid_text;
use super::root::Root;

/// When a log is put aside.
const MOST: u64 = 1 << 20;
/// What one event may say at most of each thing.
const MOST_TEXT: usize = 2048;

/// Something that was done to an image.
#[derive(Debug)]
pub struct Event<'a> {
    /// One word: `open`, `list`, `export`, `import`, `delete`, `rekey`, `repair`, ...
    pub what: &'a str,
    /// Path of the image.
    pub file: &'a str,
    /// The image, as its root says.
    pub root: &'a Root,
    /// What was odd, and what was therefore accepted.
    pub findings: &'a [Finding],
    /// More about the event, such as a file's number.
    pub detail: &'a str,
    /// The operator's own words.
    pub reason: Option<&'a str>,
}

/// The log's path.
pub fn path(folder: &AnchorFolder, image: &[u8; 16]) -> PathBuf {
    folder.path.join(format!("{}.log", uuid_text(image)))
}

/// Appends one event.
pub fn record(folder: &AnchorFolder, event: &Event<'_>) -> io::Result<()> {
    let path = path(folder, &event.root.image);
    if std::fs::metadata(&path).is_ok_and(|m| m.len() >= MOST) {
        std::fs::rename(&path, path.with_extension("log.1"))?;
    }
    let line = json!({
        "time": now(),
        "event": event.what,
        "file": short(event.file),
        "detail": short(event.detail),
        "reason": event.reason.map(short),
        "findings": short(&sentences(event.findings).join("; ")),
        "image": uuid_text(&event.root.image),
        "vm": uuid_text(&event.root.vm),
        "generation": event.root.generation,
        "user": rustix::process::getuid().as_raw(),
        "process": std::process::id(),
        "program": std::env::args_os().next().map(|a| short(&a.to_string_lossy())),
    });
    let mut file = File::options().create(true).append(true).mode(0o600).open(&path)?;
    // One write, so that lines of two processes do not mix.
    file.write_all(format!("{line}\n").as_bytes())
}

fn short(text: &str) -> String {
    text.chars().take(MOST_TEXT).collect()
}

/// The time in UTC, as RFC 3339 has it.
fn now() -> String {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    x509_cert::der::DateTime::from_unix_duration(since).map(|t| t.to_string()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_lines_of_json_and_the_log_has_a_bound() {
        let dir = tempfile::tempdir().expect("tempdir");
        let folder = AnchorFolder { path: dir.path().into(), durability: Default::default() };
        let root = Root::new([1; 16], [2; 16]);
        let long = "x".repeat(100_000);
        let event = Event {
            what: "import",
            file: "f",
            root: &root,
            findings: &[],
            detail: &long,
            reason: Some("\n\""),
        };
        for _ in 0..1500 {
            record(&folder, &event).expect("record");
        }
        let log = path(&folder, &[1; 16]);
        let sizes =
            [log.clone(), log.with_extension("log.1")].map(|p| std::fs::metadata(p).expect("there").len());
        assert!(sizes.iter().all(|n| *n < MOST + 8192), "{sizes:?}");
        let text = std::fs::read_to_string(&log).expect("text");
        for line in text.lines() {
            let line: serde_json::Value = serde_json::from_str(line).expect("JSON");
            assert_eq!((line["event"].as_str(), line["reason"].as_str()), (Some("import"), Some("\n\"")));
            assert!(line["time"].as_str().is_some_and(|t| t.starts_with("20") && t.ends_with('Z')), "{line}");
        }
    }
}
