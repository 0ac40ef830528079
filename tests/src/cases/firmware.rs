// SPDX-License-Identifier: Apache-2.0
//! IGVM files and OVMF as SNP guests: `cvmm --igvm` and `cvmm --firmware` launch what `cvmm measure`
//! measures, and what other tools compute for the same file.
//!
//! Expected digests come from the `igvm` crate and from `sev-snp-measure`. On the emulated platform the
//! launch itself fails if the model of the firmware, which hashes what enters the guest, does not arrive at
//! the predicted digest.

use std::path::Path;

use anyhow::Context as _;
use anyhow::Result;
use anyhow::ensure;
use guest_init::job::Ending;
use guest_init::job::Job;

use crate::digest::hex;
use crate::igvm_guest;
use crate::igvm_guest::End;
use crate::igvm_guest::Twist;
use crate::machine::Output;
use crate::machine::job;
use crate::suite::Case;
use crate::suite::Context;
use crate::suite::Verdict;

const USAGE: i32 = 2;
const MONITOR: i32 = 1;
const TERMINATED: i32 = 4;

/// The cases of this file.
pub fn cases() -> Vec<Case> {
    igvm_cases().into_iter().chain(other_cases()).collect()
}

/// The IGVM files that run.
pub fn igvm_cases() -> Vec<Case> {
    vec![
        Case::new("firmware/igvm-runs-to-its-end-with-the-digest-of-the-igvm-crate", |context| {
            igvm_runs(context, Twist::None)
        }),
        Case::new("firmware/igvm-with-its-own-id-block", |context| igvm_runs(context, Twist::IdBlock)),
    ]
}

fn other_cases() -> Vec<Case> {
    vec![
        igvm_refused(
            "an-id-block-for-another-file",
            Twist::WrongIdBlock,
            &[],
            &["ID block is for digest 0707"],
        ),
        igvm_refused(
            "a-second-save-area",
            Twist::SecondVcpu,
            &[],
            &["KVM cannot launch this file", "vCPU 1"],
        ),
        igvm_refused("memory-that-is-not-there", Twist::RequiredMemory, &[], &["0x40000000", "--memory"]),
        igvm_refused("a-parameter-that-is-not-there", Twist::Srat, &[], &["offset 0x", "SRAT"]),
        igvm_refused("a-page-over-devices", Twist::ApicPage, &[], &["0xfee00000", "interrupt controllers"]),
        igvm_refused("more-vcpus-than-save-areas", Twist::None, &["--cpus", "2"], &["--cpus 1"]),
        igvm_refused(
            "another-policy",
            Twist::None,
            &["--policy", "0x30000"],
            &["--policy 0x30000", "0xb0000"],
        ),
        on_host("igvm-with-a-kernel", &["--igvm", "x", "--kernel", "y", "--snp"], &["--igvm", "--kernel"]),
        on_host("firmware-and-igvm", &["--igvm", "x", "--firmware", "y", "--snp"], &["--igvm", "--firmware"]),
        on_host("firmware-without-snp", &["--firmware", "/etc/passwd"], &["--firmware", "it needs --snp"]),
        on_host(
            "firmware-with-split-backing",
            &["--firmware", "/etc/passwd", "--snp", "--platform", "emulated", "--backing", "split"],
            &["it needs backing single"],
        ),
        Case::new("firmware/text-is-refused-with-its-offset", |context| {
            let options = with_platform(context, &["--firmware", "/etc/passwd"])?;
            refused(&context.run(&options)?, &["/etc/passwd", "offset 0x", "no firmware image"])
        }),
        Case::with_verdict("firmware/ovmf-of-debian", |context| ovmf(context, 1, None)),
        Case::with_verdict("firmware/ovmf-of-debian-3-vcpus", |context| ovmf(context, 3, None)),
        Case::with_verdict("firmware/ovmf-with-hashes-of-a-kernel", |context| {
            ovmf(context, 1, Some("console=ttyS0 quiet"))
        }),
    ]
}

