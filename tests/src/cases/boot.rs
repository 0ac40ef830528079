// SPDX-License-Identifier: Apache-2.0
//! Unmodified Debian kernels boot to user space, plain and as SNP guests, and an SNP guest's report carries
//! the digest that was predicted.
//!
//! Kernels are those of the stable release, of its backports, and the newest ones of later suites that the
//! archive has.
//!
//! The prediction is made on the host before the guest starts, and twice: by `cvmm measure`, and by
//! [`crate::digest`] from the plan's dump. The report comes from the guest, through the kernel's own driver.

use std::fs;
use std::path::Path;
use std::path::PathBuf;

use anyhow::Context as _;
use anyhow::Result;
use anyhow::bail;
use anyhow::ensure;
use guest_init::job::Ending;
use snp::image::kernel;
use snp_model::patch::decompress;

use crate::digest;
use crate::digest::hex;
use crate::digest::unhex;
use crate::evidence;
use crate::guest::Console;
use crate::guest::Guest;
use crate::guest::Mode;
use crate::guest::Report;
use crate::kernels::Kernel;
use crate::kernels::Role;
use crate::statistics::launch_pages;
use crate::suite::Case;
use crate::suite::Context;
use crate::suite::Verdict;

/// cvmm's exit code for a guest that asked for a reset.
pub const REBOOTED: i32 = 3;

/// Most pages of a launch, VMSAs aside, whatever kernel, initrd and memory.
pub const MEASURED_PAGES: u64 = 12;

/// What Linux logs as an SNP guest (arch/x86/mm/mem_encrypt.c).
pub const SNP_LOG_LINE: &str = "Memory Encryption Features active: AMD SEV SEV-ES SEV-SNP";

/// Which image of a kernel package.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Image {
    /// As packaged; relocates itself to a random address.
    BzImage,
    /// The ELF file inside it.
    Vmlinux,
}

/// The cases of this file.
pub fn cases() -> Vec<Case> {
    use Image::BzImage;
    use Image::Vmlinux;
    use Mode::Plain;
    use Mode::Single;
    use Mode::SplitStrict;
    let table: &[(Role, Image, u32, &'static str, Mode, &'static str)] = &[
        (Role::BackportsCloud, BzImage, 1, "256M", Plain, "info,reboot"),
        (Role::BackportsCloud, Vmlinux, 2, "512M", Plain, "info,reboot"),
        (Role::BackportsCloud, BzImage, 4, "4608M", Plain, "info,memory,reboot"),
        (Role::StableCloud, BzImage, 2, "512M", Plain, "info,reboot"),
        (Role::BackportsCloud, BzImage, 1, "256M", Single, "info,report,reboot"),
        (Role::BackportsCloud, BzImage, 1, "512M", SplitStrict, "info,report,reboot"),
        (Role::BackportsCloud, BzImage, 2, "512M", SplitStrict, "info,report,ext-report,key,memory,reboot"),
        (Role::BackportsCloud, Vmlinux, 2, "512M", SplitStrict, "info,report,reboot"),
        (Role::BackportsCloud, BzImage, 4, "4608M", SplitStrict, "info,report,memory,reboot"),
        // Debian's 6.1 cloud kernel has no sev-guest driver, so the generic one shows the report.
        (Role::StableCloud, BzImage, 2, "256M", SplitStrict, "info,reboot"),
        (Role::StableGeneric, BzImage, 1, "512M", SplitStrict, "info,report,reboot"),
        (Role::StableGeneric, BzImage, 2, "512M", SplitStrict, "info,report,reboot"),
        (Role::NewestCloud, BzImage, 2, "512M", Plain, "info,reboot"),
        (Role::NewestCloud, BzImage, 1, "512M", SplitStrict, "info,report,reboot"),
        (Role::NewestCloud, BzImage, 2, "512M", SplitStrict, "info,report,ext-report,key,memory,reboot"),
        (Role::NewerCloud, BzImage, 1, "512M", SplitStrict, "info,report,reboot"),
        (Role::NewerCloud, BzImage, 2, "512M", SplitStrict, "info,report,reboot"),
    ];
    table
        .iter()
        .map(|&(role, image, cpus, memory, mode, actions)| {
            let (kind, mode_name) = match mode {
                Plain => ("plain", ""),
                Single => ("snp", "/single"),
                SplitStrict => ("snp", "/split-strict"),
            };
            let file = if image == BzImage { "bzimage" } else { "vmlinux" };
            let name = format!("boot/{kind}/{}/{file}/{cpus}cpu/{memory}{mode_name}", role.name());
            Case::with_verdict(name, move |context| {
                if let Some(verdict) = lacks(context, role) {
                    return Ok(verdict);
                }
                let guest = Guest {
                    kernel: kernel_file(context, role, image)?,
                    initrd: context.workspace.guest_initrd(role),
                    memory,
                    cpus,
                    mode,
                    actions,
                    report_data: if actions.contains("report") { "5a".repeat(64) } else { String::new() },
                    verbose: false,
                };
                boots(context, &guest).map(|_| Verdict::Passed)
            })
        })
        .collect()
}

/// Says that a kernel of later suites is not there; the others have to be.
pub fn lacks(context: &Context, role: Role) -> Option<Verdict> {
    let error = Kernel::find(&context.workspace, role).err()?;
    Role::LATER.contains(&role).then(|| Verdict::Skipped(format!("{error:#}")))
}

fn kernel_file(context: &Context, role: Role, image: Image) -> Result<PathBuf> {
    let kernel = Kernel::find(&context.workspace, role)?;
    match image {
        Image::BzImage => Ok(kernel.image),
        Image::Vmlinux => {
            let path = context.workspace.work().join(format!("vmlinux-{}", kernel.release));
            if !path.exists() {
                fs::write(&path, extract(&kernel.image)?)?;
            }
            Ok(path)
        }
    }
}

