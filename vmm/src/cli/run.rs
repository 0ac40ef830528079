// SPDX-License-Identifier: Apache-2.0
//! `cvmm --kernel …`: runs a guest.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use clap::ValueEnum;
use snp::policy::GuestPolicy;
use vtpm_svc::measured::Event;

use super::Failure;
use super::certs::CertsArgs;
use super::emulated::EmulatedArgs;
use super::firmware::FirmwareArgs;
use super::image::ImageArgs;
use super::image::SNP;
use super::note;
use super::reboot::RebootArgs;
use super::trials::Trials;
use super::vtpm::VtpmArgs;
use crate::console::stdio::Console;
use crate::events::Events;
use crate::machine::certs::CertFile;
use crate::machine::certs::Source;
use crate::prepare;
use crate::prepare::BootFiles;
use crate::run::guest::Host;
use crate::run::guest::Restart;
use crate::run::inbox::Inbox;
use crate::run::inbox::Unattended;
use crate::run::monitor;
use crate::spec::BackendSpec;
use crate::spec::IdBlockSpec;
use crate::spec::OnReset;
use crate::spec::PlatformSpec;
use crate::spec::SnpSpec;
use crate::spec::TpmSpec;
use crate::spec::VmSpec;
use crate::spec::text::parse_hex32;
use crate::vtpm::Vtpm;
use crate::vtpm::backend;
use crate::vtpm::error::VtpmError;

/// A guest that does nothing but reset gets one VM in this time.
const PACE: Duration = Duration::from_secs(1);
/// What the TPM's backend is called in a request that options describe.
const BACKEND: &str = "vtpm";

/// Where an SNP guest runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum PlatformKind {
    /// This host's KVM and SNP firmware
    Kvm,
    /// A software model of them on ordinary KVM: functional only, protects nothing
    Emulated,
}

/// Options of a run.
#[derive(clap::Args, Clone, Debug)]
pub struct Args {
    /// Run the VM that a file describes: JSON, as `cvmm spec` prints it for the other options
    #[arg(long, value_name = "FILE", exclusive = true)]
    spec: Option<PathBuf>,
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
    #[arg(long, value_name = "HEX", value_parser = parse_hex32, help_heading = SNP)]
    host_data: Option<[u8; 32]>,
    /// Your signed ID block, binary or in base64: the launch is refused if digest or policy differ (see
    /// `cvmm id-block`)
    #[arg(long, value_name = "FILE", requires = "id_auth", help_heading = SNP)]
    id_block: Option<PathBuf>,
    /// The ID block's auth page, binary or in base64
    #[arg(long, value_name = "FILE", requires = "id_block", help_heading = SNP)]
    id_auth: Option<PathBuf>,
    /// File of `cvmm measure --json` that the ID block was made for: says why a digest differs
    #[arg(long, value_name = "FILE", requires = "id_block", help_heading = SNP)]
    reference: Option<PathBuf>,
    /// Where the firmware refuses CPUID values, launch with its own, if all changes are on a short list
    /// (features that only disappear, cache descriptions); they are printed. Bits that KVM makes up, or that
    /// newer microcode announces, may go without this option. The CPUID page is not measured
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

impl Args {
    /// What the options ask for, or the file that they name.
    pub fn spec(&self) -> Result<VmSpec, Failure> {
        if let Some(path) = &self.spec {
            return super::spec::read(path);
        }
        let boot = self
            .file
            .boot(&self.image)
            .ok_or_else(|| Failure::Usage("--kernel is missing: say what to boot".into()))?;
        let snp = self.snp.then(|| SnpSpec {
            platform: match self.platform {
                PlatformKind::Kvm => PlatformSpec::Kvm,
                PlatformKind::Emulated => PlatformSpec::Emulated(self.emulated.spec(self.trials.statistics)),
            },
            policy: self.policy,
            host_data: self.host_data,
            id_block: match (&self.id_block, &self.id_auth) {
                (Some(block), Some(auth)) => Some(IdBlockSpec {
                    block: block.clone(),
                    auth: auth.clone(),
                    reference: self.reference.clone(),
                }),
                _ => None,
            },
            accept_cpuid: self.accept_cpuid,
            certs: self.certs.certs.clone(),
            tamper: self.trials.tamper,
            ..self.image.snp()
        });
        let backend = self.vtpm.backend()?;
        let spec = VmSpec {
            boot,
            memory: self.image.memory,
            cpus: self.image.cpus,
            snp,
            tpm: backend.is_some().then(|| TpmSpec { backend: BACKEND.into() }),
            on_reset: self.reboot.spec(),
            backends: backend.map(|backend| (BACKEND.to_owned(), backend)).into_iter().collect(),
        };
        spec.validate()?;
        Ok(spec)
    }
}

/// Runs the guest; the result is the process's exit code.
pub fn main(args: &Args) -> Result<u8, Failure> {
    let spec = args.spec()?;
    let events = note::events();
    warn_of_memory(spec.memory, &events);
    let certificates = certificates(&spec, &events)?;
    let files = BootFiles::read(&spec, &events)?;
    let platform = prepare::platform(&spec, &events)?;
    let ready = prepare::prepare(&spec, &files, platform.as_ref(), &events)?;
    drop(files);
    ready.notes.into_iter().for_each(|note| events.tell(note));
    let mut host = Host {
        interactive: true,
        restart: match spec.on_reset {
            OnReset::Exit => None,
            OnReset::Restart(restart) => Some(Restart { lives: restart.max_lives, pace: PACE }),
        },
        certificates,
        events: events.clone(),
        ..Host::new(Box::new(Console))
    };
    if let Some(backend) = spec.tpm_backend() {
        // Signals are caught from here on, so that one during the start leaves nothing behind.
        let inbox = Inbox::open(&events).map_err(Failure::monitor)?;
        host.companions.push(Box::new(start_tpm(backend, ready.events, &inbox)?));
        host.inbox = Some(inbox);
    }
    let outcome = monitor::run(platform.as_ref(), ready.guest, host).map_err(Failure::monitor)?;
    events.note(&outcome);
    Ok(outcome.exit_code())
}

fn start_tpm(backend: &BackendSpec, events: Vec<Event>, inbox: &Inbox) -> Result<Vtpm, Failure> {
    backend::start(backend, events, inbox).map_err(|error| match error {
        VtpmError::Unattended { source: Unattended::Signal(signal), .. } => Failure::Stopped(signal),
        error => Failure::monitor(error),
    })
}

/// Opens and checks the file of certificates.
fn certificates(spec: &VmSpec, events: &Events) -> Result<Option<Source>, Failure> {
    let open = |path: &PathBuf| CertFile::open(path, events).map(|file| Source::File(Arc::new(file)));
    let path = spec.snp.as_ref().and_then(|snp| snp.certs.as_ref());
    path.map(open).transpose().map_err(|e| Failure::Usage(format!("--certs: {e}")))
}

/// Says when the guest may come to need more memory than the host has. It may never touch all of it, so that
/// is no error.
fn warn_of_memory(memory: u64, events: &Events) {
    let facts = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let total = facts.lines().find_map(|line| line.strip_prefix("MemTotal:"));
    let total: Option<u64> = total.and_then(|kib| kib.trim().trim_end_matches(" kB").parse().ok());
    if let Some(host) = total.and_then(|kib| kib.checked_mul(1024))
        && memory > host
    {
        events.warn(format_args!(
            "--memory: the guest has {} MiB, but the host has {} MiB; the guest, or another process, is killed when that does not \
             suffice",
            memory >> 20,
            host >> 20
        ));
    }
}
