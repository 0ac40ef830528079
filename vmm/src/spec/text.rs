// SPDX-License-Identifier: Apache-2.0
//! Values that stand in a file as people write them on a command line: sizes, bit masks, bytes in
//! hexadecimal.

use std::fmt;
use std::str::FromStr;

use serde::Deserialize;
use serde::Deserializer;
use serde::Serializer;
use serde::de::Error as _;

/// Parses the `sev_features` of a firmware launch.
pub fn parse_features(text: &str) -> Result<u64, String> {
    // Without 0x it could be meant either way.
    let parsed = text.strip_prefix("0x").filter(|hex| !hex.starts_with('+'));
    match parsed.and_then(|hex| u64::from_str_radix(hex, 16).ok()) {
        Some(features) if features & 1 == 1 => Ok(features),
        Some(_) => {
            Err("bit 0 (SNP) is set in every SNP guest: give 0x1 and what was requested besides".into())
        }
        None => Err(format!("'{text}' is not a number in hexadecimal such as 0x1")),
    }
}

/// Parses a size such as `512M` or `4G`; without a suffix it is in bytes.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let shift = match text[digits.len()..].to_ascii_uppercase().as_str() {
        "" => 0,
        "K" | "KB" | "KIB" => 10,
        "M" | "MB" | "MIB" => 20,
        "G" | "GB" | "GIB" => 30,
        "T" | "TB" | "TIB" => 40,
        other => return Err(format!("unknown unit '{other}', expected K, M, G or T (powers of 1024)")),
    };
    let number: u64 = digits
        .parse()
        .map_err(|_| format!("'{text}' is not a size, expected a number such as 512M or 4G"))?;
    number.checked_mul(1 << shift).ok_or_else(|| format!("'{text}' is larger than 64 bits"))
}

/// Parses 32 bytes in hexadecimal, for `--host-data`.
pub fn parse_hex32(text: &str) -> Result<[u8; 32], String> {
    let digits = text.strip_prefix("0x").unwrap_or(text);
    if digits.len() != 64 || !digits.bytes().all(|b| b.is_ascii_hexdigit()) {
        return Err(format!("expected 64 hexadecimal digits (32 bytes), found {} characters", digits.len()));
    }
    let mut bytes = [0; 32];
    hex::decode_to_slice(digits, &mut bytes).map_err(|e| e.to_string())?;
    Ok(bytes)
}

/// A value in the form that its type prints and reads.
pub mod optional {
    use super::*;

    /// Writes it.
    pub fn serialize<T: fmt::Display, S: Serializer>(value: &Option<T>, to: S) -> Result<S::Ok, S::Error> {
        match value {
            Some(value) => to.collect_str(value),
            None => to.serialize_none(),
        }
    }

    /// Reads it.
    pub fn deserialize<'de, T, D>(from: D) -> Result<Option<T>, D::Error>
    where
        T: FromStr<Err: fmt::Display>,
        D: Deserializer<'de>,
    {
        let text = Option::<String>::deserialize(from)?;
        text.map(|text| text.parse()).transpose().map_err(D::Error::custom)
    }
}

/// Bytes of memory: a number, or text with a unit.
pub mod size {
    use super::*;

    #[derive(Deserialize)]
    #[serde(untagged, expecting = "expected a number of bytes, or a size such as \"512M\"")]
    enum Size {
        Bytes(u64),
        Text(String),
    }

    /// Writes it in MiB where it is whole ones.
    pub fn serialize<S: Serializer>(bytes: &u64, to: S) -> Result<S::Ok, S::Error> {
        if bytes.is_multiple_of(1 << 20) {
            to.collect_str(&format_args!("{}M", bytes >> 20))
        } else {
            to.serialize_u64(*bytes)
        }
    }

    /// Reads it.
    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<u64, D::Error> {
        match Size::deserialize(from)? {
            Size::Bytes(bytes) => Ok(bytes),
            Size::Text(text) => parse_size(&text).map_err(D::Error::custom),
        }
    }
}

/// `sev_features`.
pub mod features {
    use super::*;

    /// Writes them.
    pub fn serialize<S: Serializer>(bits: &u64, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(&format_args!("{bits:#x}"))
    }

    /// Reads them.
    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<u64, D::Error> {
        parse_features(&String::deserialize(from)?).map_err(D::Error::custom)
    }
}

/// A vCPU model: its name or its CPUID signature.
pub mod vcpu_model {
    use super::*;

    /// Writes the signature.
    pub fn serialize<S: Serializer>(signature: &Option<u32>, to: S) -> Result<S::Ok, S::Error> {
        match signature {
            Some(signature) => to.collect_str(&format_args!("{signature:#x}")),
            None => to.serialize_none(),
        }
    }

    /// Reads name or signature.
    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Option<u32>, D::Error> {
        let text = Option::<String>::deserialize(from)?;
        text.map(|text| snp::image::vcpu_model::parse(&text)).transpose().map_err(D::Error::custom)
    }
}

/// 32 bytes in hexadecimal.
pub mod host_data {
    use super::*;

    /// Writes them.
    pub fn serialize<S: Serializer>(bytes: &Option<[u8; 32]>, to: S) -> Result<S::Ok, S::Error> {
        match bytes {
            Some(bytes) => to.serialize_str(&hex::encode(bytes)),
            None => to.serialize_none(),
        }
    }

    /// Reads them.
    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Option<[u8; 32]>, D::Error> {
        let text = Option::<String>::deserialize(from)?;
        text.map(|text| parse_hex32(&text)).transpose().map_err(D::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn features_without_snp_are_refused() {
        assert_eq!(parse_features("0x21"), Ok(0x21));
        assert!(parse_features("0x20").is_err());
        assert!(parse_features("21").is_err());
    }

    #[test]
    fn sizes_have_binary_units() {
        assert_eq!(parse_size("512M"), Ok(512 << 20));
        assert_eq!(parse_size("4g"), Ok(4 << 30));
        assert_eq!(parse_size("1GiB"), Ok(1 << 30));
        assert_eq!(parse_size("4096"), Ok(4096));
        for bad in ["", "M", "-1M", "1.5G", "12X", "99999999999T", "0x10M"] {
            assert!(parse_size(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn host_data_is_exactly_32_bytes() {
        assert_eq!(parse_hex32(&"a5".repeat(32)), Ok([0xa5; 32]));
        for bad in ["", "a5", &"a5".repeat(33), &"zz".repeat(32), &"é".repeat(32)] {
            assert!(parse_hex32(bad).is_err(), "{bad}");
        }
    }
}
