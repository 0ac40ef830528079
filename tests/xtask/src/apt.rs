// SPDX-License-Identifier: Apache-2.0
//! Debian packages: installs the few that the harness runs, and downloads kernels without installing them.
//!
//! Downloads use an apt state of their own, below the workspace: the machine's package sources stay as they
//! are. The archive to download from is the one that the machine's own sources name for its release, with the
//! keyring that they name; only the suite is changed. A machine's keyring knows later suites' keys as well:
//! Debian signs those with the keys of two releases.

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
        let found = machine_sources();
        let mut text = deb822(main_archive(&found, codename)?, &format!("{codename} {codename}-backports"));
        if let Some(security) = found.iter().find(|source| source.suite == format!("{codename}-security")) {
            text += &deb822(security, &security.suite);
        }
        Self::with_sources(directory, &text)
    }

    /// Sets up the state in `directory` for other `suites` of the archive that has `codename`.
    pub fn other_suites(directory: &Path, codename: &str, suites: &[&str]) -> Result<Self> {
        let found = machine_sources();
        Self::with_sources(directory, &deb822(main_archive(&found, codename)?, &suites.join(" ")))
    }

    fn with_sources(directory: &Path, text: &str) -> Result<Self> {
        for part in ["state/lists/partial", "cache/archives/partial", "sources"] {
            fs::create_dir_all(directory.join(part))
                .with_context(|| format!("cannot create {}", directory.join(part).display()))?;
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

    /// The newest real packages behind `meta` of two series, in the suites of this state; those before
    /// `oldest` do not count.
    pub fn newest_two(&self, meta: &str, oldest: Series) -> Result<Vec<Candidate>> {
        let text = capture(self.tool("apt-cache").args(["show", meta]))?;
        Ok(two_series(candidates(&text), oldest))
    }

    /// The packages that make up a kernel: itself, or the packages that it depends on and that its parts have
    /// moved to.
    pub fn parts(&self, kernel: Candidate) -> Result<Vec<Candidate>> {
        let wanted = format!("{}={}", kernel.package, kernel.version);
        let text = capture(self.tool("apt-cache").args(["show", &wanted]))?;
        let parts = parts_in(&text);
        Ok(if parts.is_empty() { vec![kernel] } else { parts })
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

/// A kernel's first two numbers, such as 6 and 12.
pub type Series = (u32, u32);

/// The archive that the machine's sources name for `codename`.
fn main_archive<'a>(found: &'a [Source], codename: &str) -> Result<&'a Source> {
    found.iter().find(|source| source.suite == codename).with_context(|| {
        format!("the machine's apt sources name no archive for {codename} (looked in /etc/apt)")
    })
}

/// The value of a field in a stanza that has each field on one line.
fn field<'a>(stanza: &'a str, name: &str) -> Option<&'a str> {
    stanza.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).map(str::trim)
}

/// The dependencies of a stanza on one exact version.
fn exact_dependencies(stanza: &str) -> impl Iterator<Item = Candidate> + '_ {
    field(stanza, "Depends").unwrap_or_default().split(',').filter_map(|dependency| {
        let (package, exact) = dependency.split_once("(=")?;
        Some(Candidate {
            package: package.trim().into(),
            version: exact.trim().trim_end_matches(')').trim().into(),
        })
    })
}

/// The kernel packages in the output of `apt-cache show META`, with the version of the meta package.
fn candidates(text: &str) -> Vec<(String, Candidate)> {
    let stanzas = text.split("\n\n");
    let kernel = |stanza| {
        let candidate = exact_dependencies(stanza).find(|found| found.package.starts_with("linux-image-"))?;
        Some((field(stanza, "Version")?.to_string(), candidate))
    };
    stanzas.filter_map(kernel).collect()
}

/// Finds in the output of `apt-cache show META` the newest kernel of the wanted kind.
fn newest_dependency(text: &str, backports: bool) -> Option<Candidate> {
    let found = candidates(text).into_iter().filter(|(version, _)| version.contains("~bpo") == backports);
    newest(found).map(|(_, candidate)| candidate)
}

fn newest(found: impl IntoIterator<Item = (String, Candidate)>) -> Option<(String, Candidate)> {
    found.into_iter().reduce(|best, next| if is_newer(&next.0, &best.0) { next } else { best })
}

/// The newest kernel, and the newest of another series; if there is only one series, of another version.
fn two_series(mut found: Vec<(String, Candidate)>, oldest: Series) -> Vec<Candidate> {
    found.retain(|(version, _)| series(version).is_some_and(|series| series >= oldest));
    let Some((version, first)) = newest(found.clone()) else { return Vec::new() };
    found.retain(|(other, _)| *other != version);
    let others: Vec<_> =
        found.iter().filter(|(other, _)| series(other) != series(&version)).cloned().collect();
    let second = newest(others).or_else(|| newest(found));
    [Some(first), second.map(|(_, candidate)| candidate)].into_iter().flatten().collect()
}

