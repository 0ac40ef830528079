// SPDX-License-Identifier: Apache-2.0
//! stage0, seen from the host: the built shim, its inputs page, and the rules that both sides share.
//!
//! The modules below are the shim's own source files, so what is tested here is what runs in the guest. The
//! image itself is built by `build.rs` from `snp/stage0`.

#[path = "../stage0/src/e820.rs"]
pub mod e820;
#[path = "../stage0/src/efi.rs"]
pub mod efi;
#[path = "../stage0/src/inputs.rs"]
pub mod inputs;
#[path = "../stage0/src/layout.rs"]
pub mod layout;
#[path = "../stage0/src/reason.rs"]
pub mod reason;
#[path = "../stage0/src/sha384.rs"]
pub mod sha384;

use std::ops::Range;

use inputs::Item;
use inputs::List;
use sha2::Digest as _;

use crate::plan::PAGE_SIZE;

/// The shim as it enters a guest.
pub struct Built {
    /// Whole pages, at [`layout::IMAGE`].
    pub image: &'static [u8],
    /// Address of the first instruction: 32-bit protected mode, paging off, flat segments.
    pub entry: u64,
    /// Address of the loop that vCPUs other than the first would run from their measured state.
    pub park: u64,
    /// Address of the four-byte no-operation before the jump to the kernel, with its entry in RAX.
    pub hook: u64,
    /// Address and kind (0 VMGEXIT, 1 PVALIDATE) of each SNP instruction.
    pub sites: &'static [(u64, u32)],
}

/// The shim of this build.
pub static BUILT: Built = include!(concat!(env!("OUT_DIR"), "/stage0_built.rs"));

/// What the inputs page says.
#[derive(Clone, Debug, Default)]
pub struct InputsPage {
    /// Kernel's 64-bit entry.
    pub entry: u64,
    /// Address of `boot_params`.
    pub boot_params: u64,
    /// RAM, ascending.
    pub ram: Vec<Range<u64>>,
    /// Launch pages, ascending.
    pub excluded: Vec<Range<u64>>,
    /// Shared memory: [`layout::GHCB`] first, then staging memory, ascending.
    pub staging: Vec<Range<u64>>,
    /// For lazy acceptance, what stage0 validates; `None` to have it validate everything.
    pub accept: Option<Vec<Range<u64>>>,
    /// What stage0 takes over.
    pub items: Vec<Item>,
}

/// A list has more entries than the inputs page has room for.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("stage0's inputs have room for {room} {what}, the plan needs {needed}")]
pub struct TooMany {
    /// Of what.
    pub what: &'static str,
    /// Entries that fit.
    pub room: usize,
    /// Entries wanted.
    pub needed: usize,
}

impl InputsPage {
    /// What stage0 validates; launch pages in it are valid already.
    pub fn validated(&self) -> Vec<Range<u64>> {
        self.accept.clone().unwrap_or_else(|| self.ram.clone())
    }

    /// The page as stage0 reads it.
    pub fn encode(&self) -> Result<Vec<u8>, TooMany> {
        let mut page = vec![0; PAGE_SIZE as usize];
        let mut put = |at: usize, bytes: &[u8]| page[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &inputs::MAGIC);
        put(8, &self.entry.to_le_bytes());
        put(16, &self.boot_params.to_le_bytes());
        put(24, &(if self.accept.is_some() { inputs::FLAG_LAZY } else { 0 }).to_le_bytes());
        let none = Vec::new();
        let lists: [(List, &Vec<Range<u64>>, &str); 4] = [
            (inputs::RAM, &self.ram, "RAM ranges"),
            (inputs::EXCLUDED, &self.excluded, "launch-page ranges"),
            (inputs::STAGING, &self.staging, "staging ranges"),
            (inputs::ACCEPT, self.accept.as_ref().unwrap_or(&none), "ranges to validate"),
        ];
        for (list, ranges, what) in lists {
            if ranges.len() > list.max {
                return Err(TooMany { what, room: list.max, needed: ranges.len() });
            }
            put(list.count, &[ranges.len() as u8]);
            for (i, range) in ranges.iter().enumerate() {
                put(list.at + i * 16, &range.start.to_le_bytes());
                put(list.at + i * 16 + 8, &range.end.to_le_bytes());
            }
        }
        if self.items.len() > inputs::ITEMS_MAX {
            return Err(TooMany { what: "items", room: inputs::ITEMS_MAX, needed: self.items.len() });
        }
        put(inputs::ITEM_COUNT, &[self.items.len() as u8]);
        for (i, item) in self.items.iter().enumerate() {
            let at = inputs::ITEMS + i * inputs::ITEM_LEN;
            put(at, &(item.kind as u32).to_le_bytes());
            put(at + 8, &item.source.to_le_bytes());
            put(at + 16, &item.target.to_le_bytes());
            put(at + 24, &item.len.to_le_bytes());
            put(at + 32, &item.mem_len.to_le_bytes());
            put(at + 40, &item.hash);
        }
        Ok(page)
    }
}

/// SHA-384 by the `sha2` crate, for the hashes that the inputs page carries.
pub fn item_hash(bytes: &[u8]) -> [u8; 48] {
    sha2::Sha384::digest(bytes).into()
}

#[cfg(test)]
#[path = "stage0_test.rs"]
mod tests;
