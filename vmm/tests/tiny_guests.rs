// SPDX-License-Identifier: Apache-2.0
//! Guests of a few bytes on this host's KVM: every kind of exit, every way to end, in milliseconds.
//!
//! The guests are assembled by hand, as ELF kernels that are entered in 64-bit mode. They use so few instructions that any KVM
//! runs them, even one that is a slow software model. Without `/dev/kvm` the tests say so and do nothing.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails where its host fails")]

use std::io;
use std::io::Write;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::OnceLock;

use snp::image::direct::DirectBoot;
use snp::image::direct::Guest as ImageGuest;
use snp::image::kernel::Kernel;
use snp::model::rmp::TwoMib;
use snp::pages::cpuid::CpuidTable;
use snp::plan::LaunchPlan;
use snp::plan::PageType;
use snp::plan::Record;
use vmm::cpuid;
use vmm::launch::LaunchOptions;
use vmm::monitor;
use vmm::monitor::Guest;
use vmm::outcome::Outcome;
use vmm::platform::Platform;
use vmm::platform::emulated::Backing;
use vmm::platform::emulated::EmulatedOptions;
use vmm::platform::emulated::EmulatedPlatform;
use vmm::platform::kvm::KvmPlatform;

/// Where the guest's code is loaded and entered.
const CODE: u64 = 0x10_0000;
const MEMORY: u64 = 128 << 20;

/// What the guest wrote to its console.
#[derive(Clone, Default)]
struct Capture(Arc<Mutex<Vec<u8>>>);

