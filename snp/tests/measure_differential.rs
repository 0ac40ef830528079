// SPDX-License-Identifier: Apache-2.0
//! Digests of firmware launches against two tools written by others: `sev-snp-measure` (Python) and the `sev`
//! crate.
//!
//! Both are asked about the same random files. Where they disagree with each other the reason is in the
//! test's name and in `docs/measurement.md`.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

mod support;

use std::path::Path;
use std::path::PathBuf;

use proptest::prelude::*;
use proptest::test_runner::Config;
use proptest::test_runner::TestRunner;
use sev::measurement::snp::SnpMeasurementArgs;
use sev::measurement::snp::snp_calc_launch_digest;
use sev::measurement::vcpu_types::CpuType;
use sev::measurement::vmsa::GuestFeatures;
use sev::measurement::vmsa::VMMType;
use snp::digest::launch_digest;
use snp::digest::trace;
use snp::image::ovmf::Ovmf;
use snp::image::ovmf::OvmfLaunch;
use snp::image::ovmf::Svsm;
use snp::image::vcpu_model;
use snp::image::vmm_type::VcpuSetup;
use snp::image::vmm_type::VmmType;
use snp::pages::hashes::KernelHashes;
use snp::plan::Bytes;
use support::firmware::any_firmware;
use support::python::SevSnpMeasure;
use test_support::firmware::Firmware;

/// Models whose names `sev-snp-measure` knows.
const MODELS: [&str; 16] = [
    "EPYC",
    "EPYC-v1",
    "EPYC-v2",
    "EPYC-IBPB",
    "EPYC-v3",
    "EPYC-v4",
    "EPYC-Rome",
    "EPYC-Rome-v1",
    "EPYC-Rome-v2",
    "EPYC-Rome-v3",
    "EPYC-Milan",
    "EPYC-Milan-v1",
    "EPYC-Milan-v2",
    "EPYC-Genoa",
    "EPYC-Genoa-v1",
    "EPYC-Turin",
];

#[derive(Clone, Debug)]
struct Case {
    firmware: Firmware,
    kernel: Option<(Vec<u8>, Vec<u8>, String)>,
    vcpus: u32,
    model: &'static str,
    features: u64,
}

fn any_case() -> impl Strategy<Value = Case> {
    let blob = || proptest::collection::vec(any::<u8>(), 0..3000);
    // No white space at the ends: the `sev` crate cuts it off, which QEMU does not.
    let kernel = (blob(), blob(), "([!-~][ -~]{0,80}[!-~])?");
    (
        any_firmware(),
        proptest::option::of(kernel),
        1u32..=255,
        proptest::sample::select(&MODELS[..]),
        prop_oneof![Just(1u64), Just(0x21), any::<u64>().prop_map(|x| x & 0xc3ff | 1)],
    )
        .prop_map(|(firmware, kernel, vcpus, model, features)| {
            let hashes = firmware.sections.iter().any(|s| s.2 == test_support::firmware::KERNEL_HASHES);
            Case { firmware, kernel: kernel.filter(|_| hashes), vcpus, model, features }
        })
}

/// A case's files on disk, for oracles that want paths.
struct Files {
    dir: tempfile::TempDir,
    case: Case,
}

