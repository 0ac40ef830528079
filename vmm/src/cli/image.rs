// SPDX-License-Identifier: Apache-2.0
//! The options that say what is booted, the same for running and for measuring.

use std::path::PathBuf;

use crate::spec::Accept;
use crate::spec::CMDLINE_DEFAULT;
use crate::spec::SnpSpec;
use crate::spec::VCPUS_MAX;
use crate::spec::Validation;
use crate::spec::text::parse_size;

/// Heading of the options about SNP guests.
pub const SNP: &str = "SNP guests";

/// What is booted; the same options for running and for measuring.
#[derive(clap::Args, Clone, Debug)]
pub struct ImageArgs {
    /// Kernel: a bzImage, or an ELF vmlinux
    #[arg(long, value_name = "FILE")]
    pub kernel: Option<PathBuf>,
    /// Initial RAM disk
    #[arg(long, value_name = "FILE")]
    pub initrd: Option<PathBuf>,
    /// Kernel command line
    #[arg(long, visible_alias = "append", value_name = "TEXT", default_value = CMDLINE_DEFAULT)]
    pub cmdline: String,
    /// Guest memory; units K, M, G, T
    #[arg(long, value_name = "SIZE", default_value = "512M", value_parser = parse_size)]
    pub memory: u64,
    /// Number of vCPUs, 1 to 16
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=i64::from(VCPUS_MAX)))]
    pub cpus: u32,
    /// Who makes an SNP guest's RAM usable; `launch` measures all of it, for tests
    #[arg(long, value_enum, default_value = "stage0", hide = true)]
    pub validation: Validation,
    /// Give an SNP guest a time stamp counter that the host cannot change; part of the launch digest. The
    /// guest needs Linux 6.14 or later, the host Linux 6.18 or later
    #[arg(long, help_heading = SNP)]
    pub secure_tsc: bool,
    /// How much of an SNP guest's memory is validated before its kernel runs; part of the launch digest
    /// [default: auto]
    #[arg(long, value_enum, help_heading = SNP)]
    pub accept: Option<Accept>,
}

impl ImageArgs {
    /// The part of an SNP guest's request that is in these options. `accept` as it was given, not its
    /// default.
    pub fn snp(&self) -> SnpSpec {
        SnpSpec {
            accept: self.accept,
            secure_tsc: self.secure_tsc,
            validation: self.validation,
            ..SnpSpec::default()
        }
    }
}
