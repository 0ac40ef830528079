// SPDX-License-Identifier: Apache-2.0
//! The order and the errno of KVM's SEV commands, one test per rule.

use p384::ecdsa::SigningKey;
use p384::ecdsa::signature::Signer as _;
use proptest::prelude::*;
use rand_core::OsRng;
use snp::attest::report::Report;
use snp::identity::block::IdAuth;
use snp::identity::block::IdBlock;

use super::*;
use crate::faults::CommandFault;
use crate::faults::Faults;
use crate::faults::Trigger;
use crate::firmware::message;
use crate::firmware::message::Message;
use crate::firmware::testing::platform;
use crate::memory::testing::TestMemory;
use crate::rmp::TwoMib;
use crate::vm::VmConfig;

const RAM: u64 = 0x40_0000;
/// Two slots, without a gap.
const SLOT: u64 = 0x10_0000;

fn vm_with(commands: Vec<CommandFault>) -> (VmModel, TestMemory) {
    let vm = VmModel::new(VmConfig {
        platform: platform(),
        ram: vec![0..SLOT, SLOT..RAM],
        vmsa_features: 1 << 5,
        policy_rules: snp::policy::PolicyRules::LINUX_6_12,
        two_mib: TwoMib::Accept,
        faults: Faults { commands, ..Faults::default() },
    });
    (vm, TestMemory::new(RAM as usize))
}

fn vm() -> (VmModel, TestMemory) {
    vm_with(vec![])
}

const START: Start = Start { policy: 0x3_0000, gosvw: [0; 16], flags: 0 };

fn started() -> (VmModel, TestMemory) {
    started_with(vec![])
}

fn started_with(commands: Vec<CommandFault>) -> (VmModel, TestMemory) {
    let (vm, mem) = vm_with(commands);
    vm.init2(&Init2::default()).unwrap();
    vm.set_attributes(0, RAM, ATTRIBUTE_PRIVATE, 0).unwrap();
    vm.launch_start(&START, &mut OsRng).unwrap();
    (vm, mem)
}

fn update(gpa: u64, pages: u64, page_type: PageType) -> Update {
    Update {
        gfn_start: gpa / PAGE_SIZE,
        uaddr: 0x7000,
        len: pages * PAGE_SIZE,
        page_type: page_type as u8,
        flags: 0,
    }
}

fn kvm(errno: Errno) -> CommandError {
    CommandError { errno, firmware: FwStatus(0) }
}

fn firmware(status: FwStatus) -> CommandError {
    CommandError { errno: Errno::EIO, firmware: status }
}

#[test]
fn commands_before_init2_are_refused_each_in_its_way() {
    let (vm, mem) = vm();
    assert_eq!(vm.launch_start(&START, &mut OsRng), Err(kvm(Errno::ENOTTY)));
    let result = vm.launch_update(&mut update(0, 1, PageType::Normal), &mut [0; 4096], &mem);
    assert_eq!(result, Err(kvm(Errno::EINVAL)));
    assert_eq!(vm.launch_finish(&FinishArgs::default(), &[]), Err(kvm(Errno::ENOTTY)));
    assert_eq!(vm.may_run(), Err(RunRefusal::Errno(Errno::EINVAL)));
}

#[test]
fn certificates_are_enabled_between_init2_and_the_first_vcpu() {
    let (vm, _) = vm();
    assert_eq!(vm.enable_req_certs(), Err(kvm(Errno::EINVAL)));
    vm.init2(&Init2::default()).unwrap();
    assert_eq!(vm.enable_req_certs(), Ok(()));
    vm.create_vcpu(0).unwrap();
    assert_eq!(vm.enable_req_certs(), Err(kvm(Errno::EINVAL)));
}

#[test]
fn init2_refuses_vcpus_features_flags_and_versions_and_a_second_call() {
    let invalid = Err(kvm(Errno::EINVAL));
    let (vm, _) = vm();
    // KVM adds SNP itself, and refuses a caller that asks for it.
    assert_eq!(vm.init2(&Init2 { vmsa_features: 1, ..Init2::default() }), invalid);
    assert_eq!(vm.init2(&Init2 { flags: 1, ..Init2::default() }), invalid);
    // Linux 7.3, sev.c, __sev_guest_init: an SNP guest needs version 2.
    assert_eq!(vm.init2(&Init2 { ghcb_version: 1, ..Init2::default() }), invalid);
    assert_eq!(vm.init2(&Init2 { ghcb_version: 3, ..Init2::default() }), invalid);
    vm.init2(&Init2 { vmsa_features: 1 << 5, ghcb_version: 2, flags: 0 }).unwrap();
    assert_eq!(vm.sev_status(), 0x21 << 2 | 3);
    assert_eq!(vm.init2(&Init2::default()), Err(kvm(Errno::EPERM)));
    let (vm, _) = super::tests::vm();
    vm.create_vcpu(0).unwrap();
    assert_eq!(vm.init2(&Init2::default()), invalid);
}

