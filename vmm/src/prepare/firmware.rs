// SPDX-License-Identifier: Apache-2.0
//! Firmware and IGVM files.
//!
//! Both are measured through the same plans as they are launched with (`Ovmf::plan`, `Igvm::launch`). Files
//! are read and not believed; their parsers live in the library.

use std::path::Path;

use snp::board::Board;
use snp::image::igvm;
use snp::image::igvm::Facts;
use snp::image::igvm::Igvm;
use snp::image::ovmf::Ovmf;
use snp::image::ovmf::OvmfLaunch;
use snp::image::regions::regions;
use snp::image::vmm_type::VcpuSetup;
use snp::image::vmm_type::VmmType;
use snp::pages::cpuid::CpuidTable;
use snp::pages::hashes::KernelHashes;
use snp::plan::Bytes;
use snp::plan::LaunchPlan;
use snp::plan::PageType;
use snp_model::patch::Annotations;
use snp_model::patch::Opcode;

use super::error::PrepareError;
use super::error::read;
use super::image::LaunchImage;
use super::image::Names;
use super::image::Target;
use crate::events::Event;
use crate::events::Events;
use crate::launch::Staged;
use crate::spec::FirmwareSpec;
use crate::spec::IgvmSpec;
use crate::spec::KernelSpec;
use crate::spec::VmSpec;
use crate::spec::ZeroPages;

/// CR0.PG.
const PAGING: u64 = 1 << 31;
const FIRMWARE: &str = "boot.firmware.image";
const IGVM: &str = "boot.igvm.image";

/// A kernel that firmware is told the hashes of.
struct HashedKernel {
    hashes: KernelHashes,
    kernel: Bytes,
    /// Empty if there is none.
    initrd: Bytes,
}

impl HashedKernel {
    fn read(spec: &KernelSpec, events: &Events) -> Result<Self, PrepareError> {
        let initrd = spec
            .initrd
            .as_deref()
            .map(|path| read("boot.firmware.kernel.initrd", path, events))
            .transpose()?;
        let initrd = initrd.unwrap_or_else(|| Bytes::from(Vec::new()));
        let kernel = read("boot.firmware.kernel.kernel", &spec.kernel, events)?;
        let hashes = KernelHashes::of(kernel.as_slice(), initrd.as_slice(), spec.cmdline.as_bytes());
        Ok(HashedKernel { hashes, kernel, initrd })
    }
}

/// Firmware and the kernel that it is told of, read and parsed.
pub struct FirmwareFiles {
    /// The image's bytes.
    pub image: Bytes,
    /// The image.
    pub ovmf: Ovmf,
    kernel: Option<HashedKernel>,
}

impl FirmwareFiles {
    /// Reads them.
    pub fn read(spec: &FirmwareSpec, events: &Events) -> Result<Self, PrepareError> {
        let image = read(FIRMWARE, &spec.image, events)?;
        let ovmf = Ovmf::parse(image.clone()).map_err(PrepareError::file(FIRMWARE, &spec.image))?;
        let kernel = spec.kernel.as_ref().map(|kernel| HashedKernel::read(kernel, events)).transpose()?;
        Ok(FirmwareFiles { image, ovmf, kernel })
    }

    /// What `vmm` launches, with `vcpus` vCPUs of the model with this CPUID signature.
    pub fn plan(
        &self,
        spec: &FirmwareSpec,
        vmm: VmmType,
        vcpus: u32,
        signature: u32,
    ) -> Result<LaunchPlan, PrepareError> {
        let setup = VcpuSetup { signature, sev_features: spec.guest_features };
        let kernel = self.kernel.as_ref().map(|kernel| &kernel.hashes);
        let plan = self.ovmf.plan(&OvmfLaunch { vmm, vcpus, setup, kernel });
        plan.map_err(PrepareError::file(FIRMWARE, &spec.image))
    }

    /// What the digest depends on, the number of vCPUs aside.
    pub fn inputs(
        &self,
        spec: &FirmwareSpec,
        vmm: VmmType,
        signature: u32,
        names: Names,
    ) -> Vec<(&'static str, String)> {
        if names == Names::None {
            return Vec::new();
        }
        let mut inputs = vec![
            ("firmware sha256", names.of(self.image.as_slice())),
            ("monitor", vmm.to_string()),
            ("vcpu signature", format!("{signature:#x}")),
            ("guest features", format!("{:#x}", spec.guest_features)),
        ];
        if let (Some(read), Some(kernel)) = (&self.kernel, &spec.kernel) {
            inputs.push(("kernel sha256", names.of(read.kernel.as_slice())));
            inputs.push(("initrd sha256", names.of(read.initrd.as_slice())));
            inputs.push(("cmdline", kernel.cmdline.clone()));
        }
        inputs
    }
}

