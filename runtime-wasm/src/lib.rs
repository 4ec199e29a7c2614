//! The browser's runtime: a one-step generator for JavaScript, over [`generator::Generator`].
//! Only the border between the two languages is here; errors cross it as JavaScript `Error`s.

pub mod contract;
pub mod generator;

#[cfg(feature = "all-operators")]
mod all_operators;
mod download;
mod engine;
mod error;
mod js;
#[cfg(all(test, target_family = "wasm"))]
mod tests;
pub use error::{Error, Result};
