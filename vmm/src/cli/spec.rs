// SPDX-License-Identifier: Apache-2.0
//! `cvmm spec` and `--spec`: a VM as a file.

use std::io::Write as _;
use std::path::Path;

use super::Failure;
use super::fields::option;
use super::note;
use crate::prepare::PrepareError;
use crate::spec::SpecError;
use crate::spec::VmSpec;

/// Largest file that is read.
const FILE_MAX: u64 = 1 << 20;

impl From<SpecError> for Failure {
    fn from(error: SpecError) -> Self {
        let option =
            if error.field.starts_with("backends.") { "--vtpm".into() } else { option(&error.field) };
        Failure::Usage(format!("{option} {}", error.problem))
    }
}

impl From<PrepareError> for Failure {
    fn from(error: PrepareError) -> Self {
        match error {
            PrepareError::Spec(error) => error.into(),
            PrepareError::File { field, path, problem } => {
                Failure::Usage(format!("{} {}: {problem}", option(field), path.display()))
            }
            PrepareError::Request(problem) => Failure::Usage(problem),
            PrepareError::Host(problem) => Failure::Monitor(problem),
        }
    }
}

/// Reads a file; errors name its fields.
pub fn read(path: &Path) -> Result<VmSpec, Failure> {
    let wrong = |problem: String| Failure::Usage(format!("--spec {}: {problem}", path.display()));
    let bytes = crate::files::read_limited(path, FILE_MAX, &note::events()).map_err(wrong)?;
    let text = String::from_utf8(bytes).map_err(|_| wrong("is no JSON text".into()))?;
    VmSpec::parse(&text).map_err(|error| wrong(error.to_string()))
}

/// Prints a VM.
pub fn print(spec: &VmSpec) -> Result<u8, Failure> {
    std::io::stdout().write_all(spec.to_json().as_bytes()).map_err(Failure::monitor)?;
    Ok(0)
}
