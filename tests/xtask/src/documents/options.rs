// SPDX-License-Identifier: Apache-2.0
//! The page of all options is what the parsers say.

use std::fs;

use clap::Arg;
use clap::Command;

use super::root;

#[path = "../../../../vmm/examples/manual/options.rs"]
mod made;
#[path = "../../../../vmm/examples/manual/programs.rs"]
pub mod programs;

#[test]
fn the_page_of_options_is_what_the_parsers_say() {
    let made = made::page(&programs::programs());
    let found = fs::read_to_string(root().join("docs/options.md")).expect("docs/options.md");
    let difference = made.lines().zip(found.lines()).find(|(made, found)| made != found);
    let renew = "run `cargo run -p vmm --example manual -- target/manual`";
    assert!(made == found, "{renew}; first difference: {difference:?}");
}

#[test]
fn options_defaults_values_and_aliases_are_shown_and_hidden_ones_are_not() {
    let all = Arg::new("a").long("all").short('a').visible_alias("every").value_name("N").default_value("7");
    let program = Command::new("p").about("Does it").arg(all.help("How many"));
    let program = program.arg(Arg::new("b").long("secret").hide(true));
    let program =
        program.subcommand(Command::new("q").arg(Arg::new("kind").long("kind").value_parser(["x", "y"])));
    let page = made::page(&[program]);
    for row in [
        "## p\n\nDoes it",
        "| `-a`, `--all N`, `--every` | How many. Default: `7` |",
        "## p q",
        "One of `x`, `y`",
    ] {
        assert!(page.contains(row), "{row} in: {page}");
    }
    assert!(!page.contains("secret"), "{page}");
}
