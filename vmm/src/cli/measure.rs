// SPDX-License-Identifier: Apache-2.0
//! `cvmm measure`: launch digests without a VM, and why they are what they are.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::path::PathBuf;

use snp::digest::LaunchDigest;
use snp::digest::Trace;
use snp::digest::trace;
use snp::explain::CountDigest;
use snp::explain::Explanation;
use snp::explain::diff;
use snp::image::ovmf::Svsm;
use snp::image::vcpu_model;
use snp::image::vmm_type::VcpuSetup;
use snp::image::vmm_type::VmmType;
use snp::plan::LaunchPlan;
use snp::plan::PageType;
use snp::vmsa::VMSA_GPA;
use vtpm_svc::measured::Event;
use vtpm_svc::measured::replay;
use vtpm_svc::tpm::commands::BANKS;
use vtpm_svc::tpm::commands::alg;

use super::Failure;
use super::firmware::FirmwareArgs;
use super::image::ImageArgs;
use super::note;
use super::vtpm::MeasureArgs;
use crate::files::read_limited;
use crate::prepare;
use crate::prepare::Files;
use crate::prepare::FirmwareFiles;
use crate::prepare::Names;
use crate::prepare::PrepareError;
use crate::prepare::Target;
use crate::spec::BootSpec;
use crate::spec::FirmwareSpec;
use crate::spec::IgvmSpec;
use crate::spec::KernelSpec;
use crate::spec::TpmSpec;
use crate::spec::VmSpec;

/// Most vCPUs that are measured: as many as KVM can give to a guest.
const VCPUS_MAX: u32 = 4096;

/// Largest file of `--json` that is read, in bytes.
const EXPLANATION_MAX: u64 = 64 << 20;

/// Numbers of vCPUs.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Counts(Vec<u32>);

fn parse_counts(text: &str) -> Result<Counts, String> {
    let number = |text: &str| match text.trim().parse::<u32>() {
        Ok(n) if (1..=VCPUS_MAX).contains(&n) => Ok(n),
        _ => Err(format!(
            "'{text}' is no number of vCPUs: give 1 to {VCPUS_MAX}, lists (1,2,4) or ranges (1-8)"
        )),
    };
    let mut counts = std::collections::BTreeSet::new();
    for part in text.split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last) = (number(first)?, number(last)?);
        if first > last {
            return Err(format!("'{part}' runs backwards"));
        }
        counts.extend(first..=last);
    }
    Ok(Counts(counts.into_iter().collect()))
}

/// Options of `cvmm measure`.
#[derive(clap::Args, Clone, Debug)]
pub struct Args {
    #[command(flatten)]
    image: ImageArgs,
    #[command(flatten)]
    vtpm: MeasureArgs,
    #[command(flatten)]
    file: FirmwareArgs,
    /// Measure the VM that a file describes: JSON, as `cvmm spec` prints it. Its backends are not looked at
    #[arg(long, value_name = "FILE", conflicts_with_all = [
        "kernel", "initrd", "cmdline", "memory", "cpus", "validation", "secure_tsc", "accept", "vtpm", "firmware", "igvm", "zero_pages",
        "vcpu_model", "guest_features", "svsm", "vars_size", "vmm", "vcpus",
    ])]
    spec: Option<PathBuf>,
    /// SVSM that runs under the firmware
    #[arg(
        long,
        value_name = "FILE",
        requires = "firmware",
        requires = "vars_size",
        conflicts_with = "kernel"
    )]
    svsm: Option<PathBuf>,
    /// Size in bytes of the variable store between SVSM and firmware
    #[arg(long, value_name = "BYTES", requires = "svsm")]
    vars_size: Option<u64>,
    /// Monitor that launches the firmware: cvmm, qemu, ec2, gce or krun
    #[arg(long, visible_alias = "vmm-type", value_name = "NAME", default_value = "cvmm")]
    vmm: VmmType,
    /// Numbers of vCPUs, in place of --cpus: a list or range such as 1,2,4-8
    #[arg(long, value_name = "LIST", value_parser = parse_counts, conflicts_with = "cpus")]
    vcpus: Option<Counts>,
    /// Position of the C-bit on the host that will launch the guest: part of the measured page tables of
    /// `--validation launch`
    #[arg(long, value_name = "BIT", default_value_t = 51, hide = true, value_parser = clap::value_parser!(u8).range(32..=51))]
    c_bit: u8,
    /// Print JSON: digests that a policy can list, and every step that leads to them
    #[arg(long)]
    json: bool,
    /// Show every step with its running digest, and the guest's memory as a drawing
    #[arg(long, conflicts_with = "json")]
    explain: bool,
    /// Compare two files of --json: where do the launches part, and why?
    #[arg(long, num_args = 2, value_names = ["A", "B"], exclusive = true)]
    diff: Option<Vec<PathBuf>>,
    /// Write the plan for a check by other programs: one JSON object per line, and the contents into
    /// FILE.contents
    #[arg(long, value_name = "FILE")]
    dump: Option<PathBuf>,
}

