// SPDX-License-Identifier: Apache-2.0
//! Debian packages: installs the few that the harness runs, and downloads kernels without installing them.
//!
//! Downloads use an apt state of their own, below the workspace: the machine's package sources stay as they are. The archive
//! to download from is the one that the machine's own sources name for its release; only the suite is changed.

use std::fs;
use std::path::Path;
use std::path::PathBuf;
use std::process::Command;

use anyhow::Context;
use anyhow::Result;
use anyhow::bail;

use crate::steps::capture;
use crate::steps::show;

/// Options of every apt call: wait for another apt to finish, and try again when a download breaks.
const PATIENT: [&str; 4] = ["-o", "DPkg::Lock::Timeout=300", "-o", "Acquire::Retries=5"];

/// The release codename of this machine if it is a Debian, such as `bookworm`.
pub fn debian_codename() -> Option<String> {
    let text = fs::read_to_string("/etc/os-release").ok()?;
    let value = |key: &str| {
        text.lines()
            .find_map(|line| line.strip_prefix(key)?.strip_prefix('='))
            .map(|v| v.trim_matches('"').to_string())
    };
    (value("ID")? == "debian").then(|| value("VERSION_CODENAME")).flatten()
}

/// Those of `packages` that are not installed.
pub fn missing(packages: &[&str]) -> Vec<String> {
    let installed = |package: &&str| {
        capture(Command::new("dpkg-query").args(["-W", "-f=${db:Status-Status}", package]))
            .is_ok_and(|status| status == "installed")
    };
    packages.iter().filter(|package| !installed(package)).map(ToString::to_string).collect()
}

/// Installs `packages` with apt-get, as root or by sudo.
pub fn install(packages: &[String]) -> Result<()> {
    let root = rustix::process::geteuid().is_root();
    let apt_get = |arguments: &[&str]| {
        let mut command = if root { Command::new("apt-get") } else { Command::new("sudo") };
        if !root {
            command.args(["DEBIAN_FRONTEND=noninteractive", "apt-get"]);
        }
        command.env("DEBIAN_FRONTEND", "noninteractive").args(PATIENT).args(arguments);
        command
    };
    let by_hand = format!("apt-get install --no-install-recommends {}", packages.join(" "));
    if !root && capture(Command::new("sudo").arg("--version")).is_err() {
        bail!("not root and no sudo here; as root run: {by_hand}");
    }
    let mut arguments = vec!["install", "--yes", "--no-install-recommends"];
    arguments.extend(packages.iter().map(String::as_str));
    show(&mut apt_get(&["update"])).with_context(|| format!("by hand: {by_hand}"))?;
    show(&mut apt_get(&arguments)).with_context(|| format!("by hand: {by_hand}"))
}

/// One archive as the machine's sources name it.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Source {
    uri: String,
    suite: String,
    /// The keyring, if the entry names one.
    signed_by: Option<String>,
}

/// An apt state of its own in a directory.
pub struct Downloader {
    directory: PathBuf,
}

/// A package version that can be downloaded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Candidate {
    /// Package name.
    pub package: String,
    /// Version.
    pub version: String,
}

impl Downloader {
    /// Sets up the state in `directory` for `codename`, its updates, its security suite and its backports.
    pub fn new(directory: &Path, codename: &str) -> Result<Self> {
        for part in ["state/lists/partial", "cache/archives/partial", "sources"] {
            fs::create_dir_all(directory.join(part))
                .with_context(|| format!("cannot create {}", directory.join(part).display()))?;
        }
        let found = machine_sources();
        let main = found.iter().find(|source| source.suite == codename).with_context(|| {
            format!("the machine's apt sources name no archive for {codename} (looked in /etc/apt)")
        })?;
        let mut text = deb822(main, &format!("{codename} {codename}-backports"));
        if let Some(security) = found.iter().find(|source| source.suite == format!("{codename}-security")) {
            text += &deb822(security, &security.suite);
        }
        fs::write(directory.join("sources/cvmm.sources"), text)?;
        let path = directory.display();
        fs::write(
            directory.join("apt.conf"),
            format!(
                "Dir::State \"{path}/state\";\nDir::State::status \"/var/lib/dpkg/status\";\n\
                 Dir::Cache \"{path}/cache\";\nDir::Etc::sourcelist \"/dev/null\";\n\
                 Dir::Etc::sourceparts \"{path}/sources\";\nAcquire::Languages \"none\";\n\
                 Acquire::IndexTargets::deb::DEP-11::DefaultEnabled \"false\";\n\
                 APT::Sandbox::User \"\";\n"
            ),
        )?;
        Ok(Downloader { directory: directory.to_path_buf() })
    }

