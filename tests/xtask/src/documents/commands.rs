// SPDX-License-Identifier: Apache-2.0
//! Command lines that pages show are command lines that the programs take.
//!
//! A line of a shell block goes to clap as it stands. One with an ellipsis, and code within a text, is
//! walked: each subcommand and each option has to be there.

use std::collections::BTreeSet;
use std::path::Path;

use clap::Arg;
use clap::Command;
use clap::CommandFactory as _;
use clap::error::ErrorKind;

use super::Pages;
use super::none;
use super::one;
use super::pages;
use super::problem;

/// Options of other programs that pages speak of.
const OTHERS: [&str; 8] = ["tpmstate", "key", "runas", "vmpl", "test", "mode", "vcpu-sig", "snp-ovmf-hash"];

/// The programs, by the word that calls them.
struct Programs {
    cvmm: Command,
    service: Command,
    xtask: Command,
}

impl Programs {
    fn new() -> Programs {
        let [cvmm, service] = super::options::programs::programs();
        let mut programs = Programs { cvmm, service, xtask: crate::Chore::command() };
        programs.cvmm.build();
        programs.service.build();
        programs.xtask.build();
        programs
    }

    /// The program that a simple command calls, with the words from its name on. Words before it that change
    /// nothing are left out.
    fn called<'a>(&self, words: &'a [String]) -> Option<(&Command, &'a [String])> {
        let mut words = words;
        loop {
            let first = words.first()?.as_str();
            words = match first {
                "if" | "!" | "then" | "else" | "do" | "sudo" => &words[1..],
                "timeout" => words.get(2..)?,
                _ if first.contains('=') && !first.starts_with('-') => &words[1..],
                "cargo" if words.get(1).is_some_and(|word| word == "xtask") => {
                    return Some((&self.xtask, &words[1..]));
                }
                _ => {
                    let program = match first.rsplit('/').next()? {
                        "cvmm" => &self.cvmm,
                        "vtpm-svc" => &self.service,
                        _ => return None,
                    };
                    return Some((program, words));
                }
            };
        }
    }

    /// What is wrong with a simple command; `whole` if it can be given to clap as it stands.
    fn check(&self, words: &[String], whole: bool) -> Result<(), String> {
        let Some((program, words)) = self.called(words) else { return Ok(()) };
        let whole = whole && !words.iter().any(|word| word.contains('…') || word.contains("..."));
        if whole {
            let parsed = program.clone().try_get_matches_from(words);
            let asked = [ErrorKind::DisplayHelp, ErrorKind::DisplayVersion];
            if let Err(error) = parsed
                && !asked.contains(&error.kind())
            {
                let text = error.to_string();
                return Err(format!("{}: {}", words.join(" "), text.lines().next().unwrap_or_default()));
            }
        } else {
            walk(program, words).map_err(|what| format!("{}: {what}", words.join(" ")))?;
        }
        // What runs inside of L1 is a command as well.
        match words.iter().position(|word| word == "--") {
            Some(end) if words.get(1).is_some_and(|word| word == "l1") => {
                self.check(&words[end + 1..], whole)
            }
            _ => Ok(()),
        }
    }

    fn options(&self) -> BTreeSet<String> {
        let mut options = BTreeSet::new();
        for program in [&self.cvmm, &self.service, &self.xtask] {
            collect(program, &mut options);
        }
        options
    }
}

fn names(arg: &Arg) -> Vec<String> {
    arg.get_long_and_visible_aliases()
        .into_iter()
        .flatten()
        .chain(arg.get_all_aliases().into_iter().flatten())
        .map(str::to_owned)
        .collect()
}

fn collect(command: &Command, options: &mut BTreeSet<String>) {
    options.extend(command.get_arguments().flat_map(names));
    command.get_subcommands().for_each(|command| collect(command, options));
}

fn walk(program: &Command, words: &[String]) -> Result<(), String> {
    let mut command = program;
    let mut value = false;
    for word in words.iter().skip(1) {
        if word == "--" {
            break;
        }
        if let Some(option) = word.strip_prefix("--") {
            let (option, attached) = option.split_once('=').map_or((option, false), |(name, _)| (name, true));
            let known = ["help", "version"].contains(&option);
            let arg = command.get_arguments().find(|arg| names(arg).iter().any(|name| name == option));
            match arg {
                Some(arg) => value = !attached && arg.get_num_args().is_some_and(|n| n.min_values() > 0),
                None if known => {}
                None => return Err(format!("no option --{option}")),
            }
        } else if value || word.starts_with('-') || word.contains('…') || word.contains("...") {
            value = false;
        } else if let Some(next) = command.find_subcommand(word) {
            command = next;
        } else if command.get_positionals().next().is_none()
            && word.chars().all(|c| c.is_ascii_lowercase() || c == '-')
        {
            return Err(format!("no subcommand '{word}'"));
        }
    }
    Ok(())
}

