//! GroupNorm, with SiLU fused (Wu and He 2018, arXiv:1803.08494), and BatchNorm with fixed statistics (Ioffe and Szegedy
//! 2015, arXiv:1502.03167), with their gradients.

use dmd_core::net::GroupNorm;
use rayon::prelude::*;

use super::images::Images;
use super::simd::{add_to, lanes, sigmoid, silu_slope, vectorised};
use crate::ops::FEW_VALUES;

/// Per channel and lane of a group of images: what the channel's values are normalised by.
struct Statistics {
    mean: Vec<f32>,
    /// `1 / sqrt(var + eps)`.
    scale: Vec<f32>,
}

/// `y = (x − mean)/sqrt(var + eps)·weight + bias` per group of channels, then SiLU if asked.
pub fn forward(spec: &GroupNorm, x: &Images, weight: &[f32], bias: &[f32]) -> Images {
    let (mut y, pixel) = (x.like(), x.pixel());
    y.data.par_chunks_mut(x.group()).zip(x.data.par_chunks(x.group())).for_each(|(y, x)| {
        vectorised(
            #[inline(always)]
            || {
                let Statistics { mean, mut scale } = statistics(spec, x, pixel);
                let bias = per_lane(bias);
                scale.iter_mut().zip(per_lane(weight)).for_each(|(scale, weight)| *scale *= weight);
                for (y, x) in y.chunks_exact_mut(pixel).zip(x.chunks_exact(pixel)) {
                    let values = x.iter().zip(&mean).zip(&scale).zip(&bias);
                    if spec.silu {
                        for (y, (((x, mean), scale), bias)) in y.iter_mut().zip(values) {
                            let v = (x - mean) * scale + bias;
                            *y = v * sigmoid(v);
                        }
                    } else {
                        for (y, (((x, mean), scale), bias)) in y.iter_mut().zip(values) {
                            *y = (x - mean) * scale + bias;
                        }
                    }
                }
            },
        );
    });
    y
}

/// Gradient with respect to `x`; adds those of weight and bias.
pub fn backward(
    spec: &GroupNorm,
    x: &Images,
    weight: &[f32],
    bias: &[f32],
    mut gradient: Images,
    d_weight: &mut [f32],
    d_bias: &mut [f32],
) -> Images {
    let pixel = x.pixel();
    let few = x.c / spec.groups * x.h * x.w <= FEW_VALUES;
    let partial: Vec<(Vec<f32>, Vec<f32>)> = gradient
        .data
        .par_chunks_mut(x.group())
        .zip(x.data.par_chunks(x.group()))
        .map(|(gradient, x)| {
            if few {
                return backward_few(spec, x, weight, bias, gradient);
            }
            vectorised(
                #[inline(always)]
                || backward_group(spec, x, weight, bias, gradient, pixel),
            )
        })
        .collect();
    for (with_x, total) in partial {
        add_to(d_weight, &with_x);
        add_to(d_bias, &total);
    }
    gradient
}

/// Turns the gradient of one group of images into that of `x`; returns the gradients of weight and bias.
#[inline(always)]
fn backward_group(
    spec: &GroupNorm,
    x: &[f32],
    weight: &[f32],
    bias: &[f32],
    gradient: &mut [f32],
    pixel: usize,
) -> (Vec<f32>, Vec<f32>) {
    let Statistics { mean, scale } = statistics(spec, x, pixel);
    let (weight, bias) = (per_lane(weight), per_lane(bias));
    let slope: Vec<f32> = scale.iter().zip(&weight).map(|(scale, weight)| scale * weight).collect();
    let (mut total, mut with_x) = (vec![0.0; pixel], vec![0.0; pixel]);
    for (gradient, x) in gradient.chunks_exact_mut(pixel).zip(x.chunks_exact(pixel)) {
        if spec.silu {
            let values = x.iter().zip(&mean).zip(&slope).zip(&bias);
            for (gradient, (((x, mean), slope), bias)) in gradient.iter_mut().zip(values) {
                *gradient *= silu_slope((x - mean) * slope + bias);
            }
        }
        let sums = total.iter_mut().zip(with_x.iter_mut());
        for ((total, with_x), ((gradient, x), mean)) in sums.zip(gradient.iter().zip(x).zip(&mean)) {
            *total += gradient;
            *with_x += gradient * (x - mean);
        }
    }
    with_x.iter_mut().zip(&scale).for_each(|(v, scale)| *v *= scale);
    let count = x.len() as f32 / (spec.groups * lanes()) as f32;
    let weighted =
        |sums: &[f32]| -> Vec<f32> { sums.iter().zip(&weight).map(|(v, w)| v * w / count).collect() };
    let (mean_d, mean_dx) = (over_group(spec, &weighted(&total)), over_group(spec, &weighted(&with_x)));
    let factor: Vec<f32> = mean_dx.iter().zip(&scale).map(|(v, scale)| v * scale).collect();
    for (gradient, x) in gradient.chunks_exact_mut(pixel).zip(x.chunks_exact(pixel)) {
        let values = x.iter().zip(&mean).zip(&scale).zip(&weight).zip(&mean_d).zip(&factor);
        for (d, (((((x, mean), scale), weight), mean_d), factor)) in gradient.iter_mut().zip(values) {
            *d = scale * (weight * *d - mean_d - (x - mean) * factor);
        }
    }
    let reduce = |v: &[f32]| v.chunks_exact(lanes()).map(|lanes| lanes.iter().sum()).collect();
    (reduce(&with_x), reduce(&total))
}

