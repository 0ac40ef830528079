// SPDX-License-Identifier: Apache-2.0
//! How guest memory is validated: all of it before the kernel runs, or most of it by the kernel, on hosts
//! that take `PVALIDATE` of 2 MiB and on hosts that do not.
//!
//! Every run is a strict one of an unmodified Debian kernel to its user space: a page touched before it was
//! validated, or through the wrong view, ends it, and a page validated twice is reported. RAM is
//! overcommitted: L1 has less than the largest guest. What must not grow with RAM is compared across runs,
//! not with a number noted here.

use std::time::Duration;

use anyhow::Result;
use anyhow::ensure;
use guest_init::job::Ending;

use super::boot::MEASURED_PAGES;
use super::boot::REBOOTED;
use super::boot::SNP_LOG_LINE;
use crate::guest::Console;
use crate::guest::Guest;
use crate::guest::Mode;
use crate::kernels::Kernel;
use crate::kernels::Role;
use crate::statistics::Statistics;
use crate::statistics::launch_pages;
use crate::suite::Case;
use crate::suite::Context;

/// Most memory that a monitor may have when stage0 is done, in KiB: files, staging memory, and what the
/// kernel's place holds.
const RESIDENT_MAX: u64 = 400 << 10;

/// For guests that exit once for each 4 KiB of their memory: 16 GiB take six minutes in an emulated machine.
const EXIT_PER_PAGE_LIMIT: Duration = Duration::from_secs(900);

/// Why guests of 16 GiB are tried in long runs only.
const LARGE: &str = "more of the same, and its kernel takes minutes to start in an emulated machine";

/// The cases of this file.
pub fn cases() -> Vec<Case> {
    vec![
        Case::new("accept/lazy/2m-accepted", |context| {
            lazy(&all(context, "lazy", "accept", &["256M", "1024M", "4096M", "6144M"])?)
        }),
        Case::new("accept/lazy/2m-accepted/16g", |context| {
            lazy(&all(context, "lazy", "accept", &["4096M", "16384M"])?)
        })
        .long(LARGE),
        Case::new("accept/lazy/2m-refused", |context| {
            lazy_by_pages(context, &["256M", "1024M", "4096M", "6144M"])
        }),
        Case::new("accept/lazy/2m-refused/16g", |context| lazy_by_pages(context, &["4096M", "16384M"]))
            .long(LARGE),
        Case::new("accept/eager/2m-accepted", |context| {
            // One for each 2 MiB.
            eager(&all(context, "eager", "accept", &["256M", "1024M", "4096M"])?, 1)
        }),
        Case::new("accept/eager/2m-accepted/16g", |context| {
            eager(&all(context, "eager", "accept", &["1024M", "16384M"])?, 1)
        })
        .long(LARGE),
        Case::new("accept/eager/2m-refused", |context| {
            let runs = all(context, "eager", "refuse", &["256M", "1024M"])?;
            // One that is refused, and 512 of 4 KiB.
            eager(&runs, 513)
        }),
        Case::new("accept/eager/2m-refused/16g", |context| {
            let runs = all(context, "eager", "refuse", &["1024M", "16384M"])?;
            eager(&runs, 513)
        })
        .long("four million exits take six minutes in an emulated machine"),
        Case::new("accept/auto/kernel-without-the-table-gets-all-memory", |context| {
            let run = run(context, Role::StableCloud, "auto", "accept", "3072M")?;
            ensure!(run.left() == 0, "{} pages were left to a kernel that cannot validate them", run.left());
            Ok(())
        }),
        Case::new("accept/auto/kernel-with-the-table-gets-little", |context| {
            let run = run(context, Role::BackportsCloud, "auto", "accept", "3072M")?;
            ensure!(run.left() > run.pages() / 2, "only {} of {} pages were left", run.left(), run.pages());
            Ok(())
        }),
    ]
}

/// What a run came to.
struct Run {
    memory_mib: u64,
    stage0: crate::statistics::Counts,
    launched: u64,
}

impl Run {
    fn pages(&self) -> u64 {
        self.memory_mib << 8
    }

    /// Pages that neither launch nor stage0 validated.
    fn left(&self) -> u64 {
        self.pages().saturating_sub(self.launched + self.stage0.validated_pages)
    }
}

