// SPDX-License-Identifier: Apache-2.0
//! Firmware files at random.

use proptest::prelude::*;
use test_support::firmware::CPUID;
use test_support::firmware::Firmware;
use test_support::firmware::KERNEL_HASHES;
use test_support::firmware::PAGE;
use test_support::firmware::SEC_MEM;
use test_support::firmware::SECRETS;
use test_support::firmware::SVSM_CAA;

/// Firmware with random sections that do not overlap, all low in memory, and at most one page for hashes.
pub fn any_firmware() -> impl Strategy<Value = Firmware> {
    let section = (0u32..4, 1u32..5, prop_oneof![Just(SEC_MEM), Just(SECRETS), Just(CPUID), Just(SVSM_CAA)]);
    (
        1usize..40,
        any::<u64>(),
        proptest::collection::vec(section, 0..12),
        proptest::option::of((0u32..12, 0u32..0x1000 - 176)),
        0x1000u32..0xffff_fff0,
        any::<u64>(),
    )
        .prop_map(|(pages, seed, gaps, hashes, reset_eip, order)| {
            let mut next = 0x80_0000;
            let mut sections = Vec::new();
            for (gap, pages, kind) in gaps {
                let pages = if kind == SECRETS || kind == CPUID { 1 } else { pages };
                next += gap * PAGE;
                sections.push((next, pages * PAGE, kind));
                next += pages * PAGE;
            }
            // File order is the launch order and need not be the order of addresses.
            let mut x = order | 1;
            for i in (1..sections.len()).rev() {
                x = x.wrapping_mul(6364136223846793005).wrapping_add(1);
                sections.swap(i, (x >> 33) as usize % (i + 1));
            }
            let mut hashes_base = 0;
            if let Some((place, offset)) = hashes {
                let place = (place as usize).min(sections.len());
                sections.insert(place, (next, PAGE, KERNEL_HASHES));
                hashes_base = next + offset;
            }
            Firmware { pages, seed, sections, reset_eip, hashes_base, svsm_entry: 0x40 }
        })
}