/// Reads an IGVM file; its ID block, if it has one, is for its contents.
pub fn read_igvm(spec: &IgvmSpec, events: &Events) -> Result<(Bytes, Igvm), PrepareError> {
    let image = read(IGVM, &spec.image, events)?;
    let zero_pages = match spec.zero_pages {
        ZeroPages::Zero => igvm::ZeroPages::Zero,
        ZeroPages::Normal => igvm::ZeroPages::Normal,
    };
    let igvm = Igvm::parse(&image, zero_pages).map_err(PrepareError::file(IGVM, &spec.image))?;
    igvm.check_identity().map_err(PrepareError::file(IGVM, &spec.image))?;
    Ok((image, igvm))
}

/// The image of a firmware launch. `table` is the guest's CPUID.
pub(super) fn firmware(
    spec: &VmSpec,
    firmware: &FirmwareSpec,
    files: &FirmwareFiles,
    table: &CpuidTable,
    target: &Target<'_>,
) -> Result<LaunchImage, PrepareError> {
    let host = table.get(1, 0).map_or(0, |leaf| leaf.eax);
    let signature = firmware.vcpu_model.unwrap_or(host);
    let mut plan = files.plan(firmware, VmmType::Cvmm, spec.cpus, signature)?;
    let page = Bytes::from(table.page().map_err(PrepareError::host)?.to_vec());
    for record in plan.records.iter_mut().filter(|r| r.page_type == PageType::Cpuid) {
        record.contents = page.clone();
    }
    let mut notes = vec![
        Event::Note(format!(
            "the firmware's digest is that of `cvmm measure --firmware … --vcpu-model {signature:#x} --cpus {}`",
            spec.cpus
        )),
        Event::Warning(
            "`firmware`: this machine has no fw_cfg, no PCI host bridge and no variable store, which OVMF needs to get \
             beyond its first phase: it is launched and measured, but will not boot a system"
                .into(),
        ),
    ];
    if files.kernel.is_some() {
        let text = "`kernel` with `firmware`: its hashes are measured, but without fw_cfg the firmware cannot fetch it";
        notes.push(Event::Warning(text.into()));
    }
    let board = Board::new(spec.memory, spec.cpus);
    let ram = regions(&board, plan.records.iter(), 1 << target.c_bit)
        .map_err(PrepareError::file(FIRMWARE, &firmware.image))?;
    let mut inputs = files.inputs(firmware, VmmType::Cvmm, signature, target.names);
    inputs.push(("image", "firmware".into()));
    Ok(LaunchImage { inputs, notes, ..LaunchImage::new(plan, board, ram) })
}

/// The image of an IGVM launch. `table` is the guest's CPUID.
pub(super) fn igvm(
    spec: &VmSpec,
    file: &IgvmSpec,
    igvm: &Igvm,
    table: &CpuidTable,
    target: &Target<'_>,
) -> Result<LaunchImage, PrepareError> {
    let path: &Path = &file.image;
    if spec.cpus != 1 {
        let reason =
            "the file has one save area, and KVM would measure one more for each further vCPU: use `cpus` 1";
        return Err(PrepareError::file(IGVM, path)(reason));
    }
    let board = Board::new(spec.memory, spec.cpus);
    let ram = regions(&board, igvm.pages(), 1 << target.c_bit).map_err(PrepareError::file(IGVM, path))?;
    let facts = Facts {
        board: &board,
        cmdline: &file.cmdline,
        cpuid: table.page().map_err(PrepareError::host)?.to_vec().into(),
    };
    let loaded = igvm.launch(&facts).map_err(PrepareError::file(IGVM, path))?;
    let zero_pages = igvm.zero_pages;
    let mut notes =
        vec![Event::Note(format!("pages without data are {zero_pages}; choose with `zero_pages`"))];
    if loaded.plan.vcpus.iter().any(|vcpu| vcpu.cr0 & PAGING != 0) {
        let c_bit = target.c_bit;
        notes.push(Event::Note(format!(
            "the file starts with paging on, so its page tables hold the C-bit where its maker put it; here it is bit {c_bit}"
        )));
    }
    Ok(LaunchImage {
        staged: Staged {
            shared: loaded.shared.iter().map(|r| r.gpa..r.end()).collect(),
            bytes: loaded.shared.into_iter().map(|r| (r.gpa, r.contents)).collect(),
            raced: None,
        },
        policy: igvm.policy,
        identity: igvm.identity.clone(),
        inputs: vec![("image", "IGVM".into()), ("zero pages", igvm.zero_pages.to_string())],
        notes,
        ..LaunchImage::new(loaded.plan, board, ram)
    })
}

/// What the emulated platform does with the code of a file without section headers.
pub(super) fn replaced(code: &Annotations) -> String {
    let count = |opcode| code.kernel.count(opcode);
    format!(
        "emulated platform: {} VMGEXIT, {} PVALIDATE and {} RMPADJUST instructions of the file are replaced after the launch. Code \
         that the guest unpacks or writes later is not, and does not work here",
        count(Opcode::Vmgexit),
        count(Opcode::Pvalidate),
        count(Opcode::Rmpadjust)
    )
}