impl Write for Capture {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(buf);
        Ok(buf.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn kvm() -> Option<KvmPlatform> {
    let platform = KvmPlatform::open();
    if let Err(e) = &platform {
        println!("skipped: {e}");
    }
    platform.ok()
}

/// An ELF executable with one segment at [`CODE`]; offsets are those of the ELF-64 specification.
fn elf(code: &[u8]) -> Vec<u8> {
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
const CRASH: [u8; 2] = [0x0f, 0x0b];

/// Runs `code` as a plain guest with `cpus` vCPUs.
fn run_plain(code: &[u8], cpus: u32) -> Option<(Result<Outcome, String>, Vec<u8>)> {
    let platform = kvm()?;
    let kernel = Kernel::parse(elf(code)).unwrap();
    let boot = DirectBoot {
        tpm: None,
        kernel: &kernel,
        initrd: None,
        cmdline: "",
        memory: MEMORY,
        vcpus: cpus,
        guest: ImageGuest::Plain,
    };
    let image = boot.image().unwrap();
    let table = CpuidTable::plain(&cpuid::from_kvm(&platform.supported_cpuid().unwrap()), cpus);
    let guest = Guest {
        plan: image.plan,
        ram: image.ram.iter().map(|r| (r.start, r.end - r.start)).collect(),
        cpuid: (0..cpus).map(|id| cpuid::to_kvm(&table.for_vcpu(id))).collect(),
        snp: None,
        staged: Default::default(),
    };
    Some(run(&platform, guest))
}

fn run(platform: &dyn Platform, guest: Guest) -> (Result<Outcome, String>, Vec<u8>) {
    let console = Capture::default();
    let result = monitor::run(platform, guest, Box::new(console.clone()), false).map_err(|e| e.to_string());
    let written = console.0.lock().unwrap().clone();
    (result, written)
}

/// `mov dx, PORT; mov al, VALUE; out dx, al`.
fn out(port: u16, value: u8) -> Vec<u8> {
    let [lo, hi] = port.to_le_bytes();
    vec![0x66, 0xba, lo, hi, 0xb0, value, 0xee]
}

/// Switches off: `SLP_EN` with sleep type 5 to PM1a_CNT, as the FADT and `_S5` of this machine say.
fn power_off() -> Vec<u8> {
    // mov dx, 0x604; mov ax, 0x3400; out dx, ax
    vec![0x66, 0xba, 0x04, 0x06, 0x66, 0xb8, 0x00, 0x34, 0x66, 0xef]
}

#[test]
fn a_guest_writes_to_its_console_and_switches_itself_off() {
    let code = [out(0x3f8, b'h'), out(0x3f8, b'i'), power_off()].concat();
    let Some((outcome, console)) = run_plain(&code, 1) else { return };
    assert_eq!(outcome, Ok(Outcome::PoweredOff));
    assert_eq!(console, b"hi");
}

#[test]
fn vcpus_that_never_start_do_not_keep_a_guest_alive() {
    let Some((outcome, _)) = run_plain(&power_off(), 4) else { return };
    assert_eq!(outcome, Ok(Outcome::PoweredOff));
}

#[test]
fn a_port_without_a_device_reads_as_ones() {
    // mov dx, 0x9999; in al, dx; mov dx, 0x3f8; out dx, al
    let code = [&[0x66, 0xba, 0x99, 0x99, 0xec, 0x66, 0xba, 0xf8, 0x03, 0xee][..], &power_off()].concat();
    let Some((outcome, console)) = run_plain(&code, 1) else { return };
    assert_eq!(outcome, Ok(Outcome::PoweredOff));
    assert_eq!(console, [0xff]);
}

#[test]
fn device_memory_without_a_device_reads_as_ones_and_takes_writes() {
    // mov ebx, 0xd0000000; mov [rbx], al; mov al, [rbx]; mov dx, 0x3f8; out dx, al
    let code =
        [&[0xbb, 0, 0, 0, 0xd0, 0x88, 0x03, 0x8a, 0x03, 0x66, 0xba, 0xf8, 0x03, 0xee][..], &power_off()]
            .concat();
    let Some((outcome, console)) = run_plain(&code, 1) else { return };
    assert_eq!(outcome, Ok(Outcome::PoweredOff));
    assert_eq!(console, [0xff]);
}

#[test]
fn both_reset_registers_reset() {
    for (port, value) in [(0x64, 0xfe), (0xcf9, 0x06)] {
        let Some((outcome, _)) = run_plain(&out(port, value), 1) else { return };
        assert_eq!(outcome, Ok(Outcome::Rebooted), "port {port:#x}");
    }
}

#[test]
fn a_triple_fault_is_a_crash() {
    let Some((outcome, _)) = run_plain(&CRASH, 1) else { return };
    assert_eq!(outcome, Ok(Outcome::Crashed { vcpu: 0 }));
}

/// Whether this KVM hands filtered MSRs to the monitor, as Linux does since 5.10 and a software model of it may not. The
/// emulated platform needs that; without it these tests say so and do nothing.
fn msrs_reach_the_monitor() -> bool {
    // After reset the GHCB MSR holds the SEV_INFO answer, whose low byte is 1: mov ecx, 0xc0010130; rdmsr; to the console.
    let code = [&[0xb9, 0x30, 0x01, 0x01, 0xc0, 0x0f, 0x32, 0x66, 0xba, 0xf8, 0x03, 0xee][..], &power_off()]
        .concat();
    match emulated(&code) {
        Some((_, console)) if console == [1] => true,
        Some(_) => {
            println!("skipped: this KVM does not hand MSR accesses to the monitor");
            false
        }
        None => false,
    }
}

fn run_emulated(code: &[u8]) -> Option<(Result<Outcome, String>, Vec<u8>)> {
    if msrs_reach_the_monitor() { emulated(&[code, &CRASH].concat()) } else { None }
}

/// Keys for these tests only; RSA keys of full length would take a minute in a debug build.
fn keys() -> &'static str {
    static KEYS: OnceLock<String> = OnceLock::new();
    KEYS.get_or_init(|| {
        let chain = snp::model::chain::Chain::generate_with_rsa_bits(&mut rand_core::OsRng, 2048).unwrap();
        chain.to_pem().unwrap()
    })
}

/// Runs `code` as an SNP guest on the emulated platform, in the form that the platform's patches leave: VMGEXIT is
/// `out 0xe4, al` and a two-byte NOP.
fn emulated(code: &[u8]) -> Option<(Result<Outcome, String>, Vec<u8>)> {
    let host = kvm()?;
    let folder = tempfile::tempdir().unwrap();
    let keys = folder.path().join("keys.pem");
    std::fs::write(&keys, self::keys()).unwrap();
    let options = EmulatedOptions { backing: Backing::Single, strict: false, two_mib: TwoMib::Accept, keys };
    let platform = EmulatedPlatform::open(options).unwrap();

    // The registers and tables of a plain boot will do; the plan is code and tables, each page measured.
    let kernel = Kernel::parse(elf(code)).unwrap();
    let boot = DirectBoot {
        tpm: None,
        kernel: &kernel,
        initrd: None,
        cmdline: "",
        memory: MEMORY,
        vcpus: 1,
        guest: ImageGuest::Plain,
    };
    let image = boot.image().unwrap();
    let records =
        image.plan.records.into_iter().map(|r| Record { page_type: PageType::Normal, ..r }).collect();
    let table = CpuidTable::plain(&cpuid::from_kvm(&host.supported_cpuid().unwrap()), 1);
    let guest = Guest {
        plan: LaunchPlan { records, vcpus: image.plan.vcpus },
        ram: image.ram.iter().map(|r| (r.start, r.end - r.start)).collect(),
        cpuid: vec![cpuid::to_kvm(&table.for_vcpu(0))],
        snp: Some(LaunchOptions::default()),
        staged: Default::default(),
    };
    Some(run(&platform, guest))
}

/// Writes `value` to the GHCB MSR and exits to the hypervisor.
fn ghcb_msr(value: u64) -> Vec<u8> {
    let mut code = vec![0xb9, 0x30, 0x01, 0x01, 0xc0, 0xb8]; // mov ecx, 0xc0010130; mov eax, low
    code.extend((value as u32).to_le_bytes());
    code.push(0xba); // mov edx, high
    code.extend(((value >> 32) as u32).to_le_bytes());
    code.extend([0x0f, 0x30, 0xe6, 0xe4, 0x66, 0x90]); // wrmsr; VMGEXIT, patched
    code
}

#[test]
fn a_guests_termination_is_told_in_words() {
    // GHCB specification, 2.3.1: 0x100, reason set in bits 15:12, code in 23:16.
    let Some((outcome, _)) = run_emulated(&ghcb_msr(0x04_1100)) else { return };
    let outcome = outcome.unwrap();
    assert!(matches!(outcome, Outcome::Terminated(_)), "{outcome:?}");
    assert_eq!(outcome.exit_code(), 4);
    assert!(outcome.to_string().contains("CPUID page"), "{outcome}");
}

#[test]
fn the_sev_info_answer_carries_versions_and_c_bit() {
    // Ask; then send the answer's bits 23:16 of the upper half (highest version) and the C-bit to the console.
    let code = [
        ghcb_msr(2),
        vec![0x0f, 0x32, 0xc1, 0xe8, 0x18], // rdmsr; shr eax, 24: the C-bit
        vec![0x89, 0xd3, 0x66, 0xba, 0xf8, 0x03, 0xee], // mov ebx, edx; to the console
        vec![0x89, 0xd8, 0xc1, 0xe8, 0x10, 0xee], // mov eax, ebx; shr eax, 16: the highest version
        vec![0x88, 0xd8, 0xee],             // mov al, bl: the lowest version
        power_off(),
    ]
    .concat();
    let Some((outcome, console)) = run_emulated(&code) else { return };
    assert_eq!(outcome, Ok(Outcome::PoweredOff));
    // Linux 6.12's KVM offers versions 1 to 2.
    assert_eq!(console.get(1..), Some(&[2, 1][..]));
    assert!((35..=46).contains(&console[0]), "{console:?}");
}

#[test]
fn a_ghcb_that_was_not_registered_ends_the_run() {
    let Some((outcome, _)) = run_emulated(&ghcb_msr(0x20_0000)) else { return };
    // The page is private, so KVM could not map it: it resumes the guest, which then crashes.
    assert_eq!(outcome, Ok(Outcome::Crashed { vcpu: 0 }));
    // Made shared first (MSR protocol, operation 2), it is readable, but not the guest's GHCB.
    let code = [ghcb_msr(2 << 52 | 0x20_0000 | 0x14), ghcb_msr(0x20_0000)].concat();
    let Some((outcome, _)) = run_emulated(&code) else { return };
    assert!(outcome.as_ref().is_err_and(|e| e.contains("GHCB that it had not registered")), "{outcome:?}");
}
