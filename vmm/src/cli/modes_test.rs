// SPDX-License-Identifier: Apache-2.0
//! Every option in every mode: it is used, or the parser or the rules refuse it and name it. What is used
//! where is written down here once more, from what the help and the documents promise.

use clap::CommandFactory;
use clap::FromArgMatches;

use super::*;
use crate::cli::Cli;
use crate::spec::VmSpec;

/// A mode's options.
const RUNS: [(&str, &str); 7] = [
    ("plain", "--kernel k"),
    ("kvm direct", "--kernel k --snp"),
    ("emulated direct", "--kernel k --snp --platform emulated"),
    ("kvm firmware", "--firmware f --snp"),
    ("emulated firmware", "--firmware f --snp --platform emulated"),
    ("kvm igvm", "--igvm i --snp"),
    ("emulated igvm", "--igvm i --snp --platform emulated"),
];
const MEASURES: [(&str, &str); 3] = [
    ("measure direct", "measure --kernel k"),
    ("measure firmware", "measure --firmware f"),
    ("measure igvm", "measure --igvm i"),
];

/// An option with a value, and the words of which a mode's name has to have one for it to be used there.
const OPTIONS: &[(&str, &[&str])] = &[
    ("--initrd r", &["plain", "direct"]),
    ("--cmdline c", &["plain", "direct", "igvm"]),
    ("--memory 1G", &["plain", "direct", "kvm", "emulated"]),
    ("--cpus 2", &["plain", "direct", "firmware", "igvm"]),
    ("--validation stage0", &["direct"]),
    ("--secure-tsc", &["direct"]),
    ("--accept eager", &["direct"]),
    ("--validation launch --accept eager", &[]),
    ("--zero-pages zero", &["igvm"]),
    ("--vcpu-model EPYC-Milan", &["firmware"]),
    ("--guest-features 0x1", &["firmware"]),
    ("--on-reboot restart", &["plain", "direct", "firmware", "igvm"]),
    ("--max-lives 2", &[]),
    ("--on-reboot restart --max-lives 2", &["plain", "kvm", "emulated"]),
    ("--policy 0x30000", &["kvm", "emulated"]),
    ("--host-data 0000000000000000000000000000000000000000000000000000000000000000", &["kvm", "emulated"]),
    ("--id-block b --id-auth a", &["kvm", "emulated"]),
    ("--id-block b --id-auth a --reference r", &["kvm", "emulated"]),
    ("--accept-cpuid", &["kvm", "emulated"]),
    ("--certs t", &["kvm", "emulated"]),
    ("--backing single", &["emulated"]),
    ("--strict", &["emulated"]),
    ("--pvalidate-2m refuse", &["emulated"]),
    ("--product milan", &["emulated"]),
    ("--emulated-keys k", &["emulated"]),
    ("--statistics", &["emulated"]),
    ("--tamper kernel", &["kvm direct", "emulated direct"]),
    ("--vtpm", &["plain", "direct"]),
    ("--vtpm-socket s", &["plain", "direct"]),
    ("--vtpm v --vtpm-key-file f", &["plain", "direct"]),
    ("--vtpm v --vtpm-passphrase-file f", &["plain", "direct"]),
    ("--vtpm v --vtpm-key-credential f", &["plain", "direct"]),
    ("--vtpm v --vtpm-key-hook f", &["plain", "direct"]),
    ("--vtpm v --vtpm-key-hook h --vtpm-anchor a", &["plain", "direct"]),
    ("--vtpm --vtpm-ek-ca a", &["plain", "direct"]),
    ("--vtpm v --vm-uuid u", &["plain", "direct"]),
    ("--vtpm v --vtpm-accept-rollback", &["plain", "direct"]),
    ("--vtpm v --vtpm-adopt", &["plain", "direct"]),
    ("--vm-uuid u", &[]),
    ("--vtpm-socket s --vm-uuid u", &[]),
    ("--vtpm-socket s --vtpm-adopt", &[]),
    ("--vtpm-socket s --vtpm-accept-rollback", &[]),
    ("--vtpm --vtpm-svc s", &["plain", "direct"]),
    ("--vtpm-socket s --vtpm-key-file f", &[]),
    ("--vtpm-socket s --vtpm-passphrase-file f", &[]),
    ("--vtpm-socket s --vtpm-key-credential f", &[]),
    ("--vtpm-socket s --vtpm-key-hook f", &[]),
    ("--vtpm-socket s --vtpm-ek-ca a", &[]),
    ("--vtpm-socket s --vtpm-svc f", &[]),
    ("--snp", &["plain"]),
    ("--vmm qemu", &["measure firmware"]),
    ("--vmm cvmm", &["measure"]),
    ("--vmm qemu --vcpu-model EPYC", &["measure firmware"]),
    ("--vmm ec2 --vcpu-model EPYC", &[]),
    ("--vmm krun --vcpu-model EPYC", &[]),
    ("--vcpus 1-4", &["measure"]),
    ("--c-bit 51", &["measure direct"]),
    ("--svsm s --vars-size 4096", &["measure firmware"]),
    ("--json", &["measure"]),
    ("--explain", &["measure"]),
    ("--dump d", &["measure"]),
];