#[test]
fn start_refuses_policies_flags_and_a_second_call() {
    let (vm, _) = vm();
    vm.init2(&Init2::default()).unwrap();
    for policy in [0, 0x1_0000, 0x2_0000, 0x7_0000, 0x13_0000, 0x23_0000, 1 << 40 | 0x3_0000] {
        let result = vm.launch_start(&Start { policy, ..START }, &mut OsRng);
        assert_eq!(result, Err(kvm(Errno::EINVAL)), "{policy:#x}");
    }
    assert_eq!(vm.launch_start(&Start { flags: 1, ..START }, &mut OsRng), Err(kvm(Errno::EINVAL)));
    // ABI 2.0 is a question for the firmware; afterwards another START is possible.
    let result = vm.launch_start(&Start { policy: 0x3_0200, ..START }, &mut OsRng);
    assert_eq!(result, Err(firmware(FwStatus::POLICY_FAILURE)));
    vm.launch_start(&START, &mut OsRng).unwrap();
    assert_eq!(vm.launch_start(&START, &mut OsRng), Err(kvm(Errno::EINVAL)));
}

#[test]
fn update_refuses_bad_arguments() {
    let (vm, mem) = started();
    let good = update(0, 1, PageType::Normal);
    let bad = [
        Update { len: 100, ..good },
        Update { flags: 1, ..good },
        Update { page_type: 0, ..good },
        Update { page_type: 2, ..good },
        Update { page_type: 7, ..good },
        Update { gfn_start: RAM / PAGE_SIZE, ..good },
        Update { gfn_start: u64::MAX, ..good },
    ];
    for mut args in bad {
        let result = vm.launch_update(&mut args, &mut [0; 4096], &mem);
        assert_eq!(result, Err(kvm(Errno::EINVAL)), "{args:?}");
    }
}

/// Linux 7.2.13 and 7.3.4, `sev.c:snp_launch_update`: a source that does not begin at a page, no source, and
/// nothing to add are EINVAL before any page is looked at. Linux 6.12.117 takes all three.
#[test]
fn a_source_that_is_not_page_aligned_and_an_empty_range_are_refused() {
    let (vm, mem) = started();
    let digest = vm.launch_digest();
    for page_type in [PageType::Normal, PageType::Unmeasured, PageType::Secrets, PageType::Cpuid] {
        let good = update(0, 1, page_type);
        // 16 is where the C library's large allocations begin.
        let bad = [
            Update { uaddr: 0, ..good },
            Update { uaddr: 0x7010, ..good },
            Update { uaddr: 0x7fff, ..good },
            Update { len: 0, ..good },
        ];
        for mut args in bad {
            let result = vm.launch_update(&mut args, &mut [0; 4096], &mem);
            assert_eq!(result, Err(kvm(Errno::EINVAL)), "{args:?}");
        }
    }
    // ZERO pages have no source, so its address does not matter; the length does.
    let zero = update(0, 1, PageType::Zero);
    assert_eq!(vm.launch_update(&mut Update { len: 0, ..zero }, &mut [], &mem), Err(kvm(Errno::EINVAL)));
    assert_eq!(vm.launch_digest(), digest, "nothing was measured");
    vm.launch_update(&mut Update { uaddr: 0x7010, ..zero }, &mut [], &mem).unwrap();
}

/// Linux 6.12.117 and 7.3.4, `kvm_main.c:kvm_vm_ioctl_create_vcpu` asks nothing of the launch.
#[test]
fn a_vcpu_can_be_created_after_the_launch_and_is_not_measured() {
    let (vm, _) = started();
    vm.create_vcpu(0).unwrap();
    vm.launch_finish(&FinishArgs::default(), &[VmsaState::reset()]).unwrap();
    let digest = vm.launch_digest();
    assert_eq!(vm.create_vcpu(1), Ok(()));
    assert_eq!(vm.create_vcpu(1), Err(Errno::EEXIST));
    assert_eq!(vm.launch_digest(), digest);
}

