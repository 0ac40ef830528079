// SPDX-License-Identifier: Apache-2.0
//! How one vCPU starts or stops another: an order, and a way to interrupt whatever the other one does.
//!
//! Stands for the kick in `sev_snp_ap_creation` (Linux 6.12). A vCPU that waits is woken through an event descriptor; one that
//! runs is interrupted by the signal that also stops vCPU threads.

#![allow(unsafe_code, reason = "signals a thread by its kernel id")]

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::AtomicI32;
use std::sync::atomic::Ordering;
use std::time::Duration;

use rustix::event::EventfdFlags;
use rustix::event::PollFd;
use rustix::event::PollFlags;
use vmm_sys_util::signal::SIGRTMIN;

/// How often, and how far apart, a vCPU that runs is interrupted before its order is left for its next exit.
const KICKS: u32 = 100;
const KICK_INTERVAL: Duration = Duration::from_micros(200);

/// What a vCPU has to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// Start from the VMSA at this address.
    Run {
        /// Guest-physical address.
        vmsa_gpa: u64,
    },
    /// Stop, and wait for the next order.
    Stop,
}

/// The letter box of one vCPU.
pub struct Wake {
    order: Mutex<Option<Order>>,
    event: OwnedFd,
    /// Kernel id of the thread that runs the vCPU; 0 before it runs.
    thread: AtomicI32,
}

impl Wake {
    /// An empty one.
    pub fn new() -> io::Result<Self> {
        let event = rustix::event::eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?;
        Ok(Wake { order: Mutex::default(), event, thread: AtomicI32::new(0) })
    }

    /// Tells who is to be interrupted.
    pub fn running_on_this_thread(&self) {
        if self.thread.load(Ordering::Relaxed) == 0 {
            self.thread.store(rustix::thread::gettid().as_raw_nonzero().get(), Ordering::Release);
        }
    }

    /// Gives an order; a newer one replaces it.
    pub fn give(&self, order: Order) {
        *self.order.lock().unwrap_or_else(PoisonError::into_inner) = Some(order);
        // The descriptor counts; it can only refuse when it is full, and then it is readable already.
        let _ = rustix::io::write(&self.event, &1u64.to_ne_bytes());
        let thread = self.thread.load(Ordering::Acquire);
        if thread == 0 || thread == rustix::thread::gettid().as_raw_nonzero().get() {
            return;
        }
        // A signal that arrives just before the target enters the guest is lost, so it is sent until the order is taken.
        for _ in 0..KICKS {
            // SAFETY: tgkill with ids of this process; a thread that has ended gives ESRCH.
            unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), thread, SIGRTMIN()) };
            std::thread::sleep(KICK_INTERVAL);
            if !self.pending() {
                return;
            }
        }
    }

    /// Takes the order, if there is one.
    pub fn take(&self) -> Option<Order> {
        let order = self.order.lock().unwrap_or_else(PoisonError::into_inner).take();
        if order.is_some() {
            let _ = rustix::io::read(&self.event, &mut [0; 8]);
        }
        order
    }

    /// Whether there is an order.
    pub fn pending(&self) -> bool {
        self.order.lock().unwrap_or_else(PoisonError::into_inner).is_some()
    }

    /// Waits for an order. A signal ends it with [`io::ErrorKind::Interrupted`].
    pub fn wait(&self) -> io::Result<()> {
        let mut fds = [PollFd::new(&self.event, PollFlags::IN)];
        rustix::event::poll(&mut fds, None)?;
        Ok(())
    }
}
