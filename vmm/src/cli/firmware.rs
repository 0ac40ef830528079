// SPDX-License-Identifier: Apache-2.0
//! Firmware and IGVM files: the options that name them, the same for running and for measuring, and their launch.
//!
//! Both are measured through the same plans as they are launched with (`Ovmf::plan`, `Igvm::launch`). Files are read and
//! not believed; their parsers live in the library.

use std::ops::Range;
use std::path::Path;
use std::path::PathBuf;

use snp::identity::IdAuth;
use snp::identity::IdBlock;
use snp::image::direct::DirectImage;
use snp::image::igvm::Facts;
use snp::image::igvm::Igvm;
use snp::image::igvm::ZeroPages;
use snp::image::layout;
use snp::image::ovmf::Ovmf;
use snp::image::ovmf::OvmfLaunch;
use snp::image::regions::regions;
use snp::image::sites;
use snp::image::sites::Annotations;
use snp::image::sites::Opcode;
use snp::image::sites::ShimSites;
use snp::pages::cpuid::CpuidTable;
use snp::pages::hashes::KernelHashes;
use snp::plan::Bytes;
use snp::plan::LaunchPlan;
use snp::plan::PageType;
use snp::plan::Record;
use snp::policy::GuestPolicy;
use snp::stage0::InputsPage;
use snp::vcpu_model;
use snp::vmm_type::VcpuSetup;
use snp::vmm_type::VmmType;

use super::Failure;
use super::run::ImageArgs;
use crate::config;
use crate::launch::Staged;

/// CR0.PG.
const PAGING: u64 = 1 << 31;

/// How pages of an IGVM file without data enter the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum ZeroPagesArg {
    /// NORMAL pages of zeros, as the IGVM specification says
    Normal,
    /// Type ZERO, as QEMU and Cloud Hypervisor load them
    Zero,
}

fn parse_features(text: &str) -> Result<u64, String> {
    // Without 0x it could be meant either way.
    let parsed = text.strip_prefix("0x").filter(|hex| !hex.starts_with('+'));
    match parsed.and_then(|hex| u64::from_str_radix(hex, 16).ok()) {
        Some(features) if features & 1 == 1 => Ok(features),
        Some(_) => {
            Err("bit 0 (SNP) is set in every SNP guest: give 0x1 and what was requested besides".into())
        }
        None => Err(format!("'{text}' is not a number in hexadecimal such as 0x1")),
    }
}

/// Which file is launched or measured in place of direct boot.
#[derive(clap::Args, Clone, Debug)]
pub struct FirmwareArgs {
    /// OVMF firmware with SEV metadata, in place of direct boot; a --kernel is then measured by its hash
    #[arg(long, value_name = "FILE", conflicts_with_all = ["igvm", "accept", "secure_tsc"])]
    pub firmware: Option<PathBuf>,
    /// IGVM file, in place of direct boot
    #[arg(long, value_name = "FILE", conflicts_with_all = ["kernel", "initrd", "accept", "secure_tsc"])]
    pub igvm: Option<PathBuf>,
    /// How pages without data in an IGVM file are launched
    #[arg(long, value_enum, requires = "igvm")]
    zero_pages: Option<ZeroPagesArg>,
    /// vCPU model of a firmware launch, as a name (EPYC-Milan) or a CPUID signature (0xa00f11): RDX of every vCPU, so part of
    /// the digest. A launch takes the host's if this is left out
    #[arg(long, value_name = "MODEL", conflicts_with = "igvm", value_parser = |text: &str| vcpu_model::parse(text))]
    pub vcpu_model: Option<u32>,
    /// The complete sev_features of a firmware launch
    #[arg(long, value_name = "BITS", conflicts_with = "igvm", default_value = "0x1", value_parser = parse_features)]
    pub guest_features: u64,
}

/// The bytes of a file that an option named. They are ours: a mapping would end the process when somebody cuts the file short,
/// and what is launched would be what the file holds then.
pub fn map(option: &'static str, path: &Path) -> Result<Bytes, Failure> {
    config::read_file(option, path).map(Bytes::from).map_err(Failure::usage)
}

/// An error about a file that an option named.
pub fn wrong(option: &'static str, path: &Path) -> impl Fn(&dyn std::fmt::Display) -> Failure {
    move |error| Failure::Usage(format!("{option} {}: {error}", path.display()))
}

/// A kernel that firmware is told the hashes of.
pub struct HashedKernel {
    /// The hashes.
    pub hashes: KernelHashes,
    /// The kernel file.
    pub kernel: Bytes,
    /// The initrd, empty if there is none.
    pub initrd: Bytes,
}