/// Options that make a mode, or stand for themselves.
const OTHERS: [&str; 9] =
    ["kernel", "firmware", "igvm", "platform", "spec", "diff", "help", "version", "vars_size"];

/// Whether only a run has them all.
fn of_a_run(option: &str) -> bool {
    let command = Cli::command();
    let measure = command.find_subcommand("measure").unwrap();
    let mut names = option.split(' ').filter_map(|word| word.strip_prefix("--"));
    names.any(|name| !measure.get_arguments().any(|arg| arg.get_long() == Some(name)))
}

/// `Err` has what the parser or the rules say.
fn judge(line: &str) -> Result<(), String> {
    let words = std::iter::once("cvmm").chain(line.split(' '));
    let matches = Cli::command().try_get_matches_from(words).map_err(|error| error.to_string())?;
    let result = match matches.subcommand() {
        Some((_, measure)) => check(measure, true),
        None => check(&matches, false),
    };
    result.map_err(|failure| match failure {
        Failure::Usage(text) | Failure::Monitor(text) => text,
        Failure::Stopped(signal) => format!("signal {signal}"),
    })
}

#[test]
fn an_option_is_used_or_refused_by_its_name() {
    for (mode, line) in RUNS.iter().chain(&MEASURES) {
        assert_eq!(judge(line), Ok(()), "{mode}");
        for (option, used_in) in OPTIONS {
            let measures = mode.starts_with("measure");
            let used = used_in.iter().any(|word| mode.contains(word)) && !(measures && of_a_run(option));
            match judge(&format!("{line} {option}")) {
                Ok(()) => assert!(used, "{mode}: {option} is taken without an effect"),
                Err(error) => {
                    assert!(!used, "{mode}: {option} is refused: {error}");
                    let named = option
                        .split(' ')
                        .filter(|word| word.starts_with("--"))
                        .any(|name| error.contains(name));
                    assert!(named, "{mode}: {option}: {error}");
                }
            }
        }
    }
}

/// What a command line stands for.
fn spec(line: &str) -> VmSpec {
    let matches =
        Cli::command().try_get_matches_from(std::iter::once("cvmm").chain(line.split(' '))).unwrap();
    match Cli::from_arg_matches(&matches).unwrap().run.spec() {
        Ok(spec) => spec,
        Err(Failure::Usage(text) | Failure::Monitor(text)) => panic!("{line}: {text}"),
        Err(Failure::Stopped(signal)) => panic!("{line}: signal {signal}"),
    }
}

/// Options whose value here is what holds without them.
const DEFAULTS: [&str; 3] = ["--validation stage0", "--guest-features 0x1", "--backing single"];

#[test]
fn a_file_says_all_that_options_say() {
    for (mode, line) in RUNS {
        for (option, used_in) in OPTIONS {
            let used = used_in.iter().any(|word| mode.contains(word)) && *option != "--snp";
            if !used || judge(&format!("{line} {option}")).is_err() {
                continue;
            }
            // What some options need before they can be given.
            let (base, option) = match *option {
                "--strict" if !line.contains("--kernel") => continue,
                "--strict" => (format!("{line} --backing split"), *option),
                option => match option.strip_prefix("--vtpm v --v") {
                    Some(rest) if !rest.starts_with("tpm-key") && !rest.starts_with("tpm-pass") => {
                        (format!("{line} --vtpm v --vtpm-key-hook h"), &option["--vtpm v ".len()..])
                    }
                    _ => (line.to_owned(), option),
                },
            };
            let given = spec(&format!("{base} {option}"));
            assert_eq!(VmSpec::parse(&given.to_json()), Ok(given.clone()), "{mode}: {option}");
            // Whatever starts a guest is given nothing else, so what is not in it is lost.
            assert!(
                given != spec(&base) || DEFAULTS.contains(&option),
                "{mode}: {option} is not in the file"
            );
        }
    }
}

#[test]
fn firmware_takes_what_belongs_to_its_kernel() {
    for line in ["--firmware f --snp", "measure --firmware f"] {
        for option in ["--initrd r", "--cmdline c"] {
            assert!(
                judge(&format!("{line} {option}")).unwrap_err().contains("none is given"),
                "{line} {option}"
            );
            assert_eq!(judge(&format!("{line} --kernel k {option}")), Ok(()));
        }
    }
}

/// An option that somebody adds later has to be written down here.
#[test]
fn no_option_is_forgotten() {
    let command = Cli::command();
    let measure = command.find_subcommand("measure").unwrap();
    for arg in command.get_arguments().chain(measure.get_arguments()) {
        let Some(long) = arg.get_long() else { continue };
        let tried =
            OPTIONS.iter().any(|(option, _)| option.split(' ').any(|word| word == format!("--{long}")));
        assert!(tried || OTHERS.contains(&arg.get_id().as_str()), "--{long} is in no row");
    }
    for rule in RULES {
        let known =
            command.get_arguments().chain(measure.get_arguments()).any(|arg| arg.get_id() == rule.option);
        assert!(known, "there is no option {}", rule.option);
    }
}
