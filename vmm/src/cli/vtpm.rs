// SPDX-License-Identifier: Apache-2.0
//! The options that give a guest its TPM.

use std::path::Path;
use std::path::PathBuf;

use super::Failure;
use crate::spec::BackendSpec;
use crate::spec::KeySpec;
use crate::spec::TpmServiceSpec;
use crate::spec::TpmSocketSpec;
use crate::spec::TpmStateSpec;
use crate::vtpm::backend::missing;

/// The TPM of a run.
#[derive(clap::Args, Clone, Debug, Default)]
#[command(next_help_heading = "vTPM")]
pub struct VtpmArgs {
    /// Give the guest a TPM 2.0 that cvmm starts and ends with it. Its state is in FILE (made by
    /// `cvmm vmgs create`); without FILE the TPM is new at each run and forgotten at its end. Part of an SNP
    /// guest's launch digest. The TPM runs on the host: its operator can read and change everything in it
    #[arg(long, value_name = "FILE", num_args = 0..=1, conflicts_with = "vtpm_socket")]
    vtpm: Option<Option<PathBuf>>,
    /// Give the guest the TPM of a service that listens on this control socket (vtpm-svc, swtpm) and stays
    /// when the guest ends
    #[arg(long, value_name = "SOCKET")]
    vtpm_socket: Option<PathBuf>,
    /// File with the key of --vtpm FILE: 32 bytes, or 64 hexadecimal digits
    #[arg(long, value_name = "FILE", group = "vtpm_key")]
    vtpm_key_file: Option<PathBuf>,
    /// File whose first line is the passphrase of --vtpm FILE
    #[arg(long, value_name = "FILE", group = "vtpm_key")]
    vtpm_passphrase_file: Option<PathBuf>,
    /// systemd credential with the key of --vtpm FILE
    #[arg(long, value_name = "NAME", group = "vtpm_key")]
    vtpm_key_credential: Option<String>,
    /// Program that prints the key of --vtpm FILE
    #[arg(long, value_name = "PROGRAM", group = "vtpm_key")]
    vtpm_key_hook: Option<PathBuf>,
    /// Folder that remembers which copy of --vtpm FILE is the newest [default: as for `cvmm vmgs`]
    #[arg(long, value_name = "DIR", requires = "vtpm_key")]
    vtpm_anchor: Option<PathBuf>,
    /// Folder of the host's certificate authority, made if missing: a new TPM gets EK and AK certificates
    /// from it
    #[arg(long, value_name = "DIR")]
    vtpm_ek_ca: Option<PathBuf>,
    /// The VM whose state --vtpm FILE has to be (`cvmm vmgs create` prints it): the file of another VM is
    /// refused
    #[arg(long, value_name = "UUID")]
    vm_uuid: Option<String>,
    /// Take --vtpm FILE although it is older than the newest copy, or nobody knows: what was written since is
    /// lost
    #[arg(long)]
    vtpm_accept_rollback: bool,
    /// Take what another tool has changed in --vtpm FILE
    #[arg(long)]
    vtpm_adopt: bool,
    /// The service's program [default: vtpm-svc beside cvmm, or in PATH]
    #[arg(long, value_name = "FILE")]
    vtpm_svc: Option<PathBuf>,
}

/// Whether a measured guest has a TPM.
#[derive(clap::Args, Clone, Debug, Default)]
pub struct MeasureArgs {
    /// The guest has a TPM: what announces it, its event log first of all, is part of the digest. Taken as
    /// for a run; FILE is not read
    #[arg(long, value_name = "FILE", num_args = 0..=1, conflicts_with_all = ["firmware", "igvm"])]
    vtpm: Option<Option<PathBuf>>,
}

impl MeasureArgs {
    /// Whether there is one.
    pub fn wanted(&self) -> bool {
        self.vtpm.is_some()
    }
}

impl VtpmArgs {
    /// The backend that these options describe, if the guest has a TPM.
    pub fn backend(&self) -> Result<Option<BackendSpec>, Failure> {
        match (&self.vtpm, &self.vtpm_socket) {
            (Some(state), _) => self.service(state.as_deref()).map(BackendSpec::TpmService).map(Some),
            (None, Some(path)) => Ok(Some(BackendSpec::TpmSocket(TpmSocketSpec { path: path.clone() }))),
            (None, None) => Ok(None),
        }
    }

    fn service(&self, state: Option<&Path>) -> Result<TpmServiceSpec, Failure> {
        let keys = [
            self.vtpm_key_file.clone().map(KeySpec::File),
            self.vtpm_passphrase_file.clone().map(KeySpec::PassphraseFile),
            self.vtpm_key_credential.clone().map(KeySpec::Credential),
            self.vtpm_key_hook.clone().map(KeySpec::Hook),
        ];
        // The parser lets only one through.
        let key = keys.into_iter().flatten().next();
        let state = match (state, key) {
            (None, Some(_)) => {
                return Err(Failure::Usage(
                    "--vtpm: a key is given, but no file; say which: --vtpm FILE".into(),
                ));
            }
            // Whoever has no file has no key either.
            (Some(file), None) if !file.exists() => {
                return Err(Failure::Usage(format!("--vtpm {}", missing(file))));
            }
            (Some(file), None) => {
                return Err(Failure::Usage(format!(
                    "--vtpm {}: the file is encrypted; give its key with --vtpm-key-file, --vtpm-passphrase-file, \
                     --vtpm-key-credential or --vtpm-key-hook",
                    file.display()
                )));
            }
            (Some(file), Some(key)) => Some(TpmStateSpec {
                file: file.to_owned(),
                key,
                anchor: self.vtpm_anchor.clone(),
                vm_uuid: self.vm_uuid.clone(),
                accept_rollback: self.vtpm_accept_rollback,
                adopt: self.vtpm_adopt,
            }),
            (None, None) => None,
        };
        let about_file = [
            ("--vm-uuid", self.vm_uuid.is_some()),
            ("--vtpm-accept-rollback", self.vtpm_accept_rollback),
            ("--vtpm-adopt", self.vtpm_adopt),
        ];
        if let (None, Some((option, _))) = (&state, about_file.iter().find(|(_, given)| *given)) {
            return Err(Failure::Usage(format!(
                "{option} is about a state file, and --vtpm alone has none: say which, --vtpm FILE"
            )));
        }
        Ok(TpmServiceSpec { state, ek_ca: self.vtpm_ek_ca.clone(), program: self.vtpm_svc.clone() })
    }
}
