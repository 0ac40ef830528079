// SPDX-License-Identifier: Apache-2.0
//! `cvmm --kernel …`: runs a guest.

use std::path::PathBuf;

use clap::ValueEnum;
use snp::digest::LaunchDigest;
use snp::digest::launch_digest;
use snp::identity::IdAuth;
use snp::identity::IdBlock;
use snp::image::direct::DirectBoot;
use snp::image::direct::Guest as ImageGuest;
use snp::image::direct::Snp;
use snp::image::direct::Validation;
use snp::image::lazy::Acceptance;
use snp::image::sites;
use snp::pages::cpuid::CpuidTable;
use snp::plan::LaunchPlan;
use snp::policy::GuestPolicy;
use snp::stage0::InputsPage;
use snp::vmsa::SEV_FEATURE_SECURE_TSC;
use snp::vmsa::SEV_FEATURE_SNP_ACTIVE;

use super::Failure;
use super::certs::CertsArgs;
use super::emulated::EmulatedArgs;
use super::firmware;
use super::firmware::FirmwareArgs;
use super::firmware::LaunchImage;
use super::id_block::IdentityCheck;
use super::measure;
use super::reboot::RebootArgs;
use super::trials::Trials;
use super::vtpm::Companions;
use super::vtpm::VtpmArgs;
use crate::config;
use crate::config::BootFiles;
use crate::config::ConfigError;
use crate::cpuid;
use crate::launch::LaunchOptions;
use crate::monitor;
use crate::monitor::Console;
use crate::monitor::Guest;
use crate::monitor::Host;
use crate::note::note;
use crate::note::warn;
use crate::platform::Platform;
use crate::platform::emulated::Backing;
use crate::platform::emulated::EmulatedPlatform;
use crate::platform::kvm::KvmPlatform;

/// Most vCPUs of a guest that is run.
pub const VCPUS_MAX: u32 = 16;

/// What is booted; the same options for running and for measuring.
#[derive(clap::Args, Clone, Debug)]
pub struct ImageArgs {
    /// Kernel: a bzImage, or an ELF vmlinux
    #[arg(long, value_name = "FILE")]
    pub kernel: Option<PathBuf>,
    /// Initial RAM disk
    #[arg(long, value_name = "FILE")]
    pub initrd: Option<PathBuf>,
    /// Kernel command line
    #[arg(long, value_name = "TEXT", default_value = "console=ttyS0")]
    pub cmdline: String,
    /// Guest memory; units K, M, G, T
    #[arg(long, value_name = "SIZE", default_value = "512M", value_parser = config::parse_size)]
    pub memory: u64,
    /// Number of vCPUs, 1 to 16
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=i64::from(VCPUS_MAX)))]
    pub cpus: u32,
    /// Who makes an SNP guest's RAM usable; `launch` measures all of it, for tests
    #[arg(long, value_enum, default_value = "stage0", hide = true)]
    pub validation: ValidationKind,
    /// Give an SNP guest a time stamp counter that the host cannot change; part of the launch digest. The guest needs Linux 6.14 or
    /// later, the host Linux 6.18 or later
    #[arg(long, help_heading = SNP)]
    pub secure_tsc: bool,
    /// How much of an SNP guest's memory is validated before its kernel runs; part of the launch digest
    #[arg(long, value_enum, default_value = "auto")]
    pub accept: AcceptKind,
}

/// Who validates an SNP guest's RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ValidationKind {
    /// The measured shim
    Stage0,
    /// The launch, one firmware command for each 4 KiB
    Launch,
}

/// How much of an SNP guest's memory is validated before its kernel runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum AcceptKind {
    /// All of it
    Eager,
    /// What the kernel needs to start; it validates the rest when it needs it (Linux 6.6 and later)
    Lazy,
    /// Lazy for more than 2 GiB if the kernel can do it
    Auto,
}

impl From<AcceptKind> for Acceptance {
    fn from(kind: AcceptKind) -> Self {
        match kind {
            AcceptKind::Eager => Acceptance::Eager,
            AcceptKind::Lazy => Acceptance::Lazy,
            AcceptKind::Auto => Acceptance::Auto,
        }
    }
}

/// Where an SNP guest runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum PlatformKind {
    /// This host's KVM and SNP firmware
    Kvm,
    /// A software model of them on ordinary KVM: functional only, protects nothing
    Emulated,
}

/// Heading of the options about SNP guests.
pub const SNP: &str = "SNP guests";

