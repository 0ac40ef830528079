// SPDX-License-Identifier: Apache-2.0
//! Why a TPM was not made.

use std::path::PathBuf;

use super::platform_certificate::PlatformError;
use crate::tpm::commands::CommandError;

/// Why a TPM was not made.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the messages say what the fields are")]
pub enum ManufactureError {
    /// A command.
    #[error(transparent)]
    Command(#[from] CommandError),
    /// A file of the authority.
    #[error("certificate authority {path}: {problem}")]
    Authority { path: PathBuf, problem: String },
    /// A public area that is not what the template asked for.
    #[error("the TPM returned a public key that does not fit its template")]
    PublicKey,
    /// A certificate that cannot be written down.
    #[error("a certificate in DER: {0}")]
    Der(#[from] x509_cert::der::Error),
    /// The platform certificate.
    #[error(transparent)]
    Platform(#[from] PlatformError),
    /// No random bytes.
    #[error("no random bytes from the operating system")]
    NoEntropy,
}
