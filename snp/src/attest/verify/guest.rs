// SPDX-License-Identifier: Apache-2.0
//! What a report says about its guest, and whether the caller wants that.

use super::Checks;
use super::Demands;
use super::Evidence;
use crate::attest::named::GuestBit;
use crate::attest::named::Interface;
use crate::attest::report::field;
use crate::policy::GuestPolicy;

/// The rules of the guest: what it runs, what it asked to have signed, and what its owner allowed.
pub(super) fn check(evidence: &Evidence, demands: &Demands, checks: &mut Checks) {
    let (report, policy) = (evidence.report, demands.policy);
    if let Some(data) = evidence.runtime_data {
        let (hash, found) = (data.hash(), report.report_data());
        let expected =
            hash.map_or("a known hash".into(), |hash| format!("{}: the data's hash", hex::encode(hash)));
        checks.push("runtime-data", expected, hex::encode(found), hash == Some(found));
    }
    if let Some(nonce) = demands.nonce {
        let found = report.report_data();
        checks.push("nonce", hex::encode(nonce), hex::encode(found), nonce == found);
    }
    let hex48 = |bytes: &[u8; 48]| hex::encode(bytes);
    if !policy.measurement_sets.is_empty() {
        checks.push("measurement", "the policy's digest sets", "they were not read", false);
    }
    if let Some(allowed) = &policy.measurements {
        let allowed: Vec<[u8; 48]> = allowed.iter().map(|hex| hex.0).collect();
        checks.member("measurement", &allowed, &report.measurement(), hex48);
    }
    for (rule, allowed, field) in [
        ("id-key", &policy.id_key_digests, field::ID_KEY_DIGEST),
        ("author-key", &policy.author_key_digests, field::AUTHOR_KEY_DIGEST),
    ] {
        if let Some(allowed) = allowed {
            let allowed: Vec<Vec<u8>> = allowed.iter().map(|hex| hex.0.to_vec()).collect();
            checks.member(rule, &allowed, &report.bytes_of(field).to_vec(), |bytes| hex::encode(bytes));
        }
    }
    if let Some(allowed) = &policy.host_data {
        let allowed: Vec<[u8; 32]> = allowed.iter().map(|hex| hex.0).collect();
        checks.member("host-data", &allowed, &report.host_data(), |bytes| hex::encode(bytes));
    }
    for (rule, wanted, found) in [
        ("family-id", policy.family_id, report.family_id()),
        ("image-id", policy.image_id, report.image_id()),
    ] {
        if let Some(wanted) = wanted {
            checks.push(rule, hex::encode(wanted.0), hex::encode(found), wanted.0 == found);
        }
    }
    if let Some(minimum) = policy.minimum_svn {
        let svn = report.guest_svn();
        checks.push("guest-svn", format!("{minimum} or higher"), svn.to_string(), svn >= minimum);
    }
    let vmpl = policy.vmpl.clone().unwrap_or_else(|| vec![0]);
    checks.member("vmpl", &vmpl, &report.vmpl(), |level| match level {
        0xffff_ffff => "asked for by the host".into(),
        level => level.to_string(),
    });
    let guest = GuestPolicy(report.policy());
    let allowed = |allow: bool| if allow { "allowed or not" } else { "not allowed" };
    let is = |set: bool| if set { "allowed" } else { "not allowed" };
    for (rule, allow, set) in [
        ("debug", policy.allow_debug, guest.debug()),
        ("migration", policy.allow_migration, guest.migrate_ma()),
        ("smt", policy.allow_smt.unwrap_or(true), guest.smt()),
    ] {
        checks.push(rule, format!("{} by the guest policy", allowed(allow)), is(set), allow || !set);
    }
    // Without an agent the field is all ones (ABI, table 23): a guest that may have none has none.
    let agent = report.report_id_ma();
    checks.push(
        "migration-agent",
        if policy.allow_migration { "any or none" } else { "none" },
        if agent == [0xff; 32] { "none".into() } else { hex::encode(agent) },
        policy.allow_migration || agent == [0xff; 32],
    );
    if !policy.guest_policy.is_empty() {
        let violations = policy.guest_policy.violations(guest.0, GuestBit::bit);
        let found = if violations.is_empty() { format!("{:#x}", guest.0) } else { violations.join(", ") };
        checks.push("guest-policy", policy.guest_policy.expected(), found, violations.is_empty());
    }
    if let Some(minimum) = policy.minimum_abi {
        let [minor, major, ..] = guest.0.to_le_bytes();
        let found = Interface { major, minor };
        checks.push("guest-abi", format!("{minimum} or higher"), found.to_string(), found >= minimum);
    }
}
