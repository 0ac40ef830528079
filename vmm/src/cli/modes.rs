// SPDX-License-Identifier: Apache-2.0
//! No option says nothing: one that has no effect on what a command line asks for is refused.
//!
//! Who asks for `--strict` and gets a run without it believes in checks that nobody made; who measures with
//! `--vmm qemu` lists a digest that QEMU never shows. The parser knows some of these rules, which options
//! exclude each other; whether an option means something also depends on values, on what is booted and where.
//! [`RULES`] has that for every option of a run and of `cvmm measure`, and a test holds it against the
//! options that there are.

use clap::ArgMatches;
use clap::parser::ValueSource;
use snp::image::vmm_type::VmmType;

use super::Failure;

/// What is booted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Image {
    /// A kernel that cvmm boots itself.
    Direct,
    /// OVMF.
    Firmware,
    /// An IGVM file.
    Igvm,
}

/// What a command line asks for, as far as the meaning of options depends on it.
#[derive(Clone, Copy, Debug)]
struct Mode {
    /// What is booted.
    image: Image,
    /// An SNP guest; what is only measured always is one.
    snp: bool,
    /// On the emulated platform.
    emulated: bool,
    /// There is a kernel.
    kernel: bool,
    /// A TPM whose service cvmm starts.
    vtpm: bool,
    /// A reset is followed by a new VM.
    restart: bool,
    /// The measured launch is cvmm's.
    ours: bool,
    /// Nothing runs: a digest is computed.
    measure: bool,
    /// The digest is of a monitor whose vCPUs start with the same registers on every model.
    any_model: bool,
    /// All RAM is launched, none is left to accept.
    launches_all: bool,
    /// Under an SVSM, which is launched in one way only.
    svsm: bool,
}

impl Mode {
    fn of(matches: &ArgMatches, measure: bool) -> Mode {
        let given = |id: &str| has(matches, id) && matches.value_source(id) == Some(ValueSource::CommandLine);
        let is = |id: &str, value: &str| {
            given(id)
                && matches
                    .get_raw(id)
                    .is_some_and(|mut values| values.next().is_some_and(|found| found == value))
        };
        let image = match (given("firmware"), given("igvm")) {
            (true, _) => Image::Firmware,
            (_, true) => Image::Igvm,
            _ => Image::Direct,
        };
        Mode {
            image,
            snp: measure || given("snp"),
            emulated: is("platform", "emulated"),
            kernel: given("kernel"),
            vtpm: given("vtpm"),
            restart: is("on_reboot", "restart"),
            ours: !given("vmm") || is("vmm", "cvmm"),
            measure,
            any_model: matches
                .try_get_one::<VmmType>("vmm")
                .ok()
                .flatten()
                .is_some_and(|vmm| !vmm.uses_signature()),
            launches_all: is("validation", "launch"),
            svsm: given("svsm"),
        }
    }
}

/// When an option means something, and what to tell who gives it otherwise.
struct Rule {
    option: &'static str,
    /// Whether it has an effect.
    means: fn(&Mode) -> bool,
    /// What it needs.
    needs: &'static str,
}

const fn rule(option: &'static str, means: fn(&Mode) -> bool, needs: &'static str) -> Rule {
    Rule { option, means, needs }
}

const DIRECT: &str =
    "it is about a --kernel that cvmm boots itself as an SNP guest (--snp, without --firmware and --igvm)";
const EMULATED: &str = "it is about --snp --platform emulated";
const FIRMWARE: &str = "it is about a launch of --firmware";
const KERNEL: &str = "it goes with a --kernel, and none is given";
const SERVICE: &str =
    "it is about the service that --vtpm starts; the one behind --vtpm-socket has options of its own";
const FILE: &str = "it needs --snp; a plain guest boots a --kernel";
const SNP: &str = "it is about an SNP guest (--snp)";

