// SPDX-License-Identifier: Apache-2.0
//! Where PCI will be: windows in the device gap that nothing else is placed into.
//!
//! There is no PCI bus yet. Addresses are chosen now because they enter the measured tables once there is
//! one. There is no window above 4 GiB: it would have to lie below the C-bit, whose position the launch
//! digest must not depend on.

use std::ops::Range;

/// Memory of the devices, which base address registers point into.
pub const BARS: Range<u64> = 0xc000_0000..0xe000_0000;
/// Configuration space of bus 0, 4 KiB for each of its 256 functions. Up to 0xf000_0000 is kept free behind
/// it.
pub const ECAM: Range<u64> = 0xe000_0000..0xe010_0000;