#[test]
fn kvm_hides_why_it_refuses_the_first_page() {
    let (vm, mem) = started();
    vm.set_attributes(0x8000, PAGE_SIZE, 0, 0).unwrap();
    let mut shared = update(0x8000, 1, PageType::Normal);
    assert_eq!(vm.launch_update(&mut shared, &mut [0; 4096], &mem), Err(kvm(Errno::EIO)));
    // No source bytes: a pointer to nowhere.
    assert_eq!(vm.launch_update(&mut update(0, 1, PageType::Normal), &mut [], &mem), Err(kvm(Errno::EIO)));
    vm.launch_update(&mut update(0, 1, PageType::Normal), &mut [1; 4096], &mem).unwrap();
    let again = vm.launch_update(&mut update(0, 1, PageType::Normal), &mut [1; 4096], &mem);
    assert_eq!(again, Err(kvm(Errno::EIO)), "populated before");
}

#[test]
fn update_advances_its_arguments_and_stops_at_the_end_of_a_slot() {
    let (vm, mem) = started();
    let mut args = update(SLOT - PAGE_SIZE, 3, PageType::Normal);
    let mut source = vec![7; 3 * 4096];
    vm.launch_update(&mut args, &mut source, &mem).unwrap();
    assert_eq!((args.gfn_start, args.uaddr, args.len), (SLOT / PAGE_SIZE, 0x8000, 2 * PAGE_SIZE));
    vm.launch_update(&mut args, &mut source[4096..], &mem).unwrap();
    assert_eq!(args.len, 0);
    assert_eq!(mem.bytes::<1>(SLOT + PAGE_SIZE, View::Private), [7]);
    assert!(vm.pages.all(SLOT - PAGE_SIZE, 3 * PAGE_SIZE, |s| s.usable() && s.launched()));
}

#[test]
fn zero_pages_need_no_source_and_do_not_move_uaddr() {
    let (vm, mem) = started();
    let mut args = update(0, 4, PageType::Zero);
    vm.launch_update(&mut args, &mut [], &mem).unwrap();
    assert_eq!((args.gfn_start, args.uaddr, args.len), (4, 0x7000, 0));
}

#[test]
fn a_bad_page_after_good_ones_is_partial_progress_and_then_an_error() {
    let (vm, mem) = started();
    vm.set_attributes(0x2000, PAGE_SIZE, 0, 0).unwrap();
    let mut args = update(0, 4, PageType::Normal);
    let mut source = vec![1; 4 * 4096];
    vm.launch_update(&mut args, &mut source, &mem).unwrap();
    assert_eq!(args.len, 2 * PAGE_SIZE);
    assert_eq!(vm.launch_update(&mut args, &mut source[8192..], &mem), Err(kvm(Errno::EIO)));
}

#[test]
fn a_refused_cpuid_page_comes_back_in_the_source() {
    let (vm, mem) = started();
    let mut source = [0; 4096];
    source[0] = 1;
    source[16..20].copy_from_slice(&0x8000_001fu32.to_le_bytes());
    // Bits that the right C-bit, 39, has too: a correction keeps others, and is refused again.
    source[16 + 28] = 7;
    let before = vm.launch_digest();
    let result = vm.launch_update(&mut update(0x3000, 1, PageType::Cpuid), &mut source, &mem);
    assert_eq!(result, Err(firmware(FwStatus::INVALID_PARAM)));
    assert_eq!(source[16 + 28], 39);
    assert_eq!(vm.launch_digest(), before);
    vm.launch_update(&mut update(0x3000, 1, PageType::Cpuid), &mut source, &mem).unwrap();
}

#[test]
fn finish_seals_the_guest() {
    let (vm, mem) = started();
    vm.create_vcpu(0).unwrap();
    assert_eq!(vm.create_vcpu(0), Err(Errno::EEXIST));
    assert_eq!(vm.may_run(), Err(RunRefusal::FailEntry));
    assert!(!vm.registers_sealed());
    assert_eq!(
        vm.launch_finish(&FinishArgs { flags: 1, ..FinishArgs::default() }, &[]),
        Err(kvm(Errno::EINVAL))
    );
    vm.launch_finish(&FinishArgs::default(), &[VmsaState::reset()]).unwrap();
    assert_eq!(vm.may_run(), Ok(()));
    assert!(vm.registers_sealed());
    let again = vm.launch_finish(&FinishArgs::default(), &[VmsaState::reset()]);
    assert_eq!(again, Err(kvm(Errno::EINVAL)));
    let late = vm.launch_update(&mut update(0, 1, PageType::Normal), &mut [0; 4096], &mem);
    assert_eq!(late, Err(firmware(FwStatus::INVALID_GUEST_STATE)));
}

