// SPDX-License-Identifier: Apache-2.0
//! The `sev` crate as a program, for `cargo xtask bench measure`: prints the digest of a firmware file and a
//! vCPU count.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a bench's helper fails by panicking")]

use sev::measurement::snp::SnpMeasurementArgs;
use sev::measurement::snp::snp_calc_launch_digest;
use sev::measurement::vcpu_types::CpuType;
use sev::measurement::vmsa::GuestFeatures;
use sev::measurement::vmsa::VMMType;

fn main() {
    let mut args = std::env::args_os().skip(1);
    let (file, vcpus) = (args.next().unwrap(), args.next().unwrap());
    let digest = snp_calc_launch_digest(SnpMeasurementArgs {
        vcpus: vcpus.to_str().unwrap().parse().unwrap(),
        vcpu_type: CpuType::EpycMilan,
        ovmf_file: file.into(),
        guest_features: GuestFeatures(1),
        kernel_file: None,
        initrd_file: None,
        append: None,
        ovmf_hash_str: None,
        vmm_type: Some(VMMType::QEMU),
    });
    println!("{}", digest.unwrap().get_hex_ld());
}