/// What was measured: digests, steps, and notes for people.
struct Answer {
    explanation: Explanation,
    plan: LaunchPlan,
    /// What stage0 adds to the launch, for people.
    bound: String,
    notes: Vec<String>,
}

/// Computes and prints digests.
pub fn main(args: &Args) -> Result<u8, Failure> {
    if let Some([first, second]) = args.diff.as_deref() {
        return print_diff(first, second);
    }
    let spec = args.vm()?;
    let measured = match &spec.boot {
        BootSpec::Igvm(file) => igvm(args, &spec, file)?,
        BootSpec::Firmware(file) => firmware(args, &spec, file)?,
        BootSpec::Direct(kernel) => direct(args, &spec, kernel)?,
    };
    if let Some(path) = &args.dump {
        dump(&measured.plan, path)
            .map_err(|e| Failure::Monitor(format!("--dump {}: {e}", path.display())))?;
    }
    let mut out = String::new();
    let explanation = &measured.explanation;
    if args.json {
        out = serde_json::to_string_pretty(explanation).map_err(Failure::monitor)?;
        out.push('\n');
    } else {
        if args.explain {
            for (name, value) in &explanation.inputs {
                out.push_str(&format!("{name}: {value}\n"));
            }
            out.push_str(&format!("\n{}\n{}\n", explanation.steps(), explanation.memory_map()));
            out.push_str(&measured.bound);
        }
        match explanation.digests.as_slice() {
            [only] => out.push_str(&format!("{}\n", only.launch_digest)),
            many => many.iter().for_each(|d| out.push_str(&format!("{:4}  {}\n", d.vcpus, d.launch_digest))),
        }
        out.push_str(&pcr_list(&explanation.pcrs));
    }
    for note in &measured.notes {
        note::events().note(note);
    }
    std::io::stdout().write_all(out.as_bytes()).map_err(Failure::monitor)?;
    Ok(0)
}

fn print_diff(first: &Path, second: &Path) -> Result<u8, Failure> {
    let read = |path: &Path| {
        let wrong = |reason: String| Failure::Usage(format!("--diff {}: {reason}", path.display()));
        let bytes = read_limited(path, EXPLANATION_MAX, &note::events()).map_err(wrong)?;
        let text = String::from_utf8(bytes)
            .map_err(|_| wrong("not a file of `cvmm measure --json`: no text".into()))?;
        Explanation::parse(&text).map_err(|e| wrong(format!("not a file of `cvmm measure --json`: {e}")))
    };
    let (text, code) = match diff(&read(first)?, &read(second)?) {
        None => ("the launches are the same\n".to_owned(), 0),
        Some(divergence) => (format!("{divergence}\n"), 1),
    };
    std::io::stdout().write_all(text.as_bytes()).map_err(Failure::monitor)?;
    Ok(code)
}

/// Puts an explanation together from the launch with the most vCPUs.
fn explain(
    plan: LaunchPlan,
    trace: &Trace,
    digests: Vec<CountDigest>,
    inputs: Vec<(&str, String)>,
    notes: Vec<String>,
) -> Answer {
    let mut explanation = Explanation::new(&plan.records, &plan.vcpus, trace);
    explanation.inputs = inputs.into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
    explanation.digests = digests;
    Answer { explanation, plan, bound: String::new(), notes }
}

fn count_digest(vcpus: u32, digest: LaunchDigest) -> CountDigest {
    CountDigest { vcpus, launch_digest: digest.to_string() }
}

