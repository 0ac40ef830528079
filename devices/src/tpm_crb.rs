// SPDX-License-Identifier: Apache-2.0
//! The TPM's command-response-buffer device: TCG PC Client Platform TPM Profile 1.05, section 6.5.3.
//!
//! Registers of locality 0 trap; commands and responses lie in one page of ordinary memory that guest and
//! monitor share, so that a command costs the same handful of exits whatever its size, also in a guest where
//! an emulated string copy would cost an exit per element. The guest's page is hostile: a command is copied
//! out once and judged on the copy.
//!
//! A command runs on the device's own thread. The vCPU that wrote START goes on at once and sees START clear
//! when the response is in the page.

use std::sync::Arc;
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::PoisonError;
use std::sync::mpsc;

use crate::bus::Action;
use crate::bus::Device;

/// Bytes of the register page.
pub const LEN: u64 = 0x1000;
/// Bytes of the buffer, for commands and for responses.
pub const BUFFER_LEN: usize = 4096;

const LOC_STATE: u64 = 0x00;
const LOC_CTRL: u64 = 0x08;
const LOC_STS: u64 = 0x0c;
const INTF_ID: u64 = 0x30;
const VENDOR: u64 = 0x34;
const CTRL_REQ: u64 = 0x40;
const CTRL_STS: u64 = 0x44;
const CTRL_CANCEL: u64 = 0x48;
const CTRL_START: u64 = 0x4c;
const CMD_SIZE: u64 = 0x58;
const CMD_LADDR: u64 = 0x5c;
const CMD_HADDR: u64 = 0x60;
const RSP_SIZE: u64 = 0x64;
const RSP_LADDR: u64 = 0x68;
const RSP_HADDR: u64 = 0x6c;
/// Where a driver that does not read the addresses expects the buffer: the same bytes, but each access traps.
const WINDOW: u64 = 0x80;

/// Interface type CRB, version 1, 64-byte transfers, CRB supported and selected; one locality, no idle
/// bypass.
const INTF_ID_VALUE: u32 = 1 | 1 << 4 | 3 << 11 | 1 << 14 | 1 << 17;
/// Vendor id as QEMU's device has it; drivers only show it.
const VENDOR_VALUE: u32 = 0x1014;
/// Header of a command: tag, size, code.
const HEADER: usize = 10;
/// `TPM_RC_COMMAND_SIZE`.
const RC_COMMAND_SIZE: u32 = 0x142;
/// `TPM_RC_FAILURE`.
const RC_FAILURE: u32 = 0x101;

/// The shared page.
pub trait Buffer: Send + Sync {
    /// Copies bytes out; `offset + out.len()` is within the page.
    fn read(&self, offset: usize, out: &mut [u8]);
    /// Copies bytes in; `offset + data.len()` is within the page.
    fn write(&self, offset: usize, data: &[u8]);
}

/// The TPM did not answer. It is treated as failed until the guest resets.
#[derive(Debug, thiserror::Error)]
#[error("the TPM does not answer: {0}")]
pub struct BackendError(pub String);

/// What runs commands; it may take as long as it needs.
pub trait Backend: Send {
    /// Runs one command, which has a whole header and no more bytes than that says.
    fn execute(&mut self, locality: u8, command: &[u8]) -> Result<Vec<u8>, BackendError>;
}

#[derive(Default)]
struct Registers {
    assigned: bool,
    ready: bool,
    running: bool,
    fatal: bool,
    cancel: u32,
    /// Counts resets, so that a response from before one is dropped.
    epoch: u64,
}

struct Job {
    epoch: u64,
    command: Vec<u8>,
}

/// The device.
pub struct Crb {
    registers: Arc<Mutex<Registers>>,
    buffer: Arc<dyn Buffer>,
    address: u64,
    jobs: mpsc::Sender<Job>,
    cancel: Box<dyn Fn() + Send>,
}

