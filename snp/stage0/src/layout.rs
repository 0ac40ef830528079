// SPDX-License-Identifier: Apache-2.0
//! Where stage0 and what it works on lie in guest-physical memory.
//!
//! One list for the shim, its linker script and the plan builder, so that none can disagree. Everything lies below 1 MiB:
//! the shim's first page table maps only the first 2 MiB, and an emulated platform keeps one backing for the first 1 MiB.

/// Bytes of a page.
pub const PAGE: u64 = 0x1000;
/// Bytes of a large page.
pub const LARGE: u64 = 0x20_0000;

/// CPUID page, filled by the host and checked by the firmware.
pub const CPUID: u64 = 0x8_1000;
/// Secrets page, filled by the firmware. stage0 never touches it.
pub const SECRETS: u64 = 0x8_2000;
/// Measured inputs: memory ranges, items and their hashes. One page.
pub const INPUTS: u64 = 0x8_4000;
/// stage0's code and data, as linked.
pub const IMAGE: u64 = 0x8_5000;
/// End of the room for the image.
pub const IMAGE_END: u64 = 0x8_c000;
/// EFI system table, configuration table and memory map for lazy acceptance. Two pages, never given to Linux as RAM.
pub const EFI_TABLES: u64 = 0x8_d000;
/// End of the EFI tables.
pub const EFI_TABLES_END: u64 = 0x8_f000;
/// The page that stage0 shares with the host for its page-state changes; private again before the kernel runs.
pub const GHCB: u64 = 0x8_f000;
/// Start of the block that Linux must not use as RAM: launch pages, EFI tables, GHCB page.
pub const BLOCK: u64 = CPUID;
/// End of that block.
pub const BLOCK_END: u64 = 0x9_0000;

/// Scratch memory that stage0 validates first, for page tables and stack. Linux may use it as RAM afterwards.
pub const WORK: u64 = 0x6_0000;
/// End of the scratch memory; the stack grows down from here.
pub const WORK_END: u64 = 0x7_0000;
/// Table of unaccepted memory for lazy acceptance, in RAM that Linux reserves by itself.
pub const UNACCEPTED: u64 = 0x5_0000;
/// End of the room for that table: enough for 1 TiB of memory.
pub const UNACCEPTED_END: u64 = WORK;

/// Offset from a private address below 512 GiB to the shared view of the same memory.
pub const SHARED_VIEW: u64 = 1 << 39;
