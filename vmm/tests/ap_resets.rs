// SPDX-License-Identifier: Apache-2.0
//! SNP guests whose vCPUs create, destroy and restart each other, reset again and again: no vCPU is left, no
//! thread, no descriptor, and memory stays where it was.
//!
//! The guest is a few instructions. Its first vCPU shares a GHCB page for each vCPU and makes a page of the
//! launch a save area for each. Then each vCPU, as soon as somebody has started it, destroys and creates one
//! after the other, itself included; the first is created again only and never destroyed, so that somebody
//! always runs. Whoever finds that every one of them has run, and that they have been through enough
//! together, asks for a reset. `CVMM_AP_RESETS` says how many resets there are. Without a KVM that hands MSRs
//! to the monitor the test says so and does nothing.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails where its host fails")]

use std::sync::Arc;
use std::sync::Mutex;
use std::time::Duration;
use std::time::Instant;

use snp::plan::PageType;
use snp::plan::Record;
use test_support::code::PATCHED_VMGEXIT;
use test_support::code::WRITE_GHCB_MSR;
use test_support::code::out;
use test_support::held::Held;
use test_support::held::held;
use test_support::monitor::BeforeLife;
use test_support::monitor::Capture;
use test_support::monitor::alter;
use test_support::tiny::SNP_CODE;
use test_support::tiny::emulated_guest_with;
use test_support::tiny::msrs_reach_the_monitor;
use vmm::run::guest::Host;
use vmm::run::guest::Restart;
use vmm::run::monitor;
use vmm::run::outcome::Outcome;
use vmm::spec::Backing;

/// Save areas of the vCPUs, private; one after the other.
const VMSA: u32 = 0x30_1000;
/// Their GHCB pages, shared; behind the last of them a page with the counter and, behind that, a bit for each
/// vCPU that has run.
const GHCB: u32 = 32 << 20;
/// Rounds of all vCPUs together in one life, for each vCPU.
const ROUNDS: u32 = 12;
/// Turns of a short loop after each round, so that who was just started gets somewhere.
const PAUSE: u32 = 100;
/// GHCB specification 2.03, section 4.1, table 7, and section 4.1.12: AP creation, and its requests.
const AP_CREATION: u32 = 0x8000_0013;
const CREATE: u8 = 1;
const DESTROY: u8 = 2;
/// What may come and go: stacks, the allocator's.
const TOLERANCE_KIB: u64 = 1024;

/// A jump with a 32-bit displacement: `opcode`, then the way from behind it to `target`.
fn jump(code: &mut Vec<u8>, opcode: &[u8], target: usize) {
    code.extend(opcode);
    let next = code.len() as i32 + 4;
    code.extend((target as i32 - next).to_le_bytes());
}

/// `request` for the vCPU whose number is in ESI, with the GHCB at RBP. Fields by the GHCB specification,
/// section 2.6, table 3.
fn event(request: u8) -> Vec<u8> {
    let mut code = vec![0xb8]; // mov eax, AP_CREATION
    code.extend(AP_CREATION.to_le_bytes());
    code.extend([0x48, 0x89, 0x85, 0x90, 0x03, 0, 0]); // mov [rbp + 0x390], rax: exit code
    code.extend([0x48, 0x89, 0xf0, 0x48, 0xc1, 0xe0, 32, 0x48, 0x83, 0xc8, request]); // mov rax, rsi; shl rax, 32; or rax, request
    code.extend([0x48, 0x89, 0x85, 0x98, 0x03, 0, 0]); // exit information 1
    code.extend([0x89, 0xf0, 0xc1, 0xe0, 12, 0x05]); // mov eax, esi; shl eax, 12; add eax, VMSA
    code.extend(VMSA.to_le_bytes());
    code.extend([0x48, 0x89, 0x85, 0xa0, 0x03, 0, 0]); // exit information 2
    code.extend([0xb8, 1, 0, 0, 0, 0x48, 0x89, 0x85, 0xf8, 0x01, 0, 0]); // RAX: SEV features
    // Which fields are valid: bit (offset / 8) of the two words at 0x3f0.
    for (offset, bits) in [(0xf0, 1u64 << 63), (0xf8, 7 << 50)] {
        code.extend([0x48, 0xb8]); // mov rax, bits
        code.extend(bits.to_le_bytes());
        code.extend([0x48, 0x89, 0x85, offset, 0x03, 0, 0]);
    }
    code.extend([0x66, 0xc7, 0x85, 0xfa, 0x0f, 0, 0, 2, 0]); // protocol version 2
    code.extend([0xc7, 0x85, 0xfc, 0x0f, 0, 0, 0, 0, 0, 0]); // usage 0
    code.extend(PATCHED_VMGEXIT);
    code
}

