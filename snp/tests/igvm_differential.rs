// SPDX-License-Identifier: Apache-2.0
//! IGVM files, written by the `igvm` crate and measured by its `corim` feature: our reading and digest must
//! be the same.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

mod support;

use igvm::IgvmDirectiveHeader;
use igvm::IgvmFile;
use igvm::IgvmInitializationHeader;
use igvm::IgvmPlatformHeader;
use igvm::IgvmRevision;
use igvm::measurement::generate_snp_measurement;
use igvm::snp_defs::SevVmsa;
use igvm_defs::IGVM_VHS_PARAMETER_INSERT;
use igvm_defs::IGVM_VHS_SNP_ID_BLOCK;
use igvm_defs::IGVM_VHS_SUPPORTED_PLATFORM;
use igvm_defs::IgvmPageDataFlags;
use igvm_defs::IgvmPageDataType;
use igvm_defs::IgvmPlatformType;
use p384::ecdsa::SigningKey;
use proptest::prelude::*;
use rand_core::OsRng;
use snp::digest::LaunchDigest;
use snp::digest::launch_digest;
use snp::identity::IdAuth;
use snp::image::igvm::Igvm;
use snp::image::igvm::IgvmError;
use snp::image::igvm::ZeroPages;
use snp::image::igvm::id_block_header;
use snp::plan::Bytes;
use snp::plan::PlanError;
use snp::vmsa::VMSA_GPA;
use snp::vmsa::VmsaState;
use test_support::identity::id_block;
use test_support::igvm::seal;
use test_support::igvm::with_header;
use zerocopy::FromBytes as _;

const MASK: u32 = 1;

/// One directive that is measured, or not.
#[derive(Clone, Debug)]
enum Step {
    Data(u8, usize),
    NoData,
    Unmeasured(u8),
    Shared(u8),
    Secrets,
    Cpuid,
    Parameters(u64),
}

fn any_steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        4 => (any::<u8>(), 1usize..=4096).prop_map(|(byte, len)| Step::Data(byte, len)),
        2 => Just(Step::NoData),
        1 => any::<u8>().prop_map(Step::Unmeasured),
        1 => any::<u8>().prop_map(Step::Shared),
        1 => Just(Step::Secrets),
        1 => Just(Step::Cpuid),
        1 => (1u64..4).prop_map(Step::Parameters),
    ];
    proptest::collection::vec(step, 1..40)
}

fn vmsa(state: &VmsaState) -> Box<SevVmsa> {
    Box::new(SevVmsa::read_from_bytes(&state.encode()).unwrap())
}

fn boot_state() -> VmsaState {
    VmsaState { cr0: 0x31, rip: 0x10_0000, ..VmsaState::reset() }
}

fn directives(steps: &[Step]) -> Vec<IgvmDirectiveHeader> {
    let mut gpa = 0x10_0000;
    let mut areas = 0;
    let mut list = Vec::new();
    for step in steps {
        let flags = IgvmPageDataFlags::new();
        let mut page = |flags, data_type, data| {
            list.push(IgvmDirectiveHeader::PageData {
                gpa,
                compatibility_mask: MASK,
                flags,
                data_type,
                data,
            });
            gpa += 0x1000;
        };
        match step {
            Step::Data(byte, len) => page(flags, IgvmPageDataType::NORMAL, vec![byte | 1; *len]),
            Step::NoData => page(flags, IgvmPageDataType::NORMAL, vec![]),
            Step::Unmeasured(byte) => {
                page(flags.with_unmeasured(true), IgvmPageDataType::NORMAL, vec![*byte; 4096])
            }
            Step::Shared(byte) => page(flags.with_shared(true), IgvmPageDataType::NORMAL, vec![*byte; 4096]),
            Step::Secrets => page(flags, IgvmPageDataType::SECRETS, vec![]),
            Step::Cpuid => page(flags, IgvmPageDataType::CPUID_DATA, vec![]),
            Step::Parameters(pages) => {
                let number_of_bytes = pages * 0x1000;
                list.push(IgvmDirectiveHeader::ParameterArea {
                    number_of_bytes,
                    parameter_area_index: areas,
                    initial_data: vec![],
                });
                list.push(IgvmDirectiveHeader::ParameterInsert(IGVM_VHS_PARAMETER_INSERT {
                    gpa,
                    compatibility_mask: MASK,
                    parameter_area_index: areas,
                }));
                gpa += number_of_bytes;
                areas += 1;
            }
        }
    }
    list
}