impl Files {
    fn new(case: Case) -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("ovmf"), case.firmware.bytes()).unwrap();
        if let Some((kernel, initrd, _)) = &case.kernel {
            std::fs::write(dir.path().join("kernel"), kernel).unwrap();
            std::fs::write(dir.path().join("initrd"), initrd).unwrap();
        }
        Files { dir, case }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn ours(&self, vmm: VmmType) -> String {
        let setup = VcpuSetup {
            signature: vcpu_model::parse(self.case.model).unwrap(),
            sev_features: self.case.features,
        };
        let kernel = self.case.kernel.as_ref();
        let kernel = kernel.map(|(k, i, c)| KernelHashes::of(k, i, c.as_bytes()));
        let launch = OvmfLaunch { vmm, vcpus: self.case.vcpus, setup, kernel: kernel.as_ref() };
        let ovmf = Ovmf::parse(Bytes::from(self.case.firmware.bytes())).unwrap();
        launch_digest(&ovmf.plan(&launch).unwrap()).unwrap().to_string()
    }

    fn python(&self, oracle: &mut SevSnpMeasure, vmm: VmmType) -> String {
        let mut fields = vec![
            ("ovmf", self.path("ovmf").display().to_string()),
            ("vcpus", self.case.vcpus.to_string()),
            ("cpu", self.case.model.to_string()),
            ("features", self.case.features.to_string()),
            ("vmm", vmm.to_string()),
        ];
        if let Some((_, _, cmdline)) = &self.case.kernel {
            fields.push(("kernel", self.path("kernel").display().to_string()));
            fields.push(("initrd", self.path("initrd").display().to_string()));
            fields.push(("append", cmdline.clone()));
        }
        oracle.measure(&fields).unwrap()
    }

    fn sev_crate(&self, vmm: VMMType) -> String {
        let kernel = self.case.kernel.as_ref();
        let digest = snp_calc_launch_digest(SnpMeasurementArgs {
            vcpus: self.case.vcpus,
            vcpu_type: CpuType::try_from(self.case.model).unwrap(),
            ovmf_file: self.path("ovmf"),
            guest_features: GuestFeatures(self.case.features),
            kernel_file: kernel.map(|_| self.path("kernel")),
            initrd_file: kernel.map(|_| self.path("initrd")),
            append: kernel.map(|(_, _, cmdline)| cmdline.as_str()),
            ovmf_hash_str: None,
            vmm_type: Some(vmm),
        });
        digest.unwrap().get_hex_ld()
    }
}

fn run(cases: u32, mut check: impl FnMut(Case)) {
    let config = Config { cases, failure_persistence: None, ..Config::default() };
    let check = std::cell::RefCell::new(&mut check);
    TestRunner::new(config)
        .run(&any_case(), |case| {
            (*check.borrow_mut())(case);
            Ok(())
        })
        .unwrap();
}

#[test]
fn qemu_ec2_and_gce_launches_agree_with_sev_snp_measure() {
    let Some(mut oracle) = SevSnpMeasure::start() else { return };
    run(160, |case| {
        let files = Files::new(case);
        for vmm in [VmmType::Qemu, VmmType::Ec2, VmmType::Gce] {
            assert_eq!(files.ours(vmm), files.python(&mut oracle, vmm), "{vmm} {:?}", files.case);
        }
        assert_eq!(files.ours(VmmType::Cvmm), files.ours(VmmType::Qemu));
    });
}

#[test]
fn qemu_and_krun_launches_agree_with_the_sev_crate() {
    run(160, |case| {
        let files = Files::new(case);
        assert_eq!(files.ours(VmmType::Qemu), files.sev_crate(VMMType::QEMU), "{:?}", files.case);
        assert_eq!(files.ours(VmmType::Krun), files.sev_crate(VMMType::KRUN), "{:?}", files.case);
    });
}

/// The `sev` crate clears RDX for EC2 where `sev-snp-measure` 0.0.13 has 0x600. With RDX cleared we agree
/// with the former.
#[test]
fn on_ec2_the_two_oracles_differ_in_rdx_alone() {
    run(40, |case| {
        let files = Files::new(case);
        let setup = VcpuSetup { signature: 0, sev_features: files.case.features };
        let kernel = files.case.kernel.as_ref().map(|(k, i, c)| KernelHashes::of(k, i, c.as_bytes()));
        let launch =
            OvmfLaunch { vmm: VmmType::Ec2, vcpus: files.case.vcpus, setup, kernel: kernel.as_ref() };
        let ovmf = Ovmf::parse(Bytes::from(files.case.firmware.bytes())).unwrap();
        let mut plan = ovmf.plan(&launch).unwrap();
        assert_ne!(launch_digest(&plan).unwrap().to_string(), files.sev_crate(VMMType::EC2));
        plan.vcpus.iter_mut().for_each(|vcpu| vcpu.rdx = 0);
        assert_eq!(launch_digest(&plan).unwrap().to_string(), files.sev_crate(VMMType::EC2));
    });
}

