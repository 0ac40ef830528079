// SPDX-License-Identifier: Apache-2.0
//! The bytes of a plan: owned from the moment on that they are measured, and never copied for it.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

/// Bytes shared between records without copying: a window of a buffer.
#[derive(Clone)]
pub struct Bytes {
    buffer: Arc<Vec<u8>>,
    window: Range<usize>,
}

impl Bytes {
    /// The window `window` of `buffer`; `None` if it does not lie inside.
    pub fn window(buffer: &Arc<Vec<u8>>, window: Range<usize>) -> Option<Self> {
        buffer.get(window.clone())?;
        Some(Bytes { buffer: Arc::clone(buffer), window })
    }

    /// The window `window` of these bytes; `None` if it does not lie inside.
    pub fn sub(&self, window: Range<usize>) -> Option<Self> {
        self.as_slice().get(window.clone())?;
        let start = self.window.start;
        Some(Bytes { buffer: Arc::clone(&self.buffer), window: start + window.start..start + window.end })
    }

    /// Takes in `next` if it follows these bytes in the same buffer, or if both are empty; says whether it
    /// did.
    pub fn join(&mut self, next: &Bytes) -> bool {
        let same = Arc::ptr_eq(&self.buffer, &next.buffer);
        if self.window.is_empty() && next.window.is_empty() {
            return true;
        }
        let follows = same && !next.window.is_empty() && self.window.end == next.window.start;
        if follows && !self.window.is_empty() {
            self.window.end = next.window.end;
            return true;
        }
        false
    }

    /// The bytes.
    pub fn as_slice(&self) -> &[u8] {
        self.buffer.get(self.window.clone()).unwrap_or_default()
    }
}

impl From<Vec<u8>> for Bytes {
    fn from(buffer: Vec<u8>) -> Self {
        let window = 0..buffer.len();
        Bytes { buffer: Arc::new(buffer), window }
    }
}

impl fmt::Debug for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Bytes({} bytes)", self.window.len())
    }
}
