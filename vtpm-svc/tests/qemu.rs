// SPDX-License-Identifier: Apache-2.0
//! Stock QEMU on our control socket: a Linux guest runs the tpm2-tools script through its own `/dev/tpmrm0`.
//!
//! Ignored by default: it needs a guest kernel (`CVMM_KERNEL=path`, `cargo xtask setup` fetches one), busybox
//! and QEMU, and without hardware virtualisation it takes minutes.

#![allow(clippy::panic)]

mod common;

use std::collections::BTreeSet;
use std::path::Path;
use std::path::PathBuf;
use std::process::Command;

use common::Site;
use common::output;

/// A cpio archive in the "newc" form that kernels unpack.
#[derive(Default)]
struct Cpio(Vec<u8>, BTreeSet<PathBuf>);

impl Cpio {
    fn entry(&mut self, path: &Path, mode: u32, data: &[u8]) {
        let parents: Vec<PathBuf> = path.ancestors().skip(1).map(Path::to_path_buf).collect();
        for dir in parents.into_iter().rev().filter(|d| d.parent().is_some()) {
            if self.1.insert(dir.clone()) {
                self.raw(&dir, 0o040_755, &[]);
            }
        }
        self.raw(path, mode, data);
    }

    fn raw(&mut self, path: &Path, mode: u32, data: &[u8]) {
        let name = path.strip_prefix("/").unwrap_or(path).display().to_string();
        let ino = self.0.len() as u32;
        let fields = [ino, mode, 0, 0, 1, 0, data.len() as u32, 0, 0, 0, 0, name.len() as u32 + 1, 0];
        self.0.extend_from_slice(b"070701");
        fields.iter().for_each(|f| self.0.extend_from_slice(format!("{f:08x}").as_bytes()));
        self.0.extend_from_slice(name.as_bytes());
        self.0.push(0);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
        self.0.extend_from_slice(data);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
    }

    fn host_file(&mut self, path: &Path) {
        let data = std::fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        self.entry(path, 0o100_755, &data);
    }

    /// A program and every library that it needs.
    fn program(&mut self, path: &str) {
        self.host_file(Path::new(path));
        let (_, libraries) = output(Command::new("ldd").arg(path));
        for word in libraries.split_whitespace().filter(|w| w.starts_with('/')) {
            let path = PathBuf::from(word);
            if self.1.insert(path.clone()) {
                self.host_file(&path);
            }
        }
    }
}

const INIT: &str = "#!/bin/busybox sh
/bin/busybox --install -s /bin
mkdir -p /dev /proc /sys; mount -t devtmpfs dev /dev; mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t securityfs s /sys/kernel/security
export PATH=/usr/bin:/bin TPM2TOOLS_TCTI=device:/dev/tpmrm0
mkdir -p /work /tmp; cd /work
for n in 1 2 3 4 5 6 7 8 9 10; do test -e /dev/tpmrm0 && break; sleep 1; done
cat /sys/class/tpm/tpm0/tpm_version_major
sh /tpm2.sh && echo GUEST-PASSED || echo GUEST-FAILED
poweroff -f
";

/// The initrd: busybox, tpm2-tools, the script.
fn initrd() -> Vec<u8> {
    let mut cpio = Cpio::default();
    cpio.entry(Path::new("/init"), 0o100_755, INIT.as_bytes());
    cpio.host_file(Path::new("/bin/busybox"));
    cpio.program("/usr/bin/tpm2");
    cpio.program("/usr/lib/x86_64-linux-gnu/libtss2-tcti-device.so.0");
    for entry in std::fs::read_dir("/usr/bin").expect("/usr/bin").flatten() {
        if entry.file_name().to_string_lossy().starts_with("tpm2_") {
            cpio.entry(&entry.path(), 0o120_777, b"tpm2");
        }
    }
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/scripts/tpm2.sh");
    cpio.entry(Path::new("/tpm2.sh"), 0o100_755, &std::fs::read(script).expect("script"));
    cpio.raw(Path::new("TRAILER!!!"), 0, &[]);
    cpio.0
}

#[test]
#[ignore = "needs busybox-static, QEMU and a kernel in CVMM_KERNEL; `cargo xtask test` runs it"]
fn a_guest_of_stock_qemu_uses_our_tpm() {
    let kernel = PathBuf::from(std::env::var_os("CVMM_KERNEL").expect("CVMM_KERNEL"));
    for device in ["tpm-crb", "tpm-tis"] {
        let site = Site::new();
        let service = site.start(&[]);
        drop(service.first.take());
        std::fs::write(site.path("initrd"), initrd()).expect("initrd");
        let mut c = Command::new("timeout");
        c.args(["900", "qemu-system-x86_64", "-accel", "tcg", "-m", "512", "-display", "none", "-no-reboot"]);
        // QEMU 7.2's software CPU gives an interrupted guest wrong flags after CMPXCHG16B.
        c.args(["-cpu", "qemu64,-cx16"]);
        c.args(["-serial", "stdio", "-monitor", "none", "-nodefaults"]);
        c.args(["-chardev", &format!("socket,id=c,path={}", service.control.display())]);
        c.args(["-tpmdev", "emulator,id=t,chardev=c", "-device", &format!("{device},tpmdev=t")]);
        c.arg("-kernel").arg(&kernel).arg("-initrd").arg(site.path("initrd"));
        c.args(["-append", "console=ttyS0 quiet panic=-1"]);
        let (_, text) = output(&mut c);
        assert!(text.contains("GUEST-PASSED"), "{device}: {text}\n{}", site.log());
        assert!(text.contains("all steps passed"));
    }
}
