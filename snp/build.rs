// SPDX-License-Identifier: Apache-2.0
//! Builds the guest shim `stage0` and leaves it where `src/stage0.rs` embeds it.

#[path = "stage0/recipe.rs"]
mod recipe;

use std::path::Path;
use std::path::PathBuf;

fn main() {
    println!("cargo::rerun-if-changed=stage0");
    println!("cargo::rerun-if-changed=build.rs");
    if let Err(message) = run() {
        for line in message.lines() {
            println!("cargo::error={line}");
        }
    }
}

fn run() -> Result<(), String> {
    let variable =
        |name: &str| std::env::var_os(name).map(PathBuf::from).ok_or_else(|| format!("{name} is not set"));
    let (rustc, out) = (variable("RUSTC")?, variable("OUT_DIR")?);
    let folder = variable("CARGO_MANIFEST_DIR")?.join("stage0");
    let built = recipe::build(&rustc, &folder, &out)?;
    write(&out.join("stage0.bin"), &built.image)?;
    let text = format!(
        "Built {{ image: include_bytes!(concat!(env!(\"OUT_DIR\"), \"/stage0.bin\")), entry: {:#x}, park: {:#x}, \
         hook: {:#x}, sites: &{:?} }}\n",
        built.entry, built.park, built.hook, built.sites
    );
    write(&out.join("stage0_built.rs"), text.as_bytes())
}

fn write(path: &Path, bytes: &[u8]) -> Result<(), String> {
    std::fs::write(path, bytes).map_err(|e| format!("cannot write {}: {e}", path.display()))
}