/// The guest's code, and the offset in it at which every vCPU but the first begins.
fn guest_code(cpus: u32) -> (Vec<u8>, usize) {
    assert!(cpus.is_power_of_two() && cpus <= 32);
    let counter = GHCB + (cpus << 12);
    let mut code = vec![0xbb]; // mov ebx, GHCB
    code.extend(GHCB.to_le_bytes());
    let share = code.len();
    code.extend([0x89, 0xd8, 0x83, 0xc8, 0x14, 0xba]); // mov eax, ebx; or eax, 0x14 (page state change); mov edx, 2 << 20 (shared)
    code.extend((2u32 << 20).to_le_bytes());
    code.extend(WRITE_GHCB_MSR);
    code.extend(PATCHED_VMGEXIT);
    code.extend([0x81, 0xc3, 0x00, 0x10, 0, 0, 0x81, 0xfb]); // add ebx, 4096; cmp ebx, behind the counter
    code.extend((counter + 4096).to_le_bytes());
    jump(&mut code, &[0x0f, 0x82], share); // jb

    code.extend([0xbe]); // mov esi, VMSA
    code.extend(VMSA.to_le_bytes());
    let adjust = code.len();
    code.extend([0x48, 0x89, 0xf0, 0x31, 0xc9, 0xba, 0x01, 0x00, 0x01, 0x00]); // mov rax, rsi; xor ecx, ecx; mov edx, VMPL 1, VMSA
    code.extend([0xe6, 0xe6, 0x66, 0x90]); // RMPADJUST, patched
    code.extend([0x85, 0xc0, 0x74, 2, 0x0f, 0x0b]); // test eax, eax; jz over ud2
    code.extend([0x81, 0xc6, 0x00, 0x10, 0, 0, 0x81, 0xfe]); // add esi, 4096; cmp esi, behind the last
    code.extend((VMSA + (cpus << 12)).to_le_bytes());
    jump(&mut code, &[0x0f, 0x82], adjust); // jb
    code.extend([0x31, 0xff]); // xor edi, edi

    // Here begins every vCPU, with its number in EDI.
    let ring = code.len();
    code.extend([0xf0, 0x0f, 0xab, 0x3c, 0x25]); // lock bts [who has run], edi
    code.extend((counter + 4).to_le_bytes());
    code.extend([0x89, 0xfd, 0xc1, 0xe5, 12, 0x81, 0xc5]); // mov ebp, edi; shl ebp, 12; add ebp, GHCB
    code.extend(GHCB.to_le_bytes());
    code.extend([0x89, 0xe8, 0x83, 0xc8, 0x12, 0x31, 0xd2]); // mov eax, ebp; or eax, 0x12 (register the GHCB); xor edx, edx
    code.extend(WRITE_GHCB_MSR);
    code.extend(PATCHED_VMGEXIT);
    code.extend([0x89, 0xe8, 0x31, 0xd2]); // mov eax, ebp; xor edx, edx
    code.extend(WRITE_GHCB_MSR);
    let again = code.len();
    code.extend([0xf0, 0xff, 0x04, 0x25]); // lock inc dword [counter]
    code.extend(counter.to_le_bytes());
    code.extend([0x81, 0x3c, 0x25]); // cmp dword [counter], all rounds
    code.extend(counter.to_le_bytes());
    code.extend((ROUNDS * cpus).to_le_bytes());
    let reset = [&out(0x3f8, b'R')[..], &out(0xcf9, 6), &[0xeb, 0xfe]].concat();
    code.extend([0x72, reset.len() as u8 + 13]); // jb over the reset
    code.extend([0x81, 0x3c, 0x25]); // cmp dword [who has run], everybody
    code.extend((counter + 4).to_le_bytes());
    code.extend((u32::MAX >> (32 - cpus)).to_le_bytes());
    code.extend([0x75, reset.len() as u8]); // jne over the reset
    code.extend(reset);
    code.extend([0x8b, 0x34, 0x25]); // mov esi, [counter]
    code.extend(counter.to_le_bytes());
    code.extend([0x01, 0xfe, 0x83, 0xe6, cpus as u8 - 1]); // add esi, edi; and esi, cpus - 1: whose turn it is
    let destroy = event(DESTROY);
    code.extend([0x85, 0xf6, 0x74, destroy.len() as u8]); // test esi, esi; jz over destroy
    code.extend(destroy);
    code.extend(event(CREATE));
    code.push(0xb9); // mov ecx, PAUSE
    code.extend(PAUSE.to_le_bytes());
    code.extend([0xff, 0xc9, 0x75, 0xfc]); // dec ecx; jnz back to it
    jump(&mut code, &[0xe9], again);
    (code, ring)
}

