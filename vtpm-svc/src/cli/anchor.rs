// SPDX-License-Identifier: Apache-2.0
//! Options about an image's history, which the service and every command on an image share: where it is kept,
//! and what an operator accepts that it speaks against.

use std::path::PathBuf;

use crate::vmgs::Accept;
use crate::vmgs::AnchorFolder;
use crate::vmgs::anchor::Durability;

/// Where an image's history is kept; shared by every command that looks at an image.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct HistoryArgs {
    /// Folder outside of the image that remembers which copy is the newest, and who did what to it [default:
    /// /var/lib/cvmm/anchors, or $XDG_STATE_HOME/cvmm/anchors for users]
    #[arg(long, value_name = "DIR")]
    pub anchor: Option<PathBuf>,
    /// Why this is done; noted with the event in the anchor folder
    #[arg(long, value_name = "TEXT")]
    pub reason: Option<String>,
}

impl HistoryArgs {
    /// The folder.
    pub fn path(&self) -> PathBuf {
        self.anchor.clone().unwrap_or_else(|| default_folder("anchors"))
    }

    /// The anchor folder, for who only looks.
    pub fn folder(&self) -> AnchorFolder {
        AnchorFolder { path: self.path(), durability: Default::default() }
    }
}

/// Options about rollback and clones; shared by every command that opens an image.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct AnchorArgs {
    /// Where the history is kept
    #[command(flatten)]
    pub history: HistoryArgs,
    /// Make the anchor durable at each write; two more flushes per write, exact even after a power loss
    #[arg(long)]
    pub anchor_strict: bool,
    /// Accept an image that is older than the anchor says, or unknown to it; what was written since is lost.
    /// Logged
    #[arg(long)]
    pub accept_rollback: bool,
    /// Accept files that another tool wrote, removed or left in plain text, and write the whole image anew.
    /// Logged. Together with --accept-rollback also an image whose integrity root is lost
    #[arg(long)]
    pub adopt: bool,
}

impl AnchorArgs {
    /// The anchor folder.
    pub fn folder(&self) -> AnchorFolder {
        let path = self.history.path();
        let durability = if self.anchor_strict { Durability::Strict } else { Durability::Leased };
        AnchorFolder { path, durability }
    }

    /// What the operator accepts.
    pub fn accept(&self) -> Accept {
        Accept { rollback: self.accept_rollback, foreign: self.adopt, ..Default::default() }
    }
}

/// A folder of this project's state: the system's for root, the user's otherwise.
fn default_folder(name: &str) -> PathBuf {
    let user = || {
        let home = std::env::var_os("HOME").map(|h| PathBuf::from(h).join(".local/state"));
        std::env::var_os("XDG_STATE_HOME").map(PathBuf::from).or(home)
    };
    let base = if rustix::process::geteuid().is_root() { None } else { user() };
    base.unwrap_or_else(|| PathBuf::from("/var/lib")).join("cvmm").join(name)
}
