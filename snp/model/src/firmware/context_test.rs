// SPDX-License-Identifier: Apache-2.0
//! Launch contexts and guest messages, as an owner, a guest and a peer's verifier see them.

use proptest::prelude::*;
use rand_core::OsRng;
use sev::certs::snp::Verifiable as _;
use sev::firmware::guest::AttestationReport;
use sev::parser::ByteParser as _;

use super::*;
use crate::chain::verify_report_against_chain;
use crate::faults::Faults;
use crate::faults::Trigger;
use crate::firmware::message::Message;
use crate::firmware::testing::platform;
use snp::attest::report::Report;
use snp::digest::launch_digest;
use snp::plan::LaunchPlan;
use snp::plan::Record;
use snp::vmsa::VmsaState;

/// A running guest and its secrets page.
fn running(platform: &Platform) -> (GuestContext, Page) {
    let mut guest = GuestContext::start(0x3_0000, [0; 16], &mut OsRng).unwrap();
    let mut secrets = [0; 4096];
    guest.update(platform, PageType::Secrets, 0x5000, &mut secrets).unwrap();
    guest.finish(Finish { host_data: [9; 32], ..Finish::default() }).unwrap();
    (guest, secrets)
}

fn vmpck(secrets: &Page, i: usize) -> [u8; 32] {
    secrets[0x20 + i * 32..][..32].try_into().unwrap()
}

fn report_request(sequence: u64) -> Message {
    let mut payload = vec![0; 96];
    payload[..64].fill(0x5a);
    Message { sequence, message_type: 5, version: 1, vmpck: 0, payload }
}

/// The guest's side of a message, written from Linux' `struct snp_guest_msg_hdr` and `enc_dec_message`
/// (6.12), apart from the model's own code for it.
mod driver {
    use aes_gcm::Aes256Gcm;
    use aes_gcm::KeyInit as _;
    use aes_gcm::aead::AeadInPlace as _;

    use super::*;

    fn iv(seqno: u64) -> [u8; 12] {
        let mut iv = [0; 12];
        iv[..8].copy_from_slice(&seqno.to_le_bytes());
        iv
    }

    pub fn seal(m: &Message, key: &[u8; 32]) -> Page {
        let mut page = [0; 4096];
        page[0x20..0x28].copy_from_slice(&m.sequence.to_le_bytes());
        let size = (m.payload.len() as u16).to_le_bytes();
        // algo, hdr_version, hdr_sz, msg_type, msg_version, msg_sz, rsvd2, msg_vmpck
        let header = [1, 1, 0x60, 0, m.message_type, m.version, size[0], size[1], 0, 0, 0, 0, m.vmpck];
        page[0x30..0x3d].copy_from_slice(&header);
        let mut body = m.payload.clone();
        let cipher = Aes256Gcm::new(key.into());
        let iv = iv(m.sequence).into();
        let tag = cipher.encrypt_in_place_detached(&iv, &page[0x30..0x60], &mut body).unwrap();
        page[..16].copy_from_slice(&tag);
        page[0x60..0x60 + body.len()].copy_from_slice(&body);
        page
    }

    pub fn open(page: &Page, key: &[u8; 32]) -> Option<Message> {
        let sequence = u64::from_le_bytes(page[0x20..0x28].try_into().unwrap());
        let size = usize::from(u16::from_le_bytes([page[0x36], page[0x37]]));
        let mut payload = page[0x60..0x60 + size].to_vec();
        let cipher = Aes256Gcm::new(key.into());
        let (iv, tag) = (iv(sequence).into(), page[..16].into());
        cipher.decrypt_in_place_detached(&iv, &page[0x30..0x60], &mut payload, tag).ok()?;
        Some(Message { sequence, message_type: page[0x34], version: page[0x35], vmpck: page[0x3c], payload })
    }
}

fn ask(
    guest: &mut GuestContext,
    platform: &Platform,
    request: &Message,
    key: &[u8; 32],
) -> Result<Message, FwStatus> {
    let page = guest.request(platform, &driver::seal(request, key), &Faults::default())?;
    Ok(driver::open(&page, key).expect("the response must be authentic"))
}

