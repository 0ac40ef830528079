// SPDX-License-Identifier: Apache-2.0
//! A TPM whose making fails is made by the next power-on, with everything that was asked for. One test
//! function, because there is one TPM per process.

mod common;

use std::io;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering;

use common::STARTUP_CLEAR;
use common::code;
use common::tpm;
use vtpm_svc::control::server::Server;
use vtpm_svc::control::socket::Stream;
use vtpm_svc::tpm::Policy;
use vtpm_svc::tpm::Tpm;
use vtpm_svc::tpm::commands;
use vtpm_svc::tpm::engine::Engine;
use vtpm_svc::tpm::engine::Library;
use vtpm_svc::tpm::engine::state::VmgsState;
use vtpm_svc::tpm::manufacture::Authority;
use vtpm_svc::tpm::manufacture::place;
use vtpm_svc::tpm::power::Making;
use vtpm_svc::tpm::power::Startup;
use vtpm_svc::vmgs::Change;
use vtpm_svc::vmgs::FileId;
use vtpm_svc::vmgs::Identity;
use vtpm_svc::vmgs::Key;
use vtpm_svc::vmgs::Vmgs;
use vtpm_svc::vmgs::block::BlockFile;
use vtpm_svc::vmgs::block::MemFile;
use vtpm_svc::vmgs::records::Ppi;

/// A disk that cannot be read while the switch is on.
struct Flaky(MemFile, Arc<AtomicBool>);

impl BlockFile for Flaky {
    fn len(&self) -> io::Result<u64> {
        self.0.len()
    }
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        if self.1.load(Ordering::SeqCst) {
            Err(io::ErrorKind::Other.into())
        } else {
            self.0.read_at(buffer, offset)
        }
    }
    fn write_at(&mut self, data: &[u8], offset: u64) -> io::Result<()> {
        self.0.write_at(data, offset)
    }
    fn sync(&mut self) -> io::Result<()> {
        self.0.sync()
    }
}

#[test]
fn a_power_on_that_failed_leaves_nothing_out_of_the_next() {
    let broken = Arc::new(AtomicBool::new(false));
    let file = Flaky(MemFile(vec![0; (1 << 20) + 512]), broken.clone());
    let key = Key::from_bytes(&[0x5a; 32]).expect("key");
    let mut vmgs =
        Vmgs::create(file, Some(key), Identity::fresh(None).expect("identity"), None).expect("create");
    // A request that is looked for when the TPM has been made, which is when the disk fails.
    let request = Ppi::default().to_bytes();
    vmgs.commit(&[Change::Put(FileId::TPM_PPI, &request)]).expect("commit");
    let library = Library::load().expect("libtpms0 is installed");
    let state = VmgsState::new(Arc::new(Mutex::new(vmgs)), library.version());
    let engine = Engine::take(library, Box::new(state.clone())).expect("engine");
    let making = Making { authority: Some(Authority::generate().expect("authority")), ..Making::default() };
    let served = Tpm::new(engine, state, making, Policy::default());

    broken.store(true, Ordering::SeqCst);
    assert!(served.power_on(false, Startup::None).is_err());
    broken.store(false, Ordering::SeqCst);
    served.power_on(false, Startup::None).expect("the second try");
    let (mut s, theirs) = UnixStream::pair().expect("pair");
    let (end, _ended) = std::sync::mpsc::channel();
    Arc::new(Server::new(served, false, end)).serve_data_stream(Stream::Unix(theirs));
    assert_eq!(code(&tpm(&mut s, STARTUP_CLEAR).expect("startup")), 0);
    let mut transmit = |command: &[u8]| tpm(&mut s, command).map_err(|e| e.to_string());
    for index in [place::EK_RSA_CERTIFICATE, place::EK_ECC_CERTIFICATE, place::AK_CERTIFICATE] {
        assert!(commands::nv_exists(&mut transmit, index).expect("read public"), "{index:#x}");
    }
}
