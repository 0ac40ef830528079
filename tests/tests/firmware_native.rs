// SPDX-License-Identifier: Apache-2.0
//! Firmware and IGVM files through the monitor on this host's KVM, without Linux and without nesting.
//!
//! The tiny IGVM guest runs to its end. OVMF is launched and not run: some KVMs are software models that hand
//! no MSR access to the monitor, and OVMF begins with one. The launch is what counts here: the emulated
//! firmware computes the digest over what enters the guest, and takes an ID block only for that digest.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails where its host fails")]

use cvmm_tests::igvm_guest;
use cvmm_tests::igvm_guest::End;
use cvmm_tests::igvm_guest::Twist;
use cvmm_tests::workspace::Workspace;
use p384::ecdsa::SigningKey;
use snp::attest::tcb::Product;
use snp::board::Board;
use snp::digest::LaunchDigest;
use snp::identity::IdAuth;
use snp::image::igvm::Facts;
use snp::image::igvm::Igvm;
use snp::image::igvm::ZeroPages;
use snp::image::ovmf::Ovmf;
use snp::image::ovmf::OvmfLaunch;
use snp::image::regions::regions;
use snp::image::vcpu_model;
use snp::image::vmm_type::VcpuSetup;
use snp::image::vmm_type::VmmType;
use snp::pages::cpuid::CpuidTable;
use snp::plan::LaunchPlan;
use snp::plan::PageType;
use test_support::identity::id_block;
use test_support::monitor;
use vmm::cpuid;
use vmm::launch;
use vmm::launch::Assembled;
use vmm::launch::LaunchError;
use vmm::launch::LaunchOptions;
use vmm::launch::Staged;
use vmm::machine::ram::GuestRam;
use vmm::platform::Platform;
use vmm::platform::VmKind;
use vmm::platform::emulated::EmulatedPlatform;
use vmm::run::guest::Guest;
use vmm::run::outcome::Outcome;
use vmm::spec::Backing;

const MEMORY: u64 = 128 << 20;

struct Bench {
    platform: EmulatedPlatform,
    cpuid: CpuidTable,
}

/// `None`, and a word about it, without KVM.
fn bench(vcpus: u32) -> Option<Bench> {
    let platform = monitor::emulated(Backing::Single, Some(Product::Genoa))?;
    let cpuid = monitor::snp_cpuid(&platform, vcpus);
    Some(Bench { platform, cpuid })
}

impl Bench {
    fn page(&self) -> Vec<u8> {
        self.cpuid.page().unwrap().to_vec()
    }

    /// A guest with an ID block for `digest`: the emulated firmware refuses any other launch.
    fn guest(
        &self,
        plan: LaunchPlan,
        ram: &[std::ops::Range<u64>],
        staged: Staged,
        digest: [u8; 48],
    ) -> Guest {
        let block = id_block(LaunchDigest(digest));
        let auth = IdAuth::sign(&block, &SigningKey::random(&mut rand_core::OsRng), None);
        let vcpus = plan.vcpus.len() as u32;
        let options = LaunchOptions { identity: Some((block, auth)), ..LaunchOptions::default() };
        let mut guest = Guest {
            board: Board::new(MEMORY, 1),
            ram: ram.iter().map(|r| (r.start, r.end - r.start)).collect(),
            cpuid: (0..vcpus).map(|id| cpuid::to_kvm(&self.cpuid.for_vcpu(id))).collect(),
            load: monitor::snp(plan, options),
        };
        monitor::launch(&mut guest).staged = staged;
        guest
    }

    /// Launches a guest and does not run it; returns what the emulated firmware measured.
    fn launch(&self, guest: &Guest) -> Result<Option<LaunchDigest>, LaunchError> {
        let vm = self.platform.create_vm(VmKind::Snp, &guest.snp().unwrap().code).unwrap();
        vm.create_irqchip().unwrap();
        let snp = guest.snp().unwrap();
        launch::init_snp(vm.snp().expect("an SNP VM"), snp.measured.plan())?;
        let ram = GuestRam::new(guest.ram.clone()).unwrap();
        launch::add_memory(vm.as_ref(), &ram, true)?;
        let mut vcpus = Vec::new();
        for (id, cpuid) in (0u32..).zip(&guest.cpuid) {
            let mut vcpu = vm.create_vcpu(id).unwrap();
            vcpu.set_cpuid(cpuid).unwrap();
            vcpus.push(vcpu);
        }
        let prepared = Assembled {
            vm: vm.as_ref(),
            measured: &snp.measured,
            staged: &snp.staged,
            ram: &ram,
            vcpus: &mut vcpus,
            cpuid: &guest.cpuid,
        };
        launch::launch_snp(prepared, &snp.options)?;
        Ok(vm.snp().and_then(|commands| commands.measured()))
    }
}

