// SPDX-License-Identifier: Apache-2.0
//! What a user may ask for, as a value.
//!
//! The command line, a file (`cvmm --spec`) and whatever else asks for guests fill the same type, so that
//! none of them can ask for something that the others cannot. A field that nobody knows is refused, and so is
//! a combination that means nothing: it would leave its author with a guest other than the one that was asked
//! for. Errors name the field by its path.
//!
//! Devices are what the guest sees, backends are what the host gives; a name joins them. What is measured
//! depends on the devices alone, so a digest can be computed where no backend is.

pub mod text;

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;

use serde::Deserialize;
use serde::Serialize;
use snp::attest::tcb::Product;
use snp::policy::GuestPolicy;

use crate::launch::tamper::Tamper;
pub use crate::platform::emulated::Backing;

/// Most vCPUs of a guest that is run.
pub const VCPUS_MAX: u32 = 16;
/// Guest memory unless somebody says otherwise.
pub const MEMORY_DEFAULT: u64 = 512 << 20;
/// Command line unless somebody says otherwise.
pub const CMDLINE_DEFAULT: &str = "console=ttyS0";

/// A virtual machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmSpec {
    /// What is booted.
    pub boot: BootSpec,
    /// Bytes of memory; in a file also with a unit, such as `"512M"`.
    #[serde(default = "memory_default", with = "text::size")]
    pub memory: u64,
    /// Number of vCPUs.
    #[serde(default = "cpus_default")]
    pub cpus: u32,
    /// An SNP guest; without it a plain one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub snp: Option<SnpSpec>,
    /// The guest has a TPM.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tpm: Option<TpmSpec>,
    /// What follows when the guest asks for a reset.
    #[serde(default)]
    pub on_reset: OnReset,
    /// What the host gives, by the names that devices use.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub backends: BTreeMap<String, BackendSpec>,
}

/// What is booted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BootSpec {
    /// A kernel, by the monitor itself.
    Direct(KernelSpec),
    /// OVMF with SEV metadata.
    Firmware(FirmwareSpec),
    /// An IGVM file.
    Igvm(IgvmSpec),
}

/// A kernel and what belongs to it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KernelSpec {
    /// A bzImage or an ELF vmlinux.
    pub kernel: PathBuf,
    /// Initial RAM disk.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub initrd: Option<PathBuf>,
    /// Command line.
    #[serde(default = "cmdline_default")]
    pub cmdline: String,
}

/// A firmware image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FirmwareSpec {
    /// The image.
    pub image: PathBuf,
    /// A kernel whose hashes the firmware is told.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kernel: Option<KernelSpec>,
    /// CPUID signature in RDX of every vCPU, as a number or a model's name; without it the host's.
    #[serde(default, skip_serializing_if = "Option::is_none", with = "text::vcpu_model")]
    pub vcpu_model: Option<u32>,
    /// The complete `sev_features`.
    #[serde(default = "features_default", with = "text::features")]
    pub guest_features: u64,
}

/// An IGVM file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct IgvmSpec {
    /// The file.
    pub image: PathBuf,
    /// Command line, for a file that has a place for it.
    #[serde(default = "cmdline_default")]
    pub cmdline: String,
    /// How pages without data are launched.
    #[serde(default)]
    pub zero_pages: ZeroPages,
}

/// How pages of an IGVM file without data enter the guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ZeroPages {
    /// NORMAL pages of zeros, as the IGVM specification says.
    #[default]
    Normal,
    /// Type ZERO, as QEMU and Cloud Hypervisor load them.
    Zero,
}

/// How an SNP guest is launched.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SnpSpec {
    /// Where it runs.
    pub platform: PlatformSpec,
    /// Guest policy; without it the IGVM file's, or the default one.
    #[serde(skip_serializing_if = "Option::is_none", with = "text::optional")]
    pub policy: Option<GuestPolicy>,
    /// 32 bytes for the host-data field of the guest's reports.
    #[serde(skip_serializing_if = "Option::is_none", with = "text::host_data")]
    pub host_data: Option<[u8; 32]>,
    /// The owner's signed statement of what may launch.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub id_block: Option<IdBlockSpec>,
    /// Launch with the firmware's CPUID values where it refuses ours, if all changes are on the list of
    /// harmless ones.
    #[serde(skip_serializing_if = "is_false")]
    pub accept_cpuid: bool,
    /// Certificate table for the guest's extended reports.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub certs: Option<PathBuf>,
    /// How much memory is validated before the kernel runs. Direct boot only.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub accept: Option<Accept>,
    /// A time stamp counter that the host cannot change. Direct boot only.
    #[serde(skip_serializing_if = "is_false")]
    pub secure_tsc: bool,
    /// Who makes RAM usable. Direct boot only.
    #[serde(skip_serializing_if = "is_default")]
    pub validation: Validation,
    /// What a dishonest host alters, for tests. Direct boot only.
    #[serde(skip_serializing_if = "Option::is_none", with = "text::optional")]
    pub tamper: Option<Tamper>,
}

