// SPDX-License-Identifier: Apache-2.0
//! The emulated platform: SNP guests on an ordinary VM of any KVM host, for development and tests.
//!
//! `snp_model` holds the rules of KVM's SEV code, of the firmware and of the RMP; this module is the glue
//! that brings the guest's SNP instructions to it. The C-bit is an ordinary address bit ([`views`]); VMGEXIT,
//! PVALIDATE and RMPADJUST are overwritten in guest memory by port writes, which exit to the monitor
//! ([`vcpu`]).
//!
//! **It protects nothing**: no confidentiality, no integrity. Reports are signed by a key chain of its own,
//! which no verifier trusts by default.

mod keys;
mod options;
mod region;
mod registers;
mod sev;
mod shared;
mod statistics;
mod strict;
mod trial;
mod vcpu;
mod views;
mod vm;
mod wake;

use std::sync::Arc;
use std::sync::Mutex;

pub use keys::default_path as default_keys_path;
use kvm_bindings::kvm_cpuid_entry2;
pub use options::Backing;
pub use options::EmulatedOptions;
use options::POLICY_RULES;
use options::VMSA_FEATURES;
use shared::VmShared;
use snp::attest::cert_table::Kind;
use snp::pages::cpuid::SnpCpuid;
use snp::pages::cpuid_raw::DumpError;
use snp::pages::cpuid_raw::RawCpuid;
use snp_model::faults::Faults;
use snp_model::firmware::Platform as Firmware;
use snp_model::firmware::product::Processor;
use snp_model::patch::CodeHints;

pub use trial::EmulationTrial;
pub use trial::try_emulation;

use super::Platform;
use super::Vm;
use super::VmKind;
use super::kvm::KvmPlatform;
use super::kvm::KvmVm;
use super::kvm::OpenError;
use crate::cpuid;
use crate::events::Events;
use crate::lock::lock;
use crate::platform::error::CallError;
use snp::attest::cert_table;
use snp::policy::PolicyRules;

/// Highest position of the C-bit that is used: nested page tables of four levels translate 48 bits.
const C_BIT_MAX: u8 = 46;

/// Fewest physical address bits that leave one for the C-bit.
pub const ADDRESS_BITS_MIN: u32 = 36;

/// The platform on this host's KVM.
pub struct EmulatedPlatform {
    kvm: KvmPlatform,
    options: EmulatedOptions,
    sev: SnpCpuid,
    /// This host's own CPUID.
    host: RawCpuid,
    firmware: Arc<Firmware>,
    faults: Mutex<Faults>,
}

/// Why emulation is not possible here.
#[derive(Debug, thiserror::Error)]
pub enum EmulatedError {
    /// No KVM.
    #[error(transparent)]
    Kvm(#[from] OpenError),
    /// KVM does not say what CPUs it offers.
    #[error(transparent)]
    Cpuid(#[from] CallError),
    /// The data of a product cannot be read.
    #[error("CPUID of the product: {0}")]
    Product(#[from] DumpError),
    /// No attestation keys.
    #[error(transparent)]
    Keys(#[from] keys::KeysError),
    /// No address bit to spare.
    #[error(
        "this host's CPUs have {0} physical address bits, at least 36 are needed to set one apart as the C-bit"
    )]
    AddressBits(u32),
}

/// What an emulated guest's CPUID says about SEV, given what KVM offers.
pub fn snp_cpuid(offered: &[kvm_cpuid_entry2]) -> Result<SnpCpuid, EmulatedError> {
    let bits = address_bits(offered).unwrap_or(ADDRESS_BITS_MIN);
    if bits < ADDRESS_BITS_MIN {
        return Err(EmulatedError::AddressBits(bits));
    }
    // The top bit of what the guest thinks its address width is.
    let c_bit = (bits as u8 - 1).min(C_BIT_MAX);
    Ok(SnpCpuid { c_bit, phys_bits: Some(c_bit + 1), coherency_sfw_no: true })
}

/// Physical address bits of the CPUs that KVM offers; without leaf 0x80000008 an x86-64 CPU has 36.
pub fn address_bits(offered: &[kvm_cpuid_entry2]) -> Option<u32> {
    offered.iter().find(|e| e.function == 0x8000_0008).map(|e| e.eax & 0xff)
}

impl EmulatedPlatform {
    /// Opens this host's KVM and picks the C-bit.
    pub fn open(options: EmulatedOptions, events: &Events) -> Result<Self, EmulatedError> {
        let kvm = KvmPlatform::open()?;
        let offered = kvm.supported_cpuid()?;
        let sev = snp_cpuid(&offered)?;
        let host = kvm.raw_cpuid().unwrap_or_default();
        let mut processor = match options.product {
            Some(product) => Processor::of_product(product)?,
            None => Processor::of_host(host.clone())?,
        };
        // A guest picks errata and model-specific registers by the signature, and what it finds there is this
        // host's.
        processor.signature = offered.iter().find(|e| e.function == 1).map_or(0, |e| e.eax);
        processor.coherent = sev.coherency_sfw_no;
        let chain = keys::load_or_create(&options.keys, events)?;
        let firmware = Arc::new(Firmware { chain, c_bit: sev.c_bit, processor });
        Ok(EmulatedPlatform { kvm, options, sev, host, firmware, faults: Mutex::default() })
    }

    fn snp_vm(&self, inner: KvmVm, code: &CodeHints) -> Result<vm::EmulatedVm, CallError> {
        let firmware = Arc::clone(&self.firmware);
        let faults = std::mem::take(&mut *lock(&self.faults));
        let shared = VmShared::new(inner, self.options.clone(), firmware, code.clone(), faults)?;
        Ok(vm::EmulatedVm(Arc::new(shared)))
    }

    /// For tests: what goes wrong in the next SNP VM, and only in that. No option of the program leads here.
    pub fn inject(&self, faults: Faults) {
        *lock(&self.faults) = faults;
    }
}

impl Platform for EmulatedPlatform {
    fn supported_cpuid(&self) -> Result<Vec<kvm_cpuid_entry2>, CallError> {
        let offered = cpuid::from_kvm(&self.kvm.supported_cpuid()?);
        Ok(cpuid::to_kvm(&self.firmware.processor.offer(&offered, &self.host)))
    }

    fn raw_cpuid(&self) -> Option<RawCpuid> {
        Some(self.firmware.processor.raw.clone())
    }

    fn snp_cpuid(&self) -> SnpCpuid {
        self.sev
    }

    fn policy_rules(&self) -> PolicyRules {
        POLICY_RULES
    }

    fn vmsa_features(&self) -> u64 {
        VMSA_FEATURES
    }

    fn certificates(&self) -> Option<Arc<Vec<u8>>> {
        let chain = self.firmware.chain.certificates();
        let entries: [(Kind, &[u8]); 3] =
            [(Kind::VCEK, &chain.vcek), (Kind::ASK, &chain.ask), (Kind::ARK, &chain.ark)];
        Some(Arc::new(cert_table::encode(&entries)))
    }

    fn create_vm(&self, kind: VmKind, code: &CodeHints) -> Result<Arc<dyn Vm>, CallError> {
        let inner = self.kvm.create(VmKind::Plain)?;
        match kind {
            VmKind::Plain => Ok(Arc::new(inner)),
            VmKind::Snp => Ok(Arc::new(self.snp_vm(inner, code)?)),
        }
    }
}

#[cfg(test)]
#[path = "emulated/old_launch_test.rs"]
mod old_launch_test;
