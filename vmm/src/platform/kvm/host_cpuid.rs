// SPDX-License-Identifier: Apache-2.0
//! What this host's CPU itself answers to CPUID, and rows of CPUID as text that can be recorded and compared.
//!
//! KVM's table has bits that the CPU lacks and lacks bits that it has; the SNP firmware compares a guest's
//! CPUID page with the CPU (SEV-SNP Firmware ABI 1.58, section 8.17.2.6). So whoever asks why a page was
//! refused needs both.

use std::fmt;
use std::str::FromStr;

use serde::Deserialize;
use serde::Serialize;
use snp::pages::cpuid::PageEntry;
use snp::pages::cpuid_entry::CpuidEntry;
use snp::pages::cpuid_raw::RawCpuid;

/// One leaf and its answer. Its text is six hexadecimal numbers: leaf, sub-leaf, EAX, EBX, ECX, EDX.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct CpuidRow {
    /// Leaf.
    pub leaf: u32,
    /// Sub-leaf, 0 where the leaf has none.
    pub subleaf: u32,
    /// EAX to EDX.
    pub registers: [u32; 4],
}

impl fmt::Display for CpuidRow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:08x} {:02x}", self.leaf, self.subleaf)?;
        self.registers.iter().try_for_each(|register| write!(f, " {register:08x}"))
    }
}

impl From<CpuidRow> for String {
    fn from(row: CpuidRow) -> String {
        row.to_string()
    }
}

/// A text that is no row.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a row of CPUID: {0:?}; expected six hexadecimal numbers")]
pub struct NotARow(String);

impl FromStr for CpuidRow {
    type Err = NotARow;

    fn from_str(text: &str) -> Result<Self, NotARow> {
        let wrong = || NotARow(text.to_owned());
        let numbers: Vec<u32> = text
            .split_whitespace()
            .map(|word| u32::from_str_radix(word, 16).map_err(|_| wrong()))
            .collect::<Result<_, _>>()?;
        match numbers[..] {
            [leaf, subleaf, eax, ebx, ecx, edx] => {
                Ok(CpuidRow { leaf, subleaf, registers: [eax, ebx, ecx, edx] })
            }
            _ => Err(wrong()),
        }
    }
}

impl TryFrom<String> for CpuidRow {
    type Error = NotARow;

    fn try_from(text: String) -> Result<Self, NotARow> {
        text.parse()
    }
}

impl From<&CpuidEntry> for CpuidRow {
    fn from(e: &CpuidEntry) -> Self {
        CpuidRow { leaf: e.function, subleaf: e.index, registers: [e.eax, e.ebx, e.ecx, e.edx] }
    }
}

impl From<&PageEntry> for CpuidRow {
    fn from(e: &PageEntry) -> Self {
        CpuidRow { leaf: e.eax_in, subleaf: e.ecx_in, registers: [e.eax, e.ebx, e.ecx, e.edx] }
    }
}

/// What the CPUID instruction gives on the CPU that this runs on.
pub fn host_cpuid() -> RawCpuid {
    RawCpuid::read(|leaf, subleaf| {
        let r = std::arch::x86_64::__cpuid_count(leaf, subleaf);
        [r.eax, r.ebx, r.ecx, r.edx]
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_text_and_back() {
        let row = CpuidRow { leaf: 0x8000_001d, subleaf: 3, registers: [0xbc163, 0x3c0_003f, 0x7fff, 6] };
        assert_eq!(row.to_string(), "8000001d 03 000bc163 03c0003f 00007fff 00000006");
        assert_eq!(row.to_string().parse(), Ok(row));
        for wrong in ["", "1 2 3 4 5", "1 2 3 4 5 6 7", "1 2 3 4 5 x", "100000000 0 0 0 0 0"] {
            assert!(wrong.parse::<CpuidRow>().is_err(), "{wrong:?}");
        }
    }
}
