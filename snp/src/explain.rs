// SPDX-License-Identifier: Apache-2.0
//! Why a digest is what it is: every step of a launch with its running digest, and where two launches part.
//!
//! "Why is my digest different" is the question most often asked about this technology. An [`Explanation`] is
//! what `cvmm measure --json` writes; two of them are enough to name the first step that differs and its
//! likely cause, without the files that were measured. A file of explanations is only ever compared, never
//! launched.

use std::collections::BTreeMap;
use std::fmt;
use std::fmt::Write as _;

use serde::Deserialize;
use serde::Serialize;

use crate::attest::policy::MEASUREMENT_SET_FORMAT;
use crate::digest::LaunchDigest;
use crate::digest::Trace;
use crate::plan::PageType;
use crate::plan::Record;
use crate::vmsa::VmsaState;

/// One run of pages of one type.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RecordLine {
    /// Guest-physical address, in hex.
    pub gpa: String,
    /// Length in bytes.
    pub len: u64,
    /// Page type, as in the firmware's specification.
    pub page_type: String,
    /// What it is.
    pub name: String,
    /// Digest after it, in hex.
    pub digest: String,
}

/// Consecutive vCPUs with the same registers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VcpuLine {
    /// Number of the first one.
    pub first: u32,
    /// Number of the last one.
    pub last: u32,
    /// Registers that are not zero.
    pub registers: BTreeMap<String, String>,
}

/// The launch digest of one number of vCPUs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CountDigest {
    /// Number of vCPUs.
    pub vcpus: u32,
    /// Launch digest in hex.
    pub launch_digest: String,
}

/// A launch, step by step.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Explanation {
    /// Names this form of file.
    pub format: String,
    /// What was asked for: image kind, monitor, options, hashes of files.
    pub inputs: BTreeMap<String, String>,
    /// Launch digests, one per number of vCPUs asked for.
    pub digests: Vec<CountDigest>,
    /// Page records in launch order.
    pub records: Vec<RecordLine>,
    /// vCPUs in order.
    pub vcpus: Vec<VcpuLine>,
    /// What a measured boot leaves in the TPM: for each bank (`sha256`, `sha384`) the PCRs that it extends,
    /// by number, in hex. Empty if the guest has no TPM.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub pcrs: BTreeMap<String, BTreeMap<u32, String>>,
}

/// The registers of a vCPU that are not zero, by name.
fn registers(state: &VmsaState) -> BTreeMap<String, String> {
    let mut all = BTreeMap::new();
    let segments = [
        ("es", &state.es),
        ("cs", &state.cs),
        ("ss", &state.ss),
        ("ds", &state.ds),
        ("fs", &state.fs),
        ("gs", &state.gs),
        ("gdtr", &state.gdtr),
        ("ldtr", &state.ldtr),
        ("idtr", &state.idtr),
        ("tr", &state.tr),
    ];
    for (name, segment) in segments {
        let fields = [
            ("selector", u64::from(segment.selector)),
            ("attrib", segment.attrib.into()),
            ("limit", segment.limit.into()),
            ("base", segment.base),
        ];
        all.extend(fields.map(|(field, value)| (format!("{name}.{field}"), value)));
    }
    let plain = [
        ("cpl", u64::from(state.cpl)),
        ("efer", state.efer),
        ("cr0", state.cr0),
        ("cr3", state.cr3),
        ("cr4", state.cr4),
        ("dr6", state.dr6),
        ("dr7", state.dr7),
        ("rflags", state.rflags),
        ("rip", state.rip),
        ("g_pat", state.g_pat),
        ("rax", state.rax),
        ("rbx", state.rbx),
        ("rcx", state.rcx),
        ("rdx", state.rdx),
        ("rsp", state.rsp),
        ("rbp", state.rbp),
        ("rsi", state.rsi),
        ("rdi", state.rdi),
        ("sev_features", state.sev_features),
        ("xcr0", state.xcr0),
        ("mxcsr", state.mxcsr.into()),
        ("x87_fcw", state.x87_fcw.into()),
    ];
    all.extend(plain.map(|(name, value)| (name.to_owned(), value)));
    all.extend(state.r8_r15.iter().enumerate().map(|(i, value)| (format!("r{}", i + 8), *value)));
    all.into_iter()
        .filter(|(_, value)| *value != 0)
        .map(|(name, value)| (name, format!("{value:#x}")))
        .collect()
}

