// SPDX-License-Identifier: Apache-2.0
//! What the CPUID instruction gives on a processor.
//!
//! KVM offers guests more than that: features that it emulates, and facts about microcode that it knows and
//! the processor does not tell (Linux 7.3, `arch/x86/kvm/cpuid.c`, `EMULATED_F` and `SYNTHESIZED_F`). The SNP
//! firmware compares a guest's table with the processor, so both are needed to say who made a bit up. Raw
//! CPUID is always handed in, by a platform for its host or as a dump of a chip: nothing here executes the
//! instruction.

use super::cpuid_entry::CpuidEntry;
use super::cpuid_entry::Register;

/// Leaves whose answer depends on the sub-leaf, on AMD and Intel processors.
const INDEXED: &[u32] = &[
    4,
    7,
    0xb,
    0xd,
    0xf,
    0x10,
    0x14,
    0x1d,
    0x1e,
    0x1f,
    0x24,
    0x8000_001d,
    0x8000_0020,
    0x8000_0024,
    0x8000_0026,
];
/// Most sub-leaves of a leaf that are asked for: XSAVE has one for each of 64 state components.
const SUBLEAVES: u32 = 64;
/// Most leaves of a range; real processors have about 40.
const LEAVES: u32 = 0x100;
/// Where the ranges begin: the processor's own leaves, a hypervisor's, AMD's.
const RANGES: [u32; 3] = [0, HYPERVISOR_RANGE, 0x8000_0000];
const HYPERVISOR_RANGE: u32 = 0x4000_0000;
/// Leaf 1, ECX: there is a hypervisor, and so its range of leaves.
const HYPERVISOR: u32 = 1 << 31;

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
        // No processor has more of these that matter to a guest.
        leaf if INDEXED.contains(&leaf) => subleaf >= 3,
        _ => true,
    }
}

/// Why a dump cannot be read.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("line {line}: '{text}': expected {expected}")]
pub struct DumpError {
    /// Line number, from 1.
    pub line: usize,
    /// The line.
    pub text: String,
    /// What should be there.
    pub expected: &'static str,
}

/// The answers of one processor.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RawCpuid {
    entries: Vec<CpuidEntry>,
}

impl RawCpuid {
    /// Asks for every leaf that the processor says it has; `cpuid` takes leaf and sub-leaf, and gives EAX to
    /// EDX. Answers that are zero throughout are left out.
    pub fn read(cpuid: impl Fn(u32, u32) -> [u32; 4]) -> Self {
        let mut entries = Vec::new();
        for first in RANGES {
            let [.., features, _] = cpuid(1, 0);
            if first == HYPERVISOR_RANGE && features & HYPERVISOR == 0 {
                continue;
            }
            let [last, ..] = cpuid(first, 0);
            // A range that is not there answers with something else's values.
            if last < first || last - first >= LEAVES {
                continue;
            }
            for function in first..=last {
                let indexed = INDEXED.contains(&function);
                for index in 0..SUBLEAVES {
                    let registers = cpuid(function, index);
                    if registers != [0; 4] {
                        let [eax, ebx, ecx, edx] = registers;
                        entries.push(CpuidEntry { function, index, indexed, eax, ebx, ecx, edx });
                    }
                    if is_last(function, index, registers) {
                        break;
                    }
                }
            }
        }
        RawCpuid { entries }
    }

    /// Reads a dump: leaf, sub-leaf, EAX, EBX, ECX and EDX in hexadecimal on each line. `#` begins a comment,
    /// and lines that begin with a word are left to the caller.
    pub fn parse(dump: &str) -> Result<Self, DumpError> {
        let mut entries = Vec::new();
        for (line, text) in lines(dump).filter(|(_, text)| !text.starts_with("allow ")) {
            let words: Option<Vec<u32>> =
                text.split_whitespace().map(|w| u32::from_str_radix(w, 16).ok()).collect();
            let Some(&[function, index, eax, ebx, ecx, edx]) = words.as_deref() else {
                let expected = "leaf, sub-leaf, EAX, EBX, ECX and EDX in hexadecimal";
                return Err(DumpError { line, text: text.into(), expected });
            };
            let indexed = INDEXED.contains(&function);
            entries.push(CpuidEntry { function, index, indexed, eax, ebx, ecx, edx });
        }
        Ok(RawCpuid { entries })
    }

