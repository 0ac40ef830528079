// SPDX-License-Identifier: Apache-2.0
//! The TPM's backend, as a request describes it.

use std::ffi::OsString;
use std::path::Path;

use vtpm_svc::measured::Event;

use super::Vtpm;
use super::error::VtpmError;
use super::service;
use crate::run::inbox::Inbox;
use crate::spec::BackendSpec;
use crate::spec::KeySpec;
use crate::spec::TpmServiceSpec;
use crate::spec::TpmStateSpec;

/// What is wrong with a backend before anything is started. A state file that is not there is never made on
/// the way: a mistyped name, or a file that somebody removed, would give the guest another TPM, and whatever
/// it had sealed would be lost to it.
pub fn check(spec: &BackendSpec) -> Result<(), String> {
    let BackendSpec::TpmService(TpmServiceSpec { state: Some(state), .. }) = spec else { return Ok(()) };
    if state.file.exists() { Ok(()) } else { Err(missing(&state.file)) }
}

/// How a state file is made that is not there.
pub fn missing(file: &Path) -> String {
    let path = file.display();
    format!(
        "{path}: no such file. For a new TPM make a key and the file, once:\n  \
         (umask 077; head -c 32 /dev/urandom >{path}.key)\n  \
         cvmm vmgs create {path} --key-file {path}.key"
    )
}

/// Connects to the service, which is started if it is to be; the TPM's PCRs will begin with `events`.
pub fn start(spec: &BackendSpec, events: Vec<Event>, inbox: &Inbox) -> Result<Vtpm, VtpmError> {
    match spec {
        BackendSpec::TpmService(spec) => Vtpm::start(&options(spec), events, inbox),
        BackendSpec::TpmSocket(spec) => Vtpm::connect(&spec.path, events, inbox),
    }
}

fn options(spec: &TpmServiceSpec) -> service::Options {
    let mut arguments = spec.state.as_ref().map_or_else(Vec::new, state_arguments);
    if let Some(folder) = &spec.ek_ca {
        arguments.extend(["--ek-ca".into(), folder.into()]);
    }
    service::Options {
        program: spec.program.clone(),
        state: spec.state.as_ref().map(|state| state.file.clone()),
        arguments,
    }
}

fn state_arguments(state: &TpmStateSpec) -> Vec<OsString> {
    let key: (&str, OsString) = match &state.key {
        KeySpec::File(path) => ("--key-file", path.into()),
        KeySpec::PassphraseFile(path) => ("--passphrase-file", path.into()),
        KeySpec::Credential(name) => ("--key-credential", name.into()),
        KeySpec::Hook(path) => ("--key-hook", path.into()),
    };
    let mut arguments = vec![key.0.into(), key.1];
    let values = [
        ("--anchor", state.anchor.clone().map(OsString::from)),
        ("--vm-uuid", state.vm_uuid.clone().map(OsString::from)),
    ];
    for (option, value) in values {
        if let Some(value) = value {
            arguments.extend([option.into(), value]);
        }
    }
    let flags = [("--accept-rollback", state.accept_rollback), ("--adopt", state.adopt)];
    arguments.extend(flags.iter().filter(|(_, given)| *given).map(|(flag, _)| OsString::from(flag)));
    arguments
}
