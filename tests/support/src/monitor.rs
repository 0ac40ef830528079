// SPDX-License-Identifier: Apache-2.0
//! The monitor on the emulated platform: a platform with keys of its own, launches, runs, and what a guest
//! said.

use std::error::Error;
use std::io;
use std::io::Write;
use std::sync::Arc;
use std::sync::Mutex;

use snp::attest::tcb::Product;
use snp::digest::Measured;
use snp::pages::cpuid::CpuidTable;
use snp::plan::LaunchPlan;
use snp_model::rmp::TwoMib;
use vmm::cpuid;
use vmm::events::Events;
use vmm::launch::LaunchOptions;
use vmm::machine::Machine;
use vmm::machine::companion::Companion;
use vmm::platform::Platform;
use vmm::platform::emulated::EmulatedOptions;
use vmm::platform::emulated::EmulatedPlatform;
use vmm::platform::kvm::KvmPlatform;
use vmm::run::guest::Guest;
use vmm::run::guest::Host;
use vmm::run::guest::Load;
use vmm::run::guest::SnpLaunch;
use vmm::run::monitor;
use vmm::run::outcome::Outcome;
use vmm::spec::Backing;

use crate::keys;

/// What the guest wrote to its console.
#[derive(Clone, Default)]
pub struct Capture(Arc<Mutex<Vec<u8>>>);

impl Capture {
    /// All of it so far.
    pub fn bytes(&self) -> Vec<u8> {
        self.0.lock().unwrap().clone()
    }
}

impl Write for Capture {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(buf);
        Ok(buf.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A companion that calls a function with the number of each life, before it begins.
pub struct BeforeLife<F>(pub F);

impl<F: FnMut(u32) -> Result<(), Box<dyn Error + Send + Sync>>> Companion for BeforeLife<F> {
    fn name(&self) -> &'static str {
        "observer"
    }

    fn attach(&mut self, life: u32, _: &Machine) -> Result<(), Box<dyn Error + Send + Sync>> {
        self.0(life)
    }
}

/// This host's KVM. `None`, and a word about it, where there is none.
pub fn kvm() -> Option<KvmPlatform> {
    let platform = KvmPlatform::open();
    if let Err(e) = &platform {
        println!("skipped: {e}");
    }
    platform.ok()
}

/// The emulated platform on this host's KVM. `None`, and a word about it, where there is none.
pub fn emulated(backing: Backing, product: Option<Product>) -> Option<EmulatedPlatform> {
    kvm()?;
    let folder = tempfile::tempdir().unwrap();
    let keys = keys::written(folder.path());
    let two_mib = TwoMib::Accept;
    let options = EmulatedOptions { backing, strict: false, two_mib, statistics: false, keys, product };
    Some(EmulatedPlatform::open(options, &Events::silent()).unwrap())
}

/// The CPUID table of an SNP guest with `vcpus` vCPUs.
pub fn snp_cpuid(platform: &EmulatedPlatform, vcpus: u32) -> CpuidTable {
    let mut offered = cpuid::from_kvm(&platform.supported_cpuid().unwrap());
    // RDRAND, which an SNP guest needs and no guest here uses; a KVM that is a software model may not have
    // it.
    offered.iter_mut().filter(|e| e.function == 1).for_each(|e| e.ecx |= 1 << 30);
    CpuidTable::snp(&offered, vcpus, &platform.snp_cpuid()).unwrap()
}

/// The launch of `plan`.
pub fn snp(plan: LaunchPlan, options: LaunchOptions) -> Load {
    let measured = Measured::of(plan).unwrap();
    Load::Snp(Box::new(SnpLaunch { measured, options, staged: Default::default(), code: Default::default() }))
}

/// The launch of an SNP guest.
pub fn launch(guest: &mut Guest) -> &mut SnpLaunch {
    let Load::Snp(snp) = &mut guest.load else { panic!("a plain guest") };
    snp
}

/// Changes what is launched.
pub fn alter(guest: &mut Guest, change: impl FnOnce(&mut LaunchPlan)) {
    let launch = launch(guest);
    launch.measured = launch.measured.clone().altered(change).unwrap();
}

/// Runs a guest to its end, with a host that has nothing but a console.
pub fn run(platform: &dyn Platform, guest: Guest) -> (Result<Outcome, String>, Vec<u8>) {
    let console = Capture::default();
    let host = Host::new(Box::new(console.clone()));
    let result = monitor::run(platform, guest, host).map_err(|e| e.to_string());
    (result, console.bytes())
}