#[test]
fn a_breakpoint_in_dr7_is_refused_by_finish() {
    let (vm, _) = started();
    vm.create_vcpu(0).unwrap();
    let state = VmsaState { dr7: 0x401, ..VmsaState::reset() };
    assert_eq!(vm.launch_finish(&FinishArgs::default(), &[state]), Err(kvm(Errno::EINVAL)));
}

#[test]
fn attributes_must_be_known_aligned_and_not_wrap() {
    let (vm, _) = vm();
    for (address, size, attributes, flags) in [
        (0, 0, 8, 0),
        (1, PAGE_SIZE, 8, 0),
        (0, 100, 8, 0),
        (!0xfff, 2 * PAGE_SIZE, 8, 0),
        (0, PAGE_SIZE, 4, 0),
        (0, PAGE_SIZE, 8, 1),
    ] {
        assert_eq!(vm.set_attributes(address, size, attributes, flags), Err(Errno::EINVAL));
    }
    // Memory that is not there can have attributes.
    assert_eq!(vm.set_attributes(RAM, 2 * PAGE_SIZE, 8, 0).unwrap().outside_ram, 2);
}

#[test]
fn each_step_can_be_made_to_fail() {
    let fault = |step, injection| vec![CommandFault { step, trigger: Trigger::times(1), injection }];
    let (vm, _) = vm_with(fault(Step::Init2, Injection::Errno(Errno::EBUSY)));
    assert_eq!(vm.init2(&Init2::default()), Err(kvm(Errno::EBUSY)));
    vm.init2(&Init2::default()).unwrap();

    let (vm, _) = vm_with(fault(Step::Start, Injection::Firmware(FwStatus::DFFLUSH_REQUIRED)));
    vm.init2(&Init2::default()).unwrap();
    assert_eq!(vm.launch_start(&START, &mut OsRng), Err(firmware(FwStatus::DFFLUSH_REQUIRED)));

    let (vm, _) = vm_with(fault(Step::CreateVcpu, Injection::Errno(Errno::ENOMEM)));
    assert_eq!(vm.create_vcpu(0), Err(Errno::ENOMEM));

    let (vm, _) = vm_with(fault(Step::SetAttributes, Injection::Errno(Errno::ENOMEM)));
    assert_eq!(vm.set_attributes(0, PAGE_SIZE, 8, 0), Err(Errno::ENOMEM));

    let (vm, _) = started_with(fault(Step::Finish, Injection::Firmware(FwStatus::BAD_MEASUREMENT)));
    assert_eq!(vm.launch_finish(&FinishArgs::default(), &[]), Err(firmware(FwStatus::BAD_MEASUREMENT)));
    let again = vm.launch_finish(&FinishArgs::default(), &[]);
    assert_eq!(again, Err(kvm(Errno::EINVAL)), "a failed FINISH is final");
}

#[test]
fn a_signal_or_eagain_in_the_middle_of_an_update_is_partial_progress() {
    for (injection, error) in [
        (Injection::Stop, kvm(Errno::EIO)),
        (Injection::Errno(Errno::EAGAIN), kvm(Errno::EAGAIN)),
        (Injection::Firmware(FwStatus::INVALID_PAGE_STATE), firmware(FwStatus::INVALID_PAGE_STATE)),
    ] {
        let trigger = Trigger::after(2, 2);
        let (vm, mem) = started_with(vec![CommandFault { step: Step::UpdatePage, trigger, injection }]);
        let mut args = update(0, 4, PageType::Normal);
        let mut source = vec![1; 4 * 4096];
        vm.launch_update(&mut args, &mut source, &mem).unwrap();
        assert_eq!(args.len, 2 * PAGE_SIZE);
        assert_eq!(vm.launch_update(&mut args, &mut source[8192..], &mem), Err(error));
        vm.launch_update(&mut args, &mut source[8192..], &mem).unwrap();
        assert_eq!(args.len, 0);
    }
}

