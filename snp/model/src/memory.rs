// SPDX-License-Identifier: Apache-2.0
//! How the model reaches guest memory: copies in and out, through one of the two views of a page.
//!
//! The model never keeps a reference into guest memory, because the guest writes to it meanwhile. It uses the
//! shared view for everything that a guest hands to its hypervisor, and asks [`crate::rmp::PageStates`]
//! first, because in strict runs the wrong view of a page is not accessible.

/// Which of a page's two contents.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum View {
    /// What hypervisor and guest both see (C-bit clear).
    Shared,
    /// What only the guest sees (C-bit set).
    Private,
}

/// An access that does not lie in guest RAM as a whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{len:#x} bytes at guest-physical address {gpa:#x} are not all in guest RAM")]
pub struct OutsideRam {
    /// Start of the access.
    pub gpa: u64,
    /// Its length in bytes.
    pub len: u64,
}

/// Guest memory, as the emulated platform implements it. Addresses are without the C-bit.
pub trait GuestMemory {
    /// Fills `buf` from `gpa` on; all or nothing.
    fn read(&self, gpa: u64, view: View, buf: &mut [u8]) -> Result<(), OutsideRam>;
    /// Writes all of `bytes` from `gpa` on; all or nothing.
    fn write(&self, gpa: u64, view: View, bytes: &[u8]) -> Result<(), OutsideRam>;
}

#[cfg(test)]
pub(crate) mod testing {
    //! A guest memory of two buffers, for tests.

    use std::ops::Range;
    use std::sync::Mutex;
    use std::sync::atomic::AtomicU64;
    use std::sync::atomic::Ordering::Relaxed;

    use super::*;

    /// RAM from address 0 on, with separate shared and private contents.
    pub struct TestMemory {
        views: Mutex<[Vec<u8>; 2]>,
        wrong: AtomicU64,
    }

    impl TestMemory {
        pub fn new(len: usize) -> Self {
            TestMemory { views: Mutex::new([vec![0; len], vec![0; len]]), wrong: AtomicU64::new(0) }
        }

        pub fn bytes<const N: usize>(&self, gpa: u64, view: View) -> [u8; N] {
            let mut out = [0; N];
            self.read(gpa, view, &mut out).unwrap();
            out
        }

        /// Accesses that failed, or that took the private view.
        pub fn wrong_accesses(&self) -> u64 {
            self.wrong.load(Relaxed)
        }

        fn check(&self, len: usize, gpa: u64, want: usize, view: View) -> Result<Range<usize>, OutsideRam> {
            let window = window(len, gpa, want);
            self.wrong.fetch_add(u64::from(window.is_err() || view == View::Private), Relaxed);
            window
        }

        pub fn u64(&self, gpa: u64, view: View) -> u64 {
            u64::from_le_bytes(self.bytes(gpa, view))
        }
    }

    fn window(len: usize, gpa: u64, want: usize) -> Result<Range<usize>, OutsideRam> {
        let error = OutsideRam { gpa, len: want as u64 };
        let start = usize::try_from(gpa).map_err(|_| error)?;
        let end = start.checked_add(want).filter(|end| *end <= len).ok_or(error)?;
        Ok(start..end)
    }

    impl GuestMemory for TestMemory {
        fn read(&self, gpa: u64, view: View, buf: &mut [u8]) -> Result<(), OutsideRam> {
            let views = self.views.lock().unwrap();
            let bytes = &views[view as usize];
            buf.copy_from_slice(&bytes[self.check(bytes.len(), gpa, buf.len(), view)?]);
            Ok(())
        }

        fn write(&self, gpa: u64, view: View, bytes: &[u8]) -> Result<(), OutsideRam> {
            let mut views = self.views.lock().unwrap();
            let target = &mut views[view as usize];
            let window = self.check(target.len(), gpa, bytes.len(), view)?;
            target[window].copy_from_slice(bytes);
            Ok(())
        }
    }
}
