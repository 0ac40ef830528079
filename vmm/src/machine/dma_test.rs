// SPDX-License-Identifier: Apache-2.0
//! Devices' accesses against conversions of the same pages, in flight.

use std::os::fd::OwnedFd;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use kvm_bindings::kvm_sev_init;
use proptest::prelude::Rng as _;
use proptest::prelude::RngExt as _;
use proptest::test_runner::RngAlgorithm;
use proptest::test_runner::TestRng;
use snp_model::patch::CodeHints;
use snp_model::rmp::TwoMib;
use vm_memory::Bytes;

use super::*;
use crate::events::Events;
use crate::launch;
use crate::platform::Platform;
use crate::platform::Vm;
use crate::platform::VmKind;
use crate::platform::emulated::Backing;
use crate::platform::emulated::EmulatedOptions;
use crate::platform::emulated::EmulatedPlatform;
use crate::platform::mapping::PAGE;
use crate::platform::scripted::ScriptedVm;

/// Where RAM is: above the first MiB, which has one memory for both sides also with split backing.
const START: u64 = 2 << 20;
const PAGES: u64 = 64;
/// What the guest keeps in its private pages.
const SECRET: u8 = 0x5e;
/// What devices write.
const DEVICE: u8 = 0xde;

struct Bench {
    ram: GuestRam,
    memfds: Vec<Arc<OwnedFd>>,
    conversions: Arc<Conversions>,
    dma: Dma,
}

impl Bench {
    /// All memory of `vm` is private.
    fn on(vm: Arc<dyn Vm>) -> Bench {
        let ram = GuestRam::new([(START, PAGES * PAGE)]).unwrap();
        let memfds = launch::add_memory(vm.as_ref(), &ram, true).unwrap();
        let conversions = Arc::new(Conversions::new(vm, ram.clone(), memfds.clone(), &[]));
        let dma = Dma::new(ram.clone(), Some(Arc::clone(&conversions)));
        let bench = Bench { ram, memfds, conversions, dma };
        bench.conversions.convert(START, PAGES * PAGE, true).unwrap();
        bench
    }

    fn scripted() -> Bench {
        Bench::on(Arc::new(ScriptedVm::default()))
    }

    /// On the emulated platform; `None`: no KVM here.
    fn emulated(backing: Backing, strict: bool) -> Option<Bench> {
        emulated_vm(backing, strict).map(Bench::on)
    }

    fn share(&self, page: u64, pages: u64) {
        self.conversions.convert(START + page * PAGE, pages * PAGE, false).unwrap();
    }

    /// Pages of the shared side that take host memory; whether each is private.
    fn resident(&self) -> Vec<bool> {
        let mapping = &self.ram.regions()[0].mapping;
        let mut found = [0; PAGES as usize];
        let start = mapping.host_address() as *mut libc::c_void;
        // SAFETY: the range is the mapping, and `found` has a byte for each of its pages.
        let result = unsafe { libc::mincore(start, (PAGES * PAGE) as usize, found.as_mut_ptr()) };
        assert_eq!(result, 0);
        let there = (0..).zip(found).filter(|(_, byte)| byte & 1 == 1);
        there.map(|(page, _)| self.is_private(page)).collect()
    }

    fn is_private(&self, page: u64) -> bool {
        self.conversions.state(START + page * PAGE, PAGE) == RangeState::Private
    }

    /// Host memory that the private side takes, in units of 512 bytes.
    fn private_blocks(&self) -> i64 {
        rustix::fs::fstat(&self.memfds[0]).unwrap().st_blocks
    }
}

/// A VM of the emulated platform; `None`: no KVM here.
fn emulated_vm(backing: Backing, strict: bool) -> Option<Arc<dyn Vm>> {
    let folder = tempfile::tempdir().unwrap();
    let keys = folder.path().join("keys.pem");
    let chain = snp_model::chain::Chain::generate_with_rsa_bits(&mut rand_core::OsRng, 2048).unwrap();
    std::fs::write(&keys, chain.to_pem().unwrap()).unwrap();
    let options =
        EmulatedOptions { backing, strict, two_mib: TwoMib::Accept, statistics: false, product: None, keys };
    let platform = match EmulatedPlatform::open(options, &Events::silent()) {
        Ok(platform) => platform,
        Err(e) => {
            assert_ne!(std::env::var("CVMM_TEST_KVM").as_deref(), Ok("host"), "{e}");
            println!("skipped: {e}");
            return None;
        }
    };
    let vm = platform.create_vm(VmKind::Snp, &CodeHints::default()).unwrap();
    let mut init = kvm_sev_init { ghcb_version: 2, ..Default::default() };
    vm.snp_commands().unwrap().sev_init2(&mut init).unwrap();
    Some(vm)
}

