// SPDX-License-Identifier: Apache-2.0
//! What stands below the options in every help: exit codes and examples, from one table, so that no command
//! lacks them.

use clap::Command;

use crate::doctor;
use crate::run::outcome::exit_codes_help;

/// Examples of a command, by its path below `cvmm`: what it is for, and the line to type.
type Examples = &'static [(&'static str, &'static str)];

const RUN: Examples = &[
    (
        "Boot a kernel as a plain guest",
        "cvmm --kernel bzImage --initrd initrd.img --cmdline 'console=ttyS0' --memory 1G --cpus 2",
    ),
    (
        "The same kernel as an SEV-SNP guest of this host",
        "cvmm --kernel bzImage --initrd initrd.img --cmdline 'console=ttyS0' --snp",
    ),
    (
        "The same without SNP hardware, on the emulated platform (functional only, protects nothing)",
        "cvmm --kernel bzImage --initrd initrd.img --cmdline 'console=ttyS0' --snp --platform emulated",
    ),
    (
        "The launch digest of that guest, without a VM",
        "cvmm measure --kernel bzImage --initrd initrd.img --cmdline 'console=ttyS0'",
    ),
    ("A VM that is described in a file (`cvmm spec` prints one)", "cvmm --spec vm.json"),
    ("An IGVM file, from which pages, registers and policy come", "cvmm --igvm image.igvm --snp"),
    (
        "OVMF built with SEV metadata, with the vCPU model that its digest is computed for",
        "cvmm --firmware OVMF.fd --vcpu-model EPYC-Milan --snp",
    ),
    (
        "A TPM that keeps its state in an encrypted file, which is made once",
        "(umask 077; head -c 32 /dev/urandom >vm.key); cvmm vmgs create vm.vmgs --key-file vm.key",
    ),
    ("", "cvmm --kernel bzImage --initrd initrd.img --vtpm vm.vmgs --vtpm-key-file vm.key"),
];

const COMMANDS: &[(&str, Examples)] = &[
    ("", RUN),
    (
        "measure",
        &[
            (
                "The digest of a direct boot",
                "cvmm measure --kernel bzImage --initrd initrd.img --memory 1G --cpus 2",
            ),
            (
                "For a policy, with what leads to it",
                "cvmm measure --kernel bzImage --initrd initrd.img --json",
            ),
            ("What another launch has otherwise", "cvmm measure --diff before.json after.json"),
            (
                "Firmware that QEMU launches",
                "cvmm measure --firmware OVMF.fd --vmm qemu --vcpu-model EPYC-Milan --vcpus 1-8",
            ),
        ],
    ),
    ("spec", &[("A VM as a file", "cvmm spec --kernel bzImage --snp --memory 1G --on-reboot restart")]),
    (
        "id-block",
        &[
            (
                "A statement of what may launch",
                "cvmm id-block new --digest guest.json --svn 1 --out guest.block",
            ),
            ("Signed", "cvmm id-block sign guest.block --id-key id.pem --out guest.auth"),
        ],
    ),
    (
        "id-block new",
        &[(
            "For a digest of `cvmm measure --json`",
            "cvmm id-block new --digest guest.json --svn 1 --out guest.block",
        )],
    ),
    (
        "id-block sign",
        &[
            ("With a key at hand", "cvmm id-block sign guest.block --id-key id.pem --out guest.auth"),
            (
                "With a signature that another program made",
                "cvmm id-block sign guest.block --id-key id-public.pem --block-signature guest.sig --out guest.auth",
            ),
        ],
    ),
    (
        "id-block show",
        &[
            ("What it says", "cvmm id-block show guest.block guest.auth"),
            ("For QEMU", "cvmm id-block show guest.block guest.auth --qemu"),
        ],
    ),
    (
        "id-block check",
        &[("Before a launch", "cvmm id-block check guest.block guest.auth --digest guest.json")],
    ),
    (
        "verify",
        &[
            (
                "A report with the nonce that the guest was sent",
                "cvmm verify report.bin --certs vcek.der --policy policy.toml --nonce 0123abcd --crl milan.crl",
            ),
            (
                "An extended report, which brings its certificates",
                "cvmm verify extended.bin --policy policy.toml --any-nonce --json",
            ),
        ],
    ),
    ("report", &[("What a report says", "cvmm report show report.bin")]),
    (
        "report show",
        &[
            ("For people", "cvmm report show report.bin"),
            ("For a program", "cvmm report show report.bin --json"),
        ],
    ),
    (
        "certs",
        &[
            ("A table for --certs", "cvmm certs vcek.der cert_chain.pem --out host.certs"),
            ("What is in it", "cvmm certs --show host.certs"),
        ],
    ),
    (
        "doctor",
        &[
            ("What this host can do, and what it lacks", "cvmm doctor"),
            ("For a program", "cvmm doctor --json"),
        ],
    ),
    (
        "vmgs",
        &[
            ("A new image", "cvmm vmgs create vm.vmgs --key-file vm.key"),
            ("Is it sound, and the newest", "cvmm vmgs check vm.vmgs --key-file vm.key"),
        ],
    ),
    (
        "vmgs create",
        &[(
            "With a key that is made first",
            "(umask 077; head -c 32 /dev/urandom >vm.key); cvmm vmgs create vm.vmgs --key-file vm.key",
        )],
    ),
    ("vmgs inspect", &[("Without a key", "cvmm vmgs inspect vm.vmgs")]),
    (
        "vmgs check",
        &[("With everything that can be proved", "cvmm vmgs check vm.vmgs --key-file vm.key --json")],
    ),
    ("vmgs list", &[("Its files", "cvmm vmgs list vm.vmgs --key-file vm.key")]),
    (
        "vmgs export",
        &[("The TPM's older copy", "cvmm vmgs export vm.vmgs --id 61 --output tpm.bin --key-file vm.key")],
    ),
    (
        "vmgs import",
        &[(
            "In the place of a damaged state",
            "cvmm vmgs import vm.vmgs --id 60 --input tpm.bin --key-file vm.key",
        )],
    ),
    (
        "vmgs delete",
        &[("A file that another tool left", "cvmm vmgs delete vm.vmgs --id 100 --key-file vm.key")],
    ),
    ("vmgs rekey", &[("A new key", "cvmm vmgs rekey vm.vmgs --key-file old.key --new-key-file new.key")]),
    (
        "vmgs clone",
        &[(
            "A second VM, with a TPM of its own",
            "cvmm vmgs clone vm.vmgs other.vmgs --key-file vm.key --new-key-file other.key",
        )],
    ),
    (
        "vmgs ppi",
        &[("Clear the TPM at its next start", "cvmm vmgs ppi vm.vmgs --request 5 --key-file vm.key")],
    ),
    ("vmgs clock", &[("How far the guest's clock is from UTC", "cvmm vmgs clock vm.vmgs --key-file vm.key")]),
    (
        "vmgs restore",
        &[
            ("What would be lost", "cvmm vmgs restore backup.vmgs vm.vmgs --key-file vm.key"),
            ("Do it", "cvmm vmgs restore backup.vmgs vm.vmgs --key-file vm.key --confirm"),
        ],
    ),
    (
        "vmgs repair",
        &[(
            "An image that a faulty tool wrote with a known key",
            "cvmm vmgs repair vm.vmgs --key-file vm.key",
        )],
    ),
];

