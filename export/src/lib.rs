//! Turns a checkpoint into one ONNX file by partial evaluation of the network description in core.
//!
//! [`weights`] and [`tensors`] read a checkpoint; [`partial`] and [`ops`] run the description on "constant, per-class table or graph
//! value"; [`graph`] collects the operators and writes the ONNX messages; [`verify`] checks what came out, [`precision`]
//! stores its weights smaller, [`external`] in a file of their own; [`model`] joins them. [`evaluate`] is the same description on
//! constants alone: the reference of [`golden`] files, and of [`measure`], which says what a precision costs.
//! No training, no inference engine.
#![forbid(unsafe_code)]

pub mod array;
pub mod evaluate;
pub mod external;
pub mod golden;
pub mod graph;
pub mod locate;
pub mod measure;
pub mod model;
pub mod ops;
pub mod partial;
pub mod pixels;
pub mod precision;
pub mod quantise;
pub mod tensors;
pub mod verify;
pub mod weights;

mod convolution;
mod error;
pub use array::Array;
pub use dmd_core::card::Kind;
pub use error::{Error, Result};
pub use external::External;
pub use model::{Exported, Form, Summary, export, export_in};
pub use precision::Precision;
pub use weights::Checkpoint;