// --- ID blocks

fn key_struct(key: &SigningKey) -> Vec<u8> {
    let point = key.verifying_key().to_encoded_point(false);
    let mut out = vec![0; 1028];
    out[0] = 2;
    for (at, coordinate) in [(4, point.x()), (76, point.y())] {
        let bytes: Vec<u8> = coordinate.unwrap().iter().rev().copied().collect();
        out[at..at + 48].copy_from_slice(&bytes);
    }
    out
}

fn sign(key: &SigningKey, message: &[u8]) -> Vec<u8> {
    let signature: p384::ecdsa::Signature = key.sign(message);
    let (r, s) = signature.split_bytes();
    let mut out = vec![0; 512];
    out[..48].copy_from_slice(&r.iter().rev().copied().collect::<Vec<u8>>());
    out[72..120].copy_from_slice(&s.iter().rev().copied().collect::<Vec<u8>>());
    out
}

struct Owner {
    id: SigningKey,
    author: SigningKey,
}

impl Owner {
    fn new() -> Self {
        Owner { id: SigningKey::random(&mut OsRng), author: SigningKey::random(&mut OsRng) }
    }

    fn block(digest: LaunchDigest, policy: u64) -> [u8; 96] {
        let mut block = [0; 96];
        block[..48].copy_from_slice(&digest.0);
        block[48] = 0xfa;
        block[64] = 0x1a;
        block[80] = 1;
        block[84] = 5;
        block[88..].copy_from_slice(&policy.to_le_bytes());
        block
    }

    fn auth(&self, block: &[u8; 96]) -> [u8; 4096] {
        let mut page = [0; 4096];
        let mut put = |at: usize, bytes: &[u8]| page[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &[1, 0, 0, 0, 1]);
        put(64, &sign(&self.id, block));
        put(576, &key_struct(&self.id));
        put(1664, &sign(&self.author, &key_struct(&self.id)));
        put(2176, &key_struct(&self.author));
        page
    }
}

#[test]
fn a_signed_id_block_binds_the_guest_to_its_owner() {
    let (vm, mem) = started();
    let mut secrets = [0; 4096];
    vm.launch_update(&mut update(0x5000, 1, PageType::Secrets), &mut secrets, &mem).unwrap();
    let owner = Owner::new();
    let block = Owner::block(vm.launch_digest().unwrap(), START.policy);
    let auth = owner.auth(&block);
    let args = FinishArgs { id: Some((&block, &auth)), auth_key_en: true, ..FinishArgs::default() };
    vm.launch_finish(&args, &[]).unwrap();

    let key = mem.bytes::<32>(0x5020, View::Private);
    let request = Message { sequence: 1, message_type: 5, version: 1, vmpck: 0, payload: vec![0; 96] };
    let page = vm.guest_message(&message::seal(&request, &key).unwrap()).unwrap();
    let response = message::open(&page, message::header(&page).unwrap(), &key).unwrap();
    let report = Report::parse(&response.payload[0x20..]).unwrap();
    assert_eq!((report.family_id()[0], report.image_id()[0], report.guest_svn()), (0xfa, 0x1a, 5));
    use sha2::Digest as _;
    assert_eq!(report.id_key_digest()[..], sha2::Sha384::digest(key_struct(&owner.id))[..]);
    assert_eq!(report.author_key_digest()[..], sha2::Sha384::digest(key_struct(&owner.author))[..]);
    assert_eq!(report.key_info() & 1, 1);
}

/// The other side of the same structures: what `cvmm id-block` makes.
#[test]
fn the_projects_own_id_blocks_are_accepted() {
    for with_author in [false, true] {
        let (vm, _) = started();
        let block = IdBlock {
            launch_digest: vm.launch_digest().unwrap(),
            family_id: [1; 16],
            image_id: [2; 16],
            guest_svn: 3,
            policy: GuestPolicy(START.policy),
        };
        let owner = Owner::new();
        let auth = IdAuth::sign(&block, &owner.id, with_author.then_some(&owner.author));
        let (digest, policy) = (block.launch_digest, START.policy);
        let identity = id_block::check(&block.encode(), &auth.encode(), with_author, digest, policy).unwrap();
        assert_eq!((identity.family_id, identity.image_id, identity.guest_svn), ([1; 16], [2; 16], 3));
        assert_eq!(identity.id_key_digest, Some(auth.id_key.digest()));
        assert_eq!(identity.author_key_digest, auth.author.as_ref().map(|(key, _)| key.digest()));
        let (block, auth) = (block.encode(), auth.encode());
        let args =
            FinishArgs { id: Some((&block, &auth)), auth_key_en: with_author, ..FinishArgs::default() };
        vm.launch_finish(&args, &[]).unwrap();
    }
}

