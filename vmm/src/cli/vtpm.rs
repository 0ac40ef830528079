// SPDX-License-Identifier: Apache-2.0
//! The options that give a guest its TPM.

use std::ffi::OsString;
use std::path::Path;
use std::path::PathBuf;

use snp::image::direct::DirectBoot;
use vtpm_svc::measured::Event;

use super::Failure;
use crate::events::Inbox;
use crate::events::Unattended;
use crate::monitor::Companion;
use crate::vtpm::Vtpm;
use crate::vtpm::VtpmError;
use crate::vtpm::measured;
use crate::vtpm::service;

/// The TPM of a run.
#[derive(clap::Args, Clone, Debug, Default)]
#[command(next_help_heading = "vTPM")]
pub struct VtpmArgs {
    /// Give the guest a TPM 2.0 that cvmm starts and ends with it. Its state is in FILE (made by `cvmm vmgs create`); without
    /// FILE the TPM is new at each run and forgotten at its end. Part of an SNP guest's launch digest. The TPM runs on the host:
    /// its operator can read and change everything in it
    #[arg(long, value_name = "FILE", num_args = 0..=1, conflicts_with = "vtpm_socket")]
    vtpm: Option<Option<PathBuf>>,
    /// Give the guest the TPM of a service that listens on this control socket (vtpm-svc, swtpm) and stays when the guest ends
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
    /// Folder of the host's certificate authority, made if missing: a new TPM gets EK and AK certificates from it
    #[arg(long, value_name = "DIR")]
    vtpm_ek_ca: Option<PathBuf>,
    /// The VM whose state --vtpm FILE has to be (`cvmm vmgs create` prints it): the file of another VM is refused
    #[arg(long, value_name = "UUID")]
    vm_uuid: Option<String>,
    /// Take --vtpm FILE although it is older than the newest copy, or nobody knows: what was written since is lost
    #[arg(long)]
    vtpm_accept_rollback: bool,
    /// Take what another tool has changed in --vtpm FILE
    #[arg(long)]
    vtpm_adopt: bool,
    /// The service's program [default: vtpm-svc beside cvmm, or in PATH]
    #[arg(long, value_name = "FILE")]
    vtpm_svc: Option<PathBuf>,
}

/// What starts anew with each VM, and where signals arrive if something has been started already.
#[derive(Default)]
pub struct Companions {
    /// In this order.
    pub list: Vec<Box<dyn Companion>>,
    /// See [`crate::monitor::Host`].
    pub inbox: Option<Inbox>,
}

/// Whether a measured guest has a TPM.
#[derive(clap::Args, Clone, Debug, Default)]
pub struct MeasureArgs {
    /// The guest has a TPM: what announces it, its event log first of all, is part of the digest. Taken as for a run; FILE is not
    /// read
    #[arg(long, value_name = "FILE", num_args = 0..=1, conflicts_with_all = ["firmware", "igvm"])]
    vtpm: Option<Option<PathBuf>>,
}

impl MeasureArgs {
    /// Announces the TPM, if there is one; what a run will extend its PCRs with.
    pub fn announce(&self, boot: &mut DirectBoot<'_>) -> Result<Vec<Event>, Failure> {
        if self.wanted() { measured::announce(boot).map_err(Failure::usage) } else { Ok(Vec::new()) }
    }

    /// Whether there is one.
    pub fn wanted(&self) -> bool {
        self.vtpm.is_some()
    }
}

impl VtpmArgs {
    /// Whether the guest has a TPM.
    pub fn wanted(&self) -> bool {
        self.vtpm.is_some() || self.vtpm_socket.is_some()
    }

    /// Finds out what is wrong with these options, before anything else is looked at.
    pub fn check(&self) -> Result<(), Failure> {
        self.vtpm.as_ref().map_or(Ok(()), |state| self.service(state.as_deref()).map(|_| ()))
    }

