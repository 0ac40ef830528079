// SPDX-License-Identifier: Apache-2.0
//! A program that gives the key: the way to a key store or a broker that this service knows nothing about.
//!
//! It gets one JSON object on standard input (`image`, `purpose`, and `vm` if the caller knows for which VM)
//! and prints the key (32 bytes or 64 hexadecimal digits) on standard output. `image` is what the file says
//! of itself, which nothing proves; `vm` is what the caller expects, and a hook that can should decide by it.
//! A non-zero exit is a refusal, and the first line of its standard error is the reason that the operator
//! sees. It runs before the service gives up its rights, with nothing of the environment but `PATH`.
//!
//! Both of its outputs are read at once, to a limit, and it has a time limit. When the limit is reached, or
//! when whoever asks ends in the meantime, for whatever reason, the hook and what it has started end too
//! ([`process::spawn_dependent`]): it has a process group of its own for that, so it is not in the foreground
//! of a terminal and cannot ask there.

use std::io::Write;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::process::Command;
use std::process::ExitStatus;
use std::process::Stdio;
use std::time::Duration;
use std::time::Instant;

use rustix::event::PollFd;
use rustix::event::PollFlags;
use rustix::event::Timespec;
use zeroize::Zeroizing;

use super::KeyError;
use super::KeyProvider;
use super::KeyRequest;
use crate::process;
use crate::process::Dependent;
use crate::vmgs::Key;
use crate::vmgs::mark::uuid_text;

/// What is kept of each output.
const MOST: usize = 4096;
/// How long a hook may take: a person may have to confirm somewhere.
const LIMIT: Duration = Duration::from_secs(120);
/// When the wait is told of.
const TELL: Duration = Duration::from_secs(2);
/// How long to sleep at most before the hook's end is noticed.
const PAUSE: Timespec = Timespec { tv_sec: 0, tv_nsec: 20_000_000 };

/// An executable.
pub struct Hook {
    /// The program.
    pub program: PathBuf,
    /// How long it may take.
    pub limit: Duration,
}

impl Hook {
    /// A hook with the usual time limit.
    pub fn new(program: PathBuf) -> Self {
        Self { program, limit: LIMIT }
    }

    /// Hears the hook to its end, tells of it when that takes long, and stops it when it takes too long.
    /// There is no thread in this, because none may be left when the service closes its cage.
    fn hear(&self, hook: &mut Dependent) -> Result<(ExitStatus, Heard, Heard), KeyError> {
        let io = |source| KeyError::Io { path: self.program.clone(), source };
        let child = hook.child();
        let mut answer = Heard::of(child.stdout.take()).map_err(io)?;
        let mut reason = Heard::of(child.stderr.take()).map_err(io)?;
        let began = Instant::now();
        let mut told = false;
        loop {
            // The end is seen before the last words are read, so that none of them is missed. A child that
            // the hook leaves behind may hold the pipes open; nobody waits for it.
            let status = hook.child().try_wait().map_err(io)?;
            answer.read_what_is_there().map_err(io)?;
            reason.read_what_is_there().map_err(io)?;
            if answer.full() {
                // No key is that long. The hook notices that nobody listens.
                answer.pipe = None;
            }
            if let Some(status) = status {
                return Ok((status, answer, reason));
            }
            if began.elapsed() >= self.limit {
                hook.kill();
                return Err(KeyError::HookSilent {
                    program: self.program.clone(),
                    seconds: self.limit.as_secs(),
                });
            }
            if !told && began.elapsed() >= TELL {
                told = true;
                crate::log::info(&format!("waiting for the key hook {}", self.program.display()));
            }
            let pipes = [&answer.pipe, &reason.pipe];
            let mut polled: Vec<PollFd<'_>> =
                pipes.into_iter().flatten().map(|p| PollFd::new(p, PollFlags::IN)).collect();
            match rustix::event::poll(&mut polled, Some(&PAUSE)) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(e) => return Err(io(e.into())),
            }
        }
    }
}

/// One of the hook's outputs, and the beginning of what it said there.
struct Heard {
    pipe: Option<OwnedFd>,
    kept: Zeroizing<Vec<u8>>,
}

impl Heard {
    fn of(pipe: Option<impl Into<OwnedFd>>) -> std::io::Result<Self> {
        let pipe = pipe.map(Into::into);
        if let Some(pipe) = &pipe {
            rustix::io::ioctl_fionbio(pipe, true)?;
        }
        // One allocation that never grows, so that no copy of the secret is left behind.
        Ok(Self { pipe, kept: Zeroizing::new(Vec::with_capacity(MOST)) })
    }

    fn full(&self) -> bool {
        self.kept.len() == MOST
    }

    fn read_what_is_there(&mut self) -> std::io::Result<()> {
        let mut buffer = Zeroizing::new([0; 512]);
        while let Some(pipe) = &self.pipe {
            match rustix::io::read(pipe, &mut buffer[..]) {
                Ok(0) => self.pipe = None,
                Ok(n) => {
                    let room = MOST - self.kept.len();
                    self.kept.extend_from_slice(&buffer[..n.min(room)]);
                    if self.full() {
                        // What comes fast for ever must not keep the caller here.
                        return Ok(());
                    }
                }
                Err(rustix::io::Errno::AGAIN) => return Ok(()),
                Err(rustix::io::Errno::INTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
        Ok(())
    }
}

impl KeyProvider for Hook {
    fn describe(&self) -> String {
        format!("key hook {}", self.program.display())
    }

    fn tells_of_its_wait(&self) -> bool {
        true
    }

    fn obtain(&self, request: &KeyRequest<'_>) -> Result<Key, KeyError> {
        let io = |source| KeyError::Io { path: self.program.clone(), source };
        super::file::check_program(&self.program)?;
        let mut command = Command::new(&self.program);
        command
            .env_clear()
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut hook = process::spawn_dependent(&mut command).map_err(io)?;
        let question = serde_json::json!({
            "image": request.image_text(),
            "vm": request.vm.as_ref().map(uuid_text),
            "purpose": request.purpose.word(),
        });
        if let Some(mut stdin) = hook.child().stdin.take() {
            // A hook that does not read its input is not at fault; the question fits into the pipe.
            let _ = stdin.write_all(format!("{question}\n").as_bytes());
        }
        let (status, answer, reason) = self.hear(&mut hook)?;
        if !status.success() {
            let line = String::from_utf8_lossy(&reason.kept).lines().next().unwrap_or_default().to_owned();
            let clean: String = line.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
            return Err(KeyError::Hook {
                program: self.program.clone(),
                status: status.to_string(),
                message: if clean.is_empty() { "no reason given".into() } else { clean },
            });
        }
        super::decode(format!("from hook {}", self.program.display()), &answer.kept)
    }
}
