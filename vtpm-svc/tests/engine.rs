// SPDX-License-Identifier: Apache-2.0
//! The engine with a store in memory. One test function, because there is one TPM per process.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::Mutex;

use vtpm_svc::tpm::engine::Blob;
use vtpm_svc::tpm::engine::Engine;
use vtpm_svc::tpm::engine::EngineError;
use vtpm_svc::tpm::engine::Library;
use vtpm_svc::tpm::engine::StateStore;
use vtpm_svc::tpm::engine::StoreFailed;
use zeroize::Zeroizing;

#[derive(Clone, Default)]
struct Memory {
    blobs: Arc<Mutex<HashMap<Blob, Vec<u8>>>>,
    broken: Arc<Mutex<bool>>,
    stores: Arc<Mutex<u32>>,
}

impl StateStore for Memory {
    fn load(&mut self, blob: Blob) -> Result<Option<Zeroizing<Vec<u8>>>, StoreFailed> {
        Ok(self.blobs.lock().expect("lock").get(&blob).cloned().map(Zeroizing::new))
    }
    fn store(&mut self, blob: Blob, data: &[u8]) -> Result<(), StoreFailed> {
        if *self.broken.lock().expect("lock") {
            return Err(StoreFailed);
        }
        *self.stores.lock().expect("lock") += 1;
        self.blobs.lock().expect("lock").insert(blob, data.to_vec());
        Ok(())
    }
    fn delete(&mut self, blob: Blob) -> Result<bool, StoreFailed> {
        Ok(self.blobs.lock().expect("lock").remove(&blob).is_some())
    }
}

const STARTUP_CLEAR: &[u8] = &[0x80, 1, 0, 0, 0, 12, 0, 0, 1, 0x44, 0, 0];
const GET_RANDOM_8: &[u8] = &[0x80, 1, 0, 0, 0, 12, 0, 0, 1, 0x7b, 0, 8];

/// NV_DefineSpace of an 8-byte ordinary index 0x01500000 with owner authorisation and attributes
/// ownerwrite | authwrite | ownerread | authread (TPM 2.0 library specification, part 3, 31.3).
fn nv_define() -> Vec<u8> {
    let mut c = vec![0x80, 2, 0, 0, 0, 0, 0, 0, 1, 0x2a, 0x40, 0, 0, 1];
    c.extend([0, 0, 0, 9, 0x40, 0, 0, 9, 0, 0, 0, 0, 0]);
    c.extend([0, 0, 0, 14, 1, 0x50, 0, 0, 0, 0x0b, 0, 6, 0, 6, 0, 0, 0, 8]);
    let len = c.len() as u32;
    c[2..6].copy_from_slice(&len.to_be_bytes());
    c
}

fn code(response: &[u8]) -> u32 {
    u32::from_be_bytes(response[6..10].try_into().expect("a response has ten bytes"))
}

#[test]
fn a_tpm_is_made_only_when_allowed_and_fails_closed() {
    let memory = Memory::default();
    let library = Library::load().expect("libtpms0 is installed");
    let mut tpm = Engine::take(library, Box::new(memory.clone())).expect("the first");
    assert!(matches!(Engine::take(library, Box::new(memory.clone())), Err(EngineError::Taken)));

    assert!(tpm.start(false).is_err(), "no state and no permission to make one");
    assert!(memory.blobs.lock().expect("lock").is_empty());
    assert!(matches!(tpm.process(0, GET_RANDOM_8), Err(EngineError::State("off"))));

    tpm.start(true).expect("manufacture");
    assert!(memory.blobs.lock().expect("lock").contains_key(&Blob::Permanent));
    assert_eq!(
        code(&tpm.process(0, GET_RANDOM_8).expect("process")),
        0x100,
        "TPM_RC_INITIALIZE before Startup"
    );
    assert_eq!(code(&tpm.process(0, STARTUP_CLEAR).expect("process")), 0);
    let random = tpm.process(0, GET_RANDOM_8).expect("process");
    assert_eq!((code(&random), random.len()), (0, 20));

    for garbage in [&[][..], &[0x80], &[0x80, 1, 0, 0, 0, 99, 0, 0, 1, 0x7b], &[0xff; 4096]] {
        let answer = tpm.process(0, garbage).expect("an answer to anything");
        assert!(answer.len() >= 10 && code(&answer) != 0);
    }

    let before = *memory.stores.lock().expect("lock");
    assert_eq!(code(&tpm.process(0, &nv_define()).expect("process")), 0);
    assert_eq!(*memory.stores.lock().expect("lock"), before + 1, "stored once, before the response");

    // The state survives a power cycle without permission to manufacture, and can be validated.
    let blob = tpm.state(Blob::Permanent).expect("state");
    tpm.stop();
    tpm.validate(Blob::Permanent, &blob, None).expect("own state is valid");
    assert!(tpm.validate(Blob::Permanent, &blob[..blob.len() / 2], None).is_err(), "half a state is not");
    tpm.start(false).expect("restart");
    assert_eq!(code(&tpm.process(0, STARTUP_CLEAR).expect("process")), 0);
    assert_eq!(code(&tpm.process(0, &nv_define()).expect("process")), 0x14c, "TPM_RC_NV_DEFINED");

    // Volatile state: an extended PCR is still there when it is put back.
    let extend = {
        let mut c = vec![0x80, 2, 0, 0, 0, 65, 0, 0, 1, 0x82, 0, 0, 0, 16];
        c.extend([0, 0, 0, 9, 0x40, 0, 0, 9, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0x0b]);
        c.extend([7; 32]);
        c
    };
    assert_eq!(code(&tpm.process(0, &extend).expect("process")), 0);
    let read = [0x80, 1, 0, 0, 0, 20, 0, 0, 1, 0x7e, 0, 0, 0, 1, 0, 0x0b, 3, 0, 0, 1];
    let pcr = tpm.process(0, &read).expect("process");
    let volatile = tpm.state(Blob::Volatile).expect("volatile");
    tpm.stop();
    memory.blobs.lock().expect("lock").insert(Blob::Volatile, volatile.to_vec());
    tpm.start(false).expect("resume");
    assert_eq!(tpm.process(0, &read).expect("process")[10..], pcr[10..]);
    assert!(pcr.windows(4).any(|w| w != [0; 4]));
    memory.blobs.lock().expect("lock").remove(&Blob::Volatile);

    // A store that fails is an error to the client, now and for good.
    *memory.broken.lock().expect("lock") = true;
    let undefine = {
        let mut c = vec![0x80, 2, 0, 0, 0, 31, 0, 0, 1, 0x22, 0x40, 0, 0, 1, 1, 0x50, 0, 0];
        c.extend([0, 0, 0, 9, 0x40, 0, 0, 9, 0, 0, 0, 0, 0]);
        c
    };
    assert_eq!(code(&tpm.process(0, &undefine).expect("process")), 0x101);
    *memory.broken.lock().expect("lock") = false;
    assert_eq!(code(&tpm.process(0, GET_RANDOM_8).expect("process")), 0x101, "sticky");
}
