// SPDX-License-Identifier: Apache-2.0
//! A launch owns its bytes: whatever becomes of the files of a boot once they are read, what was read is measured and launched, and
//! again at each reset. A mapping of a file that is cut short would end the process by SIGBUS.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails where its host fails")]

use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use cvmm_tests::igvm_guest;
use cvmm_tests::igvm_guest::End;
use cvmm_tests::igvm_guest::Twist;
use kvm_bindings::kvm_cpuid_entry2;
use snp::digest::LaunchDigest;
use snp::pages::cpuid::SnpCpuid;
use snp::policy::PolicyRules;
use snp_model::patch::CodeHints;
use test_support::firmware;
use test_support::firmware::Firmware;
use test_support::kernels;
use test_support::monitor;
use vmm::events::Events;
use vmm::platform::Platform;
use vmm::platform::Vm;
use vmm::platform::VmKind;
use vmm::platform::emulated::EmulatedPlatform;
use vmm::platform::error::CallError;
use vmm::prepare;
use vmm::prepare::BootFiles;
use vmm::run::outcome::Outcome;
use vmm::spec::Backing;
use vmm::spec::VmSpec;

/// The emulated platform, with RDRAND, which software models of KVM may not offer and an SNP guest must have.
struct WithRdrand(EmulatedPlatform);

impl Platform for WithRdrand {
    fn supported_cpuid(&self) -> Result<Vec<kvm_cpuid_entry2>, CallError> {
        let mut offered = self.0.supported_cpuid()?;
        offered.iter_mut().filter(|leaf| leaf.function == 1).for_each(|leaf| leaf.ecx |= 1 << 30);
        Ok(offered)
    }

    fn snp_cpuid(&self) -> SnpCpuid {
        self.0.snp_cpuid()
    }

    fn policy_rules(&self) -> PolicyRules {
        self.0.policy_rules()
    }

    fn vmsa_features(&self) -> u64 {
        self.0.vmsa_features()
    }

    fn create_vm(&self, kind: VmKind, code: &CodeHints) -> Result<Arc<dyn Vm>, CallError> {
        self.0.create_vm(kind, code)
    }
}

fn platform() -> Option<WithRdrand> {
    monitor::emulated(Backing::Single, None).map(WithRdrand)
}

/// What somebody does to a file, and its name.
type Change = (&'static str, fn(&Path));

/// Names and contents of files.
type Files = Vec<(&'static str, Vec<u8>)>;

const CHANGES: [Change; 4] = [
    ("cut short", |path| File::options().write(true).open(path).unwrap().set_len(1).unwrap()),
    ("overwritten", |path| {
        let len = std::fs::metadata(path).unwrap().len();
        std::fs::write(path, vec![0x5a; len as usize]).unwrap();
    }),
    ("replaced", |path| {
        let other = path.with_extension("new");
        std::fs::write(&other, b"another file").unwrap();
        std::fs::rename(other, path).unwrap();
    }),
    ("removed", |path| std::fs::remove_file(path).unwrap()),
];

/// A firmware file that has nothing but what every one has.
fn ovmf() -> Vec<u8> {
    Firmware {
        pages: 16,
        seed: 1,
        sections: vec![
            (0x80_0000, 0x9000, firmware::SEC_MEM),
            (0x80_d000, 0x1000, firmware::SECRETS),
            (0x80_e000, 0x1000, firmware::CPUID),
        ],
        reset_eip: 0xffff_f000,
        hashes_base: 0,
        svsm_entry: 0,
    }
    .bytes()
}

/// The boots, as JSON in which `@` is the folder, and their files.
fn boots() -> Vec<(&'static str, Files)> {
    let kernel = kernels::small_vmlinux();
    vec![
        (
            r#"{"direct": {"kernel": "@/kernel", "initrd": "@/initrd"}}"#,
            vec![("kernel", kernel), ("initrd", vec![7; 9000])],
        ),
        (r#"{"firmware": {"image": "@/ovmf"}}"#, vec![("ovmf", ovmf())]),
        (
            r#"{"igvm": {"image": "@/igvm"}}"#,
            vec![("igvm", igvm_guest::file(End::PowerOff, Twist::None).unwrap().0)],
        ),
    ]
}

/// Reads the boot's files, has `change` done to them, and puts the guest together.
fn prepared(boot: &str, files: &[(&str, Vec<u8>)], change: Option<fn(&Path)>) -> Option<vmm::prepare::Ready> {
    let folder = tempfile::tempdir().unwrap();
    for (name, bytes) in files {
        std::fs::write(folder.path().join(name), bytes).unwrap();
    }
    let boot = boot.replace('@', folder.path().to_str().unwrap());
    let text = format!(r#"{{"boot": {boot}, "snp": {{"platform": {{"emulated": {{}}}}}}}}"#);
    let spec = VmSpec::parse(&text).unwrap();
    let platform = platform()?;
    let read = BootFiles::read(&spec, &Events::silent()).unwrap();
    if let Some(change) = change {
        files.iter().for_each(|(name, _)| change(&folder.path().join(name)));
    }
    Some(prepare::prepare(&spec, &read, &platform, &Events::silent()).unwrap())
}

fn digest(ready: &vmm::prepare::Ready) -> LaunchDigest {
    ready.guest.snp().unwrap().measured.digest()
}

#[test]
fn what_was_read_is_launched_whatever_becomes_of_the_files() {
    for (boot, files) in boots() {
        let Some(untouched) = prepared(boot, &files, None) else { return };
        for (what, change) in CHANGES {
            let ready = prepared(boot, &files, Some(change)).unwrap();
            assert_eq!(digest(&ready), digest(&untouched), "{boot}: {what}");
        }
    }
}

/// The plan is executed as well, from bytes that are in no file any more.
#[test]
fn a_guest_whose_file_was_cut_short_runs_to_its_end() {
    let (boot, files) = boots().pop().unwrap();
    let Some(ready) = prepared(boot, &files, Some(CHANGES[0].1)) else { return };
    let platform = platform().unwrap();
    assert_eq!(monitor::run(&platform, ready.guest).0, Ok(Outcome::PoweredOff));
}
