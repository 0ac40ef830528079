// SPDX-License-Identifier: Apache-2.0
//! Guests of a few bytes, assembled by hand, as ELF kernels that are entered in 64-bit mode. They use so few instructions that
//! any KVM runs them, even one that is a slow software model.

#![allow(dead_code, reason = "each test program uses its part")]

pub mod held;

use std::io;
use std::io::Write;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::OnceLock;

use snp::digest::Measured;
use snp::image::direct::DirectBoot;
use snp::image::direct::DirectImage;
use snp::image::direct::Guest as ImageGuest;
use snp::image::kernel::Kernel;
use snp::pages::cpuid::CpuidTable;
use snp::plan::LaunchPlan;
use snp::plan::PageType;
use snp::plan::Record;
use snp::vmsa::SEV_FEATURE_SNP_ACTIVE;
use snp_model::rmp::TwoMib;
use vmm::cpuid;
use vmm::launch::LaunchOptions;
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

/// Where the guest's code is loaded and entered.
pub const CODE: u64 = 0x10_0000;
/// The same for SNP guests: in the first MiB, where code that runs without the C-bit finds private memory.
pub const SNP_CODE: u64 = 0x8_0000;
pub const MEMORY: u64 = 128 << 20;
const EFER_SVME: u64 = 1 << 12;
const CR4_MCE: u64 = 1 << 6;

/// What the guest wrote to its console.
#[derive(Clone, Default)]
pub struct Capture(Arc<Mutex<Vec<u8>>>);

impl Capture {
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

pub fn kvm() -> Option<KvmPlatform> {
    let platform = KvmPlatform::open();
    if let Err(e) = &platform {
        println!("skipped: {e}");
    }
    platform.ok()
}

/// An ELF executable with one segment at [`CODE`]; offsets are those of the ELF-64 specification.
pub fn elf(code: &[u8]) -> Vec<u8> {
    let mut file = vec![0; 0x1000];
    file[..8].copy_from_slice(&[0x7f, b'E', b'L', b'F', 2, 1, 1, 0]);
    for (offset, value) in [(16, 2u16), (18, 62), (20, 1), (52, 64), (54, 56), (56, 1)] {
        file[offset..offset + 2].copy_from_slice(&value.to_le_bytes());
    }
    // Entry point and program headers; then the one header: PT_LOAD, RX, file offset, addresses, sizes.
    let len = code.len() as u64;
    for (offset, value) in [
        (24, CODE),
        (32, 64),
        (64, 1 | 5 << 32),
        (72, 0x1000),
        (80, CODE),
        (88, CODE),
        (96, len),
        (104, len),
        (112, 0x1000),
    ] {
        file[offset..offset + 8].copy_from_slice(&value.to_le_bytes());
    }
    file.extend_from_slice(code);
    file
}

/// `ud2`: with no interrupt table, a triple fault.
pub const CRASH: [u8; 2] = [0x0f, 0x0b];

/// `code` as a plain guest with `cpus` vCPUs, and this host's KVM. `None`: there is none.
pub fn plain_guest(code: &[u8], cpus: u32) -> Option<(KvmPlatform, Guest)> {
    let platform = kvm()?;
    let image = image(code, cpus);
    let table = CpuidTable::plain(&cpuid::from_kvm(&platform.supported_cpuid().unwrap()), cpus, None);
    let guest = Guest {
        load: Load::Plain(image.plan),
        board: image.board,
        ram: image.ram.iter().map(|r| (r.start, r.end - r.start)).collect(),
        cpuid: (0..cpus).map(|id| cpuid::to_kvm(&table.for_vcpu(id))).collect(),
    };
    Some((platform, guest))
}

fn image(code: &[u8], vcpus: u32) -> DirectImage {
    let kernel = Kernel::parse(elf(code)).unwrap();
    let guest = ImageGuest::Plain;
    let boot =
        DirectBoot { tpm: None, kernel: &kernel, initrd: None, cmdline: "", memory: MEMORY, vcpus, guest };
    boot.image().unwrap()
}

/// `code` as an SNP guest on the emulated platform, in the form that the platform's patches leave: VMGEXIT is
/// `out 0xe4, al` and a two-byte NOP.
pub fn emulated_guest(code: &[u8], backing: Backing) -> Option<(EmulatedPlatform, Guest)> {
    emulated_guest_with(code, backing, 1)
}

/// The same with `cpus` vCPUs, of which the guest starts all but the first.
pub fn emulated_guest_with(code: &[u8], backing: Backing, cpus: u32) -> Option<(EmulatedPlatform, Guest)> {
    let host = kvm()?;
    let folder = tempfile::tempdir().unwrap();
    let keys = folder.path().join("keys.pem");
    std::fs::write(&keys, self::keys()).unwrap();
    let options = EmulatedOptions {
        backing,
        strict: false,
        two_mib: TwoMib::Accept,
        statistics: false,
        keys,
        product: None,
    };
    let platform = EmulatedPlatform::open(options).unwrap();

    // The registers and tables of a plain boot will do, with what KVM adds to EFER, CR4 and the features for SEV guests
    // (Linux 6.12, `svm_set_efer`, `svm_set_cr4`, `sev_es_sync_vmsa`); the plan is code and tables, each page measured.
    let mut image = image(code, cpus);
    image.plan.vcpus.iter_mut().for_each(|state| {
        state.efer |= EFER_SVME;
        state.cr4 |= CR4_MCE;
        state.sev_features = SEV_FEATURE_SNP_ACTIVE;
        state.rip = SNP_CODE;
    });
    image.plan.records.iter_mut().filter(|r| r.gpa == CODE).for_each(|r| r.gpa = SNP_CODE);
    image.plan.records.sort_by_key(|r| r.gpa);
    let records =
        image.plan.records.into_iter().map(|r| Record { page_type: PageType::Normal, ..r }).collect();
    let table = CpuidTable::plain(&cpuid::from_kvm(&host.supported_cpuid().unwrap()), cpus, None);
    let guest = Guest {
        load: snp(LaunchPlan { records, vcpus: image.plan.vcpus }, LaunchOptions::default()),
        board: image.board,
        ram: image.ram.iter().map(|r| (r.start, r.end - r.start)).collect(),
        cpuid: (0..cpus).map(|id| cpuid::to_kvm(&table.for_vcpu(id))).collect(),
    };
    Some((platform, guest))
}

/// The launch of `plan`.
pub fn snp(plan: LaunchPlan, options: LaunchOptions) -> Load {
    let measured = Measured::of(plan).unwrap();
    Load::Snp(Box::new(SnpLaunch { measured, options, staged: Default::default(), code: Default::default() }))
}

/// Changes what is launched.
pub fn alter(guest: &mut Guest, change: impl FnOnce(&mut LaunchPlan)) {
    let Load::Snp(snp) = &mut guest.load else { panic!("a plain guest") };
    snp.measured = snp.measured.clone().altered(change).unwrap();
}

/// Runs a guest to its end, with a host that has nothing but a console.
pub fn run(platform: &dyn Platform, guest: Guest) -> (Result<Outcome, String>, Vec<u8>) {
    let console = Capture::default();
    let host = Host::new(Box::new(console.clone()));
    let result = monitor::run(platform, guest, host).map_err(|e| e.to_string());
    (result, console.bytes())
}

/// `mov dx, PORT; mov al, VALUE; out dx, al`.
pub fn out(port: u16, value: u8) -> Vec<u8> {
    let [lo, hi] = port.to_le_bytes();
    vec![0x66, 0xba, lo, hi, 0xb0, value, 0xee]
}

/// Switches off: `SLP_EN` with sleep type 5 to PM1a_CNT, as the FADT and `_S5` of this machine say.
pub fn power_off() -> Vec<u8> {
    // mov dx, 0x604; mov ax, 0x3400; out dx, ax
    vec![0x66, 0xba, 0x04, 0x06, 0x66, 0xb8, 0x00, 0x34, 0x66, 0xef]
}

/// Keys for these tests only; RSA keys of full length would take a minute in a debug build.
fn keys() -> &'static str {
    static KEYS: OnceLock<String> = OnceLock::new();
    KEYS.get_or_init(|| {
        let chain = snp_model::chain::Chain::generate_with_rsa_bits(&mut rand_core::OsRng, 2048).unwrap();
        chain.to_pem().unwrap()
    })
}