fn platform(highest_vtl: u8) -> Vec<IgvmPlatformHeader> {
    vec![IgvmPlatformHeader::SupportedPlatform(IGVM_VHS_SUPPORTED_PLATFORM {
        compatibility_mask: MASK,
        highest_vtl,
        platform_type: IgvmPlatformType::SEV_SNP,
        platform_version: 1,
        shared_gpa_boundary: 0,
    })]
}

fn policy() -> Vec<IgvmInitializationHeader> {
    vec![IgvmInitializationHeader::GuestPolicy { policy: 0x3_0000, compatibility_mask: MASK }]
}

/// The file, and the digest that the `igvm` crate computes.
fn file(steps: &[Step], state: &VmsaState) -> (Vec<u8>, [u8; 48]) {
    let mut list = directives(steps);
    list.push(IgvmDirectiveHeader::SnpVpContext {
        gpa: VMSA_GPA,
        compatibility_mask: MASK,
        vp_index: 0,
        vmsa: vmsa(state),
    });
    let digest = generate_snp_measurement(&policy(), &list, MASK).unwrap();
    let file = IgvmFile::new(IgvmRevision::V1, platform(0), policy(), list).unwrap();
    let mut bytes = Vec::new();
    file.serialize(&mut bytes).unwrap();
    (bytes, digest)
}

fn parse(file: &[u8], zero_pages: ZeroPages) -> Result<Igvm, IgvmError> {
    Igvm::parse(&Bytes::from(file.to_vec()), zero_pages)
}

proptest! {
    #![proptest_config(support::config(150))]

    #[test]
    fn digests_agree_with_the_igvm_crate(steps in any_steps()) {
        let (file, expected) = file(&steps, &boot_state());
        let igvm = parse(&file, ZeroPages::Normal).unwrap();
        prop_assert_eq!(igvm.digests().0, LaunchDigest(expected));
        // What KVM would launch has the same digest, or is refused.
        prop_assert_eq!(launch_digest(&igvm.kvm_plan().unwrap()).unwrap(), LaunchDigest(expected));
        let has_empty = steps.iter().any(|step| matches!(step, Step::NoData));
        let zero = parse(&file, ZeroPages::Zero).unwrap();
        prop_assert_eq!(zero.digests().0 != LaunchDigest(expected), has_empty);
    }

    #[test]
    fn a_damaged_file_never_panics(
        steps in any_steps(),
        damage in proptest::collection::vec((any::<usize>(), any::<u8>()), 1..12),
        cut in any::<usize>(),
    ) {
        let (mut file, _) = file(&steps, &boot_state());
        // Most of the damage goes to the headers, which come first.
        for (at, value) in damage {
            let range = if value & 3 == 0 { file.len() } else { file.len().min(24 + 32 * steps.len()) };
            file[at % range] = value;
        }
        if cut.is_multiple_of(4) {
            file.truncate(cut / 4 % file.len());
        }
        let _ = parse(&file, ZeroPages::Normal);
        if file.len() >= 24 {
            seal(&mut file);
            if let Ok(igvm) = parse(&file, ZeroPages::Zero) {
                let _ = igvm.kvm_plan();
                let _ = igvm.check_identity();
            }
        }
    }
}

