// SPDX-License-Identifier: Apache-2.0
//! The verifier's policy: what a report must say, as a TOML file that can be read at a glance.
//!
//! Rules that are left out take the strict side where there is one: no debugging, no migration agent, VMPL 0.
//! A file that would accept any software is refused unless it says so. `docs/policy-guide.md` describes each
//! rule.

use std::collections::BTreeMap;
use std::collections::BTreeSet;
use std::io::Read as _;
use std::path::Path;
use std::path::PathBuf;

use serde::Deserialize;
use serde::Deserializer;
use serde::de::Error as _;

use super::baseline::Baseline;
use super::named::Bits;
use super::named::GuestBit;
use super::named::Interface;
use super::named::Mitigations;
use super::named::PlatformBit;
use super::named::Version;
use super::tcb::Product;
use super::tcb::Tcb;
use crate::printable::printable;

/// Largest policy or measurement set that is read.
const MAX_LEN: u64 = 64 << 20;
/// What `cvmm measure --json` puts into the field `format`.
pub const MEASUREMENT_SET_FORMAT: &str = "cvmm-measurement-1";

/// Why a policy cannot be used.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the messages say what the fields are")]
pub enum PolicyError {
    /// The file cannot be read.
    #[error("cannot read {path}: {source}")]
    Read { path: PathBuf, source: std::io::Error },
    /// The file is too large to be what it should be.
    #[error("{path} has more than {MAX_LEN} bytes")]
    TooLarge { path: PathBuf },
    /// Not TOML, an unknown rule, or a value of the wrong form. The message has line and column.
    #[error("the policy: {0}")]
    Toml(String),
    /// Not what `cvmm measure --json` writes.
    #[error("{path} is not a digest set of `cvmm measure --json`: {reason}")]
    MeasurementSet { path: PathBuf, reason: String },
    /// A policy that says nothing about the software.
    #[error(
        "the policy accepts any software: list measurements, measurement_sets, id_key_digests or author_key_digests, or \
         say any_measurement = true"
    )]
    AnySoftware,
    /// A digest that reports have where there is no key.
    #[error(
        "the policy lists a digest of zeros in {rule}: every guest without an ID block has it, so the rule would say nothing"
    )]
    ZeroDigest { rule: &'static str },
    /// Rules about an ID block that anyone may have signed.
    #[error(
        "the policy has {rule}, which reports take from the ID block, but does not say who may sign one: the host could make \
         its own with any value. Add id_key_digests or author_key_digests, or remove {rule}"
    )]
    AnySigner { rule: &'static str },
}

/// `N` bytes, written as hex.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Hex<const N: usize>(pub [u8; N]);

impl<'de, const N: usize> Deserialize<'de> for Hex<N> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let mut bytes = [0; N];
        match hex::decode_to_slice(&text, &mut bytes) {
            Ok(()) => Ok(Hex(bytes)),
            Err(_) => Err(D::Error::custom(format!(
                "expected {} hex digits, found {} characters '{:.24}'",
                N * 2,
                text.chars().count(),
                printable(&text)
            ))),
        }
    }
}

/// A chip id: 64 bytes, or 8 for Turin.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChipId(pub [u8; 64]);

impl<'de> Deserialize<'de> for ChipId {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let mut id = [0; 64];
        let part = match text.len() {
            16 => &mut id[..8],
            _ => &mut id[..],
        };
        match hex::decode_to_slice(&text, part) {
            Ok(()) if id == [0; 64] => {
                Err(D::Error::custom("a chip id of zeros is what every host shows that hides its own"))
            }
            Ok(()) => Ok(ChipId(id)),
            Err(_) => Err(D::Error::custom("a chip id has 128 hex digits, or 16 for Turin")),
        }
    }
}

/// Who may sign.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SignerName {
    /// A chip's own key.
    Vcek,
    /// A cloud provider's key.
    Vlek,
}

