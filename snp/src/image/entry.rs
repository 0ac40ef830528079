// SPDX-License-Identifier: Apache-2.0
//! How vCPUs start: descriptor table, page tables and registers for each way into a kernel.
//!
//! Linux `Documentation/arch/x86/boot.rst`, "64-bit boot protocol" (flat segments 0x10 and 0x18, identity
//! map, RSI) and Xen's `docs/misc/pvh.pandoc` (32-bit, paging off, EBX). In an SNP guest the C-bit is in CR3
//! and in every table entry, so that kernel and page tables are fetched as private memory. Register values
//! are those that end up in the measured VMSA: KVM itself adds EFER.SVME and CR4.MCE there.

use crate::board::layout;
use crate::plan::PAGE_SIZE;
use crate::vmsa::CR4_MCE;
use crate::vmsa::EFER_SVME;
use crate::vmsa::SEV_FEATURE_SNP_ACTIVE;
use crate::vmsa::Segment;
use crate::vmsa::VmsaState;

/// Where the waiting vCPUs' halt loop lies, in the page of the descriptor table.
pub const HALT_LOOP: u64 = layout::GDT + 0x800;
/// `cli; 1: hlt; jmp 1b`.
const HALT_CODE: [u8; 4] = [0xfa, 0xf4, 0xeb, 0xfd];

const PRESENT: u64 = 1;
const WRITABLE: u64 = 1 << 1;
const LARGE: u64 = 1 << 7;

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_SCE: u64 = 1;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
const EFER_NXE: u64 = 1 << 11;

/// Attributes of segments in VMCB form.
const CODE64: u16 = 0xa9b;
const CODE32: u16 = 0xc9b;
const DATA: u16 = 0xc93;
const TSS32_BUSY: u16 = 0x08b;
const LDT: u16 = 0x082;

/// Selectors that the boot protocol demands.
const CODE_SELECTOR: u16 = 0x10;
const DATA_SELECTOR: u16 = 0x18;
/// Bytes of the descriptor table.
const GDT_LEN: usize = 4 * 8;

/// How the first vCPU enters the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// 64-bit mode at this address, RSI pointing to `boot_params`.
    Long(u64),
    /// 32-bit protected mode without paging at this address, EBX pointing to the PVH start info.
    Pvh(u32),
}

/// A flat descriptor with the given attributes in VMCB form.
fn descriptor(attrib: u16) -> u64 {
    let attrib = u64::from(attrib);
    0x000f_0000_0000_ffff | (attrib & 0xff) << 40 | (attrib >> 8) << 52
}

/// Contents of the page at [`layout::GDT`].
pub fn gdt_page(entry: Entry) -> Vec<u8> {
    let code = match entry {
        Entry::Long(_) => CODE64,
        Entry::Pvh(_) => CODE32,
    };
    let mut page = Vec::with_capacity(PAGE_SIZE as usize);
    for descriptor in [0, 0, descriptor(code), descriptor(DATA)] {
        page.extend_from_slice(&u64::to_le_bytes(descriptor));
    }
    page.resize((HALT_LOOP - layout::GDT) as usize, 0);
    page.extend_from_slice(&HALT_CODE);
    page
}

/// Contents of the pages at [`layout::PAGE_TABLES`]: the first 4 GiB mapped to themselves by 2 MiB pages,
/// every entry with `c_mask` set.
pub fn page_tables(c_mask: u64) -> Vec<u8> {
    let table = |n: u64| (layout::PAGE_TABLES + n * PAGE_SIZE) | PRESENT | WRITABLE | c_mask;
    let mut entries = vec![0u64; 6 * 512];
    entries[0] = table(1);
    for gib in 0..4u64 {
        entries[512 + gib as usize] = table(2 + gib);
    }
    for (i, entry) in entries[2 * 512..].iter_mut().enumerate() {
        *entry = (i as u64) << 21 | PRESENT | WRITABLE | LARGE | c_mask;
    }
    entries.into_iter().flat_map(u64::to_le_bytes).collect()
}

