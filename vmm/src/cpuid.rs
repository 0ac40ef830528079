// SPDX-License-Identifier: Apache-2.0
//! Between KVM's CPUID entries and the project's own.

use kvm_bindings::KVM_CPUID_FLAG_SIGNIFCANT_INDEX;
use kvm_bindings::kvm_cpuid_entry2;
use snp::pages::cpuid_entry::CpuidEntry;

/// From what `KVM_GET_SUPPORTED_CPUID` says.
pub fn from_kvm(entries: &[kvm_cpuid_entry2]) -> Vec<CpuidEntry> {
    let entry = |e: &kvm_cpuid_entry2| CpuidEntry {
        function: e.function,
        index: e.index,
        indexed: e.flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX != 0,
        eax: e.eax,
        ebx: e.ebx,
        ecx: e.ecx,
        edx: e.edx,
    };
    entries.iter().map(entry).collect()
}

/// To what `KVM_SET_CPUID2` takes.
pub fn to_kvm(entries: &[CpuidEntry]) -> Vec<kvm_cpuid_entry2> {
    let entry = |e: &CpuidEntry| kvm_cpuid_entry2 {
        function: e.function,
        index: e.index,
        flags: if e.indexed { KVM_CPUID_FLAG_SIGNIFCANT_INDEX } else { 0 },
        eax: e.eax,
        ebx: e.ebx,
        ecx: e.ecx,
        edx: e.edx,
        ..Default::default()
    };
    entries.iter().map(entry).collect()
}
