// SPDX-License-Identifier: Apache-2.0
//! A guest that converts more than 100,000 pages to shared and back leaves the host's memory where it
//! started.
//!
//! The guest touches each page on the side to which it has just gone, so that a side which is not given back
//! shows: the shared one in the process's anonymous memory, the private one in the blocks of the
//! guest_memfd's stand-in. It needs a KVM that hands MSRs to the monitor; without one the test says so and
//! does nothing.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails where its host fails")]

use std::collections::BTreeMap;
use std::io;
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;
use std::sync::Mutex;

use snp::plan::PageType;
use snp::plan::Record;
use test_support::code::PATCHED_VMGEXIT;
use test_support::code::WRITE_GHCB_MSR;
use test_support::code::out;
use test_support::code::power_off;
use test_support::monitor::alter;
use test_support::tiny::emulated_guest;
use test_support::tiny::msrs_reach_the_monitor;
use vmm::platform::Platform;
use vmm::run::guest::Host;
use vmm::run::monitor;
use vmm::run::outcome::Outcome;
use vmm::spec::Backing;

/// The pages that are converted.
const START: u32 = 32 << 20;
const END: u32 = 96 << 20;
const PAGES: u32 = (END - START) / 4096;
/// Each round converts every page to shared and back.
const ROUNDS: u32 = 100_000 / PAGES + 1;
/// Where the private view is mapped besides: the second entry of the first page table.
const PRIVATE: u64 = 1 << 39;
/// The tables of that: the root is where a plain boot has its own.
const ROOT: u64 = 0x9000;
const LEVEL_3: u64 = 0x6_0000;
const LEVEL_2: u64 = 0x6_1000;
const PRESENT_WRITABLE: u64 = 3;
const LARGE: u64 = 1 << 7;

/// What may come and go that is not the pages': tables, stacks, the allocator's.
const TOLERANCE_KIB: u64 = 512;

/// Memory of this process's guest, in KiB.
#[derive(Clone, Copy, Debug)]
struct Memory {
    /// Anonymous memory of the process: the shared side.
    anonymous: u64,
    /// Blocks of the private side's file.
    private: u64,
}

fn memory() -> Memory {
    // Not RssAnon, which lags behind by some hundred pages.
    let rollup = std::fs::read_to_string("/proc/self/smaps_rollup").unwrap();
    let line = rollup.lines().find(|l| l.starts_with("Anonymous:")).unwrap();
    let files = std::fs::read_dir("/proc/self/fd").unwrap().map(|entry| entry.unwrap().path());
    let private = files.filter(|path| {
        std::fs::read_link(path).is_ok_and(|target| target.to_string_lossy().contains("cvmm-private"))
    });
    // A mapping of the file has a descriptor of its own.
    let blocks: BTreeMap<u64, u64> = private
        .map(|path| std::fs::metadata(path).unwrap())
        .map(|meta| (meta.ino(), meta.blocks()))
        .collect();
    Memory {
        anonymous: line.split_whitespace().nth(1).unwrap().parse().unwrap(),
        private: blocks.values().sum::<u64>() / 2,
    }
}

/// Measures whenever the guest says that all its pages are on one side.
#[derive(Clone, Default)]
struct Observer(Arc<Mutex<Vec<(char, Memory)>>>);

