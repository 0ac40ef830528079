// SPDX-License-Identifier: Apache-2.0
//! `cvmm report`: what a report says, before anybody has checked it, and which certificates it takes to check
//! it.

use std::io::Write as _;
use std::path::Path;
use std::path::PathBuf;

use snp::attest::evidence;
use snp::attest::named::GuestBit;
use snp::attest::named::PlatformBit;
use snp::attest::report::Report;
use snp::attest::report::Signer;
use snp::attest::report::field;
use snp::attest::tcb::Product;
use snp::attest::tcb::Tcb;
use snp::policy::GuestPolicy;

use super::Failure;
use super::note;

/// The form of `--json`. Fields are added to it, and never renamed or taken away.
const FORMAT: &str = "cvmm-report-1";

/// Largest file that is read; reports and certificates are a few KiB.
const FILE_MAX: u64 = 16 << 20;

/// Options of `cvmm report`.
#[derive(clap::Args, Clone, Debug)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Subcommand, Clone, Debug)]
enum Command {
    /// Print a report's fields, and what to fetch to verify it. Nothing is checked: any file can say anything
    Show(Show),
}

#[derive(clap::Args, Clone, Debug)]
struct Show {
    /// The report: binary, in hexadecimal, with a certificate table behind it, or in an HCL envelope
    #[arg(value_name = "FILE")]
    report: PathBuf,
    /// Product that made a report of version 2, which does not say so: milan, genoa or turin
    #[arg(long, value_name = "NAME", value_parser = parse_product)]
    product: Option<Product>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

fn parse_product(text: &str) -> Result<Product, String> {
    let known = Product::ALL.into_iter().find(|product| product.to_string().eq_ignore_ascii_case(text));
    known.ok_or_else(|| "expected milan, genoa or turin".to_owned())
}

/// Carries the command out.
pub fn main(args: &Args) -> Result<u8, Failure> {
    let Command::Show(show) = &args.command;
    let wrong = |path: &Path, reason: String| Failure::Usage(format!("report {}: {reason}", path.display()));
    let bytes = crate::files::read_limited(&show.report, FILE_MAX, &note::events())
        .map_err(|e| wrong(&show.report, e))?;
    let report = evidence::read(&bytes).map_err(|e| wrong(&show.report, e.to_string()))?.report;
    let named = report.cpuid_fms().and_then(|[family, model, _]| Product::from_cpuid(family, model));
    let fields = fields(&report, named.or(show.product));
    let text = if show.json {
        let format = [("format", FORMAT.to_owned())];
        let map: serde_json::Map<String, serde_json::Value> = format
            .into_iter()
            .chain(fields)
            .map(|(name, value)| (name.replace(' ', "_"), value.into()))
            .collect();
        serde_json::to_string_pretty(&map).map_err(Failure::monitor)? + "\n"
    } else {
        fields.iter().map(|(name, value)| format!("{name:20} {value}\n")).collect()
    };
    std::io::stdout().write_all(text.as_bytes()).map_err(Failure::monitor)?;
    Ok(0)
}

/// Names of the bits that are set, behind the number.
fn bits<B: Copy + std::fmt::Debug>(value: u64, known: &[B], number: impl Fn(B) -> u32) -> String {
    let set: Vec<String> =
        known.iter().filter(|bit| value >> number(**bit) & 1 != 0).map(|bit| format!("{bit:?}")).collect();
    if set.is_empty() { format!("{value:#x}") } else { format!("{value:#x} ({})", set.join(", ")) }
}

fn fields(report: &Report, product: Option<Product>) -> Vec<(&'static str, String)> {
    let tcb =
        |raw: u64| product.map_or(format!("{raw:#018x}"), |product| Tcb::from_raw(raw, product).to_string());
    let signer = report.signer();
    let policy = GuestPolicy(report.policy());
    let allowed: Vec<&str> =
        [("debug", policy.debug()), ("migration", policy.migrate_ma()), ("SMT", policy.smt())]
            .into_iter()
            .filter_map(|(name, set)| set.then_some(name))
            .collect();
    let digest = |digest: [u8; 48]| if digest == [0; 48] { "none".to_owned() } else { hex::encode(digest) };
    let version = |field| {
        let bytes = report.bytes_of(field);
        let part = |at: usize| bytes.get(at).copied().unwrap_or(0);
        format!("{}.{}.{}", part(2), part(1), part(0))
    };
    vec![
        ("version", report.version().to_string()),
        ("product", product.map_or("not said (report version 2): give --product".into(), |p| p.to_string())),
        ("chip id", hex::encode(report.chip_id())),
        ("signer", format!("{signer:?}").to_uppercase()),
        ("vmpl", report.vmpl().to_string()),
        ("measurement", hex::encode(report.measurement())),
        ("report data", hex::encode(report.report_data())),
        ("host data", hex::encode(report.host_data())),
        (
            "guest policy",
            format!("{} allows {}", bits(policy.0, GuestBit::ALL, GuestBit::bit), allowed.join(", ")),
        ),
        ("guest svn", report.guest_svn().to_string()),
        ("family id", hex::encode(report.family_id())),
        ("image id", hex::encode(report.image_id())),
        ("id key", digest(report.id_key_digest())),
        ("author key", digest(report.author_key_digest())),
        ("platform info", bits(report.platform_info(), PlatformBit::ALL, PlatformBit::bit)),
        ("reported tcb", tcb(report.reported_tcb())),
        ("committed tcb", tcb(report.committed_tcb())),
        ("current tcb", tcb(report.current_tcb())),
        ("launch tcb", tcb(report.launch_tcb())),
        ("current firmware", version(field::CURRENT_VERSION)),
        ("committed firmware", version(field::COMMITTED_VERSION)),
        ("report id", hex::encode(report.report_id())),
        ("report", hex::encode(report.identity())),
        ("to verify", to_verify(report, product, signer)),
    ]
}

/// What AMD's key service is asked for (57230, VCEK certificate and KDS interface specification, sections 4.1
/// and 4.2). Its address is in that specification; this program does not fetch anything.
fn to_verify(report: &Report, product: Option<Product>, signer: Signer) -> String {
    let Some(product) = product else { return "the product has to be known first".into() };
    let chip = report.chip_id();
    match signer {
        Signer::Vcek if chip == [0; 64] => {
            "the host hides its chip id: ask it for the VCEK certificate, or for a report signed by a VLEK"
                .into()
        }
        Signer::Vcek => {
            let id = if product == Product::Turin { &chip[..8] } else { &chip[..] };
            let tcb = Tcb::from_raw(report.reported_tcb(), product);
            let fmc = tcb.fmc.map_or(String::new(), |fmc| format!("fmcSPL={fmc:02}&"));
            format!(
                "/vcek/v1/{product}/{}?{fmc}blSPL={:02}&teeSPL={:02}&snpSPL={:02}&ucodeSPL={:02} and /vcek/v1/{product}/cert_chain",
                hex::encode(id),
                tcb.bootloader,
                tcb.tee,
                tcb.snp,
                tcb.microcode
            )
        }
        Signer::Vlek => format!(
            "the provider's VLEK certificate, from the guest or the host, and /vlek/v1/{product}/cert_chain"
        ),
        _ => "nothing signed it".into(),
    }
}

#[cfg(test)]
mod tests {
    use snp::attest::report::ReportBuilder;

