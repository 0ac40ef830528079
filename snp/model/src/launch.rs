// SPDX-License-Identifier: Apache-2.0
//! How far the launch of a guest is.

use crate::firmware::context::GuestContext;

/// How far the launch of a guest is.
#[derive(Debug, Default)]
pub(crate) enum Launch {
    /// The VM exists.
    #[default]
    Created,
    /// After INIT2: an SNP guest by KVM's `sev_snp_guest`.
    Initialised,
    /// After START. `sealed` after a FINISH that failed: its VMSAs are with the firmware already.
    Launching { context: Box<GuestContext>, sealed: bool },
    /// After FINISH.
    Running(Box<GuestContext>),
}
