// SPDX-License-Identifier: Apache-2.0
//! What an option is called whose field is wrong: libraries name fields, users know options.

/// Fields whose options have other names.
const OPTIONS: &[(&str, &str)] = &[
    ("boot.firmware", "firmware"),
    ("boot.firmware.image", "firmware"),
    ("boot.igvm", "igvm"),
    ("boot.igvm.image", "igvm"),
    ("snp.id_block.block", "id-block"),
    ("snp.id_block.auth", "id-auth"),
    ("snp.platform.emulated.keys", "emulated-keys"),
    ("tpm", "vtpm"),
];

/// The option that fills a field.
pub(super) fn option(field: &str) -> String {
    let name = OPTIONS.iter().find(|(path, _)| *path == field).map(|(_, option)| (*option).to_owned());
    let last = field.rsplit('.').next().unwrap_or(field);
    format!("--{}", name.unwrap_or_else(|| last.replace('_', "-")))
}

/// Fields that libraries name in their messages, in backticks.
const NAMED: [&str; 18] = [
    "accept",
    "accept_cpuid",
    "certs",
    "cmdline",
    "cpus",
    "firmware",
    "id_block",
    "initrd",
    "kernel",
    "memory",
    "platform",
    "policy",
    "secure_tsc",
    "snp",
    "tpm",
    "vtpm_socket",
    "vtpm_svc",
    "zero_pages",
];

/// A library's message as the user of the command line reads it: with options where it names fields.
pub(super) fn with_options(message: &str) -> String {
    NAMED.iter().fold(message.to_owned(), |text, field| text.replace(&format!("`{field}`"), &option(field)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use snp::image::error::ImageError;

    #[test]
    fn the_user_reads_options_where_a_library_names_fields() {
        let told = |error: ImageError| with_options(&error.to_string());
        assert_eq!(told(ImageError::Vcpus(0)), "--cpus: 0; give 1 to 255");
        let lazy = told(ImageError::LazyMemory(1 << 50));
        assert!(lazy.starts_with("--accept lazy: 1125899906842624 bytes of --memory, but"), "{lazy}");
        assert!(lazy.ends_with("use --accept auto or eager"), "{lazy}");
        assert_eq!(with_options("`objcopy` of `Memory`"), "`objcopy` of `Memory`");
    }

    /// The text of string literals of a library's file that stand between backticks.
    fn quoted(text: &str) -> impl Iterator<Item = &str> {
        let code = text.split("#[cfg(test)]").next().unwrap_or_default();
        let lines = code.lines().filter(|line| !line.trim_start().starts_with("//"));
        lines.flat_map(|line| line.split('`').skip(1).step_by(2))
    }

    fn files(folder: &std::path::Path, found: &mut Vec<std::path::PathBuf>) {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            match path.is_dir() {
                true => files(&path, found),
                false => found.push(path),
            }
        }
    }

    #[test]
    fn every_field_that_a_library_names_becomes_an_option() {
        let mut command = crate::cli::command();
        command.build();
        let all = std::iter::once(&command).chain(command.get_subcommands());
        let longs = all.flat_map(|command| command.get_arguments().filter_map(|a| a.get_long()));
        let options: std::collections::BTreeSet<String> =
            longs.map(|long| long.replace('-', "_")).chain(["tpm".to_owned()]).collect();
        let mut read = Vec::new();
        let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
        files(&root.join("src"), &mut read);
        files(&root.join("../snp/src"), &mut read);
        let mut named = std::collections::BTreeSet::new();
        for file in read.iter().filter(|file| !file.starts_with(root.join("src/cli"))) {
            let text = std::fs::read_to_string(file).unwrap();
            named.extend(quoted(&text).filter(|word| options.contains(*word)).map(str::to_owned));
        }
        assert!(named.len() > 10, "{named:?}");
        let listed: std::collections::BTreeSet<String> =
            NAMED.iter().map(|name| (*name).to_owned()).collect();
        assert_eq!(named, listed);
    }
}
