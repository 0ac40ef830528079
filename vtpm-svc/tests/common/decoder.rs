// SPDX-License-Identifier: Apache-2.0
//! A second reader of the guest-state format, written from its description (docs/vmgs.md) and sharing no code
//! with the service: what it can read, other tools of the format can read.

use std::collections::BTreeMap;

use aes_gcm::Aes256Gcm;
use aes_gcm::KeyInit;
use aes_gcm::aead::AeadInPlace;

/// What an image holds.
pub struct Decoded {
    pub sequence: u32,
    pub encrypted: bool,
    /// Plain text of each file.
    pub files: BTreeMap<u32, Vec<u8>>,
}

fn le(b: &[u8], at: usize, n: usize) -> u64 {
    b[at..at + n].iter().rev().fold(0, |v, x| v << 8 | u64::from(*x))
}

fn unseal(key: &[u8], nonce: &[u8], tag: &[u8], data: &[u8]) -> Option<Vec<u8>> {
    let mut plain = data.to_vec();
    let cipher = Aes256Gcm::new_from_slice(key).ok()?;
    cipher.decrypt_in_place_detached(nonce.into(), b"", &mut plain, tag.into()).ok()?;
    Some(plain)
}

/// Bit by bit, so that it is not the table-driven CRC of the service.
fn crc32(data: &[u8]) -> u32 {
    let mut crc = u32::MAX;
    for byte in data {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            crc = if crc & 1 == 1 { crc >> 1 ^ 0xedb8_8320 } else { crc >> 1 };
        }
    }
    !crc
}

fn header(b: &[u8]) -> Option<&[u8]> {
    let h = &b[..168];
    let mut zeroed = h.to_vec();
    zeroed[12..16].fill(0);
    let good = &h[..8] == b"GUESTRTS"
        && le(h, 8, 4) == 0x30000
        && le(h, 20, 4) == 168
        && le(h, 28, 4) == 1
        && le(h, 24, 4) >= 2
        && le(h, 32, 2) <= 1
        && le(h, 12, 4) as u32 == crc32(&zeroed);
    good.then_some(h)
}

/// Reads a whole image.
pub fn decode(file: &[u8], key: &[u8; 32]) -> Result<Decoded, String> {
    let footer = &file[file.len() - 512..];
    if &footer[..8] != b"conectix" {
        return Err("no footer".into());
    }
    let size = u64::from_be_bytes(footer[48..56].try_into().expect("eight")) as usize;
    if size + 512 != file.len() || footer[60..64] != [0, 0, 0, 2] {
        return Err("footer size or type".into());
    }
    let payload = &file[..size];
    let h = match (header(payload), header(&payload[512..])) {
        (Some(a), Some(b)) => match (le(a, 16, 4) as u32, le(b, 16, 4) as u32) {
            (x, y) if x == y.wrapping_add(1) => a,
            (x, y) if y == x.wrapping_add(1) => b,
            (x, y) => return Err(format!("sequences {x} and {y}")),
        },
        (Some(a), None) => a,
        (None, Some(b)) => b,
        (None, None) => return Err("no header".into()),
    };
    let encrypted = le(h, 32, 2) == 1;
    let table = &payload[le(h, 24, 4) as usize * 4096..][..4096];
    let entry = |id: usize| &table[id * 64..][..64];
    let bytes = |id: usize| {
        let e = entry(id);
        &payload[le(e, 0, 4) as usize * 4096..][..le(e, 8, 8) as usize]
    };
    let mut extended = vec![0; 4096];
    if encrypted {
        let metadata = [36, 100]
            .into_iter()
            .find_map(|s| unseal(key, &h[s..s + 12], &h[s + 16..s + 32], &h[s + 32..s + 64]))
            .ok_or("the key opens no slot")?;
        let e = entry(63);
        extended =
            unseal(&metadata, &e[16..28], &e[28..44], bytes(63)).ok_or("the extended table does not open")?;
    }
    let mut files = BTreeMap::new();
    for id in 1..63 {
        let e = entry(id);
        if le(e, 4, 4) == 0 {
            continue;
        }
        let x = &extended[id * 64..][..64];
        let plain = if le(x, 0, 4) & 1 == 1 {
            unseal(&x[4..36], &e[16..28], &e[28..44], bytes(id)).ok_or(format!("file {id} does not open"))?
        } else {
            bytes(id).to_vec()
        };
        files.insert(id as u32, plain);
    }
    Ok(Decoded { sequence: le(h, 16, 4) as u32, encrypted, files })
}
