// SPDX-License-Identifier: Apache-2.0
//! Threads of the monitor: named, with small stacks.

use std::io;
use std::thread;
use std::thread::JoinHandle;

/// The host gives no thread.
#[derive(Debug, thiserror::Error)]
#[error("cannot start a thread: {0}")]
pub struct ThreadError(pub io::Error);

/// Starts a thread of the monitor.
pub(crate) fn spawn(
    name: String,
    body: impl FnOnce() + Send + 'static,
) -> Result<JoinHandle<()>, ThreadError> {
    thread::Builder::new().name(name).stack_size(256 << 10).spawn(body).map_err(ThreadError)
}
