// SPDX-License-Identifier: Apache-2.0
//! Why stage0 ends a guest, as the termination code that the host sees.
//!
//! GHCB specification 2.03, section 2.3.1 "MSR protocol", request 0x100: a reason set of four bits and a code of eight. Set 0
//! is the specification's and set 1 is Linux's; stage0 uses a set of its own, so that the monitor can tell who gave up.

/// stage0's reason set.
pub const REASON_SET: u8 = 3;

macro_rules! reasons {
    ($($name:ident = $code:literal, $words:literal;)*) => {
        /// A refusal. The number is the termination code.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[repr(u8)]
        pub enum Reason {
            $(#[doc = $words] $name = $code,)*
        }

        impl Reason {
            /// Every reason, in order of code.
            pub const ALL: &[Reason] = &[$(Reason::$name,)*];

            /// What the reason means, for people.
            pub fn words(self) -> &'static str {
                match self {
                    $(Reason::$name => $words,)*
                }
            }
        }
    };
}

reasons! {
    CpuidPage = 0x01, "the CPUID page has no usable leaf 0x8000001F: its count is not 1 to 64, the leaf is missing, or it does not show SEV-SNP";
    CbitRange = 0x02, "the CPUID page gives a C-bit position outside of 32 to 51";
    CbitWrong = 0x03, "memory written as private did not read back through the C-bit that the CPUID page gives";
    NoRandom = 0x04, "RDRAND gave no random number";
    GhcbVersion = 0x05, "the hypervisor does not speak version 2 of the GHCB protocol";
    HypervisorFeatures = 0x06, "the hypervisor does not report the SEV-SNP feature";
    GhcbRegistration = 0x07, "the hypervisor did not register stage0's GHCB page";
    PageStateChange = 0x08, "the hypervisor refused to make staging memory private";
    AlreadyValidated = 0x09, "a page was validated already: the host may have mapped it twice";
    PvalidateFailed = 0x0a, "PVALIDATE refused a page";
    InputsHeader = 0x10, "the measured inputs do not begin with the header that this stage0 knows";
    RamTable = 0x11, "the measured RAM table is empty, unaligned, out of order, overlapping, or beyond the address space";
    ExcludedTable = 0x12, "the measured list of launch pages is malformed, lies outside of RAM, or does not cover stage0";
    StagingTable = 0x13, "a staging range is malformed, lies outside of RAM, or overlaps launch pages or stage0's scratch memory";
    AcceptTable = 0x14, "the measured list of memory to validate is malformed or misses memory that is needed before the kernel runs";
    ItemTable = 0x15, "an item's length, kind or number is not valid";
    ItemSource = 0x16, "an item does not come from staging memory";
    ItemTarget = 0x17, "an item's place lies outside of RAM, or overlaps launch pages, stage0, staging memory or another item";
    EntryPoint = 0x18, "the kernel's entry point lies outside of the kernel";
    HashKernel = 0x20, "the kernel is not the one that was measured";
    HashInitrd = 0x21, "the initrd is not the one that was measured";
    HashCmdline = 0x22, "the command line is not the one that was measured";
    HashBootData = 0x23, "the boot parameters are not the ones that were measured";
    HashAcpi = 0x24, "the ACPI tables are not the ones that were measured";
    E820Count = 0x30, "the e820 map has no entry or more than 128";
    E820Overflow = 0x31, "an e820 entry is empty or reaches beyond the address space";
    E820Overlap = 0x32, "e820 entries overlap or are out of order";
    E820Type = 0x33, "an e820 entry has a type other than RAM, reserved, ACPI or NVS";
    E820NotRam = 0x34, "an e820 entry of type RAM or ACPI covers addresses that are not RAM";
    E820CoversStage0 = 0x35, "an e820 entry of type RAM or ACPI covers stage0 or launch pages";
    SetupData = 0x36, "the setup_data list leaves the measured boot data, does not end, or adds to the e820 map";
    LazyTables = 0x38, "the tables for lazy acceptance do not fit";
    Internal = 0xff, "stage0 failed an internal check";
}

impl Reason {
    /// The value of the GHCB MSR that ends the guest with this reason.
    pub fn msr(self) -> u64 {
        0x100 | (REASON_SET as u64) << 12 | (self as u64) << 16
    }
}
