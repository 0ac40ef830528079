// SPDX-License-Identifier: Apache-2.0
//! Where things lie: sources, build products, downloads and results.

use std::path::Path;
use std::path::PathBuf;

use crate::kernels::Role;

/// The paths of one checkout. Everything that the harness writes is below [`Workspace::work`].
#[derive(Clone, Debug)]
pub struct Workspace {
    root: PathBuf,
    target: PathBuf,
}

impl Workspace {
    /// The checkout that this crate was built from.
    pub fn find() -> Self {
        let tests = Path::new(env!("CARGO_MANIFEST_DIR"));
        let root = tests.parent().unwrap_or(tests).to_path_buf();
        let target = match std::env::var_os("CARGO_TARGET_DIR") {
            Some(dir) => root.join(dir),
            None => root.join("target"),
        };
        Workspace { root, target }
    }

    /// Root of the checkout.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// What cargo builds for `profile` (`release`, or `debug` for the dev profile).
    pub fn cargo_output(&self, profile: &str) -> PathBuf {
        self.target.join(profile)
    }

    /// The harness's own directory: the only one that L1 can write to.
    pub fn work(&self) -> PathBuf {
        self.target.join("cvmm")
    }

    /// Unpacked guest kernels, one directory each; `CVMM_KERNEL_DIR` overrides.
    pub fn kernels(&self) -> PathBuf {
        std::env::var_os("CVMM_KERNEL_DIR").map_or_else(|| self.work().join("kernels"), PathBuf::from)
    }

    /// Build products for guests: cargo's target directory for static programs.
    pub fn guest_target(&self) -> PathBuf {
        self.work().join("guest-build")
    }

    /// A static program built by `cargo xtask setup`, such as `l2-init`.
    pub fn guest_program(&self, name: &str) -> PathBuf {
        self.guest_target().join("x86_64-unknown-linux-gnu/release").join(name)
    }

    /// Initial ramdisks built by `cargo xtask setup`.
    pub fn initrds(&self) -> PathBuf {
        self.work().join("initrd")
    }

    /// The test user space for the guest kernel `role`.
    pub fn guest_initrd(&self, role: Role) -> PathBuf {
        self.initrds().join(format!("{}.cpio", role.name()))
    }

    /// Kernels that somebody named, and their initial ramdisks: copies, because L1 does not see every
    /// directory.
    pub fn given_kernels(&self) -> PathBuf {
        self.work().join("given-kernels")
    }

    /// Consoles, reports and other output of the last runs.
    pub fn results(&self) -> PathBuf {
        self.work().join("results")
    }
}