/// Where an SNP guest runs.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PlatformSpec {
    /// This host's KVM and SNP firmware.
    #[default]
    Kvm,
    /// A software model of them on ordinary KVM: functional only, protects nothing.
    Emulated(EmulatedSpec),
}

/// The emulated platform.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct EmulatedSpec {
    /// What backs the two views of a page.
    pub backing: Backing,
    /// Stop at the first access through the wrong view, or to memory that is not validated.
    #[serde(skip_serializing_if = "is_false")]
    pub strict: bool,
    /// How PVALIDATE of 2 MiB is answered.
    pub pvalidate_2m: Pvalidate2m,
    /// The processor that the guest is told of.
    pub product: EmulatedProduct,
    /// File with the platform's attestation keys, made if absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub keys: Option<PathBuf>,
    /// Say at the end what the guest did with its pages.
    #[serde(skip_serializing_if = "is_false")]
    pub statistics: bool,
}

/// Answer to `PVALIDATE` of 2 MiB.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Pvalidate2m {
    /// Size mismatch.
    Refuse,
    /// Done at once.
    #[default]
    Accept,
}

/// A processor that the emulated platform stands for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EmulatedProduct {
    /// EPYC 7003.
    Milan,
    /// EPYC 9004.
    #[default]
    Genoa,
    /// EPYC 9005.
    Turin,
    /// This host's own.
    Host,
}

impl EmulatedProduct {
    /// The product; `None` for the host's own, whatever it is.
    pub fn product(self) -> Option<Product> {
        match self {
            EmulatedProduct::Milan => Some(Product::Milan),
            EmulatedProduct::Genoa => Some(Product::Genoa),
            EmulatedProduct::Turin => Some(Product::Turin),
            EmulatedProduct::Host => None,
        }
    }
}

/// Files of an ID block.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct IdBlockSpec {
    /// The block.
    pub block: PathBuf,
    /// Its auth page.
    pub auth: PathBuf,
    /// File of `cvmm measure --json` that it was made for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reference: Option<PathBuf>,
}

/// How much memory is validated before the kernel runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Accept {
    /// All of it.
    Eager,
    /// What the kernel needs to start.
    Lazy,
    /// Lazy for more than 2 GiB if the kernel can do it.
    #[default]
    Auto,
}

/// Who makes an SNP guest's RAM usable.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Validation {
    /// The measured shim.
    #[default]
    Stage0,
    /// The launch, one firmware command for each 4 KiB; for tests.
    Launch,
}

/// The guest's TPM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TpmSpec {
    /// Name of its backend.
    pub backend: String,
}

/// What the host gives.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BackendSpec {
    /// A TPM whose service is started and ended with the guest.
    TpmService(TpmServiceSpec),
    /// A TPM whose service listens on a control socket and stays.
    TpmSocket(TpmSocketSpec),
}

/// A TPM service that is started with the guest.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TpmServiceSpec {
    /// What outlives the guest; without it the TPM is new at each run.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub state: Option<TpmStateSpec>,
    /// Folder of the host's certificate authority.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ek_ca: Option<PathBuf>,
    /// The service's program.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub program: Option<PathBuf>,
}

/// A guest-state file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TpmStateSpec {
    /// The file.
    pub file: PathBuf,
    /// Its key.
    pub key: KeySpec,
    /// Folder that remembers which copy is the newest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub anchor: Option<PathBuf>,
    /// The VM whose state the file has to be.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vm_uuid: Option<String>,
    /// Take the file although it is older than the newest copy.
    #[serde(default, skip_serializing_if = "is_false")]
    pub accept_rollback: bool,
    /// Take what another tool has changed in it.
    #[serde(default, skip_serializing_if = "is_false")]
    pub adopt: bool,
}

/// Where a key comes from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum KeySpec {
    /// File with the key: 32 bytes, or 64 hexadecimal digits.
    File(PathBuf),
    /// File whose first line is a passphrase.
    PassphraseFile(PathBuf),
    /// systemd credential with the key.
    Credential(String),
    /// Program that prints the key.
    Hook(PathBuf),
}

/// A TPM service that runs already.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TpmSocketSpec {
    /// Its control socket.
    pub path: PathBuf,
}

/// What follows when the guest asks for a reset.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OnReset {
    /// The run ends.
    #[default]
    Exit,
    /// A new VM, launched from the same bytes.
    Restart(RestartSpec),
}

/// A guest that is launched anew.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RestartSpec {
    /// How many VMs there may be, the first one included; any number without it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_lives: Option<u32>,
}

fn memory_default() -> u64 {
    MEMORY_DEFAULT
}

fn cpus_default() -> u32 {
    1
}

fn cmdline_default() -> String {
    CMDLINE_DEFAULT.into()
}

fn features_default() -> u64 {
    snp::vmsa::SEV_FEATURE_SNP_ACTIVE
}

fn is_false(value: &bool) -> bool {
    !value
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

/// A request that cannot be carried out, whatever the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SpecError {
    /// Path of the field, such as `snp.platform.emulated.strict`.
    pub field: String,
    /// What is wrong, and what to do.
    pub problem: String,
}

