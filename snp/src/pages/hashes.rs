// SPDX-License-Identifier: Apache-2.0
//! The page of kernel hashes: how a firmware knows that kernel, initrd and command line are the measured
//! ones.
//!
//! The monitor hands the three to OVMF through a channel that the host controls; OVMF compares them with the
//! SHA-256 hashes in this measured page. Layout: QEMU, `target/i386/sev.c`, `SevHashTable`: a header GUID and
//! length, then one entry each for command line, initrd and kernel, padded with zeros to a multiple of 16
//! bytes.

use sha2::Digest as _;
use sha2::Sha256;

use crate::guid::Guid;

const HEADER: Guid = Guid::new(0x9438_d606, 0x4f22, 0x4cc9, 0xb479_a793_d411_fd21);
const CMDLINE: Guid = Guid::new(0x97d0_2dd8, 0xbd20, 0x4c94, 0xaa78_e771_4d36_ab2a);
const INITRD: Guid = Guid::new(0x44ba_f731, 0x3a2f, 0x4bd7, 0x9af1_41e2_9169_781d);
const KERNEL: Guid = Guid::new(0x4de7_9437, 0xabd2, 0x427f, 0xb835_d5b1_72d2_045b);

/// Length of an entry: GUID, length, hash.
const ENTRY_LEN: usize = 16 + 2 + 32;
/// Length of the table without padding.
const UNPADDED_LEN: usize = 16 + 2 + 3 * ENTRY_LEN;
/// Length of the table in bytes, padding included.
pub const TABLE_LEN: usize = UNPADDED_LEN.next_multiple_of(16);

/// SHA-256 of what the firmware will start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KernelHashes {
    /// Of the kernel file as it is.
    pub kernel: [u8; 32],
    /// Of the initrd; of nothing where there is none.
    pub initrd: [u8; 32],
    /// Of the command line with the zero byte that ends it.
    pub cmdline: [u8; 32],
}

impl KernelHashes {
    /// Hashes the three files; give an empty initrd or command line where there is none.
    pub fn of(kernel: &[u8], initrd: &[u8], cmdline: &[u8]) -> Self {
        KernelHashes {
            kernel: Sha256::digest(kernel).into(),
            initrd: Sha256::digest(initrd).into(),
            cmdline: Sha256::new().chain_update(cmdline).chain_update([0]).finalize().into(),
        }
    }

    /// The table as it lies in the guest.
    pub fn table(&self) -> [u8; TABLE_LEN] {
        let mut table = Vec::with_capacity(TABLE_LEN);
        table.extend_from_slice(&HEADER.0);
        table.extend_from_slice(&(UNPADDED_LEN as u16).to_le_bytes());
        for (guid, hash) in [(CMDLINE, &self.cmdline), (INITRD, &self.initrd), (KERNEL, &self.kernel)] {
            table.extend_from_slice(&guid.0);
            table.extend_from_slice(&(ENTRY_LEN as u16).to_le_bytes());
            table.extend_from_slice(hash);
        }
        let mut padded = [0; TABLE_LEN];
        padded[..table.len()].copy_from_slice(&table);
        padded
    }
}
