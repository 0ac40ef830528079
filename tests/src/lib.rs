// SPDX-License-Identifier: Apache-2.0
//! Integration tests of cvmm, and the harness that gives them a machine to run on.
//!
//! A [`machine::Machine`] runs commands with a time limit: this host if its KVM can run Linux, else a nested
//! KVM under QEMU's software emulation ([`nested`]). [`probe`] decides which. Guest kernels come from
//! [`kernels`], their user space from [`initrd`]; [`workspace`] knows where everything lies.

pub mod cases;
pub mod cpio;
pub mod digest;
pub mod evidence;
pub mod guest;
pub mod igvm_guest;
pub mod initrd;
pub mod kernels;
pub mod machine;
pub mod modules;
pub mod nested;
pub mod probe;
pub mod progress;
pub mod snp_kernel;
pub mod statistics;
pub mod suite;
pub mod tiny;
pub mod tpm;
pub mod workspace;
