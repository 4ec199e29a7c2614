//! Kernel distance (Bińkowski et al. 2018, arXiv:1801.01401): unbiased, so comparable at any number of images.

use nalgebra::DMatrix;
use rayon::prelude::*;

use super::Features;
use crate::error::Result;
use crate::random::{Purpose, Random};

/// Subsets that are averaged.
const SUBSETS: usize = 100;
/// Images of each set in a subset.
const SUBSET: usize = 1000;

/// Mean and standard deviation over the subsets.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Kid {
    /// Mean; can be slightly negative.
    pub mean: f64,
    /// Standard deviation; 0 if there was one subset.
    pub std: f64,
}

/// Squared maximum mean discrepancy with the kernel `(x·y/d + 1)³`, unbiased (diagonals are left out).
///
/// # Errors
/// If a set has less than two images.
pub fn discrepancy(x: &Features, y: &Features) -> Result<f64> {
    x.same_dimension(y)?;
    x.at_least(2)?;
    y.at_least(2)?;
    Ok(unbiased(x.columns(), y.columns()))
}

/// The mean over 100 subsets of 1000 images from each set, or one subset of everything if a set is not larger; the
/// subsets are the same whenever the sets' sizes are.
///
/// # Errors
/// If a set has less than two images.
pub fn kid(x: &Features, y: &Features) -> Result<Kid> {
    x.same_dimension(y)?;
    x.at_least(2)?;
    y.at_least(2)?;
    let size = SUBSET.min(x.count()).min(y.count());
    let whole = size == x.count() && size == y.count();
    let subset = |features: &Features, stream: usize| -> DMatrix<f64> {
        let order = Random::new(0, Purpose::Metrics, stream as u64).permutation(features.count());
        let chosen: Vec<usize> = order[..size].iter().map(|i| *i as usize).collect();
        features.columns().select_columns(&chosen)
    };
    let all: Vec<f64> = (0..if whole { 1 } else { SUBSETS })
        .into_par_iter()
        .map(|i| unbiased(&subset(x, 2 * i), &subset(y, 2 * i + 1)))
        .collect();
    let mean = all.iter().sum::<f64>() / all.len() as f64;
    let variance = all.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / all.len() as f64;
    Ok(Kid { mean, std: variance.sqrt() })
}

fn unbiased(x: &DMatrix<f64>, y: &DMatrix<f64>) -> f64 {
    let (m, n) = (x.ncols() as f64, y.ncols() as f64);
    within(x) / (m * (m - 1.0)) + within(y) / (n * (n - 1.0)) - 2.0 * kernel(x, y).sum() / (m * n)
}

/// Sum of the kernel over all ordered pairs of different images.
fn within(x: &DMatrix<f64>) -> f64 {
    let kernel = kernel(x, x);
    kernel.sum() - kernel.trace()
}

fn kernel(x: &DMatrix<f64>, y: &DMatrix<f64>) -> DMatrix<f64> {
    let mut kernel = x.transpose() * y;
    let scale = 1.0 / x.nrows() as f64;
    kernel.apply(|v| *v = (*v * scale + 1.0).powi(3));
    kernel
}
