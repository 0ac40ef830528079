// SPDX-License-Identifier: Apache-2.0
//! A dishonest host, for tests: it alters what it has launched or staged after everybody has looked at it.
//!
//! A launch page that is altered changes the digest, and an ID block refuses the launch. A staged byte is not
//! measured by the launch; stage0 copies it and hashes the copy. So the host may alter it before stage0
//! looks, or keep changing it while stage0 works; the guest must end, or run with the bytes that were
//! measured.

use std::fmt;
use std::io;
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering;
use std::thread;
use std::thread::JoinHandle;

use snp::plan::Bytes;
use snp::plan::LaunchPlan;
use snp::stage0::InputsPage;
use snp::stage0::inputs::Item;
use snp::stage0::inputs::Kind;
use snp::stage0::layout;

use crate::launch::Staged;
use crate::machine::ram::GuestRam;

/// The bit that is altered.
const BIT: u8 = 0x10;

/// What is altered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Target {
    /// The first staged item of a kind, in its middle.
    Item(Kind),
    /// stage0, in its middle.
    Stage0,
    /// The measured hash of the first item.
    Hashes,
}

/// An alteration, as a test asks for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tamper {
    target: Target,
    /// Not once, but back and forth until the memory is taken away.
    racing: bool,
}

impl FromStr for Tamper {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (name, racing) = match text.split_once('@') {
            None => (text, false),
            Some((name, "race")) => (name, true),
            Some((_, when)) => return Err(format!("'{when}' is no moment: only 'race' is")),
        };
        let target = match name {
            "kernel" => Target::Item(Kind::Kernel),
            "initrd" => Target::Item(Kind::Initrd),
            "cmdline" => Target::Item(Kind::Cmdline),
            "boot-params" => Target::Item(Kind::BootData),
            "acpi" => Target::Item(Kind::Acpi),
            "stage0" => Target::Stage0,
            "hashes" => Target::Hashes,
            other => return Err(format!("'{other}' is nothing that can be altered")),
        };
        match (target, racing) {
            (Target::Stage0 | Target::Hashes, true) => Err("launch pages cannot be raced for".into()),
            _ => Ok(Tamper { target, racing }),
        }
    }
}

/// As [`Tamper::from_str`] reads it.
impl fmt::Display for Tamper {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.target {
            Target::Item(Kind::Kernel) => "kernel",
            Target::Item(Kind::Initrd) => "initrd",
            Target::Item(Kind::Cmdline) => "cmdline",
            Target::Item(Kind::BootData) => "boot-params",
            Target::Item(Kind::Acpi) => "acpi",
            Target::Stage0 => "stage0",
            Target::Hashes => "hashes",
        })?;
        if self.racing { f.write_str("@race") } else { Ok(()) }
    }
}

impl Tamper {
    /// Alters what will be launched or staged; what is to be altered during the run is noted in `staged`.
    pub fn apply(
        self,
        inputs: &InputsPage,
        plan: &mut LaunchPlan,
        staged: &mut Staged,
    ) -> Result<(), String> {
        let missing = || format!("there is nothing like {:?} to alter in this guest", self.target);
        let first = |item: &&Item| match self.target {
            Target::Item(kind) => item.kind == kind,
            _ => true,
        };
        let item = inputs.items.iter().find(first).ok_or_else(missing)?;
        let middle = item.source + item.len / 2;
        match self.target {
            Target::Item(_) if self.racing => {
                staged.raced = Some(middle);
                Ok(())
            }
            Target::Item(_) => {
                let holds = |(gpa, bytes): &&mut (u64, Bytes)| {
                    (*gpa..*gpa + bytes.as_slice().len() as u64).contains(&middle)
                };
                let (gpa, bytes) = staged.bytes.iter_mut().find(holds).ok_or_else(missing)?;
                flip(bytes, (middle - *gpa) as usize).ok_or_else(missing)
            }
            Target::Stage0 => {
                let record = plan.records.iter_mut().find(|r| r.gpa == layout::IMAGE).ok_or_else(missing)?;
                let middle = record.contents.as_slice().len() / 2;
                flip(&mut record.contents, middle).ok_or_else(missing)
            }
            Target::Hashes => {
                let record = plan.records.iter_mut().find(|r| r.gpa == layout::INPUTS).ok_or_else(missing)?;
                let page = record.contents.as_slice();
                let at = page.windows(item.hash.len()).position(|w| w == item.hash).ok_or_else(missing)?;
                flip(&mut record.contents, at).ok_or_else(missing)
            }
        }
    }
}

/// Alters one byte of a copy, and puts the copy in place.
fn flip(bytes: &mut Bytes, at: usize) -> Option<()> {
    let mut copy = bytes.as_slice().to_vec();
    *copy.get_mut(at)? ^= BIT;
    *bytes = Bytes::from(copy);
    Some(())
}

/// Changes a byte of staged memory back and forth, until that fails or this is dropped.
pub struct Racer {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Racer {
    /// Starts to.
    pub fn start(ram: GuestRam, gpa: u64) -> io::Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = thread::Builder::new().name("racer".into()).spawn(move || {
            let mut byte = [0];
            if ram.try_read(gpa, &mut byte).is_err() {
                return;
            }
            while !stopped.load(Ordering::Acquire) {
                byte[0] ^= BIT;
                // In a strict run the memory is closed once the guest has taken it over.
                if ram.try_write(gpa, &byte).is_err() {
                    return;
                }
            }
        })?;
        Ok(Racer { stop, thread: Some(thread) })
    }
}

impl Drop for Racer {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_exists_can_be_altered() {
        let kernel = Tamper { target: Target::Item(Kind::Kernel), racing: false };
        assert_eq!("kernel".parse(), Ok(kernel));
        assert_eq!("kernel@race".parse(), Ok(Tamper { racing: true, ..kernel }));
        for bad in ["", "kernels", "kernel@", "kernel@noon", "stage0@race"] {
            assert!(bad.parse::<Tamper>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_racer_leaves_one_of_two_values() {
        let ram = GuestRam::new([(0, 0x1000)]).unwrap();
        ram.write(0x10, &[0x41]).unwrap();
        let racer = Racer::start(ram.clone(), 0x10).unwrap();
        let mut seen = [false; 256];
        while !(seen[0x41] && seen[0x51]) {
            let mut byte = [0];
            ram.read(0x10, &mut byte).unwrap();
            seen[usize::from(byte[0])] = true;
        }
        drop(racer);
        assert_eq!(seen.iter().filter(|seen| **seen).count(), 2);
    }
}