/// Options of a run.
#[derive(clap::Args, Clone, Debug)]
pub struct Args {
    #[command(flatten)]
    image: ImageArgs,
    #[command(flatten)]
    file: FirmwareArgs,
    #[command(flatten)]
    reboot: RebootArgs,
    /// Launch an SEV-SNP guest
    #[arg(long, help_heading = SNP)]
    snp: bool,
    /// Where an SNP guest runs
    #[arg(long, value_enum, default_value = "kvm", help_heading = SNP)]
    platform: PlatformKind,
    /// SNP guest policy, 64 bits [default: the IGVM file's, or 0x30000]
    #[arg(long, value_name = "BITS", help_heading = SNP)]
    policy: Option<GuestPolicy>,
    /// 32 bytes for the host-data field of the guest's reports, in hexadecimal
    #[arg(long, value_name = "HEX", value_parser = config::parse_hex32, help_heading = SNP)]
    host_data: Option<[u8; 32]>,
    /// Your signed ID block, binary or in base64: the launch is refused if digest or policy differ (see `cvmm id-block`)
    #[arg(long, value_name = "FILE", requires = "id_auth", help_heading = SNP)]
    id_block: Option<PathBuf>,
    /// The ID block's auth page, binary or in base64
    #[arg(long, value_name = "FILE", requires = "id_block", help_heading = SNP)]
    id_auth: Option<PathBuf>,
    /// File of `cvmm measure --json` that the ID block was made for: says why a digest differs
    #[arg(long, value_name = "FILE", requires = "id_block", help_heading = SNP)]
    reference: Option<PathBuf>,
    /// Where the firmware refuses CPUID values, launch with its own, if all changes are on a short list (features that only
    /// disappear, cache descriptions); they are printed. Bits that KVM makes up, or that newer microcode
    /// announces, may go without this option. The CPUID page is not measured
    #[arg(long, help_heading = SNP)]
    accept_cpuid: bool,
    #[command(flatten)]
    certs: CertsArgs,
    #[command(flatten)]
    emulated: EmulatedArgs,
    #[command(flatten)]
    trials: Trials,
    #[command(flatten)]
    vtpm: VtpmArgs,
}

impl ImageArgs {
    /// Who validates an SNP guest's RAM.
    pub fn validation(&self) -> Validation {
        match self.validation {
            ValidationKind::Stage0 => Validation::Stage0(self.accept.into()),
            ValidationKind::Launch => Validation::AllByLaunch,
        }
    }

    /// SEV features that an SNP guest gets beside SNP itself.
    pub fn features(&self) -> u64 {
        if self.secure_tsc { SEV_FEATURE_SECURE_TSC } else { 0 }
    }

    /// Reads the files.
    pub fn read(&self) -> Result<BootFiles, ConfigError> {
        let kernel = self
            .kernel
            .as_deref()
            .ok_or_else(|| ConfigError::Option("--kernel is missing: say what to boot".into()))?;
        BootFiles::read(kernel, self.initrd.as_deref())
    }

    /// The boot that these options describe.
    pub fn boot<'a>(&'a self, files: &'a BootFiles, guest: ImageGuest<'a>) -> DirectBoot<'a> {
        DirectBoot {
            kernel: &files.kernel,
            initrd: files.initrd.clone(),
            cmdline: &self.cmdline,
            memory: self.memory,
            vcpus: self.cpus,
            tpm: None,
            guest,
        }
    }
}

/// Runs the guest; the result is the process's exit code.
pub fn main(args: &Args) -> Result<u8, Failure> {
    args.emulated.check()?;
    args.vtpm.check()?;
    if let Some(option) = args.file.option()
        && args.emulated.backing == Backing::Split
    {
        return Err(Failure::Usage(format!(
            "{option} with --backing split: firmware starts with paging off, where every access is private whatever its \
             address says, so it needs --backing single"
        )));
    }
    warn_of_memory(args.image.memory);
    let certificates = args.certs.source()?;
    let (platform, guest, companions) = if args.snp { snp_guest(args)? } else { plain_guest(args)? };
    let host = Host {
        interactive: true,
        restart: args.reboot.restart(),
        certificates,
        companions: companions.list,
        inbox: companions.inbox,
        ..Host::new(Box::new(Console))
    };
    let outcome = monitor::run(platform.as_ref(), guest, host).map_err(Failure::monitor)?;
    note(&outcome);
    Ok(outcome.exit_code())
}