impl Args {
    /// The VM that is measured: an SNP guest in any case.
    fn vm(&self) -> Result<VmSpec, Failure> {
        if let Some(path) = &self.spec {
            let spec = super::spec::read(path)?;
            return match spec.snp {
                Some(_) => Ok(spec),
                None => Err(Failure::Usage(format!(
                    "--spec {}: snp: a plain guest has no launch digest; add \"snp\": {{}}",
                    path.display()
                ))),
            };
        }
        let boot = self
            .file
            .boot(&self.image)
            .ok_or_else(|| Failure::Usage("--kernel is missing: say what to boot".into()))?;
        Ok(VmSpec {
            boot,
            memory: self.image.memory,
            cpus: self.image.cpus,
            snp: Some(self.image.snp()),
            tpm: self.vtpm.wanted().then(|| TpmSpec { backend: String::new() }),
            on_reset: Default::default(),
            backends: BTreeMap::new(),
        })
    }

    fn counts(&self, spec: &VmSpec) -> Vec<u32> {
        self.vcpus.as_ref().map_or_else(|| vec![spec.cpus], |counts| counts.0.clone())
    }

    fn names(&self) -> Names {
        if self.json || self.explain { Names::Sha256 } else { Names::None }
    }
}

/// Direct boot: the ACPI tables depend on the number of vCPUs, so each number has its own plan.
fn direct(args: &Args, spec: &VmSpec, kernel: &KernelSpec) -> Result<Answer, Failure> {
    let files = Files::read(kernel, &note::events())?;
    let counts = args.counts(spec);
    let mut digests = Vec::new();
    let mut last = None;
    for vcpus in &counts {
        let names = if Some(vcpus) == counts.last() { args.names() } else { Names::None };
        let spec = VmSpec { cpus: *vcpus, ..spec.clone() };
        let image =
            prepare::direct(&spec, kernel, &files, &Target { c_bit: args.c_bit, names, cpuid: None })?;
        let trace = trace(&image.plan).map_err(Failure::usage)?;
        digests.push(count_digest(*vcpus, trace.launch_digest()));
        last = Some((image, trace));
    }
    let (image, trace) = last.ok_or_else(|| Failure::Usage("no number of vCPUs".into()))?;
    let mut inputs = image.inputs;
    inputs.push(("image", "direct boot".into()));
    inputs.push(("launch pages", image.plan.launch_pages().to_string()));
    inputs.push(("cpus", counts.iter().map(u32::to_string).collect::<Vec<_>>().join(",")));
    let mut measured = explain(image.plan, &trace, digests, inputs, Vec::new());
    measured.bound = image.bound;
    measured.explanation.pcrs = pcrs(&image.events);
    Ok(measured)
}

/// A bank's name among the tools that use TPMs.
fn bank_name(bank: u16) -> &'static str {
    if bank == alg::SHA384 { "sha384" } else { "sha256" }
}

/// What a run extends the TPM's PCRs to, by bank.
fn pcrs(events: &[Event]) -> BTreeMap<String, BTreeMap<u32, String>> {
    let replayed = BANKS.map(|(bank, _)| (bank_name(bank).to_owned(), replay(events, bank)));
    let banks = replayed.into_iter().filter(|(_, pcrs)| !pcrs.is_empty());
    banks
        .map(|(bank, pcrs)| (bank, pcrs.into_iter().map(|(pcr, value)| (pcr, hex::encode(value))).collect()))
        .collect()
}

/// The PCRs in the form of `tpm2_pcrread`, so that the two can be compared.
fn pcr_list(pcrs: &BTreeMap<String, BTreeMap<u32, String>>) -> String {
    let mut out = String::new();
    for (bank, values) in pcrs {
        let _ = writeln!(out, "  {bank}:");
        for (pcr, value) in values {
            let _ = writeln!(out, "    {pcr:<2}: 0x{}", value.to_uppercase());
        }
    }
    out
}

