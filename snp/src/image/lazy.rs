// SPDX-License-Identifier: Apache-2.0
//! Lazy acceptance: whether a kernel can validate memory by itself, and what stage0 validates for it
//! beforehand.
//!
//! Linux learns of unaccepted memory by an EFI table (`stage0::efi`). Kernels before 6.6 do not know it and
//! would die at their first touch of memory that nobody validated, so support is looked up in the kernel's
//! file, never assumed.

use std::ops::Range;

use super::kernel::Kernel;
use crate::board::layout;
use crate::stage0::efi::BITMAP;
use crate::stage0::efi::UNACCEPTED_GUID;
use crate::stage0::layout as stage0;
use crate::stage0::layout::LARGE;

/// Memory above which lazy acceptance pays: smaller guests end almost fully accepted anyway.
pub const AUTO_ABOVE: u64 = 2 << 30;
/// Largest guest memory for which the table of unaccepted memory has bits: one for each 2 MiB, the device gap
/// included.
pub const MEMORY_MAX: u64 = (stage0::UNACCEPTED_END - stage0::UNACCEPTED - BITMAP as u64) / 8 * 64 * LARGE
    - (layout::HOLE_END - layout::HOLE_START);
/// Where the decompressor may place the kernel: it would accept other memory page by page.
const KASLR_WINDOW: Range<u64> = 16 << 20..(16 + 256) << 20;
/// What Linux wants to be told when there are EFI tables and no EFI: an early message and a leak warning
/// fewer.
pub const CMDLINE: &str = "efi=noruntime";

/// How much memory stage0 validates.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Acceptance {
    /// All of it.
    Eager,
    /// What the kernel needs to start; the kernel does the rest.
    Lazy,
    /// Lazy for more than 2 GiB with a kernel that can do it.
    #[default]
    Auto,
}

impl Acceptance {
    /// Whether to be lazy with this kernel and this much memory. `None`: asked for, but the kernel cannot do
    /// it.
    pub fn resolve(self, kernel: &Kernel, memory: u64) -> Option<bool> {
        match self {
            Acceptance::Eager => Some(false),
            Acceptance::Lazy => knows_unaccepted_memory(kernel).then_some(true),
            Acceptance::Auto => {
                let pays = memory > AUTO_ABOVE && memory <= MEMORY_MAX;
                Some(pays && knows_unaccepted_memory(kernel))
            }
        }
    }
}

/// Whether the kernel looks for the table. A bzImage's decompressor has to know it as well as the kernel
/// inside; it compares the GUID in two halves, which are in its code.
pub fn knows_unaccepted_memory(kernel: &Kernel) -> bool {
    let (first, second) = UNACCEPTED_GUID.split_at(8);
    match kernel {
        Kernel::Elf(elf) => contains(&elf.file, &UNACCEPTED_GUID),
        Kernel::BzImage(bz) => {
            let parts = [bz.body.start..bz.payload.start, bz.payload.end..bz.body.end];
            [first, second].iter().all(|half| {
                parts.iter().any(|part| bz.file.get(part.clone()).is_some_and(|code| contains(code, half)))
            })
        }
    }
}

fn contains(haystack: &[u8], needle: &[u8]) -> bool {
    haystack.windows(needle.len()).any(|window| window == needle)
}

/// What stage0 has to validate, staging memory aside: low memory, the kernel's surroundings and places, the
/// initrd, a unit after each (Linux reads words across the end), and the parts of RAM that are no whole
/// units.
pub fn accepted(kernel: &Range<u64>, initrd: &Range<u64>, ram: &[Range<u64>]) -> Vec<Range<u64>> {
    let guarded = |range: &Range<u64>| range.start..range.end.next_multiple_of(LARGE) + LARGE;
    let mut accepted = vec![0..LARGE, KASLR_WINDOW, guarded(kernel)];
    if !initrd.is_empty() {
        accepted.push(guarded(initrd));
    }
    let edge = |end: u64| (!end.is_multiple_of(LARGE)).then_some(end & !(LARGE - 1)..end);
    accepted.extend(ram.iter().filter_map(|range| edge(range.end)));
    accepted
}
