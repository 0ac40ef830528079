// SPDX-License-Identifier: Apache-2.0
//! What is launched, from whatever kind of file, and for what it is put together.

use std::ops::Range;

use sha2::Digest as _;
use sha2::Sha256;
use snp::board::Board;
use snp::identity::IdAuth;
use snp::identity::IdBlock;
use snp::image::direct::DirectImage;
use snp::image::staged::StagedBoot;
use snp::pages::cpuid::CpuidTable;
use snp::plan::LaunchPlan;
use snp::policy::GuestPolicy;
use snp::stage0::InputsPage;
use vtpm_svc::measured::Event;

use crate::events;
use crate::launch::Staged;

/// For what an image is put together.
#[derive(Clone, Copy, Debug)]
pub struct Target<'a> {
    /// The guest's CPUID; `None` where nothing runs, since it is not measured.
    pub cpuid: Option<&'a CpuidTable>,
    /// Position of the C-bit. It is part of page tables that the launch measures, which only tests ask for.
    pub c_bit: u8,
    /// Whether to say what the digest depends on.
    pub names: Names,
}

impl Default for Target<'_> {
    fn default() -> Self {
        Target { cpuid: None, c_bit: 51, names: Names::None }
    }
}

/// How files are named in the list of what a digest depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Names {
    /// There is no such list: hashing a large file once more takes longer than its digest.
    None,
    /// By the SHA-256 of their contents.
    Sha256,
}

impl Names {
    /// A name for a file's contents.
    pub fn of(self, bytes: &[u8]) -> String {
        match self {
            Names::None => String::new(),
            Names::Sha256 => sha256(bytes),
        }
    }
}

/// The SHA-256 of `bytes` in hexadecimal.
pub fn sha256(bytes: &[u8]) -> String {
    hex::encode(Sha256::digest(bytes))
}

/// What is launched.
#[derive(Clone, Debug)]
pub struct LaunchImage {
    /// What enters the guest.
    pub plan: LaunchPlan,
    /// The machine that it runs on.
    pub board: Board,
    /// Its memory, ascending.
    pub ram: Vec<Range<u64>>,
    /// What it finds in shared memory.
    pub staged: Staged,
    /// stage0's page of inputs.
    pub inputs_page: Option<InputsPage>,
    /// What stage0 adds to the launch, for people; empty where nothing is named.
    pub bound: String,
    /// What the PCRs of the guest's TPM begin with.
    pub events: Vec<Event>,
    /// The policy that the file asks for.
    pub policy: Option<GuestPolicy>,
    /// The ID block in the file.
    pub identity: Option<(IdBlock, IdAuth)>,
    /// What the digest depends on, with the names that `cvmm measure` records.
    pub inputs: Vec<(&'static str, String)>,
    /// What the user should know.
    pub notes: Vec<events::Event>,
}

impl LaunchImage {
    /// A plan for `board`, with memory at `ram`, and nothing else.
    pub(super) fn new(plan: LaunchPlan, board: Board, ram: Vec<Range<u64>>) -> Self {
        LaunchImage {
            plan,
            board,
            ram,
            staged: Staged::default(),
            inputs_page: None,
            bound: String::new(),
            events: Vec::new(),
            policy: None,
            identity: None,
            inputs: Vec::new(),
            notes: Vec::new(),
        }
    }

    /// A kernel that is booted directly.
    pub(super) fn of_direct(image: DirectImage, names: Names) -> Self {
        let shim = image.staged.as_ref();
        LaunchImage {
            inputs_page: shim.map(|shim| shim.inputs.clone()),
            bound: shim.filter(|_| names != Names::None).map_or_else(String::new, StagedBoot::explain),
            staged: image.staged.map_or_else(Staged::default, |shim| Staged {
                bytes: shim.staging,
                shared: shim.shared,
                raced: None,
            }),
            ..LaunchImage::new(image.plan, image.board, image.ram)
        }
    }
}
