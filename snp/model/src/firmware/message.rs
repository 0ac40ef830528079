// SPDX-License-Identifier: Apache-2.0
//! Guest messages: the encrypted envelope between a guest and the firmware.
//!
//! SEV-SNP Firmware ABI 1.58, section 8.26 `SNP_GUEST_REQUEST`, tables 99 to 101. The header from byte 0x30
//! on is authenticated, the payload encrypted, with AES-256-GCM under one of the guest's four keys (VMPCKs).
//! The sequence number is the nonce, so one number must never be used for two messages: the firmware takes a
//! request only with the number after its last one.

use aes_gcm::Aes256Gcm;
use aes_gcm::KeyInit as _;
use aes_gcm::Nonce;
use aes_gcm::Tag;
use aes_gcm::aead::AeadInPlace as _;
use snp::firmware_status::FwStatus;
use snp::le;
use snp::plan::PAGE_SIZE;

/// Length of the page that holds a message.
pub const PAGE_LEN: usize = PAGE_SIZE as usize;
/// Length of the header; the payload follows.
pub const HEADER_LEN: usize = 0x60;
/// Longest payload. The page has room for more, but the specification's payload has 4000 bytes.
pub const MAX_PAYLOAD: usize = 4000;

const SEQUENCE: usize = 0x20;
const AUTHENTICATED: usize = 0x30;
const ALGORITHM: usize = 0x30;
const HEADER_VERSION: usize = 0x31;
const HEADER_SIZE: usize = 0x32;
const TYPE: usize = 0x34;
const VERSION: usize = 0x35;
const PAYLOAD_SIZE: usize = 0x36;
const VMPCK: usize = 0x3c;
const TAG_LEN: usize = 16;
const AES_256_GCM: u8 = 1;

/// A decrypted message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    /// Sequence number.
    pub sequence: u64,
    /// Message type.
    pub message_type: u8,
    /// Message version.
    pub version: u8,
    /// Which key: 0 to 3, one for each VMPL.
    pub vmpck: u8,
    /// Payload.
    pub payload: Vec<u8>,
}

/// What an envelope says about itself before it is opened. Nothing of it is authenticated yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Sequence number.
    pub sequence: u64,
    /// Which key.
    pub vmpck: u8,
    payload_len: usize,
}

/// Checks the fields of the header that decide how the message is opened.
pub fn header(page: &[u8; PAGE_LEN]) -> Result<Header, FwStatus> {
    let u16_at = |at| le::u16_at(page, at);
    let payload_len = usize::from(u16_at(PAYLOAD_SIZE));
    let fits = page[ALGORITHM] == AES_256_GCM
        && page[HEADER_VERSION] == 1
        && usize::from(u16_at(HEADER_SIZE)) == HEADER_LEN
        && payload_len <= MAX_PAYLOAD
        && page[VMPCK] < 4;
    if !fits {
        return Err(FwStatus::INVALID_PARAM);
    }
    Ok(Header { sequence: le::u64_at(page, SEQUENCE), vmpck: page[VMPCK], payload_len })
}

fn nonce(sequence: u64) -> Nonce<aes_gcm::aes::cipher::typenum::U12> {
    let mut nonce = [0; 12];
    nonce[..8].copy_from_slice(&sequence.to_le_bytes());
    nonce.into()
}

/// Opens an envelope whose header was checked. A wrong key or a changed bit is `BAD_MEASUREMENT`.
pub fn open(page: &[u8; PAGE_LEN], header: Header, key: &[u8; 32]) -> Result<Message, FwStatus> {
    let mut payload = page[HEADER_LEN..HEADER_LEN + header.payload_len].to_vec();
    let tag = Tag::from_slice(&page[..TAG_LEN]);
    Aes256Gcm::new(key.into())
        .decrypt_in_place_detached(
            &nonce(header.sequence),
            &page[AUTHENTICATED..HEADER_LEN],
            &mut payload,
            tag,
        )
        .map_err(|_| FwStatus::BAD_MEASUREMENT)?;
    Ok(Message {
        sequence: header.sequence,
        message_type: page[TYPE],
        version: page[VERSION],
        vmpck: header.vmpck,
        payload,
    })
}

/// Puts a message into its envelope. The payload must not be longer than [`MAX_PAYLOAD`].
pub fn seal(message: &Message, key: &[u8; 32]) -> Result<Box<[u8; PAGE_LEN]>, FwStatus> {
    if message.payload.len() > MAX_PAYLOAD {
        return Err(FwStatus::INVALID_LENGTH);
    }
    let mut page = Box::new([0; PAGE_LEN]);
    page[SEQUENCE..SEQUENCE + 8].copy_from_slice(&message.sequence.to_le_bytes());
    page[ALGORITHM] = AES_256_GCM;
    page[HEADER_VERSION] = 1;
    page[HEADER_SIZE..HEADER_SIZE + 2].copy_from_slice(&(HEADER_LEN as u16).to_le_bytes());
    page[TYPE] = message.message_type;
    page[VERSION] = message.version;
    page[PAYLOAD_SIZE..PAYLOAD_SIZE + 2].copy_from_slice(&(message.payload.len() as u16).to_le_bytes());
    page[VMPCK] = message.vmpck;
    let (head, body) = page.split_at_mut(HEADER_LEN);
    let body = &mut body[..message.payload.len()];
    body.copy_from_slice(&message.payload);
    let tag = Aes256Gcm::new(key.into())
        .encrypt_in_place_detached(&nonce(message.sequence), &head[AUTHENTICATED..], body)
        .map_err(|_| FwStatus::HWERROR_PLATFORM)?;
    head[..TAG_LEN].copy_from_slice(&tag);
    Ok(page)
}