/// [`backward_group`] in f64, one value after the other.
fn backward_few(
    spec: &GroupNorm,
    x: &[f32],
    weight: &[f32],
    bias: &[f32],
    gradient: &mut [f32],
) -> (Vec<f32>, Vec<f32>) {
    let (lanes, members) = (lanes(), spec.channels / spec.groups);
    let (mut d_weight, mut d_bias) = (vec![0.0; spec.channels], vec![0.0; spec.channels]);
    for (lane, group) in (0..lanes).flat_map(|lane| (0..spec.groups).map(move |group| (lane, group))) {
        let channels = group * members..(group + 1) * members;
        let places: Vec<(usize, usize)> = (0..x.len() / (spec.channels * lanes))
            .flat_map(|pixel| channels.clone().map(move |c| (c, (pixel * spec.channels + c) * lanes + lane)))
            .collect();
        let mean_of = |values: &[f64]| values.iter().sum::<f64>() / values.len() as f64;
        let values: Vec<f64> = places.iter().map(|(_, at)| f64::from(x[*at])).collect();
        let mean = mean_of(&values);
        let variance = mean_of(&values.iter().map(|v| (v - mean).powi(2)).collect::<Vec<_>>());
        let scale = 1.0 / (variance + spec.eps).sqrt();
        let normal: Vec<f64> = values.iter().map(|v| (v - mean) * scale).collect();
        let mut d_normal = Vec::with_capacity(places.len());
        for ((c, at), normal) in places.iter().zip(&normal) {
            let mut d = f64::from(gradient[*at]);
            if spec.silu {
                let v = normal * f64::from(weight[*c]) + f64::from(bias[*c]);
                let s = 1.0 / (1.0 + (-v).exp());
                d *= s * (1.0 + v * (1.0 - s));
            }
            d_weight[*c] += d * normal;
            d_bias[*c] += d;
            d_normal.push(d * f64::from(weight[*c]));
        }
        let mean_d = mean_of(&d_normal);
        let mean_dx =
            mean_of(&d_normal.iter().zip(&normal).map(|(d, normal)| d * normal).collect::<Vec<_>>());
        for (((_, at), normal), d) in places.iter().zip(&normal).zip(&d_normal) {
            gradient[*at] = (scale * (d - mean_d - normal * mean_dx)) as f32;
        }
    }
    let single = |values: Vec<f64>| values.into_iter().map(|v| v as f32).collect();
    (single(d_weight), single(d_bias))
}

/// Mean and deviation of one group of images. Both are taken relative to the first value, so that constant channels
/// come out exactly constant.
#[inline(always)]
fn statistics(spec: &GroupNorm, x: &[f32], pixel: usize) -> Statistics {
    let count = x.len() as f32 / (spec.groups * lanes()) as f32;
    let members = spec.channels / spec.groups * lanes();
    let mut first = Vec::with_capacity(pixel);
    for group in x[..pixel].chunks_exact(members) {
        (0..members).for_each(|i| first.push(group[i % lanes()]));
    }
    let mut sum = vec![0.0; pixel];
    for x in x.chunks_exact(pixel) {
        for ((sum, x), first) in sum.iter_mut().zip(x).zip(&first) {
            *sum += x - first;
        }
    }
    let mean: Vec<f32> =
        over_group(spec, &sum).iter().zip(&first).map(|(sum, first)| first + sum / count).collect();
    sum.fill(0.0);
    for x in x.chunks_exact(pixel) {
        for ((sum, x), mean) in sum.iter_mut().zip(x).zip(&mean) {
            *sum += (x - mean) * (x - mean);
        }
    }
    let scale =
        over_group(spec, &sum).iter().map(|sum| 1.0 / (sum / count + spec.eps as f32).sqrt()).collect();
    Statistics { mean, scale }
}