impl Explanation {
    /// Describes a launch; `trace` must be of these records and vCPUs.
    pub fn new(records: &[Record], vcpus: &[VmsaState], trace: &Trace) -> Self {
        let line = |(record, digest): (&Record, &LaunchDigest)| RecordLine {
            gpa: format!("{:#x}", record.gpa),
            len: record.len,
            page_type: record.page_type.to_string(),
            name: record.name.to_string(),
            digest: digest.to_string(),
        };
        let mut vcpu_lines: Vec<VcpuLine> = Vec::new();
        let mut previous = None;
        for (id, state) in (0..).zip(vcpus) {
            match vcpu_lines.last_mut() {
                Some(line) if previous == Some(state) => line.last = id,
                _ => vcpu_lines.push(VcpuLine { first: id, last: id, registers: registers(state) }),
            }
            previous = Some(state);
        }
        Explanation {
            format: MEASUREMENT_SET_FORMAT.into(),
            inputs: BTreeMap::new(),
            digests: Vec::new(),
            records: records.iter().zip(&trace.records).map(line).collect(),
            vcpus: vcpu_lines,
            pcrs: BTreeMap::new(),
        }
    }

    /// Reads what `cvmm measure --json` wrote.
    pub fn parse(text: &str) -> Result<Self, String> {
        let explanation: Explanation = serde_json::from_str(text).map_err(|e| e.to_string())?;
        if explanation.format != MEASUREMENT_SET_FORMAT {
            return Err(format!(
                "format is '{:.40}', expected '{MEASUREMENT_SET_FORMAT}'",
                explanation.format
            ));
        }
        Ok(explanation.printable())
    }

    /// The same with control characters written out: what is shown on a terminal must not pass for something
    /// else.
    fn printable(mut self) -> Self {
        fn clean(text: &mut String) {
            if text.contains(char::is_control) {
                let shown = |c: char| match c.is_control() {
                    true => c.escape_default().collect::<String>(),
                    false => c.to_string(),
                };
                *text = text.chars().map(shown).collect();
            }
        }
        fn clean_map(map: &mut BTreeMap<String, String>) {
            *map = std::mem::take(map)
                .into_iter()
                .map(|(mut name, mut value)| {
                    clean(&mut name);
                    clean(&mut value);
                    (name, value)
                })
                .collect();
        }
        clean_map(&mut self.inputs);
        self.vcpus.iter_mut().for_each(|line| clean_map(&mut line.registers));
        self.digests.iter_mut().for_each(|digest| clean(&mut digest.launch_digest));
        for line in &mut self.records {
            [&mut line.gpa, &mut line.page_type, &mut line.name, &mut line.digest]
                .into_iter()
                .for_each(clean);
        }
        self
    }

    /// The launch step by step, for people.
    pub fn steps(&self) -> String {
        let mut out = String::new();
        let _ = writeln!(
            out,
            "{:>18}  {:>12}  {:10}  {:28}  digest after it",
            "address", "bytes", "type", "what"
        );
        for record in &self.records {
            let _ = writeln!(
                out,
                "{:>18}  {:>12}  {:10}  {:28}  {}",
                record.gpa, record.len, record.page_type, record.name, record.digest
            );
        }
        for vcpu in &self.vcpus {
            let who = match (vcpu.first, vcpu.last) {
                (first, last) if first == last => format!("vCPU {first}"),
                (first, last) => format!("vCPUs {first} to {last}"),
            };
            let shown: Vec<String> = ["cs.base", "rip", "rdx", "rsi", "cr3", "sev_features"]
                .iter()
                .filter_map(|name| Some(format!("{name} {}", vcpu.registers.get(*name)?)))
                .collect();
            let _ = writeln!(out, "{:>18}  {:>12}  {:10}  {who}: {}", "-", 4096, "VMSA", shown.join(", "));
        }
        out
    }

    /// The guest's memory from high to low addresses, as a drawing.
    pub fn memory_map(&self) -> String {
        let address = |line: &RecordLine| {
            line.gpa.strip_prefix("0x").and_then(|hex| u64::from_str_radix(hex, 16).ok()).unwrap_or(0)
        };
        let mut lines: Vec<(u64, &RecordLine)> =
            self.records.iter().map(|line| (address(line), line)).collect();
        lines.sort_by_key(|(gpa, _)| std::cmp::Reverse(*gpa));
        let border = format!("{:>18} +{}+\n", "", "-".repeat(46));
        let mut out = border.clone();
        let mut above: Option<u64> = None;
        for (gpa, line) in lines {
            let end = gpa.saturating_add(line.len);
            if above.is_some_and(|above| end < above) {
                let _ = writeln!(out, "{:>18} |{:^46}|", "", "...");
                out.push_str(&border);
            }
            let _ =
                writeln!(out, "{:>#18x} | {:10} {:33} |", end.saturating_sub(1), line.page_type, line.name);
            let _ = writeln!(out, "{gpa:>#18x} | {:>44} |", format!("{} KiB", line.len / 1024));
            out.push_str(&border);
            above = Some(gpa);
        }
        out
    }
}

