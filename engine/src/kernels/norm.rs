//! Normalisation over groups of channels, and the softmax.

use super::simd::{exp, sigmoid, sum, vectorised};
use crate::parallel;

/// Multiply-adds in the time of normalising one value, with SiLU.
const NORMALISING: usize = 16;

/// Mean 0 and variance 1 over each group of channels, then `x·scale + shift` per channel, then SiLU if asked.
#[derive(Clone, Debug)]
pub struct GroupNorm {
    /// Groups of an image.
    pub groups: usize,
    /// Values per channel.
    pub pixels: usize,
    /// Added to the variance.
    pub epsilon: f32,
    /// Factor per channel.
    pub scale: Vec<f32>,
    /// Summand per channel.
    pub shift: Vec<f32>,
    /// Whether `y·sigmoid(y)` follows.
    pub silu: bool,
}

impl GroupNorm {
    /// Any number of images, in place.
    pub fn run(&self, x: &mut [f32]) {
        let channels = self.scale.len() / self.groups;
        let size = channels * self.pixels;
        let parts = parallel::parts(NORMALISING * x.len());
        let each = (x.len() / size).div_ceil(parts);
        parallel::each(parts, x.chunks_mut(each * size).enumerate(), |(part, x)| {
            vectorised(
                #[inline(always)]
                || {
                    for (i, group) in x.chunks_exact_mut(size).enumerate() {
                        let mean = sum(group, |x| x) / size as f32;
                        let variance = sum(group, |x| (x - mean) * (x - mean)) / size as f32;
                        let inverse = 1.0 / (variance + self.epsilon).sqrt();
                        let first = (part * each + i) % self.groups * channels;
                        for (c, x) in group.chunks_exact_mut(self.pixels).enumerate() {
                            let scale = self.scale[first + c] * inverse;
                            let shift = self.shift[first + c] - mean * scale;
                            affine(x, scale, shift, self.silu);
                        }
                    }
                },
            );
        });
    }
}

/// `x·scale + shift` per channel in place, then SiLU if asked; channels of `pixels` values.
pub fn scale_channels(x: &mut [f32], scale: &[f32], shift: &[f32], pixels: usize, silu: bool) {
    let parts = parallel::parts(NORMALISING * x.len());
    let each = (x.len() / pixels).div_ceil(parts);
    parallel::each(parts, x.chunks_mut(each * pixels).enumerate(), |(part, x)| {
        vectorised(
            #[inline(always)]
            || {
                for (i, x) in x.chunks_exact_mut(pixels).enumerate() {
                    let channel = (part * each + i) % scale.len();
                    affine(x, scale[channel], shift[channel], silu);
                }
            },
        );
    });
}

#[inline(always)]
fn affine(x: &mut [f32], scale: f32, shift: f32, silu: bool) {
    if silu {
        for x in x {
            let y = *x * scale + shift;
            *x = y * sigmoid(y);
        }
    } else {
        x.iter_mut().for_each(|x| *x = *x * scale + shift);
    }
}

/// Softmax of each row of `width` values, in place.
pub fn softmax(x: &mut [f32], width: usize) {
    let parts = parallel::parts(NORMALISING * x.len());
    let rows = (x.len() / width).div_ceil(parts);
    parallel::each(parts, x.chunks_mut(rows * width), |x| {
        vectorised(
            #[inline(always)]
            || {
                for row in x.chunks_exact_mut(width) {
                    let largest = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                    row.iter_mut().for_each(|x| *x = exp(*x - largest));
                    let factor = 1.0 / sum(row, |x| x);
                    row.iter_mut().for_each(|x| *x *= factor);
                }
            },
        );
    });
}
