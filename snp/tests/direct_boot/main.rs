// SPDX-License-Identifier: Apache-2.0
//! The direct-boot image: what a guest finds in it, and what of it is launched and measured.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

mod guest;
mod plan;

use std::sync::Arc;

use snp::image::direct::DirectBoot;
use snp::image::direct::Guest;
use snp::image::direct::Snp;
use snp::image::direct::Validation;
use snp::image::kernel::Kernel;
use test_support::elf::Segment;
use test_support::elf::executable;
use test_support::kernels::small_bzimage;

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
const C_BIT: u8 = 51;

const SNP: Guest<'static> =
    Guest::Snp(Snp { c_bit: C_BIT, cpuid: None, validation: Validation::AllByLaunch, features: 0 });

fn bzimage() -> Kernel {
    Kernel::parse(small_bzimage(vec![7; 0x3000]).bytes()).unwrap()
}

fn vmlinux(notes: &[u8]) -> Kernel {
    let segments = [
        Segment { mem_len: 0x5000, ..Segment::new(0x100_0000, vec![1; 0x2800]) },
        Segment { mem_len: 0x40_0000, ..Segment::new(0x120_0000, vec![2; 0x10]) },
    ];
    Kernel::parse(executable(0x100_0040, &segments, &[], notes)).unwrap()
}

fn boot<'a>(kernel: &'a Kernel, guest: Guest<'a>) -> DirectBoot<'a> {
    DirectBoot {
        tpm: None,
        kernel,
        initrd: Some(Arc::new(vec![0x5a; 5000])),
        cmdline: "console=ttyS0",
        memory: 512 * MIB,
        vcpus: 2,
        guest,
    }
}