    /// Fetches the package lists.
    pub fn update(&self) -> Result<()> {
        show(self.tool("apt-get").args(PATIENT).arg("update"))
    }

    /// The newest real package behind `meta`, from backports or from the stable release itself.
    pub fn behind(&self, meta: &str, backports: bool) -> Result<Candidate> {
        let text = capture(self.tool("apt-cache").args(["show", meta]))?;
        let found = newest_dependency(&text, backports);
        found.with_context(|| {
            format!(
                "the archive has no {meta} {}",
                if backports { "in backports" } else { "outside backports" }
            )
        })
    }

    /// Downloads a package file and returns its path.
    pub fn download(&self, candidate: &Candidate) -> Result<PathBuf> {
        let debs = self.directory.join("debs");
        fs::create_dir_all(&debs)?;
        let Candidate { package, version } = candidate;
        // apt-get writes a colon of the version (an epoch) as %3a.
        let file = debs.join(format!("{package}_{}_amd64.deb", version.replace(':', "%3a")));
        if !file.exists() {
            let wanted = format!("{package}={version}");
            show(self.tool("apt-get").args(PATIENT).args(["download", &wanted]).current_dir(&debs))?;
        }
        if !file.exists() {
            bail!("apt-get download left no {}", file.display());
        }
        Ok(file)
    }

    fn tool(&self, name: &str) -> Command {
        let mut command = Command::new(name);
        command.env("APT_CONFIG", self.directory.join("apt.conf")).env("LC_ALL", "C");
        command
    }
}

/// Finds in the output of `apt-cache show META` the newest stanza of the wanted kind, and what it depends on.
fn newest_dependency(text: &str, backports: bool) -> Option<Candidate> {
    let mut best: Option<(String, Candidate)> = None;
    for stanza in text.split("\n\n") {
        let field = |name: &str| stanza.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
        let (Some(version), Some(depends)) = (field("Version:"), field("Depends:")) else { continue };
        if version.contains("~bpo") != backports {
            continue;
        }
        let Some((package, exact)) = depends.split(',').next().and_then(|first| first.split_once("(="))
        else {
            continue;
        };
        let candidate = Candidate {
            package: package.trim().into(),
            version: exact.trim().trim_end_matches(')').trim().into(),
        };
        if best.as_ref().is_none_or(|(newest, _)| is_newer(version, newest)) {
            best = Some((version.into(), candidate));
        }
    }
    best.map(|(_, candidate)| candidate)
}

fn is_newer(a: &str, b: &str) -> bool {
    Command::new("dpkg")
        .args(["--compare-versions", a, "gt", b])
        .status()
        .is_ok_and(|status| status.success())
}

fn deb822(source: &Source, suites: &str) -> String {
    let mut text = format!("Types: deb\nURIs: {}\nSuites: {suites}\nComponents: main\n", source.uri);
    if let Some(keyring) = &source.signed_by {
        text += &format!("Signed-By: {keyring}\n");
    }
    text + "\n"
}

/// Every archive in the machine's apt sources.
fn machine_sources() -> Vec<Source> {
    let mut files = vec![PathBuf::from("/etc/apt/sources.list")];
    if let Ok(entries) = fs::read_dir("/etc/apt/sources.list.d") {
        files.extend(entries.flatten().map(|entry| entry.path()));
    }
    let mut found = Vec::new();
    for file in files {
        let Ok(text) = fs::read_to_string(&file) else { continue };
        match file.extension().and_then(|extension| extension.to_str()) {
            Some("list") => found.extend(text.lines().filter_map(one_line_source)),
            Some("sources") => found.extend(deb822_sources(&text)),
            _ => {}
        }
    }
    found
}

