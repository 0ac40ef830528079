// SPDX-License-Identifier: Apache-2.0
//! The page tables that stage0 runs on and hands to the kernel, in scratch memory that it validated itself.
//!
//! - the first 4 GiB mapped to themselves, private, in 2 MiB pages: what the 64-bit boot protocol needs;
//! - the same memory at [`layout::SHARED_VIEW`], shared, for staging memory and the GHCB page;
//! - one window of 1 GiB, private, through which memory above 4 GiB is validated, so that the tables do not grow with RAM.

use crate::cpu;
use crate::layout;
use crate::layout::PAGE;

/// Bytes that one page directory maps.
const GIB: u64 = 1 << 30;
/// Present, writable.
const TABLE: u64 = 3;
/// Present, writable, a 2 MiB page.
const LEAF: u64 = 0x83;
/// Page directories for 4 GiB.
const DIRECTORIES: u64 = 4;

const TOP: u64 = layout::WORK;
const PRIVATE: u64 = TOP + PAGE;
const PRIVATE_DIRECTORIES: u64 = PRIVATE + PAGE;
const WINDOW_DIRECTORY: u64 = PRIVATE_DIRECTORIES + DIRECTORIES * PAGE;
const SHARED: u64 = WINDOW_DIRECTORY + PAGE;
const SHARED_DIRECTORIES: u64 = SHARED + PAGE;
/// End of the tables; the stack is above.
pub const TABLES_END: u64 = SHARED_DIRECTORIES + DIRECTORIES * PAGE;

/// Index in the second level, and address, of the window.
const WINDOW_INDEX: u64 = 256;
const WINDOW: u64 = WINDOW_INDEX * GIB;

/// The tables in use.
#[derive(Clone, Copy)]
pub struct Tables {
    c_mask: u64,
}

fn fill(directory: u64, first: u64, flags: u64) {
    for i in 0..512 {
        cpu::write(directory + i * 8, (first + i * layout::LARGE) | flags);
    }
}

impl Tables {
    /// Builds the tables in zeroed scratch memory and loads them.
    pub fn build(c_mask: u64) -> Tables {
        cpu::write(TOP, PRIVATE | TABLE | c_mask);
        cpu::write(TOP + (layout::SHARED_VIEW >> 39) * 8, SHARED | TABLE | c_mask);
        for i in 0..DIRECTORIES {
            let (private, shared) = (PRIVATE_DIRECTORIES + i * PAGE, SHARED_DIRECTORIES + i * PAGE);
            fill(private, i * GIB, LEAF | c_mask);
            fill(shared, i * GIB, LEAF);
            cpu::write(PRIVATE + i * 8, private | TABLE | c_mask);
            cpu::write(SHARED + i * 8, shared | TABLE | c_mask);
        }
        cpu::write(PRIVATE + WINDOW_INDEX * 8, WINDOW_DIRECTORY | TABLE | c_mask);
        let tables = Tables { c_mask };
        tables.load();
        tables
    }

    /// The tables that [`Tables::build`] made before.
    pub fn built(c_mask: u64) -> Tables {
        Tables { c_mask }
    }

    fn load(self) {
        cpu::load_tables(TOP | self.c_mask);
    }

    /// Where the private page at `address` can be reached, and the end of the addresses that are mapped along with it.
    /// Moves the window, so an earlier result for memory above 4 GiB is no longer valid.
    pub fn map(self, address: u64) -> (u64, u64) {
        let limit = DIRECTORIES * GIB;
        if address < limit {
            return (address, limit);
        }
        let first = address & !(GIB - 1);
        fill(WINDOW_DIRECTORY, first, LEAF | self.c_mask);
        self.load();
        (WINDOW + (address - first), first + GIB)
    }
}

/// Where the shared page at `address`, below 4 GiB, can be reached.
pub fn shared(address: u64) -> u64 {
    layout::SHARED_VIEW + address
}
