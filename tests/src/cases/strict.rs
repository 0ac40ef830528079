// SPDX-License-Identifier: Apache-2.0
//! Strict runs end at the first access that SNP hardware would not allow, and say which.
//!
//! The guests are kernels of a few bytes behind the real stage0 ([`crate::snp_kernel`]), because Linux makes
//! no such access.

use std::fs;

use anyhow::Context as _;
use anyhow::Result;
use anyhow::ensure;
use guest_init::job::Ending;

use crate::machine::Output;
use crate::machine::job;
use crate::snp_kernel::Code;
use crate::statistics::Statistics;
use crate::suite::Case;
use crate::suite::Context;

/// A page that stage0 leaves alone in a guest of 3 GiB with lazy acceptance.
const PAGE: u32 = 0x4000_0000;
/// One in another 2 MiB, and the last of RAM.
const OTHER: u32 = PAGE + 0x60_1000;
const LAST: u32 = 0xbfff_f000;

/// cvmm's exit code when a run had to be ended.
const ENDED: i32 = 1;

/// The cases of this file.
pub fn cases() -> Vec<Case> {
    let unvalidated = |page: u32| format!("a private access to {page:#x}, but the page is not validated");
    vec![
        ends("write-before-validation", Code::new().write(PAGE + 8), "", &unvalidated(PAGE + 8)),
        ends("read-before-validation", Code::new().read(LAST), "", &unvalidated(LAST)),
        ends("execution-before-validation", Code::new().jump(OTHER), "", &unvalidated(OTHER)),
        ends(
            "neighbour-of-a-validated-page",
            Code::new().pvalidate(PAGE, false, true).write(PAGE).write(PAGE + 0x1000),
            "0",
            &unvalidated(PAGE + 0x1000),
        ),
        ends(
            "validation-taken-back",
            Code::new()
                .pvalidate(PAGE, true, true)
                .write(PAGE + 0x5000)
                .pvalidate(PAGE, true, false)
                .read(PAGE),
            "00",
            &unvalidated(PAGE),
        ),
        ends(
            "private-again-but-not-validated-again",
            Code::new()
                .pvalidate(PAGE, false, true)
                .write(PAGE)
                .pvalidate(PAGE, false, false)
                .change(PAGE, false)
                .write_shared(PAGE)
                .change(PAGE, true)
                .say(b'p')
                .read(PAGE),
            "00p",
            &unvalidated(PAGE),
        ),
        ends(
            "private-access-to-a-shared-page",
            Code::new().change(PAGE, false).write_shared(PAGE).say(b's').write(PAGE),
            "s",
            &format!("a private access to {PAGE:#x}, but the page is shared"),
        ),
        ends(
            "shared-access-to-a-private-page",
            Code::new().pvalidate(PAGE, false, true).write_shared(PAGE + 0x10),
            "0",
            &format!("a shared access to {:#x}, but the page is private", PAGE + 0x10),
        ),
        Case::new("strict/allowed-accesses-go-on", |context| {
            let code = Code::new()
                .pvalidate(PAGE, true, true)
                .write(PAGE + 0x1f_f000)
                .pvalidate(OTHER, false, true)
                .write(OTHER)
                .pvalidate(OTHER, false, false)
                .change(OTHER, false)
                .write_shared(OTHER)
                .change(OTHER, true)
                .pvalidate(OTHER, false, true)
                .write(OTHER)
                .read(PAGE);
            let output = run(context, code)?;
            ensure!(output.ending == Ending::Code(0), "the run ended with {}", output.ending);
            ensure!(output.text() == "0000", "the guest wrote {:?}", output.text());
            let findings = Statistics::parse(&output.errors())?.findings;
            ensure!(findings.is_empty(), "{findings:?}");
            Ok(())
        }),
        Case::new("strict/second-validation-is-seen-by-guest-and-host", |context| {
            let output = run(context, Code::new().pvalidate(PAGE, false, true).pvalidate(PAGE, false, true))?;
            ensure!(output.ending == Ending::Code(0), "the run ended with {}", output.ending);
            ensure!(output.text() == "01", "the guest saw carry flags {:?}", output.text());
            let findings = Statistics::parse(&output.errors())?.findings;
            ensure!(findings == [format!("page {PAGE:#x} was validated twice")], "{findings:?}");
            Ok(())
        }),
    ]
}

/// A case in which the guest writes `console` and then makes an access that ends the run with `words`.
fn ends(name: &str, code: Code, console: &'static str, words: &str) -> Case {
    let words = words.to_owned();
    Case::new(format!("strict/{name}"), move |context| {
        let output = run(context, code.clone())?;
        ensure!(output.ending == Ending::Code(ENDED), "the run ended with {}", output.ending);
        ensure!(output.text() == console, "the guest wrote {:?}, not {console:?}", output.text());
        let errors = output.errors();
        let last = errors.lines().last().unwrap_or_default();
        ensure!(last.contains(&words), "the last message does not say {words:?}: {last}");
        // The code lies at 16 MiB, but for the guest that jumps.
        let places = ["at RIP 0x1000".to_owned(), format!("at RIP {OTHER:#x}")];
        ensure!(
            places.iter().any(|place| last.contains(place)),
            "the last message does not say where: {last}"
        );
        Ok(())
    })
}

/// Boots the kernel through stage0 in a strict run, with most of its 3 GiB left to it.
pub fn run(context: &Context, code: Code) -> Result<Output> {
    let path = context.workspace.work().join("strict-kernel.elf");
    fs::write(&path, code.kernel()).with_context(|| format!("cannot write {}", path.display()))?;
    context.bring(&path)?;
    let mut job = job(&context.cvmm);
    job.argv.extend(["--kernel".into(), path.display().to_string()]);
    let options = ["--memory", "3G", "--accept", "lazy", "--snp", "--platform", "emulated", "--statistics"];
    job.argv.extend(options.map(String::from));
    job.argv.extend(["--backing", "split", "--strict", "--emulated-keys"].map(String::from));
    job.argv.push(context.keys()?.display().to_string());
    context.run(&job)
}
