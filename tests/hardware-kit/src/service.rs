// SPDX-License-Identifier: Apache-2.0
//! The TPM service on a host whose libraries are not known.
//!
//! `vtpm-svc` loads libtpms when it starts, so it cannot be a static program like the others. The kit brings
//! it with every library that it needs and with their loader, in a folder of its own; the loader has to be
//! told where they are. `vtpm-svc` beside cvmm, where cvmm looks for the service, is a name of this program,
//! which does that and is gone.

use std::ffi::OsStr;
use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;
use std::process::ExitCode;

/// Name of the service, and of the folder that has it with its libraries.
pub const NAME: &str = "vtpm-svc";
/// Folder with the service, its libraries and their loader.
pub const FOLDER: &str = "vtpm";
/// The loader's file name.
pub const LOADER: &str = "ld-linux-x86-64.so.2";

/// Whether this program was started as the service.
pub fn is_meant(name: &OsStr) -> bool {
    Path::new(name).file_name().is_some_and(|name| name == NAME)
}

/// Becomes the service; returns only if that is not possible.
pub fn become_it(arguments: impl Iterator<Item = OsString>) -> ExitCode {
    // The program's own file: the name that it was started by is a link to it.
    let folder = std::env::current_exe().map(|program| program.with_file_name(FOLDER));
    let error = match folder {
        Ok(folder) => command(&folder, arguments).exec(),
        Err(error) => error,
    };
    eprintln!("{NAME}: cannot start {FOLDER}/{LOADER} beside this program: {error}");
    ExitCode::FAILURE
}

/// The loader, with its libraries and the service (`ld.so(8)`).
fn command(folder: &Path, arguments: impl Iterator<Item = OsString>) -> Command {
    let mut command = Command::new(folder.join(LOADER));
    command.arg("--library-path").arg(folder).args(["--argv0", NAME]).arg(folder.join(NAME));
    // What the host has set for its own programs is no business of the kit's.
    command.env_remove("LD_LIBRARY_PATH").env_remove("LD_PRELOAD").args(arguments);
    command
}
