//! Why a file cannot be run.

/// Result with this crate's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

/// Why a graph cannot be built or run.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The bytes are not an ONNX file.
    #[error("{0}")]
    Message(#[from] prost::DecodeError),
    /// An operator that is not one of `docs/onnx.md`, or a form of one that this engine does not have.
    #[error("node `{node}` ({operator}): {problem}")]
    Node {
        /// Name of the node.
        node: String,
        /// Its operator.
        operator: String,
        /// What was got and what is expected.
        problem: String,
    },
    /// Anything else that is wrong with the graph or with what it is run on.
    #[error("{0}")]
    Graph(String),
}
