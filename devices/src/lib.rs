// SPDX-License-Identifier: Apache-2.0
//! Devices of the machine, with no KVM type in sight.
