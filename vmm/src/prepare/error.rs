// SPDX-License-Identifier: Apache-2.0
//! Why a boot cannot be put together, and the files that it is put together from.

use std::path::Path;
use std::path::PathBuf;

use snp::plan::Bytes;

use crate::events::Events;
use crate::files::read_file;
use crate::spec::SpecError;

/// Why there is no guest.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the messages say what the fields are")]
pub enum PrepareError {
    /// A field of the request.
    #[error(transparent)]
    Spec(#[from] SpecError),
    /// A file that a field names.
    #[error("{field} {}: {problem}", path.display())]
    File { field: &'static str, path: PathBuf, problem: String },
    /// Something else about the request: parts that do not go together.
    #[error("{0}")]
    Request(String),
    /// The host, or the monitor.
    #[error("{0}")]
    Host(String),
}

impl PrepareError {
    pub(super) fn request(error: impl std::fmt::Display) -> Self {
        PrepareError::Request(error.to_string())
    }

    pub(super) fn host(error: impl std::fmt::Display) -> Self {
        PrepareError::Host(error.to_string())
    }

    /// From an error about the file that `field` names.
    pub fn file<E: std::fmt::Display>(field: &'static str, path: &Path) -> impl Fn(E) -> Self {
        move |error| PrepareError::File { field, path: path.to_owned(), problem: error.to_string() }
    }
}

/// The bytes of a file that a field names. They are ours: a mapping would end the process when somebody cuts
/// the file short, and what is launched would be what the file holds then.
pub fn read(field: &'static str, path: &Path, events: &Events) -> Result<Bytes, PrepareError> {
    read_file(path, events).map(Bytes::from).map_err(PrepareError::file(field, path))
}