fn lock(registers: &Mutex<Registers>) -> MutexGuard<'_, Registers> {
    registers.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Crb {
    /// A device whose buffer page is at guest-physical `address`; `cancel` is called while a command may be
    /// running.
    pub fn new(
        buffer: Arc<dyn Buffer>,
        address: u64,
        mut backend: Box<dyn Backend>,
        cancel: Box<dyn Fn() + Send>,
    ) -> std::io::Result<Self> {
        let registers = Arc::new(Mutex::new(Registers::default()));
        let (jobs, queue) = mpsc::channel::<Job>();
        let (theirs, page) = (registers.clone(), buffer.clone());
        std::thread::Builder::new().name("tpm".into()).spawn(move || {
            while let Ok(job) = queue.recv() {
                // A command from before a reset must not run on the TPM of after it, whose PCRs say that it
                // has just started.
                if lock(&theirs).epoch != job.epoch {
                    continue;
                }
                let answer = backend.execute(0, &job.command);
                finish(&theirs, page.as_ref(), job.epoch, answer);
            }
        })?;
        Ok(Self { registers, buffer, address, jobs, cancel })
    }

    /// The guest resets: registers as after power-on; the response of a command that still runs is dropped.
    pub fn reset(&mut self) {
        let mut registers = lock(&self.registers);
        let epoch = registers.epoch + 1;
        *registers = Registers { epoch, ..Registers::default() };
    }

    fn load(&self, register: u64) -> u32 {
        let r = lock(&self.registers);
        let bit = |set: bool, n: u32| u32::from(set) << n;
        match register {
            // Bit 0 is active low: no dynamic launch was ever established here. Bit 7: the register is valid.
            LOC_STATE => 1 | bit(r.assigned, 1) | 1 << 7,
            LOC_STS => bit(r.assigned, 0),
            INTF_ID => INTF_ID_VALUE,
            VENDOR => VENDOR_VALUE,
            CTRL_STS => bit(r.fatal, 0) | bit(!r.ready, 1),
            CTRL_CANCEL => r.cancel,
            CTRL_START => bit(r.running, 0),
            CMD_SIZE | RSP_SIZE => BUFFER_LEN as u32,
            CMD_LADDR | RSP_LADDR => self.address as u32,
            CMD_HADDR | RSP_HADDR => (self.address >> 32) as u32,
            // CTRL_REQ reads zero because what it asks for has happened; the rest is not there.
            _ => 0,
        }
    }

    fn store(&mut self, register: u64, value: u32) {
        let mut r = lock(&self.registers);
        match register {
            // Request, and seizing from nobody.
            LOC_CTRL if value & 0b101 != 0 => r.assigned = true,
            LOC_CTRL if value & 0b10 != 0 => r.assigned = false,
            CTRL_REQ if r.running => {}
            CTRL_REQ if value & 1 != 0 => r.ready = true,
            CTRL_REQ if value & 0b10 != 0 => r.ready = false,
            CTRL_CANCEL => {
                r.cancel = value & 1;
                if value & 1 != 0 && r.running {
                    drop(r);
                    (self.cancel)();
                }
            }
            CTRL_START if value & 1 != 0 && r.assigned && !r.running && !r.fatal => {
                r.running = true;
                let epoch = r.epoch;
                drop(r);
                self.start(epoch);
            }
            _ => {}
        }
    }

    fn start(&mut self, epoch: u64) {
        let mut private = [0; BUFFER_LEN];
        self.buffer.read(0, &mut private);
        let size = u32::from_be_bytes([private[2], private[3], private[4], private[5]]) as usize;
        if !(HEADER..=BUFFER_LEN).contains(&size) {
            finish(&self.registers, self.buffer.as_ref(), epoch, Ok(error(RC_COMMAND_SIZE)));
            return;
        }
        if self.jobs.send(Job { epoch, command: private[..size].to_vec() }).is_err() {
            let gone = BackendError("its thread is gone".into());
            finish(&self.registers, self.buffer.as_ref(), epoch, Err(gone));
        }
    }
}

impl Drop for Crb {
    /// The guest's machine is gone: what waits for the TPM is as if it had never been sent.
    fn drop(&mut self) {
        self.reset();
    }
}