impl HashedKernel {
    /// Reads the files of `args`; `None` without a kernel.
    pub fn read(args: &ImageArgs) -> Result<Option<Self>, Failure> {
        let Some(kernel) = &args.kernel else {
            return match &args.initrd {
                Some(_) => Err(Failure::Usage(
                    "--initrd needs --kernel: the firmware checks both, or neither".into(),
                )),
                None => Ok(None),
            };
        };
        let initrd = args.initrd.as_deref().map(|path| map("--initrd", path)).transpose()?;
        let initrd = initrd.unwrap_or_else(|| Bytes::from(Vec::new()));
        let kernel = map("--kernel", kernel)?;
        let hashes = KernelHashes::of(kernel.as_slice(), initrd.as_slice(), args.cmdline.as_bytes());
        Ok(Some(HashedKernel { hashes, kernel, initrd }))
    }
}

/// What is launched, from whatever kind of file.
pub struct LaunchImage {
    /// What enters the guest.
    pub plan: LaunchPlan,
    /// Its memory, ascending.
    pub ram: Vec<Range<u64>>,
    /// What it finds in shared memory.
    pub staged: Staged,
    /// For the emulated platform: where its code executes SNP instructions. `None` if that is not known yet.
    pub code: Option<Annotations>,
    /// The same for stage0.
    pub stage0: Option<ShimSites>,
    /// stage0's page of inputs.
    pub inputs_page: Option<InputsPage>,
    /// The policy that the file asks for.
    pub policy: Option<GuestPolicy>,
    /// The ID block in the file.
    pub identity: Option<(IdBlock, IdAuth)>,
    /// What `cvmm measure` would record about it.
    pub inputs: Vec<(&'static str, String)>,
    /// What the user should know.
    pub notes: Vec<String>,
}

impl LaunchImage {
    /// A kernel that is booted directly.
    pub fn direct(image: DirectImage) -> Self {
        LaunchImage {
            plan: image.plan,
            ram: image.ram,
            code: None,
            stage0: image.shim.as_ref().map(|shim| shim.sites.clone()),
            inputs_page: image.shim.as_ref().map(|shim| shim.inputs.clone()),
            staged: image.shim.map_or_else(Staged::default, |shim| Staged {
                bytes: shim.staging,
                shared: shim.shared,
                raced: None,
            }),
            policy: None,
            identity: None,
            inputs: Vec::new(),
            notes: Vec::new(),
        }
    }
}

impl FirmwareArgs {
    /// The option that names a file, if one does.
    pub fn option(&self) -> Option<&'static str> {
        self.firmware.as_ref().map(|_| "--firmware").or(self.igvm.as_ref().map(|_| "--igvm"))
    }

    /// Reads the IGVM file at `path`; its ID block, if it has one, is for its contents.
    pub fn read_igvm(&self, path: &Path) -> Result<(Bytes, Igvm), Failure> {
        let wrong = wrong("--igvm", path);
        let image = map("--igvm", path)?;
        let zero_pages = match self.zero_pages {
            Some(ZeroPagesArg::Zero) => ZeroPages::Zero,
            _ => ZeroPages::Normal,
        };
        let igvm = Igvm::parse(&image, zero_pages).map_err(|e| wrong(&e))?;
        igvm.check_identity().map_err(|e| wrong(&e))?;
        Ok((image, igvm))
    }

    /// What to launch, if it is firmware or an IGVM file. `table` is the guest's CPUID, `limit` the end of its addresses.
    pub fn image(
        &self,
        args: &ImageArgs,
        table: &CpuidTable,
        limit: u64,
    ) -> Result<Option<LaunchImage>, Failure> {
        match (&self.firmware, &self.igvm) {
            (Some(path), _) => self.ovmf_image(path, args, table, limit).map(Some),
            (_, Some(path)) => self.igvm_image(path, args, table, limit).map(Some),
            (None, None) => Ok(None),
        }
    }

