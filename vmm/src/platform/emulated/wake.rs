// SPDX-License-Identifier: Apache-2.0
//! How one vCPU starts or stops another: an order, and a way to interrupt whatever the other one does.
//!
//! Stands for the kick in `sev_snp_ap_creation` (Linux 6.12). A vCPU that waits is woken through an event
//! descriptor; one that runs is interrupted by the signal that also stops vCPU threads. One signal is enough:
//! it keeps the vCPU from entering the guest even if it arrives just before
//! ([`crate::platform::kvm::interrupt`]).
//!
//! The descriptor is readable exactly while there is an order: both change under one lock. A descriptor that
//! stayed readable would make a vCPU that waits spin.

#![allow(unsafe_code, reason = "signals a thread by its kernel id")]

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::atomic::AtomicI32;
use std::sync::atomic::Ordering;

use rustix::event::EventfdFlags;
use rustix::event::PollFd;
use rustix::event::PollFlags;
use vmm_sys_util::signal::SIGRTMIN;

use crate::lock::lock;

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

    fn order(&self) -> MutexGuard<'_, Option<Order>> {
        lock(&self.order)
    }

    /// Keeps the letter box shut, as a vCPU does that is just taking an order.
    #[cfg(test)]
    pub(super) fn shut(&self) -> MutexGuard<'_, Option<Order>> {
        self.order()
    }

    /// Gives an order; a newer one replaces it.
    pub fn give(&self, order: Order) {
        {
            let mut place = self.order();
            if place.replace(order).is_none() {
                // The count is 0 before, so there is room.
                let _ = rustix::io::write(&self.event, &1u64.to_ne_bytes());
            }
        }
        let thread = self.thread.load(Ordering::Acquire);
        if thread == 0 || thread == rustix::thread::gettid().as_raw_nonzero().get() {
            return;
        }
        // SAFETY: tgkill with ids of this process; a thread that has ended gives ESRCH.
        unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), thread, SIGRTMIN()) };
    }

    /// Takes the order, if there is one.
    pub fn take(&self) -> Option<Order> {
        let mut place = self.order();
        let order = place.take();
        if order.is_some() {
            let _ = rustix::io::read(&self.event, &mut [0; 8]);
        }
        order
    }

    /// Whether there is an order.
    pub fn pending(&self) -> bool {
        self.order().is_some()
    }

    /// Waits for an order. A signal ends it with [`io::ErrorKind::Interrupted`].
    pub fn wait(&self) -> io::Result<()> {
        let mut fds = [PollFd::new(&self.event, PollFlags::IN)];
        rustix::event::poll(&mut fds, None)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU32;

    use super::*;

    const ORDERS: u32 = 4_000;

    fn readable(wake: &Wake) -> bool {
        let now = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
        rustix::event::poll(&mut [PollFd::new(&wake.event, PollFlags::IN)], Some(&now)).unwrap() == 1
    }

    /// An order that is given while the target takes it must not leave the descriptor readable: the target
    /// would never wait again.
    #[test]
    fn the_descriptor_is_readable_only_while_there_is_an_order() {
        let wake = Wake::new().unwrap();
        let (wanted, given) = (AtomicU32::new(0), AtomicU32::new(0));
        let mut stale = 0;
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for order in 1..=ORDERS {
                    while wanted.load(Ordering::Acquire) < order {
                        std::thread::yield_now();
                    }
                    wake.give(Order::Stop);
                    given.store(order, Ordering::Release);
                }
            });
            for order in 1..=ORDERS {
                wanted.store(order, Ordering::Release);
                while wake.take().is_none() {}
                while given.load(Ordering::Acquire) < order {
                    std::thread::yield_now();
                }
                stale += u32::from(readable(&wake));
                let _ = rustix::io::read(&wake.event, &mut [0; 8]);
            }
        });
        assert_eq!(stale, 0, "orders that left it readable, of {ORDERS}");
        wake.give(Order::Stop);
        assert!(readable(&wake));
    }
}
