// SPDX-License-Identifier: Apache-2.0
//! A guest of a hundred bytes in an IGVM file: it prints what the loader told it, and gives up through its
//! GHCB MSR.
//!
//! The file is written by the `igvm` crate, which also computes the digest that a launch must have; no code
//! of cvmm's loader takes part. The guest starts in 32-bit protected mode with paging off, so it needs no
//! page tables and no C-bit.

use anyhow::Context as _;
use anyhow::Result;
use igvm::IgvmDirectiveHeader;
use igvm::IgvmFile;
use igvm::IgvmInitializationHeader;
use igvm::IgvmPlatformHeader;
use igvm::IgvmRevision;
use igvm::measurement::generate_snp_measurement;
use igvm::snp_defs::SevVmsa;
use igvm_defs::IGVM_VHS_PARAMETER;
use igvm_defs::IGVM_VHS_PARAMETER_INSERT;
use igvm_defs::IGVM_VHS_SNP_ID_BLOCK_PUBLIC_KEY;
use igvm_defs::IGVM_VHS_SNP_ID_BLOCK_SIGNATURE;
use igvm_defs::IGVM_VHS_SUPPORTED_PLATFORM;
use igvm_defs::IgvmPageDataFlags;
use igvm_defs::IgvmPageDataType;
use igvm_defs::IgvmPlatformType;
use snp::digest::LaunchDigest;
use snp::identity::IdAuth;
use snp::identity::IdBlock;
use snp::identity::PublicKey;
use snp::identity::Signature;
use snp::policy::GuestPolicy;
use snp::vmsa::Segment;
use snp::vmsa::VMSA_GPA;
use snp::vmsa::VmsaState;
use test_support::code::VMGEXIT;
use test_support::code::power_off;
use zerocopy::FromBytes as _;

/// The guest policy that the file asks for: SMT and debugging, so that it differs from cvmm's default.
pub const POLICY: u64 = 0xb_0000;
/// What the guest prints with a command line of "hello", one vCPU and 128 MiB of memory.
pub const CONSOLE: &str = "igvm 1 m hello shared\n";

const MASK: u32 = 1;
const CODE: u64 = 0x10_0000;
const NO_DATA: u64 = 0x10_1000;
const SECRETS: u64 = 0x10_2000;
const CPUID: u64 = 0x10_3000;
const PARAMETERS: u64 = 0x10_4000;
const SHARED: u64 = 0x10_5000;
/// Where things are in the parameter page.
const VP_COUNT: u32 = 0;
const MEMORY_MAP: u32 = 0x100;
const COMMAND_LINE: u32 = 0x800;
/// Pages of 128 MiB.
const MEMORY_PAGES: u32 = 0x8000;

/// How the guest ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// It asks for its termination: GHCB MSR protocol, reason 0:0.
    Terminate,
    /// It switches the machine off by ACPI.
    PowerOff,
}

/// Something else in the file than in the good one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Twist {
    /// Nothing.
    None,
    /// An ID block for this file.
    IdBlock,
    /// An ID block for another file.
    WrongIdBlock,
    /// A parameter that cvmm does not have.
    Srat,
    /// Memory that the guest does not have.
    RequiredMemory,
    /// A second vCPU's save area.
    SecondVcpu,
    /// A page where the local APICs are.
    ApicPage,
}

fn print_at(address: u64) -> Vec<u8> {
    let mut code = vec![0xbe]; // mov esi, address
    code.extend((address as u32).to_le_bytes());
    // lodsb; test al, al; jz end; out dx, al; jmp to the lodsb
    code.extend([0xac, 0x84, 0xc0, 0x74, 0x03, 0xee, 0xeb, 0xf8]);
    code
}

fn print(byte: u8) -> Vec<u8> {
    vec![0xb0, byte, 0xee] // mov al, byte; out dx, al
}

