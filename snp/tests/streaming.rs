// SPDX-License-Identifier: Apache-2.0
//! A large image is measured without being held in memory.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

use sha2::Digest as _;
use sha2::Sha384;
use snp::digest::LaunchDigest;
use snp::digest::trace_records;
use snp::plan::Bytes;
use snp::plan::PAGE_SIZE;
use snp::plan::PageType;
use snp::plan::Record;

/// Anonymous memory of this process in KiB: what it holds itself, without mapped files.
fn anonymous_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

#[test]
fn a_mapped_image_takes_no_memory_of_its_own() {
    const LEN: u64 = 256 << 20;
    let file = tempfile::tempfile().unwrap();
    file.set_len(LEN).unwrap();
    let before = anonymous_kib();
    let record = Record::new(0x1_0000_0000, PageType::Normal, Bytes::map(&file).unwrap(), "large");
    let digest = trace_records(std::slice::from_ref(&record))[0];
    let grown = anonymous_kib().saturating_sub(before);
    assert!(grown < 40 << 10, "{grown} KiB of memory for an image of {} KiB", LEN >> 10);

    // The file has no contents but zeros, so the chain is short to write down.
    let zeros: [u8; 48] = Sha384::digest([0; PAGE_SIZE as usize]).into();
    let mut expected = LaunchDigest::START;
    for gpa in (record.gpa..record.end()).step_by(PAGE_SIZE as usize) {
        expected.extend(PageType::Normal, gpa, &zeros);
    }
    assert_eq!(digest, expected);
}
