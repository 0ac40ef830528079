// SPDX-License-Identifier: Apache-2.0
//! `KVM_SEV_SNP_LAUNCH_UPDATE`, record by record.
//!
//! KVM may take part of what it is given: a call ends at the end of a memory slot, at a signal, or at the
//! first page that is refused after others were taken; the next call then reports that page. So the arguments
//! are in and out, and each record is a loop (Linux, `Documentation/virt/kvm/x86/amd-memory-encryption.rst`).

use std::thread;
use std::time::Duration;

use kvm_bindings::kvm_sev_snp_launch_update;
use snp::firmware_status::FwStatus;
use snp::pages::cpuid_diff::CpuidDiff;
use snp::pages::cpuid_diff::Page;
use snp::pages::cpuid_raw::RawCpuid;
use snp::plan::PAGE_SIZE;
use snp::plan::PageType;
use snp::plan::Record;

use super::error;
use super::error::LaunchError;
use super::error::MAX_RETRIES;
use crate::platform::error::SevError;
use crate::platform::sev::Snp;

/// How much of a record one call takes from the scratch buffer, in bytes.
const CHUNK: usize = 1 << 20;
/// How long to wait after EAGAIN.
const RETRY_DELAY: Duration = Duration::from_millis(1);

/// Where pages are loaded from, so that no copy of a private page stays in shared memory. It begins at a
/// page: from Linux 7.1 on KVM pins the source and takes no other address (`sev.c:snp_launch_update`).
struct Scratch {
    bytes: Vec<u8>,
    /// Where the first page of `bytes` begins; the allocation never moves.
    start: usize,
}

impl Scratch {
    fn new() -> Self {
        let bytes = vec![0; CHUNK + PAGE_SIZE as usize];
        let start = bytes.as_ptr().addr().wrapping_neg() % PAGE_SIZE as usize;
        Scratch { bytes, start }
    }

    /// The first `len` bytes, at most [`CHUNK`].
    fn first(&mut self, len: usize) -> &mut [u8] {
        self.bytes.get_mut(self.start..self.start + len.min(CHUNK)).unwrap_or_default()
    }
}

/// Adds the records of a plan.
pub struct Updater<'a> {
    vm: &'a dyn Snp,
    scratch: Scratch,
    accept_cpuid: bool,
    host_cpuid: Option<&'a RawCpuid>,
    /// What the firmware changed in the CPUID page, and was accepted.
    pub accepted: Option<CpuidDiff>,
}

impl<'a> Updater<'a> {
    /// `accept_cpuid`: launch with the firmware's CPUID page if every change is on the list of acceptable
    /// ones. Without being asked, if KVM made up every bit that is lost; `host_cpuid`, the processors' own
    /// CPUID, tells.
    pub fn new(vm: &'a dyn Snp, accept_cpuid: bool, host_cpuid: Option<&'a RawCpuid>) -> Self {
        Updater { vm, scratch: Scratch::new(), accept_cpuid, host_cpuid, accepted: None }
    }

    /// Adds one record, in as many calls as it takes.
    pub fn add(&mut self, record: &Record) -> Result<(), LaunchError> {
        let mut done = 0;
        let mut retries = 0;
        while done < record.len {
            let (taken, result) = self.call(record, done);
            // Progress counts even if the call failed.
            done += taken;
            retries = if taken > 0 { 0 } else { retries + 1 };
            let gpa = record.gpa + done;
            match result {
                Ok(()) => {}
                Err(e) if e.errno == libc::EAGAIN => thread::sleep(RETRY_DELAY),
                Err(e)
                    if record.page_type == PageType::Cpuid
                        && FwStatus(e.firmware) == FwStatus::INVALID_PARAM =>
                {
                    self.refused(record, e)?;
                    return Ok(());
                }
                Err(source) => {
                    let step = format!("adding {} ({} page at {gpa:#x})", record.name, record.page_type);
                    return Err(LaunchError::Sev { step, source });
                }
            }
            if retries >= MAX_RETRIES {
                return Err(LaunchError::NoProgress { name: record.name.to_string(), gpa });
            }
        }
        Ok(())
    }

    /// One call for what is left of `record` after `done` bytes; returns how many bytes were taken.
    fn call(&mut self, record: &Record, done: u64) -> (u64, Result<(), SevError>) {
        let zero = record.page_type == PageType::Zero;
        let left = record.len - done;
        let len = if zero { left } else { left.min(CHUNK as u64) };
        // SECRETS is filled by the firmware, but KVM reads a page for it all the same.
        let source = self.scratch.first(if zero { 0 } else { len as usize });
        let bytes = record.contents.as_slice();
        let rest = bytes.get(done as usize..).unwrap_or_default();
        let (head, tail) = source.split_at_mut(rest.len().min(source.len()));
        head.copy_from_slice(&rest[..head.len()]);
        tail.fill(0);
        let mut args = kvm_sev_snp_launch_update {
            gfn_start: (record.gpa + done) / PAGE_SIZE,
            len,
            type_: record.page_type as u8,
            ..Default::default()
        };
        let result = self.vm.snp_launch_update(&mut args, source);
        (len - args.len.min(len), result)
    }

    /// The firmware refused the CPUID page, and its version is in the scratch buffer. It is offered again if
    /// nothing is lost but what KVM made up, or if the user asked for that and every change is on the list.
    fn refused(&mut self, record: &Record, error: SevError) -> Result<(), LaunchError> {
        let gpa = record.gpa;
        let step = || format!("adding {} (CPUID page at {gpa:#x})", record.name);
        let mut offered: Page = [0; PAGE_SIZE as usize];
        record.read_page(0, &mut offered);
        let page = self.scratch.first(PAGE_SIZE as usize);
        let Some(source) = page.first_chunk_mut::<{ PAGE_SIZE as usize }>() else {
            return Err(LaunchError::Sev { step: step(), source: error });
        };
        let diff = match CpuidDiff::new(&offered, source) {
            Ok(diff) if diff.structure || !diff.differences.is_empty() => diff,
            // Refused, and nothing offered instead.
            _ => return Err(LaunchError::Sev { step: step(), source: error }),
        };
        let accepted = diff.is_made_up(self.host_cpuid) || self.accept_cpuid && diff.is_acceptable();
        if !accepted {
            return Err(LaunchError::Cpuid { name: record.name.to_string(), gpa, diff });
        }
        let mut args = kvm_sev_snp_launch_update {
            gfn_start: gpa / PAGE_SIZE,
            len: PAGE_SIZE,
            type_: PageType::Cpuid as u8,
            ..Default::default()
        };
        self.vm
            .snp_launch_update(&mut args, source)
            .map_err(error::command(format!("{} with the firmware's own values", step())))?;
        self.accepted = Some(diff);
        Ok(())
    }
}