/// Says when the guest may come to need more memory than the host has. It may never touch all of it, so that is no error.
fn warn_of_memory(memory: u64) {
    let facts = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let total = facts.lines().find_map(|line| line.strip_prefix("MemTotal:"));
    let total: Option<u64> = total.and_then(|kib| kib.trim().trim_end_matches(" kB").parse().ok());
    if let Some(host) = total.and_then(|kib| kib.checked_mul(1024))
        && memory > host
    {
        warn(format_args!(
            "--memory: the guest has {} MiB, but the host has {} MiB; the guest, or another process, is killed when that does not \
             suffice",
            memory >> 20,
            host >> 20
        ));
    }
}

type Prepared = (Box<dyn Platform>, Guest, Companions);

fn plain_guest(args: &Args) -> Result<Prepared, Failure> {
    let files = args.image.read().map_err(Failure::usage)?;
    let platform = KvmPlatform::open().map_err(Failure::monitor)?;
    let offered = cpuid::from_kvm(&platform.supported_cpuid().map_err(Failure::monitor)?);
    let mut boot = args.image.boot(&files, ImageGuest::Plain);
    let companions = args.vtpm.start(&mut boot)?;
    let image = boot.image().map_err(Failure::usage)?;
    let table = CpuidTable::plain(&offered, args.image.cpus, platform.raw_cpuid().as_ref());
    Ok((Box::new(platform), guest(LaunchImage::direct(image), &table, None), companions))
}

/// The guest that an image describes.
fn guest(image: LaunchImage, table: &CpuidTable, snp: Option<LaunchOptions>) -> Guest {
    let vcpus = (0u32..).zip(&image.plan.vcpus);
    Guest {
        cpuid: vcpus.map(|(id, _)| cpuid::to_kvm(&table.for_vcpu(id))).collect(),
        plan: image.plan,
        ram: image.ram.iter().map(|r| (r.start, r.end - r.start)).collect(),
        snp,
        staged: image.staged,
    }
}

fn snp_guest(args: &Args) -> Result<Prepared, Failure> {
    let files = match args.file.option() {
        None => Some(args.image.read().map_err(Failure::usage)?),
        Some(_) => None,
    };
    let platform: Box<dyn Platform> = match args.platform {
        PlatformKind::Kvm => {
            let platform = KvmPlatform::open().map_err(Failure::monitor)?;
            platform.check_snp().map_err(Failure::monitor)?;
            if args.certs.given() && platform.capabilities().req_certs != Some(1) {
                return Err(Failure::Monitor(
                    "--certs: this kernel's KVM does not ask the monitor for certificates (Linux 7.0 does). Without the option, \
                     guests get an empty table and fetch certificates themselves"
                        .into(),
                ));
            }
            Box::new(platform)
        }
        PlatformKind::Emulated => {
            let options = args.emulated.options(args.trials.statistics);
            Box::new(EmulatedPlatform::open(options).map_err(Failure::monitor)?)
        }
    };
    // What was asked for is checked before any file is looked at, what a file asks for after that.
    let rules = platform.policy_rules();
    args.policy.unwrap_or_default().check_kvm(rules).map_err(Failure::usage)?;
    let offered = cpuid::from_kvm(&platform.supported_cpuid().map_err(Failure::monitor)?);
    let sev = platform.snp_cpuid();
    let table = CpuidTable::snp(&offered, args.image.cpus, &sev).map_err(Failure::monitor)?;
    let (mut image, companions) = match &files {
        Some(files) => direct_image(args, files, &table, sev.c_bit)?,
        None => {
            let image = args.file.image(&args.image, &table, 1 << sev.c_bit)?;
            (
                image.ok_or_else(|| Failure::Usage("--firmware or --igvm is missing".into()))?,
                Companions::default(),
            )
        }
    };
    if args.platform == PlatformKind::Emulated
        && let Some(code) = image.code.take()
    {
        if files.is_none() {
            image.notes.push(firmware::replaced(&code));
        }
        platform.annotate(code, image.stage0.take());
    }
    let policy = match (args.policy, image.policy) {
        (Some(asked), Some(file)) if asked != file => {
            return Err(Failure::Usage(format!(
                "--policy {asked}: the IGVM file asks for policy {file}; leave --policy out, or use another file"
            )));
        }
        (asked, file) => asked.or(file).unwrap_or_default(),
    };
    policy.check_kvm(rules).map_err(Failure::usage)?;
    check_features(&image.plan, platform.as_ref())?;
    image.notes.iter().for_each(note);
    let digest = launch_digest(&image.plan).map_err(Failure::monitor)?;
    note(format_args!("launch digest {digest} ({} pages)", image.plan.launch_pages()));
    let identity = identity(args, &image, digest, policy)?;
    let options = LaunchOptions {
        policy,
        host_data: args.host_data.unwrap_or_default(),
        identity,
        accept_cpuid: args.accept_cpuid,
        host_cpuid: platform.raw_cpuid(),
        // A trial that changes the plan behind our back is for the guest to find.
        predicted: args.trials.tamper.is_none().then_some(digest),
        firmware: args.file.firmware.is_some(),
        validated_at_start: image.inputs_page.as_ref().map_or_else(Vec::new, InputsPage::validated),
    };
    let inputs = image.inputs_page.take();
    let mut guest = guest(image, &table, Some(options));
    if let Some(tamper) = args.trials.tamper {
        let inputs = inputs.ok_or_else(|| Failure::Usage("--tamper needs a guest with stage0".into()))?;
        tamper.apply(&inputs, &mut guest.plan, &mut guest.staged).map_err(Failure::usage)?;
    }
    Ok((platform, guest, companions))
}

