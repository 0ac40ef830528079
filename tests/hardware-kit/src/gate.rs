// SPDX-License-Identifier: Apache-2.0
//! Whether there is anything to test: `cvmm doctor` decides, so that an emulated run cannot be taken for an
//! acceptance.

use std::time::Duration;

use anyhow::Context as _;
use anyhow::Result;
use guest_init::job::Ending;
use serde_json::Value;

use crate::program::Program;

/// Longest time for `cvmm doctor`.
const LIMIT: Duration = Duration::from_secs(120);

/// What the gate says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Gate {
    /// Guests can be launched.
    Open {
        /// The firmware refuses values of the CPUID page and takes its own: every launch needs
        /// `--accept-cpuid`.
        accept_cpuid: bool,
    },
    /// They cannot, and why.
    Closed(String),
}

/// Asks doctor; returns its JSON as well.
pub fn ask(cvmm: &Program, rehearsal: bool) -> Result<(Gate, Value)> {
    let output = cvmm.run(&["doctor", "--json"], LIMIT);
    let diagnosis: Value = serde_json::from_slice(&output.stdout).with_context(|| {
        format!(
            "{} doctor ended with {} and printed no JSON: {}",
            cvmm.path().display(),
            output.ending,
            output.errors()
        )
    })?;
    Ok((judge(&output.ending, &diagnosis, rehearsal), diagnosis))
}

/// What doctor's answer means here.
fn judge(ending: &Ending, diagnosis: &Value, rehearsal: bool) -> Gate {
    let verdict = diagnosis["verdict"].as_str().unwrap_or("nothing");
    if rehearsal {
        return match (ending, verdict) {
            (Ending::Code(0 | 10), "snp" | "emulation") => Gate::Open { accept_cpuid: false },
            _ => {
                Gate::Closed(format!("not even emulated guests run here. {}", words(diagnosis, "emulation")))
            }
        };
    }
    let device = &diagnosis["facts"]["sev_device"];
    match (ending, verdict) {
        (Ending::Code(0), "snp") if device == "Granted" => Gate::Open { accept_cpuid: false },
        (Ending::Code(0), "snp") => Gate::Closed(format!("doctor says yes, but /dev/sev is {device}")),
        (Ending::Code(10 | 11), _) if only_cpuid_is_refused(diagnosis) => Gate::Open { accept_cpuid: true },
        (Ending::Code(10 | 11), "emulation" | "neither") => Gate::Closed(words(diagnosis, "snp")),
        (ending, other) => Gate::Closed(format!("doctor says {other:?} and ended with {ending}")),
    }
}

/// Everything is there, but the firmware wants its own CPUID values, which `--accept-cpuid` gives it.
fn only_cpuid_is_refused(diagnosis: &Value) -> bool {
    let missing = missing(diagnosis, "snp");
    let cpuid = &diagnosis["facts"]["snp_trial"]["Failed"]["cpuid"];
    missing.iter().all(|check| check["id"] == "launch-trial")
        && cpuid["acceptable"] == true
        && cpuid["again"].get("Ok").is_some()
}

fn missing<'a>(diagnosis: &'a Value, area: &str) -> Vec<&'a Value> {
    let checks = diagnosis["checks"].as_array().map_or(&[][..], Vec::as_slice);
    checks.iter().filter(|c| c["area"] == area && c["status"] == "missing" && c["decides"] == true).collect()
}

/// The summary, then each missing thing with what can be done.
fn words(diagnosis: &Value, area: &str) -> String {
    let mut text = diagnosis["summary"].as_str().unwrap_or("cvmm doctor gives no reason").to_owned();
    for check in missing(diagnosis, area) {
        let part = |name: &str| check[name].as_str().unwrap_or_default().to_owned();
        text += &format!("\n  missing: {}: {}. {}", part("what"), part("found"), part("fix"));
    }
    text
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn says(verdict: &str) -> Value {
        json!({ "verdict": verdict, "summary": "because", "facts": { "sev_device": "Granted" } })
    }

    #[test]
    fn only_a_host_that_launches_snp_guests_passes() {
        let open = Gate::Open { accept_cpuid: false };
        assert_eq!(judge(&Ending::Code(0), &says("snp"), false), open);
        for (code, verdict) in [(10, "snp"), (10, "emulation"), (11, "neither"), (0, ""), (0, "emulation")] {
            let gate = judge(&Ending::Code(code), &says(verdict), false);
            assert!(matches!(gate, Gate::Closed(_)), "{code} {verdict}");
        }
        let mut no_device = says("snp");
        no_device["facts"]["sev_device"] = json!("Absent");
        assert!(matches!(judge(&Ending::Code(0), &no_device, false), Gate::Closed(_)));
        assert!(matches!(judge(&Ending::Code(0), &Value::Null, false), Gate::Closed(_)));
    }

    #[test]
    fn a_rehearsal_needs_the_emulated_platform() {
        let open = Gate::Open { accept_cpuid: false };
        assert_eq!(judge(&Ending::Code(10), &says("emulation"), true), open);
        assert_eq!(judge(&Ending::Code(0), &says("snp"), true), open);
        assert!(matches!(judge(&Ending::Code(11), &says("neither"), true), Gate::Closed(_)));
    }

    #[test]
    fn a_refusal_has_doctors_words() {
        let mut diagnosis = says("emulation");
        diagnosis["checks"] = json!([
            { "area": "snp", "what": "/dev/sev", "found": "does not exist", "fix": "Load the ccp module",
              "status": "missing", "decides": true },
            { "area": "snp", "what": "RMP table", "found": "x", "fix": "y", "status": "missing", "decides": false },
        ]);
        let Gate::Closed(why) = judge(&Ending::Code(10), &diagnosis, false) else { panic!("open") };
        assert_eq!(why, "because\n  missing: /dev/sev: does not exist. Load the ccp module");
    }

    /// The most precious host is the one whose firmware refuses something.
    #[test]
    fn a_host_that_only_wants_its_own_cpuid_values_is_tested_with_them() {
        let mut diagnosis = says("emulation");
        diagnosis["checks"] = json!([
            { "id": "launch-trial", "area": "snp", "status": "missing", "decides": true },
        ]);
        let failed = |acceptable: bool, again: Value| {
            let mut diagnosis = diagnosis.clone();
            let cpuid = json!({ "acceptable": acceptable, "again": again });
            diagnosis["facts"]["snp_trial"] = json!({ "Failed": { "cpuid": cpuid } });
            judge(&Ending::Code(10), &diagnosis, false)
        };
        assert_eq!(failed(true, json!({ "Ok": null })), Gate::Open { accept_cpuid: true });
        for (acceptable, again) in
            [(false, json!({ "Ok": null })), (true, json!({ "Err": "refused" })), (true, Value::Null)]
        {
            assert!(matches!(failed(acceptable, again), Gate::Closed(_)));
        }
    }
}
