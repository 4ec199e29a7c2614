//! The CPU engine: a whole network forward and backward, as one candle operation.
//!
//! Images lie in memory in groups, one per SIMD lane (`images`), so that every kernel is the plain algorithm for one
//! image written with vectors for numbers: no remainder of a row is ever wasted, and all sizes are equally fast. A
//! network records what it does on a `tape`, whose gradients are moved and added in place. candle sees one operation
//! with the flattened inputs and parameters as its argument, and differentiates losses and the rest around it.
//! Must not know about networks or losses.

mod attention;
mod batch_norm;
mod conv;
mod images;
mod layout;
mod memory;
mod norm;
mod ops;
mod pass;
mod simd;
mod tape;
mod tile;

pub use images::Images;
pub use ops::CpuOps;
pub use pass::apply;
pub use tape::Value;

#[cfg(test)]
mod tests;