fn all(
    context: &Context,
    accept: &'static str,
    answer: &'static str,
    memories: &[&'static str],
) -> Result<Vec<Run>> {
    memories.iter().map(|memory| run(context, Role::BackportsCloud, accept, answer, memory)).collect()
}

fn lazy_by_pages(context: &Context, memories: &[&'static str]) -> Result<()> {
    let runs = all(context, "lazy", "refuse", memories)?;
    ensure!(runs.iter().all(|run| run.stage0.pvalidate_2m == 0), "2 MiB were validated at once");
    lazy(&runs)
}

/// stage0's work does not depend on the size of RAM once its windows fit. The initrd is placed at the end of
/// RAM, but not above 2 GiB; stage0 validates 2 MiB after it, which a guest of 1 GiB does not have.
fn lazy(runs: &[Run]) -> Result<()> {
    for small in runs.iter().filter(|run| run.memory_mib < 2048) {
        let large = runs.last().map_or(0, |run| run.stage0.pvalidate);
        ensure!(small.stage0.pvalidate <= large, "{} MiB took more than the largest guest", small.memory_mib);
    }
    let large: Vec<&Run> = runs.iter().filter(|run| run.memory_mib >= 2048).collect();
    for pair in large.windows(2) {
        let (a, b) = (pair[0], pair[1]);
        let counts = |run: &Run| (run.stage0.pvalidate, run.stage0.page_state_changes);
        ensure!(
            counts(a) == counts(b),
            "PVALIDATE and page-state changes before the kernel are {:?} at {} MiB and {:?} at {} MiB",
            counts(a),
            a.memory_mib,
            counts(b),
            b.memory_mib
        );
        ensure!(b.left() > a.left(), "more memory, but not more of it left to the kernel");
    }
    Ok(())
}

/// stage0 validates everything, in `calls` instructions for each 2 MiB, and touches next to nothing.
fn eager(runs: &[Run], calls: u64) -> Result<()> {
    for run in runs {
        ensure!(run.left() == 0, "{} pages of {} MiB were not validated", run.left(), run.memory_mib);
    }
    for pair in runs.windows(2) {
        let (a, b) = (&pair[0], &pair[1]);
        let more = b.stage0.pvalidate - a.stage0.pvalidate;
        let expected = (b.memory_mib - a.memory_mib) / 2 * calls;
        ensure!(
            more == expected,
            "{} MiB took {more} PVALIDATE more than {} MiB, not {expected}",
            b.memory_mib,
            a.memory_mib
        );
    }
    Ok(())
}

/// Boots a guest to its user space in a strict run, and checks what holds for each.
fn run(
    context: &Context,
    role: Role,
    accept: &'static str,
    answer: &'static str,
    memory: &'static str,
) -> Result<Run> {
    let guest = Guest {
        kernel: Kernel::find(&context.workspace, role)?.image,
        initrd: context.workspace.guest_initrd(role),
        memory,
        cpus: 2,
        mode: Mode::SplitStrict,
        actions: "info,reboot",
        report_data: String::new(),
        verbose: false,
    };
    let mut job = guest.run_job(&context.cvmm, &context.keys()?);
    // Little memory for bounce buffers: Linux would zero 6 % of RAM for them, which takes minutes in software
    // emulation.
    let cmdline = job.argv.iter().position(|word| word == "--cmdline");
    if let Some(value) = cmdline.and_then(|at| job.argv.get_mut(at + 1)) {
        value.push_str(" swiotlb=4096");
    }
    job.argv.extend(["--accept", accept, "--pvalidate-2m", answer, "--statistics"].map(String::from));
    if (accept, answer) == ("eager", "refuse") {
        job.limit = EXIT_PER_PAGE_LIMIT;
    }
    let output = context.run(&job)?;
    ensure!(output.ending == Ending::Code(REBOOTED), "{memory}: the run ended with {}", output.ending);
    let console = Console::parse(&output.text());
    ensure!(console.all("error").is_empty(), "the guest complains: {:?}", console.all("error"));
    let log = console.get("log")?;
    ensure!(log.contains(SNP_LOG_LINE), "the guest's log says {log:?}, not {SNP_LOG_LINE:?}");

    let errors = output.errors();
    let pages = launch_pages(&errors)?;
    ensure!(pages <= MEASURED_PAGES + u64::from(guest.cpus), "the launch took {pages} pages");
    let statistics = Statistics::parse(&errors)?;
    ensure!(statistics.findings.is_empty(), "the guest did what it must not do: {:?}", statistics.findings);
    let stage0 = statistics.stage0()?;
    ensure!(
        stage0.resident_kib <= RESIDENT_MAX,
        "{memory}: validating memory took {} KiB of the host's",
        stage0.resident_kib
    );
    println!(
        "     {:28} {accept:5} 2M {answer:6} {memory:>6}: before the kernel {:6} PVALIDATE, {} page-state changes, {:5} ms; \
         in all {:6}, {:4}, {:5} ms",
        role.name(),
        stage0.pvalidate,
        stage0.page_state_changes,
        stage0.milliseconds,
        statistics.in_all.pvalidate,
        statistics.in_all.page_state_changes,
        statistics.in_all.milliseconds
    );
    let memory_mib = memory.trim_end_matches('M').parse()?;
    Ok(Run { memory_mib, stage0, launched: statistics.launched_pages })
}
