// SPDX-License-Identifier: Apache-2.0
//! A large image is measured as it lies in memory, without a copy of it.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

use sha2::Digest as _;
use sha2::Sha384;
use snp::digest::LaunchDigest;
use snp::digest::trace_records;
use snp::plan::Bytes;
use snp::plan::PAGE_SIZE;
use snp::plan::PageType;
use snp::plan::Record;

/// Anonymous memory of this process in KiB.
fn anonymous_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

#[test]
fn measuring_takes_no_memory_of_its_own() {
    const LEN: u64 = 64 << 20;
    let image = Bytes::from(vec![0x5a; LEN as usize]);
    let before = anonymous_kib();
    let record = Record::new(0x1_0000_0000, PageType::Normal, image.clone(), "large");
    let digest = trace_records(std::slice::from_ref(&record))[0];
    let grown = anonymous_kib().saturating_sub(before);
    assert!(grown < 16 << 10, "{grown} KiB of memory for an image of {} KiB", LEN >> 10);

    // All pages are the same, so the chain is short to write down.
    let page: [u8; 48] = Sha384::digest([0x5a; PAGE_SIZE as usize]).into();
    let mut expected = LaunchDigest::START;
    for gpa in (record.gpa..record.end()).step_by(PAGE_SIZE as usize) {
        expected.extend(PageType::Normal, gpa, &page);
    }
    assert_eq!(digest, expected);
}
