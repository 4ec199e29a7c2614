//! A small engine for ONNX files that `dmd-export` wrote: f32 arithmetic, every size known when a file is loaded. The same code
//! runs natively and as WebAssembly, on the calling thread or, with the feature `threads`, on all of the rayon pool in which it is
//! called, with the same bits.
//!
//! `message` reads the file, `build` and `lower` turn its nodes into steps and fuse some, `network` gives the steps memory
//! and runs them, `kernels` are the loops, `parallel` shares them among threads. Nothing here knows generators, images or JavaScript.
#![forbid(unsafe_code)]

pub mod message;

mod build;
mod error;
mod kernels;
mod lower;
mod network;
mod nodes;
mod operators;
mod parallel;
mod tensor;

pub use build::MAX_VALUES;
pub use error::{Error, Result};
pub use kernels::instructions;
pub use network::{Input, Network, Workspace};