/// A policy as it stands in the file. Absent lists allow everything.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Policy {
    /// Allowed launch digests.
    pub measurements: Option<BTreeSet<Hex<48>>>,
    /// Files of `cvmm measure --json`; their digests are allowed too. Relative to the policy file.
    pub measurement_sets: Vec<PathBuf>,
    /// Says that the software does not matter.
    pub any_measurement: bool,
    /// Allowed digests of the ID key.
    pub id_key_digests: Option<Vec<Hex<48>>>,
    /// Allowed digests of the author key.
    pub author_key_digests: Option<Vec<Hex<48>>>,
    /// Allowed host data.
    pub host_data: Option<Vec<Hex<32>>>,
    /// Required family id.
    pub family_id: Option<Hex<16>>,
    /// Required image id.
    pub image_id: Option<Hex<16>>,
    /// Lowest security version of the guest.
    pub minimum_svn: Option<u32>,
    /// Privilege levels that may have asked for the report; absent means level 0.
    pub vmpl: Option<Vec<u32>>,
    /// The guest may be debugged by the host.
    pub allow_debug: bool,
    /// The guest may have a migration agent.
    pub allow_migration: bool,
    /// The guest may run where SMT is on; absent means yes.
    pub allow_smt: Option<bool>,
    /// Kinds of signing keys; absent means both.
    pub signers: Option<Vec<SignerName>>,
    /// Cloud providers whose VLEK is accepted, as their certificates name them.
    pub providers: Option<Vec<String>>,
    /// Allowed chips.
    pub chips: Option<Vec<ChipId>>,
    /// Oldest platform per product; products that are not named are refused when any is.
    pub minimum_tcb: BTreeMap<Product, Tcb>,
    /// Allowed products.
    pub products: Option<Vec<Product>>,
    /// What the platform must do, and must not.
    pub platform_info: Bits<PlatformBit>,
    /// What else the guest policy must demand, and must not allow.
    pub guest_policy: Bits<GuestBit>,
    /// Lowest firmware interface that the guest policy may ask for.
    pub minimum_abi: Option<Interface>,
    /// Mitigations that must be there, per product; products that are not named are refused when any is.
    pub minimum_mitigations: BTreeMap<Product, Mitigations>,
    /// Oldest committed firmware per product; products that are not named are refused when any is.
    pub minimum_firmware: BTreeMap<Product, Version>,
    /// Lowest report version: reports of version 2 do not say which CPU they come from.
    pub minimum_report_version: Option<u32>,
    /// What AMD's bulletins up to a month ask of the platform.
    pub baseline: Option<Baseline>,
    /// A revocation list has to be there.
    pub require_revocation_list: bool,
}

/// The part of `cvmm measure --json` that a policy needs.
#[derive(Deserialize)]
struct MeasurementSet {
    format: String,
    digests: Vec<MeasurementEntry>,
}

#[derive(Deserialize)]
struct MeasurementEntry {
    launch_digest: Hex<48>,
}

fn read(path: &Path) -> Result<String, PolicyError> {
    let error = |source| PolicyError::Read { path: path.to_owned(), source };
    let mut text = String::new();
    // Not by the file's size: a pipe and a device have none.
    let file = std::fs::File::open(path).map_err(error)?;
    file.take(MAX_LEN + 1).read_to_string(&mut text).map_err(error)?;
    if text.len() as u64 > MAX_LEN {
        return Err(PolicyError::TooLarge { path: path.to_owned() });
    }
    Ok(text)
}

/// The parser's message shows a line of the file, which must not reach a terminal as it is.
fn toml_error(error: toml::de::Error) -> PolicyError {
    PolicyError::Toml(error.to_string().split('\n').map(printable).collect::<Vec<_>>().join("\n"))
}

/// The launch digests in the text of a digest set.
pub fn measurement_set(text: &str) -> Result<Vec<[u8; 48]>, String> {
    let set: MeasurementSet = serde_json::from_str(text).map_err(|e| printable(&e.to_string()))?;
    if set.format != MEASUREMENT_SET_FORMAT {
        return Err(format!(
            "format is '{:.40}', expected '{MEASUREMENT_SET_FORMAT}'",
            printable(&set.format)
        ));
    }
    if set.digests.is_empty() {
        return Err("it has no digests".into());
    }
    Ok(set.digests.into_iter().map(|entry| entry.launch_digest.0).collect())
}

impl Policy {
    /// Reads the text of a policy. Digest sets that it names are not read: see [`Policy::load`].
    pub fn parse(text: &str) -> Result<Self, PolicyError> {
        let policy: Policy = toml::from_str(text).map_err(toml_error)?;
        let says_something = policy.measurements.is_some()
            || !policy.measurement_sets.is_empty()
            || policy.id_key_digests.is_some()
            || policy.author_key_digests.is_some();
        if !says_something && !policy.any_measurement {
            return Err(PolicyError::AnySoftware);
        }
        for (rule, digests) in
            [("id_key_digests", &policy.id_key_digests), ("author_key_digests", &policy.author_key_digests)]
        {
            if digests.iter().flatten().any(|digest| digest.0 == [0; 48]) {
                return Err(PolicyError::ZeroDigest { rule });
            }
        }
        let by_id_block = [
            ("minimum_svn", policy.minimum_svn.is_some()),
            ("family_id", policy.family_id.is_some()),
            ("image_id", policy.image_id.is_some()),
        ];
        if policy.id_key_digests.is_none()
            && policy.author_key_digests.is_none()
            && let Some((rule, _)) = by_id_block.into_iter().find(|(_, is_there)| *is_there)
        {
            return Err(PolicyError::AnySigner { rule });
        }
        Ok(policy)
    }

    /// Reads a policy file and the digest sets that it names.
    pub fn load(path: &Path) -> Result<Self, PolicyError> {
        let mut policy = Policy::parse(&read(path)?)?;
        let folder = path.parent().unwrap_or(Path::new("."));
        for set in std::mem::take(&mut policy.measurement_sets) {
            policy.add_measurement_set(&folder.join(set))?;
        }
        Ok(policy)
    }

