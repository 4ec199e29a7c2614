//! BatchNorm with the statistics of its own batch, as training a base uses it (Ioffe and Szegedy 2015, arXiv:1502.03167,
//! Algorithm 1), with gradients through the statistics. Lanes beyond the last image count in no sum and get no gradient.

use candle_core::{Device, Tensor};
use dmd_core::net::BatchNorm;
use rayon::prelude::*;

use super::images::Images;
use super::norm::{Fixed, per_lane};
use super::ops::CpuOps;
use super::simd::{add_to, lanes, vectorised};
use super::tape::Value;
use crate::ops::Error;
use crate::statistics::BatchStatistics;

/// Mean and variance per channel over all pixels of all images of a batch.
pub struct Moments {
    /// Mean.
    pub mean: Vec<f32>,
    /// Biased variance: what the batch is normalised by.
    pub variance: Vec<f32>,
    /// Values per channel.
    pub count: f64,
    statistics: BatchStatistics,
}

impl Moments {
    /// Of a batch, with the images that other ranks have. The sums are taken relative to the first value, so that a constant
    /// channel comes out exactly constant.
    pub fn of(x: &Images, statistics: &BatchStatistics) -> Self {
        let own = (x.n * x.h * x.w) as f64;
        let first: Vec<f32> = x.data[..x.pixel()].iter().step_by(lanes()).copied().collect();
        let shift = per_lane(&first);
        let sums = sums(
            x,
            #[inline(always)]
            |sum, x| {
                for ((sum, x), shift) in sum.iter_mut().zip(x).zip(&shift) {
                    *sum += x - shift;
                }
            },
        );
        let pairs = || sums.iter().zip(&first).map(|(sum, first)| (sum, f64::from(*first)));
        let (count, mean): (f64, Vec<f32>) = match statistics.is_shared() {
            false => (own, pairs().map(|(sum, first)| (sum / own + first) as f32).collect()),
            true => {
                let mut sums: Vec<f64> = [own].into_iter().chain(pairs().map(|(s, f)| s + own * f)).collect();
                statistics.sum(&mut sums);
                (sums[0], sums[1..].iter().map(|sum| (sum / sums[0]) as f32).collect())
            }
        };
        let centre = per_lane(&mean);
        let mut squares = self::sums(
            x,
            #[inline(always)]
            |sum, x| {
                for ((sum, x), mean) in sum.iter_mut().zip(x).zip(&centre) {
                    *sum += (x - mean) * (x - mean);
                }
            },
        );
        statistics.sum(&mut squares);
        let variance = squares.iter().map(|sum| (sum / count) as f32).collect();
        Self { mean, variance, count, statistics: statistics.clone() }
    }

    /// The unbiased variance, which running statistics follow.
    pub fn unbiased(&self) -> Vec<f32> {
        let factor = self.count as f32 / (self.count - 1.0) as f32;
        self.variance.iter().map(|variance| variance * factor).collect()
    }

    /// Normalisation by these statistics.
    pub fn fixed(&self, eps: f64) -> Fixed {
        Fixed::new(&self.mean, &self.variance, eps)
    }

    /// Gradient with respect to `x`; adds those of weight and bias. With `x̂ = (x − mean)/sqrt(var + eps)` and the gradient `d`:
    /// `weight/sqrt(var + eps)·(d − mean(d) − x̂·mean(d·x̂))`, the means over the images of all ranks.
    pub fn backward(
        &self,
        eps: f64,
        x: &Images,
        weight: &[f32],
        mut gradient: Images,
        d_weight: &mut [f32],
        d_bias: &mut [f32],
    ) -> Images {
        let pixel = x.pixel();
        let scale: Vec<f32> = self.variance.iter().map(|v| 1.0 / (v + eps as f32).sqrt()).collect();
        let mean = per_lane(&self.mean);
        let total = sums(&gradient, add_to);
        let with_x = pair_sums(
            &gradient,
            x,
            #[inline(always)]
            |sum, d, x| {
                for (((sum, d), x), mean) in sum.iter_mut().zip(d).zip(x).zip(&mean) {
                    *sum += d * (x - mean);
                }
            },
        );
        for ((d_weight, sum), scale) in d_weight.iter_mut().zip(&with_x).zip(&scale) {
            *d_weight += *sum as f32 * scale;
        }
        d_bias.iter_mut().zip(&total).for_each(|(d_bias, sum)| *d_bias += *sum as f32);
        let mut both = [total, with_x].concat();
        let statistics = &self.statistics;
        if statistics.is_shared() {
            // Each rank's loss is a mean over its own images; the gradients of weight and bias are averaged later.
            both.iter_mut().for_each(|sum| *sum *= statistics.weight());
            statistics.sum(&mut both);
            both.iter_mut().for_each(|sum| *sum /= statistics.weight());
        }
        let (total, with_x) = both.split_at(scale.len());
        let mean_d: Vec<f32> = total.iter().map(|sum| (sum / self.count) as f32).collect();
        // How much x − mean counts: mean(d·x̂)/sqrt(var + eps).
        let factor: Vec<f32> =
            with_x.iter().zip(&scale).map(|(sum, scale)| (sum / self.count) as f32 * scale * scale).collect();
        let slope: Vec<f32> = scale.iter().zip(weight).map(|(scale, weight)| scale * weight).collect();
        let (slope, mean_d, factor) = (per_lane(&slope), per_lane(&mean_d), per_lane(&factor));
        let (n, group) = (x.n, x.group());
        let groups = gradient.data.par_chunks_mut(group).zip(x.data.par_chunks(group)).enumerate();
        groups.for_each(|(g, (gradient, x))| {
            let mut slope = slope.clone();
            let used = used(n, g);
            slope.chunks_exact_mut(lanes()).for_each(|channel| channel[used..].fill(0.0));
            vectorised(
                #[inline(always)]
                || {
                    for (d, x) in gradient.chunks_exact_mut(pixel).zip(x.chunks_exact(pixel)) {
                        let values = x.iter().zip(&mean).zip(&slope).zip(&mean_d).zip(&factor);
                        for (d, ((((x, mean), slope), mean_d), factor)) in d.iter_mut().zip(values) {
                            *d = slope * (*d - mean_d - (x - mean) * factor);
                        }
                    }
                },
            );
        });
        gradient
    }
}

