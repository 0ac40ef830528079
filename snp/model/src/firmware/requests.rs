// SPDX-License-Identifier: Apache-2.0
//! What guests ask the firmware for: attestation reports and derived keys.
//!
//! SEV-SNP Firmware ABI 1.58, sections 7.2 (`MSG_KEY_REQ`) and 7.3 (`MSG_REPORT_REQ`). A request that is well
//! formed but not allowed gets a response with a status in it, and uses up its sequence number as any other.

use sha2::Digest as _;
use sha2::Sha384;
use snp::attest::report::ReportBuilder;
use snp::attest::report::field;
use snp::firmware_status::FwStatus;
use snp::le::u32_at;
use snp::le::u64_at;

use crate::faults::Faults;
use crate::firmware::FIRMWARE_VERSION;
use crate::firmware::PLATFORM_INFO;
use crate::firmware::Platform;
use crate::firmware::REPORT_CPUID;
use crate::firmware::context::GuestContext;
use crate::firmware::context::Page;
use crate::firmware::message;
use crate::firmware::message::Message;

/// Report version: 3, with the processor's family, model and stepping.
const REPORT_VERSION: u32 = 3;
/// No migration agent.
const NO_AGENT: [u8; 32] = [0xff; 32];

/// Message types.
const TYPE_KEY_REQUEST: u8 = 3;
const TYPE_REPORT_REQUEST: u8 = 5;

impl GuestContext {
    /// `SNP_GUEST_REQUEST`: opens the message in `page`, and answers it. Only an answered message uses up its
    /// sequence number.
    pub fn request(
        &mut self,
        platform: &Platform,
        page: &Page,
        faults: &Faults,
    ) -> Result<Box<Page>, FwStatus> {
        if !self.is_running() {
            return Err(FwStatus::INVALID_GUEST_STATE);
        }
        let header = message::header(page)?;
        let vmpck = usize::from(header.vmpck);
        let (Some(key), Some(last)) = (self.vmpcks.get(vmpck), self.sequence.get_mut(vmpck)) else {
            return Err(FwStatus::INVALID_PARAM);
        };
        // The request takes the next number and the response the one after it.
        let after = last.checked_add(2).ok_or(FwStatus::AEAD_OFLOW)?;
        let request = message::open(page, header, key)?;
        if request.sequence != *last + 1 {
            return Err(FwStatus::INVALID_PARAM);
        }
        let key = *key;
        let answer: fn(&GuestContext, &Platform, u8, &[u8]) -> Vec<u8> =
            match (request.message_type, request.version) {
                (TYPE_KEY_REQUEST, 1) => derived_key,
                (TYPE_REPORT_REQUEST, 1) => report,
                _ => return Err(FwStatus::INVALID_PARAM),
            };
        *last = after;
        let response = Message {
            sequence: if faults.guest_request_bad_sequence.fire() { after + 2 } else { after },
            message_type: request.message_type + 1,
            version: request.version,
            vmpck: request.vmpck,
            payload: answer(self, platform, request.vmpck, &request.payload),
        };
        let mut page = message::seal(&response, &key)?;
        if faults.guest_request_bad_tag.fire() {
            page[0] ^= 1;
        }
        Ok(page)
    }
}

/// A response that says no.
fn refuse(len: usize, status: FwStatus) -> Vec<u8> {
    let mut out = vec![0; len];
    out[..4].copy_from_slice(&status.0.to_le_bytes());
    out
}

