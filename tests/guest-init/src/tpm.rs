// SPDX-License-Identifier: Apache-2.0
//! What a guest without any tool can say about its TPM: the kernel's files, and one command.

use std::fs;
use std::fs::OpenOptions;
use std::io::Read;
use std::io::Write;

use anyhow::Context;
use anyhow::Result;
use anyhow::ensure;
use rustix::mount::MountFlags;

use crate::console::hex;
use crate::pid1;

/// The TPM, each user with objects of his own.
const DEVICE: &str = "/dev/tpmrm0";
/// What the kernel says about it.
const FILES: &str = "/sys/class/tpm/tpm0";
/// PCRs of firmware, boot loader and operating system.
const PCRS: std::ops::RangeInclusive<u8> = 0..=15;
/// Bytes that are asked for.
const RANDOM: u16 = 16;
/// `TPM2_GetRandom` of [`RANDOM`] bytes (TPM 2.0 Library, Part 3, 16.1): no sessions, 12 bytes, code 0x17b.
const GET_RANDOM: [u8; 12] = [0x80, 0x01, 0, 0, 0, 12, 0, 0, 0x01, 0x7b, 0, RANDOM as u8];

/// Prints `tpm_version`, a `tpm_pcr INDEX HEX` for each PCR of firmware, boot loader and system (SHA-256),
/// `tpm_log HEX` and `tpm_random HEX`.
pub fn show() -> Result<()> {
    let read = |path: String| fs::read_to_string(&path).context(path);
    println!("cvmm-guest: tpm_version {}", read(format!("{FILES}/tpm_version_major"))?.trim());
    for pcr in PCRS {
        let value = read(format!("{FILES}/pcr-sha256/{pcr}"))?;
        println!("cvmm-guest: tpm_pcr {pcr} {}", value.trim().to_lowercase());
    }
    let security = "/sys/kernel/security";
    pid1::mount_at("securityfs", security, "securityfs", MountFlags::empty(), "")?;
    let log = format!("{security}/tpm0/binary_bios_measurements");
    println!("cvmm-guest: tpm_log {}", hex(&fs::read(&log).context(log)?));
    println!("cvmm-guest: tpm_random {}", hex(&random()?));
    Ok(())
}

fn random() -> Result<Vec<u8>> {
    let mut device = OpenOptions::new().read(true).write(true).open(DEVICE).context(DEVICE)?;
    device.write_all(&GET_RANDOM).context("a command to the TPM")?;
    let mut answer = [0; 64];
    let length = device.read(&mut answer).context("the TPM's answer")?;
    let answer = answer.get(..length).unwrap_or_default();
    // Tag, size and response code; then the bytes' own size.
    let code = answer.get(6..10).context("the TPM's answer has no header")?;
    ensure!(code == [0; 4], "the TPM answers TPM2_GetRandom with {}", hex(code));
    let bytes = answer.get(12..).unwrap_or_default();
    ensure!(bytes.len() == usize::from(RANDOM), "the TPM gave {} random bytes", bytes.len());
    Ok(bytes.to_vec())
}
