// SPDX-License-Identifier: Apache-2.0
//! What cannot work is refused with one clear line and the documented exit code, before anything runs.

use std::fs;
use std::path::Path;

use anyhow::Context as _;
use anyhow::Result;
use anyhow::ensure;
use guest_init::job::Ending;
use guest_init::job::Job;

use crate::kernels::Kernel;
use crate::kernels::Role;
use crate::machine::Output;
use crate::machine::job;
use crate::suite::Case;
use crate::suite::Context;

/// cvmm's exit code when the request is not valid.
const USAGE: i32 = 2;
/// cvmm's exit code when the monitor or its host is at fault.
const MONITOR: i32 = 1;

/// The cases of this file.
pub fn cases() -> Vec<Case> {
    vec![
        usage(
            "bad-input/missing-kernel",
            &["--kernel", "/no/such/bzImage"],
            &["--kernel", "/no/such/bzImage"],
        ),
        usage("bad-input/directory-as-kernel", &["--kernel", "/"], &["--kernel", "directory"]),
        usage("bad-input/text-as-kernel", &["--kernel", "/etc/passwd"], &["--kernel", "/etc/passwd"]),
        Case::new("bad-input/truncated-bzimage", |context| {
            // Half a kernel: the header is whole and promises more than there is.
            let bytes = fs::read(debian_kernel(context)?)?;
            let path = scratch(context, "truncated", &bytes[..bytes.len() / 2])?;
            refused(&context.run_on_host(&cvmm(context, &["--kernel", &path])), USAGE, &["--kernel", &path])
        }),
        with_kernel(
            "bad-input/missing-initrd",
            &["--initrd", "/no/such/initrd"],
            &["--initrd", "/no/such/initrd"],
        ),
        Case::new("bad-input/initrd-larger-than-ram", |context| {
            let path = scratch(context, "large-initrd", &vec![0; 200 << 20])?;
            let kernel = debian_kernel(context)?;
            let options = ["--kernel", &kernel, "--initrd", &path, "--memory", "128M"];
            refused(&context.run_on_host(&cvmm(context, &options)), USAGE, &["initrd"])
        }),
        with_kernel("bad-input/no-cpu", &["--cpus", "0"], &["--cpus", "0"]),
        with_kernel("bad-input/10000-cpus", &["--cpus", "10000"], &["--cpus", "10000"]),
        with_kernel("bad-input/no-memory", &["--memory", "0"], &["memory"]),
        with_kernel("bad-input/memory-in-parrots", &["--memory", "5parrots"], &["--memory", "5parrots"]),
        Case::new("bad-input/command-line-too-long", |context| {
            let long = "x".repeat(70_000);
            let kernel = debian_kernel(context)?;
            refused(
                &context.run_on_host(&cvmm(context, &["--kernel", &kernel, "--cmdline", &long])),
                USAGE,
                &["--cmdline", "70000"],
            )
        }),
        with_kernel(
            "bad-input/strict-needs-split",
            &["--snp", "--platform", "emulated", "--backing", "single", "--strict"],
            &["--strict"],
        ),
        with_kernel("bad-input/emulated-needs-snp", &["--platform", "emulated"], &["--snp"]),
        with_kernel(
            "bad-input/vtpm-without-its-file",
            &["--vtpm", "/no/such/vm.vmgs"],
            &["--vtpm", "/no/such/vm.vmgs", "cvmm vmgs create"],
        ),
        with_kernel("bad-input/vtpm-without-its-key", &["--vtpm", "/etc/passwd"], &["--vtpm-key-file"]),
        with_kernel("bad-input/vtpm-key-of-nothing", &["--vtpm", "--vtpm-key-file", "k"], &["--vtpm FILE"]),
        with_kernel(
            "bad-input/vtpm-of-two-kinds",
            &["--vtpm", "--vtpm-socket", "/no/such/socket"],
            &["--vtpm-socket"],
        ),
        with_kernel(
            "bad-input/certs-that-are-no-table",
            &["--snp", "--platform", "emulated", "--certs", "/etc/passwd"],
            &["--certs", "/etc/passwd", "no table of certificates"],
        ),
        with_kernel("bad-input/certs-need-snp", &["--certs", "/etc/passwd"], &["--snp"]),
        with_kernel(
            "bad-input/unknown-end-of-a-reboot",
            &["--on-reboot", "sleep"],
            &["--on-reboot", "restart"],
        ),
        Case::new("bad-input/policy-bit-that-the-platform-refuses", |context| {
            let (kernel, keys) = (debian_kernel(context)?, context.keys()?.display().to_string());
            let options = [
                "--kernel",
                &kernel,
                "--snp",
                "--platform",
                "emulated",
                "--emulated-keys",
                &keys,
                "--policy",
                "0x230000",
            ];
            refused(
                &context.run(&cvmm(context, &options))?,
                USAGE,
                &["policy 0x230000", "bit 21 (CXL_ALLOW)"],
            )
        }),
        with_kernel(
            "bad-input/secure-tsc-of-a-plain-guest",
            &["--secure-tsc"],
            &["--secure-tsc", "as an SNP guest (--snp"],
        ),
        Case::new("bad-input/secure-tsc-on-the-emulated-platform", |context| {
            let keys = context.keys()?.display().to_string();
            let kernel = debian_kernel(context)?;
            let options = ["--kernel", &kernel, "--snp", "--platform", "emulated", "--emulated-keys", &keys];
            let output = context.run(&cvmm(context, &[&options[..], &["--secure-tsc"]].concat()))?;
            refused(
                &output,
                MONITOR,
                &["KVM offers 0x0 here", "--secure-tsc", "does not work on the emulated platform"],
            )
        }),
        Case::new("bad-input/measure-refuses-the-same", |context| {
            let mut job = cvmm(context, &["measure", "--kernel", "/no/such/bzImage"]);
            job.limit = std::time::Duration::from_secs(20);
            refused(&context.run_on_host(&job), USAGE, &["--kernel", "/no/such/bzImage"])
        }),
        Case::new("bad-input/no-dev-kvm", |context| {
            // A mount namespace of its own, with an empty /dev.
            without_kvm(context, "mount -t tmpfs none /dev && exec", &[])
        }),
        Case::new("bad-input/dev-kvm-not-permitted", |context| {
            without_kvm(context, "exec setpriv --reuid 65534 --regid 65534 --clear-groups", &["permi"])
        }),
        Case::new("bad-input/snp-without-hardware-says-what-to-do", |context| {
            let job = cvmm(context, &["--kernel", &debian_kernel(context)?, "--snp"]);
            refused(&context.run(&job)?, MONITOR, &["--platform emulated"])
        }),
        Case::new("bad-input/kernel-without-the-hook-is-not-patched", |context| {
            // The decompressor's last jump, which the emulated platform needs, is no longer there.
            let mut bytes = fs::read(debian_kernel(context)?)?;
            let jump = [0x4c, 0x89, 0xfe, 0xff, 0xe0];
            let at = bytes.windows(jump.len()).rposition(|window| window == jump).context("no jump")?;
            bytes[at + 3] = 0x90;
            let path = scratch(context, "no-hook", &bytes)?;
            let keys = context.keys()?.display().to_string();
            let options = ["--kernel", &path, "--snp", "--platform", "emulated", "--emulated-keys", &keys];
            let job = cvmm(context, &options);
            refused(&context.run(&job)?, USAGE, &["decompressor", "4c 89 fe ff e0"])
        }),
    ]
}