/// The simple commands of a script, with redirections left out, each with its line.
fn simple_commands(script: &str) -> Vec<(usize, Vec<String>)> {
    let mut commands = vec![(0, Vec::new())];
    let mut word: Option<String> = None;
    let mut quote = None;
    let mut here: Option<String> = None;
    let mut here_wanted: Option<String> = None;
    for (index, line) in script.lines().enumerate() {
        if let Some(end) = &here {
            if line == end {
                here = None;
            }
            continue;
        }
        let (text, goes_on) = match line.strip_suffix('\\') {
            Some(text) => (text, true),
            None => (line, false),
        };
        let mut before = ' ';
        for c in text.chars().chain([' ']) {
            match (quote, c) {
                (Some(open), c) if c == open => quote = None,
                (Some(_), c) => word.get_or_insert_default().push(c),
                (None, '\'' | '"') => {
                    quote = Some(c);
                    word.get_or_insert_default();
                }
                (None, '#') if word.is_none() => break,
                (None, ' ') => {
                    if let Some(word) = word.take() {
                        if let Some(end) = word.strip_prefix("<<") {
                            here_wanted = Some(end.to_owned());
                        }
                        if let Some((_, words)) = commands.last_mut() {
                            words.push(word);
                        }
                    }
                }
                (None, ';' | '|' | '(' | ')' | '&') if before != '>' => {
                    let ended = word.take();
                    if let (Some(word), Some((_, words))) = (ended, commands.last_mut()) {
                        words.push(word);
                    }
                    commands.push((index, Vec::new()));
                }
                (None, c) => word.get_or_insert_default().push(c),
            }
            before = c;
        }
        if quote.is_some() {
            word.get_or_insert_default().push('\n');
        } else if !goes_on {
            commands.push((index + 1, Vec::new()));
        }
        here = here_wanted.take();
    }
    for (_, words) in &mut commands {
        let mut kept = Vec::new();
        let mut skip = false;
        for word in words.drain(..) {
            let bare = word.trim_start_matches(|c: char| c.is_ascii_digit());
            match (std::mem::take(&mut skip), bare) {
                (true, _) => {}
                (false, ">" | "<" | ">>") => skip = true,
                (false, bare) if bare.starts_with('>') || bare.starts_with('<') && bare != "<" => {}
                _ => kept.push(word),
            }
        }
        *words = kept;
    }
    commands.retain(|(_, words)| !words.is_empty());
    commands
}

fn wrong(pages: &Pages) -> Vec<String> {
    let programs = Programs::new();
    let options = programs.options();
    let mut problems = Vec::new();
    for (name, page) in pages {
        for block in page.blocks.iter().filter(|block| ["sh", ""].contains(&block.language.as_str())) {
            for (line, words) in simple_commands(&block.text) {
                if let Err(what) = programs.check(&words, true) {
                    problems.push(problem(name, block.line + line, what));
                }
            }
        }
        for (line, code) in &page.code {
            for (_, words) in simple_commands(code) {
                if let Err(what) = programs.check(&words, false) {
                    problems.push(problem(name, *line, what));
                }
            }
            let option = code
                .strip_prefix("--")
                .map(|rest| rest.split([' ', '=', '[', '/', ':']).next().unwrap_or_default());
            if let Some(option) = option
                && !option.is_empty()
                && !options.contains(option)
                && !OTHERS.contains(&option)
                // The change log tells of options that are gone.
                && name != Path::new("CHANGELOG.md")
            {
                problems.push(problem(name, *line, format!("no program of ours has `--{option}`")));
            }
        }
    }
    problems
}

#[test]
fn command_lines_exist() {
    none(&wrong(&pages()));
}

#[test]
fn most_command_lines_of_the_pages_are_seen() {
    let programs = Programs::new();
    let pages = pages();
    let blocks = pages.values().flat_map(|page| &page.blocks);
    let commands = blocks.flat_map(|block| simple_commands(&block.text));
    let seen = commands.filter(|(_, words)| programs.called(words).is_some()).count();
    assert!(seen > 50, "{seen}");
}

#[test]
fn wrong_command_lines_are_found() {
    for line in [
        "cvmm --kernal x",
        "cvmm run --kernel x",
        "cvmm measure --kernel x --disk y",
        "cvmm verify report.bin",
        "a && target/release/cvmm vmgs open vm.vmgs",
        "timeout 3 cvmm --kernel x --memory 5parrots",
        "cargo xtask dmeo",
        "cargo xtask l1 -- cvmm --kernal x",
        "vtpm-svc sockets",
        "cvmm measure … --diff2",
        "x=$(cvmm id-block shew a)",
    ] {
        let pages = one("docs/a.md", &format!("```sh\n{line}\n```\n"));
        assert_eq!(wrong(&pages).len(), 1, "{line}");
    }
    for code in ["cvmm measure --kernal x", "cvmm vmsg", "--strickt", "cargo xtask benk"] {
        let pages = one("docs/a.md", &format!("text `{code}` text\n"));
        assert_eq!(wrong(&pages).len(), 1, "{code}");
    }
}

#[test]
fn right_command_lines_are_not() {
    for line in [
        "cvmm --kernel x --snp --platform emulated </dev/null >console.txt 2>&1",
        "cvmm --kernel bzImage --cmdline 'console=ttyS0; quiet' --vtpm vm.vmgs --vtpm-key-file vm.key",
        "(umask 077; head -c 32 /dev/urandom >vm.key); cvmm vmgs create vm.vmgs --key-file vm.key  # once",
        "cat >x <<'END'\ncvmm --nothing\nEND\ncvmm doctor",
        "install -m 755 target/release/cvmm /usr/bin",
        "cargo xtask test --list | grep cvmm",
    ] {
        none(&wrong(&one("docs/a.md", &format!("```sh\n{line}\n```\n"))));
    }
}
