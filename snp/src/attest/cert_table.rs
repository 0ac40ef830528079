// SPDX-License-Identifier: Apache-2.0
//! The certificate table that a host gives to guests together with a report.
//!
//! GHCB specification, section 4.1.8.1: entries of 24 bytes (GUID, offset, length), one of zeros as the end,
//! then the certificates in DER. GUIDs are stored in the order in which they are written. A table is a claim
//! of whoever made it: reading it checks that it is a table, not what its certificates are worth.

use std::fmt;

use super::cert::Cert;
use super::cert::Crl;

/// Length of an entry in bytes.
const ENTRY_LEN: usize = 24;
/// More entries than this are not a table of certificates: there are five kinds.
const MAX_ENTRIES: usize = 64;

/// What an entry holds.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Kind(pub [u8; 16]);

impl Kind {
    /// AMD's root: c0b406a4-a803-4952-9743-3fb6014cd0ae.
    pub const ARK: Kind = Kind(0xc0b406a4_a803_4952_9743_3fb6014cd0ae_u128.to_be_bytes());
    /// The intermediate of chips' keys, or of loaded ones (ASVK): 4ab7b379-bbac-4fe4-a02f-05aef327c782.
    pub const ASK: Kind = Kind(0x4ab7b379_bbac_4fe4_a02f_05aef327c782_u128.to_be_bytes());
    /// A chip's key: 63da758d-e664-4564-adc5-f4b93be8accd.
    pub const VCEK: Kind = Kind(0x63da758d_e664_4564_adc5_f4b93be8accd_u128.to_be_bytes());
    /// A cloud provider's loaded key: a8074bc2-a25a-483e-aae6-39c045a0b8a1.
    pub const VLEK: Kind = Kind(0xa8074bc2_a25a_483e_aae6_39c045a0b8a1_u128.to_be_bytes());
    /// AMD's revocation list: 92f81bc3-5811-4d3d-97ff-d19f88dc67ea.
    pub const CRL: Kind = Kind(0x92f81bc3_5811_4d3d_97ff_d19f88dc67ea_u128.to_be_bytes());

    /// What a certificate is in a chain of AMD's: by who issued it, or by the extension that names the key's
    /// owner.
    pub fn of(cert: &Cert) -> Option<Kind> {
        match (cert.is_ca(), cert.is_issued_in_the_name_of(cert)) {
            (true, true) => Some(Kind::ARK),
            (true, false) => Some(Kind::ASK),
            (false, _) if cert.has_hwid() => Some(Kind::VCEK),
            (false, _) => cert.provider().map(|_| Kind::VLEK),
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = match *self {
            Kind::ARK => "ARK",
            Kind::ASK => "ASK",
            Kind::VCEK => "VCEK",
            Kind::VLEK => "VLEK",
            Kind::CRL => "CRL",
            Kind(guid) => return write!(f, "{:032x}", u128::from_be_bytes(guid)),
        };
        write!(f, "{name}")
    }
}

impl fmt::Debug for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Why bytes are no table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs, reason = "the messages say what the fields are")]
pub enum TableError {
    /// It ends before the entry of zeros.
    #[error(
        "offset {offset:#x}: expected an entry of 24 bytes, or 24 zero bytes as the table's end; found the end"
    )]
    NoEnd { offset: usize },
    /// Too many.
    #[error("offset {offset:#x}: expected the end of the table after at most {MAX_ENTRIES} entries")]
    TooMany { offset: usize },
    /// An entry that points outside of the table's data.
    #[error(
        "offset {offset:#x}: the {kind} lies at {start:#x} with {len:#x} bytes; expected it between the table's end at \
         {first:#x} and the end of all at {last:#x}"
    )]
    Outside { offset: usize, kind: Kind, start: u32, len: u32, first: usize, last: usize },
    /// The same kind twice: which one is meant?
    #[error("offset {offset:#x}: a second {kind}; expected each kind once")]
    Twice { offset: usize, kind: Kind },
}

/// The table of `entries`; its length says how many pages a guest has to offer.
pub fn encode(entries: &[(Kind, &[u8])]) -> Vec<u8> {
    let mut out = Vec::new();
    let mut offset = (entries.len() + 1) * ENTRY_LEN;
    for (kind, data) in entries {
        out.extend(kind.0);
        out.extend((offset as u32).to_le_bytes());
        out.extend((data.len() as u32).to_le_bytes());
        offset += data.len();
    }
    out.extend([0; ENTRY_LEN]);
    entries.iter().for_each(|(_, data)| out.extend(*data));
    out
}

