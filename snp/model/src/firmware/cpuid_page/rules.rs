// SPDX-License-Identifier: Apache-2.0
//! What the firmware accepts in an entry of a CPUID page, leaf by leaf.
//!
//! AMD-ASPFW, the firmware that AMD published for Genoa in August 2023: `cpuid_lookup.c` (`lookup_table`, the
//! `*_CUSTOM` functions, `cpuid_entry_rule_check`, `sanitize_cpuid_entry`) and the constants of
//! `cpuid_lookup.h`. Which features a processor has is data, see [`Processor`]; the structure here is
//! Genoa's, and taken for the other products as well, with one addition: a field's value on the processor
//! itself is always accepted.

use crate::cpuid::CpuidRegisters;
use crate::firmware::product::Processor;
use snp::pages::cpuid_entry::Register;

use super::Entry;

/// What is accepted in a register.
#[derive(Clone, Copy)]
enum Rule {
    /// Anything, but zero in these bits, unless the processor itself has them set.
    Any(u32),
    /// A subset of the processor's bits.
    Mask,
    /// The processor's value.
    Exact,
    /// At most the processor's value.
    AtMost,
    /// Nothing.
    Zero,
}

use Rule::*;

const FREE: Rule = Any(0);
const REGISTERS: [Register; 4] = [Register::Eax, Register::Ebx, Register::Ecx, Register::Edx];

/// Leaf, first and last sub-leaf, and the rules for EAX, EBX, ECX, EDX.
type Line = (u32, u32, u32, [Rule; 4]);

/// Leaves without a function of their own. A leaf of the two ranges that is neither here nor in [`corrected`]
/// must be zero.
const TABLE: &[Line] = &[
    (0, 0, 0, [AtMost, FREE, FREE, FREE]),
    (2, 0, 0, [FREE, FREE, FREE, FREE]),
    (4, 0, 0, [FREE, FREE, FREE, FREE]),
    (5, 0, 0, [Any(0xffff_0000), Any(0xffff_0000), Any(0xffff_fffc), Any(0xffff_ff00)]),
    (6, 0, 0, [Mask, Zero, Mask, Zero]),
    (7, 1, 1, [Mask, Mask, Mask, Mask]),
    (0xb, 0, 2, [Any(0xffff_ffe0), Any(0xffff_0000), Any(0xffff_0000), FREE]),
    (0xd, 2, 2, [Exact, Exact, Exact, Exact]),
    (0xd, 5, 7, [Exact, Exact, Mask, Exact]),
    (0xd, 9, 9, [Exact, Exact, Exact, Exact]),
    (0xd, 11, 12, [Exact, Exact, Exact, Exact]),
    (0xf, 0, 0, [Zero, FREE, Zero, Any(0xffff_fffd)]),
    (0xf, 1, 1, [Any(0xffff_fe00), FREE, FREE, Any(0xffff_fff8)]),
    (0x10, 0, 0, [Zero, Any(0xffff_fff9), Zero, Zero]),
    (0x10, 1, 1, [Any(0xffff_ffe0), FREE, Any(0xffff_fffb), Any(0xffff_0000)]),
    (0x8000_0000, 0, 0, [AtMost, FREE, FREE, FREE]),
    (0x8000_0002, 0, 0, [FREE, FREE, FREE, FREE]),
    (0x8000_0003, 0, 0, [FREE, FREE, FREE, FREE]),
    (0x8000_0004, 0, 0, [FREE, FREE, FREE, FREE]),
    (0x8000_0005, 0, 0, [FREE, FREE, FREE, FREE]),
    (0x8000_0006, 0, 0, [FREE, FREE, FREE, Any(0x0003_0000)]),
    (0x8000_0007, 0, 0, [Zero, Mask, FREE, Mask]),
    (0x8000_000a, 0, 0, [Any(0xffff_ff00), FREE, Zero, Mask]),
    (0x8000_0019, 0, 0, [FREE, FREE, Zero, Zero]),
    (0x8000_001a, 0, 0, [Any(0xffff_fff8), Zero, Zero, Zero]),
    (0x8000_001b, 0, 0, [Mask, Zero, Zero, Zero]),
    (0x8000_001d, 0, 3, [Any(0xfc00_3c00), FREE, FREE, Any(0xffff_fffc)]),
    (0x8000_001d, 4, 4, [Any(0xffff_fff0), Zero, FREE, Zero]),
    (0x8000_001e, 0, 0, [FREE, Any(0xffff_0000), Any(0xffff_f800), Zero]),
    (0x8000_0020, 0, 0, [Zero, Any(0xffff_ffe1), Zero, Zero]),
    (0x8000_0020, 1, 2, [FREE, Zero, Zero, FREE]),
    (0x8000_0020, 3, 3, [Zero, FREE, Mask, Zero]),
    (0x8000_0021, 0, 0, [Mask, Any(0xffff_f000), Zero, Zero]),
    (0x8000_0023, 0, 0, [Mask, FREE, Zero, Zero]),
    (0x8000_0024, 0, 1, [Mask, Mask, Mask, Zero]),
    (0x8000_0026, 0, 3, [FREE, FREE, FREE, FREE]),
];

