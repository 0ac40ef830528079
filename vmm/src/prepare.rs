// SPDX-License-Identifier: Apache-2.0
//! The one place where a boot is put together: from what was asked for to what enters the guest.
//!
//! A run and `cvmm measure` go through the same functions with the same [`VmSpec`], so a digest that was
//! computed beforehand can differ from the launch only where the host does: in the vCPU model of firmware, in
//! features that its KVM lacks. Nothing is printed here; what a user should know comes back as notes. Every
//! file is read, once and first: what is launched is what was measured, whatever happens to the file, and a
//! file that is missing is found before anything is asked of the host.

mod direct;
mod error;
mod firmware;
mod identity;
mod image;

use std::ops::Range;

use kvm_bindings::kvm_cpuid_entry2;
use snp::digest::Measured;
use snp::image::igvm::Igvm;
use snp::pages::cpuid::CpuidTable;
use snp::plan::LaunchPlan;
use snp::plan::PageType;
use snp::stage0::InputsPage;
use snp::vmsa::SEV_FEATURE_SECURE_TSC;
use snp::vmsa::SEV_FEATURE_SNP_ACTIVE;
use snp_model::patch;
use snp_model::patch::CodeHints;
use snp_model::rmp::TwoMib;
use vtpm_svc::measured::Event;

pub use direct::Files;
pub use direct::direct;
pub use error::PrepareError;
pub use error::read;
pub use firmware::FirmwareFiles;
pub use firmware::read_igvm;
pub use identity::read_auth;
pub use identity::read_block;
pub use image::LaunchImage;
pub use image::Names;
pub use image::Target;
pub use image::sha256;

use crate::cpuid;
use crate::events;
use crate::events::Events;
use crate::launch::LaunchOptions;
use crate::platform::Platform;
use crate::platform::emulated::EmulatedOptions;
use crate::platform::emulated::EmulatedPlatform;
use crate::platform::emulated::default_keys_path;
use crate::platform::kvm::KvmPlatform;
use crate::run::guest::Guest;
use crate::run::guest::Load;
use crate::run::guest::SnpLaunch;
use crate::spec::BootSpec;
use crate::spec::FirmwareSpec;
use crate::spec::IgvmSpec;
use crate::spec::KernelSpec;
use crate::spec::PlatformSpec;
use crate::spec::Pvalidate2m;
use crate::spec::SnpSpec;
use crate::spec::SpecError;
use crate::spec::VmSpec;
use crate::vtpm::backend;

