// SPDX-License-Identifier: Apache-2.0
//! From a report and its certificates to a verdict that says why.
//!
//! A signature alone proves little: the verdict lists every rule with what was expected and what was found,
//! and holds only if all of them do. It also lists what nobody asked to have checked: "all rules hold" means
//! little if there were few. First come the rules of authenticity (who signed, with which key, issued by
//! whom, for which chip and platform version), then those of the caller's policy. Rules: SEV-SNP Firmware ABI
//! 1.58, section 7.3 and chapter 3; AMD 57230 for certificates. Everything is computed over the received
//! bytes.

mod authentic;
mod guest;
mod platform;

use p384::ecdsa::signature::Verifier as _;

use super::cert::Cert;
use super::cert::Crl;
use super::chain::Chain;
use super::chain::Trust;
use super::evidence::RuntimeData;
use super::policy::Policy;
use super::report::Report;
use super::tcb::Product;

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

/// Something that a report could tell and that no rule looked at.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Unchecked {
    /// What, stable for programs.
    pub what: &'static str,
    /// Why not, and what that lets through.
    pub why: &'static str,
}

/// Every rule's outcome.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Verdict {
    /// Whether all rules hold.
    pub verified: bool,
    /// The rules, authenticity first.
    pub checks: Vec<Check>,
    /// What no rule looked at.
    pub unchecked: Vec<Unchecked>,
    /// By what this report is told from others, in hex: see [`Report::identity`].
    pub report: String,
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
    /// Certificates from the report's sender: the endorsement certificate, and intermediates that are not
    /// built in.
    pub certificates: &'a [Cert],
    /// A revocation list, if the caller has one.
    pub crl: Option<&'a Crl>,
    /// What came with the report and is bound by its `report_data`.
    pub runtime_data: Option<&'a RuntimeData>,
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

    /// A rule that the policy has for other products only.
    fn other_product<'a>(
        &mut self,
        rule: &'static str,
        named: impl Iterator<Item = &'a Product>,
        found: Product,
    ) {
        let named: Vec<String> = named.map(Product::to_string).collect();
        self.push(rule, format!("a platform of {}", named.join(", ")), found.to_string(), false);
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

/// Whether `cert`'s key signed `report`, over the bytes as received. Alone this is no verification: see
/// [`verify`].
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
    authentic::check_fields(report, demands.policy, &mut checks);
    let chain = Chain::find(evidence.certificates, demands.trust, |cert| signs(report, cert));
    match &chain {
        Ok(chain) => {
            authentic::check_chain(evidence, demands, chain, &mut checks);
            platform::check(report, demands.policy, chain, &mut checks);
        }
        Err(error) => checks.push("certificates", "a VCEK or VLEK certificate", error.to_string(), false),
    }
    guest::check(evidence, demands, &mut checks);
    let product = chain.ok().map(|chain| chain.product);
    let verified = !checks.0.is_empty() && checks.0.iter().all(|check| check.pass);
    let report = hex::encode(evidence.report.identity());
    Verdict { verified, checks: checks.0, unchecked: unchecked(evidence, demands, product), report }
}

/// What no rule looks at, because nobody asked for it.
fn unchecked(evidence: &Evidence, demands: &Demands, product: Option<Product>) -> Vec<Unchecked> {
    let policy = demands.policy;
    let software = policy.measurements.is_some()
        || !policy.measurement_sets.is_empty()
        || policy.id_key_digests.is_some()
        || policy.author_key_digests.is_some();
    // By its certificate; what comes without a chain that holds is refused anyway.
    let platform = !policy.minimum_tcb.is_empty()
        || product.is_some_and(|p| {
            policy.baseline.as_ref().is_some_and(|baseline| baseline.of(p).next().is_some())
        });
    let place = policy.chips.is_some() || policy.providers.is_some();
    [
        (software, "software", "no measurement and no key of its owner is asked for: any software passes"),
        (demands.nonce.is_some(), "freshness", "no nonce is asked for: an old report passes"),
        (evidence.crl.is_some(), "revocation", "there is no revocation list: a revoked key passes"),
        (
            platform,
            "minimum-tcb",
            "no minimum is asked for, or the baseline has none for this product: a platform with known holes passes",
        ),
        (place, "chip", "no chip and no provider is asked for: any genuine chip passes, wherever it stands"),
        (
            evidence.report.cpuid_fms().is_some(),
            "product",
            "a report of version 2 does not name its CPU: the product is its certificate's word",
        ),
    ]
    .into_iter()
    .filter(|(checked, ..)| !checked)
    .map(|(_, what, why)| Unchecked { what, why })
    .collect()
}