/// Where two launches part, and why.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Divergence {
    /// The step in both launches.
    pub step: String,
    /// The first launch there.
    pub first: String,
    /// The second launch there.
    pub second: String,
    /// Likely cause, and what to look at.
    pub cause: String,
}

impl fmt::Display for Divergence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "the launches part at {}", self.step)?;
        writeln!(f, "  first:  {}", self.first)?;
        writeln!(f, "  second: {}", self.second)?;
        write!(f, "  likely cause: {}", self.cause)
    }
}

/// The first step at which two launches differ; `None` if all steps agree.
pub fn diff(first: &Explanation, second: &Explanation) -> Option<Divergence> {
    let steps = first.records.len().max(second.records.len());
    for i in 0..steps {
        let (a, b) = (first.records.get(i), second.records.get(i));
        if a == b {
            continue;
        }
        let show = |line: Option<&RecordLine>| match line {
            Some(r) => format!("{} '{}' at {}, {} bytes", r.page_type, r.name, r.gpa, r.len),
            None => "no more pages".into(),
        };
        return Some(Divergence {
            step: format!("record {} of the pages", i + 1),
            first: show(a),
            second: show(b),
            cause: record_cause(a, b, &changed_inputs(first, second)),
        });
    }
    diff_vcpus(first, second)
}

/// Names and values of inputs that differ.
fn changed_inputs(first: &Explanation, second: &Explanation) -> Vec<String> {
    let names: std::collections::BTreeSet<&String> =
        first.inputs.keys().chain(second.inputs.keys()).collect();
    let value = |e: &Explanation, name: &String| e.inputs.get(name).cloned().unwrap_or_else(|| "none".into());
    names
        .into_iter()
        .filter(|name| value(first, name) != value(second, name))
        .map(|name| format!("{name} ({} and {})", value(first, name), value(second, name)))
        .collect()
}

fn record_cause(a: Option<&RecordLine>, b: Option<&RecordLine>, inputs: &[String]) -> String {
    let told = if inputs.is_empty() {
        "no recorded input differs".to_owned()
    } else {
        format!("these inputs differ: {}", inputs.join("; "))
    };
    let what = match (a, b) {
        (Some(a), Some(b)) if (&a.gpa, a.len, &a.page_type) == (&b.gpa, b.len, &b.page_type) => {
            format!("the same pages with other contents, so another file or option behind '{}'", a.name)
        }
        (Some(a), Some(b)) if (&a.gpa, a.len) == (&b.gpa, b.len) => {
            let zero = PageType::Zero.to_string();
            let normal = PageType::Normal.to_string();
            if [&a.page_type, &b.page_type].contains(&&zero)
                && [&a.page_type, &b.page_type].contains(&&normal)
            {
                "zero pages by type or by contents (an IGVM file's convention), or kernel hashes in one launch only".into()
            } else {
                "the same pages as another type, as different monitors do".to_owned()
            }
        }
        (Some(a), Some(b)) if a.name == b.name && a.page_type == b.page_type => {
            "the same part with another size or place: another file, memory size or number of vCPUs".into()
        }
        (Some(_), Some(_)) => {
            "another order of pages: another monitor, or another build of the firmware".into()
        }
        _ => "one launch has more pages".into(),
    };
    format!("{what}; {told}")
}

fn diff_vcpus(first: &Explanation, second: &Explanation) -> Option<Divergence> {
    let count = |e: &Explanation| e.vcpus.last().map_or(0, |line| u64::from(line.last) + 1);
    let at = |e: &Explanation, id: u32| e.vcpus.iter().find(|l| l.first <= id && id <= l.last).cloned();
    // Registers change only where a line of either launch begins.
    let starts = first.vcpus.iter().chain(&second.vcpus).map(|line| line.first);
    let mut starts: Vec<u32> = starts.collect();
    starts.sort_unstable();
    starts.dedup();
    for id in starts {
        let (Some(a), Some(b)) = (at(first, id), at(second, id)) else { break };
        if a.registers == b.registers {
            continue;
        }
        let names: std::collections::BTreeSet<&String> =
            a.registers.keys().chain(b.registers.keys()).collect();
        let value =
            |line: &VcpuLine, name: &String| line.registers.get(name).cloned().unwrap_or("0x0".into());
        let changed: Vec<&String> =
            names.into_iter().filter(|name| value(&a, name) != value(&b, name)).collect();
        let show = |line: &VcpuLine| {
            let all: Vec<String> =
                changed.iter().map(|name| format!("{name} {}", value(line, name))).collect();
            all.join(", ")
        };
        let cause = register_cause(&changed);
        return Some(Divergence {
            step: format!("the registers of vCPU {id}"),
            first: show(&a),
            second: show(&b),
            cause,
        });
    }
    (count(first) != count(second)).then(|| Divergence {
        step: "the number of vCPUs".into(),
        first: format!("{} vCPUs", count(first)),
        second: format!("{} vCPUs", count(second)),
        cause: "each vCPU's save area is measured, so every number of vCPUs has its own digest".into(),
    })
}

