// SPDX-License-Identifier: Apache-2.0
//! What the kernel log says about SNP: which lines are kept, which of them are complaints, and what each one
//! asks for.
//!
//! Words are those of Linux 6.12 and 7.3: `arch/x86/virt/svm/sev.c` ("SEV-SNP: ", the RMP),
//! `drivers/iommu/amd/init.c` (`iommu_snp_enable`, "AMD-Vi: SNP: "), `drivers/crypto/ccp/sev-dev.c` ("ccp
//! ADDRESS: "), `arch/x86/kvm/svm/sev.c` ("kvm_amd: SEV"). A log on a good host has lines too, so a line
//! counts as a complaint only by its words. The state of SEV and SEV-ES guests ("SEV-ES unusable") says
//! nothing about SNP guests.

use super::facts::Facts;
use super::line::Check;

/// What lines have in them that complain.
const COMPLAINTS: [&str; 9] = [
    "fail",
    "Fail",
    "not been reserved",
    "does not cover",
    "not valid",
    "Invalid",
    "not within",
    "cannot be supported",
    "already exists",
];
/// What the kernel says of an RMP that it has found: one table, or segments of it as on Turin, which have no
/// line of the first kind.
const RMP_FOUND: [&str; 3] = ["RMP table physical range", "Segmented RMP", "RMP segment "];
/// What the IOMMU's code says when the RMP's has already said why.
const ECHO: &str = "RMP initialization failed";

/// The last complaint among the lines that `about` chooses.
fn complaint(facts: &Facts, about: impl Fn(&str) -> bool) -> Option<&str> {
    let lines = facts.kernel_log.as_deref()?;
    let complains = |line: &str| COMPLAINTS.iter().any(|word| line.contains(word));
    lines.iter().rev().map(String::as_str).find(|line| about(line) && complains(line))
}

fn of_rmp(line: &str) -> bool {
    line.contains("SEV-SNP: ") && !of_firmware(line)
}

fn of_iommu(line: &str) -> bool {
    line.contains("AMD-Vi: SNP: ") && !line.contains(ECHO)
}

fn of_firmware(line: &str) -> bool {
    line.contains("ccp ")
}

/// The reverse map table: the firmware knows, and the kernel's log says why it is not there.
pub fn rmp(facts: &Facts) -> Check {
    const BIOS: &str =
        "In the BIOS, enable SEV-SNP and the RMP table for all of the memory (SNP Memory Coverage)";
    let line = |ok, found: String, fix: &str| {
        let needed = "reserved by the BIOS for all RAM, and initialised";
        Check::explaining(("rmp", "RMP table"), ok, found, needed, fix)
    };
    let logged = |text: &str| format!("the kernel logged: {text}");
    if matches!(&facts.firmware, Some(Ok(status)) if status.rmp_initialized) {
        return line(true, "initialised".into(), "");
    }
    if let Some(said) = complaint(facts, of_rmp) {
        let fix = match said {
            said if said.contains("not all CPUs online") => {
                "Boot with all CPUs online: without maxcpus= and nosmt, and with none switched off before kvm_amd is loaded"
            }
            said if said.contains("Failed to map") => {
                "The kernel found no address space for the RMP: update it"
            }
            _ => BIOS,
        };
        return line(false, logged(said), fix);
    }
    if let Some(said) = complaint(facts, of_iommu) {
        return line(
            false,
            format!("not set up, because of the IOMMU: {said}"),
            "See the line about the IOMMU",
        );
    }
    if matches!(&facts.firmware, Some(Ok(_))) {
        return line(false, "the firmware says that it is not initialised".into(), BIOS);
    }
    let Some(lines) = facts.kernel_log.as_deref() else {
        let fix = "Run as root to see the kernel log's lines about it";
        return line(false, "not known: the kernel log cannot be read".into(), fix);
    };
    match (lines.iter().find(|l| RMP_FOUND.iter().any(|word| l.contains(word))), lines.last()) {
        (Some(said), _) => line(true, logged(said), ""),
        (None, None) => line(false, "the kernel logged nothing about SNP".into(), BIOS),
        (None, Some(last)) => {
            line(false, format!("not known to be there; the kernel logged last: {last}"), BIOS)
        }
    }
}

/// The IOMMU, if the kernel gave SNP up because of it.
pub fn iommu(facts: &Facts) -> Option<Check> {
    let said = complaint(facts, of_iommu)?;
    let fix = match said {
        said if said.contains("V2 page table") => "Boot without amd_iommu=pgtbl_v2",
        said if said.contains("feature not enabled") => {
            "Enable the IOMMU's SNP support in the BIOS, or update it"
        }
        said if said.contains("passthrough") => {
            "Enable the IOMMU in the BIOS; boot without iommu=off and amd_iommu=off, and without iommu=pt, which only Linux 7.x allows, \
             and only on IOMMUs with SNP page mode 0"
        }
        _ => "Enable the IOMMU in the BIOS; boot without iommu=off and amd_iommu=off",
    };
    let needed = "switched on, in a mode that SNP allows";
    Some(Check::explaining(("iommu", "IOMMU"), false, format!("the kernel logged: {said}"), needed, fix))
}

/// The firmware where it cannot be asked, if the driver complained.
pub fn firmware(facts: &Facts) -> Option<Check> {
    let said = complaint(facts, of_firmware)?;
    let found = format!("the kernel logged: {said}");
    Some(Check::explaining(
        ("firmware", "SNP firmware"),
        false,
        found,
        "initialised by the ccp driver",
        firmware_fix(facts),
    ))
}

/// What the driver's complaint asks for. Codes: SEV-SNP Firmware ABI 1.58, chapter "Status codes".
pub fn firmware_fix(facts: &Facts) -> &'static str {
    match complaint(facts, of_firmware) {
        Some(said) if said.contains("error 0x14") => {
            "The firmware cannot read the data that an older one stored (SECURE_DATA_INVALID): reset that by SEV_FACTORY_RESET through \
             /dev/sev, and reboot"
        }
        Some(said) if said.contains("INIT error 0x1,") || said.contains("INIT failed 0x1,") => {
            "The PSP's boot loader is too old for this firmware: update the BIOS (EPYC 7003: boot loader 00.13.00.70 or later)"
        }
        Some(said) if said.contains("failed to get status") => {
            "The PSP does not serve SEV commands: check that the BIOS has SEV-SNP enabled, update it, and cut the power once"
        }
        _ => "See the kernel log for lines of the ccp driver; if the PSP hangs, only a power cycle helps",
    }
}
