// SPDX-License-Identifier: Apache-2.0
//! What both programs need as process 1: file systems, kernel modules, a way to end the machine.

use std::ffi::CString;
use std::fs;
use std::fs::File;
use std::path::Path;

use anyhow::Context;
use anyhow::Result;
use rustix::mount::MountFlags;
use rustix::mount::mount;
use rustix::system::RebootCommand;
use rustix::system::finit_module;
use rustix::system::reboot;

/// The list of modules in an initial ramdisk, one path per line, in load order.
pub const MODULE_LIST: &str = "/modules/load";

/// Mounts `what` of type `kind` at `target` (created if missing) with file-system options `options`.
pub fn mount_at(what: &str, target: &str, kind: &str, flags: MountFlags, options: &str) -> Result<()> {
    // On a read-only parent the directory is there already or the mount says what is missing.
    let _ = fs::create_dir_all(target);
    let options = CString::new(options)?;
    mount(what, target, kind, flags, Some(options.as_c_str()))
        .with_context(|| format!("cannot mount {kind} at {target}"))
}

/// Mounts proc, sysfs and devtmpfs below `root` ("" for the current root).
pub fn mount_basics(root: &str) -> Result<()> {
    mount_at("proc", &format!("{root}/proc"), "proc", MountFlags::empty(), "")?;
    mount_at("sysfs", &format!("{root}/sys"), "sysfs", MountFlags::empty(), "")?;
    mount_at("devtmpfs", &format!("{root}/dev"), "devtmpfs", MountFlags::empty(), "")
}

/// Loads the modules named in [`MODULE_LIST`], in that order; returns what could not be loaded and why.
pub fn load_modules() -> Vec<String> {
    let list = fs::read_to_string(MODULE_LIST).unwrap_or_default();
    let mut failed = Vec::new();
    for path in list.lines().filter(|line| !line.is_empty()) {
        let loaded = File::open(Path::new(path))
            .map_err(anyhow::Error::from)
            .and_then(|file| finit_module(&file, c"", 0).map_err(anyhow::Error::from));
        match loaded {
            Ok(()) => {}
            Err(error) => failed.push(format!("{path}: {error}")),
        }
    }
    failed
}

/// Ends the machine; returns only if the kernel refuses.
pub fn end(how: RebootCommand) -> anyhow::Error {
    rustix::fs::sync();
    match reboot(how) {
        Ok(()) => anyhow::anyhow!("the kernel came back from reboot(2)"),
        Err(error) => anyhow::anyhow!("reboot(2): {error}"),
    }
}
