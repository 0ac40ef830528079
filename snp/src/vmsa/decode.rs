// SPDX-License-Identifier: Apache-2.0
//! Reading a VMSA that a guest has written, and refusing what the emulated platform could not load.
//!
//! A guest starts its other vCPUs from pages that it fills itself. A [`VmsaState`] does not hold every field
//! of the page; one that it does not hold must have its reset value, because dropping it silently would run
//! the vCPU with other registers than the guest asked for.

use super::EFER_SVME;
use super::Segment;
use super::VmsaState;
use crate::le;
use crate::page::PAGE_SIZE;

/// Why a VMSA cannot be loaded.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs, reason = "the messages say what the fields are")]
pub enum VmsaRefusal {
    /// A field that must have one value here.
    #[error("offset {offset:#x} ({field}) is {found:#x}, but only {expected} can be loaded")]
    Value { offset: usize, field: &'static str, found: u64, expected: &'static str },
    /// A byte of the page that belongs to no field that can be loaded.
    #[error("offset {offset:#x} holds {found:#x}: this state cannot be loaded, it must be zero")]
    Unsupported { offset: usize, found: u8 },
}

/// x87 tag word as Linux writes it for a vCPU to start (all registers "zero"), beside 0 for "all empty".
const FTW_LINUX: u16 = 0x5555;
const FTW: usize = 0x40c;
const VMPL: usize = 0xca;

impl VmsaState {
    /// Reads `page`. Fails if it holds state that this type does not have, or values with which no vCPU can
    /// run.
    pub fn decode(page: &[u8; PAGE_SIZE as usize]) -> Result<Self, VmsaRefusal> {
        let u16_at = |at| le::u16_at(page, at);
        let u32_at = |at| le::u32_at(page, at);
        let u64_at = |at| le::u64_at(page, at);
        let segment = |i: usize| {
            let at = i * 16;
            Segment::new(u16_at(at), u16_at(at + 2), u32_at(at + 4), u64_at(at + 8))
        };
        let state = VmsaState {
            es: segment(0),
            cs: segment(1),
            ss: segment(2),
            ds: segment(3),
            fs: segment(4),
            gs: segment(5),
            gdtr: segment(6),
            ldtr: segment(7),
            idtr: segment(8),
            tr: segment(9),
            cpl: page[0xcb],
            efer: u64_at(0xd0),
            cr4: u64_at(0x148),
            cr3: u64_at(0x150),
            cr0: u64_at(0x158),
            dr7: u64_at(0x160),
            dr6: u64_at(0x168),
            rflags: u64_at(0x170),
            rip: u64_at(0x178),
            rsp: u64_at(0x1d8),
            rax: u64_at(0x1f8),
            g_pat: u64_at(0x268),
            rcx: u64_at(0x308),
            rdx: u64_at(0x310),
            rbx: u64_at(0x318),
            rbp: u64_at(0x328),
            rsi: u64_at(0x330),
            rdi: u64_at(0x338),
            r8_r15: std::array::from_fn(|i| u64_at(0x340 + i * 8)),
            sev_features: u64_at(0x3b0),
            xcr0: u64_at(0x3e8),
            mxcsr: u32_at(0x408),
            x87_fcw: u16_at(0x410),
        };
        let refuse =
            |offset, field, found, expected| Err(VmsaRefusal::Value { offset, field, found, expected });
        if state.efer & EFER_SVME == 0 {
            return refuse(0xd0, "EFER", state.efer, "a value with SVME (bit 12) set");
        }
        if page[VMPL] != 0 {
            return refuse(VMPL, "VMPL", page[VMPL].into(), "VMPL 0");
        }
        if !matches!(u16_at(FTW), 0 | FTW_LINUX) {
            return refuse(FTW, "x87 tag word", u16_at(FTW).into(), "0 or 0x5555");
        }
        if state.cpl > 3 {
            return refuse(0xcb, "CPL", state.cpl.into(), "0 to 3");
        }
        // Whatever the encoder does not reproduce is state that this type does not have.
        let mut again = state.encode();
        again[FTW..FTW + 2].copy_from_slice(&page[FTW..FTW + 2]);
        match page.iter().zip(again).position(|(found, known)| *found != known) {
            None => Ok(state),
            Some(offset) => Err(VmsaRefusal::Unsupported { offset, found: page[offset] }),
        }
    }
}