impl fmt::Display for SpecError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.field, self.problem)
    }
}

impl std::error::Error for SpecError {}

/// Why firmware and IGVM files need one memory for both views.
const PAGING_OFF: &str = "firmware starts with paging off, where every access is private whatever its address says, \
                          so it needs backing single";

fn wrong<T>(field: &str, problem: impl Into<String>) -> Result<T, SpecError> {
    Err(SpecError { field: field.to_owned(), problem: problem.into() })
}

impl VmSpec {
    /// Reads the text of a file. A field that is not known, a value of another type and a contradiction are
    /// refused with their path.
    pub fn parse(json: &str) -> Result<VmSpec, SpecError> {
        let mut reader = serde_json::Deserializer::from_str(json);
        let spec: VmSpec = serde_path_to_error::deserialize(&mut reader).map_err(|error| SpecError {
            field: error.path().to_string(),
            problem: error.inner().to_string(),
        })?;
        reader.end().map_err(|error| SpecError { field: ".".into(), problem: error.to_string() })?;
        spec.validate()?;
        Ok(spec)
    }

    /// The text that [`VmSpec::parse`] reads.
    pub fn to_json(&self) -> String {
        // Only a map with keys that are no text, or a failing writer, could stand in its way.
        serde_json::to_string_pretty(self).unwrap_or_default() + "\n"
    }

    /// Refuses what contradicts itself.
    pub fn validate(&self) -> Result<(), SpecError> {
        if !(1..=VCPUS_MAX).contains(&self.cpus) {
            return wrong("cpus", format!("{} vCPUs, expected 1 to {VCPUS_MAX}", self.cpus));
        }
        match (&self.boot, &self.snp) {
            (BootSpec::Firmware(_), None) => {
                wrong("boot.firmware", "only SNP guests start from firmware; add snp")
            }
            (BootSpec::Igvm(_), None) => {
                wrong("boot.igvm", "only SNP guests start from an IGVM file; add snp")
            }
            (_, Some(snp)) => self.validate_snp(snp),
            (BootSpec::Direct(_), None) => Ok(()),
        }?;
        if let OnReset::Restart(RestartSpec { max_lives: Some(0) }) = self.on_reset {
            return wrong("on_reset.restart.max_lives", "0 lives; the first VM counts, so 1 is the least");
        }
        self.validate_backends()
    }

    fn validate_snp(&self, snp: &SnpSpec) -> Result<(), SpecError> {
        let direct = matches!(self.boot, BootSpec::Direct(_));
        for (field, given) in [
            ("snp.accept", snp.accept.is_some()),
            ("snp.secure_tsc", snp.secure_tsc),
            ("snp.validation", snp.validation != Validation::default()),
            ("snp.tamper", snp.tamper.is_some()),
        ] {
            if given && !direct {
                return wrong(field, "would have no effect: it is about a kernel that is booted directly");
            }
        }
        if snp.accept.is_some() && snp.validation == Validation::Launch {
            return wrong("snp.accept", "would have no effect: the launch validates all memory");
        }
        if let PlatformSpec::Emulated(emulated) = &snp.platform {
            // Before the rules about backing, which --strict brings along: who asks for strict hears of strict.
            if emulated.strict && !direct {
                return wrong(
                    "snp.platform.emulated.strict",
                    format!(
                        "does not go with firmware or an IGVM file: it needs backing split, and {PAGING_OFF}"
                    ),
                );
            }
            if emulated.strict && emulated.backing == Backing::Single {
                return wrong(
                    "snp.platform.emulated.strict",
                    "needs backing split: one memory for both views cannot tell them apart",
                );
            }
            if emulated.backing == Backing::Split && !direct {
                return wrong(
                    "snp.platform.emulated.backing",
                    format!("split does not go with firmware or an IGVM file: {PAGING_OFF}"),
                );
            }
        }
        Ok(())
    }

    fn validate_backends(&self) -> Result<(), SpecError> {
        if let Some(tpm) = &self.tpm {
            if !matches!(self.boot, BootSpec::Direct(_)) {
                return wrong("tpm", "only a kernel that is booted directly can be told of a TPM");
            }
            match self.backends.get(&tpm.backend) {
                Some(BackendSpec::TpmService(_) | BackendSpec::TpmSocket(_)) => {}
                None => return wrong("tpm.backend", format!("no backend is called '{:.64}'", tpm.backend)),
            }
        }
        let used = self.tpm.as_ref().map(|tpm| &tpm.backend);
        match self.backends.keys().find(|name| Some(*name) != used) {
            Some(name) => wrong(&format!("backends.{name:.64}"), "no device uses it"),
            None => Ok(()),
        }
    }

    /// The backend of the TPM.
    pub fn tpm_backend(&self) -> Option<&BackendSpec> {
        self.backends.get(&self.tpm.as_ref()?.backend)
    }
}

#[cfg(test)]
#[path = "spec_test.rs"]
mod tests;
