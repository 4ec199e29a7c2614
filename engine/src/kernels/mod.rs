//! The loops. Everything is f32, row by row, images as `c, h, w`; sizes are checked by the callers in `build`.

pub mod conv;
pub mod gemm;
pub mod norm;
pub mod pointwise;
pub mod shape;
pub mod simd;
pub mod winograd;

pub use simd::instructions;
