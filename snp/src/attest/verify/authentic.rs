// SPDX-License-Identifier: Apache-2.0
//! Who signed a report, with which key, and who vouches for that key.

use super::Checks;
use super::Demands;
use super::Evidence;
use crate::attest::chain::Chain;
use crate::attest::chain::kind_of;
use crate::attest::policy::Policy;
use crate::attest::report::Report;
use crate::attest::report::SIG_ALGO_ECDSA_P384_SHA384;
use crate::attest::report::Signer;
use crate::attest::report::field;

/// What was found where a result is expected: `good`, or the error.
fn text_of(result: &Result<(), impl std::fmt::Display>, good: &str) -> String {
    match result {
        Ok(()) => good.to_owned(),
        Err(error) => error.to_string(),
    }
}

fn signer_name(signer: Signer) -> String {
    match signer {
        Signer::Vcek => "VCEK".into(),
        Signer::Vlek => "VLEK".into(),
        Signer::None => "no one (the platform does not sign)".into(),
        Signer::Reserved(value) => format!("reserved value {value}"),
    }
}

/// What the report says about its signature, and whether it is as firmware leaves it.
pub(super) fn check_fields(report: &Report, policy: &Policy, checks: &mut Checks) {
    if let Some(minimum) = policy.minimum_report_version {
        let version = report.version();
        checks.push(
            "report-version",
            format!("{minimum} or higher"),
            version.to_string(),
            version >= minimum,
        );
    }
    let algorithm = report.sig_algo();
    checks.push(
        "signature-algorithm",
        "1 (ECDSA P-384 with SHA-384)",
        algorithm.to_string(),
        algorithm == SIG_ALGO_ECDSA_P384_SHA384,
    );
    let masked = report.key_info() & 2 != 0;
    checks.push(
        "chip-key",
        "in use",
        if masked { "masked by the host, reports are not signed" } else { "in use" },
        !masked,
    );
    // Not signed: what stands there could tell copies of one report apart.
    let rest = report.bytes_of(field::SIGNATURE_REST);
    let odd = (field::SIGNATURE_REST.offset..).zip(rest).find(|(_, byte)| **byte != 0);
    checks.push(
        "signature-padding",
        "zeros from 0x330 on",
        odd.map_or("zeros".into(), |(at, byte)| format!("{byte:#04x} at {at:#x}")),
        odd.is_none(),
    );
    let has_author = report.key_info() & 1 != 0;
    let named = report.author_key_digest() != [0; 48];
    let is = |there: bool| if there { "an author key" } else { "no author key" };
    checks.push(
        "author-key-field",
        format!("{}, by the digest", is(named)),
        is(has_author),
        has_author == named,
    );
}

/// Who signed, and who says so.
pub(super) fn check_chain(evidence: &Evidence, demands: &Demands, chain: &Chain, checks: &mut Checks) {
    let report = evidence.report;
    let root = match (&demands.trust.other_root, chain.root) {
        (Some(root), _) => format!("'{}', named by the caller, not AMD's", root.name()),
        (None, Some(root)) => format!("AMD's '{}'", root.name()),
        (None, None) => "no root known".into(),
    };
    let signatures = chain.check_signatures();
    let expected = format!("signed down from {root}");
    let found = text_of(&signatures, &expected);
    checks.push("certificate-chain", expected, found, signatures.is_ok());

    let outdated = chain.outdated(demands.now);
    let found = match outdated {
        Some(cert) => format!("'{}' is valid {}", cert.name(), cert.validity_text()),
        None => "valid".into(),
    };
    checks.push("certificate-dates", "valid at the time of verification", found, outdated.is_none());

    if evidence.crl.is_none() && demands.policy.require_revocation_list {
        checks.push("revocation", "a list of revoked certificates", "none was given", false);
    }
    if let Some(list) = evidence.crl {
        let revocation = chain.check_revocation(list, demands.now);
        let expected = "a genuine and current list that names no certificate of the chain";
        checks.push("revocation", expected, text_of(&revocation, expected), revocation.is_ok());
    }

    let kind = kind_of(chain.endorsement);
    let signer = report.signer();
    checks.push(
        "signer",
        format!("{}, by the certificate", signer_name(kind)),
        signer_name(signer),
        kind == signer,
    );

    let good = chain.signs;
    let expected = format!("signed by '{}' over bytes 0x0 to 0x29f", chain.endorsement.name());
    let found = if good { expected.clone() } else { "it is not: other key, or changed bytes".into() };
    checks.push("report-signature", expected, found, good);
}
