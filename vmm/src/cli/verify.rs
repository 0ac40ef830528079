// SPDX-License-Identifier: Apache-2.0
//! `cvmm verify`: is this report genuine, and does it say what my policy wants?

use std::fmt::Write as _;
use std::io::Write as _;
use std::path::Path;
use std::path::PathBuf;
use std::time::SystemTime;

use snp::attest::cert::Cert;
use snp::attest::cert::Crl;
use snp::attest::chain::Trust;
use snp::attest::evidence;
use snp::attest::policy::Policy;
use snp::attest::verify::Demands;
use snp::attest::verify::Evidence;
use snp::attest::verify::Verdict;
use snp::attest::verify::verify;

use super::Failure;
use super::note;
use crate::files::read_limited;

/// Exit code: the report does not verify.
const EXIT_REFUSED: u8 = 1;
/// Largest file that is read; reports and certificates are a few KiB.
const FILE_MAX: u64 = 16 << 20;

/// The form of `--json`. Fields are added to it, and never renamed or taken away.
const FORMAT: &str = "cvmm-verdict-1";

/// What `--json` prints.
#[derive(serde::Serialize)]
struct Document<'a> {
    format: &'static str,
    #[serde(flatten)]
    verdict: &'a Verdict,
}

/// Options of `cvmm verify`.
#[derive(clap::Args, Clone, Debug)]
#[command(group = clap::ArgGroup::new("freshness").required(true))]
pub struct Args {
    /// The report as the guest got it: 1184 bytes or their hexadecimal digits, also with a certificate table
    /// behind it (an extended report), or the envelope of an Azure confidential VM
    #[arg(value_name = "REPORT")]
    report: PathBuf,
    /// Certificates: the VCEK or VLEK, and its issuer if that is not AMD's VCEK intermediate. DER, PEM, or a
    /// certificate table; can be repeated. Not needed if the table stands behind the report
    #[arg(long, value_name = "FILE", num_args = 1)]
    certs: Vec<PathBuf>,
    /// The policy, a TOML file
    #[arg(long, value_name = "FILE")]
    policy: PathBuf,
    /// Launch digests to allow as if the policy named them: a file of `cvmm measure --json`; can be repeated.
    /// The policy has to be valid without them
    #[arg(long, value_name = "FILE")]
    measurements: Vec<PathBuf>,
    /// What report_data must be, in hex, filled up with zeros to 64 bytes
    #[arg(long, value_name = "HEX", group = "freshness", value_parser = parse_nonce)]
    nonce: Option<[u8; 64]>,
    /// Do not check report_data: freshness is proved in another way
    #[arg(long, group = "freshness")]
    any_nonce: bool,
    /// Revocation list of the root, DER or PEM
    #[arg(long, value_name = "FILE")]
    crl: Option<PathBuf>,
    /// Time for which certificates must be valid, such as 2025-11-01T00:00:00Z [default: now]
    #[arg(long, value_name = "TIME", value_parser = parse_time)]
    at: Option<u64>,
    /// Believe this root certificate in place of AMD's, such as the emulated platform's: proves nothing about
    /// hardware
    #[arg(long, value_name = "FILE")]
    trust_root: Option<PathBuf>,
    /// Print the verdict as JSON
    #[arg(long)]
    json: bool,
}

fn parse_nonce(text: &str) -> Result<[u8; 64], String> {
    let mut nonce = [0; 64];
    let bytes = hex::decode(text).map_err(|e| format!("not hex: {e}"))?;
    if bytes.is_empty() || bytes.len() > nonce.len() {
        return Err(format!("{} bytes, expected 1 to 64", bytes.len()));
    }
    nonce[..bytes.len()].copy_from_slice(&bytes);
    Ok(nonce)
}

fn parse_time(text: &str) -> Result<u64, String> {
    let time: x509_cert::der::DateTime =
        text.parse().map_err(|_| "expected a time in UTC such as 2025-11-01T00:00:00Z".to_owned())?;
    Ok(time.unix_duration().as_secs())
}

fn read(option: &str, path: &Path) -> Result<Vec<u8>, Failure> {
    read_limited(path, FILE_MAX, &note::events())
        .map_err(|e| Failure::Usage(format!("{option} {}: {e}", path.display())))
}

