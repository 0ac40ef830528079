// SPDX-License-Identifier: Apache-2.0
//! Making private memory usable: PVALIDATE in 2 MiB pages, in 4 KiB pages where the RMP has those.
//!
//! AMD64 Architecture Programmer's Manual, volume 3, PVALIDATE. A carry flag says that the page was validated already. stage0
//! validates each page once, so that means that the host let two guest pages swap places or mapped one twice: fatal.

use crate::cpu;
use crate::cpu::fail;
use crate::inputs::Span;
use crate::layout::LARGE;
use crate::layout::PAGE;
use crate::paging::Tables;
use crate::reason::Reason;

/// The RMP has pages of another size than asked for.
const SIZE_MISMATCH: u32 = 6;

/// Validates one 4 KiB page that is mapped to itself. Evicts its cache lines on every CPU: page tables and stack will lie here.
pub fn page(address: u64) {
    if let Err(reason) = outcome(cpu::pvalidate(address, false)) {
        fail(reason);
    }
    evict(address, PAGE);
}

fn outcome((code, unchanged): (u32, bool)) -> Result<(), Reason> {
    match (code, unchanged) {
        (0, false) => Ok(()),
        (0, true) => Err(Reason::AlreadyValidated),
        _ => Err(Reason::PvalidateFailed),
    }
}

/// How RAM is validated on this CPU.
#[derive(Clone, Copy)]
pub struct Ram {
    /// Maps what is validated.
    pub tables: Tables,
    /// Evict cache lines of each new page, as CPUs without COHERENCY_SFW_NO need it (CVE-2025-38560).
    pub evict: bool,
}

impl Ram {
    /// Validates every page of `span`.
    pub fn validate(self, span: Span) -> Result<(), Reason> {
        let mut at = span.start;
        while at < span.end {
            let (mut virt, mapped_end) = self.tables.map(at);
            let end = span.end.min(mapped_end);
            while at < end {
                let mut len = PAGE;
                if at % LARGE == 0 && end - at >= LARGE {
                    len = LARGE;
                    match cpu::pvalidate(virt, true) {
                        (SIZE_MISMATCH, _) => self.small_pages(virt)?,
                        result => outcome(result)?,
                    }
                } else {
                    outcome(cpu::pvalidate(virt, false))?;
                }
                if self.evict {
                    evict(virt, len);
                }
                at += len;
                virt += len;
            }
        }
        Ok(())
    }

    fn small_pages(self, virt: u64) -> Result<(), Reason> {
        (virt..virt + LARGE).step_by(PAGE as usize).try_for_each(|page| outcome(cpu::pvalidate(page, false)))
    }
}

/// Reads the first and the last byte of each page, which drops lines that another agent cached before.
fn evict(virt: u64, len: u64) {
    for page in (virt..virt + len).step_by(PAGE as usize) {
        cpu::read_byte(page);
        cpu::read_byte(page + PAGE - 1);
    }
}
