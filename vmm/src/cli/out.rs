// SPDX-License-Identifier: Apache-2.0
//! Files that a command writes for its user: whole or not at all, through the user's own links only, with
//! owner and mode of what they replace.

use std::path::Path;

use vtpm_svc::whole_file;
use vtpm_svc::whole_file::PlaceError;
use vtpm_svc::whole_file::Readers;

use super::Failure;

/// Writes a file that holds no secret.
pub(super) fn write(path: &Path, bytes: &[u8]) -> Result<(), Failure> {
    whole_file::write(path, bytes, Readers::Anyone).map_err(|error| match error {
        PlaceError::Usage(_) => Failure::Usage(error.to_string()),
        PlaceError::Io { .. } => Failure::Monitor(error.to_string()),
    })
}