/// A case on the host: `options` alone are refused.
fn usage(name: &str, options: &'static [&str], words: &'static [&str]) -> Case {
    Case::new(name, move |context| refused(&context.run_on_host(&cvmm(context, options)), USAGE, words))
}

/// A case on the host: a good kernel with bad `options` is refused.
fn with_kernel(name: &str, options: &'static [&str], words: &'static [&str]) -> Case {
    Case::new(name, move |context| {
        let kernel = debian_kernel(context)?;
        let all: Vec<&str> = ["--kernel", &kernel].into_iter().chain(options.iter().copied()).collect();
        refused(&context.run_on_host(&cvmm(context, &all)), USAGE, words)
    })
}

fn without_kvm(context: &Context, prefix: &str, words: &[&str]) -> Result<()> {
    let kernel = debian_kernel(context)?;
    // The kernel may be in a folder that only root can look into.
    let copy = "mount -t tmpfs -o mode=755 none /mnt && cp";
    let script = format!(
        "{copy} '{kernel}' /mnt/kernel && {prefix} '{}' --kernel /mnt/kernel",
        context.cvmm.display()
    );
    let mut unshare = job("unshare");
    unshare.argv.extend(["--mount", "sh", "-c", &script].map(String::from));
    let words: Vec<&str> = ["/dev/kvm"].iter().chain(words).copied().collect();
    refused(&context.run(&unshare)?, MONITOR, &words)
}

fn cvmm(context: &Context, options: &[&str]) -> Job {
    let mut job = job(&context.cvmm);
    job.argv.extend(options.iter().map(ToString::to_string));
    job
}

fn debian_kernel(context: &Context) -> Result<String> {
    Ok(Kernel::find(&context.workspace, Role::BackportsCloud)?.image.display().to_string())
}

fn scratch(context: &Context, name: &str, bytes: &[u8]) -> Result<String> {
    let directory = context.workspace.work().join("scratch");
    fs::create_dir_all(&directory)?;
    let path = directory.join(name);
    fs::write(&path, bytes)?;
    Ok(Path::display(&path).to_string())
}

/// The exit code is `code`, and one line of standard error says why, with all of `words` in it.
fn refused(output: &Output, code: i32, words: &[&str]) -> Result<()> {
    ensure!(output.ending == Ending::Code(code), "{} instead of exit code {code}", output.ending);
    let errors = output.errors();
    let mut lines = errors.lines().filter(|line| !line.trim().is_empty());
    ensure!(lines.any(|line| line.contains("error:")), "no line with `error:`");
    for word in words {
        let found = errors.to_lowercase().contains(&word.to_lowercase());
        ensure!(found, "{word:?} is not in the message: {errors}");
    }
    // clap adds a usage line and a pointer to --help; a trace or a panic would be longer.
    ensure!(
        errors.lines().count() <= 8 && !errors.contains("panicked"),
        "more than one clear line: {errors}"
    );
    Ok(())
}
