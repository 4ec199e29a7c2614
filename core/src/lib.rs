//! What distillation, export and both runtimes must agree on to the bit: network descriptions, the noise
//! schedule, the noise contract, pixels and the model card. No tensor library, no file access; builds for wasm32.
#![forbid(unsafe_code)]

pub mod activation;
pub mod card;
pub mod compare;
pub mod config;
pub mod golden;
pub mod legacy;
pub mod net;
pub mod noise;
pub mod pixels;
pub mod sampler;
pub mod schedule;
pub mod wire;

mod error;
pub use error::{Error, Result};
