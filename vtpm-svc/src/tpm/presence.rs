// SPDX-License-Identifier: Apache-2.0
//! What the platform does to the TPM on behalf of someone who is "physically present", between power-on and
//! the guest.
//!
//! TCG Physical Presence Interface 1.30, TPM 2.0 operations; TPM 2.0 Library, part 3, for the commands. The
//! platform hierarchy is open at that moment and its authorisation empty, which is why the guest itself
//! cannot do the same later.

use crate::tpm::commands;
use crate::tpm::commands::CommandError;
use crate::tpm::commands::Transport;
use crate::tpm::commands::alg;
use crate::tpm::manufacture;
use crate::vmgs::records::Operation;

/// Does one operation on a TPM that has been started with `TPM2_Startup(CLEAR)`.
pub fn apply(tpm: &mut dyn Transport, operation: Operation) -> Result<(), CommandError> {
    match operation {
        Operation::None => Ok(()),
        Operation::Clear => {
            commands::clear(tpm)?;
            // Clearing removes the persistent keys that this host certified. They come from the endorsement
            // seed, which stays, so making them again gives the same keys, and their certificates stay true.
            manufacture::restore_keys(tpm)
        }
        Operation::SetPcrBanks(banks) => {
            let chosen = [(banks.sha256, alg::SHA256), (banks.sha384, alg::SHA384)];
            let list: Vec<u16> = chosen.iter().filter(|(on, _)| *on).map(|(_, bank)| *bank).collect();
            commands::pcr_allocate(tpm, &list)
        }
    }
}
