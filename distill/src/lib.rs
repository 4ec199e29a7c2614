//! Distils a pretrained DDPM into a one-step generator (DMD, arXiv:2311.18828).
//!
//! The library behind `dmd-distill`: [`base`] finds a model, [`teacher`] trains one, [`pairs`] samples it,
//! [`train`] distils it with the [`losses`] of the paper. Networks run on [`cpu`] or, on GPUs, on [`ops`].

pub mod base;
pub mod checkpoint;
pub mod classifier;
pub mod commands;
pub mod cpu;
pub mod data;
pub mod device;
pub mod distillation;
pub mod draws;
pub mod error;
pub mod eval;
pub mod files;
mod finish;
pub mod html;
pub mod hub;
pub mod inventory;
pub mod judge;
pub mod lock;
pub mod losses;
pub mod metrics;
pub mod monitor;
pub mod network;
pub mod ops;
pub mod optimiser;
pub mod options;
pub mod pairs;
pub mod parallel;
pub mod perceptual;
mod pickle;
pub mod progress;
pub mod random;
pub mod regression;
pub mod report;
mod resize;
pub mod run;
pub mod sampler;
pub mod share;
pub mod statistics;
pub mod teacher;
pub mod train;
pub mod weights;
