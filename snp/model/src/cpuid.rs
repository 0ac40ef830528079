// SPDX-License-Identifier: Apache-2.0
//! The CPUID table of a vCPU, as the monitor gives it to KVM, and how KVM looks a function up.

use snp::pages::cpuid_entry::CpuidEntry;

/// XCR0 bits 0 and 1 need no size beyond the legacy area and the header: 512 + 64 bytes.
const XSAVE_BASE: u32 = 576;
const XSAVE_FUNCTION: u32 = 0xd;

/// Result of CPUID.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs, reason = "register names")]
pub struct CpuidRegisters {
    pub eax: u32,
    pub ebx: u32,
    pub ecx: u32,
    pub edx: u32,
}

impl From<&CpuidEntry> for CpuidRegisters {
    fn from(e: &CpuidEntry) -> Self {
        CpuidRegisters { eax: e.eax, ebx: e.ebx, ecx: e.ecx, edx: e.edx }
    }
}

/// What CPUID of `function` and `index` gives; zeros for what is not in the table, as on AMD processors. With
/// `xcr0`, the size in function 0xD is that of the enabled components.
pub fn lookup(table: &[CpuidEntry], function: u32, index: u32, xcr0: Option<u64>) -> CpuidRegisters {
    let entry = table.iter().find(|e| e.function == function && (!e.indexed || e.index == index));
    let mut registers = entry.map_or(CpuidRegisters::default(), CpuidRegisters::from);
    if let (XSAVE_FUNCTION, 0, Some(xcr0), Some(_)) = (function, index, xcr0, entry) {
        registers.ebx = xsave_size(table, xcr0);
    }
    registers
}

/// Bytes of the non-compacted XSAVE area with the components of `xcr0`.
pub fn xsave_size(table: &[CpuidEntry], xcr0: u64) -> u32 {
    let components = table
        .iter()
        .filter(|e| e.function == XSAVE_FUNCTION && (2..64).contains(&e.index) && xcr0 >> e.index & 1 != 0);
    components.map(|e| e.eax.saturating_add(e.ebx)).fold(XSAVE_BASE, u32::max)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(function: u32, index: u32, eax: u32, ebx: u32) -> CpuidEntry {
        CpuidEntry { function, index, indexed: function == 0xd, eax, ebx, ..CpuidEntry::default() }
    }

    /// Sizes of an EPYC: AVX state has 256 bytes at offset 576.
    #[test]
    fn the_xsave_size_follows_xcr0() {
        let table = [entry(1, 0, 5, 0), entry(0xd, 0, 7, 0), entry(0xd, 2, 256, 576)];
        assert_eq!(lookup(&table, 0xd, 0, Some(3)).ebx, 576);
        assert_eq!(lookup(&table, 0xd, 0, Some(7)).ebx, 832);
        assert_eq!(lookup(&table, 1, 99, None).eax, 5);
        assert_eq!(lookup(&table, 0xd, 3, None), CpuidRegisters::default());
    }
}