/// Refuses features of the save areas that this host's KVM does not give.
fn check_features(plan: &LaunchPlan, platform: &dyn Platform) -> Result<(), Failure> {
    let asked = plan.vcpus.iter().fold(0, |all, state| all | state.sev_features) & !SEV_FEATURE_SNP_ACTIVE;
    let offered = platform.vmsa_features();
    if asked & !offered == 0 {
        return Ok(());
    }
    let secure_tsc = if asked & !offered & SEV_FEATURE_SECURE_TSC != 0 {
        "; --secure-tsc needs Linux 6.18 or later and a CPU with Secure TSC (EPYC 7003 and 9004 have it), and does not work on the \
         emulated platform"
    } else {
        ""
    };
    Err(Failure::Monitor(format!(
        "the guest's SEV features {asked:#x}: KVM offers {offered:#x} here{secure_tsc}"
    )))
}

/// A kernel that stage0 starts, and its TPM.
fn direct_image(
    args: &Args,
    files: &BootFiles,
    table: &CpuidTable,
    c_bit: u8,
) -> Result<(LaunchImage, Companions), Failure> {
    let snp = Snp {
        c_bit,
        cpuid: Some(table),
        validation: args.image.validation(),
        features: args.image.features(),
    };
    let mut boot = args.image.boot(files, ImageGuest::Snp(snp));
    let companions = args.vtpm.start(&mut boot)?;
    let mut image = LaunchImage::direct(boot.image().map_err(Failure::usage)?);
    if args.platform == PlatformKind::Emulated {
        image.code = Some(sites::annotate(&files.kernel).map_err(Failure::usage)?);
    }
    // Only a comparison shows them, and hashing large files takes its time.
    if args.reference.is_some() {
        image.inputs = measure::direct_inputs(&args.image, files, args.vtpm.wanted(), measure::sha256);
        image.inputs.push(("cpus", args.image.cpus.to_string()));
    }
    Ok((image, companions))
}

/// The ID block of the launch: the one that options name, or the one in the file.
fn identity(
    args: &Args,
    image: &LaunchImage,
    digest: LaunchDigest,
    policy: GuestPolicy,
) -> Result<Option<(IdBlock, IdAuth)>, Failure> {
    if let (Some(block), Some(auth)) = (&args.id_block, &args.id_auth) {
        let inputs = image.inputs.clone();
        let request = IdentityCheck { block, auth, reference: args.reference.as_deref(), inputs };
        let identity = request.check(&image.plan, digest, policy)?;
        if let Some((in_file, _)) = &image.identity {
            if *in_file != identity.0 {
                return Err(Failure::Usage(format!(
                    "--id-block {}: the IGVM file has an ID block with other ids or version numbers; leave --id-block out \
                     to launch with the file's, or take the block out of the file",
                    block.display()
                )));
            }
            note("--id-block says the same as the ID block in the IGVM file; its keys are used");
        }
        return Ok(Some(identity));
    }
    if let Some((block, auth)) = &image.identity {
        auth.check(block, digest, policy)
            .map_err(|e| Failure::Usage(format!("the ID block in the IGVM file: {e}")))?;
        note("the launch uses the ID block in the IGVM file");
    }
    Ok(image.identity.clone())
}
