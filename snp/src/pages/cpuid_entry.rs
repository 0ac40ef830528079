// SPDX-License-Identifier: Apache-2.0
//! One answer of the CPUID instruction.

use std::fmt;

/// A register of an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "register names")]
pub enum Register {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

impl fmt::Display for Register {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Register::Eax => "EAX",
            Register::Ebx => "EBX",
            Register::Ecx => "ECX",
            Register::Edx => "EDX",
        })
    }
}

/// One leaf and its answer, the way `KVM_SET_CPUID2` takes it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CpuidEntry {
    /// Leaf.
    pub function: u32,
    /// Sub-leaf.
    pub index: u32,
    /// The answer depends on the sub-leaf (`KVM_CPUID_FLAG_SIGNIFCANT_INDEX`).
    pub indexed: bool,
    /// Answer.
    pub eax: u32,
    /// Answer.
    pub ebx: u32,
    /// Answer.
    pub ecx: u32,
    /// Answer.
    pub edx: u32,
}

impl CpuidEntry {
    pub(super) fn is_empty(&self) -> bool {
        self.eax | self.ebx | self.ecx | self.edx == 0
    }

    /// One register of the answer.
    pub fn register_mut(&mut self, register: Register) -> &mut u32 {
        match register {
            Register::Eax => &mut self.eax,
            Register::Ebx => &mut self.ebx,
            Register::Ecx => &mut self.ecx,
            Register::Edx => &mut self.edx,
        }
    }
}

impl fmt::Display for CpuidEntry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.function)?;
        if self.indexed { write!(f, ".{:#x}", self.index) } else { Ok(()) }
    }
}
