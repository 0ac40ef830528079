// SPDX-License-Identifier: Apache-2.0
//! The page of all options, made from the parsers themselves.

use std::fmt::Write as _;

use clap::Arg;
use clap::Command;

/// What the page begins with.
const HEAD: &str = "<!-- SPDX-License-Identifier: Apache-2.0 -->
# Every command and option

Made from the programs' own parsers by `cargo run -p vmm --example manual`; a test compares. What `--help` says of an option is what stands here, with
its default.
";

/// The page for these programs.
pub fn page(programs: &[Command]) -> String {
    let mut page = HEAD.to_owned();
    for program in programs {
        let mut program = program.clone();
        program.build();
        section(&mut page, &program, program.get_name());
    }
    page
}

fn section(page: &mut String, command: &Command, name: &str) {
    let about = command.get_about().map(ToString::to_string).unwrap_or_default();
    let _ = write!(page, "\n## {name}\n\n{}\n", text(&about));
    let arguments: Vec<&Arg> = command
        .get_arguments()
        .filter(|arg| !arg.is_hide_set() && !["help", "version"].contains(&arg.get_id().as_str()))
        .collect();
    if !arguments.is_empty() {
        page.push_str("\n| Option | Meaning |\n|---|---|\n");
    }
    for arg in arguments {
        let _ = writeln!(page, "| {} | {} |", usage(arg), meaning(arg));
    }
    for next in command.get_subcommands().filter(|next| next.get_name() != "help" && !next.is_hide_set()) {
        section(page, next, &format!("{name} {}", next.get_name()));
    }
}

/// An option as it is typed, with its value's name and its aliases.
fn usage(arg: &Arg) -> String {
    let values = if arg.get_action().takes_values() {
        let names = arg.get_value_names().unwrap_or_default();
        names.iter().map(|name| name.to_string()).collect::<Vec<_>>().join(" ")
    } else {
        String::new()
    };
    let Some(long) = arg.get_long() else { return format!("`{values}`") };
    let short = arg.get_short().map(|short| format!("`-{short}`, ")).unwrap_or_default();
    let aliases = arg.get_visible_aliases().unwrap_or_default();
    let aliases: String = aliases.iter().map(|alias| format!(", `--{alias}`")).collect();
    format!("{short}`{}`{aliases}", format!("--{long} {values}").trim_end())
}

fn meaning(arg: &Arg) -> String {
    let mut meaning = text(&arg.get_help().map(ToString::to_string).unwrap_or_default());
    let values: Vec<String> = arg
        .get_possible_values()
        .iter()
        .filter(|value| !value.is_hide_set())
        .map(|value| match value.get_help() {
            Some(help) => format!("`{}` ({})", value.get_name(), text(&help.to_string())),
            None => format!("`{}`", value.get_name()),
        })
        .collect();
    if arg.get_action().takes_values() && !values.is_empty() {
        let _ = write!(meaning, ". One of {}", values.join(", "));
    }
    let defaults: Vec<String> =
        arg.get_default_values().iter().map(|value| format!("`{}`", value.to_string_lossy())).collect();
    if arg.get_action().takes_values() && !defaults.is_empty() && !arg.is_hide_default_value_set() {
        let _ = write!(meaning, ". Default: {}", defaults.join(", "));
    }
    meaning
}

/// Text for a cell of a table.
fn text(help: &str) -> String {
    help.split_whitespace().collect::<Vec<_>>().join(" ").replace('|', "\\|").replace('<', "&lt;")
}
