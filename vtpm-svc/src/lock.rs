// SPDX-License-Identifier: Apache-2.0
//! Locks of the service. None guards a state that a panic can leave half changed, so a lock that a panicking
//! thread held is as good as any.

use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::PoisonError;

/// Locks `mutex`, whatever became of who held it before.
pub(crate) fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
