// SPDX-License-Identifier: Apache-2.0
//! Where things are in a guest's physical memory: what a direct boot puts there, and the device gap.
//!
//! Everything that the monitor builds lies below 640 KiB, and so does the free memory from which Linux takes
//! its start-up code for further vCPUs. RAM ends at 3 GiB and goes on at 4 GiB; the gap is for devices and
//! firmware.

use std::ops::Range;

/// `boot_params`, or the start info of a PVH guest. One page.
pub const BOOT_PARAMS: u64 = 0x7000;
/// Global descriptor table and the halt loop of the vCPUs that wait. One page.
pub const GDT: u64 = 0x8000;
/// First page table; six pages.
pub const PAGE_TABLES: u64 = 0x9000;
/// Command line, up to the 64 KiB that follow.
pub const CMDLINE: u64 = 0x2_0000;
/// Longest command line that fits there, without the final zero.
pub const CMDLINE_LIMIT: u32 = 0xffff;
/// Start of what Linux must not use as RAM.
pub const RESERVED: u64 = 0x8_0000;
/// Confidential-computing blob. One page.
pub const CC_BLOB: u64 = 0x8_0000;
/// CPUID page.
pub const CPUID: u64 = 0x8_1000;
/// Secrets page.
pub const SECRETS: u64 = 0x8_2000;
/// `setup_data` that points to the blob. One page.
pub const SETUP_DATA: u64 = 0x8_3000;
/// ACPI tables, 64 KiB. The root pointer comes first.
pub const ACPI: u64 = 0x9_0000;
/// End of the room for ACPI tables, and of low RAM.
pub const ACPI_END: u64 = 0xa_0000;
/// Where RAM goes on after the legacy region.
pub const HIGH_START: u64 = 0x10_0000;
/// Start of the device gap.
pub const HOLE_START: u64 = 3 << 30;
/// End of the device gap.
pub const HOLE_END: u64 = 4 << 30;
/// Registers of the IOAPIC.
pub const IOAPIC: u32 = 0xfec0_0000;
/// Registers of the TPM, where every driver expects locality 0. One page.
pub const TPM_REGISTERS: u32 = 0xfed4_0000;
/// Registers of the TPM's physical-presence interface: beyond the pages of localities 1 to 4, which guests
/// take for themselves. One page.
pub const TPM_PRESENCE: u32 = 0xfed4_5000;
/// The TPM's buffer for commands and responses. One page.
pub const TPM_BUFFER: u32 = 0xfed4_6000;
/// Registers of the local APICs.
pub const LOCAL_APIC: u32 = 0xfee0_0000;
/// Kept free for firmware, which ends where the gap does.
pub const FIRMWARE: Range<u64> = 0xffc0_0000..HOLE_END;

/// Smallest guest memory in bytes.
pub const MEMORY_MIN: u64 = 128 << 20;