/// AMD-ASPFW, `sev_mcmd.c:snp_mcmd_launch_finish`: digest, policy, algorithm, signatures; the version is not
/// looked at.
#[test]
fn a_wrong_id_block_is_refused_with_the_firmwares_reason() {
    type Change = fn(&mut [u8; 96]);
    let changes: [(Change, Option<FwStatus>); 4] = [
        (|b| b[0] ^= 1, Some(FwStatus::BAD_MEASUREMENT)),
        (|b| b[90] ^= 8, Some(FwStatus::POLICY_FAILURE)),
        (|b| (b[0], b[90]) = (b[0] ^ 1, b[90] ^ 8), Some(FwStatus::BAD_MEASUREMENT)),
        (|b| b[80] = 2, None),
    ];
    for (change, status) in changes {
        let (vm, _) = started();
        let mut block = Owner::block(vm.launch_digest().unwrap(), START.policy);
        change(&mut block);
        let auth = Owner::new().auth(&block);
        let args = FinishArgs { id: Some((&block, &auth)), ..FinishArgs::default() };
        assert_eq!(vm.launch_finish(&args, &[]).err(), status.map(firmware));
    }
    // Wrong in more ways than one: another policy, an algorithm that does not exist, and so a signature that
    // does not hold.
    for (policy, algorithm, status) in
        [(8, 1, FwStatus::POLICY_FAILURE), (0, 1, FwStatus::INVALID_PARAM), (0, 0, FwStatus::BAD_SIGNATURE)]
    {
        let (vm, _) = started();
        let mut block = Owner::block(vm.launch_digest().unwrap(), START.policy);
        let mut auth = Owner::new().auth(&block);
        block[90] ^= policy;
        auth[0] ^= algorithm;
        auth[64] ^= 1;
        let args = FinishArgs { id: Some((&block, &auth)), ..FinishArgs::default() };
        assert_eq!(vm.launch_finish(&args, &[]), Err(firmware(status)));
    }
    // Changed after it was signed: block signature, ID key, and the author's signature only if there is one.
    for (at, author, status) in [
        (64, false, Some(FwStatus::BAD_SIGNATURE)),
        (580, false, Some(FwStatus::BAD_SIGNATURE)),
        (1664, true, Some(FwStatus::BAD_SIGNATURE)),
        (1664, false, None),
        (0, false, Some(FwStatus::INVALID_PARAM)),
    ] {
        let (vm, _) = started();
        let block = Owner::block(vm.launch_digest().unwrap(), START.policy);
        let mut auth = Owner::new().auth(&block);
        auth[at] ^= 1;
        let args = FinishArgs { id: Some((&block, &auth)), auth_key_en: author, ..FinishArgs::default() };
        assert_eq!(vm.launch_finish(&args, &[]).err(), status.map(firmware), "{at}");
    }
}

proptest! {
    #[test]
    fn no_arguments_panic(
        gfn in prop_oneof![any::<u64>(), 0u64..0x500],
        len in prop_oneof![any::<u64>(), (0u64..40).prop_map(|p| p * PAGE_SIZE)],
        page_type: u8,
        flags in 0u16..2,
        source in proptest::collection::vec(any::<u8>(), 0..9000),
        policy: u64,
        id in proptest::collection::vec(any::<u8>(), 4096),
    ) {
        let (vm, mem) = started();
        let mut args = Update { gfn_start: gfn, uaddr: gfn, len, page_type: page_type % 8, flags };
        let before = args;
        let mut source = source;
        if vm.launch_update(&mut args, &mut source, &mem).is_ok() {
            prop_assert!(args.len < before.len && args.gfn_start > before.gfn_start);
        } else {
            prop_assert_eq!(args, before);
        }
        let block: [u8; 96] = std::array::from_fn(|i| id[i]);
        let auth: [u8; 4096] = id.try_into().unwrap();
        let result = id_block::check(&block, &auth, true, LaunchDigest::START, policy);
        prop_assert!(result.is_err());
    }
}