impl CpuOps<'_> {
    /// BatchNorm by the statistics of the batch itself, which are left in `statistics`.
    pub(super) fn batch_norm_of_batch(
        &mut self,
        x: &Value,
        name: &str,
        spec: BatchNorm,
        statistics: &BatchStatistics,
    ) -> Result<Value, Error> {
        let (layer, images) = (self.affine(name)?, &x.images);
        if images.n * images.h * images.w < 2 && !statistics.is_shared() {
            let got = vec![images.n, images.c, images.h, images.w];
            let expected = "at least two values per channel, to take statistics of".to_owned();
            return Err(dmd_core::Error::Shape { name: name.to_owned(), got, expected }.into());
        }
        let moments = Moments::of(images, statistics);
        let tensor = |values: Vec<f32>| Tensor::from_vec(values, spec.channels, &Device::Cpu);
        statistics.record(name, tensor(moments.mean.clone())?, tensor(moments.unbiased())?);
        let (weight, bias) = (&self.flat[layer.weight.clone()], &self.flat[layer.bias.clone()]);
        let out = moments.fixed(spec.eps).forward(images, weight, bias);
        let y = self.result(out, x.slot.is_some() || self.train);
        if let Some(slot) = y.slot {
            let x = x.clone();
            self.tape.push(slot, move |gradient, all| {
                let flat = all.flat;
                let weight = &flat[layer.weight.clone()];
                let [d_weight, d_bias] = all.pair(&layer.weight, &layer.bias);
                let dx = moments.backward(spec.eps, &x.images, weight, gradient, d_weight, d_bias);
                all.add(x.slot, dx);
            });
        }
        Ok(y)
    }
}

/// Lanes of group `g` that hold one of `n` images.
fn used(n: usize, g: usize) -> usize {
    (n - g * lanes()).min(lanes())
}

/// Sum per channel over all pixels of all images, in a fixed order; `add` adds the values of one pixel to those of its lanes.
fn sums(x: &Images, add: impl Fn(&mut [f32], &[f32]) + Sync) -> Vec<f64> {
    pair_sums(
        x,
        x,
        #[inline(always)]
        |sum, x, _| add(sum, x),
    )
}

/// The same with the values of two batches.
fn pair_sums(a: &Images, b: &Images, add: impl Fn(&mut [f32], &[f32], &[f32]) + Sync) -> Vec<f64> {
    let pixel = a.pixel();
    let partial: Vec<Vec<f32>> = a
        .data
        .par_chunks(a.group())
        .zip(b.data.par_chunks(b.group()))
        .map(|(a, b)| {
            let mut sum = vec![0.0; pixel];
            vectorised(
                #[inline(always)]
                || a.chunks_exact(pixel).zip(b.chunks_exact(pixel)).for_each(|(a, b)| add(&mut sum, a, b)),
            );
            sum
        })
        .collect();
    let mut total = vec![0.0; a.c];
    for (g, sum) in partial.iter().enumerate() {
        for (total, lanes) in total.iter_mut().zip(sum.chunks_exact(lanes())) {
            *total += lanes[..used(a.n, g)].iter().map(|v| f64::from(*v)).sum::<f64>();
        }
    }
    total
}