#[test]
fn an_igvm_guest_runs_with_the_digest_of_the_igvm_crate() {
    let Some(bench) = bench(1) else { return };
    let (bytes, digest) = igvm_guest::file(End::PowerOff, Twist::None).unwrap();
    let igvm = Igvm::parse(&bytes.into(), ZeroPages::Normal).unwrap();
    let board = Board::new(MEMORY, 1);
    let ram = board.ram();
    let facts = Facts { board: &board, cmdline: "hello", cpuid: bench.page().into() };
    let loaded = igvm.launch(&facts).unwrap();
    let staged = Staged {
        shared: loaded.shared.iter().map(|r| r.gpa..r.end()).collect(),
        bytes: loaded.shared.into_iter().map(|r| (r.gpa, r.contents)).collect(),
        raced: None,
    };
    let guest = bench.guest(loaded.plan, &ram, staged, digest);
    assert_eq!(bench.launch(&guest).unwrap(), Some(LaunchDigest(digest)));
    let (outcome, console) = monitor::run(&bench.platform, guest);
    assert_eq!(outcome.unwrap(), Outcome::PoweredOff);
    assert_eq!(String::from_utf8_lossy(&console), igvm_guest::CONSOLE);
}

#[test]
fn debians_ovmf_launches_with_the_published_digests() {
    // docs/measurement.md; sev-snp-measure and the sev crate agree. 1 vCPU, EPYC-v4, features 0x1.
    let published = [
        (
            "OVMF/OVMF_CODE.fd",
            "a479327cbb0b50e876024c2dac7412d4e5e95c7315c1f8b0446f6d3be69fefba50766285475926737e4a70b155252f88",
        ),
        (
            "ovmf/OVMF.fd",
            "11570979c77a0adb515761a702527c8b9e11554e730552621d950988613a3a75c6ff1703f540bd22a9beede8fe7a97e3",
        ),
    ];
    let share = std::env::var_os("CVMM_DEBIAN_OVMF")
        .map_or_else(|| Workspace::find().work().join("ovmf/usr/share"), Into::into);
    for (name, hex) in published {
        let Some(bench) = bench(1) else { return };
        let Ok(file) = std::fs::read(share.join(name)) else {
            println!("SKIPPED: {} is missing; `cargo xtask setup` fetches it", share.join(name).display());
            return;
        };
        let ovmf = Ovmf::parse(file.into()).unwrap();
        let setup = VcpuSetup { signature: vcpu_model::parse("EPYC-v4").unwrap(), sev_features: 1 };
        let launch = OvmfLaunch { vmm: VmmType::Cvmm, vcpus: 1, setup, kernel: None };
        let mut plan = ovmf.plan(&launch).unwrap();
        for record in plan.records.iter_mut().filter(|r| r.page_type == PageType::Cpuid) {
            record.contents = bench.page().into();
        }
        let ram = regions(&Board::new(MEMORY, 1), plan.records.iter(), 1 << 35).unwrap();
        assert_eq!(ram.last(), Some(&(ovmf.gpa()..4 << 30)), "the firmware has a region of its own");
        let digest = cvmm_tests::digest::unhex(hex).unwrap().try_into().unwrap();
        let guest = bench.guest(plan.clone(), &ram, Staged::default(), digest);
        assert_eq!(bench.launch(&guest).unwrap(), Some(LaunchDigest(digest)), "{name}");
        // Any other digest is refused before the launch.
        let error = bench.launch(&bench.guest(plan, &ram, Staged::default(), [1; 48])).unwrap_err();
        assert!(error.to_string().contains("BAD_MEASUREMENT"), "{name}: {error}");
    }
}
