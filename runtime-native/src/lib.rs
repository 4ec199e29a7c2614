//! Runs one-step generators and teachers from ONNX files on this machine: tract compiled in, onnxruntime loaded at
//! run time. Knows no training and no candle; what must agree with the other runtimes comes from `dmd-core`.

#[cfg(not(any(feature = "ort", feature = "tract")))]
compile_error!("a build needs an engine: enable the feature `ort` or `tract`");

pub mod batch;
pub mod file;
pub mod generator;
#[cfg(feature = "ort")]
pub mod library;
pub mod providers;
pub mod verify;

mod error;
mod external;
#[cfg(feature = "ort")]
mod ort;
#[cfg(feature = "tract")]
mod tract;

pub use batch::Batch;
pub use dmd_core::sampler::Sampler;
pub use error::{Error, Result};
pub use file::{ModelFile, ModelInfo};
pub use generator::{Class, Model, Options, Request, Samples};
pub use providers::Provider;

/// The model that comes with this crate: a class-conditional one-step generator.
pub const BUNDLED: &[u8] = include_bytes!("../../assets/one-step-fashion.onnx");
/// What messages call [`BUNDLED`].
pub const BUNDLED_NAME: &str = "the bundled one-step-fashion.onnx";
