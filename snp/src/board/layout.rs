// SPDX-License-Identifier: Apache-2.0
//! Where things are in a direct-boot guest's physical memory.
//!
//! Everything that the monitor builds lies below 640 KiB, and so does the free memory from which Linux takes its start-up
//! code for further vCPUs. RAM ends at 3 GiB and goes on at 4 GiB; the gap is for devices (virtio, IOAPIC, local APIC).

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
/// Registers of the local APICs.
pub const LOCAL_APIC: u32 = 0xfee0_0000;

/// Smallest guest memory in bytes.
pub const MEMORY_MIN: u64 = 128 << 20;

/// e820 types.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum E820Type {
    /// Usable memory.
    Ram = 1,
    /// Not to be touched by the memory management; Linux maps it shared.
    Reserved = 2,
    /// ACPI tables; Linux maps it private.
    Acpi = 3,
}

/// The guest's memory as ranges, ascending: one below the device gap, one above it if needed.
pub fn ram_ranges(memory: u64) -> Vec<Range<u64>> {
    let low = memory.min(HOLE_START);
    let high = HOLE_END..HOLE_END.saturating_add(memory - low);
    [0..low, high].into_iter().filter(|range| !range.is_empty()).collect()
}

/// The memory map that Linux gets, ascending and disjoint.
pub fn e820(memory: u64) -> Vec<(Range<u64>, E820Type)> {
    let mut map = vec![
        (0..RESERVED, E820Type::Ram),
        (RESERVED..ACPI, E820Type::Reserved),
        (ACPI..ACPI_END, E820Type::Acpi),
        (ACPI_END..HIGH_START, E820Type::Reserved),
    ];
    for range in ram_ranges(memory) {
        let start = if range.start == 0 { HIGH_START } else { range.start };
        map.push((start..range.end, E820Type::Ram));
    }
    map
}
