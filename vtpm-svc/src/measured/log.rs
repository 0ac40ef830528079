// SPDX-License-Identifier: Apache-2.0
//! The event log as bytes: the crypto-agile format of the TCG PC Client Platform Firmware Profile, section
//! 10.

use super::Event;
use super::kind;
use crate::tpm::commands::BANKS;

const SIGNATURE: &[u8; 16] = b"Spec ID Event03\0";

/// Writes a log: the specification-id event in the old form, then every event.
pub fn write(events: &[Event]) -> Vec<u8> {
    let mut id = SIGNATURE.to_vec();
    // Platform class client; version 2.0, errata 0; two 32-bit words per native unsigned integer.
    id.extend_from_slice(&0u32.to_le_bytes());
    id.extend_from_slice(&[0, 2, 0, 2]);
    id.extend_from_slice(&(BANKS.len() as u32).to_le_bytes());
    for (alg, size) in BANKS {
        id.extend_from_slice(&alg.to_le_bytes());
        id.extend_from_slice(&(size as u16).to_le_bytes());
    }
    id.push(0);
    let mut out = Vec::new();
    out.extend_from_slice(&0u32.to_le_bytes());
    out.extend_from_slice(&kind::NO_ACTION.to_le_bytes());
    out.extend_from_slice(&[0; 20]);
    out.extend_from_slice(&(id.len() as u32).to_le_bytes());
    out.extend_from_slice(&id);
    for event in events {
        out.extend_from_slice(&event.pcr.to_le_bytes());
        out.extend_from_slice(&event.kind.to_le_bytes());
        out.extend_from_slice(&(event.digests.len() as u32).to_le_bytes());
        for (alg, digest) in &event.digests {
            out.extend_from_slice(&alg.to_le_bytes());
            out.extend_from_slice(digest);
        }
        out.extend_from_slice(&(event.data.len() as u32).to_le_bytes());
        out.extend_from_slice(&event.data);
    }
    out
}

/// A log that is not one.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("event log, offset {offset}: expected {expected}")]
pub struct LogError {
    /// Where.
    pub offset: usize,
    /// What should be there.
    pub expected: &'static str,
}

struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    fn take(&mut self, n: usize, expected: &'static str) -> Result<&'a [u8], LogError> {
        let end = self.at.checked_add(n).filter(|end| *end <= self.bytes.len());
        let Some(end) = end else { return Err(LogError { offset: self.at, expected }) };
        let out = &self.bytes[self.at..end];
        self.at = end;
        Ok(out)
    }

    fn u32(&mut self, expected: &'static str) -> Result<u32, LogError> {
        Ok(self.take(4, expected)?.iter().rev().fold(0, |v, b| v << 8 | u32::from(*b)))
    }

    fn u16(&mut self, expected: &'static str) -> Result<u16, LogError> {
        Ok(self.take(2, expected)?.iter().rev().fold(0, |v, b| v << 8 | u16::from(*b)))
    }
}

/// Reads a log. Zero bytes after the last event are padding.
pub fn parse(bytes: &[u8]) -> Result<Vec<Event>, LogError> {
    let mut r = Reader { bytes, at: 0 };
    r.u32("a PCR number")?;
    if r.u32("an event type")? != kind::NO_ACTION {
        return Err(LogError { offset: 4, expected: "EV_NO_ACTION" });
    }
    r.take(20, "a SHA-1 digest")?;
    let size = r.u32("an event size")? as usize;
    let start = r.at;
    let id = r.take(size, "the specification-id event")?;
    let mut i = Reader { bytes: id, at: 0 };
    let shift = |e: LogError| LogError { offset: e.offset + start, ..e };
    if i.take(16, "a signature").map_err(shift)? != SIGNATURE {
        return Err(LogError { offset: start, expected: "`Spec ID Event03`" });
    }
    i.take(8, "platform class and versions").map_err(shift)?;
    let count = i.u32("an algorithm count").map_err(shift)?;
    let mut sizes = Vec::new();
    for _ in 0..count {
        let alg = i.u16("an algorithm").map_err(shift)?;
        sizes.push((alg, usize::from(i.u16("a digest size").map_err(shift)?)));
    }
    let mut events = Vec::new();
    while bytes[r.at..].iter().any(|b| *b != 0) {
        let pcr = r.u32("a PCR number")?;
        let kind = r.u32("an event type")?;
        let count = r.u32("a digest count")?;
        if count as usize > sizes.len() {
            return Err(LogError { offset: r.at - 4, expected: "no more digests than there are algorithms" });
        }
        let mut digests = Vec::new();
        for _ in 0..count {
            let alg = r.u16("an algorithm")?;
            let Some((_, size)) = sizes.iter().find(|(known, _)| *known == alg) else {
                return Err(LogError { offset: r.at - 2, expected: "an algorithm of the first event" });
            };
            digests.push((alg, r.take(*size, "a digest")?.to_vec()));
        }
        let size = r.u32("an event size")? as usize;
        events.push(Event { pcr, kind, digests, data: r.take(size, "event data")?.to_vec() });
    }
    Ok(events)
}

#[cfg(test)]
mod tests {
    use super::super::Boot;
    use super::*;
    use proptest::prelude::*;

    fn boot() -> Boot<'static> {
        Boot {
            monitor: "cvmm test",
            stage0: Some((0x1000, b"stage0")),
            kernel: b"not a PE file",
            kernel_address: 0x10_0000,
            initrd: Some(b"initrd"),
            cmdline: "console=ttyS0",
        }
    }

    #[test]
    fn a_log_reads_back() {
        let events = boot().events();
        let mut bytes = write(&events);
        assert_eq!(parse(&bytes).expect("own log"), events);
        bytes.extend_from_slice(&[0; 100]);
        assert_eq!(parse(&bytes).expect("padded log"), events);
        let cut = parse(&bytes[..80]).expect_err("cut");
        assert!(cut.offset <= 80);
    }

    /// Known values: SHA-256 of four zero bytes and of the action's 40 bytes, as they stand in logs of real
    /// machines.
    #[test]
    fn separators_and_the_boot_action_have_the_digests_that_verifiers_know() {
        let events = boot().events();
        let hex = |e: &Event| hex::encode(&e.digests[0].1);
        let action = events.iter().position(|e| e.data.starts_with(b"Calling EFI")).expect("action");
        assert_eq!(hex(&events[action]), "3d6772b4f84ed47595d72a2c4c5ffd15f5bb72c7507fe26f2aaee2c69d5633ba");
        let separators: Vec<_> = events.iter().filter(|e| e.kind == kind::SEPARATOR).collect();
        assert_eq!(separators.len(), 8);
        assert!(separators.iter().all(|e| hex(e).starts_with("df3f6198") && hex(e).ends_with("b81119")));
        let application =
            events.iter().position(|e| e.kind == kind::EFI_BOOT_SERVICES_APPLICATION).expect("kernel");
        assert!(action < application, "the action comes before the first application");
    }

    proptest! {
        #[test]
        fn no_log_panics(mut bytes in proptest::collection::vec(any::<u8>(), 0..300), head in any::<bool>()) {
            if head {
                let mut real = write(&[]);
                real.append(&mut bytes);
                bytes = real;
            }
            let _ = parse(&bytes);
        }
    }
}
