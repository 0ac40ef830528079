// SPDX-License-Identifier: Apache-2.0
//! One altered bit, anywhere between the owner's files and the running kernel, and a host that keeps altering
//! memory while the guest takes it over.
//!
//! Files that are not the owner's give another digest, which the owner's ID block refuses. A host that alters
//! bytes after the digest was computed (`--tamper`, a hidden option of the monitor) meets stage0. That stage0
//! refuses hostile memory maps is shown by `tests/tests/stage0_native/`, because here the monitor would not
//! make them.

use std::fs;
use std::path::Path;
use std::path::PathBuf;

use anyhow::Context as _;
use anyhow::Result;
use anyhow::bail;
use anyhow::ensure;
use guest_init::job::Ending;
use snp::image::kernel;

use super::boot::REBOOTED;
use super::boot::predict;
use crate::guest::Console;
use crate::guest::Guest;
use crate::guest::Mode;
use crate::kernels::Kernel;
use crate::kernels::Role;
use crate::machine::Output;
use crate::machine::job;
use crate::suite::Case;
use crate::suite::Context;

/// cvmm's exit codes for a launch that failed, for a request that is not valid, and for a guest that
/// terminated itself.
const LAUNCH_FAILED: i32 = 1;
const USAGE: i32 = 2;
const TERMINATED: i32 = 4;

/// What a launch with another digest than the owner's is told.
const OTHER_DIGEST: &str = "the ID block is for launch digest";

/// Guests that a racing host is tried with.
const RACES: u32 = 3;

/// The cases of this file.
pub fn cases() -> Vec<Case> {
    let staged = [
        ("kernel", "the kernel is not the one that was measured"),
        ("initrd", "the initrd is not the one that was measured"),
        ("cmdline", "the command line is not the one that was measured"),
        ("boot-params", "the boot parameters are not the ones that were measured"),
        ("acpi", "the ACPI tables are not the ones that were measured"),
        // Without an ID block nobody compares the digest, and stage0 takes the altered hash for the right
        // one.
        ("hashes", "the boot parameters are not the ones that were measured"),
    ];
    let staged = staged.map(|(what, words)| {
        Case::new(format!("tamper/stage0-refuses/{what}"), move |context| {
            let output = run(context, &guest(context)?, &["--tamper", what])?;
            ensure!(output.ending == Ending::Code(TERMINATED), "the run ended with {}", output.ending);
            ensure!(output.text().is_empty(), "the kernel ran: {}", output.text());
            says(&output, words)
        })
    });
    let files = ["kernel", "initrd", "cmdline"].map(|what| {
        Case::new(format!("tamper/id-block-refuses/{what}"), move |context| {
            let good = guest(context)?;
            let id = sign(context, &predict(context, &good)?)?;
            let output = run(context, &alter(context, &good, what)?, &id_options(&id))?;
            ensure!(output.ending == Ending::Code(USAGE), "the run ended with {}", output.ending);
            says(&output, OTHER_DIGEST)
        })
    });
    let pages = ["stage0", "hashes"].map(|what| {
        Case::new(format!("tamper/id-block-refuses/{what}"), move |context| {
            let good = guest(context)?;
            let id = sign(context, &predict(context, &good)?)?;
            let mut options = id_options(&id);
            options.extend(["--tamper", what]);
            let output = run(context, &good, &options)?;
            ensure!(output.ending == Ending::Code(LAUNCH_FAILED), "the run ended with {}", output.ending);
            says(&output, OTHER_DIGEST)
        })
    });
    let races = ["cmdline", "kernel"].map(|what| {
        Case::new(format!("tamper/race/{what}"), move |context| {
            let tamper = format!("{what}@race");
            (0..RACES).try_for_each(|_| race(context, &["--tamper", &tamper]))
        })
    });
    files.into_iter().chain(pages).chain(staged).chain(races).collect()
}