#[test]
fn an_id_block_in_the_file_must_be_for_the_file() {
    let (file, digest) = file(&[Step::Data(1, 10), Step::NoData], &boot_state());
    let key = SigningKey::random(&mut OsRng);
    let with_block = |digest: LaunchDigest| {
        let block = id_block(digest);
        let auth = IdAuth::sign(&block, &key, Some(&key));
        with_header(&file, 0x30b, &id_block_header(&block, &auth, MASK))
    };
    let good = with_block(LaunchDigest(digest));
    let igvm = parse(&good, ZeroPages::Normal).unwrap();
    igvm.check_identity().unwrap();
    let (read, auth) = igvm.identity.clone().unwrap();
    assert_eq!(read, id_block(LaunchDigest(digest)));
    auth.check_signatures(&read).unwrap();
    // Under the other convention the same file has another digest, and the message says so.
    let error = parse(&good, ZeroPages::Zero).unwrap().check_identity().unwrap_err().to_string();
    assert!(error.contains("with the other convention it matches"), "{error}");
    let wrong = parse(&with_block(LaunchDigest([9; 48])), ZeroPages::Normal).unwrap();
    let error = wrong.check_identity().unwrap_err().to_string();
    assert!(error.contains("with neither convention"), "{error}");
    // The specification's own structure finds the fields where we put them.
    let body = id_block_header(&read, &auth, MASK);
    let theirs = IGVM_VHS_SNP_ID_BLOCK::read_from_bytes(&body).unwrap();
    assert_eq!((theirs.ld, theirs.guest_svn, theirs.version, theirs.author_key_enabled), (digest, 7, 1, 1));
    let id_key = auth.id_key.encode();
    assert_eq!(theirs.id_public_key.qx, id_key[4..76]);
    assert_eq!(theirs.author_public_key.qy, id_key[76..148]);
    assert_eq!(theirs.id_key_signature.s_comp, auth.block_signature.fields()[72..]);
}

#[test]
fn what_kvm_cannot_import_is_refused_with_the_reason() {
    let refusal = |state: VmsaState| {
        let (file, _) = file(&[Step::Data(1, 1)], &state);
        parse(&file, ZeroPages::Normal).unwrap().kvm_plan().unwrap_err().to_string()
    };
    assert!(refusal(VmsaState { cr0: 0x10, ..boot_state() }).contains("CR0"));
    assert!(refusal(VmsaState { efer: 0, ..boot_state() }).contains("SVME"));
    assert!(refusal(VmsaState { sev_features: 3, ..boot_state() }).contains("virtual top of memory"));
    assert!(refusal(VmsaState { dr7: 0x401, ..boot_state() }).contains("DR7"));

    let list = |index: u16, gpa: u64, state: Box<SevVmsa>| {
        let context =
            IgvmDirectiveHeader::SnpVpContext { gpa, compatibility_mask: MASK, vp_index: index, vmsa: state };
        [directives(&[Step::Data(1, 1)]), vec![context]].concat()
    };
    let refuse = |list: Vec<IgvmDirectiveHeader>| {
        let file = IgvmFile::new(IgvmRevision::V1, platform(0), policy(), list).unwrap();
        let mut bytes = Vec::new();
        file.serialize(&mut bytes).unwrap();
        parse(&bytes, ZeroPages::Normal).unwrap().kvm_plan().unwrap_err().to_string()
    };
    let mut star = vmsa(&boot_state());
    star.star = 5;
    let error = refuse(list(0, VMSA_GPA, star));
    assert!(error.contains("0x200"), "the offset of STAR: {error}");
    assert!(refuse(list(0, 0x5000, vmsa(&boot_state()))).contains("save area is at 0x5000"));
    assert!(refuse(directives(&[Step::Data(1, 1)])).contains("no save area"));
}