fn cvmm(context: &Context, options: &[&str]) -> Job {
    let mut job = job(&context.cvmm);
    job.argv.extend(options.iter().map(ToString::to_string));
    job
}

/// An SNP guest on the emulated platform.
fn with_platform(context: &Context, options: &[&str]) -> Result<Job> {
    let keys = context.keys()?.display().to_string();
    let platform = ["--snp", "--platform", "emulated", "--emulated-keys", &keys];
    Ok(cvmm(context, &[options, &platform].concat()))
}

fn scratch(context: &Context, name: &str, bytes: &[u8]) -> Result<String> {
    let directory = context.workspace.work().join("scratch");
    std::fs::create_dir_all(&directory)?;
    let path = directory.join(name);
    std::fs::write(&path, bytes)?;
    Ok(Path::display(&path).to_string())
}

fn refused(output: &Output, words: &[&str]) -> Result<()> {
    ensure!(output.ending == Ending::Code(USAGE), "{} instead of exit code {USAGE}", output.ending);
    let errors = output.errors();
    for word in words {
        ensure!(errors.contains(word), "{word:?} is not in the message: {errors}");
    }
    Ok(())
}

fn on_host(name: &str, options: &'static [&str], words: &'static [&str]) -> Case {
    Case::new(format!("firmware/{name}"), move |context| {
        refused(&context.run_on_host(&cvmm(context, options)), words)
    })
}

fn igvm_refused(name: &str, twist: Twist, options: &'static [&str], words: &'static [&str]) -> Case {
    Case::new(format!("firmware/igvm-refused/{name}"), move |context| {
        let (bytes, _) = igvm_guest::file(End::Terminate, twist)?;
        let path = scratch(context, "refused.igvm", &bytes)?;
        let options = [&["--igvm", path.as_str()][..], options].concat();
        refused(&context.run(&with_platform(context, &options)?)?, words)
    })
}

/// Measured, launched and run to the guest's own end.
fn igvm_runs(context: &Context, twist: Twist) -> Result<()> {
    let (bytes, digest) = igvm_guest::file(End::Terminate, twist)?;
    let expected = hex(&digest);
    let path = scratch(context, "tiny.igvm", &bytes)?;
    let measured = context.run_on_host(&cvmm(context, &["measure", "--igvm", &path]));
    ensure!(measured.text().trim() == expected, "cvmm measure: {}, igvm crate: {expected}", measured.text());

    context.bring(Path::new(&path))?;
    let options = ["--igvm", &path, "--memory", "128M", "--cmdline", "hello"];
    let output = context.run(&with_platform(context, &options)?)?;
    let errors = output.errors();
    ensure!(
        errors.contains(&format!("launch digest {expected}")),
        "another digest than {expected}: {errors}"
    );
    ensure!(output.text() == igvm_guest::CONSOLE, "the guest printed {:?}", output.text());
    ensure!(output.ending == Ending::Code(TERMINATED), "{} instead of a termination", output.ending);
    let own = errors.contains("uses the ID block in the IGVM file");
    ensure!(own == (twist == Twist::IdBlock), "ID block: {errors}");
    Ok(())
}

