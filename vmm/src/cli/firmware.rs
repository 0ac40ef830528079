// SPDX-License-Identifier: Apache-2.0
//! The options that name firmware and IGVM files, the same for running and for measuring.

use std::path::PathBuf;

use snp::image::vcpu_model;

use super::image::ImageArgs;
use crate::spec::BootSpec;
use crate::spec::FirmwareSpec;
use crate::spec::IgvmSpec;
use crate::spec::KernelSpec;
use crate::spec::ZeroPages;
use crate::spec::text::parse_features;

/// Which file is launched or measured in place of direct boot.
#[derive(clap::Args, Clone, Debug)]
pub struct FirmwareArgs {
    /// OVMF firmware with SEV metadata, in place of direct boot; a --kernel is then measured by its hash
    #[arg(long, visible_alias = "ovmf", value_name = "FILE", conflicts_with_all = ["igvm", "accept", "secure_tsc"])]
    pub firmware: Option<PathBuf>,
    /// IGVM file, in place of direct boot
    #[arg(long, value_name = "FILE", conflicts_with_all = ["kernel", "initrd", "accept", "secure_tsc"])]
    pub igvm: Option<PathBuf>,
    /// How pages without data in an IGVM file are launched
    #[arg(long, value_enum, requires = "igvm")]
    zero_pages: Option<ZeroPages>,
    /// vCPU model of a firmware launch, as a name (EPYC-Milan) or a CPUID signature (0xa00f11): RDX of every
    /// vCPU, so part of the digest. A launch takes the host's if this is left out
    #[arg(long, visible_alias = "vcpu-type", value_name = "MODEL", conflicts_with = "igvm", value_parser = |text: &str| vcpu_model::parse(text))]
    pub vcpu_model: Option<u32>,
    /// The complete sev_features of a firmware launch
    #[arg(long, value_name = "BITS", conflicts_with = "igvm", default_value = "0x1", value_parser = parse_features)]
    pub guest_features: u64,
}

impl FirmwareArgs {
    /// What is booted; `None` if nothing is named.
    pub fn boot(&self, image: &ImageArgs) -> Option<BootSpec> {
        let kernel = image.kernel.as_ref().map(|kernel| KernelSpec {
            kernel: kernel.clone(),
            initrd: image.initrd.clone(),
            cmdline: image.cmdline.clone(),
        });
        match (&self.firmware, &self.igvm) {
            (Some(file), _) => Some(BootSpec::Firmware(FirmwareSpec {
                image: file.clone(),
                kernel,
                vcpu_model: self.vcpu_model,
                guest_features: self.guest_features,
            })),
            (None, Some(file)) => Some(BootSpec::Igvm(IgvmSpec {
                image: file.clone(),
                cmdline: image.cmdline.clone(),
                zero_pages: self.zero_pages.unwrap_or_default(),
            })),
            (None, None) => kernel.map(BootSpec::Direct),
        }
    }
}