fn error(code: u32) -> Vec<u8> {
    let mut response = vec![0x80, 1, 0, 0, 0, HEADER as u8];
    response.extend_from_slice(&code.to_be_bytes());
    response
}

/// Puts a response into the page and only then clears START.
fn finish(
    registers: &Mutex<Registers>,
    buffer: &dyn Buffer,
    epoch: u64,
    answer: Result<Vec<u8>, BackendError>,
) {
    let mut r = lock(registers);
    if r.epoch != epoch {
        return;
    }
    match answer {
        Ok(response) if (HEADER..=BUFFER_LEN).contains(&response.len()) => buffer.write(0, &response),
        Ok(_) => buffer.write(0, &error(RC_FAILURE)),
        Err(_) => {
            buffer.write(0, &error(RC_FAILURE));
            r.fatal = true;
        }
    }
    r.running = false;
}

impl Device for Crb {
    /// Any width at any byte lane: some guests read registers byte by byte.
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        for (at, byte) in (offset..).zip(data.iter_mut()) {
            *byte = match at.checked_sub(WINDOW) {
                Some(n) if n < LEN - WINDOW => {
                    let mut one = [0];
                    self.buffer.read(n as usize, &mut one);
                    one[0]
                }
                Some(_) => 0xff,
                None => self.load(at & !3).to_le_bytes()[(at & 3) as usize],
            };
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Option<Action> {
        let mut at = offset;
        let mut rest = data;
        while let Some(first) = rest.first() {
            if let Some(n) = at.checked_sub(WINDOW) {
                if n < LEN - WINDOW {
                    self.buffer.write(n as usize, &[*first]);
                }
                (at, rest) = (at + 1, &rest[1..]);
                continue;
            }
            // All bytes that fall into this register; lanes that are not written do nothing.
            let lane = (at & 3) as usize;
            let count = rest.len().min(4 - lane);
            let mut value = [0; 4];
            value[lane..lane + count].copy_from_slice(&rest[..count]);
            self.store(at & !3, u32::from_le_bytes(value));
            (at, rest) = (at + count as u64, &rest[count..]);
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicBool;
    use std::sync::atomic::Ordering;
    use std::time::Duration;
    use std::time::Instant;

    const BUFFER: u64 = 0xfed4_6000;

    struct Page(Mutex<Vec<u8>>);

    impl Buffer for Page {
        fn read(&self, offset: usize, out: &mut [u8]) {
            out.copy_from_slice(&self.0.lock().expect("page")[offset..offset + out.len()]);
        }
        fn write(&self, offset: usize, data: &[u8]) {
            self.0.lock().expect("page")[offset..offset + data.len()].copy_from_slice(data);
        }
    }

    /// Echoes the command after a header, once it is let go.
    struct Echo {
        go: mpsc::Receiver<Result<usize, BackendError>>,
        begun: mpsc::Sender<()>,
    }

    impl Backend for Echo {
        fn execute(&mut self, _locality: u8, command: &[u8]) -> Result<Vec<u8>, BackendError> {
            let _ = self.begun.send(());
            let extra = self.go.recv().expect("test ended")?;
            let mut r = command.to_vec();
            r.resize(command.len() + extra, 0xee);
            Ok(r)
        }
    }

    struct Bench {
        crb: Crb,
        page: Arc<Page>,
        go: mpsc::Sender<Result<usize, BackendError>>,
        begun: mpsc::Receiver<()>,
        cancelled: Arc<AtomicBool>,
    }

    fn bench() -> Bench {
        let page = Arc::new(Page(Mutex::new(vec![0; BUFFER_LEN])));
        let (go, wait) = mpsc::channel();
        let (begin, begun) = mpsc::channel();
        let cancelled = Arc::new(AtomicBool::new(false));
        let flag = cancelled.clone();
        let cancel = Box::new(move || flag.store(true, Ordering::SeqCst));
        let crb = Crb::new(page.clone(), BUFFER, Box::new(Echo { go: wait, begun: begin }), cancel)
            .expect("thread");
        Bench { crb, page, go, begun, cancelled }
    }

    impl Bench {
        fn read(&mut self, at: u64) -> u32 {
            let mut b = [0; 4];
            self.crb.read(at, &mut b);
            u32::from_le_bytes(b)
        }
        fn write(&mut self, at: u64, v: u32) {
            self.crb.write(at, &v.to_le_bytes());
        }
        fn ready(&mut self, command: &[u8]) {
            self.write(0x08, 1);
            self.write(0x40, 1);
            self.page.write(0, command);
        }
        /// Waits until the TPM has taken a command.
        fn taken(&self) {
            self.begun.recv_timeout(Duration::from_secs(10)).expect("no command arrives");
        }
        fn wait(&mut self) {
            let end = Instant::now() + Duration::from_secs(10);
            while self.read(0x4c) & 1 == 1 {
                assert!(Instant::now() < end, "START never clears");
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        fn response(&self, n: usize) -> Vec<u8> {
            let mut out = vec![0; n];
            self.page.read(0, &mut out);
            out
        }
    }

    const COMMAND: &[u8] = &[0x80, 1, 0, 0, 0, 12, 0, 0, 1, 0x7b, 0, 8];

    /// The sequence of Linux' `tpm_crb` driver: values that it waits for are 0x82 and 0x80 under the mask
    /// 0x82.
    #[test]
    fn a_driver_gets_locality_readiness_and_its_response() {
        let mut b = bench();
        assert_eq!(b.read(0x30), 0x0002_5811);
        assert_eq!((b.read(0x58), b.read(0x64)), (4096, 4096));
        assert_eq!(
            (b.read(0x5c), b.read(0x60), b.read(0x68), b.read(0x6c)),
            (0xfed4_6000, 0, 0xfed4_6000, 0)
        );
        assert_eq!(b.read(0x44), 2, "idle");
        b.write(0x08, 1);
        assert_eq!(b.read(0x00) & 0x82, 0x82);
        assert_eq!(b.read(0x0c), 1);
        b.write(0x40, 1);
        assert_eq!((b.read(0x40), b.read(0x44)), (0, 0), "ready, and the request reads back zero");
        b.page.write(0, COMMAND);
        b.write(0x4c, 1);
        assert_eq!(b.read(0x4c), 1, "the vCPU goes on while the command runs");
        b.go.send(Ok(3)).expect("go");
        b.wait();
        assert_eq!(b.response(15), [COMMAND, &[0xee; 3]].concat());
        b.write(0x40, 2);
        assert_eq!(b.read(0x44), 2);
        b.write(0x08, 2);
        assert_eq!(b.read(0x00) & 0x82, 0x80);
    }

    #[test]
    fn the_command_is_read_once() {
        let mut b = bench();
        b.ready(COMMAND);
        b.write(0x4c, 1);
        b.page.write(0, &[0xff; 64]);
        b.go.send(Ok(0)).expect("go");
        b.wait();
        assert_eq!(b.response(12), COMMAND);
    }

    #[test]
    fn sizes_that_cannot_be_are_answered_without_the_tpm() {
        for size in [0u32, 9, 4097, u32::MAX] {
            let mut b = bench();
            let mut bad = COMMAND.to_vec();
            bad[2..6].copy_from_slice(&size.to_be_bytes());
            b.ready(&bad);
            b.write(0x4c, 1);
            assert_eq!(b.read(0x4c), 0);
            assert_eq!(b.response(10), [0x80, 1, 0, 0, 0, 10, 0, 0, 1, 0x42]);
        }
    }

    #[test]
    fn a_response_that_does_not_fit_is_an_error_and_a_dead_tpm_is_fatal() {
        let mut b = bench();
        b.ready(COMMAND);
        b.write(0x4c, 1);
        b.go.send(Ok(BUFFER_LEN)).expect("go");
        b.wait();
        assert_eq!(b.response(10)[6..], [0, 0, 1, 1]);
        assert_eq!(b.read(0x44) & 1, 0);
        b.write(0x4c, 1);
        b.go.send(Err(BackendError("gone".into()))).expect("go");
        b.wait();
        assert_eq!(b.read(0x44) & 1, 1, "fatal");
        b.page.write(0, COMMAND);
        b.write(0x4c, 1);
        assert_eq!(b.read(0x4c), 0, "no more commands");
        b.crb.reset();
        assert_eq!(b.read(0x44), 2);
    }

    #[test]
    fn without_locality_nothing_starts_and_a_start_while_running_is_ignored() {
        let mut b = bench();
        b.page.write(0, COMMAND);
        b.write(0x4c, 1);
        assert_eq!(b.read(0x4c), 0);
        b.ready(COMMAND);
        b.write(0x4c, 1);
        b.write(0x4c, 1);
        b.write(0x40, 2);
        assert_eq!(b.read(0x44), 0, "going idle has to wait");
        b.go.send(Ok(0)).expect("go");
        b.wait();
        assert!(b.go.send(Ok(0)).is_ok());
    }

    #[test]
    fn cancel_reaches_a_running_command_only() {
        let mut b = bench();
        b.ready(COMMAND);
        b.write(0x48, 1);
        assert!(!b.cancelled.load(Ordering::SeqCst));
        b.write(0x48, 0);
        b.write(0x4c, 1);
        b.write(0x48, 1);
        assert!(b.cancelled.load(Ordering::SeqCst));
        b.go.send(Ok(0)).expect("go");
        b.wait();
    }

    #[test]
    fn a_response_from_before_a_reset_is_dropped() {
        let mut b = bench();
        b.ready(COMMAND);
        b.write(0x4c, 1);
        b.taken();
        b.crb.reset();
        b.page.write(0, &[0; 12]);
        b.go.send(Ok(0)).expect("go");
        // The next command goes through the same thread, so the old response has been handled when it is
        // done.
        b.ready(&[0; 12]);
        b.page.write(0, COMMAND);
        b.write(0x4c, 1);
        b.page.write(0, &[0; 12]);
        b.go.send(Ok(1)).expect("go");
        b.wait();
        assert_eq!(b.response(13), [COMMAND, &[0xee]].concat());
    }

    #[test]
    fn a_command_from_before_a_reset_does_not_run_after_it() {
        let mut b = bench();
        b.ready(COMMAND);
        b.write(0x4c, 1);
        b.taken();
        b.crb.reset();
        // This one waits behind the first, and must never reach the TPM.
        b.ready(&[COMMAND, &[0xbb; 4]].concat());
        b.page.write(2, &16u32.to_be_bytes());
        b.write(0x4c, 1);
        b.crb.reset();
        b.ready(COMMAND);
        b.write(0x4c, 1);
        for extra in [0, 1] {
            b.go.send(Ok(extra)).expect("go");
        }
        b.wait();
        assert_eq!(b.response(13), [COMMAND, &[0xee]].concat());
    }

    #[test]
    fn any_width_at_any_lane() {
        let mut b = bench();
        let bytes: Vec<u8> = (0..4)
            .map(|n| {
                let mut one = [0];
                b.crb.read(0x30 + n, &mut one);
                one[0]
            })
            .collect();
        assert_eq!(bytes, 0x0002_5811u32.to_le_bytes());
        let mut eight = [0; 8];
        b.crb.read(0x58, &mut eight);
        assert_eq!(eight, [0, 0x10, 0, 0, 0, 0x60, 0xd4, 0xfe]);
        b.crb.write(0x08, &[1]);
        assert_eq!(b.read(0x0c), 1);
        b.crb.write(0x09, &[1]);
        b.crb.write(0x0a, &[2, 0]);
        assert_eq!(b.read(0x0c), 1, "other lanes of the register do nothing");
        // The trapped window shows the same buffer.
        b.crb.write(0x80, &[1, 2, 3, 4, 5, 6, 7, 8]);
        assert_eq!(b.response(8), [1, 2, 3, 4, 5, 6, 7, 8]);
        // An access over the last register and over the end of the page.
        b.crb.read(0x7e, &mut eight);
        b.crb.read(0xffc, &mut eight);
        assert_eq!(eight[4..], [0xff; 4]);
        b.crb.write(0xffc, &[9; 8]);
    }
}