impl Write for Observer {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        let mut seen = self.0.lock().unwrap();
        seen.extend(buf.iter().map(|byte| (char::from(*byte), memory())));
        Ok(buf.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Converts every page by the MSR protocol (GHCB specification, 2.3.1: 0x014; 1 is private, 2 shared), writes
/// to it at `view` + its address, and says `letter`.
fn convert_all(operation: u32, view: u64, letter: u8) -> Vec<u8> {
    let mut code = vec![0x49, 0xbe]; // mov r14, view
    code.extend(view.to_le_bytes());
    code.push(0xbb); // mov ebx, START
    code.extend(START.to_le_bytes());
    let page = code.len();
    code.extend([0x89, 0xd8, 0x83, 0xc8, 0x14, 0xba]); // mov eax, ebx; or eax, 0x14; mov edx, operation << 20
    code.extend((operation << 20).to_le_bytes());
    code.extend(WRITE_GHCB_MSR);
    code.extend(PATCHED_VMGEXIT);
    code.extend([0x42, 0xc6, 0x04, 0x33, 0x55]); // mov byte [rbx + r14], 0x55
    code.extend([0x81, 0xc3, 0x00, 0x10, 0x00, 0x00, 0x81, 0xfb]); // add ebx, 4096; cmp ebx, END
    code.extend(END.to_le_bytes());
    jump_back(&mut code, 0x82, page); // jb page
    code.extend(out(0x3f8, letter));
    code
}

/// A conditional jump with a 32-bit displacement.
fn jump_back(code: &mut Vec<u8>, condition: u8, target: usize) {
    let next = code.len() as i32 + 6;
    code.extend([0x0f, condition]);
    code.extend((target as i32 - next).to_le_bytes());
}

fn flipping_guest() -> Vec<u8> {
    let mut code = vec![0x41, 0xbd]; // mov r13d, ROUNDS
    code.extend(ROUNDS.to_le_bytes());
    let round = code.len();
    code.extend(convert_all(2, 0, b's'));
    code.extend(convert_all(1, PRIVATE, b'p'));
    code.extend([0x41, 0xff, 0xcd]); // dec r13d
    jump_back(&mut code, 0x85, round); // jnz round
    [code, power_off()].concat()
}

fn page(entries: impl Iterator<Item = u64>) -> Vec<u8> {
    let mut page: Vec<u8> = entries.flat_map(u64::to_le_bytes).collect();
    page.resize(4096, 0);
    page
}

#[test]
fn pages_that_go_back_and_forth_leave_host_memory_where_it_was() {
    if !msrs_reach_the_monitor() {
        return;
    }
    let Some((platform, mut guest)) = emulated_guest(&flipping_guest(), Backing::Split) else { return };
    let c_bit = 1 << platform.snp_cpuid().c_bit;
    alter(&mut guest, |plan| {
        let root = plan.records.iter_mut().find(|r| (r.gpa..r.end()).contains(&ROOT)).unwrap();
        let mut tables = root.contents.as_slice().to_vec();
        let second = (ROOT - root.gpa) as usize + 8;
        tables[second..second + 8].copy_from_slice(&(LEVEL_3 | PRESENT_WRITABLE).to_le_bytes());
        root.contents = tables.into();
        let large = (0..512u64).map(|i| i << 21 | c_bit | LARGE | PRESENT_WRITABLE);
        for (gpa, bytes) in
            [(LEVEL_3, page([LEVEL_2 | PRESENT_WRITABLE].into_iter())), (LEVEL_2, page(large))]
        {
            plan.records.push(Record::new(gpa, PageType::Normal, bytes, "tables of the private view"));
        }
        plan.records.sort_by_key(|r| r.gpa);
    });

    let observer = Observer::default();
    let outcome = monitor::run(&platform, guest, Host::new(Box::new(observer.clone()))).unwrap();
    assert_eq!(outcome, Outcome::PoweredOff);
    let seen = observer.0.lock().unwrap();
    for (letter, memory) in seen.iter() {
        println!("{letter} {memory:?}");
    }
    let letters: String = seen.iter().map(|(letter, _)| letter).collect();
    assert_eq!(letters, "sp".repeat(ROUNDS as usize));
    let all = u64::from(PAGES) * 4;
    let about = |value: u64, expected: u64| value.abs_diff(expected) <= TOLERANCE_KIB;
    let (shared, private) = (seen[0].1, seen[1].1);
    // Each way gives back the side that the page has left.
    assert!(about(shared.anonymous, private.anonymous + all), "{shared:?} {private:?}");
    assert!(about(private.private, shared.private + all), "{shared:?} {private:?}");
    for (letter, now) in seen.iter() {
        let then = if *letter == 's' { shared } else { private };
        assert!(
            about(now.anonymous, then.anonymous) && about(now.private, then.private),
            "{now:?} was {then:?}"
        );
    }
    println!("{} pages converted to shared and back", u64::from(PAGES * ROUNDS));
}