/// The host changes a byte back and forth while stage0 copies and hashes: the guest ends, or runs with what
/// was measured.
fn race(context: &Context, options: &[&str]) -> Result<()> {
    let guest = guest(context)?;
    let output = run(context, &guest, options)?;
    match output.ending {
        Ending::Code(TERMINATED) => says(&output, "is not the one that was measured"),
        Ending::Code(REBOOTED) => {
            let console = Console::parse(&output.text());
            let expected = cmdline(&guest)?;
            let found = console.get("cmdline")?;
            ensure!(found == expected, "the guest runs with {found:?}, measured was {expected:?}");
            Ok(())
        }
        ending => bail!("the run ended with {ending}"),
    }
}

fn cmdline(guest: &Guest) -> Result<String> {
    let options = guest.image_options();
    let at = options.iter().position(|word| word == "--cmdline").context("no --cmdline")?;
    options.get(at + 1).cloned().context("no command line")
}

fn says(output: &Output, words: &str) -> Result<()> {
    let errors = output.errors();
    ensure!(errors.contains(words), "cvmm does not say {words:?} but: {errors}");
    Ok(())
}

fn guest(context: &Context) -> Result<Guest> {
    let role = Role::BackportsCloud;
    Ok(Guest {
        kernel: Kernel::find(&context.workspace, role)?.image,
        initrd: context.workspace.guest_initrd(role),
        memory: "256M",
        cpus: 1,
        mode: Mode::SplitStrict,
        actions: "cmdline,reboot",
        report_data: String::new(),
        verbose: false,
    })
}

fn run(context: &Context, guest: &Guest, options: &[&str]) -> Result<Output> {
    let mut job = guest.run_job(&context.cvmm, &context.keys()?);
    job.argv.extend(options.iter().map(ToString::to_string));
    context.run(&job)
}

/// The guest with one bit of a file, or of the command line, altered.
fn alter(context: &Context, good: &Guest, what: &str) -> Result<Guest> {
    let mut guest = good.clone();
    match what {
        "kernel" => guest.kernel = altered(context, &good.kernel)?,
        "initrd" => guest.initrd = altered(context, &good.initrd)?,
        // 't' and 'u' differ in one bit.
        _ => guest.actions = "cmdline,reboou",
    }
    Ok(guest)
}

fn altered(context: &Context, file: &Path) -> Result<PathBuf> {
    let mut bytes = fs::read(file).with_context(|| format!("cannot read {}", file.display()))?;
    // In a kernel not in its compressed part, which the emulated platform would find broken before it
    // launches anything, but in the checksum at its end.
    let at = match kernel::Kernel::parse(bytes.clone()) {
        Ok(kernel::Kernel::BzImage(image)) => image.body.end - 1,
        _ => bytes.len() / 2,
    };
    bytes[at] ^= 0x10;
    let path = context.workspace.work().join("altered");
    fs::write(&path, bytes).with_context(|| format!("cannot write {}", path.display()))?;
    Ok(path)
}

/// An owner's ID block and auth page for `digest`.
fn sign(context: &Context, digest: &str) -> Result<[String; 2]> {
    let file = |name: &str| context.workspace.work().join(name).display().to_string();
    let (key, block, auth) = (file("owner.pem"), file("owner.block"), file("owner.auth"));
    let steps: [(&Path, &[&str]); 3] = [
        (Path::new("openssl"), &["ecparam", "-name", "secp384r1", "-genkey", "-noout", "-out", &key]),
        (&context.cvmm, &["id-block", "new", "--digest", digest, "--out", &block]),
        (&context.cvmm, &["id-block", "sign", &block, "--id-key", &key, "--out", &auth]),
    ];
    for (program, arguments) in steps {
        let mut job = job(program);
        job.argv.extend(arguments.iter().map(ToString::to_string));
        let output = context.run_on_host(&job);
        ensure!(output.ending == Ending::Code(0), "{}: {}", job.argv.join(" "), output.errors());
    }
    Ok([block, auth])
}

fn id_options([block, auth]: &[String; 2]) -> Vec<&str> {
    vec!["--id-block", block, "--id-auth", auth]
}