/// Takes a table apart.
pub fn parse(table: &[u8]) -> Result<Vec<(Kind, &[u8])>, TableError> {
    let mut raw = Vec::new();
    loop {
        let offset = raw.len() * ENTRY_LEN;
        let entry: Option<&[u8; ENTRY_LEN]> = table.get(offset..).and_then(<[u8]>::first_chunk);
        let entry = entry.ok_or(TableError::NoEnd { offset })?;
        if *entry == [0; ENTRY_LEN] {
            break;
        }
        if raw.len() == MAX_ENTRIES {
            return Err(TableError::TooMany { offset });
        }
        raw.push((offset, entry));
    }
    let first = (raw.len() + 1) * ENTRY_LEN;
    let mut entries: Vec<(Kind, &[u8])> = Vec::new();
    for (offset, entry) in raw {
        let word = |at: usize| entry.iter().skip(at).take(4).rev().fold(0u32, |v, b| v << 8 | u32::from(*b));
        let (mut guid, start, len) = ([0; 16], word(16), word(20));
        guid.iter_mut().zip(entry).for_each(|(to, from)| *to = *from);
        let kind = Kind(guid);
        let outside = TableError::Outside { offset, kind, start, len, first, last: table.len() };
        // On a machine of 64 bits the sum of two 32-bit numbers does not wrap.
        let (from, to) = (start as usize, start as usize + len as usize);
        let data = table.get(from..to).filter(|_| from >= first).ok_or(outside)?;
        if entries.iter().any(|(known, _)| *known == kind) {
            return Err(TableError::Twice { offset, kind });
        }
        entries.push((kind, data));
    }
    Ok(entries)
}

/// Makes a table of certificates as files hold them, and a revocation list. What is in it belongs together:
/// one endorsement key, the intermediate that issued it (files of AMD's have those of both kinds of keys; the
/// other one stays out), that one's root, and the list that this root has signed. `Err` names what does not
/// fit.
pub fn of_certificates(certificates: &[Cert], crl: Option<&Crl>) -> Result<Vec<u8>, String> {
    let of_kind = |wanted: Kind| certificates.iter().filter(move |cert| Kind::of(cert) == Some(wanted));
    if let Some(cert) = certificates.iter().find(|cert| Kind::of(cert).is_none()) {
        return Err(format!("'{}' is neither a VCEK or VLEK nor one of their issuers", cert.name()));
    }
    let mut endorsements = of_kind(Kind::VCEK).chain(of_kind(Kind::VLEK));
    let endorsement = endorsements.next().ok_or("no VCEK or VLEK among the certificates")?;
    if let Some(second) = endorsements.next() {
        return Err(format!(
            "'{}' and '{}': a table holds the certificate of one key",
            endorsement.name(),
            second.name()
        ));
    }
    let issuer = issuer_of(endorsement, of_kind(Kind::ASK))?;
    let root = match issuer {
        Some(issuer) => issuer_of(issuer, of_kind(Kind::ARK))?,
        None => None,
    };
    if let (None, Some(root)) = (issuer, of_kind(Kind::ARK).next()) {
        return Err(format!(
            "the ASK or ASVK between '{}' and '{}' is missing",
            endorsement.name(),
            root.name()
        ));
    }
    if let Some(list) = crl {
        let root = root.ok_or("the revocation list cannot be checked without its root, the ARK: add it")?;
        list.check_signed_by(root).map_err(|error| error.to_string())?;
        let mut chain = [Some(endorsement), issuer].into_iter().flatten();
        if let Some(cert) = chain.find(|cert| cert.shares_issuer_with(list) && cert.is_revoked_by(list)) {
            return Err(format!(
                "the revocation list revokes '{}': no guest can prove anything with it",
                cert.name()
            ));
        }
    }
    let chain = [Some(endorsement), issuer, root].into_iter().flatten();
    let mut entries: Vec<(Kind, &[u8])> =
        chain.filter_map(|cert| Some((Kind::of(cert)?, cert.der()))).collect();
    entries.extend(crl.map(|list| (Kind::CRL, list.der())));
    Ok(encode(&entries))
}