#[test]
fn the_launched_digest_is_the_predicted_one() {
    let platform = platform();
    let plan = LaunchPlan {
        records: vec![
            Record::new(0x1000, PageType::Normal, vec![7; 5000], "code"),
            Record::empty(0x4000, 0x2000, PageType::Zero, "zero"),
            Record::empty(0x8000, 0x1000, PageType::Secrets, "secrets"),
            Record::new(0x9000, PageType::Cpuid, vec![0; 4096], "cpuid"),
            Record::new(0xa000, PageType::Unmeasured, vec![1; 4096], "host"),
        ],
        vcpus: vec![VmsaState::reset(), VmsaState { rip: 0x1000, ..VmsaState::reset() }],
    };
    let mut guest = GuestContext::start(0x3_0000, [0; 16], &mut OsRng).unwrap();
    for record in &plan.records {
        for offset in (0..record.len).step_by(4096) {
            let mut page = [0; 4096];
            record.read_page(offset, &mut page);
            guest.update(&platform, record.page_type, record.gpa + offset, &mut page).unwrap();
        }
    }
    for vcpu in &plan.vcpus {
        guest.update(&platform, PageType::Vmsa, 0, &mut vcpu.encode()).unwrap();
    }
    assert_eq!(guest.digest(), launch_digest(&plan).unwrap());
    let before = guest.digest();
    guest.update(&platform, PageType::Normal, 0xb000, &mut [0; 4096]).unwrap();
    assert_ne!(guest.digest(), before);
}

/// AMD-ASPFW, `sev_mcmd.c:snp_mcmd_launch_start`: unknown bits, bit 17, SMT and ABI version are all
/// POLICY_FAILURE.
#[test]
fn policies_that_the_platform_cannot_honour_are_refused() {
    for (policy, status) in [
        (0x1_0000, FwStatus::POLICY_FAILURE),
        (0x3_0000 | 1 << 30, FwStatus::POLICY_FAILURE),
        (0x2_0000, FwStatus::POLICY_FAILURE),
        (0x3_0200, FwStatus::POLICY_FAILURE),
        (0x3_0138, FwStatus::POLICY_FAILURE),
        (0x3_0000 | 1 << 24, FwStatus::POLICY_FAILURE),
    ] {
        assert_eq!(GuestContext::start(policy, [0; 16], &mut OsRng).unwrap_err(), status, "{policy:#x}");
    }
    GuestContext::start(0x3_0137, [0; 16], &mut OsRng).unwrap();
}

#[test]
fn commands_out_of_order_are_refused() {
    let platform = platform();
    let (mut guest, secrets) = running(&platform);
    let state = FwStatus::INVALID_GUEST_STATE;
    assert_eq!(guest.update(&platform, PageType::Normal, 0, &mut [0; 4096]), Err(state));
    assert_eq!(guest.finish(Finish::default()), Err(state));
    let mut launching = GuestContext::start(0x3_0000, [0; 16], &mut OsRng).unwrap();
    assert_eq!(ask(&mut launching, &platform, &report_request(1), &vmpck(&secrets, 0)), Err(state));
}

#[test]
fn a_zero_page_is_zero_whatever_the_host_put_there() {
    let platform = platform();
    let mut guest = GuestContext::start(0x3_0000, [0; 16], &mut OsRng).unwrap();
    let mut page = [7; 4096];
    guest.update(&platform, PageType::Zero, 0, &mut page).unwrap();
    assert_eq!(page, [0; 4096]);
}

#[test]
fn a_refused_cpuid_page_is_corrected_and_not_measured() {
    let platform = platform();
    let mut guest = GuestContext::start(0x3_0000, [0; 16], &mut OsRng).unwrap();
    let mut page = [0; 4096];
    page[0] = 1;
    page[16..20].copy_from_slice(&0x8000_001fu32.to_le_bytes());
    page[16 + 28] = 7;
    assert_eq!(guest.update(&platform, PageType::Cpuid, 0, &mut page), Err(FwStatus::INVALID_PARAM));
    assert_eq!(guest.digest(), LaunchDigest::START);
    assert_eq!(page[16 + 28], 39, "the platform's C-bit");
    guest.update(&platform, PageType::Cpuid, 0, &mut page).unwrap();
}

#[test]
fn a_peers_verifier_accepts_a_report() {
    let platform = platform();
    let (mut guest, secrets) = running(&platform);
    let response = ask(&mut guest, &platform, &report_request(1), &vmpck(&secrets, 0)).unwrap();
    assert_eq!((response.message_type, response.sequence), (6, 2));
    assert_eq!(response.payload.len(), 0x20 + 0x4a0);
    assert_eq!(response.payload[..8], [0, 0, 0, 0, 0xa0, 4, 0, 0]);
    let bytes = &response.payload[0x20..];

    let certs = platform.chain.certificates();
    let cert = |der: &[u8]| sev::certs::snp::Certificate::from_der(der).unwrap();
    let peer_chain = sev::certs::snp::Chain {
        ca: sev::certs::snp::ca::Chain { ark: cert(&certs.ark), ask: cert(&certs.ask) },
        vek: cert(&certs.vcek),
    };
    let peer = AttestationReport::from_bytes(bytes).unwrap();
    (&peer_chain, &peer).verify().unwrap();
    assert_eq!(peer.measurement[..], guest.digest().0);
    assert_eq!((peer.report_data[0], peer.host_data[0], peer.vmpl), (0x5a, 9, 0));
    assert_eq!(peer.reported_tcb.snp, 24);

    let report = Report::parse(bytes).unwrap();
    verify_report_against_chain(&report, &certs.vcek).unwrap();
    let mut forged = bytes.to_vec();
    forged[0x90] ^= 1;
    let error = verify_report_against_chain(&Report::parse(&forged).unwrap(), &certs.vcek).unwrap_err();
    assert!(error.to_string().contains("does not fit the bytes"), "{error}");
}