#[test]
fn malformed_headers_are_named_with_offset_and_expectation() {
    let (good, _) = file(&[Step::Data(1, 10)], &boot_state());
    let refusal = |change: &dyn Fn(&mut Vec<u8>)| {
        let mut file = good.clone();
        change(&mut file);
        parse(&file, ZeroPages::Normal).unwrap_err().to_string()
    };
    assert!(refusal(&|f| f[0] = 0).contains("offset 0x0: magic number"));
    assert!(refusal(&|f| f[4] = 3).contains("format version is 0x3, expected 1 or 2"));
    assert!(refusal(&|f| f.truncate(10)).contains("ends in the fixed header, expected 14 more bytes"));
    assert!(refusal(&|f| f[16] ^= 1).contains("offset 0x10: total file size"));
    assert!(refusal(&|f| f[30] ^= 1).contains("offset 0x14: checksum"));
    let unknown = with_header(&good, 0x399, &[]);
    assert!(
        parse(&unknown, ZeroPages::Normal).unwrap_err().to_string().contains("type of a header is 0x399")
    );
    assert!(
        parse(&with_header(&good, 0x8000_0399, &[]), ZeroPages::Normal).is_ok(),
        "an optional one is passed over"
    );
    let mut elsewhere = vec![0; 24];
    elsewhere[8] = 1;
    elsewhere[12..16].copy_from_slice(&0xffff_f000u32.to_le_bytes());
    let error = parse(&with_header(&good, 0x302, &elsewhere), ZeroPages::Normal).unwrap_err().to_string();
    assert!(error.contains("file offset of a page is 0xfffff000"), "{error}");
}

/// A small file must not make the digest long: each page of an area is a link of its chain.
#[test]
fn a_shared_page_over_a_measured_or_a_shared_one_is_refused_before_the_launch() {
    let (file, _) = file(&[Step::Data(1, 4096), Step::Shared(2)], &boot_state());
    assert!(parse(&file, ZeroPages::Normal).unwrap().kvm_plan().is_ok());
    for gpa in [0x10_0000u64, 0x10_1000] {
        // PAGE_DATA: address, mask, file offset, flags (bit 2: shared), type.
        let body =
            [&gpa.to_le_bytes()[..], &MASK.to_le_bytes(), &[0; 4], &4u32.to_le_bytes(), &[0; 4]].concat();
        let again = with_header(&file, 0x302, &body);
        let error = parse(&again, ZeroPages::Normal).unwrap().kvm_plan().unwrap_err();
        assert!(
            matches!(&error, IgvmError::Plan(PlanError::Overlap { gpa: at, .. }) if *at == gpa),
            "{error}"
        );
    }
}

#[test]
fn what_is_there_twice_is_refused_because_readers_differ_in_which_they_take() {
    let (good, _) = file(&[Step::Parameters(1)], &boot_state());
    let words = |words: &[u32]| words.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<u8>>();
    let refusal = |file: &[u8]| parse(file, ZeroPages::Normal).unwrap_err().to_string();
    // PARAMETER_INSERT: address, mask, index.
    let again = with_header(&good, 0x303, &words(&[0x40_0000, 0, MASK, 0]));
    assert!(refusal(&again).contains("an area that is inserted once"), "{}", refusal(&again));
    // GUEST_POLICY: policy, mask, reserved.
    let policy = with_header(&good, 0x101, &words(&[0xb_0000, 0, MASK, 0]));
    assert!(refusal(&policy).contains("another guest policy is 0xb0000"), "{}", refusal(&policy));
    let other = with_header(&good, 0x101, &words(&[0xb_0000, 0, MASK << 1, 0]));
    assert!(parse(&other, ZeroPages::Normal).is_ok(), "another platform's policy");
    // PARAMETER_AREA: size, index, offset of data.
    let mut areas = good.clone();
    for index in 1..256 {
        areas = with_header(&areas, 0x301, &words(&[0x1000, 0, index, 0]));
    }
    assert!(parse(&areas, ZeroPages::Normal).is_ok());
    areas = with_header(&areas, 0x301, &words(&[0x1000, 0, 256, 0]));
    assert!(refusal(&areas).contains("at most 256 areas"), "{}", refusal(&areas));

    let key = SigningKey::random(&mut OsRng);
    let block = id_block(parse(&good, ZeroPages::Normal).unwrap().digests().0);
    let mut body = id_block_header(&block, &IdAuth::sign(&block, &key, Some(&key)), MASK);
    let signed = with_header(&good, 0x30b, &body);
    assert!(parse(&signed, ZeroPages::Normal).unwrap().check_identity().is_ok());
    assert!(refusal(&with_header(&signed, 0x30b, &body)).contains("ID block for this platform"));
    body[100] = 2;
    assert!(refusal(&with_header(&good, 0x30b, &body)).contains("author key algorithm is 0x2, expected 1"));
}
