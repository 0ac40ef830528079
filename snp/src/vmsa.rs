// SPDX-License-Identifier: Apache-2.0
//! The VMSA: a vCPU's initial registers as the firmware measures them.
//!
//! One [`VmsaState`] per vCPU is the only source: it drives KVM's register calls *and* [`VmsaState::encode`],
//! so the page that KVM builds at `LAUNCH_FINISH` is the page that was predicted. Layout: AMD64 Architecture
//! Programmer's Manual, volume 2, revision 3.42, table B-4 (the SEV-ES save area). What KVM changes in the
//! registers it is given (SVME in EFER, MCE in CR4) is part of the state here: values are those that end up
//! in the page.

pub mod decode;

use crate::page::PAGE_SIZE;

/// The address at which every VMSA is measured, whatever the vCPU.
pub const VMSA_GPA: u64 = 0xffff_ffff_f000;

/// A segment in VMCB form.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Segment {
    /// Selector.
    pub selector: u16,
    /// Attributes in the 12-bit VMCB form: type 3:0, S 4, DPL 6:5, P 7, AVL 8, L 9, DB 10, G 11.
    pub attrib: u16,
    /// Limit in bytes.
    pub limit: u32,
    /// Base address.
    pub base: u64,
}

impl Segment {
    /// A segment from its four fields.
    pub const fn new(selector: u16, attrib: u16, limit: u32, base: u64) -> Self {
        Segment { selector, attrib, limit, base }
    }
}

/// A vCPU's registers. Everything that is not a field is zero in the page.
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "the fields are the architecture's registers, under their own names")]
pub struct VmsaState {
    pub es: Segment,
    pub cs: Segment,
    pub ss: Segment,
    pub ds: Segment,
    pub fs: Segment,
    pub gs: Segment,
    pub gdtr: Segment,
    pub ldtr: Segment,
    pub idtr: Segment,
    pub tr: Segment,
    pub cpl: u8,
    pub efer: u64,
    pub cr4: u64,
    pub cr3: u64,
    pub cr0: u64,
    pub dr7: u64,
    pub dr6: u64,
    pub rflags: u64,
    pub rip: u64,
    pub g_pat: u64,
    pub rax: u64,
    pub rcx: u64,
    pub rdx: u64,
    pub rbx: u64,
    pub rsp: u64,
    pub rbp: u64,
    pub rsi: u64,
    pub rdi: u64,
    pub r8_r15: [u64; 8],
    pub sev_features: u64,
    pub xcr0: u64,
    pub mxcsr: u32,
    pub x87_fcw: u16,
}

/// EFER.SVME, which KVM sets in every VMSA.
pub const EFER_SVME: u64 = 1 << 12;
/// CR4.MCE, which KVM copies from the host.
pub const CR4_MCE: u64 = 1 << 6;
/// `sev_features` bit 0: the guest runs as an SNP guest.
pub const SEV_FEATURE_SNP_ACTIVE: u64 = 1;
/// `sev_features` bit 9: the guest's time stamp counter is the processor's and its own; the host cannot
/// change it.
pub const SEV_FEATURE_SECURE_TSC: u64 = 1 << 9;

impl VmsaState {
    /// The state of a vCPU after reset, as KVM measures it for QEMU and OVMF, with RIP at the reset vector.
    pub fn reset() -> Self {
        const fn seg(attrib: u16) -> Segment {
            Segment::new(0, attrib, 0xffff, 0)
        }
        VmsaState {
            es: seg(0x93),
            cs: Segment::new(0xf000, 0x9b, 0xffff, 0xffff_0000),
            ss: seg(0x93),
            ds: seg(0x93),
            fs: seg(0x93),
            gs: seg(0x93),
            gdtr: seg(0),
            ldtr: seg(0x82),
            idtr: seg(0),
            tr: seg(0x8b),
            cpl: 0,
            efer: EFER_SVME,
            cr4: CR4_MCE,
            cr3: 0,
            cr0: 0x10,
            dr7: 0x400,
            dr6: 0xffff_0ff0,
            rflags: 2,
            rip: 0xfff0,
            g_pat: 0x0007_0406_0007_0406,
            rax: 0,
            rcx: 0,
            rdx: 0x600,
            rbx: 0,
            rsp: 0,
            rbp: 0,
            rsi: 0,
            rdi: 0,
            r8_r15: [0; 8],
            sev_features: SEV_FEATURE_SNP_ACTIVE,
            xcr0: 1,
            mxcsr: 0x1f80,
            x87_fcw: 0x37f,
        }
    }

    /// The page that the firmware measures.
    pub fn encode(&self) -> [u8; PAGE_SIZE as usize] {
        let mut page = [0; PAGE_SIZE as usize];
        let mut put = |offset: usize, bytes: &[u8]| page[offset..offset + bytes.len()].copy_from_slice(bytes);
        let segments = [
            &self.es, &self.cs, &self.ss, &self.ds, &self.fs, &self.gs, &self.gdtr, &self.ldtr, &self.idtr,
            &self.tr,
        ];
        for (i, s) in segments.into_iter().enumerate() {
            put(i * 16, &s.selector.to_le_bytes());
            put(i * 16 + 2, &s.attrib.to_le_bytes());
            put(i * 16 + 4, &s.limit.to_le_bytes());
            put(i * 16 + 8, &s.base.to_le_bytes());
        }
        put(0xcb, &[self.cpl]);
        for (offset, value) in [
            (0xd0, self.efer),
            (0x148, self.cr4),
            (0x150, self.cr3),
            (0x158, self.cr0),
            (0x160, self.dr7),
            (0x168, self.dr6),
            (0x170, self.rflags),
            (0x178, self.rip),
            (0x1d8, self.rsp),
            (0x1f8, self.rax),
            (0x268, self.g_pat),
            (0x308, self.rcx),
            (0x310, self.rdx),
            (0x318, self.rbx),
            (0x328, self.rbp),
            (0x330, self.rsi),
            (0x338, self.rdi),
            (0x3b0, self.sev_features),
            (0x3e8, self.xcr0),
        ] {
            put(offset, &value.to_le_bytes());
        }
        for (i, value) in self.r8_r15.iter().enumerate() {
            put(0x340 + i * 8, &value.to_le_bytes());
        }
        put(0x408, &self.mxcsr.to_le_bytes());
        put(0x410, &self.x87_fcw.to_le_bytes());
        page
    }
}