fn code(end: End) -> Vec<u8> {
    let parameter = |offset: u32| (PARAMETERS as u32 + offset).to_le_bytes();
    let mut code = vec![0xba, 0xf8, 0x03, 0, 0]; // mov edx, 0x3f8
    b"igvm ".iter().for_each(|byte| code.extend(print(*byte)));
    code.push(0xa0); // mov al, [VP count]
    code.extend(parameter(VP_COUNT));
    code.extend([0x04, b'0', 0xee]); // add al, '0'; out dx, al
    code.extend(print(b' '));
    code.extend([0x81, 0x3d]); // cmp dword [pages of the first entry of the memory map], MEMORY_PAGES
    code.extend(parameter(MEMORY_MAP + 8));
    code.extend(MEMORY_PAGES.to_le_bytes());
    code.extend([0x75, 0x03]); // jne beyond the next print
    code.extend(print(b'm'));
    code.extend(print(b' '));
    code.extend(print_at(PARAMETERS + u64::from(COMMAND_LINE)));
    code.extend(print(b' '));
    code.extend(print_at(SHARED));
    code.extend(print(b'\n'));
    match end {
        End::Terminate => {
            // mov ecx, GHCB MSR; mov eax, 0x100; xor edx, edx; wrmsr; rep vmmcall (VMGEXIT)
            code.extend([0xb9, 0x30, 0x01, 0x01, 0xc0, 0xb8, 0, 1, 0, 0, 0x31, 0xd2, 0x0f, 0x30]);
            code.extend(VMGEXIT);
        }
        End::PowerOff => code.extend(power_off()),
    }
    code.push(0xf4); // hlt
    code
}

fn vmsa() -> Result<Box<SevVmsa>> {
    let data = Segment::new(0x10, 0xc93, u32::MAX, 0);
    let state = VmsaState {
        cs: Segment::new(8, 0xc9b, u32::MAX, 0),
        ss: data,
        ds: data,
        es: data,
        fs: data,
        gs: data,
        cr0: 0x31,
        rip: CODE,
        ..VmsaState::reset()
    };
    Ok(Box::new(SevVmsa::read_from_bytes(&state.encode()).ok().context("a VMSA")?))
}

fn signature(signature: &Signature) -> Box<IGVM_VHS_SNP_ID_BLOCK_SIGNATURE> {
    let fields = signature.fields();
    let half = |at: usize| std::array::from_fn(|i| fields[at + i]);
    Box::new(IGVM_VHS_SNP_ID_BLOCK_SIGNATURE { r_comp: half(0), s_comp: half(72) })
}

fn public_key(key: Option<&PublicKey>) -> Box<IGVM_VHS_SNP_ID_BLOCK_PUBLIC_KEY> {
    let form = key.map_or([0; 1028], PublicKey::encode);
    let part = |at: usize| std::array::from_fn(|i| form[at + i]);
    let curve = if key.is_some() { 2 } else { 0 };
    Box::new(IGVM_VHS_SNP_ID_BLOCK_PUBLIC_KEY { curve, reserved: 0, qx: part(4), qy: part(76) })
}

fn id_block(digest: [u8; 48]) -> IgvmDirectiveHeader {
    let block = IdBlock {
        launch_digest: LaunchDigest(digest),
        family_id: *b"tiny family     ",
        image_id: *b"tiny image      ",
        guest_svn: 3,
        policy: GuestPolicy(POLICY),
    };
    let key = p384::ecdsa::SigningKey::random(&mut rand_core::OsRng);
    let auth = IdAuth::sign(&block, &key, None);
    let nothing = IGVM_VHS_SNP_ID_BLOCK_SIGNATURE { r_comp: [0; 72], s_comp: [0; 72] };
    IgvmDirectiveHeader::SnpIdBlock {
        compatibility_mask: MASK,
        author_key_enabled: 0,
        reserved: [0; 3],
        ld: digest,
        family_id: block.family_id,
        image_id: block.image_id,
        version: 1,
        guest_svn: block.guest_svn,
        id_key_algorithm: 1,
        author_key_algorithm: 0,
        id_key_signature: signature(&auth.block_signature),
        id_public_key: public_key(Some(&auth.id_key)),
        author_key_signature: Box::new(nothing),
        author_public_key: public_key(None),
    }
}

