// SPDX-License-Identifier: Apache-2.0
//! `cvmm spec` and `--spec`: a VM as a file. And the way back: what an option is called whose field is wrong.

use std::io::Write as _;
use std::path::Path;

use super::Failure;
use super::note;
use crate::prepare::PrepareError;
use crate::spec::SpecError;
use crate::spec::VmSpec;

/// Largest file that is read.
const FILE_MAX: u64 = 1 << 20;

/// Fields whose options have other names.
const OPTIONS: &[(&str, &str)] = &[
    ("boot.firmware", "firmware"),
    ("boot.firmware.image", "firmware"),
    ("boot.igvm", "igvm"),
    ("boot.igvm.image", "igvm"),
    ("snp.id_block.block", "id-block"),
    ("snp.id_block.auth", "id-auth"),
    ("snp.platform.emulated.keys", "emulated-keys"),
    ("tpm", "vtpm"),
];

/// The option that fills a field.
fn option(field: &str) -> String {
    let name = OPTIONS.iter().find(|(path, _)| *path == field).map(|(_, option)| (*option).to_owned());
    let last = field.rsplit('.').next().unwrap_or(field);
    format!("--{}", name.unwrap_or_else(|| last.replace('_', "-")))
}

/// Fields that libraries name in their messages, in backticks.
const NAMED: [&str; 7] = ["accept", "cmdline", "cpus", "initrd", "kernel", "memory", "policy"];

/// A library's message as the user of the command line reads it: with options where it names fields.
pub(super) fn with_options(message: &str) -> String {
    NAMED.iter().fold(message.to_owned(), |text, field| text.replace(&format!("`{field}`"), &option(field)))
}

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

#[cfg(test)]
mod tests {
    use super::*;
    use snp::image::error::ImageError;

    #[test]
    fn the_user_reads_options_where_a_library_names_fields() {
        let told = |error: ImageError| with_options(&error.to_string());
        assert_eq!(told(ImageError::Vcpus(0)), "--cpus: 0; give 1 to 255");
        let lazy = told(ImageError::LazyMemory(1 << 50));
        assert!(lazy.starts_with("--accept lazy: 1125899906842624 bytes of --memory, but"), "{lazy}");
        assert!(lazy.ends_with("use --accept auto or eager"), "{lazy}");
        assert_eq!(with_options("`objcopy` of `Memory`"), "`objcopy` of `Memory`");
    }
}
