// SPDX-License-Identifier: Apache-2.0
//! Whether this host's KVM can carry the emulated platform, found out by a guest of a few bytes.
//!
//! A `/dev/kvm` that opens proves little: some are interpreters that know a part of the instruction set.

use std::sync::Arc;
use std::sync::mpsc::channel;
use std::thread;
use std::time::Duration;
use std::time::Instant;

use serde::Deserialize;
use serde::Serialize;

use super::shared::intercept_msrs;
use crate::platform::Vcpu;
use crate::platform::Vm;
use crate::platform::VmKind;
use crate::platform::error::CallError;
use crate::platform::exit::Exit;
use crate::platform::kvm::KvmPlatform;
use crate::platform::mapping::Mapping;
use crate::platform::memory::MemorySlot;

/// Times around the loop, two instructions each.
const TURNS: u32 = 400_000;
/// Where the loop lies, also as a segment.
const CODE: u64 = 0x1000;
/// Longest time that the guest may take: an interpreter needs less than a second.
const PATIENCE: Duration = Duration::from_secs(20);

/// How the tiny guest fared.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum EmulationTrial {
    /// Nothing was tried, and why.
    NotTried(String),
    /// It did not run, and why.
    Failed(String),
    /// It ran.
    Passed {
        /// Instructions each second, exits and set-up of the first run included.
        rate: u64,
    },
}

/// Runs the guest.
pub fn try_emulation() -> EmulationTrial {
    let (sender, answer) = channel();
    // In a thread of its own: a KVM that never comes back must not take `doctor` with it.
    let spawned = thread::Builder::new().name("kvm trial".into()).spawn(move || {
        let _ = sender.send(attempt());
    });
    if let Err(e) = spawned {
        return EmulationTrial::NotTried(format!("no thread for it: {e}"));
    }
    match answer.recv_timeout(PATIENCE) {
        Ok(Ok(rate)) => EmulationTrial::Passed { rate },
        Ok(Err(why)) => EmulationTrial::Failed(why),
        Err(_) => EmulationTrial::Failed(format!(
            "a guest of {} instructions did not end within {} s",
            2 * TURNS,
            PATIENCE.as_secs()
        )),
    }
}

fn attempt() -> Result<u64, String> {
    let words = |e: CallError| e.to_string();
    let kvm = KvmPlatform::open().map_err(|e| e.to_string())?;
    let vm = kvm.create(VmKind::Plain).map_err(words)?;
    intercept_msrs(&vm).map_err(words)?;
    let memory = Arc::new(Mapping::anonymous(0x10000).map_err(|e| e.to_string())?);
    // mov ecx, TURNS; again: dec ecx; jnz again; hlt - in real mode.
    let mut code = vec![0x66, 0xb9];
    code.extend_from_slice(&TURNS.to_le_bytes());
    code.extend_from_slice(&[0x66, 0x49, 0x75, 0xfc, 0xf4]);
    memory.write(CODE, &code).map_err(|e| e.to_string())?;
    vm.set_memory(MemorySlot { slot: 0, gpa: 0, shared: memory, private: None }).map_err(words)?;
    let mut vcpu = vm.new_vcpu(0).map_err(words)?;
    let mut sregs = vcpu.get_sregs().map_err(words)?;
    (sregs.cs.base, sregs.cs.selector) = (CODE, (CODE >> 4) as u16);
    vcpu.set_sregs(&sregs).map_err(words)?;
    let mut regs = vcpu.get_regs().map_err(words)?;
    (regs.rip, regs.rflags) = (0, 2);
    vcpu.set_regs(&regs).map_err(words)?;
    let started = Instant::now();
    loop {
        match vcpu.run().map_err(words)? {
            Exit::Hlt => break,
            Exit::Interrupted => {}
            other => return Err(format!("a loop of real-mode instructions ended with {other:?}, not HLT")),
        }
    }
    Ok((f64::from(2 * TURNS) / started.elapsed().as_secs_f64().max(1e-9)) as u64)
}