/// The files of a boot, read and parsed.
pub enum BootFiles<'a> {
    /// Of a kernel.
    Direct(&'a KernelSpec, Files),
    /// Of firmware.
    Firmware(&'a FirmwareSpec, Box<FirmwareFiles>),
    /// Of an IGVM launch.
    Igvm(&'a IgvmSpec, Box<Igvm>),
}

impl<'a> BootFiles<'a> {
    /// Reads what `spec` names, if it does not contradict itself.
    pub fn read(spec: &'a VmSpec, events: &Events) -> Result<Self, PrepareError> {
        spec.validate()?;
        if let (Some(tpm), Some(backend)) = (&spec.tpm, spec.tpm_backend()) {
            let field = format!("backends.{}", tpm.backend);
            backend::check(backend).map_err(|problem| SpecError { field, problem })?;
        }
        Ok(match &spec.boot {
            BootSpec::Direct(kernel) => BootFiles::Direct(kernel, Files::read(kernel, events)?),
            BootSpec::Firmware(firmware) => {
                BootFiles::Firmware(firmware, Box::new(FirmwareFiles::read(firmware, events)?))
            }
            BootSpec::Igvm(igvm) => BootFiles::Igvm(igvm, Box::new(read_igvm(igvm, events)?.1)),
        })
    }
}

/// A guest that is ready to be created.
pub struct Ready {
    /// The guest.
    pub guest: Guest,
    /// What the PCRs of its TPM begin with; empty without a TPM.
    pub events: Vec<Event>,
    /// What the user should know.
    pub notes: Vec<events::Event>,
}

/// The platform that the guest runs on.
pub fn platform(spec: &VmSpec, events: &Events) -> Result<Box<dyn Platform>, PrepareError> {
    let Some(snp) = &spec.snp else {
        return Ok(Box::new(KvmPlatform::open().map_err(PrepareError::host)?));
    };
    match &snp.platform {
        PlatformSpec::Kvm => {
            let platform = KvmPlatform::open().map_err(PrepareError::host)?;
            platform.check_snp().map_err(PrepareError::host)?;
            if snp.certs.is_some() && platform.capabilities().req_certs != Some(1) {
                return Err(PrepareError::Host(
                    "`certs`: this kernel's KVM does not ask the monitor for certificates (Linux 7.0 does). Without it, \
                     guests get an empty table and fetch certificates themselves"
                        .into(),
                ));
            }
            Ok(Box::new(platform))
        }
        PlatformSpec::Emulated(emulated) => {
            let options = EmulatedOptions {
                backing: emulated.backing,
                strict: emulated.strict,
                two_mib: match emulated.pvalidate_2m {
                    Pvalidate2m::Refuse => TwoMib::SizeMismatch,
                    Pvalidate2m::Accept => TwoMib::Accept,
                },
                statistics: emulated.statistics,
                keys: emulated.keys.clone().unwrap_or_else(default_keys_path),
                product: emulated.product.product(),
            };
            Ok(Box::new(EmulatedPlatform::open(options, events).map_err(PrepareError::host)?))
        }
    }
}

/// Puts the guest together for `platform`.
pub fn prepare(
    spec: &VmSpec,
    files: &BootFiles<'_>,
    platform: &dyn Platform,
    events: &Events,
) -> Result<Ready, PrepareError> {
    match (&spec.snp, files) {
        (Some(snp), files) => snp_guest(spec, snp, files, platform, events),
        (None, BootFiles::Direct(kernel, files)) => plain_guest(spec, kernel, files, platform),
        (None, _) => Err(PrepareError::Request("a plain guest boots a kernel".into())),
    }
}

fn plain_guest(
    spec: &VmSpec,
    kernel: &KernelSpec,
    files: &Files,
    platform: &dyn Platform,
) -> Result<Ready, PrepareError> {
    let offered = cpuid::from_kvm(&platform.supported_cpuid().map_err(PrepareError::host)?);
    let image = direct(spec, kernel, files, &Target::default())?;
    let table = CpuidTable::plain(&offered, spec.cpus, platform.raw_cpuid().as_ref());
    let guest = Guest {
        cpuid: cpuids(&table, &image.plan),
        board: image.board,
        ram: lengths(&image.ram),
        load: Load::Plain(image.plan),
    };
    Ok(Ready { guest, events: image.events, notes: image.notes })
}

fn snp_guest(
    spec: &VmSpec,
    snp: &SnpSpec,
    files: &BootFiles<'_>,
    platform: &dyn Platform,
    events: &Events,
) -> Result<Ready, PrepareError> {
    let rules = platform.policy_rules();
    snp.policy.unwrap_or_default().check_kvm(rules).map_err(PrepareError::request)?;
    let offered = cpuid::from_kvm(&platform.supported_cpuid().map_err(PrepareError::host)?);
    let sev = platform.snp_cpuid();
    let table = CpuidTable::snp(&offered, spec.cpus, &sev).map_err(PrepareError::host)?;
    // Only a comparison shows what a digest depends on, and hashing large files takes its time.
    let compared = snp.id_block.as_ref().is_some_and(|files| files.reference.is_some());
    let names = if compared { Names::Sha256 } else { Names::None };
    let target = Target { cpuid: Some(&table), c_bit: sev.c_bit, names };
    let mut image = match files {
        BootFiles::Direct(kernel, files) => direct(spec, kernel, files, &target)?,
        BootFiles::Firmware(firmware, files) => firmware::firmware(spec, firmware, files, &table, &target)?,
        BootFiles::Igvm(file, igvm) => firmware::igvm(spec, file, igvm, &table, &target)?,
    };
    let code = match &snp.platform {
        PlatformSpec::Kvm => CodeHints::default(),
        PlatformSpec::Emulated(_) => code_hints(files, &mut image)?,
    };
    let policy = match (snp.policy, image.policy) {
        (Some(asked), Some(file)) if asked != file => {
            let problem =
                format!("{asked}: the IGVM file asks for policy {file}; leave this out, or use another file");
            return Err(SpecError { field: "snp.policy".into(), problem }.into());
        }
        (asked, file) => asked.or(file).unwrap_or_default(),
    };
    policy.check_kvm(rules).map_err(PrepareError::request)?;
    check_features(&image.plan, platform)?;
    let mut measured = Measured::of(std::mem::take(&mut image.plan)).map_err(PrepareError::host)?;
    let digest = measured.digest();
    let pages = measured.plan().launch_pages();
    image.notes.push(events::Event::Note(format!("launch digest {digest} ({pages} pages)")));
    let identity = identity::identity(snp, &mut image, &measured, policy, events)?;
    let options = LaunchOptions {
        policy,
        host_data: snp.host_data.unwrap_or_default(),
        identity,
        accept_cpuid: snp.accept_cpuid,
        host_cpuid: platform.raw_cpuid(),
        firmware: matches!(spec.boot, BootSpec::Firmware(_)),
        validated_at_start: image.inputs_page.as_ref().map_or_else(Vec::new, InputsPage::validated),
    };
    let mut staged = image.staged;
    if let Some(tamper) = snp.tamper {
        let tamper_error = |problem| SpecError { field: "snp.tamper".into(), problem };
        let inputs = image.inputs_page.ok_or_else(|| tamper_error("needs a guest with stage0".into()))?;
        // The digest that was announced stays what it is: that the launch is another one is for the guest, or
        // its owner, to find.
        let mut result = Ok(());
        measured = measured
            .altered(|plan| result = tamper.apply(&inputs, plan, &mut staged))
            .map_err(PrepareError::host)?;
        result.map_err(tamper_error)?;
    }
    let guest = Guest {
        cpuid: cpuids(&table, measured.plan()),
        board: image.board,
        ram: lengths(&image.ram),
        load: Load::Snp(Box::new(SnpLaunch { measured, options, staged, code })),
    };
    Ok(Ready { guest, events: image.events, notes: image.notes })
}

/// Where the guest's code executes SNP instructions, as far as that is known before it runs.
fn code_hints(files: &BootFiles<'_>, image: &mut LaunchImage) -> Result<CodeHints, PrepareError> {
    let kernel = match files {
        BootFiles::Direct(_, files) => files.annotate()?,
        BootFiles::Firmware(_, files) => patch::annotate_code([files.ovmf.boot_code()]),
        BootFiles::Igvm(..) => {
            let code = image.plan.records.iter().filter(|r| r.page_type == PageType::Normal);
            patch::annotate_code(code.map(|r| (r.gpa, r.contents.as_slice())))
        }
    };
    if !matches!(files, BootFiles::Direct(..)) {
        image.notes.push(events::Event::Note(firmware::replaced(&kernel)));
    }
    Ok(CodeHints { kernel: Some(kernel), stage0: image.inputs_page.is_some() })
}

/// CPUID of each vCPU.
fn cpuids(table: &CpuidTable, plan: &LaunchPlan) -> Vec<Vec<kvm_cpuid_entry2>> {
    (0u32..).zip(&plan.vcpus).map(|(id, _)| cpuid::to_kvm(&table.for_vcpu(id))).collect()
}

/// Start and length of each range.
fn lengths(ram: &[Range<u64>]) -> Vec<(u64, u64)> {
    ram.iter().map(|r| (r.start, r.end - r.start)).collect()
}

/// Refuses features of the save areas that this host's KVM does not give.
fn check_features(plan: &LaunchPlan, platform: &dyn Platform) -> Result<(), PrepareError> {
    let asked = plan.vcpus.iter().fold(0, |all, state| all | state.sev_features) & !SEV_FEATURE_SNP_ACTIVE;
    let offered = platform.vmsa_features();
    if asked & !offered == 0 {
        return Ok(());
    }
    let secure_tsc = if asked & !offered & SEV_FEATURE_SECURE_TSC != 0 {
        "; `secure_tsc` needs Linux 6.18 or later and a CPU with Secure TSC (EPYC 7003 and 9004 have it), and does not work on the \
         emulated platform"
    } else {
        ""
    };
    Err(PrepareError::Host(format!(
        "the guest's SEV features {asked:#x}: KVM offers {offered:#x} here{secure_tsc}"
    )))
}
