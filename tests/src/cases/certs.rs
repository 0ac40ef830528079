// SPDX-License-Identifier: Apache-2.0
//! Certificates that the operator gives to guests: the guest's driver gets exactly the file's table, with a
//! report that verifies by it.

use std::fs;

use anyhow::Context as _;
use anyhow::Result;
use anyhow::ensure;
use guest_init::job::Ending;

use super::boot::REBOOTED;
use super::boot::predict;
use crate::digest::unhex;
use crate::evidence;
use crate::guest::Console;
use crate::guest::Guest;
use crate::guest::Mode;
use crate::kernels::Kernel;
use crate::kernels::Role;
use crate::machine::job;
use crate::suite::Case;
use crate::suite::Context;

/// The cases of this file.
pub fn cases() -> Vec<Case> {
    vec![Case::new("certs/guest-gets-the-table-of-the-file", table_of_file)]
}

fn table_of_file(context: &Context) -> Result<()> {
    let file = context.workspace.work().join("certs.table");
    let mut make = job(&context.cvmm);
    // The keys' file holds the platform's own certificates, root first; the platform itself would hand them
    // out in another order.
    make.argv.extend(["certs".into(), context.keys()?.display().to_string()]);
    make.argv.extend(["--out".into(), file.display().to_string()]);
    let made = context.run_on_host(&make);
    ensure!(made.ending == Ending::Code(0), "cvmm certs ended with {}", made.ending);

    let role = Role::BackportsCloud;
    let guest = Guest {
        kernel: Kernel::find(&context.workspace, role)?.image,
        initrd: context.workspace.guest_initrd(role),
        memory: "256M",
        cpus: 1,
        mode: Mode::Single,
        actions: "ext-report,reboot",
        report_data: "c3".repeat(64),
        verbose: false,
    };
    let predicted = predict(context, &guest)?;
    let mut run = guest.run_job(&context.cvmm, &context.keys()?);
    run.argv.extend(["--certs".into(), file.display().to_string()]);
    let output = context.run(&run)?;
    ensure!(output.ending == Ending::Code(REBOOTED), "{}", output.ending);
    let console = Console::parse(&output.text());
    let given = fs::read(&file).with_context(|| format!("cannot read {}", file.display()))?;
    // The guest prints its buffer without the zeros at its end.
    let end = given.iter().rposition(|b| *b != 0).map_or(0, |last| last + 1);
    let got = console.bytes("certificates")?;
    ensure!(
        Some(&got[..]) == given.get(..end),
        "the guest got {} bytes, the file has {}",
        got.len(),
        given.len()
    );
    let root = evidence::platform_root(&context.workspace)?;
    let (measurement, nonce) = (unhex(&predicted)?, unhex(&guest.report_data)?);
    evidence::verified(&console.bytes("ext_report")?, &got, root, &measurement, &nonce)?;
    Ok(())
}