/// Each value `[channel, lane]` replaced by the sum over its group of channels.
#[inline(always)]
fn over_group(spec: &GroupNorm, values: &[f32]) -> Vec<f32> {
    let lanes = lanes();
    let mut out = Vec::with_capacity(values.len());
    for group in values.chunks_exact(spec.channels / spec.groups * lanes) {
        let mut sum = group[..lanes].to_vec();
        group[lanes..].chunks_exact(lanes).for_each(|channel| add_to(&mut sum, channel));
        group.chunks_exact(lanes).for_each(|_| out.extend_from_slice(&sum));
    }
    out
}

/// A value per channel, repeated for every lane.
#[inline(always)]
pub fn per_lane(values: &[f32]) -> Vec<f32> {
    values.iter().flat_map(|v| std::iter::repeat_n(*v, lanes())).collect()
}

/// BatchNorm with fixed statistics: mean and `1/sqrt(var + eps)` per channel and lane.
pub struct Fixed(Statistics);

impl Fixed {
    /// From running mean and variance.
    pub fn new(mean: &[f32], variance: &[f32], eps: f64) -> Self {
        let scale: Vec<f32> = variance.iter().map(|v| 1.0 / (v + eps as f32).sqrt()).collect();
        Self(Statistics { mean: per_lane(mean), scale: per_lane(&scale) })
    }

    /// `(x − mean)/sqrt(var + eps)·weight + bias`.
    pub fn forward(&self, x: &Images, weight: &[f32], bias: &[f32]) -> Images {
        let (mut y, pixel, bias) = (x.copy(), x.pixel(), per_lane(bias));
        let factor: Vec<f32> = self.0.scale.iter().zip(per_lane(weight)).map(|(s, w)| s * w).collect();
        y.data.par_chunks_mut(x.group()).for_each(|y| {
            vectorised(
                #[inline(always)]
                || {
                    for y in y.chunks_exact_mut(pixel) {
                        let values = self.0.mean.iter().zip(&factor).zip(&bias);
                        for (y, ((mean, factor), bias)) in y.iter_mut().zip(values) {
                            *y = (*y - mean) * factor + bias;
                        }
                    }
                },
            );
        });
        y
    }

    /// Gradient with respect to `x`; adds those of weight and bias.
    pub fn backward(
        &self,
        x: &Images,
        weight: &[f32],
        mut gradient: Images,
        d_weight: &mut [f32],
        d_bias: &mut [f32],
    ) -> Images {
        let pixel = x.pixel();
        let factor: Vec<f32> = self.0.scale.iter().zip(per_lane(weight)).map(|(s, w)| s * w).collect();
        let groups = gradient.data.par_chunks_mut(x.group()).zip(x.data.par_chunks(x.group()));
        let partial: Vec<(Vec<f32>, Vec<f32>)> = groups
            .map(|(gradient, x)| {
                let (mut with_x, mut total) = (vec![0.0; pixel], vec![0.0; pixel]);
                vectorised(
                    #[inline(always)]
                    || {
                        for (d, x) in gradient.chunks_exact_mut(pixel).zip(x.chunks_exact(pixel)) {
                            let values = x.iter().zip(&self.0.mean).zip(&factor);
                            let sums = with_x.iter_mut().zip(total.iter_mut());
                            for ((d, ((x, mean), factor)), (with_x, total)) in
                                d.iter_mut().zip(values).zip(sums)
                            {
                                *with_x += *d * (x - mean);
                                *total += *d;
                                *d *= factor;
                            }
                        }
                    },
                );
                with_x.iter_mut().zip(&self.0.scale).for_each(|(v, scale)| *v *= scale);
                let reduce = |v: &[f32]| v.chunks_exact(lanes()).map(|lanes| lanes.iter().sum()).collect();
                (reduce(&with_x), reduce(&total))
            })
            .collect();
        for (with_x, total) in partial {
            add_to(d_weight, &with_x);
            add_to(d_bias, &total);
        }
        gradient
    }
}