    /// Announces the TPM to `boot` and connects to its service, which is started if it is to be. Signals are caught from then on,
    /// so that one during the start leaves nothing behind; they arrive in the inbox.
    pub fn start(&self, boot: &mut DirectBoot<'_>) -> Result<Companions, Failure> {
        if !self.wanted() {
            return Ok(Companions::default());
        }
        let inbox = Inbox::open().map_err(Failure::monitor)?;
        let vtpm = match (&self.vtpm, &self.vtpm_socket) {
            (Some(state), _) => {
                let options = self.service(state.as_deref())?;
                Vtpm::start(&options, measured::announce(boot).map_err(Failure::usage)?, &inbox)
            }
            (None, Some(socket)) => {
                Vtpm::connect(socket, measured::announce(boot).map_err(Failure::usage)?, &inbox)
            }
            (None, None) => return Ok(Companions::default()),
        };
        match vtpm {
            Ok(vtpm) => Ok(Companions { list: vec![Box::new(vtpm)], inbox: Some(inbox) }),
            Err(VtpmError::Unattended { source: Unattended::Signal(signal), .. }) => {
                Err(Failure::Stopped(signal))
            }
            Err(e) => Err(Failure::monitor(e)),
        }
    }

    fn service(&self, state: Option<&Path>) -> Result<service::Options, Failure> {
        let mut arguments: Vec<OsString> = Vec::new();
        let key: [(&str, Option<OsString>); 4] = [
            ("--key-file", self.vtpm_key_file.clone().map(Into::into)),
            ("--passphrase-file", self.vtpm_passphrase_file.clone().map(Into::into)),
            ("--key-credential", self.vtpm_key_credential.clone().map(Into::into)),
            ("--key-hook", self.vtpm_key_hook.clone().map(Into::into)),
        ];
        let keys = key.iter().filter(|(_, value)| value.is_some()).count();
        match state {
            None if keys > 0 => {
                return Err(Failure::Usage(
                    "--vtpm: a key is given, but no file; say which: --vtpm FILE".into(),
                ));
            }
            None => {}
            Some(file) => check(file, keys)?,
        }
        let about_file = [
            ("--vm-uuid", self.vm_uuid.is_some()),
            ("--vtpm-accept-rollback", self.vtpm_accept_rollback),
            ("--vtpm-adopt", self.vtpm_adopt),
        ];
        if let (None, Some((option, _))) = (state, about_file.iter().find(|(_, given)| *given)) {
            return Err(Failure::Usage(format!(
                "{option} is about a state file, and --vtpm alone has none: say which, --vtpm FILE"
            )));
        }
        let rest = [
            ("--anchor", self.vtpm_anchor.clone().map(OsString::from)),
            ("--ek-ca", self.vtpm_ek_ca.clone().map(OsString::from)),
            ("--vm-uuid", self.vm_uuid.clone().map(OsString::from)),
        ];
        for (option, value) in key.into_iter().chain(rest) {
            if let Some(value) = value {
                arguments.extend([option.into(), value]);
            }
        }
        let flags = [("--accept-rollback", self.vtpm_accept_rollback), ("--adopt", self.vtpm_adopt)];
        arguments.extend(flags.iter().filter(|(_, given)| *given).map(|(flag, _)| OsString::from(flag)));
        Ok(service::Options { program: self.vtpm_svc.clone(), state: state.map(Path::to_owned), arguments })
    }
}

/// A state file that is not there is never made on the way: a mistyped name, or a file that somebody removed, would give the
/// guest another TPM, and whatever it had sealed would be lost to it.
fn check(file: &Path, keys: usize) -> Result<(), Failure> {
    let path = file.display();
    if !file.exists() {
        return Err(Failure::Usage(format!(
            "--vtpm {path}: no such file. For a new TPM make a key and the file, once:\n  \
             (umask 077; head -c 32 /dev/urandom >{path}.key)\n  \
             cvmm vmgs create {path} --key-file {path}.key"
        )));
    }
    if keys == 0 {
        return Err(Failure::Usage(format!(
            "--vtpm {path}: the file is encrypted; give its key with --vtpm-key-file, --vtpm-passphrase-file, \
             --vtpm-key-credential or --vtpm-key-hook"
        )));
    }
    Ok(())
}
