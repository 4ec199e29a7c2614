//! Operations that move values about, on the CPU with their gradients: enlarging, joining channels, adding a bias.

use candle_core::{CpuStorage, CustomOp1, CustomOp2, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use super::cpu::{read, slice, sum};

/// Nearest-neighbour enlargement by two.
pub struct Upsample;

impl CustomOp1 for Upsample {
    fn name(&self) -> &'static str {
        "upsample_nearest2x"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (n, c, h, w) = layout.shape().dims4()?;
        let x = slice(x, layout)?;
        let mut y = vec![0.0; 4 * x.len()];
        y.par_chunks_mut(4 * h * w).zip(x.par_chunks(h * w)).for_each(|(y, x)| {
            for (y, x) in y.chunks_exact_mut(4 * w).zip(x.chunks_exact(w)) {
                let (upper, lower) = y.split_at_mut(2 * w);
                for (pair, x) in upper.chunks_exact_mut(2).zip(x) {
                    pair.fill(*x);
                }
                lower.copy_from_slice(upper);
            }
        });
        Ok((CpuStorage::F32(y), Shape::from((n, c, 2 * h, 2 * w))))
    }

    fn bwd(&self, x: &Tensor, _y: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let (_, _, h, w) = x.dims4()?;
        let mut dx = vec![0.0; x.elem_count()];
        read(grad, |grad| {
            dx.par_chunks_mut(h * w).zip(grad.par_chunks(4 * h * w)).for_each(|(dx, grad)| {
                for (dx, grad) in dx.chunks_exact_mut(w).zip(grad.chunks_exact(4 * w)) {
                    let (upper, lower) = grad.split_at(2 * w);
                    for ((dx, a), b) in dx.iter_mut().zip(upper.chunks_exact(2)).zip(lower.chunks_exact(2)) {
                        *dx = a[0] + a[1] + b[0] + b[1];
                    }
                }
            });
            Ok(())
        })?;
        Tensor::from_vec(dx, x.shape(), x.device()).map(Some)
    }
}

/// Channels of the first, then channels of the second.
pub struct Concat;

impl CustomOp2 for Concat {
    fn name(&self) -> &'static str {
        "concat"
    }

    fn cpu_fwd(
        &self,
        a: &CpuStorage,
        a_layout: &Layout,
        b: &CpuStorage,
        b_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (n, c, h, w) = a_layout.shape().dims4()?;
        let (_, d, ..) = b_layout.shape().dims4()?;
        let (a, b) = (slice(a, a_layout)?, slice(b, b_layout)?);
        let (first, second) = (c * h * w, d * h * w);
        let mut y = vec![0.0; a.len() + b.len()];
        y.par_chunks_mut(first + second).zip(a.par_chunks(first).zip(b.par_chunks(second))).for_each(
            |(y, (a, b))| {
                y[..first].copy_from_slice(a);
                y[first..].copy_from_slice(b);
            },
        );
        Ok((CpuStorage::F32(y), Shape::from((n, c + d, h, w))))
    }

    fn bwd(
        &self,
        a: &Tensor,
        b: &Tensor,
        _y: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (c, d) = (a.dim(1)?, b.dim(1)?);
        Ok((Some(grad.narrow(1, 0, c)?.contiguous()?), Some(grad.narrow(1, c, d)?.contiguous()?)))
    }
}

/// `x` `[n, c, h, w]` plus `bias` `[n, c]` or `[1, c]` at every pixel.
pub struct AddBias;

impl CustomOp2 for AddBias {
    fn name(&self) -> &'static str {
        "add_bias"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        bias: &CpuStorage,
        bias_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (_, _, h, w) = x_layout.shape().dims4()?;
        let (x, bias) = (slice(x, x_layout)?, slice(bias, bias_layout)?);
        let mut y = vec![0.0; x.len()];
        y.par_chunks_mut(h * w).zip(x.par_chunks(h * w)).with_min_len(64).enumerate().for_each(
            |(i, (y, x))| {
                let b = bias[i % bias.len()];
                y.iter_mut().zip(x).for_each(|(y, x)| *y = x + b);
            },
        );
        Ok((CpuStorage::F32(y), x_layout.shape().clone()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        bias: &Tensor,
        _y: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (_, _, h, w) = x.dims4()?;
        let mut d_bias = vec![0.0; bias.elem_count()];
        read(grad, |grad| {
            for (i, plane) in grad.chunks_exact(h * w).enumerate() {
                let at = i % d_bias.len();
                d_bias[at] += sum(plane);
            }
            Ok(())
        })?;
        let d_bias = Tensor::from_vec(d_bias, bias.shape(), bias.device())?;
        Ok((Some(grad.clone()), Some(d_bias)))
    }
}