#[test]
fn a_replayed_or_skipped_sequence_number_is_refused_and_not_used_up() {
    let platform = platform();
    let (mut guest, secrets) = running(&platform);
    let key = vmpck(&secrets, 0);
    for wrong in [0, 2, 3, u64::MAX] {
        let result = ask(&mut guest, &platform, &report_request(wrong), &key);
        assert_eq!(result, Err(FwStatus::INVALID_PARAM), "{wrong}");
    }
    ask(&mut guest, &platform, &report_request(1), &key).unwrap();
    assert_eq!(ask(&mut guest, &platform, &report_request(1), &key), Err(FwStatus::INVALID_PARAM));
    assert_eq!(ask(&mut guest, &platform, &report_request(3), &key).unwrap().sequence, 4);
}

#[test]
fn a_changed_bit_or_a_wrong_key_is_a_bad_measurement() {
    let platform = platform();
    let (mut guest, secrets) = running(&platform);
    let page = driver::seal(&report_request(1), &vmpck(&secrets, 0));
    // Tag, sequence number, type, VMPCK, payload.
    for at in [0, 0x20, 0x34, 0x3c, 0x60, 0x60 + 95] {
        let mut changed = page;
        changed[at] ^= 1;
        let result = guest.request(&platform, &changed, &Faults::default());
        assert_eq!(result.unwrap_err(), FwStatus::BAD_MEASUREMENT, "{at:#x}");
    }
    let other = ask(&mut guest, &platform, &report_request(1), &vmpck(&secrets, 1));
    assert_eq!(other, Err(FwStatus::BAD_MEASUREMENT));
}

#[test]
fn a_malformed_header_is_an_invalid_parameter() {
    let platform = platform();
    let (mut guest, secrets) = running(&platform);
    let page = driver::seal(&report_request(1), &vmpck(&secrets, 0));
    // Algorithm, header version, header size, key number; payload size beyond the page.
    for (at, value) in [(0x30, 2), (0x31, 2), (0x32, 0x61), (0x3c, 4), (0x37, 0x10)] {
        let mut changed = page;
        changed[at] = value;
        let result = guest.request(&platform, &changed, &Faults::default());
        assert_eq!(result.unwrap_err(), FwStatus::INVALID_PARAM, "{at:#x}");
    }
}

#[test]
fn an_unknown_message_type_is_refused_and_its_number_not_used_up() {
    let platform = platform();
    let (mut guest, secrets) = running(&platform);
    let key = vmpck(&secrets, 0);
    for message_type in [0, 1, 4, 6, 7, 255] {
        let request = Message { message_type, ..report_request(1) };
        assert_eq!(ask(&mut guest, &platform, &request, &key), Err(FwStatus::INVALID_PARAM));
    }
    ask(&mut guest, &platform, &report_request(1), &key).unwrap();
}

#[test]
fn each_key_has_its_own_sequence_and_may_not_ask_for_more_privilege() {
    let platform = platform();
    let (mut guest, secrets) = running(&platform);
    ask(&mut guest, &platform, &report_request(1), &vmpck(&secrets, 0)).unwrap();
    let mut request = Message { vmpck: 2, ..report_request(1) };
    // VMPL 0 asked for with the key of VMPL 2: a response with a status in it.
    let response = ask(&mut guest, &platform, &request, &vmpck(&secrets, 2)).unwrap();
    assert_eq!((response.payload.len(), response.payload[0]), (0x20, 0x16));
    request.sequence = 3;
    request.payload[0x40] = 3;
    let response = ask(&mut guest, &platform, &request, &vmpck(&secrets, 2)).unwrap();
    assert_eq!(Report::parse(&response.payload[0x20..]).unwrap().vmpl(), 3);
}

#[test]
fn a_report_by_a_key_that_does_not_exist_is_refused_in_the_response() {
    let platform = platform();
    let (mut guest, secrets) = running(&platform);
    let mut request = report_request(1);
    request.payload[0x44] = 2; // VLEK
    let response = ask(&mut guest, &platform, &request, &vmpck(&secrets, 0)).unwrap();
    assert_eq!(response.payload[0], 0x27);
}