fn many_resets(cpus: u32, resets: u32) {
    let (code, ring) = guest_code(cpus);
    let Some((platform, mut guest)) = emulated_guest_with(&code, Backing::Single, cpus) else { return };
    alter(&mut guest, |plan| {
        for id in 0..cpus {
            let mut state = plan.vcpus[0].clone();
            state.rip = SNP_CODE + ring as u64;
            state.rdi = id.into();
            let gpa = u64::from(VMSA + (id << 12));
            plan.records.push(Record::new(gpa, PageType::Normal, state.encode().to_vec(), "a save area"));
        }
        plan.records.sort_by_key(|record| record.gpa);
    });
    let seen = Arc::new(Mutex::new(Vec::new()));
    let (console, notes) = (Capture::default(), Arc::clone(&seen));
    let count = move |life| {
        let now = held();
        assert_eq!(now.vcpus, 0, "a vCPU of an earlier life still runs in life {life}");
        notes.lock().unwrap().push(now);
        Ok(())
    };
    let host = Host {
        restart: Some(Restart { lives: Some(resets), pace: Duration::ZERO }),
        companions: vec![Box::new(BeforeLife(count))],
        ..Host::new(Box::new(console.clone()))
    };
    let (before, begun) = (held(), Instant::now());
    assert_eq!(monitor::run(&platform, guest, host).unwrap(), Outcome::Rebooted);
    let counts = |held: &Held| (held.threads, held.descriptors);
    // A thread that was waited for is in the list of tasks until the kernel has taken it apart.
    let mut after = held();
    let deadline = Instant::now() + Duration::from_secs(5);
    while counts(&after) != counts(&before) && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(10));
        after = held();
    }
    let seen = seen.lock().unwrap();
    assert_eq!(seen.len(), resets as usize);
    // Several may find at the same time that it is enough.
    assert!(console.bytes().iter().all(|byte| *byte == b'R') && console.bytes().len() >= resets as usize);
    let (early, middle, late) = (seen[seen.len() / 10 + 1], seen[seen.len() / 2], seen[seen.len() - 1]);
    println!(
        "{cpus} vCPUs, {resets} resets in {:.1} s: before {before:?}; early {early:?}; midway {middle:?}; last {late:?}; after {after:?}",
        begun.elapsed().as_secs_f64()
    );
    assert!(seen.iter().skip(1).all(|held| counts(held) == counts(&early)), "{early:?} {seen:?}");
    assert_eq!(counts(&before), counts(&after));
    assert!(late.rss_kib <= early.rss_kib + TOLERANCE_KIB, "{early:?} {late:?}");
    assert!(middle.rss_kib <= early.rss_kib + TOLERANCE_KIB, "{early:?} {middle:?}");
}

/// One test for both, because it counts what the process holds.
#[test]
fn resets_amid_starts_and_stops_leave_nothing_behind() {
    if !msrs_reach_the_monitor() {
        return;
    }
    let resets = std::env::var("CVMM_AP_RESETS").ok().and_then(|n| n.parse().ok()).unwrap_or(20);
    let sizes = std::env::var("CVMM_AP_VCPUS").ok().and_then(|n| n.parse().ok());
    for cpus in sizes.map_or(vec![2, 16], |only| vec![only]) {
        many_resets(cpus, resets);
    }
}
