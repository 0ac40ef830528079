// SPDX-License-Identifier: Apache-2.0
//! The firmware of the secure processor: launch contexts, special pages, guest messages, reports.
//!
//! SEV-SNP Firmware ABI Specification (AMD 56860), revision 1.58. A [`Platform`] is what a host has once, a
//! [`context::GuestContext`] what the firmware keeps for one guest.

pub mod context;
pub mod cpuid_page;
pub mod id_block;
pub mod identity;
pub mod message;
pub mod product;
pub mod requests;

use crate::chain::Chain;
use crate::firmware::product::Processor;

/// Firmware version that the model claims: build, minor, major. A guest policy may ask for this ABI version
/// at most.
pub const FIRMWARE_VERSION: [u8; 3] = [21, 55, 1];
/// CPUID family, model and stepping in reports: those of Milan, whose TCB layout [`super::chain::Tcb`] has.
pub const REPORT_CPUID: [u8; 3] = [0x19, 0x01, 0x01];
/// `platform_info` in reports: SMT is on.
pub const PLATFORM_INFO: u64 = 1;

/// What the firmware knows about its host.
#[derive(Debug)]
pub struct Platform {
    /// Keys and certificates.
    pub chain: Chain,
    /// Position of the C-bit.
    pub c_bit: u8,
    /// The processors, with which CPUID pages are compared.
    pub processor: Processor,
}

#[cfg(test)]
pub(crate) mod testing {
    //! The platform of the model's tests: Genoa, C-bit 39, small RSA keys.

    use std::sync::Arc;
    use std::sync::OnceLock;

    use super::*;

    pub fn platform() -> Arc<Platform> {
        static PLATFORM: OnceLock<Arc<Platform>> = OnceLock::new();
        let make = || {
            let chain = Chain::generate_with_rsa_bits(&mut rand_core::OsRng, 2048).unwrap();
            let processor = product::Processor::of_product(snp::attest::tcb::Product::Genoa).unwrap();
            Arc::new(Platform { chain, c_bit: 39, processor })
        };
        Arc::clone(PLATFORM.get_or_init(make))
    }
}