/// Which of `authorities` issued `cert`; `None` if there are none at all.
fn issuer_of<'a>(
    cert: &Cert,
    authorities: impl Iterator<Item = &'a Cert>,
) -> Result<Option<&'a Cert>, String> {
    let mut last = None;
    for authority in authorities {
        match cert.is_issued_in_the_name_of(authority).then(|| cert.check_signed_by(authority)) {
            Some(Ok(())) => return Ok(Some(authority)),
            Some(Err(error)) => last = Some(error.to_string()),
            None => {
                last.get_or_insert(format!(
                    "'{}' is issued by '{}', not by '{}'",
                    cert.name(),
                    cert.issuer_name(),
                    authority.name()
                ));
            }
        }
    }
    last.map_or(Ok(None), Err)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use sev::firmware::host::CertTableEntry;
    use sev::firmware::host::CertType;

    use super::*;

    const ENTRIES: [(Kind, &[u8]); 5] = [
        (Kind::VCEK, &[3; 7]),
        (Kind::ASK, &[2; 6]),
        (Kind::ARK, &[1; 5]),
        (Kind::VLEK, &[4; 8]),
        (Kind::CRL, &[5; 9]),
    ];

    #[test]
    fn a_peer_reads_the_table() {
        let mut bytes = encode(&ENTRIES);
        let entries = CertTableEntry::vec_bytes_to_cert_table(&mut bytes).unwrap();
        let found: Vec<(CertType, Vec<u8>)> = entries.into_iter().map(|e| (e.cert_type, e.data)).collect();
        let types = [CertType::VCEK, CertType::ASK, CertType::ARK, CertType::VLEK, CertType::CRL];
        let expected: Vec<_> =
            types.into_iter().zip(ENTRIES).map(|(t, (_, data))| (t, data.to_vec())).collect();
        assert_eq!(found, expected);
    }

    #[test]
    fn a_peers_table_is_read() {
        let entry = |cert_type, byte: u8| CertTableEntry { cert_type, data: vec![byte; 40] };
        let table = vec![entry(CertType::ARK, 1), entry(CertType::ASK, 2), entry(CertType::VLEK, 3)];
        let bytes = CertTableEntry::cert_table_to_vec_bytes(&table).unwrap();
        let expected: [(Kind, &[u8]); 3] =
            [(Kind::ARK, &[1; 40]), (Kind::ASK, &[2; 40]), (Kind::VLEK, &[3; 40])];
        assert_eq!(parse(&bytes).unwrap(), expected);
    }

    #[test]
    fn an_empty_table_is_24_zero_bytes() {
        assert_eq!(parse(&encode(&[])).unwrap(), []);
        assert_eq!(encode(&[]), [0; 24]);
        assert_eq!(parse(&[0; 23]), Err(TableError::NoEnd { offset: 0 }));
    }

    #[test]
    fn entries_that_reach_outside_or_repeat_are_refused() {
        let entry = |kind: Kind, start: u32, len: u32| {
            [&kind.0[..], &start.to_le_bytes(), &len.to_le_bytes()].concat()
        };
        let table = |entries: &[Vec<u8>]| [&entries.concat()[..], &[0; 24], &[7; 16]].concat();
        for (start, len) in
            [(47, 1), (0, 24), (48, 17), (64, 1), (u32::MAX, 1), (1, u32::MAX), (u32::MAX, u32::MAX)]
        {
            let result = parse(&table(&[entry(Kind::ARK, start, len)])).map(|_| ());
            let expected =
                TableError::Outside { offset: 0, kind: Kind::ARK, start, len, first: 48, last: 64 };
            assert_eq!(result, Err(expected), "{start} {len}");
        }
        let twice = table(&[entry(Kind::ASK, 72, 8), entry(Kind::ASK, 80, 8)]);
        assert_eq!(parse(&twice), Err(TableError::Twice { offset: 24, kind: Kind::ASK }));
        let endless = vec![0xff; 100 * ENTRY_LEN];
        assert_eq!(parse(&endless), Err(TableError::TooMany { offset: MAX_ENTRIES * ENTRY_LEN }));
        let cut = entry(Kind::ASK, 72, 8);
        assert_eq!(parse(&cut), Err(TableError::NoEnd { offset: 24 }));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(512))]

        #[test]
        fn any_bytes_are_a_table_or_an_error(
            mut bytes in proptest::collection::vec(any::<u8>(), 0..400),
            entries in 0..4usize,
        ) {
            // Mostly plausible: small offsets and lengths, and an end.
            for entry in 0..entries {
                for (at, byte) in bytes.iter_mut().enumerate().skip(entry * ENTRY_LEN).take(ENTRY_LEN) {
                    *byte &= if at % ENTRY_LEN >= 16 && !at.is_multiple_of(4) { 0 } else { 0xff };
                }
            }
            bytes.iter_mut().skip(entries * ENTRY_LEN).take(ENTRY_LEN).for_each(|byte| *byte = 0);
            if let Ok(found) = parse(&bytes) {
                let again = encode(&found);
                prop_assert_eq!(parse(&again).unwrap(), found);
            }
        }
    }
}
