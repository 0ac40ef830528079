// SPDX-License-Identifier: Apache-2.0
//! The integration tests, one file per subject. A new subject adds its file and its line in [`all`].

pub mod acceptance;
pub mod bad_input;
pub mod boot;
pub mod certs;
pub mod doctor;
pub mod endings;
pub mod firmware;
pub mod given;
pub mod hardware_kit;
pub mod hotplug;
pub mod intel;
pub mod policy_guide;
pub mod strict;
pub mod tamper;
pub mod vtpm;

use crate::suite::Case;

/// Every case, cheap ones first.
pub fn all() -> Vec<Case> {
    [
        bad_input::cases(),
        doctor::cases(),
        boot::cases(),
        certs::cases(),
        endings::cases(),
        hotplug::cases(),
        firmware::cases(),
        hardware_kit::cases(),
        policy_guide::cases(),
        strict::cases(),
        tamper::cases(),
        acceptance::cases(),
        vtpm::cases(),
        intel::cases(),
    ]
    .into_iter()
    .flatten()
    .collect()
}