/// Leaf 1 and 0x80000001, EAX: bits that no signature has (`FN00000001_EAX_RESERVED`).
const SIGNATURE_RESERVED: u32 = 0xf000_f000;
/// Leaf 1, ECX: OSXSAVE and the bit of hypervisors are not looked at.
const LEAF1_ECX_FREE: u32 = 1 << 27 | 1 << 31;
/// Leaf 7, ECX: OSPKE is not looked at.
const LEAF7_ECX_FREE: u32 = 1 << 4;
/// Components of XCR0 and what each adds to the size of the compacted area, and the whole size of the
/// standard area up to its end.
const XCR0_SIZES: [(u64, u32, u32); 5] = [
    (1 << 9, 0x8, 0x988),
    (1 << 7, 0x400, 0x980),
    (1 << 6, 0x200, 0x580),
    (1 << 5, 0x40, 0x380),
    (1 << 2, 0x100, 0x340),
];
/// The two components of shadow stacks in XSS, and their sizes.
const XSS_SIZES: [(u64, u32); 2] = [(1 << 11, 0x10), (1 << 12, 0x18)];
/// x87 and SSE state, and the header.
const XSAVE_BASE: u32 = 0x240;
/// SEV leaf, EBX: bits 11:6, the loss of address bits, are not looked at.
const REDUCTION: u32 = 0xfc0;
/// SEV leaf, EBX: number of VMPLs, at most 4.
const VMPLS: u32 = 0xf000;
const VMPLS_MAX: u32 = 4 << 12;
/// SEV leaf, EBX: reserved in 2023 (`FN8000001F_EBX_RESERVED`), COHERENCY_SFW_NO among them.
const SEV_EBX_RESERVED: u32 = 0xffff_0000;
const COHERENCY_SFW_NO: u32 = 1 << 31;

/// What the firmware makes of `entry`: the answers that it gives back, and whether it accepts the entry.
pub fn judge(entry: &Entry, processor: &Processor, c_bit: u8) -> (CpuidRegisters, bool) {
    let registers = corrected(entry, processor, c_bit);
    // The one correction that does not make things right, and may change nothing.
    let wrong_c_bit =
        (entry.function, entry.index) == (0x8000_001f, 0) && registers.ebx & 0x3f != u32::from(c_bit & 0x3f);
    (registers, registers == entry.registers && !wrong_c_bit)
}