/// The file, and the digest that the `igvm` crate computes for it.
pub fn file(end: End, twist: Twist) -> Result<(Vec<u8>, [u8; 48])> {
    let private = IgvmPageDataFlags::new();
    let page = |gpa, flags, data_type, data| IgvmDirectiveHeader::PageData {
        gpa,
        compatibility_mask: MASK,
        flags,
        data_type,
        data,
    };
    let at = |byte_offset| IGVM_VHS_PARAMETER { parameter_area_index: 0, byte_offset };
    let area = IgvmDirectiveHeader::ParameterArea {
        number_of_bytes: 0x1000,
        parameter_area_index: 0,
        initial_data: Vec::new(),
    };
    let context = |vp_index| -> Result<_> {
        let vmsa = vmsa()?;
        Ok(IgvmDirectiveHeader::SnpVpContext { gpa: VMSA_GPA, compatibility_mask: MASK, vp_index, vmsa })
    };
    let required = |gpa| IgvmDirectiveHeader::RequiredMemory {
        gpa,
        compatibility_mask: MASK,
        number_of_bytes: 0x10_0000,
        vtl2_protectable: false,
    };
    let normal = IgvmPageDataType::NORMAL;
    let mut list = vec![
        page(CODE, private, normal, code(end)),
        page(NO_DATA, private, normal, Vec::new()),
        page(SECRETS, private, IgvmPageDataType::SECRETS, Vec::new()),
        page(CPUID, private, IgvmPageDataType::CPUID_DATA, Vec::new()),
        page(SHARED, private.with_shared(true), normal, b"shared".to_vec()),
        required(0x20_0000),
        area,
        IgvmDirectiveHeader::VpCount(at(VP_COUNT)),
        IgvmDirectiveHeader::MemoryMap(at(MEMORY_MAP)),
        IgvmDirectiveHeader::CommandLine(at(COMMAND_LINE)),
    ];
    match twist {
        Twist::Srat => list.push(IgvmDirectiveHeader::Srat(at(0x900))),
        Twist::RequiredMemory => list.push(required(0x4000_0000)),
        Twist::ApicPage => list.push(page(0xfee0_0000, private, normal, vec![1])),
        _ => {}
    }
    let insert =
        IGVM_VHS_PARAMETER_INSERT { gpa: PARAMETERS, compatibility_mask: MASK, parameter_area_index: 0 };
    list.push(IgvmDirectiveHeader::ParameterInsert(insert));
    list.push(context(0)?);
    if twist == Twist::SecondVcpu {
        list.push(context(1)?);
    }
    let policy = || vec![IgvmInitializationHeader::GuestPolicy { policy: POLICY, compatibility_mask: MASK }];
    let digest = generate_snp_measurement(&policy(), &list, MASK).context("the igvm crate's digest")?;
    match twist {
        Twist::IdBlock => list.push(id_block(digest)),
        Twist::WrongIdBlock => list.push(id_block([7; 48])),
        _ => {}
    }
    let platform = IgvmPlatformHeader::SupportedPlatform(IGVM_VHS_SUPPORTED_PLATFORM {
        compatibility_mask: MASK,
        highest_vtl: 0,
        platform_type: IgvmPlatformType::SEV_SNP,
        platform_version: 1,
        shared_gpa_boundary: 0,
    });
    let file = IgvmFile::new(IgvmRevision::V1, vec![platform], policy(), list).context("an IGVM file")?;
    let mut bytes = Vec::new();
    file.serialize(&mut bytes).context("an IGVM file")?;
    Ok((bytes, digest))
}