    use super::*;

    fn report(version: u32, changes: &[(snp::attest::report::Field, &[u8])]) -> Report {
        let builder =
            changes.iter().fold(ReportBuilder::new(version), |b, (field, value)| b.set(*field, value));
        Report::parse(&builder.finish(&[0; 48], &[0; 48])).unwrap()
    }

    /// The forms of the key service's addresses: 57230, section 4.1, with the eight bytes of Turin's ids and
    /// its FMC.
    #[test]
    fn what_to_fetch_has_the_form_of_the_key_service() {
        let turin =
            report(5, &[(field::CHIP_ID, &[0x3b; 8]), (field::REPORTED_TCB, &[0, 1, 0, 2, 0, 0, 0, 71])]);
        assert_eq!(
            to_verify(&turin, Some(Product::Turin), turin.signer()),
            "/vcek/v1/Turin/3b3b3b3b3b3b3b3b?fmcSPL=00&blSPL=01&teeSPL=00&snpSPL=02&ucodeSPL=71 and /vcek/v1/Turin/cert_chain"
        );
        let milan =
            report(3, &[(field::CHIP_ID, &[0x77; 64]), (field::REPORTED_TCB, &[4, 0, 0, 0, 0, 0, 24, 219])]);
        let chip = "77".repeat(64);
        assert_eq!(
            to_verify(&milan, Some(Product::Milan), milan.signer()),
            format!(
                "/vcek/v1/Milan/{chip}?blSPL=04&teeSPL=00&snpSPL=24&ucodeSPL=219 and /vcek/v1/Milan/cert_chain"
            )
        );
        let hidden = report(3, &[]);
        assert!(to_verify(&hidden, Some(Product::Milan), hidden.signer()).contains("hides"));
        assert!(to_verify(&hidden, None, hidden.signer()).contains("product"));
    }

    #[test]
    fn every_field_has_a_name_and_none_twice() {
        let fields = fields(&report(2, &[]), None);
        let names: std::collections::BTreeSet<&str> = fields.iter().map(|(name, _)| *name).collect();
        assert_eq!(names.len(), fields.len());
        assert_eq!(fields.iter().find(|(name, _)| *name == "measurement").unwrap().1, "00".repeat(48));
    }
}