fn register_cause(changed: &[&String]) -> String {
    let is = |name: &str| changed.iter().any(|c| *c == name);
    if is("sev_features") {
        "other guest features: kernels before 6.10 add bit 5 (debug swap) by themselves, later ones only on request".into()
    } else if is("mxcsr") || is("x87_fcw") {
        "another monitor, or a kernel before 6.10, which leaves the floating-point state out of the save area"
            .into()
    } else if is("rdx") && changed.len() == 1 {
        "another vCPU model: its CPUID signature is in RDX".into()
    } else if changed.iter().all(|name| name.starts_with("cs.") || *name == "rip") {
        "another start address: another firmware build, or another monitor".into()
    } else {
        "another monitor, or other boot parameters".into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::digest::trace;
    use crate::plan::LaunchPlan;

    fn plan(byte: u8, vcpus: usize) -> LaunchPlan {
        let records = vec![
            Record::new(0xffff_f000, PageType::Normal, vec![1; 4096], "firmware"),
            Record::new(0x80_0000, PageType::Normal, vec![byte; 4096], "kernel hashes"),
            Record::empty(0x1000, 0x3000, PageType::Zero, "SEC memory"),
        ];
        LaunchPlan { records, vcpus: vec![VmsaState::reset(); vcpus] }
    }

    fn explain(plan: &LaunchPlan) -> Explanation {
        Explanation::new(&plan.records, &plan.vcpus, &trace(plan).unwrap())
    }

    #[test]
    fn the_first_difference_is_named_with_its_cause() {
        let base = explain(&plan(1, 2));
        assert_eq!(diff(&base, &explain(&plan(1, 2))), None);

        let found = diff(&base, &explain(&plan(2, 2))).unwrap();
        assert!(found.step.contains("record 2") && found.cause.contains("'kernel hashes'"), "{found}");

        let mut zero = plan(1, 2);
        zero.records[1].page_type = PageType::Zero;
        assert!(diff(&base, &explain(&zero)).unwrap().cause.contains("kernel hashes in one launch only"));

        let mut swapped = plan(1, 2);
        swapped.records.swap(1, 2);
        assert!(diff(&base, &explain(&swapped)).unwrap().cause.contains("another order"));

        let mut model = plan(1, 2);
        model.vcpus[1].rdx = 0xa00f11;
        let found = diff(&base, &explain(&model)).unwrap();
        assert!(found.step.contains("vCPU 1") && found.cause.contains("vCPU model"), "{found}");
        assert_eq!((found.first.as_str(), found.second.as_str()), ("rdx 0x600", "rdx 0xa00f11"));

        let mut features = plan(1, 2);
        features.vcpus.iter_mut().for_each(|vcpu| vcpu.sev_features = 0x21);
        assert!(diff(&base, &explain(&features)).unwrap().cause.contains("debug swap"));

        let found = diff(&base, &explain(&plan(1, 3))).unwrap();
        assert!(found.step.contains("number of vCPUs"), "{found}");
    }

    /// Somebody else's file may hold anything.
    #[test]
    fn nothing_that_a_file_says_moves_the_cursor() {
        let mut ours = explain(&plan(1, 1));
        let mut theirs = ours.clone();
        let bad = "\x1b[2Jthe launches are the same\n";
        ours.inputs.insert("kernel".into(), "one".into());
        theirs.inputs.insert(bad.into(), bad.into());
        theirs.records[1].name = bad.into();
        theirs.vcpus[0].registers.insert(bad.into(), bad.into());
        let theirs = Explanation::parse(&serde_json::to_string(&theirs).unwrap()).unwrap();
        let control = |c: char| c.is_control() && c != '\n';
        let shown = diff(&ours, &theirs).unwrap().to_string();
        assert!(!shown.contains(control) && shown.contains("\\u{1b}[2J"), "{shown:?}");
        assert!(!theirs.steps().contains(control));
        assert!(!shown.lines().any(|line| line.starts_with("the launches are the same")));
    }

    #[test]
    fn an_explanation_survives_its_file() {
        let explanation = explain(&plan(1, 255));
        assert_eq!(explanation.vcpus.len(), 1, "equal vCPUs share a line");
        let text = serde_json::to_string(&explanation).unwrap();
        assert_eq!(Explanation::parse(&text), Ok(explanation.clone()));
        assert!(Explanation::parse(&text.replace("measurement-1", "measurement-2")).is_err());
        let map = explanation.memory_map();
        let (firmware, low) = (map.find("firmware").unwrap(), map.find("SEC memory").unwrap());
        assert!(firmware < low, "high addresses come first");
    }
}
