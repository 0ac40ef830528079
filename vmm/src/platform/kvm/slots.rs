// SPDX-License-Identifier: Apache-2.0
//! What the kernel's memory slots refer to.

use std::sync::Arc;
use std::sync::Mutex;

use crate::platform::memory::MemorySlot;

/// Kept alive as long as the VM and its vCPUs.
pub(super) type Slots = Arc<Mutex<Vec<MemorySlot>>>;
