// SPDX-License-Identifier: Apache-2.0
//! What this host's CPU itself answers to CPUID, leaf by leaf, as rows that can be recorded and compared.
//!
//! KVM's table has bits that the CPU lacks and lacks bits that it has; the SNP firmware compares a guest's CPUID page with
//! the CPU (SEV-SNP Firmware ABI 1.58, section 8.17.2.6). So whoever asks why a page was refused needs both. Nothing that
//! guests get is made from these rows.

use std::fmt;
use std::str::FromStr;

use serde::Deserialize;
use serde::Serialize;
use snp::pages::cpuid::CpuidEntry;
use snp::pages::cpuid::PageEntry;

/// Most sub-leaves of a leaf that are asked for; XSAVE has one for each of 64 state components.
const SUBLEAVES: u32 = 64;
/// Most leaves of a range; real CPUs have about 40.
const LEAVES: u32 = 0x100;
/// Where the ranges begin: the CPU's own leaves, a hypervisor's, AMD's.
const RANGES: [u32; 3] = [0, 0x4000_0000, 0x8000_0000];
/// Leaf 1, ECX: there is a hypervisor, and so its range of leaves.
const HYPERVISOR: u32 = 1 << 31;

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

/// The rows of the CPU that this runs on.
pub fn host_cpuid() -> Vec<CpuidRow> {
    walk(|leaf, subleaf| {
        let r = std::arch::x86_64::__cpuid_count(leaf, subleaf);
        [r.eax, r.ebx, r.ecx, r.edx]
    })
}

/// Every leaf that `ask` says it has. Answers that are zero throughout are left out.
pub fn walk(ask: impl Fn(u32, u32) -> [u32; 4]) -> Vec<CpuidRow> {
    let mut rows = Vec::new();
    for first in RANGES {
        if first == 0x4000_0000 && ask(1, 0)[2] & HYPERVISOR == 0 {
            continue;
        }
        let last = ask(first, 0)[0];
        // A range that is not there answers with something else's values.
        if last < first || last - first >= LEAVES {
            continue;
        }
        for leaf in first..=last {
            for subleaf in 0..SUBLEAVES {
                let registers = ask(leaf, subleaf);
                if registers != [0; 4] {
                    rows.push(CpuidRow { leaf, subleaf, registers });
                }
                if is_last(leaf, subleaf, registers) {
                    break;
                }
            }
        }
    }
    rows
}

/// Whether no further sub-leaf is worth asking for (AMD APM volume 3, appendix E; Intel SDM, CPUID).
fn is_last(leaf: u32, subleaf: u32, [eax, _, ecx, _]: [u32; 4]) -> bool {
    match leaf {
        // A cache of type 0 is none.
        4 | 0x8000_001d => eax & 0x1f == 0,
        // A level of type 0 is none.
        0xb | 0x1f | 0x8000_0026 => ecx >> 8 & 0xff == 0,
        7 => subleaf >= 2,
        // State components, and holes between them.
        0xd => false,
        // No CPU has more of these that matter to a guest.
        0xf | 0x10 | 0x12 | 0x14 | 0x17 | 0x18 | 0x1d | 0x24 | 0x8000_0020 | 0x8000_0024 => subleaf >= 3,
        _ => true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Sub-leaves as an EPYC 7713 has them (a public dump of its raw CPUID): XSAVE components 2, 9, 11 and 12 with holes
    /// between, cache levels that end with type 0.
    #[test]
    fn sub_leaves_are_found_behind_holes_and_end_where_the_cpu_says() {
        let answers = [
            ((0u32, 0u32), [0xd, 0x6874_7541, 0x444d_4163, 0x6974_6e65]),
            ((1, 0), [0xa0_0f11, 0x80_0800, 0x7eda_320b, 0x178b_fbff]),
            ((0xb, 0), [1, 2, 0x100, 0]),
            ((0xb, 1), [7, 0x80, 0x201, 0]),
            ((0xd, 0), [0x207, 0x340, 0x988, 0]),
            ((0xd, 2), [0x100, 0x240, 0, 0]),
            ((0xd, 12), [0x18, 0, 1, 0]),
            ((0x8000_0000, 0), [0x8000_001f, 0x6874_7541, 0x444d_4163, 0x6974_6e65]),
            ((0x8000_001d, 0), [0x4121, 0x1c0_003f, 0x3f, 0]),
            ((0x8000_001d, 1), [0x4122, 0x1c0_003f, 0x3f, 0]),
            ((0x8000_001f, 0), [0x101_fd3f, 0x4173, 0x1fd, 1]),
        ];
        let ask = |leaf, subleaf| {
            let found = answers.iter().find(|(key, _)| *key == (leaf, subleaf));
            found.map_or([0; 4], |(_, registers)| *registers)
        };
        let rows: Vec<_> = walk(ask).iter().map(|row| (row.leaf, row.subleaf)).collect();
        assert_eq!(rows, answers.map(|(key, _)| key));
    }

    #[test]
    fn a_cpu_that_claims_every_leaf_is_not_believed() {
        assert_eq!(walk(|_, _| [u32::MAX; 4]), []);
    }

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
