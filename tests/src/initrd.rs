// SPDX-License-Identifier: Apache-2.0
//! Builds the initial ramdisks of test guests: one static program and the kernel modules it needs.

use std::fs;
use std::path::Path;

use anyhow::Context;
use anyhow::Result;
use guest_init::pid1::MODULE_LIST;

use crate::cpio::Archive;
use crate::kernels::Kernel;
use crate::modules::Modules;

/// What L1 needs under QEMU: its transports, the shared file system, and KVM for the AMD CPU that it has
/// there.
pub const L1_MODULES: &[&str] = &["virtio_pci", "virtio_console", "9pnet_virtio", "9p", "kvm_amd"];

/// What L1 needs under Bochs: the CD, a writable layer above it, and KVM for an Intel CPU.
pub const INTEL_L1_MODULES: &[&str] = &["ata_piix", "sr_mod", "isofs", "overlay", "kvm_intel"];

/// What `/dev/sev-guest` needs: the crypto algorithms are asked for by name at run time, so they are no
/// dependency that the module itself declares.
pub const SEV_GUEST_MODULES: &[&str] = &["ctr", "gcm", "ghash_generic", "crypto_null", "sev_guest"];

/// Builds an archive with `init` as `/init` and those of `modules` that exist in `kernel`, in load order.
pub fn build(kernel: &Kernel, init: &Path, modules: &[&str]) -> Result<Vec<u8>> {
    let available = Modules::of(kernel)?;
    let wanted: Vec<&str> = modules.iter().copied().filter(|name| available.has(name)).collect();
    let program = fs::read(init).with_context(|| format!("cannot read {}", init.display()))?;

    let mut archive = Archive::default();
    for directory in ["dev", "proc", "sys", "modules"] {
        archive.directory(directory);
    }
    archive.device("dev/console", 5, 1);
    archive.file("init", &program);
    let mut list = String::new();
    for module in available.with_dependencies(&wanted)? {
        let path = format!("/modules/{}.ko", module.name);
        archive.file(&path, &module.object);
        list += &format!("{path}\n");
    }
    archive.file(MODULE_LIST, list.as_bytes());
    Ok(archive.finish())
}