/// Boots `guest` where `context` runs guests, and checks what it says about itself and, for SNP, about its
/// launch.
pub fn boots(context: &Context, guest: &Guest) -> Result<Console> {
    let predicted = match guest.mode {
        Mode::Plain => None,
        Mode::Single | Mode::SplitStrict => Some(predict(context, guest)?),
    };
    let output = context.run(&guest.run_job(&context.cvmm, &context.keys()?))?;
    ensure!(output.ending == Ending::Code(REBOOTED), "the run ended with {}", output.ending);
    let console = Console::parse(&output.text());
    ensure!(console.all("error").is_empty(), "the guest complains: {:?}", console.all("error"));

    let online = if guest.cpus == 1 { "0".into() } else { format!("0-{}", guest.cpus - 1) };
    ensure!(console.get("cpus")? == online, "online CPUs are {}, not {online}", console.get("cpus")?);
    let memory: u64 = console.get("memory_kib")?.parse().context("memory_kib")?;
    let given: u64 = guest.memory.trim_end_matches('M').parse::<u64>()? << 10;
    // The kernel keeps some for itself: 64 MiB of bounce buffers (6 % of memory under SNP) and its image.
    ensure!((given / 2..given).contains(&memory), "{memory} KiB of memory of {given} KiB given");

    match predicted {
        None => {
            ensure!(console.all("log").is_empty(), "a plain guest says: {:?}", console.all("log"));
            Ok(console)
        }
        Some(predicted) => {
            let log = console.get("log")?;
            ensure!(log.contains(SNP_LOG_LINE), "the guest's log says {log:?}, not {SNP_LOG_LINE:?}");
            let announced = format!("launch digest {predicted}");
            ensure!(output.errors().contains(&announced), "cvmm did not announce {announced}");
            let pages = launch_pages(&output.errors())?;
            ensure!(pages <= MEASURED_PAGES + u64::from(guest.cpus), "the launch takes {pages} pages");
            for action in guest.actions.split(',') {
                match action {
                    "report" => check_report(&console, "report", guest, &predicted)?,
                    "try-report" if console.get("no_report").is_ok() => {}
                    "try-report" => check_report(&console, "report", guest, &predicted)?,
                    "ext-report" => {
                        check_report(&console, "ext_report", guest, &predicted)?;
                        check_signature(context, &console, guest, &predicted)?;
                    }
                    "key" => {
                        ensure!(console.bytes("key")?.iter().any(|&b| b != 0), "the derived key is zero")
                    }
                    _ => {}
                }
            }
            Ok(console)
        }
    }
}

fn check_report(console: &Console, key: &str, guest: &Guest, predicted: &str) -> Result<()> {
    let bytes = console.bytes(key)?;
    ensure!(bytes.len() == 0x4a0, "a report of {} bytes", bytes.len());
    let report = Report(&bytes);
    let measurement = hex(report.measurement().context("measurement")?);
    ensure!(measurement == predicted, "the report's measurement is {measurement}, predicted was {predicted}");
    let data = hex(report.report_data().context("report data")?);
    ensure!(data == guest.report_data, "the report carries {data}, not {}", guest.report_data);
    Ok(())
}

/// The report holds against the platform's root, and against no other.
fn check_signature(context: &Context, console: &Console, guest: &Guest, predicted: &str) -> Result<()> {
    let (report, table) = (console.bytes("ext_report")?, console.bytes("certificates")?);
    let (measurement, nonce) = (unhex(predicted)?, unhex(&guest.report_data)?);
    let root = evidence::platform_root(&context.workspace)?;
    evidence::verified(&report, &table, root.clone(), &measurement, &nonce)?;
    let by_default = evidence::check(&report, &table, None, &measurement, &nonce)?;
    ensure!(!by_default.verified, "a verifier that trusts AMD's roots accepts an emulated report");
    let mut forged = report;
    forged[0x90] ^= 1;
    let verdict = evidence::check(&forged, &table, Some(root), &measurement, &nonce)?;
    ensure!(!verdict.verified, "a report with another measurement under the same signature is accepted");
    Ok(())
}

/// The digest that the launch must have, predicted by two programs that agree.
pub fn predict(context: &Context, guest: &Guest) -> Result<String> {
    let dump = context.workspace.work().join("plan.jsonl");
    let mut job = guest.measure_job(&context.cvmm);
    job.argv.extend(["--dump".into(), dump.display().to_string()]);
    let output = context.run_on_host(&job);
    ensure!(output.ending == Ending::Code(0), "cvmm measure ended with {}", output.ending);
    let measured = output.text().trim().to_string();
    let lines = fs::read(&dump).with_context(|| format!("cannot read {}", dump.display()))?;
    let contents = context.workspace.work().join("plan.jsonl.contents");
    let bytes = fs::read(&contents).with_context(|| format!("cannot read {}", contents.display()))?;
    let independent = digest::of_dump(lines.as_slice(), &bytes)?;
    fs::remove_file(&contents).context("cannot remove the dump")?;
    if measured != independent {
        bail!("cvmm measure says {measured}, the firmware's rule over its dump gives {independent}");
    }
    Ok(measured)
}

/// The ELF file inside a bzImage.
fn extract(image: &Path) -> Result<Vec<u8>> {
    let bytes = fs::read(image).with_context(|| format!("cannot read {}", image.display()))?;
    match kernel::Kernel::parse(bytes).context("the kernel package's image")? {
        kernel::Kernel::BzImage(image) => decompress::extract_vmlinux(&image).context("the kernel inside"),
        kernel::Kernel::Elf(_) => bail!("{} is no bzImage", image.display()),
    }
}
