// SPDX-License-Identifier: Apache-2.0
//! The few TPM 2.0 commands that the service itself sends, as bytes (TPM 2.0 Library Specification, part 3,
//! rev. 1.59).
//!
//! All with empty passwords: they are sent while the TPM is being made or before the guest runs.

/// The PCR banks that events are logged for; a TPM made by this service has no others.
pub const BANKS: [(u16, usize); 2] = [(alg::SHA256, 32), (alg::SHA384, 48)];

/// Hierarchies and permanent handles.
pub mod handle {
    #![allow(missing_docs)]
    pub const OWNER: u32 = 0x4000_0001;
    pub const ENDORSEMENT: u32 = 0x4000_000b;
    pub const PLATFORM: u32 = 0x4000_000c;
    pub const PASSWORD: u32 = 0x4000_0009;
}

/// Hash algorithm ids.
pub mod alg {
    #![allow(missing_docs)]
    pub const SHA1: u16 = 0x0004;
    pub const SHA256: u16 = 0x000b;
    pub const SHA384: u16 = 0x000c;
    pub const SHA512: u16 = 0x000d;
}

/// Why a command of ours did not work.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the messages say what the fields are")]
pub enum CommandError {
    /// The way to the TPM.
    #[error("{what}: {problem}")]
    Transport { what: &'static str, problem: String },
    /// The TPM's answer.
    #[error("{what}: the TPM answered {code:#x}")]
    Code { what: &'static str, code: u32 },
    /// It was not powered on just now.
    #[error(
        "Startup: the TPM runs already, so it continues from a state that somebody saved, and its PCRs are not those of this \
         boot; power it off and drop the saved state"
    )]
    Running,
    /// The answer is too short.
    #[error("{0}: the TPM's response is malformed")]
    Malformed(&'static str),
}

/// Something that runs commands.
pub trait Transport {
    /// Runs one command.
    fn transmit(&mut self, command: &[u8]) -> Result<Vec<u8>, String>;
}

impl<F: FnMut(&[u8]) -> Result<Vec<u8>, String>> Transport for F {
    fn transmit(&mut self, command: &[u8]) -> Result<Vec<u8>, String> {
        self(command)
    }
}

/// Big-endian bytes under construction.
#[derive(Default, Clone)]
pub struct Bytes(pub Vec<u8>);

impl Bytes {
    /// One byte.
    #[must_use]
    pub fn u8(mut self, v: u8) -> Self {
        self.0.push(v);
        self
    }
    /// Two bytes.
    #[must_use]
    pub fn u16(mut self, v: u16) -> Self {
        self.0.extend_from_slice(&v.to_be_bytes());
        self
    }
    /// Four bytes.
    #[must_use]
    pub fn u32(mut self, v: u32) -> Self {
        self.0.extend_from_slice(&v.to_be_bytes());
        self
    }
    /// Bytes as they are.
    #[must_use]
    pub fn raw(mut self, v: &[u8]) -> Self {
        self.0.extend_from_slice(v);
        self
    }
    /// Bytes with a 16-bit length in front.
    #[must_use]
    pub fn sized(self, v: &[u8]) -> Self {
        self.u16(v.len() as u16).raw(v)
    }
}

/// Runs a command; with handles in `authorized`, each is authorised by an empty password.
///
/// Returns what follows the header (and the parameter size, where there are sessions).
pub fn run(
    tpm: &mut dyn Transport,
    what: &'static str,
    code: u32,
    authorized: &[u32],
    parameters: &[u8],
) -> Result<Vec<u8>, CommandError> {
    run_with_handles(tpm, what, code, authorized, &[], parameters)
}

/// Like [`run`], with further handles that need no authorisation.
pub fn run_with_handles(
    tpm: &mut dyn Transport,
    what: &'static str,
    code: u32,
    authorized: &[u32],
    handles: &[u32],
    parameters: &[u8],
) -> Result<Vec<u8>, CommandError> {
    let mut body = Bytes::default();
    for handle in authorized.iter().chain(handles) {
        body = body.u32(*handle);
    }
    if !authorized.is_empty() {
        body = body.u32(9 * authorized.len() as u32);
        for _ in authorized {
            body = body.u32(handle::PASSWORD).u16(0).u8(0).u16(0);
        }
    }
    let tag = if authorized.is_empty() { 0x8001 } else { 0x8002 };
    let size = 10 + body.0.len() + parameters.len();
    let command = Bytes::default().u16(tag).u32(size as u32).u32(code).raw(&body.0).raw(parameters);
    // 0x922 (retry) is answered by a TPM that tests itself first; drivers send again, and so does this.
    for _ in 0..5 {
        let response =
            tpm.transmit(&command.0).map_err(|problem| CommandError::Transport { what, problem })?;
        let word =
            response.get(6..10).and_then(|b| b.try_into().ok()).ok_or(CommandError::Malformed(what))?;
        match u32::from_be_bytes(word) {
            0 => return Ok(response[10..].to_vec()),
            0x922 => continue,
            code => return Err(CommandError::Code { what, code }),
        }
    }
    Err(CommandError::Code { what, code: 0x922 })
}

/// `TPM2_Startup(CLEAR)`, for a TPM that has just been powered on. One that runs already is another one than
/// its caller takes it for: its PCRs are not those of this boot.
pub fn startup_clear(tpm: &mut dyn Transport) -> Result<(), CommandError> {
    match run(tpm, "Startup", 0x144, &[], &[0, 0]) {
        Ok(_) => Ok(()),
        Err(CommandError::Code { code: 0x100, .. }) => Err(CommandError::Running),
        Err(e) => Err(e),
    }
}

/// `TPM2_SelfTest` of everything; what was tested is not tested again when a guest's driver asks, which waits
/// two seconds for the answer and gives the TPM up without it.
pub fn self_test(tpm: &mut dyn Transport) -> Result<(), CommandError> {
    run(tpm, "SelfTest", 0x143, &[], &[1]).map(|_| ())
}

/// `TPM2_Shutdown(CLEAR)`.
pub fn shutdown_clear(tpm: &mut dyn Transport) -> Result<(), CommandError> {
    run(tpm, "Shutdown", 0x145, &[], &[0, 0]).map(|_| ())
}

/// `TPM2_PCR_Extend` of several banks at once.
pub fn pcr_extend(tpm: &mut dyn Transport, pcr: u32, digests: &[(u16, Vec<u8>)]) -> Result<(), CommandError> {
    let mut p = Bytes::default().u32(digests.len() as u32);
    for (alg, digest) in digests {
        p = p.u16(*alg).raw(digest);
    }
    run(tpm, "PCR_Extend", 0x182, &[pcr], &p.0).map(|_| ())
}

/// `TPM2_PCR_Allocate`: the named banks get all 24 PCRs, the other known ones none. Takes effect at the next
/// power-on.
pub fn pcr_allocate(tpm: &mut dyn Transport, banks: &[u16]) -> Result<(), CommandError> {
    let known = [alg::SHA1, alg::SHA256, alg::SHA384, alg::SHA512];
    let mut p = Bytes::default().u32(known.len() as u32);
    for bank in known {
        let bits = if banks.contains(&bank) { [0xff; 3] } else { [0; 3] };
        p = p.u16(bank).u8(3).raw(&bits);
    }
    let answer = run(tpm, "PCR_Allocate", 0x12b, &[handle::PLATFORM], &p.0)?;
    // Parameter size, then whether it was done.
    match answer.get(4) {
        Some(1) => Ok(()),
        _ => Err(CommandError::Malformed("PCR_Allocate")),
    }
}

/// `TPM2_ClearControl` and `TPM2_Clear` with platform authorisation: new storage seed, no owner, no lockout.
pub fn clear(tpm: &mut dyn Transport) -> Result<(), CommandError> {
    run(tpm, "ClearControl", 0x127, &[handle::PLATFORM], &[0])?;
    run(tpm, "Clear", 0x126, &[handle::PLATFORM], &[]).map(|_| ())
}

/// Whether an NV index is defined (`TPM2_NV_ReadPublic`).
pub fn nv_exists(tpm: &mut dyn Transport, index: u32) -> Result<bool, CommandError> {
    match run_with_handles(tpm, "NV_ReadPublic", 0x169, &[], &[index], &[]) {
        Ok(_) => Ok(true),
        // TPM_RC_HANDLE for the first handle.
        Err(CommandError::Code { code: 0x18b, .. }) => Ok(false),
        Err(e) => Err(e),
    }
}

/// `TPM2_HierarchyControl`: the platform hierarchy is off until the next power-on.
pub fn disable_platform(tpm: &mut dyn Transport) -> Result<(), CommandError> {
    let p = Bytes::default().u32(handle::PLATFORM).u8(0);
    run(tpm, "HierarchyControl", 0x121, &[handle::PLATFORM], &p.0).map(|_| ())
}

/// `TPM2_FlushContext`.
pub fn flush(tpm: &mut dyn Transport, object: u32) -> Result<(), CommandError> {
    run(tpm, "FlushContext", 0x165, &[], &object.to_be_bytes()).map(|_| ())
}

/// `TPM2_CreatePrimary`: the object's handle and its public area (`TPMT_PUBLIC`).
pub fn create_primary(
    tpm: &mut dyn Transport,
    hierarchy: u32,
    template: &[u8],
) -> Result<(u32, Vec<u8>), CommandError> {
    const WHAT: &str = "CreatePrimary";
    // Empty sensitive part (two empty fields), template, no outside info, no PCRs.
    let p = Bytes::default().u16(4).u16(0).u16(0).sized(template).u16(0).u32(0);
    let answer = run(tpm, WHAT, 0x131, &[hierarchy], &p.0)?;
    let malformed = || CommandError::Malformed(WHAT);
    let word = |at: usize, n: usize| answer.get(at..at + n).ok_or_else(malformed);
    let object = word(0, 4)?.iter().fold(0, |v, b| v << 8 | u32::from(*b));
    let len = word(8, 2)?.iter().fold(0, |v, b| v << 8 | usize::from(*b));
    Ok((object, word(10, len)?.to_vec()))
}

/// `TPM2_EvictControl`: makes a transient object persistent.
pub fn persist(tpm: &mut dyn Transport, object: u32, at: u32) -> Result<(), CommandError> {
    run_with_handles(tpm, "EvictControl", 0x120, &[handle::OWNER], &[object], &at.to_be_bytes()).map(|_| ())
}

/// Defines an NV index under the platform hierarchy, writes it and locks it: only the platform can replace
/// it.
pub fn nv_store(tpm: &mut dyn Transport, index: u32, data: &[u8]) -> Result<(), CommandError> {
    // ppwrite | writedefine | ppread | ownerread | authread | no_da | platformcreate
    const ATTRIBUTES: u32 = 0x4207_2001;
    let public = Bytes::default().u32(index).u16(alg::SHA256).u32(ATTRIBUTES).u16(0).u16(data.len() as u16);
    let p = Bytes::default().u16(0).sized(&public.0);
    run(tpm, "NV_DefineSpace", 0x12a, &[handle::PLATFORM], &p.0)?;
    for (n, chunk) in data.chunks(1024).enumerate() {
        let p = Bytes::default().sized(chunk).u16((n * 1024) as u16);
        run_with_handles(tpm, "NV_Write", 0x137, &[handle::PLATFORM], &[index], &p.0)?;
    }
    run_with_handles(tpm, "NV_WriteLock", 0x138, &[handle::PLATFORM], &[index], &[]).map(|_| ())
}