/// Exit codes of the commands that do not run a guest.
const OTHERS: &str = "\
Exit codes:
  0  done; a check or comparison found nothing
  1  failed, or a check or comparison found a fault
  2  the request is not valid";

/// Exit codes of `cvmm vmgs`.
const VMGS: &str = "\
Exit codes:
  0  done
  1  the operating system refused, or there is no space
  2  the request is not valid
  3  `check` found a fault, or a command wants --confirm
  4  no key, or not the key of this image
  5  the image or its anchor is refused
  6  another process uses the image";

fn exit_codes(path: &str) -> String {
    match path.split(' ').next() {
        Some("") => exit_codes_help(),
        Some("doctor") => doctor::EXIT_CODES.into(),
        Some("vmgs") => VMGS.into(),
        _ => OTHERS.into(),
    }
}

/// What stands below the options of the command at `path`.
fn below(path: &str) -> String {
    let mut text = exit_codes(path);
    let examples = COMMANDS.iter().find(|(name, _)| *name == path).map_or(&[][..], |(_, examples)| examples);
    if !examples.is_empty() {
        text.push_str("\n\nExamples:");
    }
    for (what, line) in examples {
        if !what.is_empty() {
            text.push_str(&format!("\n  {what}:"));
        }
        text.push_str(&format!("\n    {line}"));
    }
    text
}

/// `command` with exit codes and examples in the help of every command in it.
pub fn complete(command: Command) -> Command {
    completed(command, "")
}

fn completed(command: Command, path: &str) -> Command {
    let names: Vec<String> = command.get_subcommands().map(|sub| sub.get_name().to_owned()).collect();
    let command = command.after_long_help(below(path));
    // The run's help is long enough without them.
    let command = if path.is_empty() { command } else { command.after_help(below(path)) };
    names.into_iter().filter(|name| name != "help").fold(command, |command, name| {
        let path = if path.is_empty() { name.clone() } else { format!("{path} {name}") };
        command.mut_subcommand(name, |sub| completed(sub, &path))
    })
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;
    use clap::Parser;

    use super::*;
    use crate::cli::Cli;

    /// Words of a shell command in which only single quotes are special.
    fn words(command: &str) -> Vec<String> {
        let mut words = vec![String::new()];
        for (index, part) in command.split('\'').enumerate() {
            if index % 2 == 1 {
                words.last_mut().unwrap().push_str(part);
                continue;
            }
            for (nth, piece) in part.split(' ').enumerate() {
                if nth > 0 {
                    words.push(String::new());
                }
                words.last_mut().unwrap().push_str(piece);
            }
        }
        words.retain(|word| !word.is_empty());
        words
    }

    fn walk(command: &Command, path: &str, seen: &mut Vec<String>) {
        let help = command.get_after_long_help().map(ToString::to_string).unwrap_or_default();
        assert!(help.contains("Exit codes:") && help.contains("Examples:"), "cvmm {path}: {help}");
        seen.push(path.to_owned());
        for sub in command.get_subcommands().filter(|sub| sub.get_name() != "help") {
            walk(sub, format!("{path} {}", sub.get_name()).trim_start(), seen);
        }
    }

    #[test]
    fn every_help_has_exit_codes_and_examples_that_can_be_typed() {
        let mut seen = Vec::new();
        walk(&complete(Cli::command()), "", &mut seen);
        for (path, examples) in COMMANDS {
            assert!(seen.iter().any(|known| known == path), "there is no `cvmm {path}`");
            for (_, line) in *examples {
                let command = line.split("; ").find(|part| part.starts_with("cvmm ")).unwrap();
                if let Err(error) = Cli::try_parse_from(words(command)) {
                    panic!("{command}: {error}");
                }
            }
        }
    }
}
