// SPDX-License-Identifier: Apache-2.0
//! From a report and its certificates to a verdict that says why.
//!
//! A signature alone proves little: the verdict lists every rule with what was expected and what was found, and holds only
//! if all of them do. First come the rules of authenticity (who signed, with which key, issued by whom, for which chip and
//! platform version), then those of the caller's policy. Rules: SEV-SNP Firmware ABI 1.58, section 7.3 and chapter 3; AMD
//! 57230 for certificates. Everything is computed over the received bytes.

use p384::ecdsa::signature::Verifier as _;

use super::cert::Cert;
use super::cert::Crl;
use super::cert::printable;
use super::chain::Chain;
use super::chain::Trust;
use super::chain::kind_of;
use super::policy::Policy;
use super::policy::SignerName;
use super::report::Report;
use super::report::SIG_ALGO_ECDSA_P384_SHA384;
use super::report::Signer;
use super::report::field;
use super::tcb::Product;
use super::tcb::Tcb;
use crate::policy::GuestPolicy;

/// One rule's outcome.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Check {
    /// The rule's name, stable for programs.
    pub rule: &'static str,
    /// What the rule asks for.
    pub expected: String,
    /// What the report or its certificates have.
    pub found: String,
    /// Whether it holds.
    pub pass: bool,
}

/// Every rule's outcome.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Verdict {
    /// Whether all rules hold.
    pub verified: bool,
    /// The rules, authenticity first.
    pub checks: Vec<Check>,
}

impl Verdict {
    /// Names of the rules that do not hold.
    pub fn failed(&self) -> Vec<&'static str> {
        self.checks.iter().filter(|check| !check.pass).map(|check| check.rule).collect()
    }
}

/// What comes with a report.
#[derive(Clone, Debug)]
pub struct Evidence<'a> {
    /// The report.
    pub report: &'a Report,
    /// Certificates from the report's sender: the endorsement certificate, and intermediates that are not built in.
    pub certificates: &'a [Cert],
    /// A revocation list, if the caller has one.
    pub crl: Option<&'a Crl>,
}

/// What the caller decides.
#[derive(Clone, Debug)]
pub struct Demands<'a> {
    /// Rules about the guest and its platform.
    pub policy: &'a Policy,
    /// What `report_data` must be; `None` if freshness is proved in another way.
    pub nonce: Option<[u8; 64]>,
    /// Roots.
    pub trust: &'a Trust,
    /// Time for which certificates must be valid, in seconds since 1970.
    pub now: u64,
}

/// The rules as they are found out.
struct Checks(Vec<Check>);

impl Checks {
    fn push(
        &mut self,
        rule: &'static str,
        expected: impl Into<String>,
        found: impl Into<String>,
        pass: bool,
    ) {
        self.0.push(Check { rule, expected: expected.into(), found: found.into(), pass });
    }

    /// A rule about a list of allowed values.
    fn member<T: PartialEq>(
        &mut self,
        rule: &'static str,
        allowed: &[T],
        found: &T,
        show: impl Fn(&T) -> String,
    ) {
        let expected = match allowed {
            [] => "nothing is allowed".to_owned(),
            [one] => show(one),
            [first, rest @ ..] => format!("one of {} values, such as {}", rest.len() + 1, show(first)),
        };
        self.push(rule, expected, show(found), allowed.contains(found));
    }
}

/// A message that fits a line: the text of an error, with its causes.
fn text_of(result: &Result<(), impl std::fmt::Display>) -> String {
    match result {
        Ok(()) => "yes".into(),
        Err(error) => error.to_string(),
    }
}

/// Whether `cert`'s key signed `report`, over the bytes as received. Alone this is no verification: see [`verify`].
pub fn signs(report: &Report, cert: &Cert) -> bool {
    let mut r_and_s = [0; 144];
    r_and_s[..72].copy_from_slice(&report.signature_r());
    r_and_s[72..].copy_from_slice(&report.signature_s());
    match (cert.endorsement_key(), crate::identity::Signature::from_fields(&r_and_s)) {
        (Some(key), Ok(signature)) => key.verify(report.signed_bytes(), signature.inner()).is_ok(),
        _ => false,
    }
}

/// Verifies a report.
pub fn verify(evidence: &Evidence, demands: &Demands) -> Verdict {
    let report = evidence.report;
    let mut checks = Checks(Vec::new());
    check_signature_fields(report, &mut checks);
    match Chain::find(evidence.certificates, demands.trust, |cert| signs(report, cert)) {
        Ok(chain) => {
            check_chain(evidence, demands, &chain, &mut checks);
            check_platform(report, demands.policy, &chain, &mut checks);
        }
        Err(error) => checks.push("certificates", "a VCEK or VLEK certificate", error.to_string(), false),
    }
    check_guest(report, demands, &mut checks);
    let verified = !checks.0.is_empty() && checks.0.iter().all(|check| check.pass);
    Verdict { verified, checks: checks.0 }
}

fn signer_name(signer: Signer) -> String {
    match signer {
        Signer::Vcek => "VCEK".into(),
        Signer::Vlek => "VLEK".into(),
        Signer::None => "no one (the platform does not sign)".into(),
        Signer::Reserved(value) => format!("reserved value {value}"),
    }
}