fn at(offset: u64) -> GuestAddress {
    GuestAddress(START + offset)
}

#[test]
fn devices_reach_shared_ram_and_nothing_else() {
    let b = Bench::scripted();
    b.share(1, 2);
    b.dma.write_slice(&[1, 2, 3, 4], at(2 * PAGE - 2)).unwrap();
    let mut back = [0; 4];
    b.dma.read_slice(&mut back, at(2 * PAGE - 2)).unwrap();
    assert_eq!(back, [1, 2, 3, 4]);
    assert!(b.dma.check_range(at(PAGE), 2 * PAGE as usize, Permissions::ReadWrite));
    assert_eq!(b.dma.refused(), 0);

    let outside = [at(0), at(3 * PAGE - 2), at(PAGES * PAGE), GuestAddress(0), GuestAddress(u64::MAX - 1)];
    for (i, address) in (1..).zip(outside) {
        assert!(!b.dma.check_range(address, 4, Permissions::Read), "{address:x?}");
        assert!(b.dma.read_slice(&mut back, address).is_err(), "{address:x?}");
        assert!(b.dma.write_slice(&back, address).is_err(), "{address:x?}");
        assert!(b.dma.load::<u32>(address, Ordering::Relaxed).is_err(), "{address:x?}");
        assert!(b.dma.transfer(address.0, 4, Direction::ToGuest).is_err(), "{address:x?}");
        assert_eq!(b.dma.refused(), 4 * i);
    }
}

/// In a plain guest all RAM is shared, and nothing is held.
#[test]
fn a_plain_guest_gives_devices_all_of_its_ram() {
    let ram = GuestRam::new([(0, 0x2000), (0x2000, 0x1000), (0x10000, 0x1000)]).unwrap();
    let dma = Dma::new(ram.clone(), None);
    dma.write_slice(&[1, 2, 3, 4], GuestAddress(0x1ffe)).unwrap();
    let mut back = [0; 4];
    ram.read(0x1ffe, &mut back).unwrap();
    assert_eq!(back, [1, 2, 3, 4]);
    assert!(dma.write_slice(&back, GuestAddress(0x2ffe)).is_err());
}

/// A slice may be split and cloned; the last piece of it lets go of the range.
#[test]
fn a_conversion_waits_for_a_copy_and_for_no_other_page() {
    let b = Bench::scripted();
    b.share(0, 2);
    let slices = b.dma.get_slices(at(0), 16, Permissions::Read).unwrap();
    let slice = slices.stop_on_error().unwrap().next().unwrap();
    let rest = slice.offset(8).unwrap();
    drop(slice);
    // The same device may look at the range again, whoever waits.
    std::thread::scope(|scope| {
        let converter = scope.spawn(|| b.conversions.convert(START, PAGE, true));
        b.conversions.convert(START + PAGE, PAGE, true).unwrap();
        std::thread::sleep(Duration::from_millis(200));
        assert!(!converter.is_finished());
        assert!(b.dma.read_slice(&mut [0; 4], at(4)).is_ok());
        drop(rest);
        converter.join().unwrap().unwrap();
    });
    assert!(b.dma.read_slice(&mut [0; 4], at(4)).is_err());
}

/// A conversion does not wait for a disk. What the disk then writes to the stale side is given back.
#[test]
fn a_transfer_to_a_page_that_became_private_leaves_nothing_behind() {
    let b = Bench::scripted();
    b.share(0, 3);
    let file = tempfile::tempfile().unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &[DEVICE; 3 * PAGE as usize], 0).unwrap();
    let transfer = b.dma.transfer(START, 3 * PAGE, Direction::ToGuest).unwrap();
    b.conversions.convert(START + PAGE, PAGE, true).unwrap();
    assert_eq!(transfer.read_at(&file, 0).unwrap(), 3 * PAGE as usize);
    drop(transfer);
    let mut found = [0; 3];
    for (page, byte) in (0..).zip(&mut found) {
        b.ram.read(START + page * PAGE, std::slice::from_mut(byte)).unwrap();
    }
    assert_eq!(found, [DEVICE, 0, DEVICE]);
    assert_eq!(b.resident().len(), 2 + 1, "the page that was just looked at reads as zeros and may be there");
}

/// A device may still look at a neighbour of the page that has become private.
#[test]
fn the_end_of_a_transfer_waits_for_no_copy() {
    let b = Bench::scripted();
    b.share(0, 2);
    let slices = b.dma.get_slices(at(0), 16, Permissions::Read).unwrap();
    b.conversions.convert(START + PAGE, PAGE, true).unwrap();
    std::thread::scope(|scope| {
        let end = scope.spawn(|| b.conversions.settle(START, 2 * PAGE));
        let deadline = std::time::Instant::now() + Duration::from_secs(5);
        while !end.is_finished() && std::time::Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(1));
        }
        let waited = !end.is_finished();
        drop(slices);
        assert!(!waited);
        end.join().unwrap().unwrap();
    });
}