/// `MSG_REPORT_REQ` to `MSG_REPORT_RSP`: status @0, report size @4, report @0x20.
pub(crate) fn report(guest: &GuestContext, platform: &Platform, vmpck: u8, payload: &[u8]) -> Vec<u8> {
    const REQUEST_LEN: usize = 96;
    let (vmpl, key_select) = (u32_at(payload, 0x40), u32_at(payload, 0x44));
    let reserved = payload.get(0x48..).unwrap_or_default().iter().any(|byte| *byte != 0);
    // A guest may ask for its own privilege level and for less privileged (numerically higher) ones.
    if payload.len() != REQUEST_LEN || reserved || vmpl > 3 || vmpl < vmpck.into() || key_select > 2 {
        return refuse(0x20, FwStatus::INVALID_PARAM);
    }
    // 0: VLEK if there is one, else VCEK; 1: VCEK; 2: VLEK. There is no VLEK, and the VCEK may be disabled.
    if key_select == 2 || guest.vcek_disabled {
        return refuse(0x20, FwStatus::INVALID_KEY);
    }
    let tcb = platform.chain.tcb().to_u64().to_le_bytes();
    let id = &guest.identity;
    let builder = ReportBuilder::new(REPORT_VERSION)
        .set(field::GUEST_SVN, &id.guest_svn.to_le_bytes())
        .set(field::POLICY, &guest.policy.to_le_bytes())
        .set(field::FAMILY_ID, &id.family_id)
        .set(field::IMAGE_ID, &id.image_id)
        .set(field::VMPL, &vmpl.to_le_bytes())
        .set(field::CURRENT_TCB, &tcb)
        .set(field::PLATFORM_INFO, &PLATFORM_INFO.to_le_bytes())
        .set(field::KEY_INFO, &u32::from(id.author_key_digest.is_some()).to_le_bytes())
        .set(field::REPORT_DATA, payload.get(..64).unwrap_or_default())
        .set(field::MEASUREMENT, &guest.digest.0)
        .set(field::HOST_DATA, &guest.host_data)
        .set(field::ID_KEY_DIGEST, &id.id_key_digest.unwrap_or([0; 48]))
        .set(field::AUTHOR_KEY_DIGEST, &id.author_key_digest.unwrap_or([0; 48]))
        .set(field::REPORT_ID, &guest.report_id)
        .set(field::REPORT_ID_MA, &NO_AGENT)
        .set(field::REPORTED_TCB, &tcb)
        .set(field::CPUID_FMS, &REPORT_CPUID)
        .set(field::CHIP_ID, platform.chain.chip_id())
        .set(field::COMMITTED_TCB, &tcb)
        .set(field::CURRENT_VERSION, &FIRMWARE_VERSION)
        .set(field::COMMITTED_VERSION, &FIRMWARE_VERSION)
        .set(field::LAUNCH_TCB, &tcb);
    let (r, s) = platform.chain.sign(builder.signed_bytes());
    let report = builder.finish(&r, &s);
    let mut out = vec![0; 0x20];
    out[4..8].copy_from_slice(&(report.len() as u32).to_le_bytes());
    out.extend(report);
    out
}

/// `MSG_KEY_REQ` to `MSG_KEY_RSP`: status @0, key @0x20. How the key is derived is the firmware's secret, and
/// here the model's; what it depends on is the specification's.
pub(crate) fn derived_key(guest: &GuestContext, platform: &Platform, vmpck: u8, payload: &[u8]) -> Vec<u8> {
    const REQUEST_LEN: usize = 32;
    const RESPONSE_LEN: usize = 64;
    let select = u32_at(payload, 0);
    let (fields, vmpl) = (u64_at(payload, 8), u32_at(payload, 0x10));
    let (svn, tcb) = (u32_at(payload, 0x14), u64_at(payload, 0x18));
    let committed = platform.chain.tcb().to_u64();
    let newer = tcb.to_le_bytes().iter().zip(committed.to_le_bytes()).any(|(asked, have)| *asked > have);
    let allowed = payload.len() == REQUEST_LEN
        && select >> 3 == 0
        && u32_at(payload, 4) == 0
        && fields >> 6 == 0
        && vmpl <= 3
        && vmpl >= vmpck.into()
        && svn <= guest.identity.guest_svn
        && !newer;
    if !allowed {
        return refuse(RESPONSE_LEN, FwStatus::INVALID_PARAM);
    }
    // Bits 2:1 select VCEK or VLEK as for reports.
    if select >> 1 & 3 >= 2 || (select & 1 == 0 && guest.vcek_disabled) {
        return refuse(RESPONSE_LEN, FwStatus::INVALID_KEY);
    }
    let id = &guest.identity;
    let mut hash = Sha384::new_with_prefix(b"cvmm emulated platform: derived key");
    if select & 1 == 0 {
        hash.update(platform.chain.root_secret().as_slice());
    } else {
        hash.update(guest.vmrk.as_slice());
    }
    hash.update([(select & 1) as u8]);
    hash.update(fields.to_le_bytes());
    hash.update(vmpl.to_le_bytes());
    // Each selected field; the selection itself is hashed above, so that their lengths need not be.
    if fields & 1 << 0 != 0 {
        hash.update(guest.policy.to_le_bytes());
    }
    if fields & 1 << 1 != 0 {
        hash.update(id.image_id);
    }
    if fields & 1 << 2 != 0 {
        hash.update(id.family_id);
    }
    if fields & 1 << 3 != 0 {
        hash.update(guest.digest.0);
    }
    if fields & 1 << 4 != 0 {
        hash.update(svn.to_le_bytes());
    }
    if fields & 1 << 5 != 0 {
        hash.update(tcb.to_le_bytes());
    }
    // A key also depends on who signed the guest.
    hash.update(id.id_key_digest.unwrap_or([0; 48]));
    hash.update(id.author_key_digest.unwrap_or([0; 48]));
    let mut out = vec![0; RESPONSE_LEN];
    out[0x20..].copy_from_slice(&hash.finalize()[..32]);
    out
}
