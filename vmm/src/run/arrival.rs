// SPDX-License-Identifier: Apache-2.0
//! What the main thread is told.

use super::error::RunError;
use super::outcome::Outcome;

/// What the main thread is told.
pub(crate) enum Arrival {
    /// A vCPU says how the guest ended.
    Ended {
        /// In which life: several vCPUs may say so, and only the first is heard.
        life: u32,
        /// How.
        result: Result<Outcome, RunError>,
    },
    /// The process was told to stop.
    Signal(i32),
    /// Work that is attended to is done.
    Done,
}
