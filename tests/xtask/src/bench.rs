// SPDX-License-Identifier: Apache-2.0
//! `cargo xtask bench NAME`: numbers beside those of peers, taken in one run on one machine. One file per
//! bench.
//!
//! A bench is a function from [`Args`] to nothing: it prints its table and says what was measured and how. To
//! add one, add its file and its line in [`run`].

mod boot;
mod launch;
mod measure;
mod vtpm;

use std::time::Duration;

use anyhow::Result;

/// `cargo xtask bench`
#[derive(clap::Args)]
pub struct Args {
    /// What to measure.
    #[arg(value_enum)]
    name: Name,
    /// Runs per program; the table shows medians.
    #[arg(long, default_value_t = 11)]
    pub runs: usize,
}

/// The benches.
#[derive(Clone, Copy, clap::ValueEnum)]
enum Name {
    /// From exec to the first byte of a tiny guest, and memory at that point, beside QEMU's microvm.
    Boot,
    /// Pages that a launch measures, and stage0's work and time in the guest.
    Launch,
    /// Launch digests of firmware images, beside sev-snp-measure, the sev crate and `openssl speed`.
    Measure,
    /// Commands, start and memory of vtpm-svc, beside swtpm.
    Vtpm,
}

/// Runs the chore.
pub fn run(args: &Args) -> Result<()> {
    match args.name {
        Name::Boot => boot::run(args),
        Name::Launch => launch::run(),
        Name::Measure => measure::run(args),
        Name::Vtpm => vtpm::run(args),
    }
}

/// The middle value; the mean of the two middle ones for an even number.
pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    match (sorted.get(sorted.len().saturating_sub(1) / 2), sorted.get(sorted.len() / 2)) {
        (Some(a), Some(b)) => (a + b) / 2.0,
        _ => f64::NAN,
    }
}

/// Milliseconds.
pub fn millis(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), 2.5);
        assert!(median(&[]).is_nan());
    }
}