/// `deb [options] uri suite component...`
fn one_line_source(line: &str) -> Option<Source> {
    let rest = line.trim().strip_prefix("deb")?;
    let rest = rest.strip_prefix([' ', '\t'])?.trim_start();
    let (options, rest) = match rest.strip_prefix('[') {
        Some(inner) => inner.split_once(']')?,
        None => ("", rest),
    };
    let mut words = rest.split_whitespace();
    let (uri, suite) = (words.next()?, words.next()?);
    if uri.starts_with("cdrom:") {
        return None;
    }
    let signed_by = options.split_whitespace().find_map(|option| option.strip_prefix("signed-by="));
    Some(Source { uri: uri.into(), suite: suite.into(), signed_by: signed_by.map(String::from) })
}

/// Stanzas of `Field: value` lines; comments may stand anywhere; a stanza may name several archives and suites.
fn deb822_sources(text: &str) -> Vec<Source> {
    let text: String = text.lines().filter(|line| !line.starts_with('#')).map(|l| format!("{l}\n")).collect();
    let mut found = Vec::new();
    for stanza in text.split("\n\n") {
        let field = |name: &str| {
            stanza.lines().find_map(|line| {
                let (key, value) = line.split_once(':')?;
                key.eq_ignore_ascii_case(name).then(|| value.trim())
            })
        };
        let enabled = !field("Enabled").is_some_and(|value| value.eq_ignore_ascii_case("no"));
        let is_binary =
            field("Types").is_some_and(|types| types.split_whitespace().any(|kind| kind == "deb"));
        if !(enabled && is_binary) {
            continue;
        }
        // A key written into the stanza itself has no value on its first line; apt then trusts its default keyrings.
        let signed_by = field("Signed-By").filter(|value| value.starts_with('/')).map(String::from);
        for uri in field("URIs").unwrap_or_default().split_whitespace() {
            for suite in field("Suites").unwrap_or_default().split_whitespace() {
                found.push(Source { uri: uri.into(), suite: suite.into(), signed_by: signed_by.clone() });
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_source_formats_are_read() {
        let one_line =
            one_line_source("deb [arch=amd64 signed-by=/k.gpg] http://mirror.test/debian sid main").unwrap();
        assert_eq!(
            one_line,
            Source {
                uri: "http://mirror.test/debian".into(),
                suite: "sid".into(),
                signed_by: Some("/k.gpg".into())
            }
        );
        assert_eq!(one_line_source("deb-src http://mirror.test/debian sid main"), None);
        assert_eq!(one_line_source("# deb http://mirror.test/debian sid main"), None);
        assert_eq!(one_line_source("deb cdrom:[Debian]/ sid main"), None);

        let text = "Types: deb\n# snapshot\nURIs: http://mirror.test/debian\nSuites: a a-updates\nComponents: main\n\
                    Signed-By: /k.gpg\n\nTypes: deb-src\nURIs: http://x.test\nSuites: a\n\n\
                    Enabled: no\nTypes: deb\nURIs: http://y.test\nSuites: a\n";
        let suites: Vec<_> =
            deb822_sources(text).into_iter().map(|source| (source.uri, source.suite)).collect();
        let uri = String::from("http://mirror.test/debian");
        assert_eq!(suites, [(uri.clone(), "a".into()), (uri, "a-updates".into())]);
    }

    #[test]
    fn the_kernel_behind_a_meta_package_is_found_per_suite() {
        // From `apt-cache show linux-image-cloud-amd64` on Debian 12, shortened.
        let text = "Package: linux-image-cloud-amd64\nVersion: 6.12.95-1~bpo12+1\n\
                    Depends: linux-image-6.12.95+deb12-cloud-amd64 (= 6.12.95-1~bpo12+1)\n\n\
                    Package: linux-image-cloud-amd64\nVersion: 6.1.190-1\n\
                    Depends: linux-image-6.1.0-55-cloud-amd64 (= 6.1.190-1)\n\n\
                    Package: linux-image-cloud-amd64\nVersion: 6.1.192-2\n\
                    Depends: linux-image-6.1.0-56-cloud-amd64 (= 6.1.192-2)\n";
        let package = |backports| newest_dependency(text, backports).unwrap().package;
        assert_eq!(package(true), "linux-image-6.12.95+deb12-cloud-amd64");
        assert_eq!(package(false), "linux-image-6.1.0-56-cloud-amd64");
    }
}