    /// Allows the digests of a file of `cvmm measure --json`.
    pub fn add_measurement_set(&mut self, path: &Path) -> Result<(), PolicyError> {
        let digests = measurement_set(&read(path)?)
            .map_err(|reason| PolicyError::MeasurementSet { path: path.to_owned(), reason })?;
        self.measurements.get_or_insert_default().extend(digests.into_iter().map(Hex));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_policy_that_accepts_any_software_must_say_so() {
        assert!(matches!(Policy::parse("minimum_svn = 1"), Err(PolicyError::AnySoftware)));
        assert!(Policy::parse("any_measurement = true").is_ok());
        assert!(Policy::parse("id_key_digests = []").is_ok());
    }

    #[test]
    fn rules_about_the_id_block_need_a_signer() {
        let digest = "ab".repeat(48);
        for rule in [
            "minimum_svn = 1",
            &format!("family_id = '{}'", "00".repeat(16)),
            "image_id = '61616161616161616161616161616161'",
        ] {
            let pinned = format!("measurements = ['{digest}']\n{rule}");
            let error = Policy::parse(&pinned).unwrap_err();
            assert!(matches!(error, PolicyError::AnySigner { .. }), "{error}");
            for signer in ["id_key_digests", "author_key_digests"] {
                assert!(
                    Policy::parse(&format!("{pinned}\n{signer} = ['{digest}']")).is_ok(),
                    "{rule} {signer}"
                );
            }
        }
    }

    /// Both are what a report has without an ID block.
    #[test]
    fn digests_of_zeros_are_no_keys() {
        for rule in ["id_key_digests", "author_key_digests"] {
            let error = Policy::parse(&format!("{rule} = ['{}']", "00".repeat(48))).unwrap_err();
            assert!(
                matches!(error, PolicyError::ZeroDigest { .. }) && error.to_string().contains(rule),
                "{error}"
            );
        }
    }

    #[test]
    fn bits_versions_and_products_are_named() {
        let policy = Policy::parse(
            "any_measurement = true\nproducts = ['milan', 'turin']\nminimum_abi = '1.51'\nminimum_report_version = 3\n\
             require_revocation_list = true\n\
             [platform_info]\nrequire = ['alias_check']\nforbid = ['smt', 'tio']\n\
             [guest_policy]\nrequire = ['single_socket', 'aes256_xts']\n\
             [minimum_firmware]\nmilan = '1.55.22'\n\
             [minimum_mitigations.turin]\nlaunch = 1\ncurrent = 0x3",
        )
        .unwrap();
        assert_eq!(policy.platform_info.forbid, [PlatformBit::Smt, PlatformBit::Tio]);
        assert_eq!(policy.guest_policy.require, [GuestBit::SingleSocket, GuestBit::Aes256Xts]);
        assert_eq!(policy.minimum_firmware[&Product::Milan], Version { major: 1, minor: 55, build: 22 });
        assert_eq!(policy.minimum_mitigations[&Product::Turin], Mitigations { launch: 1, current: 3 });
        for bad in [
            "[platform_info]\nrequire = ['smtt']",
            "[guest_policy]\nwant = []",
            "minimum_abi = 1.5",
            // No build number in what a guest policy asks for, and no chip has this id.
            "minimum_abi = '1.55.38'",
            "chips = ['00000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000']",
            "chips = ['0000000000000000']",
            "baseline = '2024-01'",
            "baseline = 2025",
        ] {
            assert!(Policy::parse(&format!("any_measurement = true\n{bad}")).is_err(), "{bad}");
        }
    }

    #[test]
    fn misspelt_rules_and_short_digests_are_refused_with_their_line() {
        let error = Policy::parse("any_measurement = true\nallow_debgu = true").unwrap_err().to_string();
        assert!(error.contains("allow_debgu") && error.contains("line 2"), "{error}");
        let error = Policy::parse("measurements = [\"abcd\"]").unwrap_err().to_string();
        assert!(error.contains("expected 96 hex digits, found 4"), "{error}");
        let error =
            Policy::parse("any_measurement = true\n[minimum_tcb.naples]\nsnp = 1").unwrap_err().to_string();
        assert!(error.contains("naples"), "{error}");
        let error =
            Policy::parse("any_measurement = true\n[minimum_tcb.milan]\nsnp = 300").unwrap_err().to_string();
        assert!(error.contains("line 3"), "{error}");
    }

    #[test]
    fn only_digest_sets_of_this_format_are_read() {
        let digest = "ab".repeat(48);
        let good = format!(
            r#"{{"format":"cvmm-measurement-1","x":1,"digests":[{{"vcpus":1,"launch_digest":"{digest}"}}]}}"#
        );
        assert_eq!(measurement_set(&good).unwrap(), [[0xab; 48]]);
        assert!(measurement_set(&good.replace("measurement-1", "measurement-9")).is_err());
        assert!(measurement_set(r#"{"format":"cvmm-measurement-1","digests":[]}"#).is_err());
    }

    proptest! {
        #[test]
        fn arbitrary_text_never_panics(
            text in "([a-z_]{1,12} ?= ?([0-9]{1,20}|\"[0-9a-f]{0,100}\"|\\[[^\\]]{0,20}\\]|true)\n|\\[[a-z_.]{0,20}\\]\n|.{0,10}){0,6}"
        ) {
            let _ = Policy::parse(&text);
            let _ = measurement_set(&text);
        }
    }
}
