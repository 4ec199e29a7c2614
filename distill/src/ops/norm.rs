//! GroupNorm, with SiLU fused, on the CPU with its gradients, as a candle operation.
//! Wu and He 2018 (arXiv:1803.08494).

use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Tensor};
use dmd_core::net::GroupNorm;
use pulp::Arch;
use rayon::prelude::*;

use super::cpu::{add_to, read, sigmoid, slice};

/// Images per partial sum of the parameters' gradients.
const GROUP: usize = 4;

/// `y = (x − mean)/sqrt(var + eps)·weight + bias` per group, then SiLU if asked.
pub struct NormOp(pub GroupNorm);

/// Mean and reciprocal standard deviation of one group. Both are taken relative to the first value, so that a
/// constant group comes out exactly constant.
#[inline(always)]
fn statistics(x: &[f32], eps: f32) -> (f32, f32) {
    let n = x.len() as f32;
    let (head, tail) = pulp::as_arrays::<8, f32>(x);
    let mut parts = [0.0f32; 8];
    for chunk in head {
        for (part, v) in parts.iter_mut().zip(chunk) {
            *part += v - x[0];
        }
    }
    let rest: f32 = tail.iter().map(|v| v - x[0]).sum();
    let mean = x[0] + (parts.iter().sum::<f32>() + rest) / n;
    let mut parts = [0.0f32; 8];
    for chunk in head {
        for (part, v) in parts.iter_mut().zip(chunk) {
            *part += (v - mean) * (v - mean);
        }
    }
    let rest: f32 = tail.iter().map(|v| (v - mean) * (v - mean)).sum();
    let variance = (parts.iter().sum::<f32>() + rest) / n;
    (mean, 1.0 / (variance + eps).sqrt())
}

impl NormOp {
    #[inline(always)]
    fn forward_group(&self, x: &[f32], weight: &[f32], bias: &[f32], y: &mut [f32]) {
        let plane = x.len() / weight.len();
        let (mean, scale) = statistics(x, self.0.eps as f32);
        for (((y, x), w), b) in y.chunks_exact_mut(plane).zip(x.chunks_exact(plane)).zip(weight).zip(bias) {
            let w = w * scale;
            if self.0.silu {
                y.iter_mut().zip(x).for_each(|(y, x)| {
                    let v = (x - mean) * w + b;
                    *y = v * sigmoid(v);
                });
            } else {
                y.iter_mut().zip(x).for_each(|(y, x)| *y = (x - mean) * w + b);
            }
        }
    }

    /// Adds to the parameters' gradients of one group and writes the input's.
    #[inline(always)]
    fn backward_group(
        &self,
        (x, grad): (&[f32], &[f32]),
        (weight, bias): (&[f32], &[f32]),
        (d_weight, d_bias): (&mut [f32], &mut [f32]),
        dx: &mut [f32],
    ) {
        let plane = x.len() / weight.len();
        let (mean, scale) = statistics(x, self.0.eps as f32);
        let (mut sum_d, mut sum_dx) = (0.0f32, 0.0f32);
        for (c, &w) in weight.iter().enumerate() {
            let at = c * plane..(c + 1) * plane;
            let (x, grad, dx) = (&x[at.clone()], &grad[at.clone()], &mut dx[at]);
            let (slope, shift) = (w * scale, bias[c]);
            if self.0.silu {
                for ((dx, x), grad) in dx.iter_mut().zip(x).zip(grad) {
                    let v = (x - mean) * slope + shift;
                    let s = sigmoid(v);
                    *dx = grad * s * (1.0 + v * (1.0 - s));
                }
            } else {
                dx.copy_from_slice(grad);
            }
            let (total, with_x) = moments(dx, x, mean);
            let with_x = with_x * scale;
            d_bias[c] += total;
            d_weight[c] += with_x;
            sum_d += w * total;
            sum_dx += w * with_x;
        }
        let n = x.len() as f32;
        let (a, b) = (sum_d / n, sum_dx / n);
        for ((dx, x), &w) in dx.chunks_exact_mut(plane).zip(x.chunks_exact(plane)).zip(weight) {
            for (dx, x) in dx.iter_mut().zip(x) {
                *dx = scale * (w * *dx - a - (x - mean) * scale * b);
            }
        }
    }
}