    fn ovmf_image(
        &self,
        path: &Path,
        args: &ImageArgs,
        table: &CpuidTable,
        limit: u64,
    ) -> Result<LaunchImage, Failure> {
        let wrong = wrong("--firmware", path);
        let ovmf = Ovmf::parse(map("--firmware", path)?).map_err(|e| wrong(&e))?;
        let host = table.get(1, 0).map_or(0, |leaf| leaf.eax);
        let signature = self.vcpu_model.unwrap_or(host);
        let kernel = HashedKernel::read(args)?;
        let launch = OvmfLaunch {
            vmm: VmmType::Cvmm,
            vcpus: args.cpus,
            setup: VcpuSetup { signature, sev_features: self.guest_features },
            kernel: kernel.as_ref().map(|k| &k.hashes),
        };
        let mut plan = ovmf.plan(&launch).map_err(|e| wrong(&e))?;
        let page = Bytes::from(table.page().map_err(Failure::monitor)?.to_vec());
        for record in plan.records.iter_mut().filter(|r| r.page_type == PageType::Cpuid) {
            record.contents = page.clone();
        }
        let mut notes = vec![format!(
            "the firmware's digest is that of `cvmm measure --firmware … --vcpu-model {signature:#x} --cpus {}`",
            args.cpus
        )];
        notes.push(
            "warning: --firmware: this machine has no fw_cfg, no PCI host bridge and no variable store, which OVMF needs to \
             get beyond its first phase: it is launched and measured, but will not boot a system"
                .into(),
        );
        if kernel.is_some() {
            notes.push(
                "warning: --kernel with --firmware: its hashes are measured, but without fw_cfg the firmware cannot fetch it"
                    .into(),
            );
        }
        let ram = regions(args.memory, plan.records.iter(), limit).map_err(|e| wrong(&e))?;
        Ok(LaunchImage {
            ram,
            staged: Staged::default(),
            code: Some(sites::annotate_code([ovmf.boot_code()])),
            stage0: None,
            inputs_page: None,
            policy: None,
            identity: None,
            inputs: vec![
                ("image", "firmware".into()),
                ("vcpu signature", format!("{signature:#x}")),
                ("guest features", format!("{:#x}", self.guest_features)),
                ("cmdline", args.cmdline.clone()),
            ],
            notes,
            plan,
        })
    }

    fn igvm_image(
        &self,
        path: &Path,
        args: &ImageArgs,
        table: &CpuidTable,
        limit: u64,
    ) -> Result<LaunchImage, Failure> {
        let wrong = wrong("--igvm", path);
        let (_, igvm) = self.read_igvm(path)?;
        if args.cpus != 1 {
            let reason = "the file has one save area, and KVM would measure one more for each further vCPU: use --cpus 1";
            return Err(wrong(&reason));
        }
        let ram = regions(args.memory, igvm.pages(), limit).map_err(|e| wrong(&e))?;
        let facts = Facts {
            vcpus: args.cpus,
            ram: &layout::ram_ranges(args.memory),
            devices: layout::HOLE_START..layout::HOLE_END,
            cmdline: &args.cmdline,
            cpuid: table.page().map_err(Failure::monitor)?.to_vec().into(),
        };
        let loaded = igvm.launch(&facts).map_err(|e| wrong(&e))?;
        let normal = |r: &&Record| r.page_type == PageType::Normal;
        let code = loaded.plan.records.iter().filter(normal).map(|r| (r.gpa, r.contents.as_slice()));
        let mut notes = vec![format!("pages without data are {}; choose with --zero-pages", igvm.zero_pages)];
        if loaded.plan.vcpus.iter().any(|vcpu| vcpu.cr0 & PAGING != 0) {
            let c_bit = limit.trailing_zeros();
            notes.push(format!(
                "the file starts with paging on, so its page tables hold the C-bit where its maker put it; here it is bit {c_bit}"
            ));
        }
        let code = Some(sites::annotate_code(code));
        Ok(LaunchImage {
            ram,
            staged: Staged {
                shared: loaded.shared.iter().map(|r| r.gpa..r.end()).collect(),
                bytes: loaded.shared.into_iter().map(|r| (r.gpa, r.contents)).collect(),
                raced: None,
            },
            code,
            stage0: None,
            inputs_page: None,
            policy: igvm.policy,
            identity: igvm.identity.clone(),
            inputs: vec![("image", "IGVM".into()), ("zero pages", igvm.zero_pages.to_string())],
            notes,
            plan: loaded.plan,
        })
    }
}

/// What the emulated platform does with the code of a file without section headers.
pub fn replaced(code: &Annotations) -> String {
    let count = |opcode| code.kernel.count(opcode);
    format!(
        "emulated platform: {} VMGEXIT, {} PVALIDATE and {} RMPADJUST instructions of the file are replaced after the \
         launch. Code that the guest unpacks or writes later is not, and does not work here",
        count(Opcode::Vmgexit),
        count(Opcode::Pvalidate),
        count(Opcode::Rmpadjust)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn features_without_snp_are_refused() {
        assert_eq!(parse_features("0x21"), Ok(0x21));
        assert!(parse_features("0x20").is_err());
    }
}