#[test]
fn svsm_launches_agree_with_sev_snp_measure() {
    let Some(mut oracle) = SevSnpMeasure::start() else { return };
    run(60, |case| {
        let dir = tempfile::tempdir().unwrap();
        let svsm = Firmware { seed: !case.firmware.seed, ..case.firmware.clone() };
        // The firmware above the SVSM needs a table too; its sections do not count.
        let ovmf = Firmware { pages: 3, sections: vec![(0x1000, 0x1000, 1)], ..case.firmware };
        std::fs::write(dir.path().join("svsm"), svsm.bytes()).unwrap();
        std::fs::write(dir.path().join("ovmf"), ovmf.bytes()).unwrap();
        let vars = u64::from(case.vcpus) * 0x1000;
        let path = |name: &str| dir.path().join(name).display().to_string();
        let expected = oracle.measure(&[
            ("ovmf", path("ovmf")),
            ("svsm", path("svsm")),
            ("vars", vars.to_string()),
            ("vcpus", case.vcpus.to_string()),
            ("cpu", case.model.to_string()),
            ("features", "1".into()),
            ("vmm", "qemu".into()),
        ]);
        let ovmf = Ovmf::parse(Bytes::from(ovmf.bytes())).unwrap();
        let svsm = Svsm::parse(&ovmf, Bytes::from(svsm.bytes()), vars).unwrap();
        let setup = VcpuSetup { signature: vcpu_model::parse(case.model).unwrap(), sev_features: 1 };
        let plan = svsm.plan(case.vcpus, setup).unwrap();
        assert_eq!(launch_digest(&plan).unwrap().to_string(), expected.unwrap());
    });
}

#[test]
fn one_pass_gives_the_digest_of_every_vcpu_count() {
    let Some(mut oracle) = SevSnpMeasure::start() else { return };
    let firmware = Firmware {
        pages: 5,
        seed: 7,
        sections: vec![(0x80_0000, 0x1000, 1), (0x80_1000, 0x1000, 2), (0x80_2000, 0x1000, 3)],
        reset_eip: 0x80_b004,
        hashes_base: 0,
        svsm_entry: 0,
    };
    let case = Case { firmware, kernel: None, vcpus: 255, model: "EPYC-Turin", features: 1 };
    let mut files = Files::new(case);
    let setup = VcpuSetup { signature: vcpu_model::parse("EPYC-Turin").unwrap(), sev_features: 1 };
    let ovmf = Ovmf::parse(Bytes::from(files.case.firmware.bytes())).unwrap();
    let launch = OvmfLaunch { vmm: VmmType::Qemu, vcpus: 255, setup, kernel: None };
    let digests = trace(&ovmf.plan(&launch).unwrap()).unwrap().vcpus;
    for vcpus in 1..=255 {
        files.case.vcpus = vcpus;
        let expected = files.python(&mut oracle, VmmType::Qemu);
        assert_eq!(digests[vcpus as usize - 1].to_string(), expected, "{vcpus} vCPUs");
    }
}

/// Debian's firmware package, unpacked by the test setup; digests as published in `docs/measurement.md`,
/// which two other tools computed.
#[test]
fn debian_firmware_has_the_published_digests() {
    let dir = match std::env::var_os("CVMM_DEBIAN_OVMF") {
        Some(dir) => PathBuf::from(dir),
        None => Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/cvmm/ovmf/usr/share/OVMF"),
    };
    if !dir.exists() {
        eprintln!("SKIPPED: Debian's ovmf package is not unpacked at {}", dir.display());
        return;
    }
    let measure = |name: &str| {
        let ovmf = Ovmf::parse(Bytes::from(std::fs::read(dir.join(name)).unwrap()));
        let setup = VcpuSetup { signature: vcpu_model::parse("EPYC-v4").unwrap(), sev_features: 1 };
        let launch = OvmfLaunch { vmm: VmmType::Qemu, vcpus: 1, setup, kernel: None };
        ovmf.map(|ovmf| launch_digest(&ovmf.plan(&launch).unwrap()).unwrap().to_string())
    };
    assert_eq!(
        measure("OVMF_CODE.fd").unwrap(),
        "a479327cbb0b50e876024c2dac7412d4e5e95c7315c1f8b0446f6d3be69fefba50766285475926737e4a70b155252f88"
    );
    assert_eq!(
        measure("../ovmf/OVMF.fd").unwrap(),
        "11570979c77a0adb515761a702527c8b9e11554e730552621d950988613a3a75c6ff1703f540bd22a9beede8fe7a97e3"
    );
    let refused = measure("OVMF_CODE_4M.fd").unwrap_err().to_string();
    assert!(refused.contains("no SEV metadata"), "{refused}");
}
