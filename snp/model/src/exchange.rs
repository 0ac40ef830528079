// SPDX-License-Identifier: Apache-2.0
//! A GHCB page between VMGEXIT and the guest's resumption, and the shared memory around it.
//!
//! Stands for `sev_es_sync_to_ghcb`, `sev_es_unmap_ghcb` and `setup_vmgexit_scratch` of Linux 6.12 and 7.3.
//! Every access goes through the shared view, and only where the page's state is shared.

use crate::memory::GuestMemory;
use crate::memory::View;
use crate::outcome::Outcome;
use crate::rmp::Finding;
use crate::vm::VmModel;
use snp::ghcb::exit;
use snp::ghcb::exit::Malformed;
use snp::ghcb::exit::info1;
use snp::ghcb::page;
use snp::ghcb::page::Field;

/// What the model needs for every access: the guest's state and its memory.
#[derive(Clone, Copy)]
pub(crate) struct Guest<'a> {
    pub vm: &'a VmModel,
    pub mem: &'a dyn GuestMemory,
}

impl Guest<'_> {
    /// Fills `buf` from shared memory; false, with a finding, if that is not all shared RAM.
    pub fn read(&self, gpa: u64, buf: &mut [u8]) -> bool {
        self.is_shared(gpa, buf.len()) && self.mem.read(gpa, View::Shared, buf).is_ok()
    }

    /// Writes to shared memory; false, with a finding, if that is not all shared RAM.
    pub fn write(&self, gpa: u64, bytes: &[u8]) -> bool {
        self.is_shared(gpa, bytes.len()) && self.mem.write(gpa, View::Shared, bytes).is_ok()
    }

    fn is_shared(&self, gpa: u64, len: usize) -> bool {
        let shared = self.vm.pages.all_shared(gpa, len as u64);
        if !shared {
            self.vm.pages.report(Finding::BufferNotShared { gpa });
        }
        shared
    }
}

/// The copy of a GHCB page, with the fields of the answer as they are set.
#[derive(Debug)]
pub(crate) struct Exchange {
    /// Address of the page.
    pub gpa: u64,
    /// The copy. Its valid bitmap marks the answer's fields only.
    pub page: Box<[u8; page::SIZE]>,
}

impl Exchange {
    pub fn set(&mut self, field: Field, value: u64) {
        page::set(&mut self.page, field, value);
    }

    pub fn get(&self, field: Field) -> u64 {
        page::get(&self.page, field)
    }

    pub fn malformed(&mut self, why: Malformed) {
        self.set(Field::ExitInfo1, info1::MALFORMED_INPUT);
        self.set(Field::ExitInfo2, why as u64);
    }

    /// `svm_complete_emulated_msr` with an error.
    pub fn inject_gp(&mut self) {
        self.set(Field::ExitInfo1, info1::ISSUE_EXCEPTION);
        self.set(Field::ExitInfo2, exit::INJECT_GP);
    }

    /// A copy of the scratch area of `len` bytes at `scratch`, or `None` if it does not lie in this page's
    /// shared buffer as a whole. GHCB version 2, which SNP demands, allows no other place (Linux 6.12.117 and
    /// 7.3.4; 6.17 and 6.18 took others).
    pub fn scratch(&self, scratch: u64, len: u64) -> Option<Vec<u8>> {
        let offset = usize::try_from(scratch.checked_sub(self.gpa)?).ok()?;
        let end = usize::try_from(len).ok().and_then(|len| offset.checked_add(len))?;
        if offset < page::SHARED_BUFFER || end > page::SHARED_BUFFER_END {
            return None;
        }
        Some(self.page.get(offset..end)?.to_vec())
    }

    /// Ends the event: writes the fields of the answer to the guest's page.
    pub fn resume(self, guest: Guest) -> Outcome {
        // If the page is no longer shared (the guest has changed its own GHCB), there is nobody to answer.
        for field in [Field::Rax, Field::Rbx, Field::Rcx, Field::Rdx, Field::ExitInfo1, Field::ExitInfo2] {
            let at = field.offset();
            if !guest.write(self.gpa + at as u64, &self.page[at..at + 8]) {
                return Outcome::Resume;
            }
        }
        let bitmap = page::VALID_BITMAP..page::VALID_BITMAP + 16;
        guest.write(self.gpa + page::VALID_BITMAP as u64, &self.page[bitmap]);
        Outcome::Resume
    }

    /// Ends the event as malformed.
    pub fn refuse(mut self, guest: Guest, why: Malformed) -> Outcome {
        self.malformed(why);
        self.resume(guest)
    }
}
