//! Everything that can go wrong between the bytes of a model and an image.

/// Result with this crate's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

/// Why a model could not be loaded or an image not be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The bytes are not an ONNX file, or only a part of one.
    #[error(
        "got {bytes} bytes that are not a complete ONNX file: {problem}\n\n\
         hint: the download may have been cut off, or the address may lead to a web page"
    )]
    NotOnnx {
        /// Length of what arrived.
        bytes: usize,
        /// Where reading stopped.
        problem: String,
    },
    /// A valid ONNX file, but not a one-step generator.
    #[error("{0}")]
    NotAGenerator(String),
    /// The file could not be downloaded.
    #[error("{0}")]
    Download(String),
    /// The engine cannot run the graph.
    #[error("cannot prepare the model: {0}")]
    Graph(String),
    /// The card inside the file, or a request that the model cannot meet.
    #[error(transparent)]
    Core(#[from] dmd_core::Error),
    /// The graph failed while it ran, or gave something that is no image.
    #[error("cannot generate an image: {0}")]
    Run(String),
}

impl Error {
    pub(crate) fn request(problem: impl Into<String>) -> Self {
        Self::Core(dmd_core::Error::Request(problem.into()))
    }
}
