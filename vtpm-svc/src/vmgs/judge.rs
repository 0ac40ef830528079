// SPDX-License-Identifier: Apache-2.0
//! Whether an image is the newest one: the anchor is asked, an operator may overrule it, and every other copy
//! is burnt.
//!
//! What is judged is the root as it stands in the image, before anything of it is adopted: a tool that does
//! not keep the root leaves it as it was, so adopting its files says nothing about the image's age.

use super::anchor::Anchor;
use super::anchor::Facts;
use super::anchor::Known;
use super::error::VmgsError;
use super::findings::Accept;
use super::findings::Finding;
use super::findings::decide;
use super::root::FLAG_PROVISIONED;
use super::view::RootState;
use super::view::View;

/// Accepts the image, or refuses it. Gives the generation that the next one has to be above.
pub(super) fn judge(anchor: &mut dyn Anchor, view: &mut View, accept: &Accept) -> Result<u64, VmgsError> {
    let encrypted = view.layout.header.encrypted;
    let known = anchor.known();
    let highest = match &known {
        Known::Record(e) => {
            // Whatever an older copy says: an image that had a TPM never gets a new one.
            if e.facts.provisioned {
                view.root.flags |= FLAG_PROVISIONED;
            }
            e.highest
        }
        _ => 0,
    };
    let mark = match view.state {
        RootState::Proven(mark) => mark,
        // Nothing of it is on disk yet that could be confirmed: the first commit does that.
        RootState::Lost if matches!(&known, Known::Record(e) if e.facts.sealed && !encrypted) => {
            return Err(VmgsError::Stripped);
        }
        RootState::Lost => return Ok(highest),
        RootState::Never if known == Known::Nothing => return Ok(highest),
        RootState::Never => {
            // The anchor remembers what the image does not: it had a root.
            view.state = RootState::Lost;
            let why = format!("the anchor {} knows this image", anchor.place());
            view.findings.retain(|f| *f != Finding::NeverRooted);
            view.findings.push(Finding::RootLost(why));
            decide(&view.findings, accept)?;
            return judge(anchor, view, accept);
        }
    };
    match known {
        Known::Record(e) if e.accepts(&mark, &view.root.previous) && (encrypted || !e.facts.sealed) => {
            anchor.confirm(mark, facts(view))?;
            return Ok(highest);
        }
        Known::Record(e) if e.facts.sealed && !encrypted => return Err(VmgsError::Stripped),
        Known::Record(e) if !accept.rollback => {
            let (have, want, folder) = (mark.generation, e.in_words(), anchor.place());
            return Err(if have > highest {
                VmgsError::AheadOfAnchor { have, want, folder }
            } else {
                VmgsError::StaleGeneration { have, want, folder }
            });
        }
        Known::Record(e) => {
            let want = e.in_words();
            view.findings.push(Finding::RollbackAccepted { have: mark.generation, want });
        }
        Known::Nothing | Known::Damaged if !accept.rollback => return Err(anchor.refusal().into()),
        Known::Nothing | Known::Damaged => {
            let want = match known {
                Known::Damaged => "something that its damaged record no longer tells",
                _ => "nothing, as it has no record",
            };
            view.findings.push(Finding::RollbackAccepted { have: mark.generation, want: want.to_owned() });
        }
    }
    anchor.confirm(mark, facts(view))?;
    Ok(highest)
}

fn facts(view: &View) -> Facts {
    Facts { sealed: view.layout.header.encrypted, provisioned: view.root.flags & FLAG_PROVISIONED != 0 }
}
