// SPDX-License-Identifier: Apache-2.0
//! The certificate table that a host gives to guests with an extended guest request.
//!
//! GHCB specification, section 4.1.8.1: entries of 24 bytes (GUID, offset, length), one of zeros as the end, then the
//! certificates. GUIDs are stored in the order in which they are written.

use crate::model::chain::Certificates;

/// Length of an entry in bytes.
pub const ENTRY_LEN: usize = 24;
/// c0b406a4-a803-4952-9743-3fb6014cd0ae.
pub const ARK: [u8; 16] =
    [0xc0, 0xb4, 0x06, 0xa4, 0xa8, 0x03, 0x49, 0x52, 0x97, 0x43, 0x3f, 0xb6, 0x01, 0x4c, 0xd0, 0xae];
/// 4ab7b379-bbac-4fe4-a02f-05aef327c782.
pub const ASK: [u8; 16] =
    [0x4a, 0xb7, 0xb3, 0x79, 0xbb, 0xac, 0x4f, 0xe4, 0xa0, 0x2f, 0x05, 0xae, 0xf3, 0x27, 0xc7, 0x82];
/// 63da758d-e664-4564-adc5-f4b93be8accd.
pub const VCEK: [u8; 16] =
    [0x63, 0xda, 0x75, 0x8d, 0xe6, 0x64, 0x45, 0x64, 0xad, 0xc5, 0xf4, 0xb9, 0x3b, 0xe8, 0xac, 0xcd];

/// The table of `entries`; its length says how many pages a guest has to offer.
pub fn table(entries: &[([u8; 16], &[u8])]) -> Vec<u8> {
    let mut out = Vec::new();
    let mut offset = (entries.len() + 1) * ENTRY_LEN;
    for (guid, data) in entries {
        out.extend(guid);
        out.extend((offset as u32).to_le_bytes());
        out.extend((data.len() as u32).to_le_bytes());
        offset += data.len();
    }
    out.extend([0; ENTRY_LEN]);
    entries.iter().for_each(|(_, data)| out.extend(*data));
    out
}

/// The table of an emulated platform: VCEK, ASK, ARK.
pub fn chain_table(certificates: &Certificates) -> Vec<u8> {
    table(&[(VCEK, &certificates.vcek), (ASK, &certificates.ask), (ARK, &certificates.ark)])
}

#[cfg(test)]
mod tests {
    use sev::firmware::host::CertTableEntry;
    use sev::firmware::host::CertType;

    use super::*;

    #[test]
    fn a_peer_reads_the_table() {
        let certificates = Certificates { ark: vec![1; 5], ask: vec![2; 6], vcek: vec![3; 7] };
        let mut bytes = chain_table(&certificates);
        let entries = CertTableEntry::vec_bytes_to_cert_table(&mut bytes).unwrap();
        let found: Vec<(CertType, Vec<u8>)> = entries.into_iter().map(|e| (e.cert_type, e.data)).collect();
        assert_eq!(
            found,
            [(CertType::VCEK, vec![3; 7]), (CertType::ASK, vec![2; 6]), (CertType::ARK, vec![1; 5])]
        );
    }
}
