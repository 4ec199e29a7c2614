//! Distils a pretrained DDPM into a one-step generator (DMD, arXiv:2311.18828).

pub mod base;
pub mod checkpoint;
pub mod data;
pub mod error;
pub mod files;
pub mod losses;
pub mod network;
pub mod ops;
pub mod optimiser;
pub mod progress;
pub mod random;
pub mod run;
pub mod sampler;
pub mod teacher;
