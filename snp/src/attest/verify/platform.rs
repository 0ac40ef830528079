// SPDX-License-Identifier: Apache-2.0
//! Where a report comes from: the chip, its product, its versions and what its platform does.

use super::Checks;
use crate::attest::baseline::Baseline;
use crate::attest::baseline::Demand;
use crate::attest::baseline::Line;
use crate::attest::chain::Chain;
use crate::attest::chain::kind_of;
use crate::attest::named::Mitigations;
use crate::attest::named::PlatformBit;
use crate::attest::policy::Policy;
use crate::attest::policy::SignerName;
use crate::attest::report::Report;
use crate::attest::report::Signer;
use crate::attest::tcb::Product;
use crate::attest::tcb::Tcb;
use crate::printable::printable;

/// The rules of the platform, its own first.
pub(super) fn check(report: &Report, policy: &Policy, chain: &Chain, checks: &mut Checks) {
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
    check_order(report, product, checks);
    if let Some(products) = &policy.products {
        checks.member("products", products, &product, Product::to_string);
    }
    check_info(report, policy, checks);
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
    if !policy.minimum_firmware.is_empty() {
        let found = report.committed_firmware();
        match policy.minimum_firmware.get(&product) {
            Some(minimum) => checks.push(
                "minimum-firmware",
                format!("{minimum} or newer"),
                found.to_string(),
                found >= *minimum,
            ),
            None => checks.other_product("minimum-firmware", policy.minimum_firmware.keys(), product),
        }
    }
    if let Some(baseline) = &policy.baseline {
        check_baseline(report, baseline, product, checks);
    }
    if !policy.minimum_mitigations.is_empty() {
        check_mitigations(report, policy, product, checks);
    }
}

/// Firmware reports no newer version than it has committed itself to, and commits itself to none that does
/// not run.
fn check_order(report: &Report, product: Product, checks: &mut Checks) {
    let tcb = |raw| Tcb::from_raw(raw, product);
    let (reported, committed, current) =
        (tcb(report.reported_tcb()), tcb(report.committed_tcb()), tcb(report.current_tcb()));
    checks.push(
        "tcb-order",
        "reported, committed, current: none newer than the next",
        format!("{reported}; {committed}; {current}"),
        committed.at_least(&reported) && current.at_least(&committed),
    );
}

fn check_info(report: &Report, policy: &Policy, checks: &mut Checks) {
    let bits = &policy.platform_info;
    if !bits.is_empty() {
        let info = report.platform_info();
        let violations = bits.violations(info, PlatformBit::bit);
        let found = if violations.is_empty() { format!("{info:#x}") } else { violations.join(", ") };
        checks.push("platform-info", bits.expected(), found, violations.is_empty());
    }
}

fn check_baseline(report: &Report, baseline: &Baseline, product: Product, checks: &mut Checks) {
    for Line { bulletin, demand, .. } in baseline.of(product) {
        let (expected, found, pass) = match demand {
            Demand::Platform(bit) => {
                let set = report.platform_info() >> bit.bit() & 1 != 0;
                (format!("{bit:?}"), if set { "set" } else { "not set" }.into(), set)
            }
            Demand::Snp(minimum) => {
                let raw = [report.reported_tcb(), report.committed_tcb(), report.launch_tcb()];
                let [reported, committed, launch] = raw.map(|raw| Tcb::from_raw(raw, product).snp);
                let found = format!("reported {reported}, committed {committed}, at launch {launch}");
                (format!("SNP {minimum} or newer"), found, reported.min(committed).min(launch) >= minimum)
            }
        };
        checks.push("baseline", format!("{expected}, by {bulletin}"), found, pass);
    }
}

fn check_mitigations(report: &Report, policy: &Policy, product: Product, checks: &mut Checks) {
    let Some(minimum) = policy.minimum_mitigations.get(&product) else {
        return checks.other_product("minimum-mitigations", policy.minimum_mitigations.keys(), product);
    };
    let text = |m: &Mitigations| format!("{:#x} at launch, {:#x} now", m.launch, m.current);
    let found = report.mitigations();
    let has = |have: u64, want: u64| have & want == want;
    checks.push(
        "minimum-mitigations",
        format!("at least {}", text(minimum)),
        found.as_ref().map_or("a report without them (before version 5)".into(), text),
        found.is_some_and(|f| has(f.launch, minimum.launch) && has(f.current, minimum.current)),
    );
}

fn check_minimum_tcb(report: &Report, policy: &Policy, product: Product, checks: &mut Checks) {
    let Some(minimum) = policy.minimum_tcb.get(&product) else {
        return checks.other_product("minimum-tcb", policy.minimum_tcb.keys(), product);
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
