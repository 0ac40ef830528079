// SPDX-License-Identifier: Apache-2.0
//! `cvmm certs`: makes and shows the certificate tables that `--certs` hands to guests.

use std::io;
use std::io::Write as _;
use std::path::Path;
use std::path::PathBuf;

use snp::attest::cert::Cert;
use snp::attest::cert::Crl;
use snp::attest::cert_table;
use snp::attest::cert_table::Kind;

use super::Failure;
use super::image::SNP;
use super::note;
use super::out;
use crate::files::read_limited;
use crate::machine::certs::FILE_LIMIT;

/// Options of a run about certificates.
#[derive(clap::Args, Clone, Debug)]
pub struct CertsArgs {
    /// Certificates for the guest's extended reports: a table that `cvmm certs` made. Read at each request,
    /// under a shared lock
    #[arg(long, value_name = "FILE", help_heading = SNP)]
    pub certs: Option<PathBuf>,
}

/// Options of `cvmm certs`.
#[derive(clap::Args, Clone, Debug)]
pub struct Args {
    /// Certificates in DER or PEM, one file or several: the VCEK or VLEK, its ASK or ASVK, and the ARK. Of a
    /// file that has both intermediates the fitting one is taken
    #[arg(value_name = "CERT", required_unless_present = "show")]
    certificates: Vec<PathBuf>,
    /// AMD's revocation list, DER or PEM, for the table as well
    #[arg(long, value_name = "FILE")]
    crl: Option<PathBuf>,
    /// Where the table goes; a file that is there is replaced in one step
    #[arg(long, value_name = "FILE", required_unless_present = "show")]
    out: Option<PathBuf>,
    /// Print what a table holds
    #[arg(long, value_name = "FILE", conflicts_with_all = ["certificates", "crl", "out"])]
    show: Option<PathBuf>,
}

fn named<E: std::fmt::Display>(path: &Path) -> impl Fn(E) -> Failure {
    move |e| Failure::Usage(format!("{}: {e}", path.display()))
}

fn read(path: &Path) -> Result<Vec<u8>, Failure> {
    read_limited(path, FILE_LIMIT, &note::events()).map_err(named(path))
}

/// Makes or shows a table.
pub fn main(args: &Args) -> Result<u8, Failure> {
    if let Some(path) = &args.show {
        show(path)?;
    }
    if let Some(out) = &args.out {
        make(args, out)?;
    }
    Ok(0)
}

fn make(args: &Args, to: &Path) -> Result<(), Failure> {
    let mut certificates = Vec::new();
    for path in &args.certificates {
        certificates.extend(Cert::read_all(&read(path)?).map_err(named(path))?);
    }
    let crl = match &args.crl {
        Some(path) => Some(Crl::read(&read(path)?).map_err(named(path))?),
        None => None,
    };
    let table = cert_table::of_certificates(&certificates, crl.as_ref()).map_err(Failure::Usage)?;
    if table.len() as u64 > FILE_LIMIT {
        return Err(Failure::Usage(format!(
            "the table has {} bytes, {FILE_LIMIT} is the limit",
            table.len()
        )));
    }
    let held = cert_table::parse(&table).map_err(Failure::monitor)?;
    if !held.iter().any(|(kind, _)| *kind == Kind::ASK) {
        let _ = writeln!(
            io::stderr(),
            "cvmm: warning: the table has no ASK or ASVK and no ARK: who verifies with it has to get them elsewhere"
        );
    }
    out::write(to, &table)
}

fn show(path: &Path) -> Result<(), Failure> {
    let bytes = read(path)?;
    let mut text = String::new();
    for (kind, data) in cert_table::parse(&bytes).map_err(named(path))? {
        let what = match Cert::from_der(data) {
            Ok(cert) => {
                format!("{}, issued by {}, valid {}", cert.name(), cert.issuer_name(), cert.validity_text())
            }
            Err(_) => "not a certificate".to_owned(),
        };
        text += &format!("{kind:5} {:5} bytes  {what}\n", data.len());
    }
    text += &format!(
        "{} bytes, {} pages\n",
        bytes.len(),
        (bytes.len() as u64).div_ceil(crate::platform::mapping::PAGE)
    );
    io::stdout().write_all(text.as_bytes()).map_err(Failure::monitor)
}
