//! Runs one-step generators and teachers from ONNX files on this machine: the project's engine and tract compiled in,
//! onnxruntime loaded at run time. Knows no training and no candle; what must agree with the other runtimes comes from `dmd-core`.
//!
//! ```
//! use dmd_runtime_native::{Class, Generator, Options};
//!
//! # fn main() -> dmd_runtime_native::Result<()> {
//! let generator = Generator::open("../assets/one-step-fashion.onnx".as_ref(), &Options::default())?;
//! let images = generator.generate(7, 2, Class::One(9))?;
//! assert_eq!((images.count(), images.shape), (2, [1, 28, 28]));
//! let first = &images.pixels()[0]; // bytes, row by row
//! assert_eq!((first.width, first.height, first.data.len()), (28, 28, 784));
//! # Ok(())
//! # }
//! ```

#[cfg(all(feature = "ort", not(any(feature = "ort-load", feature = "ort-download"))))]
compile_error!("onnxruntime is either loaded or linked: enable the feature `ort-load` or `ort-download`");
#[cfg(all(feature = "ort-load", feature = "ort-download"))]
compile_error!("got the features `ort-load` and `ort-download`, expected one: add `--no-default-features`");

pub mod batch;
pub mod bench;
pub mod file;
pub mod generator;
#[cfg(feature = "ort")]
pub mod library;
pub mod providers;
#[cfg(feature = "ort-load")]
pub mod search;
pub mod verify;

mod checks;
#[cfg(feature = "ort")]
mod devices;
mod embedded;
mod engine;
mod error;
mod external;
#[cfg(feature = "tract")]
mod memory;
#[cfg(feature = "ort")]
mod ort;
#[cfg(feature = "ort-load")]
mod plugins;
#[cfg(feature = "ort")]
mod remedies;
#[cfg(feature = "tract")]
mod tract;

pub use batch::Batch;
pub use dmd_core::sampler::Sampler;
pub use error::{Error, Result};
pub use file::{ModelFile, ModelInfo};
pub use generator::{Class, Generator, Images, Interpolation, Options, Request};
pub use providers::Provider;

/// The model that comes with this crate: a class-conditional one-step generator.
pub const BUNDLED: &[u8] = dmd_assets::ONE_STEP_FASHION;
/// What messages call [`BUNDLED`].
pub const BUNDLED_NAME: &str = "the bundled one-step-fashion.onnx";