/// `Σ d` and `Σ d·(x − mean)`.
#[inline(always)]
fn moments(d: &[f32], x: &[f32], mean: f32) -> (f32, f32) {
    let ((d_head, d_tail), (x_head, x_tail)) = (pulp::as_arrays::<8, f32>(d), pulp::as_arrays::<8, f32>(x));
    let (mut total, mut with_x) = ([0.0f32; 8], [0.0f32; 8]);
    for (d, x) in d_head.iter().zip(x_head) {
        for i in 0..8 {
            total[i] += d[i];
            with_x[i] += d[i] * (x[i] - mean);
        }
    }
    let rest: f32 = d_tail.iter().zip(x_tail).map(|(d, x)| d * (x - mean)).sum();
    (total.iter().sum::<f32>() + d_tail.iter().sum::<f32>(), with_x.iter().sum::<f32>() + rest)
}

impl CustomOp3 for NormOp {
    fn name(&self) -> &'static str {
        "group_norm"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        weight: &CpuStorage,
        weight_layout: &Layout,
        bias: &CpuStorage,
        bias_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (x, weight, bias) =
            (slice(x, x_layout)?, slice(weight, weight_layout)?, slice(bias, bias_layout)?);
        let (groups, channels) = (self.0.groups, self.0.channels / self.0.groups);
        let size = x_layout.dims()[2..].iter().product::<usize>() * channels;
        let mut y = vec![0.0; x.len()];
        y.par_chunks_mut(size * groups).zip(x.par_chunks(size * groups)).for_each(|(y, x)| {
            Arch::new().dispatch(
                #[inline(always)]
                || {
                    for g in 0..groups {
                        let (at, c) = (g * size..(g + 1) * size, g * channels..(g + 1) * channels);
                        self.forward_group(&x[at.clone()], &weight[c.clone()], &bias[c], &mut y[at]);
                    }
                },
            );
        });
        Ok((CpuStorage::F32(y), x_layout.shape().clone()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        bias: &Tensor,
        _y: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let (groups, channels) = (self.0.groups, self.0.channels / self.0.groups);
        let size = x.dims()[2..].iter().product::<usize>() * channels;
        let image = size * groups;
        let mut dx = vec![0.0; x.elem_count()];
        let partial: Vec<(Vec<f32>, Vec<f32>)> = read(x, |x| {
            read(grad, |grad| {
                read(weight, |weight| {
                    read(bias, |bias| {
                        Ok(dx
                            .par_chunks_mut(GROUP * image)
                            .zip(x.par_chunks(GROUP * image).zip(grad.par_chunks(GROUP * image)))
                            .map(|(dx, (x, grad))| {
                                let mut d_weight = vec![0.0; weight.len()];
                                let mut d_bias = vec![0.0; weight.len()];
                                Arch::new().dispatch(
                                    #[inline(always)]
                                    || {
                                        for i in 0..x.len() / size {
                                            let at = i * size..(i + 1) * size;
                                            let c = i % groups * channels..(i % groups + 1) * channels;
                                            self.backward_group(
                                                (&x[at.clone()], &grad[at.clone()]),
                                                (&weight[c.clone()], &bias[c.clone()]),
                                                (&mut d_weight[c.clone()], &mut d_bias[c]),
                                                &mut dx[at],
                                            );
                                        }
                                    },
                                );
                                (d_weight, d_bias)
                            })
                            .collect())
                    })
                })
            })
        })?;
        let (mut d_weight, mut d_bias) = (vec![0.0; self.0.channels], vec![0.0; self.0.channels]);
        for (w, b) in &partial {
            add_to(&mut d_weight, w);
            add_to(&mut d_bias, b);
        }
        let device = x.device();
        let parameter = |v: Vec<f32>| Tensor::from_vec(v, self.0.channels, device);
        Ok((
            Some(Tensor::from_vec(dx, x.shape(), device)?),
            Some(parameter(d_weight)?),
            Some(parameter(d_bias)?),
        ))
    }
}