/// Registers that differ between an SNP guest and a plain one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// No SNP bit anywhere.
    Plain,
    /// SNP, with the C-bit as a mask.
    Snp {
        /// `1 << position`.
        c_mask: u64,
    },
}

impl Mode {
    fn bits(self) -> (u64, u64, u64, u64) {
        match self {
            Mode::Plain => (0, 0, 0, 0),
            Mode::Snp { c_mask } => (c_mask, EFER_SVME, CR4_MCE, SEV_FEATURE_SNP_ACTIVE),
        }
    }
}

/// Everything zero but what the architecture or KVM's defaults have it otherwise.
fn base(mode: Mode) -> VmsaState {
    let (_, svme, mce, sev_features) = mode.bits();
    VmsaState {
        efer: svme,
        cr4: mce,
        rdx: 0,
        rip: 0,
        sev_features,
        gdtr: Segment::new(0, 0, GDT_LEN as u32 - 1, layout::GDT),
        idtr: Segment::default(),
        ldtr: Segment::new(0, LDT, 0xffff, 0),
        tr: Segment::new(0, TSS32_BUSY, 0xffff, 0),
        ..VmsaState::reset()
    }
}

fn flat(state: &mut VmsaState, code: u16) {
    state.cs = Segment::new(CODE_SELECTOR, code, 0xffff_ffff, 0);
    let data = Segment::new(DATA_SELECTOR, DATA, 0xffff_ffff, 0);
    (state.ds, state.es, state.ss, state.fs, state.gs) = (data, data, data, data, data);
}

fn long_mode(mode: Mode, rip: u64) -> VmsaState {
    let (c_mask, ..) = mode.bits();
    let mut state = base(mode);
    flat(&mut state, CODE64);
    state.cr0 = CR0_PE | CR0_PG;
    state.cr3 = layout::PAGE_TABLES | c_mask;
    state.cr4 |= CR4_PAE;
    state.efer |= EFER_SCE | EFER_LME | EFER_LMA | EFER_NXE;
    state.rip = rip;
    state
}

/// Registers of vCPUs that start in the shim: 32-bit protected mode with flat segments and paging off, so
/// that nothing in them depends on the position of the C-bit. The first one starts at `start`, the others
/// wait at `park`.
pub fn stage0_vcpus(count: u32, start: u64, park: u64) -> Vec<VmsaState> {
    let mut state = base(Mode::Snp { c_mask: 0 });
    flat(&mut state, CODE32);
    state.gdtr = Segment::default();
    state.cr0 = CR0_PE | CR0_ET;
    let mut states = vec![VmsaState { rip: park, ..state.clone() }; count as usize];
    if let Some(first) = states.first_mut() {
        first.rip = start;
    }
    states
}

/// Registers of all vCPUs, the first one entering the kernel by `entry`, the others inert.
///
/// In an SNP guest the others' registers are measured too. They wait in a halt loop with interrupts off;
/// Linux starts them with registers of its own making. In a plain guest they are in the reset state and wait
/// for a start-up interrupt.
pub fn vcpus(count: u32, entry: Entry, mode: Mode) -> Vec<VmsaState> {
    let first = match entry {
        Entry::Long(rip) => VmsaState { rsi: layout::BOOT_PARAMS, ..long_mode(mode, rip) },
        Entry::Pvh(eip) => {
            let mut state = base(mode);
            flat(&mut state, CODE32);
            state.tr.limit = 0x67;
            state.cr0 = CR0_PE | CR0_ET;
            state.rip = u64::from(eip);
            state.rbx = layout::BOOT_PARAMS;
            state
        }
    };
    let other = match mode {
        Mode::Snp { .. } => long_mode(mode, HALT_LOOP),
        Mode::Plain => VmsaState { efer: 0, cr4: 0, sev_features: 0, ..VmsaState::reset() },
    };
    let mut states = vec![other; count as usize];
    if let Some(state) = states.first_mut() {
        *state = first;
    }
    states
}
