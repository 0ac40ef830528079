// SPDX-License-Identifier: Apache-2.0
//! Boots every kernel of a folder that somebody names: `cargo xtask test --kernels DIR`.
//!
//! The checks are those of [`super::boot`]. A kernel without the `sev-guest` driver shows no report; its
//! launch digest is compared with the prediction all the same.

use std::fs;
use std::path::Path;

use anyhow::Context as _;
use anyhow::Result;

use super::boot;
use crate::guest::Guest;
use crate::guest::Mode;
use crate::initrd;
use crate::kernels::Kernel;
use crate::suite::Case;
use crate::suite::Context;

/// How each kernel is booted.
const BOOTS: &[(&str, Mode, u32, &str)] = &[
    ("plain/2cpu", Mode::Plain, 2, "info,reboot"),
    ("snp/1cpu/split-strict", Mode::SplitStrict, 1, "info,try-report,reboot"),
    ("snp/2cpu/split-strict", Mode::SplitStrict, 2, "info,try-report,reboot"),
];

/// The cases for every kernel in `folder`.
pub fn cases(folder: &Path) -> Result<Vec<Case>> {
    let mut cases = Vec::new();
    for (index, kernel) in Kernel::all_in(folder)?.into_iter().enumerate() {
        for &(how, mode, cpus, actions) in BOOTS {
            let kernel = kernel.clone();
            let name = format!("given/{}/{how}", kernel.release);
            cases.push(Case::new(name, move |context| boot(context, &kernel, index, mode, cpus, actions)));
        }
    }
    Ok(cases)
}

fn boot(
    context: &Context,
    kernel: &Kernel,
    index: usize,
    mode: Mode,
    cpus: u32,
    actions: &'static str,
) -> Result<()> {
    // L1 sees these copies wherever the folder is, and two packages may have the same release.
    let place = context.workspace.given_kernels().join(format!("{index}-{}", kernel.release));
    fs::create_dir_all(&place).with_context(|| format!("cannot create {}", place.display()))?;
    let image = place.join("vmlinuz");
    fs::copy(&kernel.image, &image).with_context(|| format!("cannot copy {}", kernel.image.display()))?;
    let init = context.workspace.guest_program("l2-init");
    let archive = initrd::build(kernel, &init, initrd::SEV_GUEST_MODULES)?;
    let initrd = place.join("initrd.cpio");
    fs::write(&initrd, archive).with_context(|| format!("cannot write {}", initrd.display()))?;
    let report_data = if mode == Mode::Plain { String::new() } else { "5a".repeat(64) };
    let guest =
        Guest { kernel: image, initrd, memory: "512M", cpus, mode, actions, report_data, verbose: false };
    let console = boot::boots(context, &guest)?;
    if let Ok(reason) = console.get("no_report") {
        println!("     {}: no report, {reason}", kernel.release);
    }
    Ok(())
}
