// SPDX-License-Identifier: Apache-2.0
//! A Linux bzImage: boot protocol 2.12 or later (the first with `xloadflags`), Linux
//! `Documentation/arch/x86/boot.rst`.

use std::ops::Range;
use std::sync::Arc;

use super::error::KernelError;
use super::fields::Fields;
use super::fields::LOWEST_LOAD_ADDRESS;
use super::fields::require;
use crate::plan::PAGE_SIZE;

/// Offset of a bzImage's 64-bit entry point from its load address.
pub const ENTRY_64: u64 = 0x200;
/// Offset of the setup header in a bzImage and in `boot_params`.
pub const SETUP_HEADER: usize = 0x1f1;
/// `boot_params` has other fields from here on, so a setup header cannot reach further.
const SETUP_HEADER_LIMIT: usize = 0x290;
/// Oldest boot protocol that announces a 64-bit entry point (`xloadflags`).
const OLDEST_PROTOCOL: u16 = 0x20c;
/// `xloadflags`: there is a 64-bit entry point at 0x200.
const XLF_KERNEL_64: u16 = 1;
/// `loadflags`: the protected-mode part is loaded at 1 MiB or above.
const LOADED_HIGH: u8 = 1;

/// A bzImage, as far as a 64-bit boot loader has to know it.
#[derive(Clone, Debug)]
pub struct BzImage {
    /// The whole file.
    pub file: Arc<Vec<u8>>,
    /// Setup header in the file; the same offsets in `boot_params`.
    pub setup_header: Range<usize>,
    /// Protected-mode part in the file: what gets loaded.
    pub body: Range<usize>,
    /// Compressed kernel in the file, inside `body`.
    pub payload: Range<usize>,
    /// Preferred load address, a multiple of 4 KiB.
    pub pref_address: u64,
    /// Bytes from the load address that the decompressor works in.
    pub init_size: u64,
    /// Longest command line in bytes, without the final zero.
    pub cmdline_max: u32,
    /// Highest address that the initrd may occupy.
    pub initrd_addr_max: u64,
}

/// Refuses a kernel that does not start as we start it.
fn check_protocol(f: &Fields<'_>) -> Result<(), KernelError> {
    let boot_flag = f.u16("boot_flag", 0x1fe)?;
    require(boot_flag == 0xaa55, "boot_flag", 0x1fe, boot_flag, "0xaa55")?;
    let version = f.u16("version", 0x206)?;
    let expected = "0x20c (Linux 3.8) or later";
    require(version >= OLDEST_PROTOCOL, "version (boot protocol)", 0x206, version, expected)?;
    let loadflags = f.u8("loadflags", 0x211)?;
    require(loadflags & LOADED_HIGH != 0, "loadflags", 0x211, loadflags, "LOADED_HIGH (bit 0) set")?;
    let xloadflags = f.u16("xloadflags", 0x236)?;
    let expected = "XLF_KERNEL_64 (bit 0) set: only kernels with a 64-bit entry point boot here";
    require(xloadflags & XLF_KERNEL_64 != 0, "xloadflags", 0x236, xloadflags, expected)
}

/// The setup header in the file.
fn setup_header(f: &Fields<'_>) -> Result<Range<usize>, KernelError> {
    let end = 0x202 + usize::from(f.u8("jump over the setup header", 0x201)?);
    let fits = (0x268..=SETUP_HEADER_LIMIT).contains(&end);
    require(fits, "end of the setup header", 0x201, end as u64, "0x268 to 0x290")?;
    f.bytes::<1>("setup header", end - 1)?;
    Ok(SETUP_HEADER..end)
}

/// The protected-mode part in the file.
fn body(f: &Fields<'_>) -> Result<Range<usize>, KernelError> {
    let sectors = match f.u8("setup_sects", 0x1f1)? {
        0 => 4,
        n => usize::from(n),
    };
    let start = (sectors + 1) * 512;
    let len = u64::from(f.u32("syssize", 0x1f4)?) * 16;
    require(len > 0x200, "syssize", 0x1f4, len / 16, "more than the 0x200 bytes before the entry point")?;
    let (needed, found) = (start as u64 + len, f.0.len() as u64);
    if needed > found {
        return Err(KernelError::Truncated { what: "the protected-mode part", needed, found });
    }
    // The end is at most the length of a buffer in memory, so it fits.
    Ok(start..start + len as usize)
}

/// The compressed kernel in the file, inside `body`.
fn payload(f: &Fields<'_>, body: &Range<usize>) -> Result<Range<usize>, KernelError> {
    let offset = u64::from(f.u32("payload_offset", 0x248)?);
    let length = u64::from(f.u32("payload_length", 0x24c)?);
    require(
        length >= 4 && offset + length <= body.len() as u64,
        "payload_offset + payload_length",
        0x248,
        offset + length,
        "a payload inside the protected-mode part",
    )?;
    Ok(body.start + offset as usize..body.start + (offset + length) as usize)
}

/// Where the kernel wants to be loaded.
fn pref_address(f: &Fields<'_>) -> Result<u64, KernelError> {
    let found = f.u64("pref_address", 0x258)?;
    let good = (LOWEST_LOAD_ADDRESS..1 << 32).contains(&found) && found.is_multiple_of(PAGE_SIZE);
    require(good, "pref_address", 0x258, found, "a multiple of 4 KiB from 1 MiB to 4 GiB")?;
    Ok(found)
}

impl BzImage {
    pub(super) fn parse(file: Arc<Vec<u8>>) -> Result<BzImage, KernelError> {
        let f = Fields(&file);
        check_protocol(&f)?;
        let setup_header = setup_header(&f)?;
        let body = body(&f)?;
        let payload = payload(&f, &body)?;
        let pref_address = pref_address(&f)?;
        let init_size = u64::from(f.u32("init_size", 0x260)?);
        let cmdline_max = f.u32("cmdline_size", 0x238)?;
        let initrd_addr_max = u64::from(f.u32("initrd_addr_max", 0x22c)?);
        Ok(BzImage {
            setup_header,
            body,
            payload,
            pref_address,
            init_size,
            cmdline_max,
            initrd_addr_max,
            file,
        })
    }

    /// The bytes that get loaded at `pref_address`.
    pub fn body(&self) -> &[u8] {
        &self.file[self.body.clone()]
    }
}
