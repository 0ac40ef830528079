// SPDX-License-Identifier: Apache-2.0
//! Keys of the emulated platform, and the verification of reports that they signed.
//!
//! A test's platform has keys of its own, below the harness's directory. They are made on the host, because
//! two RSA keys take minutes under software emulation. The verifier is told to trust their root; by default
//! it does not.

use std::fs;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::time::SystemTime;
use std::time::UNIX_EPOCH;

use anyhow::Context;
use anyhow::Result;
use anyhow::bail;
use anyhow::ensure;
use snp::attest::cert::Cert;
use snp::attest::chain::Trust;
use snp::attest::policy::Hex;
use snp::attest::policy::Policy;
use snp::attest::report::Report;
use snp::attest::verify::Demands;
use snp::attest::verify::Evidence;
use snp::attest::verify::Verdict;
use snp::attest::verify::verify;
use snp_model::chain::Chain;

use crate::workspace::Workspace;

/// The file with the keys; made if it is not there.
pub fn platform_keys(workspace: &Workspace) -> Result<PathBuf> {
    let path = workspace.work().join("emulated-platform.pem");
    if !path.exists() {
        let pem = Chain::generate(&mut rand_core::OsRng)?.to_pem()?;
        let mut file = fs::File::options()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&path)
            .with_context(|| format!("cannot create {}", path.display()))?;
        file.write_all(pem.as_bytes())?;
    }
    Ok(path)
}

/// The root certificate of the keys.
pub fn platform_root(workspace: &Workspace) -> Result<Cert> {
    let path = platform_keys(workspace)?;
    let pem = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    Ok(Cert::from_der(&Chain::from_pem(&pem)?.certificates().ark)?)
}

/// Verifies a report and the certificate table that the host gave the guest with it, down from `root`.
pub fn check(
    report: &[u8],
    table: &[u8],
    root: Option<Cert>,
    measurement: &[u8],
    nonce: &[u8],
) -> Result<Verdict> {
    let report = Report::parse(report)?;
    let certificates = certificates(table)?;
    let measurement: [u8; 48] = measurement.try_into().context("a measurement has 48 bytes")?;
    let policy = Policy { measurements: Some([Hex(measurement)].into()), ..Policy::default() };
    let nonce = nonce.try_into().context("report data has 64 bytes")?;
    let trust = Trust { other_root: root };
    let now = SystemTime::now().duration_since(UNIX_EPOCH).context("the clock")?.as_secs();
    let evidence = Evidence { report: &report, certificates: &certificates, crl: None, runtime_data: None };
    Ok(verify(&evidence, &Demands { policy: &policy, nonce: Some(nonce), trust: &trust, now }))
}

/// As [`check`], with an error that lists every rule that does not hold.
pub fn verified(report: &[u8], table: &[u8], root: Cert, measurement: &[u8], nonce: &[u8]) -> Result<()> {
    let verdict = check(report, table, Some(root), measurement, nonce)?;
    if verdict.verified {
        return Ok(());
    }
    let failed = verdict.checks.iter().filter(|check| !check.pass);
    let lines: Vec<String> = failed
        .map(|check| format!("{}: expected {}, found {}", check.rule, check.expected, check.found))
        .collect();
    bail!("the report does not verify: {}", lines.join("; "))
}

/// The certificates of a table (GHCB specification 2.04, section 4.1.8.1): entries of GUID, offset and
/// length, the last one zero. An oracle: cvmm writes tables with `snp::attest::cert_table`, which has no part
/// in this reading of them.
fn certificates(table: &[u8]) -> Result<Vec<Cert>> {
    let mut found = Vec::new();
    for entry in table.chunks_exact(24) {
        let word =
            |at: usize| entry.iter().skip(at).take(4).rev().fold(0, |sum, &b| sum << 8 | usize::from(b));
        let (offset, length) = (word(16), word(20));
        if entry.iter().all(|&byte| byte == 0) {
            ensure!(!found.is_empty(), "the certificate table is empty");
            return Ok(found);
        }
        let der = table.get(offset..offset + length).context("a certificate beyond the end of its table")?;
        found.push(Cert::from_der(der)?);
    }
    bail!("the certificate table has no end")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn broken_tables_are_errors() {
        assert!(certificates(&[]).is_err(), "nothing");
        assert!(certificates(&[0; 24]).is_err(), "no certificate");
        assert!(certificates(&[1; 24]).is_err(), "offset far outside");
    }
}
