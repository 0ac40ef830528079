// SPDX-License-Identifier: Apache-2.0
//! The launch of an emulated SNP guest: each command goes to the model.

use kvm_bindings::kvm_sev_init;
use kvm_bindings::kvm_sev_snp_launch_finish;
use kvm_bindings::kvm_sev_snp_launch_start;
use kvm_bindings::kvm_sev_snp_launch_update;
use snp::digest::LaunchDigest;
use snp_model::commands;
use snp_model::commands::CommandError;

use super::vm::EmulatedVm;
use crate::platform::error::CallError;
use crate::platform::error::SevError;
use crate::platform::mapping::PAGE;
use crate::platform::sev::Snp;

impl Snp for EmulatedVm {
    fn enable_map_gpa_range_exit(&self) -> Result<(), CallError> {
        self.0.model.set_hypercall_exits(true);
        Ok(())
    }

    fn sev_init2(&self, init: &mut kvm_sev_init) -> Result<(), SevError> {
        let args = commands::Init2 {
            vmsa_features: init.vmsa_features,
            flags: init.flags,
            ghcb_version: init.ghcb_version,
        };
        self.0.model.init2(&args).map_err(failed("KVM_SEV_INIT2"))
    }

    fn snp_launch_start(&self, start: &mut kvm_sev_snp_launch_start) -> Result<(), SevError> {
        let args = commands::Start { policy: start.policy, gosvw: start.gosvw, flags: start.flags };
        self.0.model.launch_start(&args, &mut rand_core::OsRng).map_err(failed("KVM_SEV_SNP_LAUNCH_START"))
    }

    fn snp_launch_update(
        &self,
        update: &mut kvm_sev_snp_launch_update,
        source: &mut [u8],
    ) -> Result<(), SevError> {
        let mut args = commands::Update {
            gfn_start: update.gfn_start,
            uaddr: source.as_ptr().addr() as u64,
            len: update.len,
            page_type: update.type_,
            flags: update.flags,
        };
        let result = self.0.model.launch_update(&mut args, source, &self.0.views);
        let launched = update.gfn_start * PAGE..args.gfn_start * PAGE;
        let opened = self.0.views.validation_changed(&self.0.model.pages, launched, true);
        (update.gfn_start, update.uaddr, update.len) = (args.gfn_start, args.uaddr, args.len);
        result.map_err(failed("KVM_SEV_SNP_LAUNCH_UPDATE"))?;
        opened.map_err(|e| SevError {
            command: "KVM_SEV_SNP_LAUNCH_UPDATE",
            errno: e.source.raw_os_error().unwrap_or(libc::EIO),
            firmware: 0,
        })
    }

    fn snp_launch_finish(
        &self,
        finish: &mut kvm_sev_snp_launch_finish,
        id: Option<(&[u8; 96], &[u8; 4096])>,
    ) -> Result<(), SevError> {
        const COMMAND: &str = "KVM_SEV_SNP_LAUNCH_FINISH";
        let vm = &self.0;
        let args = commands::FinishArgs {
            id,
            auth_key_en: finish.auth_key_en != 0,
            vcek_disabled: finish.vcek_disabled != 0,
            host_data: finish.host_data,
            flags: finish.flags,
        };
        vm.model.launch_finish(&args, &vm.vmsas()).map_err(failed(COMMAND))
    }

    fn measured(&self) -> Option<LaunchDigest> {
        self.0.model.launch_digest()
    }

    fn snp_enable_req_certs(&self) -> Result<(), SevError> {
        self.0.model.enable_req_certs().map_err(failed("KVM_SEV_SNP_ENABLE_REQ_CERTS"))
    }
}

fn failed(command: &'static str) -> impl Fn(CommandError) -> SevError {
    move |e| SevError { command, errno: e.errno.0, firmware: e.firmware.0 }
}