    /// The answer to a leaf and sub-leaf: EAX, EBX, ECX, EDX; zeros for what the processor does not have.
    pub fn get(&self, function: u32, index: u32) -> [u32; 4] {
        let entry = self.entries.iter().find(|e| e.function == function && e.index == index);
        entry.map_or([0; 4], |e| [e.eax, e.ebx, e.ecx, e.edx])
    }

    /// One register of an answer.
    pub fn register(&self, function: u32, index: u32, register: Register) -> u32 {
        self.get(function, index)[register as usize]
    }

    /// All answers that are not zero.
    pub fn entries(&self) -> &[CpuidEntry] {
        &self.entries
    }

    /// Sets bits of an answer, which is added if the processor does not have it.
    pub fn add(&mut self, function: u32, index: u32, register: Register, bits: u32) {
        let at = self.entries.iter().position(|e| e.function == function && e.index == index);
        let at = at.unwrap_or_else(|| {
            let indexed = INDEXED.contains(&function);
            self.entries.push(CpuidEntry { function, index, indexed, ..CpuidEntry::default() });
            self.entries.len() - 1
        });
        if let Some(entry) = self.entries.get_mut(at) {
            *entry.register_mut(register) |= bits;
        }
    }
}

/// Lines with something on them, without comments, and their numbers.
pub fn lines(dump: &str) -> impl Iterator<Item = (usize, &str)> {
    let text = |line| str::split(line, '#').next().unwrap_or_default().trim();
    (1..).zip(dump.lines().map(text)).filter(|(_, text)| !text.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_processor_is_asked_for_the_leaves_that_it_has() {
        let raw = RawCpuid::read(|leaf, subleaf| match (leaf, subleaf) {
            (0, 0) => [0xd, 1, 2, 3],
            (7, 0) => [1, 0, 0, 0],
            (7, 1) => [0x20, 0, 0, 0],
            (0x8000_0000, 0) => [0x8000_0008, 0, 0, 0],
            (0x8000_0008, 0) => [0x3030, 0, 0, 0],
            // Beyond the highest leaf Intel processors repeat an answer.
            (0xe..0x8000_0000 | 0x8000_0009.., _) => [9; 4],
            _ => [0; 4],
        });
        assert_eq!(raw.entries().len(), 5, "{:x?}", raw.entries());
        assert_eq!(raw.get(7, 1), [0x20, 0, 0, 0]);
        assert_eq!(raw.get(0x8000_0021, 0), [0; 4]);
        // A processor that claims every leaf is not believed.
        assert_eq!(RawCpuid::read(|_, _| [u32::MAX; 4]), RawCpuid::default());
    }

    /// Sub-leaves as an EPYC 7713 has them (a public dump of its raw CPUID): XSAVE components 2, 9, 11 and 12
    /// with holes between, cache levels that end with type 0.
    #[test]
    fn sub_leaves_are_found_behind_holes_and_end_where_the_processor_says() {
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
        let raw = RawCpuid::read(|leaf, subleaf| {
            let found = answers.iter().find(|(key, _)| *key == (leaf, subleaf));
            found.map_or([0; 4], |(_, registers)| *registers)
        });
        let found: Vec<_> = raw.entries().iter().map(|e| (e.function, e.index)).collect();
        assert_eq!(found, answers.map(|(key, _)| key));
    }

    #[test]
    fn a_dump_is_read_and_an_error_names_its_line() {
        let dump = "# a chip\n\n00000007 01 00000020 0 0 0 # sub-leaf 1\nallow 00000001 00 ecx 1\n";
        let mut raw = RawCpuid::parse(dump).unwrap();
        assert_eq!(raw.register(7, 1, Register::Eax), 0x20);
        raw.add(7, 1, Register::Eax, 1);
        raw.add(9, 0, Register::Edx, 4);
        assert_eq!((raw.get(7, 1)[0], raw.get(9, 0)[3]), (0x21, 4));
        let error = RawCpuid::parse("1 0 0 0 0 0\n1 0 0 0 0").unwrap_err();
        assert_eq!(error.line, 2);
        assert!(RawCpuid::parse("x 0 0 0 0 0").is_err());
    }
}
