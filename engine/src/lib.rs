//! A small engine for ONNX files that `dmd-export` wrote: f32 arithmetic, every size known when a file is loaded, one
//! thread per [`Workspace`]. The same code runs natively and as WebAssembly.
//!
//! `message` reads the file, `build` and `lower` turn its nodes into steps and fuse some, `network` gives the steps memory
//! and runs them, `kernels` are the loops. Nothing here knows generators, images or JavaScript.
#![forbid(unsafe_code)]

pub mod message;

mod build;
mod error;
mod kernels;
mod lower;
mod network;
mod nodes;
mod operators;
mod tensor;

pub use error::{Error, Result};
pub use kernels::instructions;
pub use network::{Input, Network, Workspace};
