// SPDX-License-Identifier: Apache-2.0
//! Writes manual pages and shell completions of `cvmm` and `vtpm-svc`, and `docs/options.md`, from the
//! definitions that `--help` comes from: `cargo run -p vmm --example manual -- FOLDER`.
//!
//! An example and not a subcommand, so that the program does not carry what only packagers need.

mod options;
mod programs;

use std::fs;
use std::io;
use std::path::Path;
use std::path::PathBuf;

use clap::Command;
use clap_complete::Shell;

fn write(command: &Command, folder: &Path) -> io::Result<()> {
    let pages = folder.join("man1");
    fs::create_dir_all(&pages)?;
    // Not of `help`, which each command has.
    clap_mangen::generate_to(command.clone().disable_help_subcommand(true), &pages)?;
    for (shell, name) in [(Shell::Bash, "bash"), (Shell::Zsh, "zsh"), (Shell::Fish, "fish")] {
        let completions = folder.join(name);
        fs::create_dir_all(&completions)?;
        clap_complete::generate_to(shell, &mut command.clone(), command.get_name(), &completions)?;
    }
    Ok(())
}

fn main() -> io::Result<()> {
    let Some(folder) = std::env::args_os().nth(1).map(PathBuf::from) else {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "say into which folder"));
    };
    let programs = programs::programs();
    for command in &programs {
        write(command, &folder)?;
    }
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/options.md");
    fs::write(&page, options::page(&programs))?;
    println!("{} has manual pages and completions, {} every option", folder.display(), page.display());
    Ok(())
}
