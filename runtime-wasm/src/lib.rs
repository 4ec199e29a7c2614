//! The browser's runtime: a one-step generator for JavaScript, over [`generator::Generator`].
//! Only the border between the two languages is here; errors cross it as JavaScript `Error`s.

pub mod contract;
pub mod generator;

mod download;
mod error;
mod js;
pub use error::{Error, Result};
