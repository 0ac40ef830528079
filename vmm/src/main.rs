// SPDX-License-Identifier: Apache-2.0
//! The `cvmm` binary.

use std::process::ExitCode;

fn main() -> ExitCode {
    vmm::cli::main()
}
