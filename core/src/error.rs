//! Everything that can be wrong with what core is given.

/// Result with core's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

/// A description that core cannot accept.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A key of `config.json` or `scheduler_config.json` is missing, malformed or asks for something not implemented.
    #[error("config key `{key}`: {problem}")]
    Config {
        /// The key as the file spells it.
        key: String,
        /// What is wrong, got then expected.
        problem: String,
    },
    /// The model card does not hold together.
    #[error("model card: {0}")]
    Card(String),
    /// The description of a golden file does not hold together.
    #[error("description of a golden file: {0}")]
    Golden(String),
    /// An ONNX file that asks for too much memory.
    #[error("{0}")]
    Message(String),
    /// A value has a shape the operation cannot take.
    #[error("`{name}`: got shape {got:?}, expected {expected}")]
    Shape {
        /// Parameter or operation.
        name: String,
        /// Shape that arrived.
        got: Vec<usize>,
        /// What would have been right.
        expected: String,
    },
    /// A request that the model cannot meet (class, step or step count out of range).
    #[error("{0}")]
    Request(String),
}

impl Error {
    pub(crate) fn config(key: &str, problem: impl Into<String>) -> Self {
        Self::Config { key: key.to_owned(), problem: problem.into() }
    }
}
