// SPDX-License-Identifier: Apache-2.0
//! Why a guest has no TPM, and how long its service is waited for.

use std::io;
use std::path::PathBuf;
use std::process::ExitStatus;
use std::time::Duration;

use devices::bus::Overlap;
use vtpm_svc::control::client::ClientError;
use vtpm_svc::tpm::commands::CommandError;

use crate::platform::error::CallError;
use crate::run::inbox::Unattended;

/// How long the service may take to power the TPM on, or to start. A new TPM makes its keys then.
pub(super) const POWER_ON_PATIENCE: Duration = Duration::from_secs(180);
/// How long a command of the guest may go on when it has been cancelled.
pub(super) const COMMAND_PATIENCE: Duration = Duration::from_secs(30);

/// Why the guest has no TPM.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the messages say what the fields are")]
pub enum VtpmError {
    /// The service's program.
    #[error("cannot start the vTPM service {program}: {source}{hint}")]
    Start { program: String, source: io::Error, hint: &'static str },
    /// It ended before it served anything.
    #[error(
        "the vTPM service {program} ended ({status}) instead of serving; the reason is in its message above"
    )]
    Ended { program: String, status: ExitStatus },
    /// A socket that somebody else serves.
    #[error("`vtpm_socket` {path}: {source}")]
    Socket { path: PathBuf, source: ClientError },
    /// The service.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// It hangs, or the run was ended while it started.
    #[error("the vTPM service {program}: {source}")]
    Unattended { program: String, source: Unattended },
    /// A guest's command that does not end.
    #[error(
        "the guest's last command still runs in the vTPM service, {} seconds after it was cancelled: the service hangs",
        COMMAND_PATIENCE.as_secs()
    )]
    Busy,
    /// The TPM.
    #[error("measuring the boot: {0}")]
    Command(#[from] CommandError),
    /// A TPM that forgets cannot be made.
    #[error("`tpm` without a file: {what}: {reason}")]
    Fresh { what: &'static str, reason: String },
    /// The buffer page or a thread.
    #[error("its device: {what}: {source}")]
    Host { what: &'static str, source: io::Error },
    /// The buffer page in the guest.
    #[error("its device: {0}")]
    Kvm(#[from] CallError),
    /// A mistake in the table of addresses.
    #[error(transparent)]
    Overlap(#[from] Overlap),
}