/// Verifies and prints the verdict; the exit code is 0 only if every rule holds.
pub fn main(args: &Args) -> Result<u8, Failure> {
    let named = |option: &'static str, path: &Path| {
        let path = path.to_owned();
        move |e: &dyn std::fmt::Display| Failure::Usage(format!("{option} {}: {e}", path.display()))
    };
    let collected =
        evidence::read(&read("report", &args.report)?).map_err(|e| named("report", &args.report)(&e))?;
    let mut certificates = collected.certificates;
    for path in &args.certs {
        let found = evidence::read_certificates(&read("--certs", path)?);
        certificates.extend(found.map_err(|e| named("--certs", path)(&e))?);
    }
    if certificates.is_empty() {
        return Err(Failure::Usage(
            "--certs is missing: give the certificate of the key that signed the report (VCEK or VLEK)"
                .into(),
        ));
    }
    let mut policy = Policy::load(&args.policy).map_err(Failure::usage)?;
    for path in &args.measurements {
        policy.add_measurement_set(path).map_err(Failure::usage)?;
    }
    let crl = match &args.crl {
        Some(path) => Some(Crl::read(&read("--crl", path)?).map_err(|e| named("--crl", path)(&e))?),
        None => None,
    };
    let other_root = match &args.trust_root {
        Some(path) => {
            let mut roots =
                Cert::read_all(&read("--trust-root", path)?).map_err(|e| named("--trust-root", path)(&e))?;
            // The file may be a whole chain, as the emulated platform keeps it: the root is the one that
            // issued itself.
            roots.retain(|cert| cert.is_ca() && cert.is_issued_in_the_name_of(cert));
            if roots.len() != 1 {
                let error = format!("{} root certificates, expected 1", roots.len());
                return Err(named("--trust-root", path)(&error));
            }
            roots.pop()
        }
        None => None,
    };
    let trust = Trust { other_root };
    let since_1970 = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_err(Failure::monitor)?;
    let now = args.at.unwrap_or(since_1970.as_secs());
    let evidence = Evidence {
        report: &collected.report,
        certificates: &certificates,
        crl: crl.as_ref(),
        runtime_data: collected.runtime_data.as_ref(),
    };
    let verdict = verify(&evidence, &Demands { policy: &policy, nonce: args.nonce, trust: &trust, now });
    let text = if args.json {
        let document = Document { format: FORMAT, verdict: &verdict };
        serde_json::to_string_pretty(&document).map_err(Failure::monitor)? + "\n"
    } else {
        table(&verdict, &trust)
    };
    std::io::stdout().write_all(text.as_bytes()).map_err(Failure::monitor)?;
    Ok(if verdict.verified { 0 } else { EXIT_REFUSED })
}

/// The verdict for people: what failed, what holds, what nobody looked at, and the sum of it.
fn table(verdict: &Verdict, trust: &Trust) -> String {
    let mut out = String::new();
    for check in verdict.checks.iter().filter(|check| !check.pass) {
        let _ = writeln!(out, "FAIL {:22} expected: {}", check.rule, check.expected);
        let _ = writeln!(out, "     {:22} found:    {}", "", check.found);
    }
    for check in verdict.checks.iter().filter(|check| check.pass) {
        let _ = writeln!(out, "ok   {:22} {}", check.rule, check.found);
    }
    for unchecked in &verdict.unchecked {
        let _ = writeln!(out, "--   {:22} not checked: {}", unchecked.what, unchecked.why);
    }
    let _ = writeln!(out, "     {:22} {}", "report", verdict.report);
    let unchecked: Vec<&str> = verdict.unchecked.iter().map(|unchecked| unchecked.what).collect();
    let unchecked = match unchecked.as_slice() {
        [] => String::new(),
        some => format!("; not checked: {}", some.join(", ")),
    };
    let rules = verdict.checks.len();
    let _ = match (verdict.verified, &trust.other_root) {
        (true, None) => writeln!(out, "VERIFIED: {rules} rules hold{unchecked}"),
        (true, Some(root)) => writeln!(
            out,
            "VERIFIED under '{}', which is not AMD's root: this says nothing about hardware{unchecked}",
            root.name()
        ),
        (false, _) => writeln!(out, "REFUSED: {}", verdict.failed().join(", ")),
    };
    out
}
