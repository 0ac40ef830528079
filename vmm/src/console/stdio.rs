// SPDX-License-Identifier: Apache-2.0
//! The guest's console on this process's standard streams, over all VMs of the guest.

use std::io;
use std::io::Write;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::Duration;
use std::time::Instant;

use devices::serial::Serial;

use super::terminal;
use super::terminal::Typed;
use crate::lock::lock;
use crate::threads::ThreadError;
use crate::threads::spawn;

/// How long typed bytes wait for a guest that has no room for them.
const INPUT_PAUSE: Duration = Duration::from_millis(2);

/// Standard input, connected to the serial port of whatever VM there is.
#[derive(Clone, Default)]
pub(crate) struct Keyboard(Arc<Mutex<Option<Arc<Mutex<Serial>>>>>);

impl Keyboard {
    pub(crate) fn connect(&self, serial: Option<Arc<Mutex<Serial>>>) {
        *lock(&self.0) = serial;
    }

    /// Offers bytes to the guest; returns how many it took, none between two VMs.
    fn offer(&self, bytes: &[u8]) -> usize {
        let serial = lock(&self.0).clone();
        serial.map_or(0, |s| lock(&s).receive(bytes))
    }

    /// Reads standard input in a thread, until its end; `quit` is called when the user asks for the end of
    /// the run.
    pub(crate) fn listen(&self, terminal: bool, quit: impl Fn() + Send + 'static) -> Result<(), ThreadError> {
        let keyboard = self.clone();
        spawn("input".into(), move || {
            terminal::read_input(terminal, |typed| match typed {
                Typed::Quit => {
                    quit();
                    false
                }
                Typed::Bytes(bytes) => {
                    let mut rest = bytes.as_slice();
                    while !rest.is_empty() {
                        let taken = keyboard.offer(rest);
                        rest = rest.get(taken..).unwrap_or_default();
                        if taken == 0 {
                            // The guest's FIFO is full, or there is no guest: wait for it to read.
                            thread::sleep(INPUT_PAUSE);
                        }
                    }
                    true
                }
            });
        })?;
        Ok(())
    }
}

/// How long the guest waits for a console that has no room before it goes on and what it writes is lost.
const CONSOLE_PATIENCE: Duration = Duration::from_secs(10);
const CONSOLE_PAUSE: Duration = Duration::from_millis(5);

/// The console's output, handed to the serial port of each VM in turn.
#[derive(Clone)]
pub(crate) struct SharedConsole {
    out: Arc<Mutex<Box<dyn Write + Send>>>,
    /// The VM is over: nothing is waited for.
    over: Arc<AtomicBool>,
    /// Nobody made room in time, and nobody has since.
    stalled: bool,
}

impl SharedConsole {
    pub(crate) fn new(out: &Arc<Mutex<Box<dyn Write + Send>>>) -> Self {
        SharedConsole { out: Arc::clone(out), over: Arc::default(), stalled: false }
    }

    pub(crate) fn end(&self) {
        self.over.store(true, Ordering::Release);
    }
}

impl Write for SharedConsole {
    /// Waits for room where the output does not do so by itself: somebody else may have made it non-blocking.
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        let mut out = lock(&self.out);
        let begun = Instant::now();
        loop {
            let result = out.write(buf);
            let kind = result.as_ref().err().map(io::Error::kind);
            let going_on = !self.over.load(Ordering::Acquire);
            match kind {
                // A vCPU is interrupted for other reasons too.
                Some(io::ErrorKind::Interrupted) if going_on => {}
                Some(io::ErrorKind::WouldBlock) if going_on && !self.stalled => {
                    self.stalled = begun.elapsed() >= CONSOLE_PATIENCE;
                    thread::sleep(CONSOLE_PAUSE);
                }
                _ => {
                    self.stalled &= result.is_err();
                    return result;
                }
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        lock(&self.out).flush()
    }
}

/// The guest's console output: standard output, each byte at once.
pub struct Console;

impl Write for Console {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        Ok(rustix::io::write(rustix::stdio::stdout(), buf)?)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An output with room for a byte at each third attempt, or never again.
    struct Tight {
        attempts: u32,
        gone: bool,
        got: Arc<Mutex<Vec<u8>>>,
    }

    impl Write for Tight {
        fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
            self.attempts += 1;
            match self.attempts % 3 {
                _ if self.gone => Err(io::ErrorKind::WouldBlock.into()),
                0 => {
                    self.got.lock().unwrap().push(buf[0]);
                    Ok(1)
                }
                1 => Err(io::ErrorKind::WouldBlock.into()),
                _ => Err(io::ErrorKind::Interrupted.into()),
            }
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn no_byte_is_lost_while_the_output_has_no_room_for_a_moment() {
        let got = Arc::new(Mutex::new(Vec::new()));
        let tight = Tight { attempts: 0, gone: false, got: Arc::clone(&got) };
        let out: Arc<Mutex<Box<dyn Write + Send>>> = Arc::new(Mutex::new(Box::new(tight)));
        let mut console = SharedConsole::new(&out);
        console.write_all(b"every byte").unwrap();
        assert_eq!(*got.lock().unwrap(), b"every byte");
    }

    #[test]
    fn an_output_without_a_reader_holds_no_vcpu_of_a_guest_that_is_over() {
        let tight = Tight { attempts: 0, gone: true, got: Arc::default() };
        let out: Arc<Mutex<Box<dyn Write + Send>>> = Arc::new(Mutex::new(Box::new(tight)));
        let mut console = SharedConsole::new(&out);
        let ender = console.clone();
        let begun = Instant::now();
        let waiting = thread::spawn(move || console.write(b"x").is_err());
        thread::sleep(Duration::from_millis(100));
        assert!(!waiting.is_finished(), "it waits for a reader");
        ender.end();
        assert!(waiting.join().unwrap());
        assert!(begun.elapsed() < CONSOLE_PATIENCE);
    }
}