impl VmsaState {
    /// Refuses what a vCPU of an ordinary VM cannot be given although hardware would take it from a save
    /// area: the calls that set registers drop it silently (Linux 7.3, arch/x86/kvm:
    /// `kvm_arch_vcpu_ioctl_set_fpu`, `__set_sregs`).
    pub fn check_loadable(&self) -> Result<(), VmsaRefusal> {
        let reset = VmsaState::reset();
        let refuse =
            |offset, field, found, expected| Err(VmsaRefusal::Value { offset, field, found, expected });
        let segments =
            [self.es, self.cs, self.ss, self.ds, self.fs, self.gs, self.gdtr, self.ldtr, self.idtr, self.tr];
        for (i, segment) in segments.iter().enumerate() {
            if segment.attrib > 0xfff {
                let (found, expected) = (segment.attrib.into(), "12 bits");
                return refuse(i * 16 + 2, "attributes of a segment", found, expected);
            }
            // GDTR and IDTR.
            if [6, 8].contains(&i) && segment.limit > 0xffff {
                return refuse(i * 16 + 4, "limit of a descriptor table", segment.limit.into(), "16 bits");
            }
        }
        let dpl = (self.ss.attrib >> 5 & 3) as u8;
        if self.cpl != dpl {
            return refuse(0xcb, "CPL", self.cpl.into(), "the privilege level of SS");
        }
        if self.dr7 != reset.dr7 {
            return refuse(0x160, "DR7", self.dr7, "0x400");
        }
        if self.dr6 != reset.dr6 {
            return refuse(0x168, "DR6", self.dr6, "0xffff0ff0");
        }
        if self.mxcsr != reset.mxcsr {
            return refuse(0x408, "MXCSR", self.mxcsr.into(), "0x1f80");
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The VMSA that Linux 6.12 writes for an AP, field by field from `wakeup_cpu_via_vmgexit`.
    fn linux_ap() -> [u8; 4096] {
        let mut page = [0; 4096];
        let mut put = |at: usize, bytes: &[u8]| page[at..at + bytes.len()].copy_from_slice(bytes);
        put(0x10, &0x7a00u16.to_le_bytes());
        put(0x12, &0x009bu16.to_le_bytes());
        put(0x14, &0xffffu32.to_le_bytes());
        put(0x18, &0x7_a000u64.to_le_bytes());
        put(0x72, &0x0082u16.to_le_bytes());
        put(0x92, &0x0083u16.to_le_bytes());
        put(0xd0, &0x1000u64.to_le_bytes());
        put(0x148, &0x40u64.to_le_bytes());
        put(0x158, &0x6000_0010u64.to_le_bytes());
        put(0x160, &0x400u64.to_le_bytes());
        put(0x168, &0xffff_0ff0u64.to_le_bytes());
        put(0x170, &2u64.to_le_bytes());
        put(0x178, &0x50u64.to_le_bytes());
        put(0x268, &0x0007_0406_0007_0406u64.to_le_bytes());
        put(0x3b0, &1u64.to_le_bytes());
        put(0x3e8, &1u64.to_le_bytes());
        put(0x408, &0x1f80u32.to_le_bytes());
        put(0x40c, &0x5555u16.to_le_bytes());
        put(0x410, &0x0040u16.to_le_bytes());
        page
    }

    #[test]
    fn the_vmsa_of_a_linux_ap_is_loaded() {
        let state = VmsaState::decode(&linux_ap()).unwrap();
        assert_eq!(state.cs, Segment::new(0x7a00, 0x9b, 0xffff, 0x7_a000));
        assert_eq!((state.rip, state.cr0, state.x87_fcw), (0x50, 0x6000_0010, 0x40));
    }

    #[test]
    fn state_that_cannot_be_loaded_is_refused_by_offset() {
        let mut page = linux_ap();
        page[0x208] = 1; // LSTAR
        assert_eq!(VmsaState::decode(&page), Err(VmsaRefusal::Unsupported { offset: 0x208, found: 1 }));
        let mut page = linux_ap();
        page[0xd1] = 0;
        assert!(VmsaState::decode(&page).unwrap_err().to_string().contains("EFER"));
        let mut page = linux_ap();
        page[0xca] = 1;
        assert!(VmsaState::decode(&page).unwrap_err().to_string().contains("VMPL"));
    }

    #[test]
    fn registers_that_no_call_sets_must_have_their_reset_values() {
        let loadable = |at: usize, bytes: &[u8]| {
            let mut page = linux_ap();
            page[at..at + bytes.len()].copy_from_slice(bytes);
            VmsaState::decode(&page).unwrap().check_loadable().map_err(|e| e.to_string())
        };
        assert_eq!(loadable(0, &[]), Ok(()));
        for (at, bytes, field) in [
            (0x168, &[0xf1][..], "DR6"),
            (0x160, &[1, 4], "DR7"),
            (0x408, &[0x81], "MXCSR"),
            (0xcb, &[3], "CPL"),
            (0x13, &[0x10], "attributes of a segment"),
            (0x66, &[1], "limit of a descriptor table"),
            (0x86, &[1], "limit of a descriptor table"),
        ] {
            let refusal = loadable(at, bytes).unwrap_err();
            assert!(refusal.contains(field), "{at:#x}: {refusal}");
        }
    }

    #[test]
    fn what_is_encoded_is_decoded() {
        let state = VmsaState::reset();
        assert_eq!(VmsaState::decode(&state.encode()), Ok(state));
    }

    proptest! {
        #[test]
        fn no_page_panics(changes in proptest::collection::vec((0usize..4096, any::<u8>()), 0..40)) {
            let mut page = linux_ap();
            for (at, value) in changes {
                page[at] = value;
            }
            let _ = VmsaState::decode(&page);
        }
    }
}