/// Writes `value` to the GHCB MSR and exits to the hypervisor.
pub fn ghcb_msr(value: u64) -> Vec<u8> {
    let mut code = vec![0xb9, 0x30, 0x01, 0x01, 0xc0, 0xb8]; // mov ecx, 0xc0010130; mov eax, low
    code.extend((value as u32).to_le_bytes());
    code.push(0xba); // mov edx, high
    code.extend(((value >> 32) as u32).to_le_bytes());
    code.extend([0x0f, 0x30, 0xe6, 0xe4, 0x66, 0x90]); // wrmsr; VMGEXIT, patched
    code
}

/// Whether this KVM hands filtered MSRs to the monitor, as Linux does since 5.10 and a software model of it may not. The
/// emulated platform needs that; without it these tests say so and do nothing.
pub fn msrs_reach_the_monitor() -> bool {
    // After reset the GHCB MSR holds the SEV_INFO answer, whose low byte is 1: mov ecx, 0xc0010130; rdmsr; to the console.
    let code = [&[0xb9, 0x30, 0x01, 0x01, 0xc0, 0x0f, 0x32, 0x66, 0xba, 0xf8, 0x03, 0xee][..], &power_off()]
        .concat();
    let guest = emulated_guest(&code, Backing::Single);
    match guest.map(|(platform, guest)| run(&platform, guest)) {
        Some((_, console)) if console == [1] => true,
        Some((Err(e), _)) => panic!("the guest that asks was not launched: {e}"),
        Some((Ok(_), _)) => {
            println!("skipped: this KVM does not hand MSR accesses to the monitor");
            false
        }
        None => false,
    }
}
