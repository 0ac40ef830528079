// SPDX-License-Identifier: Apache-2.0
//! What the CPUID instruction gives on a processor.
//!
//! KVM offers guests more than that: features that it emulates, and facts about microcode that it knows and the processor
//! does not tell (Linux 7.3, `arch/x86/kvm/cpuid.c`, `EMULATED_F` and `SYNTHESIZED_F`). The SNP firmware compares a guest's
//! table with the processor, so both are needed to say who made a bit up. Raw CPUID is always handed in, by a platform for
//! its host or as a dump of a chip: nothing here executes the instruction.

use super::cpuid::CpuidEntry;
use super::cpuid_diff::Register;

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
/// Sub-leaves that are looked at.
const SUBLEAVES: u32 = 32;
/// Leaves of one range that are looked at, whatever the processor says.
const LEAVES: u32 = 0x80;

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
    /// Asks for every leaf of the basic and the extended range; `cpuid` takes leaf and sub-leaf, and gives EAX to EDX.
    pub fn read(cpuid: impl Fn(u32, u32) -> [u32; 4]) -> Self {
        let mut entries = Vec::new();
        for base in [0, 0x8000_0000u32] {
            let [highest, ..] = cpuid(base, 0);
            for function in base..=highest.clamp(base, base + LEAVES) {
                let indexed = INDEXED.contains(&function);
                for index in 0..if indexed { SUBLEAVES } else { 1 } {
                    let [eax, ebx, ecx, edx] = cpuid(function, index);
                    if eax | ebx | ecx | edx != 0 {
                        entries.push(CpuidEntry { function, index, indexed, eax, ebx, ecx, edx });
                    }
                }
            }
        }
        RawCpuid { entries }
    }

    /// Reads a dump: leaf, sub-leaf, EAX, EBX, ECX and EDX in hexadecimal on each line. `#` begins a comment, and lines that
    /// begin with a word are left to the caller.
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
pub(crate) fn lines(dump: &str) -> impl Iterator<Item = (usize, &str)> {
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
        // A processor that claims endless leaves does not keep us.
        assert!(RawCpuid::read(|_, _| [u32::MAX; 4]).entries().len() < 10_000);
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
