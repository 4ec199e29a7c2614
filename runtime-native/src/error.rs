//! Everything that can go wrong between a model file and its pictures.

use std::path::PathBuf;

use crate::Provider;

/// Result with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a model could not be opened or run.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The file cannot be read.
    #[error("cannot read `{path}`")]
    Read {
        /// The file asked for.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The file is not a model this crate can run.
    #[error("cannot use {name}: {problem}")]
    File {
        /// The file as messages call it.
        name: String,
        /// What is wrong, got then expected.
        problem: String,
    },
    /// The provider asked for cannot be had.
    #[error("provider `{provider}` is not available: {reason}\n\nhint: {remedy}")]
    Provider {
        /// The provider asked for.
        provider: Provider,
        /// What is missing.
        reason: String,
        /// What to do about it.
        remedy: String,
    },
    /// A request that the model cannot meet.
    #[error("{0}")]
    Request(String),
    /// Class, step count or card, as core judges them.
    #[error(transparent)]
    Core(#[from] dmd_core::Error),
    /// The engine refused the model or failed while running it.
    #[error("{engine} cannot run {name}: {message}")]
    Engine {
        /// `dmd-engine`, `tract` or `onnxruntime`.
        engine: &'static str,
        /// The file as messages call it.
        name: String,
        /// The engine's own words.
        message: String,
    },
}