fn corrected(entry: &Entry, processor: &Processor, c_bit: u8) -> CpuidRegisters {
    let (leaf, index) = (entry.function, entry.index);
    let chip = |register| processor.limits.register(leaf, index, register);
    let (eax, ebx, ecx, edx) =
        (chip(Register::Eax), chip(Register::Ebx), chip(Register::Ecx), chip(Register::Edx));
    let mut r = entry.registers;
    // Leaves that are younger than the processor are in no table of its firmware.
    if leaf >= 0x8000_0000 && leaf > processor.limits.register(0x8000_0000, 0, Register::Eax) {
        return CpuidRegisters::default();
    }
    match (leaf, index) {
        (1, 0) => {
            r.eax = signature(r.eax, processor.signature);
            r.ebx = r.ebx & 0xffff_0000 | 8 << 8; // CLFLUSH of 64 bytes, no brand.
            r.ecx &= ecx | LEAF1_ECX_FREE;
            r.edx &= edx;
        }
        (7, 0) => {
            r.eax = r.eax.min(eax);
            r.ebx &= ebx;
            r.ecx &= ecx | LEAF7_ECX_FREE;
            // The correction keeps the wrong bits, and the reserved mask then clears them: nothing is left.
            if r.edx & !edx != 0 {
                r.edx = 0;
            }
        }
        (0xd, 0) => {
            r.eax = (r.eax | 3) & eax;
            let sizes = XCR0_SIZES.iter().find(|(component, ..)| entry.xcr0_in & component != 0);
            r.ebx = sizes.map_or(XSAVE_BASE, |(.., size)| *size);
            r.edx = 0;
        }
        (0xd, 1) => {
            r.eax &= eax;
            let xcr0 = XCR0_SIZES.iter().filter(|(c, ..)| entry.xcr0_in & c != 0).map(|(_, size, _)| *size);
            let xss = XSS_SIZES.iter().filter(|(c, _)| entry.xss_in & c != 0).map(|(_, size)| *size);
            r.ebx = XSAVE_BASE + xcr0.chain(xss).sum::<u32>();
            r.ecx &= ecx;
            r.edx &= edx;
        }
        (0x8000_0001, 0) => {
            r.eax = signature(r.eax, processor.signature);
            r.ebx &= 0xf000_0000;
            r.ecx &= ecx;
            r.edx &= edx;
        }
        (0x8000_0008, 0) => {
            let [physical, linear] = [0, 8].map(|at| (r.eax >> at & 0xff).min(eax >> at & 0xff) << at);
            r.eax = r.eax & 0x00ff_0000 | linear | physical;
            r.ebx &= ebx;
            r.ecx &= !0xfffc_0f00;
            r.edx = (r.edx & 0xffff).min(edx & 0xffff) | (r.edx & 0xff_0000).min(edx & 0xff_0000);
        }
        (0x8000_001f, 0) => {
            r.eax &= eax;
            let c_bit = u32::from(c_bit & 0x3f);
            let free = REDUCTION | VMPLS | if processor.coherent { COHERENCY_SFW_NO } else { 0 };
            if r.ebx & !free != c_bit {
                // Wrong bits below stay: what comes back may be refused again.
                r.ebx = r.ebx & !REDUCTION | c_bit;
            }
            if r.ebx & VMPLS > VMPLS_MAX {
                r.ebx = r.ebx & !VMPLS | VMPLS_MAX;
            }
            r.ebx &= !SEV_EBX_RESERVED | free & COHERENCY_SFW_NO;
        }
        (0x8000_0022, 0) => {
            r.eax &= eax;
            let [counters, records] = [0xf, 0x3f0].map(|field| (r.ebx & field).min(ebx & field));
            r.ebx = r.ebx & !0x3ff | records | counters;
            r.edx = 0;
        }
        _ => {
            let Some((.., rules)) =
                TABLE.iter().find(|(l, first, last, _)| *l == leaf && (*first..=*last).contains(&index))
            else {
                return CpuidRegisters::default();
            };
            for (rule, register) in rules.iter().zip(REGISTERS) {
                let value = match register {
                    Register::Eax => &mut r.eax,
                    Register::Ebx => &mut r.ebx,
                    Register::Ecx => &mut r.ecx,
                    Register::Edx => &mut r.edx,
                };
                *value = match rule {
                    Any(reserved) => *value & (!reserved | chip(register)),
                    Mask => *value & chip(register),
                    Exact => chip(register),
                    AtMost => (*value).min(chip(register)),
                    Zero => 0,
                };
            }
        }
    }
    r
}

/// A signature that is not above the processor's (`compare_FMS`). The firmware adds base and extended model
/// where processors join them (`FMS_MODEL`): 0x11 counts as 2, 0xA0 as 10.
fn signature(asked: u32, processor: u32) -> u32 {
    let parts = |eax: u32| {
        let field = |at: u32, mask: u32| eax >> at & mask;
        (field(20, 0xff) + field(8, 0xf), field(16, 0xf) + field(4, 0xf), field(0, 0xf))
    };
    let eax = if parts(asked) <= parts(processor) { asked } else { processor };
    eax & !SIGNATURE_RESERVED
}
