// SPDX-License-Identifier: Apache-2.0
//! Launch digests of firmware images of 4 and 64 MiB, and of 255 vCPU counts in one call, as whole processes.
//!
//! The peers are `sev-snp-measure` and the `sev` crate (pure Rust, as a small program of ours). Every run's
//! digest must be the same, so that nothing fast but wrong is timed. The yardstick is `openssl speed` on 4
//! KiB blocks, one core.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use anyhow::Context;
use anyhow::Result;
use anyhow::ensure;
use cvmm_tests::workspace::Workspace;

use super::Args;
use super::median;
use super::millis;
use crate::build;
use crate::oracles;
use crate::steps::capture;
use crate::steps::show;

/// Goals of the project.
const GOAL_4_MIB_MILLIS: f64 = 8.0;
const GOAL_64_MIB_RATIO: f64 = 1.6;

/// A firmware file of `size` bytes: noise, one metadata section, and the table that leads to it.
fn firmware(size: usize) -> Vec<u8> {
    let mut x = 0x9e37_79b9_7f4a_7c15u64;
    let mut file: Vec<u8> = Vec::with_capacity(size);
    while file.len() < size {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        file.extend_from_slice(&x.to_le_bytes());
    }
    let mut put = |from_end: usize, bytes: &[u8]| {
        let at = size - from_end;
        file[at..at + bytes.len()].copy_from_slice(bytes);
    };
    let words = |words: &[u32]| words.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<u8>>();
    put(0x800, b"ASEV");
    put(0x800 - 4, &words(&[28, 1, 1, 0x80_0000, 0x1000, 1]));
    // Entries of the table, each {data, length, GUID}: SEV metadata, SEV-ES reset block, and the table's own
    // end.
    let metadata_guid = *b"\x66\x65\x88\xdc\x4a\x98\x98\x47\xa7\x5e\x55\x85\xa7\xbf\x67\xcc";
    let reset_guid = *b"\xde\x71\xf7\x00\x7e\x1a\xcb\x4f\x89\x0e\x68\xc7\x7e\x2f\xb4\x4e";
    let footer_guid = *b"\xde\x82\xb5\x96\xb2\x1f\xf7\x45\xba\xea\xa3\x66\xc5\x5a\x08\x2d";
    let mut table = Vec::new();
    for (data, guid) in [(0x800u32, metadata_guid), (0x80_b004, reset_guid)] {
        table.extend_from_slice(&data.to_le_bytes());
        table.extend_from_slice(&22u16.to_le_bytes());
        table.extend_from_slice(&guid);
    }
    table.extend_from_slice(&(table.len() as u16 + 18).to_le_bytes());
    table.extend_from_slice(&footer_guid);
    put(32 + table.len(), &table);
    file
}

/// Milliseconds of one run, and its standard output.
fn time(command: &mut Command) -> Result<(f64, String)> {
    let began = Instant::now();
    let output = capture(command)?;
    Ok((millis(began.elapsed()), output.trim().to_owned()))
}

/// Bytes per second of SHA-384 on one core, by openssl on 4 KiB blocks.
fn openssl_rate() -> Result<f64> {
    let output = capture(
        Command::new("openssl").args(["speed", "-mr", "-seconds", "1", "-bytes", "4096", "-evp", "sha384"]),
    )?;
    let rate = output.lines().find_map(|line| line.strip_prefix("+F:")?.rsplit(':').next()?.parse().ok());
    rate.context("openssl speed printed no rate")
}

/// Runs the bench and prints its table.
pub fn run(args: &Args) -> Result<()> {
    let workspace = Workspace::find();
    build::release(&workspace, &["vmm"])?;
    oracles::prepare(&workspace)?;
    show(build::cargo(&workspace).args([
        "build",
        "--release",
        "--quiet",
        "-p",
        "snp",
        "--example",
        "sev_measure",
    ]))?;
    let cvmm = workspace.cargo_output(build::PROFILE).join("cvmm");
    let sev = workspace.cargo_output("release").join("examples/sev_measure");
    let python = oracles::python(&workspace);
    let ours = |file: &Path, vcpus: &str| {
        let mut command = Command::new(&cvmm);
        command.arg("measure").arg("--firmware").arg(file);
        command.args(["--vmm", "qemu", "--vcpu-model", "EPYC-Milan", "--vcpus", vcpus]);
        command
    };
    println!(
        "\nlaunch digest of an OVMF image, whole process, median of {} runs each in turn, ms",
        args.runs
    );
    println!(
        "{:10} {:>10} {:>18} {:>12} {:>16}",
        "image", "cvmm", "sev-snp-measure", "sev crate", "openssl 1 core"
    );
    for mib in [4usize, 64] {
        let file = workspace.work().join(format!("bench-{mib}.fd"));
        fs::create_dir_all(workspace.work())?;
        fs::write(&file, firmware(mib << 20)).with_context(|| format!("cannot write {}", file.display()))?;
        let (mut a, mut b, mut c, mut rates) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for run in 0..=args.runs {
            let (cvmm_ms, digest) = time(&mut ours(&file, "1"))?;
            let mut tool = Command::new(&python);
            tool.args([
                "-m",
                "sevsnpmeasure.cli",
                "--mode",
                "snp",
                "--vcpus",
                "1",
                "--vcpu-type",
                "EPYC-Milan",
                "--ovmf",
            ]);
            let (python_ms, theirs) = time(tool.arg(&file))?;
            let (sev_ms, sevs) = time(Command::new(&sev).arg(&file).arg("1"))?;
            ensure!(digest == theirs && digest == sevs, "digests differ: {digest}, {theirs}, {sevs}");
            // The first round brings programs and files into the page cache.
            if run > 0 {
                a.push(cvmm_ms);
                b.push(python_ms);
                c.push(sev_ms);
            }
            if run % 4 == 1 {
                rates.push(openssl_rate()?);
            }
        }
        let size = (mib << 20) as f64;
        let (ms, rate) = (median(&a), median(&rates));
        println!(
            "{:>6} MiB {ms:10.2} {:18.2} {:12.2} {:13.2} ms",
            mib,
            median(&b),
            median(&c),
            size / rate * 1e3
        );
        let ratio = size / (ms / 1e3) / rate;
        match mib {
            4 => println!(
                "           goal: cvmm at most {GOAL_4_MIB_MILLIS} ms: {}",
                met(ms <= GOAL_4_MIB_MILLIS)
            ),
            _ => println!(
                "           goal: at least {GOAL_64_MIB_RATIO} times openssl's rate on one core: {ratio:.2}, {}",
                met(ratio >= GOAL_64_MIB_RATIO)
            ),
        }
        if mib == 4 {
            let (mut one, mut many) = (Vec::new(), Vec::new());
            for _ in 0..args.runs {
                one.push(time(&mut ours(&file, "1"))?.0);
                let (ms, text) = time(&mut ours(&file, "1-255"))?;
                ensure!(text.lines().count() == 255, "not 255 digests");
                many.push(ms);
            }
            let each = (median(&many) - median(&one)) / 254.0 * 1e3;
            println!(
                "           1 to 255 vCPUs in one call: {:.2} ms, one count {:.2} ms: {each:.1} us for each more",
                median(&many),
                median(&one)
            );
        }
        fs::remove_file(&file).context("cannot remove the image")?;
    }
    Ok(())
}

fn met(yes: bool) -> &'static str {
    if yes { "met" } else { "MISSED" }
}