/// Debian's OVMF is launched with the digest of sev-snp-measure, and its first phase runs: it asks the
/// hypervisor for its features through the GHCB MSR, registers a GHCB, checks its VMPL, and then uses that
/// page. With `cmdline`, a copy of the file that has a page for the hashes of a kernel.
fn ovmf(context: &Context, vcpus: u32, cmdline: Option<&str>) -> Result<Verdict> {
    let work = context.workspace.work();
    let debian = std::env::var_os("CVMM_DEBIAN_OVMF").map_or_else(|| work.join("ovmf/usr/share"), Into::into);
    let python =
        std::env::var_os("CVMM_ORACLE_PYTHON").map_or_else(|| work.join("venv/bin/python"), Into::into);
    let file: std::path::PathBuf = debian.join("OVMF/OVMF_CODE.fd");
    for needed in [&file, &python] {
        if !needed.exists() {
            return Ok(Verdict::Skipped(format!("{} is missing", needed.display())));
        }
    }
    let mut bytes = std::fs::read(&file).with_context(|| format!("cannot read {}", file.display()))?;
    let vcpus = vcpus.to_string();
    let (mut kernel_options, mut oracle_options) = (Vec::new(), Vec::new());
    if let Some(cmdline) = cmdline {
        make_room_for_hashes(&mut bytes)?;
        let kernel = scratch(context, "hashed-kernel", &[0x55; 10_000])?;
        let initrd = scratch(context, "hashed-initrd", &[0x66; 5000])?;
        kernel_options =
            ["--kernel", &kernel, "--initrd", &initrd, "--cmdline", cmdline].map(String::from).to_vec();
        oracle_options =
            ["--kernel", &kernel, "--initrd", &initrd, "--append", cmdline].map(String::from).to_vec();
    }
    let path = scratch(context, "ovmf.fd", &bytes)?;
    let mut oracle = job(&python);
    oracle.argv.extend(
        ["-m", "sevsnpmeasure.cli", "--mode", "snp", "--vcpus", &vcpus, "--vcpu-type", "EPYC-v4"]
            .map(String::from),
    );
    oracle.argv.extend(["--guest-features", "0x1", "--ovmf", &path].map(String::from));
    oracle.argv.extend(oracle_options);
    let expected = context.run_on_host(&oracle).text().trim().to_string();
    ensure!(expected.len() == 96, "sev-snp-measure says {expected:?}");

    let mut run =
        with_platform(context, &["--firmware", &path, "--vcpu-model", "EPYC-v4", "--cpus", &vcpus])?;
    run.argv.extend(kernel_options);
    let output = context.run(&run)?;
    let errors = output.errors();
    ensure!(errors.contains(&format!("launch digest {expected}")), "not the digest {expected}: {errors}");
    ensure!(!errors.contains("launch failed"), "{errors}");
    ensure!(
        errors.contains("used the page at 0x809000 as shared memory"),
        "it did not come as far as its GHCB: {errors}"
    );
    if cmdline.is_some() {
        ensure!(errors.contains("without fw_cfg"), "no warning that the kernel cannot be fetched: {errors}");
        return Ok(Verdict::Passed);
    }
    // The end of its first phase here: this build reaches its local APIC through an encrypted mapping.
    ensure!(output.ending == Ending::Code(MONITOR), "it ended with {}", output.ending);
    ensure!(errors.contains("private access to 0xfee000f0"), "{errors}");
    Ok(Verdict::Passed)
}

/// Turns Debian's third area of SEC memory into a page for hashes, and says so in the file's table.
fn make_room_for_hashes(file: &mut [u8]) -> Result<()> {
    let find = |pattern: &[u8]| file.windows(pattern.len()).position(|window| window == pattern);
    // {gpa 0x80a000, 0x3000 bytes, type 1}; and the entry 7255371f-3a3b-4b04-927b-1da6efa8d454 with base and
    // size 0.
    let section = [0x80_a000u32, 0x3000, 1].map(u32::to_le_bytes).concat();
    let section = find(&section).context("no such section")?;
    let guid =
        [0x1f, 0x37, 0x55, 0x72, 0x3b, 0x3a, 0x04, 0x4b, 0x92, 0x7b, 0x1d, 0xa6, 0xef, 0xa8, 0xd4, 0x54];
    let entry = find(&guid).context("no entry for hashes")?;
    file[section + 4..section + 12].copy_from_slice(&[0x1000u32, 0x10].map(u32::to_le_bytes).concat());
    file[entry - 10..entry - 2].copy_from_slice(&[0x80_a100u32, 0x400].map(u32::to_le_bytes).concat());
    Ok(())
}