fn key_request(sequence: u64, select: u32, fields: u64, svn: u32, tcb: u64) -> Message {
    let mut payload = vec![0; 32];
    payload[0..4].copy_from_slice(&select.to_le_bytes());
    payload[8..16].copy_from_slice(&fields.to_le_bytes());
    payload[0x14..0x18].copy_from_slice(&svn.to_le_bytes());
    payload[0x18..].copy_from_slice(&tcb.to_le_bytes());
    Message { sequence, message_type: 3, version: 1, vmpck: 0, payload }
}

#[test]
fn derived_keys_depend_on_what_was_selected_and_on_nothing_else() {
    let platform = platform();
    let (mut a, a_secrets) = running(&platform);
    let (mut b, b_secrets) = running(&platform);
    let mut sequence = 1;
    let mut pair = |select, fields| {
        let request = key_request(sequence, select, fields, 0, 0);
        sequence += 2;
        let ka = ask(&mut a, &platform, &request, &vmpck(&a_secrets, 0)).unwrap();
        let kb = ask(&mut b, &platform, &request, &vmpck(&b_secrets, 0)).unwrap();
        assert_eq!((ka.message_type, ka.payload.len(), ka.payload[0]), (4, 64, 0));
        (ka.payload[0x20..].to_vec(), kb.payload[0x20..].to_vec())
    };
    // By the chip's key: the same for two launches of one image; by the guest's own key: different.
    let (a1, b1) = pair(0, 1 << 3);
    assert_eq!(a1, b1);
    let (a2, b2) = pair(1, 1 << 3);
    assert_ne!(a2, b2);
    let (a3, _) = pair(0, 1);
    assert_ne!(a1, a3);
    assert_ne!(a1, a2);
}

#[test]
fn a_derived_key_for_newer_versions_than_the_guests_is_refused() {
    let platform = platform();
    let (mut guest, secrets) = running(&platform);
    let key = vmpck(&secrets, 0);
    let requests = [
        key_request(1, 0, 0, 1, 0),
        key_request(3, 0, 0, 0, 0xff),
        key_request(5, 0, 1 << 6, 0, 0),
        key_request(7, 8, 0, 0, 0),
    ];
    for request in requests {
        let response = ask(&mut guest, &platform, &request, &key).unwrap();
        assert_eq!((response.payload[0], &response.payload[0x20..]), (0x16, &[0; 32][..]));
    }
}

#[test]
fn injected_message_faults_are_seen_by_the_guest() {
    let platform = platform();
    let (mut guest, secrets) = running(&platform);
    let key = vmpck(&secrets, 0);
    let faults = Faults {
        guest_request_bad_tag: Trigger::times(1),
        guest_request_bad_sequence: Trigger::after(1, 1),
        ..Faults::default()
    };
    let sealed = driver::seal(&report_request(1), &key);
    let page = guest.request(&platform, &sealed, &faults).unwrap();
    assert_eq!(driver::open(&page, &key), None);
    let sealed = driver::seal(&report_request(3), &key);
    let page = guest.request(&platform, &sealed, &faults).unwrap();
    assert_eq!(driver::open(&page, &key).unwrap().sequence, 6, "4 would be right");
}

proptest! {
    #[test]
    fn no_message_panics(
        bytes in proptest::collection::vec(any::<u8>(), 4096),
        header in proptest::collection::vec((0usize..0x60, any::<u8>()), 0..4),
    ) {
        let platform = platform();
        let (mut guest, secrets) = running(&platform);
        let raw: Page = bytes.clone().try_into().unwrap();
        prop_assert!(guest.request(&platform, &raw, &Faults::default()).is_err());
        let mut page = driver::seal(&report_request(1), &vmpck(&secrets, 0));
        for (at, value) in header {
            page[at] = value;
        }
        let _ = guest.request(&platform, &page, &Faults::default());
    }

    #[test]
    fn no_authentic_payload_panics(
        message_type in prop_oneof![Just(3u8), Just(5u8)],
        payload in proptest::collection::vec(any::<u8>(), 0..200),
        small in any::<bool>(),
    ) {
        let platform = platform();
        let (mut guest, secrets) = running(&platform);
        let mut payload = payload;
        if small {
            payload.resize(if message_type == 3 { 32 } else { 96 }, 0);
        }
        let request = Message { sequence: 1, message_type, version: 1, vmpck: 0, payload };
        let response = ask(&mut guest, &platform, &request, &vmpck(&secrets, 0)).unwrap();
        prop_assert_eq!(response.sequence, 2);
    }
}

/// The type says it: what is given up is overwritten. (This does not build for plain arrays.)
#[test]
fn keys_are_wiped_when_they_are_given_up() {
    fn wiped(_: &impl zeroize::ZeroizeOnDrop) {}
    let platform = platform();
    wiped(&platform.chain.root_secret());
    let context = GuestContext::start(0x3_0000, [0; 16], &mut OsRng).unwrap();
    wiped(&context.vmpcks);
    wiped(&context.vmrk);
    assert_ne!(*context.vmrk, [0; 32]);
}
