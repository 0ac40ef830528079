// SPDX-License-Identifier: Apache-2.0
//! Direct boots of an SNP guest, with a kernel that is made up.

use std::sync::Arc;

use snp::digest::LaunchDigest;
use snp::digest::launch_digest;
use snp::image::direct::DirectBoot;
use snp::image::direct::DirectImage;
use snp::image::direct::Guest;
use snp::image::direct::Snp;
use snp::image::direct::Validation;
use snp::image::error::ImageError;
use snp::image::kernel::Kernel;
use snp::image::lazy::Acceptance;

use crate::kernels::BzImage;

/// What is booted; by default a small kernel in 128 MiB, through stage0.
#[derive(Clone, Debug)]
pub struct Boot {
    /// The kernel's file.
    pub kernel: Vec<u8>,
    /// The initial ramdisk.
    pub initrd: Vec<u8>,
    /// The kernel's command line.
    pub cmdline: &'static str,
    /// RAM in bytes.
    pub memory: u64,
    /// Number of vCPUs.
    pub vcpus: u32,
    /// Position of the C-bit.
    pub c_bit: u8,
    /// Who validates memory.
    pub validation: Validation,
}

impl Default for Boot {
    fn default() -> Self {
        Boot {
            kernel: kernel(64 << 10, 1 << 20).bytes(),
            initrd: vec![7; 10_000],
            cmdline: "console=ttyS0",
            memory: 128 << 20,
            vcpus: 1,
            c_bit: 51,
            validation: Validation::Stage0(Acceptance::Auto),
        }
    }
}

impl Boot {
    /// The image.
    pub fn image(&self) -> Result<DirectImage, ImageError> {
        let kernel = Kernel::parse(self.kernel.clone()).unwrap();
        let initrd = Some(Arc::new(self.initrd.clone()));
        let snp = Snp { c_bit: self.c_bit, cpuid: None, validation: self.validation, features: 0 };
        let (cmdline, memory, vcpus) = (self.cmdline, self.memory, self.vcpus);
        DirectBoot { kernel: &kernel, initrd, cmdline, memory, vcpus, tpm: None, guest: Guest::Snp(snp) }
            .image()
    }

    /// The digest of its launch.
    pub fn digest(&self) -> LaunchDigest {
        launch_digest(&self.image().unwrap().plan).unwrap()
    }
}

/// A kernel whose protected-mode part has `len` bytes and works in `init_size`.
pub fn kernel(len: usize, init_size: u32) -> BzImage {
    let body: Vec<u8> = (0..len).map(|i| (i % 251) as u8).collect();
    BzImage::around(&body, init_size)
}
