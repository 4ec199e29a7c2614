//! Everything that can go wrong in distillation, with what to do about it.

use std::path::{Path, PathBuf};

/// Result with this crate's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

/// A failure of distillation; messages name the file or the option and, where there is one, the next step.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A network could not run.
    #[error(transparent)]
    Network(#[from] crate::ops::Error),
    /// candle failed.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
    /// A description does not hold together.
    #[error(transparent)]
    Core(#[from] dmd_core::Error),
    /// A file cannot be read or written.
    #[error("cannot {action} `{path}`: {source}")]
    File {
        /// `read`, `write`, ….
        action: &'static str,
        /// Which file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A file can be read, but not understood.
    #[error("cannot use `{path}`: {problem}")]
    Content {
        /// Which file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// What was asked for cannot be had.
    #[error("{0}")]
    Request(String),
    /// Training ran away.
    #[error("{0}")]
    Diverged(String),
    /// The user asked to stop; what was done is saved.
    #[error("{0}")]
    Interrupted(String),
}

impl Error {
    /// For `map_err` on file operations.
    pub fn file(action: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::File { action, path, source }
    }

    /// The same with the next step, if the user asked to stop.
    #[must_use]
    pub fn continue_with(self, command: impl std::fmt::Display) -> Self {
        match self {
            Self::Interrupted(message) => Self::Interrupted(format!("{message}\n\nhint: {command}")),
            other => other,
        }
    }

    /// A file with the wrong content.
    pub fn content(path: &Path, problem: impl ToString) -> Self {
        Self::Content { path: path.to_owned(), problem: problem.to_string() }
    }
}