/// `7.3.4-1~bpo13+1` is of the series 7.3.
fn series(version: &str) -> Option<Series> {
    let mut numbers = version.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

/// Where Debian's kernels from 7.2 on have their image, their modules and the lists of modules.
fn parts_in(text: &str) -> Vec<Candidate> {
    let stanza = text.split("\n\n").next().unwrap_or_default();
    let is_part = |name: &str| {
        ["linux-base-", "linux-binary-", "linux-modules-"].iter().any(|prefix| name.starts_with(prefix))
    };
    let parts: Vec<_> = exact_dependencies(stanza).filter(|found| is_part(&found.package)).collect();
    // Older ones may depend on a linux-base of their version, and have everything themselves.
    if parts.iter().any(|part| part.package.starts_with("linux-binary-")) { parts } else { Vec::new() }
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

/// Stanzas of `Field: value` lines; comments may stand anywhere; a stanza may name several archives and
/// suites.
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
        // A key written into the stanza itself has no value on its first line; apt then trusts its default
        // keyrings.
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
    /// From `apt-cache show linux-image-cloud-amd64` with the suites trixie-backports, sid, forky and trixie,
    /// shortened.
    const LATER: &str = "Package: linux-image-cloud-amd64\nVersion: 7.2.13-1\n\
        Depends: linux-base-cloud-amd64 (= 7.2.13-1), linux-image-7.2.13+deb14-cloud-amd64 (= 7.2.13-1)\n\n\
        Package: linux-image-cloud-amd64\nVersion: 7.3.4-1~bpo13+1\n\
        Depends: linux-base-cloud-amd64 (= 7.3.4-1~bpo13+1), linux-image-7.3.4+deb13-cloud-amd64 (= 7.3.4-1~bpo13+1), \
        linux-modules-cloud-amd64 (= 7.3.4-1~bpo13+1)\n\n\
        Package: linux-image-cloud-amd64\nVersion: 7.2.12-1\n\
        Depends: linux-base-cloud-amd64 (= 7.2.12-1), linux-image-7.2.12+deb14-cloud-amd64 (= 7.2.12-1)\n\n\
        Package: linux-image-cloud-amd64\nVersion: 6.12.117-1\n\
        Depends: linux-image-6.12.117+deb13-cloud-amd64 (= 6.12.117-1)\n";

    #[test]
    fn the_newest_kernels_of_two_series_are_found() {
        let names = |found: Vec<(String, Candidate)>, oldest| {
            two_series(found, oldest).into_iter().map(|found| found.package).collect::<Vec<_>>()
        };
        let (newest, newer) = ("linux-image-7.3.4+deb13-cloud-amd64", "linux-image-7.2.13+deb14-cloud-amd64");
        assert_eq!(names(candidates(LATER), (6, 16)), [newest, newer]);
        // Nothing but one series: two versions of it. Nothing but one version: that.
        let only = |wanted: &str| {
            let all = candidates(LATER);
            all.into_iter().filter(|(version, _)| version.starts_with(wanted)).collect::<Vec<_>>()
        };
        assert_eq!(names(only("7.2"), (6, 16)), [newer, "linux-image-7.2.12+deb14-cloud-amd64"]);
        assert_eq!(names(only("7.3"), (6, 16)), [newest]);
        assert!(names(only("6.12"), (6, 16)).is_empty());
    }

    #[test]
    fn a_kernel_in_several_packages_is_put_together() {
        // From `apt-cache show linux-image-7.3.4+deb13-cloud-amd64` and of 6.12.117.
        let new = "Package: linux-image-7.3.4+deb13-cloud-amd64\nVersion: 7.3.4-1~bpo13+1\n\
                   Depends: dracut | initramfs-tools (>= 0.120+deb8u2) | linux-initramfs-tool, \
                   linux-base-7.3.4+deb13-cloud-amd64 (= 7.3.4-1~bpo13+1), \
                   linux-binary-7.3.4+deb13-cloud-amd64 (= 7.3.4-1~bpo13+1), \
                   linux-modules-7.3.4+deb13-cloud-amd64 (= 7.3.4-1~bpo13+1)\n";
        let parts: Vec<_> = parts_in(new).into_iter().map(|part| part.package).collect();
        let expected =
            ["base", "binary", "modules"].map(|part| format!("linux-{part}-7.3.4+deb13-cloud-amd64"));
        assert_eq!(parts, expected);
        let old = "Package: linux-image-6.12.117+deb13-cloud-amd64\nVersion: 6.12.117-1\n\
                   Depends: kmod, initramfs-tools (>= 0.120+deb8u2) | linux-initramfs-tool\n";
        assert_eq!(parts_in(old), []);
    }
}
