// SPDX-License-Identifier: Apache-2.0
//! stage0's side of the GHCB protocol: enough to register a page and to give staging memory back.
//!
//! GHCB specification 2.03, sections 2.3.1 (MSR protocol) and 4.1.6 (page-state change). Whatever the hypervisor leaves in the
//! shared page is read once and only compared; it decides between "done", "again" and "refused".

use crate::cpu;
use crate::cpu::fail;
use crate::inputs::Span;
use crate::layout;
use crate::layout::LARGE;
use crate::layout::PAGE;
use crate::paging::shared;
use crate::reason::Reason;

const EXIT_CODE: u64 = 0x390;
const EXIT_INFO_1: u64 = 0x398;
const EXIT_INFO_2: u64 = 0x3a0;
const SCRATCH: u64 = 0x3a8;
const VALID_BITMAP: u64 = 0x3f0;
const BUFFER: u64 = 0x800;
/// Protocol version u16 at 0xffa, usage u32 at 0xffc, seen as the last eight bytes.
const TAIL: u64 = 0xff8;
const VERSION_2: u64 = 2 << 16;

const PAGE_STATE_CHANGE: u64 = 0x8000_0010;
const TO_PRIVATE: u64 = 1 << 52;
const LARGE_PAGE: u64 = 1 << 56;
/// Entries that fit in the buffer beside its header.
const ENTRIES_MAX: u64 = 253;

/// Agrees on version 2 of the protocol and registers the page.
pub fn register() {
    let info = cpu::msr_protocol(0x002);
    let (min, max) = (info >> 32 & 0xffff, info >> 48);
    if info & 0xfff != 0x001 || min > 2 || max < 2 {
        fail(Reason::GhcbVersion);
    }
    let features = cpu::msr_protocol(0x080);
    if features & 0xfff != 0x081 || features >> 12 & 1 == 0 {
        fail(Reason::HypervisorFeatures);
    }
    if cpu::msr_protocol(layout::GHCB | 0x012) != layout::GHCB | 0x013 {
        fail(Reason::GhcbRegistration);
    }
}

/// Tells the hypervisor that the pages of `span`, which begins and ends at 2 MiB boundaries, are private from now on.
pub fn make_private(span: Span) {
    let mut next = span.start;
    while next < span.end {
        let count = ((span.end - next) / LARGE).min(ENTRIES_MAX);
        for i in 0..count {
            let entry = (next + i * LARGE) | TO_PRIVATE | LARGE_PAGE;
            cpu::write(shared(layout::GHCB + BUFFER + 8 + i * 8), entry);
        }
        change_states(count);
        next += count * LARGE;
    }
}

/// Has the entries in the buffer worked off. The hypervisor may stop early; its cursor never goes back.
fn change_states(count: u64) {
    let page = shared(layout::GHCB);
    let last = count - 1;
    cpu::write(page + BUFFER, last << 16);
    let mut cursor = 0;
    while cursor < count {
        for field in (0..0x400).step_by(8) {
            cpu::write(page + field, 0);
        }
        cpu::write(page + EXIT_CODE, PAGE_STATE_CHANGE);
        cpu::write(page + SCRATCH, layout::GHCB + BUFFER);
        // Valid: exit code, both infos, scratch. Bit n of the second half stands for offset 0x200 + 8 * n.
        cpu::write(page + VALID_BITMAP + 8, 0xf << ((EXIT_CODE - 0x200) / 8));
        cpu::write(page + TAIL, VERSION_2);
        // The registered page's address, page-aligned, is the request to look into the page.
        cpu::msr_protocol(layout::GHCB);
        let header = cpu::read(page + BUFFER);
        let (now, end) = (header & 0xffff, header >> 16 & 0xffff);
        let refused = cpu::read(page + EXIT_INFO_1) & 0xffff_ffff != 0 || cpu::read(page + EXIT_INFO_2) != 0;
        if refused || end != last || now < cursor {
            fail(Reason::PageStateChange);
        }
        cursor = now;
    }
}

/// The same for one page by the MSR protocol, for the GHCB page itself.
pub fn make_page_private(address: u64) {
    if cpu::msr_protocol(address & !(PAGE - 1) | TO_PRIVATE | 0x014) != 0x015 {
        fail(Reason::PageStateChange);
    }
}