/// Every option that means something in some modes only.
const RULES: &[Rule] = &[
    rule("initrd", |mode| mode.kernel, KERNEL),
    // An IGVM file may have a place for it.
    rule("cmdline", |mode| mode.kernel || mode.image == Image::Igvm, KERNEL),
    rule("accept", |mode| mode.snp && mode.image == Image::Direct, DIRECT),
    rule("accept", |mode| !mode.launches_all, "with --validation launch no memory is left to accept"),
    rule(
        "memory",
        |mode| !mode.measure || mode.image == Image::Direct,
        "the digest of a firmware or IGVM launch is the same for every memory size",
    ),
    rule("secure_tsc", |mode| mode.snp && mode.image == Image::Direct, DIRECT),
    rule("validation", |mode| mode.snp && mode.image == Image::Direct, DIRECT),
    rule("tamper", |mode| mode.snp && mode.image == Image::Direct, DIRECT),
    rule("c_bit", |mode| mode.image == Image::Direct, DIRECT),
    rule("firmware", |mode| mode.snp, FILE),
    rule("igvm", |mode| mode.snp, FILE),
    rule("zero_pages", |mode| mode.snp && mode.image == Image::Igvm, "it is about a launch of --igvm"),
    rule("vcpu_model", |mode| mode.snp && mode.image == Image::Firmware, FIRMWARE),
    rule(
        "vcpu_model",
        |mode| !mode.any_model,
        "this monitor's vCPUs start with the same registers on every model",
    ),
    rule("guest_features", |mode| mode.snp && mode.image == Image::Firmware, FIRMWARE),
    rule(
        "vmm",
        |mode| mode.ours || mode.image == Image::Firmware && !mode.svsm,
        "other monitors launch --firmware without --svsm; the boot of a --kernel without firmware, and cvmm's IGVM launch, are cvmm's own",
    ),
    rule("svsm", |mode| mode.image == Image::Firmware, FIRMWARE),
    rule("vars_size", |mode| mode.image == Image::Firmware, FIRMWARE),
    rule("backing", |mode| mode.emulated, EMULATED),
    rule("strict", |mode| mode.emulated, EMULATED),
    rule("pvalidate_2m", |mode| mode.emulated, EMULATED),
    rule("product", |mode| mode.emulated, EMULATED),
    rule("emulated_keys", |mode| mode.emulated, EMULATED),
    rule("statistics", |mode| mode.emulated, EMULATED),
    rule("platform", |mode| mode.snp, SNP),
    rule("policy", |mode| mode.snp, SNP),
    rule("host_data", |mode| mode.snp, SNP),
    rule("id_block", |mode| mode.snp, SNP),
    rule("id_auth", |mode| mode.snp, SNP),
    rule("reference", |mode| mode.snp, SNP),
    rule("accept_cpuid", |mode| mode.snp, SNP),
    rule("certs", |mode| mode.snp, SNP),
    rule("max_lives", |mode| mode.restart, "it is about --on-reboot restart"),
    rule("vtpm_key_file", |mode| mode.vtpm, SERVICE),
    rule("vtpm_passphrase_file", |mode| mode.vtpm, SERVICE),
    rule("vtpm_key_credential", |mode| mode.vtpm, SERVICE),
    rule("vtpm_key_hook", |mode| mode.vtpm, SERVICE),
    rule("vtpm_anchor", |mode| mode.vtpm, SERVICE),
    rule("vm_uuid", |mode| mode.vtpm, SERVICE),
    rule("vtpm_accept_rollback", |mode| mode.vtpm, SERVICE),
    rule("vtpm_adopt", |mode| mode.vtpm, SERVICE),
    rule("vtpm_ek_ca", |mode| mode.vtpm, SERVICE),
    rule("vtpm_svc", |mode| mode.vtpm, SERVICE),
    rule(
        "vtpm",
        |mode| mode.image == Image::Direct,
        "only a --kernel that cvmm boots itself can be told of a TPM: there is no way to tell firmware",
    ),
    rule(
        "vtpm_socket",
        |mode| mode.image == Image::Direct,
        "only a --kernel that cvmm boots itself can be told of a TPM: there is no way to tell firmware",
    ),
];

/// Whether the command has such an option: of those that it does not have nothing may be asked.
fn has(matches: &ArgMatches, id: &str) -> bool {
    matches.try_contains_id(id).is_ok()
}

/// Refuses the first option that was given and means nothing.
pub fn check(matches: &ArgMatches, measure: bool) -> Result<(), Failure> {
    let mode = Mode::of(matches, measure);
    // Two measurements are compared, nothing is measured: the parser lets no other option through.
    let idle = RULES.iter().find(|rule| {
        has(matches, rule.option)
            && matches.value_source(rule.option) == Some(ValueSource::CommandLine)
            && !(rule.means)(&mode)
    });
    match idle {
        Some(rule) => {
            let option = rule.option.replace('_', "-");
            Err(Failure::Usage(format!("--{option} would have no effect here: {}", rule.needs)))
        }
        None => Ok(()),
    }
}

#[cfg(test)]
#[path = "modes_test.rs"]
mod tests;
