//! Everything that can go wrong between a checkpoint and an ONNX file.

use std::path::{Path, PathBuf};

/// Result with export's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

/// A checkpoint that cannot be exported, or a graph that came out wrong.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The network description and what it was given do not fit.
    #[error(transparent)]
    Core(#[from] dmd_core::Error),
    /// A file of the checkpoint is missing or damaged.
    #[error("cannot read `{path}`: {problem}")]
    File {
        /// The file or directory.
        path: PathBuf,
        /// What is wrong, and what to do about it.
        problem: String,
    },
    /// The checkpoint is not of the kind that was asked for.
    #[error("{0}")]
    Request(String),
    /// An array has another number of elements or rows than its use needs.
    #[error("{0}")]
    Array(String),
    /// The graph breaks a rule that every exported file keeps: a bug of the exporter.
    #[error("the exported graph is wrong: {0}")]
    Verify(String),
}

impl Error {
    pub(crate) fn file(path: &Path, problem: impl Into<String>) -> Self {
        Self::File { path: path.to_owned(), problem: problem.into() }
    }
}