fn firmware(args: &Args, spec: &VmSpec, file: &FirmwareSpec) -> Result<Answer, Failure> {
    let files = FirmwareFiles::read(file, &note::events())?;
    let svsm_path = args.svsm.as_deref();
    let signature = match file.vcpu_model {
        Some(signature) => signature,
        None if args.vmm.uses_signature() || svsm_path.is_some() => {
            let models = vcpu_model::names().join(", ");
            return Err(Failure::Usage(format!(
                "--vcpu-model is missing: the model is part of the digest of a firmware launch ({models}, or a signature)"
            )));
        }
        None => 0,
    };
    let counts = args.counts(spec);
    let vcpus = counts.last().copied().unwrap_or(1);
    let mut inputs = files.inputs(file, args.vmm, signature, args.names());
    let plan = if let Some(path) = svsm_path {
        inputs.push(("image", "firmware under an SVSM".into()));
        let svsm = Svsm::parse(
            &files.ovmf,
            prepare::read("svsm", path, &note::events())?,
            args.vars_size.unwrap_or(0),
        )
        .map_err(PrepareError::file("svsm", path))?;
        let setup = VcpuSetup { signature, sev_features: file.guest_features };
        svsm.plan(vcpus, setup).map_err(PrepareError::file("svsm", path))?
    } else {
        inputs.push(("image", "firmware".into()));
        files.plan(file, args.vmm, vcpus, signature)?
    };
    // One chain has the digest of every smaller number of vCPUs on its way.
    let trace = trace(&plan).map_err(Failure::usage)?;
    let digest = |vcpus: &u32| Some(count_digest(*vcpus, *trace.vcpus.get(*vcpus as usize - 1)?));
    let digests = counts.iter().filter_map(digest).collect();
    Ok(explain(plan, &trace, digests, inputs, Vec::new()))
}

fn igvm(args: &Args, spec: &VmSpec, file: &IgvmSpec) -> Result<Answer, Failure> {
    if args.counts(spec) != [1] {
        let reason = "the file decides how many vCPUs are measured: leave --vcpus out";
        return Err(PrepareError::file("boot.igvm.image", &file.image)(reason).into());
    }
    let (image, igvm) = prepare::read_igvm(file, &note::events())?;
    let (digest, after) = igvm.digests();
    let save_areas = igvm.records.iter().filter(|r| r.page_type == PageType::Vmsa).count() as u32;
    let zero_pages = igvm.zero_pages;
    let mut notes = vec![format!("pages without data are {zero_pages}; choose with --zero-pages")];
    if igvm.identity.is_some() {
        notes.push("the ID block in the file is for this digest".into());
    }
    if let Err(reason) = igvm.kvm_plan() {
        notes.push(reason.to_string());
    }
    let inputs = vec![
        ("image", "IGVM".into()),
        ("igvm sha256", args.names().of(image.as_slice())),
        ("zero pages", zero_pages.to_string()),
        ("policy", igvm.policy.map_or("none".into(), |policy| policy.to_string())),
    ];
    // All of it, save areas included, is a list of records here: that is what the file is.
    let plan = LaunchPlan { records: igvm.records, vcpus: Vec::new() };
    let trace = Trace { records: after, vcpus: Vec::new() };
    Ok(explain(plan, &trace, vec![count_digest(save_areas, digest)], inputs, notes))
}

/// Writes the plan as lines of JSON, and all contents into a second file, `.contents` behind the name.
fn dump(plan: &LaunchPlan, path: &Path) -> std::io::Result<()> {
    let mut contents_path = path.as_os_str().to_owned();
    contents_path.push(".contents");
    let mut contents = std::io::BufWriter::new(File::create(contents_path)?);
    let mut lines = std::io::BufWriter::new(File::create(path)?);
    let mut offset = 0;
    let mut run = |page_type: PageType, gpa: u64, len: u64, name: &str, bytes: &[u8]| {
        let bytes_len = bytes.len();
        let page_type = page_type as u8;
        let line = serde_json::json!({
            "page_type": page_type, "gpa": gpa, "len": len, "name": name, "offset": offset, "bytes": bytes_len,
        });
        offset += bytes_len;
        contents.write_all(bytes)?;
        writeln!(lines, "{line}")
    };
    for record in &plan.records {
        run(record.page_type, record.gpa, record.len, &record.name, record.contents.as_slice())?;
    }
    for (id, vcpu) in plan.vcpus.iter().enumerate() {
        let page = vcpu.encode();
        run(PageType::Vmsa, VMSA_GPA, page.len() as u64, &format!("vCPU {id}"), &page)?;
    }
    contents.flush()?;
    lines.flush()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_and_ranges_of_vcpus() {
        assert_eq!(parse_counts("1,8,2-4,3"), Ok(Counts(vec![1, 2, 3, 4, 8])));
        for bad in ["", "0", "4097", "1,", "3-1", "1-", "-2", "one"] {
            assert!(parse_counts(bad).is_err(), "{bad}");
        }
    }
}