/// Who cannot close a page half-way may have closed some of it.
#[test]
fn devices_stay_away_from_pages_whose_conversion_failed() {
    let vm = Arc::new(ScriptedVm::default());
    let b = Bench::on(Arc::clone(&vm) as Arc<dyn Vm>);
    b.share(0, 1);
    vm.fail_attributes.store(libc::ENOMEM, Ordering::Relaxed);
    assert!(b.conversions.convert(START, PAGE, true).is_err());
    assert!(b.dma.read_slice(&mut [0; 4], at(0)).is_err());
    assert!(b.conversions.convert(START + PAGE, PAGE, false).is_err());
    assert!(b.dma.read_slice(&mut [0; 4], at(PAGE)).is_err());
}

/// Where both sides are one memory: below 1 MiB on the emulated platform, and with single backing.
#[test]
fn what_is_private_outlives_the_end_of_a_transfer() {
    const LEN: u64 = 2 << 20;
    for backing in [Backing::Split, Backing::Single] {
        let Some(vm) = emulated_vm(backing, false) else { return };
        let ram = GuestRam::new([(0, LEN)]).unwrap();
        let memfds = launch::add_memory(vm.as_ref(), &ram, true).unwrap();
        let conversions = Conversions::new(vm, ram.clone(), memfds.clone(), &[]);
        conversions.convert(0, LEN, true).unwrap();
        let (secret, mut found) = (vec![SECRET; LEN as usize], vec![0; LEN as usize]);
        if backing == Backing::Split {
            rustix::io::pwrite(&memfds[0], &secret, 0).unwrap();
            conversions.settle(0, LEN).unwrap();
            rustix::io::pread(&memfds[0], &mut found, 0).unwrap();
        } else {
            ram.write(0, &secret).unwrap();
            conversions.settle(0, LEN).unwrap();
            ram.read(0, &mut found).unwrap();
        }
        assert!(found == secret, "{backing:?}");
    }
}

/// How many accesses and conversions; the long suite sets more.
fn steps() -> u64 {
    std::env::var("CVMM_DMA_STEPS").map_or(200_000, |steps| steps.parse().unwrap())
}

/// Converts pages at random until `over`, and looks after what is in them as a guest does: private pages hold
/// its secret, which it takes out before it shares them. Returns how often it converted something.
fn convert_at_random(b: &Bench, over: &AtomicBool, keeps_secrets: bool) -> u64 {
    let mut rng = TestRng::deterministic_rng(RngAlgorithm::ChaCha);
    let mut private = [true; PAGES as usize];
    let mut conversions = 0;
    let fill = |page: u64, byte| b.ram.write(START + page * PAGE, &[byte; PAGE as usize]).unwrap();
    if keeps_secrets {
        (0..PAGES).for_each(|page| fill(page, SECRET));
    }
    while !over.load(Ordering::Acquire) {
        let first = rng.random_range(0..PAGES);
        let pages = first..PAGES.min(first + rng.random_range(1..4));
        let to_private = rng.random_range(0..3) == 0;
        for page in pages.clone().filter(|page| keeps_secrets && private[*page as usize]) {
            let mut bytes = [0; PAGE as usize];
            b.ram.read(START + page * PAGE, &mut bytes).unwrap();
            assert!(bytes.iter().all(|byte| *byte == SECRET), "a device wrote to private page {page}");
            if !to_private {
                fill(page, 0);
            }
        }
        let len = (pages.end - pages.start) * PAGE;
        b.conversions.convert(START + first * PAGE, len, to_private).unwrap();
        for page in pages {
            private[page as usize] = to_private;
            if keeps_secrets && to_private {
                fill(page, SECRET);
            } else if to_private {
                rustix::io::pwrite(&b.memfds[0], &[SECRET; PAGE as usize], page * PAGE).unwrap();
            }
        }
        conversions += 1;
    }
    conversions
}

