// SPDX-License-Identifier: Apache-2.0
//! How an image and a moment of its history are named, in the image and outside of it.

/// Point in the history of an image: what the anchor remembers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mark {
    /// Counts commits.
    pub generation: u64,
    /// SHA-256 of the root's plain text.
    pub digest: [u8; 32],
}

/// A text that is no UUID.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not a UUID (32 hexadecimal digits)")]
pub struct NotAUuid(String);

/// Sixteen bytes in the usual 8-4-4-4-12 form, first byte first.
pub fn uuid_text(uuid: &[u8; 16]) -> String {
    let digits = hex::encode(uuid);
    [&digits[..8], &digits[8..12], &digits[12..16], &digits[16..20], &digits[20..]].join("-")
}

/// Parses the 8-4-4-4-12 form; dashes may be left out.
pub fn parse_uuid(text: &str) -> Result<[u8; 16], NotAUuid> {
    let digits: String = text.chars().filter(|c| *c != '-').collect();
    let mut uuid = [0; 16];
    hex::decode_to_slice(digits, &mut uuid).map_err(|_| NotAUuid(text.to_owned()))?;
    Ok(uuid)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uuids_print_and_parse() {
        let id = parse_uuid("00112233-4455-6677-8899-aabbccddeeff").expect("uuid");
        assert_eq!(id[15], 0xff);
        assert_eq!(uuid_text(&id), "00112233-4455-6677-8899-aabbccddeeff");
        assert!(parse_uuid("0011").is_err());
        assert!(parse_uuid("é0112233445566778899aabbccddee").is_err());
    }
}