fn check_signature_fields(report: &Report, checks: &mut Checks) {
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
}

fn check_chain(evidence: &Evidence, demands: &Demands, chain: &Chain, checks: &mut Checks) {
    let report = evidence.report;
    let root = match (&demands.trust.other_root, chain.root) {
        (Some(root), _) => format!("'{}', named by the caller, not AMD's", root.name()),
        (None, Some(root)) => format!("AMD's '{}'", root.name()),
        (None, None) => "no root known".into(),
    };
    let signatures = chain.check_signatures();
    checks.push(
        "certificate-chain",
        format!("signed down from {root}"),
        text_of(&signatures),
        signatures.is_ok(),
    );

    let outdated = chain.outdated(demands.now);
    let found = match outdated {
        Some(cert) => format!("'{}' is valid {}", cert.name(), cert.validity_text()),
        None => "valid".into(),
    };
    checks.push("certificate-dates", "valid at the time of verification", found, outdated.is_none());

    if let Some(list) = evidence.crl {
        let revocation = chain.check_revocation(list, demands.now);
        let found = text_of(&revocation);
        checks.push(
            "revocation",
            "yes: list is genuine, current, names no certificate",
            found,
            revocation.is_ok(),
        );
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
    let found = if good { "it is" } else { "it is not: other key, or changed bytes" };
    let expected = format!("signed by '{}' over bytes 0x0 to 0x29f", chain.endorsement.name());
    checks.push("report-signature", expected, found, good);
}

fn check_platform(report: &Report, policy: &Policy, chain: &Chain, checks: &mut Checks) {
    let product = chain.product;
    if let Some([family, model, _]) = report.cpuid_fms() {
        let by_cpuid = Product::from_cpuid(family, model);
        let found = by_cpuid.map_or("an unknown product".into(), |p| p.to_string());
        let found = format!("{found} (CPUID family {family:#x}, model {model:#x})");
        checks.push("product", format!("{product}, by the certificate"), found, by_cpuid == Some(product));
    }
    let reported = Tcb::from_raw(report.reported_tcb(), product);
    match chain.endorsement.tcb(product) {
        Ok(tcb) => checks.push(
            "certificate-tcb",
            format!("reported TCB {tcb}, by the certificate"),
            reported.to_string(),
            tcb == reported,
        ),
        Err(error) => checks.push("certificate-tcb", reported.to_string(), error.to_string(), false),
    }
    if kind_of(chain.endorsement) == Signer::Vcek {
        let chip = report.chip_id();
        match chain.endorsement.hwid() {
            Ok(hwid) => {
                let wanted = if product == Product::Turin { 8 } else { 64 };
                let same =
                    hwid.len() == wanted && chip[..wanted] == *hwid && chip[wanted..].iter().all(|b| *b == 0);
                let found = if chip.iter().all(|b| *b == 0) {
                    "masked by the host".into()
                } else {
                    hex::encode(chip)
                };
                checks.push("certificate-chip", hex::encode(hwid), found, same);
            }
            Err(error) => checks.push("certificate-chip", hex::encode(chip), error.to_string(), false),
        }
    }
    if let Some(chips) = &policy.chips {
        let chips: Vec<[u8; 64]> = chips.iter().map(|chip| chip.0).collect();
        checks.member("chip", &chips, &report.chip_id(), |chip| hex::encode(chip));
    }
    if let Some(signers) = &policy.signers {
        let kind = match kind_of(chain.endorsement) {
            Signer::Vcek => SignerName::Vcek,
            _ => SignerName::Vlek,
        };
        checks.member("allowed-signer", signers, &kind, |s| format!("{s:?}").to_uppercase());
    }
    if let Some(providers) = &policy.providers {
        let provider = chain.endorsement.provider().unwrap_or_else(|| "none (no VLEK)".into());
        checks.member("provider", providers, &provider, |name| printable(name));
    }
    if !policy.minimum_tcb.is_empty() {
        check_minimum_tcb(report, policy, product, checks);
    }
}

fn check_minimum_tcb(report: &Report, policy: &Policy, product: Product, checks: &mut Checks) {
    let Some(minimum) = policy.minimum_tcb.get(&product) else {
        let named: Vec<String> = policy.minimum_tcb.keys().map(Product::to_string).collect();
        checks.push("minimum-tcb", format!("a platform of {}", named.join(", ")), product.to_string(), false);
        return;
    };
    for (rule, raw) in [
        ("minimum-tcb", report.reported_tcb()),
        ("minimum-committed-tcb", report.committed_tcb()),
        ("minimum-launch-tcb", report.launch_tcb()),
    ] {
        let tcb = Tcb::from_raw(raw, product);
        checks.push(rule, format!("{minimum} or newer"), tcb.to_string(), tcb.at_least(minimum));
    }
}

fn check_guest(report: &Report, demands: &Demands, checks: &mut Checks) {
    let policy = demands.policy;
    if let Some(nonce) = demands.nonce {
        let found = report.report_data();
        checks.push("nonce", hex::encode(nonce), hex::encode(found), nonce == found);
    }
    let hex48 = |bytes: &[u8; 48]| hex::encode(bytes);
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
}
