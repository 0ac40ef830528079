// SPDX-License-Identifier: Apache-2.0
//! A guest takes a CPU offline and online again.
//!
//! An SNP guest's kernel parks the CPU in a hypercall (Linux, `sev_es_play_dead` in arch/x86/coco/sev/core.c)
//! and brings it back with a new save area, as at the first start (`wakeup_cpu_via_vmgexit` there), so both
//! ways have to work more than once.

use anyhow::Result;
use anyhow::ensure;

use super::boot;
use crate::guest::Guest;
use crate::guest::Mode;
use crate::kernels::Kernel;
use crate::kernels::Role;
use crate::suite::Case;
use crate::suite::Context;
use crate::suite::Verdict;

/// The cases of this file.
pub fn cases() -> Vec<Case> {
    let case = |name: &str, role, mode| {
        Case::with_verdict(format!("hotplug/{name}"), move |context| {
            if let Some(verdict) = boot::lacks(context, role) {
                return Ok(verdict);
            }
            offline_and_online(context, role, mode).map(|()| Verdict::Passed)
        })
    };
    vec![
        case("plain/backports-cloud", Role::BackportsCloud, Mode::Plain),
        case("snp/backports-cloud/split-strict", Role::BackportsCloud, Mode::SplitStrict),
        case("snp/newest-cloud/split-strict", Role::NewestCloud, Mode::SplitStrict),
    ]
}

fn offline_and_online(context: &Context, role: Role, mode: Mode) -> Result<()> {
    let guest = Guest {
        kernel: Kernel::find(&context.workspace, role)?.image,
        initrd: context.workspace.guest_initrd(role),
        memory: "512M",
        cpus: 2,
        mode,
        actions: "info,cpu1-anew,reboot",
        report_data: String::new(),
        verbose: false,
    };
    let console = boot::boots(context, &guest)?;
    ensure!(console.all("cpu1_offline") == ["0", "0"], "offline: {:?}", console.all("cpu1_offline"));
    ensure!(console.all("cpu1_online") == ["0-1", "0-1"], "online: {:?}", console.all("cpu1_online"));
    Ok(())
}
