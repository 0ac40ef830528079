// SPDX-License-Identifier: Apache-2.0
//! The SEV commands of `KVM_MEMORY_ENCRYPT_OP`, passed through.
//!
//! Each function fills in `struct kvm_sev_cmd` (Linux, `arch/x86/include/uapi/asm/kvm.h`) and hands over the
//! caller's struct; the layouts are asserted in `kvm-bindings` and below.

use std::os::fd::AsRawFd;

use kvm_bindings::KVM_CAP_EXIT_HYPERCALL;
use kvm_bindings::kvm_enable_cap;
use kvm_bindings::kvm_sev_cmd;
use kvm_bindings::kvm_sev_init;
use kvm_bindings::kvm_sev_snp_launch_finish;
use kvm_bindings::kvm_sev_snp_launch_start;
use kvm_bindings::kvm_sev_snp_launch_update;
use kvm_bindings::sev_cmd_id_KVM_SEV_INIT2 as INIT2;
use kvm_bindings::sev_cmd_id_KVM_SEV_SNP_LAUNCH_FINISH as LAUNCH_FINISH;
use kvm_bindings::sev_cmd_id_KVM_SEV_SNP_LAUNCH_START as LAUNCH_START;
use kvm_bindings::sev_cmd_id_KVM_SEV_SNP_LAUNCH_UPDATE as LAUNCH_UPDATE;
use snp::plan::PAGE_SIZE;
use snp::plan::PageType;

use super::vm::KvmVm;
use crate::platform::HC_MAP_GPA_RANGE;
use crate::platform::error::CallError;
use crate::platform::error::SevError;
use crate::platform::sev::Snp;

const _: () = {
    assert!(size_of::<kvm_sev_cmd>() == 24);
    assert!(size_of::<kvm_sev_init>() == 48);
    assert!(size_of::<kvm_sev_snp_launch_start>() == 64);
    assert!(size_of::<kvm_sev_snp_launch_update>() == 64);
    assert!(size_of::<kvm_sev_snp_launch_finish>() == 88);
};

/// `KVM_SEV_SNP_ENABLE_REQ_CERTS` of Linux 7.0, which `kvm-bindings` does not have yet.
const ENABLE_REQ_CERTS: u32 = 103;

/// Issues one command. `data` points to the command's struct, or is 0.
fn command(vm: &KvmVm, name: &'static str, id: u32, data: u64) -> Result<(), SevError> {
    let Some(sev) = &vm.sev else {
        return Err(SevError { command: name, errno: libc::ENOTTY, firmware: 0 });
    };
    let mut cmd = kvm_sev_cmd { id, pad0: 0, data, error: 0, sev_fd: sev.as_raw_fd() as u32 };
    vm.fd.encrypt_op_sev(&mut cmd).map_err(|e| SevError {
        command: name,
        errno: e.errno(),
        firmware: cmd.error,
    })
}

impl Snp for KvmVm {
    fn enable_map_gpa_range_exit(&self) -> Result<(), CallError> {
        let mut cap = kvm_enable_cap { cap: KVM_CAP_EXIT_HYPERCALL, ..Default::default() };
        cap.args[0] = 1 << HC_MAP_GPA_RANGE;
        self.fd.enable_cap(&cap).map_err(CallError::of("KVM_ENABLE_CAP(KVM_CAP_EXIT_HYPERCALL)"))
    }

    fn sev_init2(&self, init: &mut kvm_sev_init) -> Result<(), SevError> {
        command(self, "KVM_SEV_INIT2", INIT2, std::ptr::from_mut(init) as u64)
    }

    fn snp_launch_start(&self, start: &mut kvm_sev_snp_launch_start) -> Result<(), SevError> {
        command(self, "KVM_SEV_SNP_LAUNCH_START", LAUNCH_START, std::ptr::from_mut(start) as u64)
    }

    fn snp_launch_update(
        &self,
        update: &mut kvm_sev_snp_launch_update,
        source: &mut [u8],
    ) -> Result<(), SevError> {
        const NAME: &str = "KVM_SEV_SNP_LAUNCH_UPDATE";
        let zero = update.type_ == PageType::Zero as u8;
        if !zero && (source.len() as u64) < update.len {
            return Err(SevError { command: NAME, errno: libc::EFAULT, firmware: 0 });
        }
        // Kernels before 7.1 would take it; ours is to work on all of them.
        if !zero && !source.as_ptr().addr().is_multiple_of(PAGE_SIZE as usize) {
            return Err(SevError { command: NAME, errno: libc::EINVAL, firmware: 0 });
        }
        update.uaddr = if zero { 0 } else { source.as_mut_ptr() as u64 };
        command(self, NAME, LAUNCH_UPDATE, std::ptr::from_mut(update) as u64)
    }

    fn snp_launch_finish(
        &self,
        finish: &mut kvm_sev_snp_launch_finish,
        id: Option<(&[u8; 96], &[u8; 4096])>,
    ) -> Result<(), SevError> {
        finish.id_block_en = u8::from(id.is_some());
        if let Some((block, auth)) = id {
            finish.id_block_uaddr = block.as_ptr() as u64;
            finish.id_auth_uaddr = auth.as_ptr() as u64;
        }
        command(self, "KVM_SEV_SNP_LAUNCH_FINISH", LAUNCH_FINISH, std::ptr::from_mut(finish) as u64)
    }

    fn snp_enable_req_certs(&self) -> Result<(), SevError> {
        command(self, "KVM_SEV_SNP_ENABLE_REQ_CERTS", ENABLE_REQ_CERTS, 0)
    }
}
