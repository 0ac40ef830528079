// SPDX-License-Identifier: Apache-2.0
//! `cvmm doctor` agrees with what the launch does on the same machine, and the acceptance test refuses
//! machines without SNP.

use std::path::Path;

use anyhow::Context as _;
use anyhow::Result;
use anyhow::ensure;
use guest_init::job::Ending;
use serde_json::Value;

use crate::machine::job;
use crate::probe::Place;
use crate::suite::Case;
use crate::suite::Context;
use crate::suite::Verdict;

/// `cvmm doctor`: only the emulated platform.
const EMULATION_ONLY: i32 = 10;
/// `cargo xtask hardware-test`: refused.
const REFUSED: i32 = 3;

/// The cases of this file.
pub fn cases() -> Vec<Case> {
    vec![
        Case::new("doctor/knows-a-machine-that-emulates", |context| {
            // The machine that runs this suite's emulated guests; L1's kernel has no SNP, and a host with it
            // is not tested here.
            let mut doctor = job(&context.cvmm);
            doctor.argv.extend(["doctor".into(), "--json".into()]);
            let output = context.run(&doctor)?;
            let diagnosis: Value = serde_json::from_slice(&output.stdout).context("JSON of cvmm doctor")?;
            let has_snp = context.decision().place == Place::Host && Path::new("/dev/sev").exists();
            let expected = if has_snp { 0 } else { EMULATION_ONLY };
            ensure!(output.ending == Ending::Code(expected), "doctor ended with {}", output.ending);
            ensure!(diagnosis["exit_code"] == expected, "its JSON says {}", diagnosis["exit_code"]);
            Ok(())
        }),
        Case::with_verdict("doctor/hardware-test-refuses", |context| {
            if Path::new("/dev/sev").exists() {
                return Ok(Verdict::Skipped("this host has /dev/sev".into()));
            }
            hardware_test_refuses(context).map(|()| Verdict::Passed)
        }),
    ]
}

fn hardware_test_refuses(context: &Context) -> Result<()> {
    // The suite is a chore of xtask, so this program is xtask.
    let mut test = job(std::env::current_exe().context("this program")?);
    test.argv.push("hardware-test".into());
    test.argv.extend(["--cvmm".into(), context.cvmm.display().to_string()]);
    let output = context.run_on_host(&test);
    ensure!(output.ending == Ending::Code(REFUSED), "it ended with {}", output.ending);
    for part in ["refuses to run", "SNP guests cannot be launched on this host", "missing: CPU with SEV-SNP"]
    {
        ensure!(output.errors().contains(part), "it does not say {part:?}");
    }
    Ok(())
}