/// Accesses memory as devices do, `steps` times. Returns how many accesses went through.
fn access_at_random(b: &Bench, steps: u64, transfers: bool) -> u64 {
    let mut rng = TestRng::from_seed(RngAlgorithm::ChaCha, &[7; 32]);
    let file = tempfile::tempfile().unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &[DEVICE; 4 * PAGE as usize], 0).unwrap();
    let mut buffer = [0; 2 * PAGE as usize];
    let mut through = 0;
    for _ in 0..steps {
        let offset = u64::from(rng.next_u32()) % (PAGES * PAGE);
        let len = match rng.random_range(0..8) {
            0 => rng.random_range(0..2 * PAGE) as usize,
            _ => rng.random_range(1..32),
        };
        let buffer = &mut buffer[..len];
        let done = match rng.random_range(0..16) {
            0..6 => {
                let done = b.dma.read_slice(buffer, at(offset)).is_ok();
                assert!(!done || !buffer.contains(&SECRET), "a device read a private page at {offset:#x}");
                done
            }
            6..12 => {
                buffer.fill(DEVICE);
                b.dma.write_slice(buffer, at(offset)).is_ok()
            }
            12 | 13 => {
                let word = b.dma.load::<u16>(at(offset & !1), Ordering::Acquire);
                word.is_ok_and(|word| {
                    assert_ne!(word, u16::from_ne_bytes([SECRET; 2]));
                    true
                })
            }
            14 if transfers => {
                let direction =
                    if rng.random_range(0..2) == 0 { Direction::ToGuest } else { Direction::FromGuest };
                b.dma.transfer(START + offset, len as u64, direction).is_ok_and(|transfer| {
                    let result = match direction {
                        Direction::ToGuest => transfer.read_at(&file, 0),
                        Direction::FromGuest => transfer.write_at(&file, 4 * PAGE),
                    };
                    result.inspect_err(|e| assert_eq!(e.raw_os_error(), Some(libc::EFAULT))).is_ok()
                })
            }
            _ => b.dma.store(u32::from_ne_bytes([DEVICE; 4]), at(offset & !3), Ordering::Release).is_ok(),
        };
        through += u64::from(done);
    }
    through
}

/// Sets it when dropped, so that who waits for it ends also if this thread has failed.
struct Over<'a>(&'a AtomicBool);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}

fn collide(b: &Bench, one_memory: bool) {
    let over = AtomicBool::new(false);
    let (through, conversions) = std::thread::scope(|scope| {
        let converter = scope.spawn(|| convert_at_random(b, &over, one_memory));
        let ends = Over(&over);
        let through = access_at_random(b, steps(), !one_memory);
        drop(ends);
        (through, converter.join().unwrap())
    });
    println!("{through} accesses went through, {} were refused, {conversions} conversions", b.dma.refused());
    assert!(through > 0 && b.dma.refused() > 0 && conversions > 0);
    if one_memory {
        return;
    }
    // Looked at before another conversion, which would give everything back.
    let lost = b.resident().into_iter().filter(|private| *private).count();
    assert_eq!(lost, 0, "private pages whose shared side takes memory");
    // A page is eight blocks. The guest has filled what it made private since the beginning.
    let private = (0..PAGES).filter(|page| b.is_private(*page)).count() as i64;
    assert!(b.private_blocks() <= 8 * private, "memory of the private side is lost");
}

/// A load or store of a page that is private would be a signal here.
#[test]
fn strict_no_access_to_a_private_page_and_no_memory_lost() {
    let Some(b) = Bench::emulated(Backing::Split, true) else { return };
    collide(&b, false);
}

/// Without strictness nothing stops a transfer to a page that has become private: what it wrote there must be given back.
#[test]
fn split_no_memory_lost() {
    let Some(b) = Bench::emulated(Backing::Split, false) else { return };
    collide(&b, false);
}

/// Both sides are one memory here, so a device that touched a private page would find or spoil what the guest
/// keeps there.
#[test]
fn single_no_access_to_a_private_page() {
    let Some(b) = Bench::emulated(Backing::Single, false) else { return };
    collide(&b, true);
}

/// What a copy of 16 bytes costs, by `vm-memory` alone, in a plain guest and in an SNP guest: `cargo test --release -p vmm --lib
/// what_a_copy_costs -- --ignored --nocapture`.
#[test]
#[ignore = "measures, and asserts nothing"]
fn what_a_copy_costs() {
    fn nanoseconds(memory: &impl GuestMemory) -> (u128, u128) {
        const TIMES: u128 = 1_000_000;
        let mut buffer = [0; 16];
        let mut measured = |write: bool| {
            let once = || {
                let begun = std::time::Instant::now();
                for i in 0..TIMES as u64 {
                    let address = at(i % 4096 * 16);
                    match write {
                        true => memory.write_slice(&buffer, address).unwrap(),
                        false => memory.read_slice(&mut buffer, address).unwrap(),
                    }
                }
                begun.elapsed().as_nanos()
            };
            std::iter::repeat_with(once).take(7).min().unwrap() / TIMES
        };
        (measured(false), measured(true))
    }
    let b = Bench::scripted();
    b.share(0, PAGES);
    println!("vm-memory: read, write {:?} ns", nanoseconds(b.ram.memory()));
    println!("plain guest: {:?} ns", nanoseconds(&Dma::new(b.ram.clone(), None)));
    println!("SNP guest: {:?} ns", nanoseconds(&b.dma));
}
