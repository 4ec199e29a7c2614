//! Operations without parameters that move values about or work value by value.

use rayon::prelude::*;

use super::images::Images;
use super::simd::{add_to, lanes, sigmoid, silu_slope, vectorised};

/// Values per parallel task of a value-by-value operation.
const TASK: usize = 1 << 15;

/// `a + b`.
pub fn add(a: &Images, b: &Images) -> Images {
    let mut out = a.like();
    let inputs = a.data.par_chunks(TASK).zip(b.data.par_chunks(TASK));
    out.data.par_chunks_mut(TASK).zip(inputs).for_each(|(out, (a, b))| {
        vectorised(
            #[inline(always)]
            || out.iter_mut().zip(a).zip(b).for_each(|((out, a), b)| *out = a + b),
        );
    });
    out
}

/// `to += from`.
pub fn accumulate(to: &mut Images, from: &Images) {
    to.data.par_chunks_mut(TASK).zip(from.data.par_chunks(TASK)).for_each(|(to, from)| {
        vectorised(
            #[inline(always)]
            || add_to(to, from),
        );
    });
}

/// `x·factor`, in place.
pub fn scale(x: &mut Images, factor: f32) {
    x.data.par_chunks_mut(TASK).for_each(|x| x.iter_mut().for_each(|x| *x *= factor));
}

/// `x·sigmoid(x)`.
pub fn silu(x: &Images) -> Images {
    let mut y = x.copy();
    y.data.par_chunks_mut(TASK).for_each(|y| {
        vectorised(
            #[inline(always)]
            || y.iter_mut().for_each(|y| *y *= sigmoid(*y)),
        );
    });
    y
}

/// Multiplies the gradient by the derivative of SiLU at `x`.
pub fn silu_backward(x: &Images, gradient: &mut Images) {
    gradient.data.par_chunks_mut(TASK).zip(x.data.par_chunks(TASK)).for_each(|(gradient, x)| {
        vectorised(
            #[inline(always)]
            || gradient.iter_mut().zip(x).for_each(|(gradient, x)| *gradient *= silu_slope(*x)),
        );
    });
}

/// `x` plus the one-pixel image `bias` at every pixel.
pub fn add_bias(x: &Images, bias: &Images) -> Images {
    let (mut out, pixel) = (x.like(), x.pixel());
    let inputs = x.data.par_chunks(x.group()).zip(bias.data.par_chunks(pixel));
    out.data.par_chunks_mut(x.group()).zip(inputs).for_each(|(out, (x, bias))| {
        vectorised(
            #[inline(always)]
            || {
                for (out, x) in out.chunks_exact_mut(pixel).zip(x.chunks_exact(pixel)) {
                    out.iter_mut().zip(x).zip(bias).for_each(|((out, x), bias)| *out = x + bias);
                }
            },
        );
    });
    out
}

/// Sum over the pixels: the gradient of [`add_bias`]'s bias.
pub fn sum_pixels(x: &Images) -> Images {
    let (mut out, pixel) = (Images::stale(x.n, x.c, 1, 1), x.pixel());
    out.data.par_chunks_mut(pixel).zip(x.data.par_chunks(x.group())).for_each(|(out, x)| {
        vectorised(
            #[inline(always)]
            || {
                out.fill(0.0);
                x.chunks_exact(pixel).for_each(|x| add_to(out, x));
            },
        );
    });
    out
}

/// Channels of `a`, then channels of `b`.
pub fn concat(a: &Images, b: &Images) -> Images {
    let mut out = Images::stale(a.n, a.c + b.c, a.h, a.w);
    let (first, pixel) = (a.pixel(), out.pixel());
    let inputs = a.data.par_chunks(a.group()).zip(b.data.par_chunks(b.group()));
    out.data.par_chunks_mut(a.group() + b.group()).zip(inputs).for_each(|(out, (a, b))| {
        let pixels = a.chunks_exact(first).zip(b.chunks_exact(pixel - first));
        for (out, (a, b)) in out.chunks_exact_mut(pixel).zip(pixels) {
            out[..first].copy_from_slice(a);
            out[first..].copy_from_slice(b);
        }
    });
    out
}

/// `count` channels from `first` on.
pub fn narrow(x: &Images, first: usize, count: usize) -> Images {
    let mut out = Images::stale(x.n, count, x.h, x.w);
    let (pixel, start) = (out.pixel(), first * lanes());
    out.data.par_chunks_mut(out.h * out.w * pixel).zip(x.data.par_chunks(x.group())).for_each(
        |(out, group)| {
            for (out, x) in out.chunks_exact_mut(pixel).zip(group.chunks_exact(x.pixel())) {
                out.copy_from_slice(&x[start..start + pixel]);
            }
        },
    );
    out
}

/// Each pixel becomes a 2 by 2 square.
pub fn upsample(x: &Images) -> Images {
    let (mut out, pixel, w) = (Images::stale(x.n, x.c, 2 * x.h, 2 * x.w), x.pixel(), x.w);
    out.data.par_chunks_mut(4 * x.group()).zip(x.data.par_chunks(x.group())).for_each(|(out, x)| {
        for (rows, row) in out.chunks_exact_mut(4 * w * pixel).zip(x.chunks_exact(w * pixel)) {
            let (upper, lower) = rows.split_at_mut(2 * w * pixel);
            for (pair, x) in upper.chunks_exact_mut(2 * pixel).zip(row.chunks_exact(pixel)) {
                pair[..pixel].copy_from_slice(x);
                pair[pixel..].copy_from_slice(x);
            }
            lower.copy_from_slice(upper);
        }
    });
    out
}

/// Sum over each 2 by 2 square: the gradient of [`upsample`].
pub fn sum_squares(x: &Images) -> Images {
    let (mut out, pixel) = (Images::stale(x.n, x.c, x.h / 2, x.w / 2), x.pixel());
    let (w, group) = (out.w, out.group());
    out.data.par_chunks_mut(group).zip(x.data.par_chunks(x.group())).for_each(|(out, x)| {
        vectorised(
            #[inline(always)]
            || {
                for (row, rows) in out.chunks_exact_mut(w * pixel).zip(x.chunks_exact(4 * w * pixel)) {
                    let (upper, lower) = rows.split_at(2 * w * pixel);
                    let pairs = upper.chunks_exact(2 * pixel).zip(lower.chunks_exact(2 * pixel));
                    for (out, (upper, lower)) in row.chunks_exact_mut(pixel).zip(pairs) {
                        let ((a, b), (c, d)) = (upper.split_at(pixel), lower.split_at(pixel));
                        for ((((out, a), b), c), d) in out.iter_mut().zip(a).zip(b).zip(c).zip(d) {
                            *out = (a + b) + (c + d);
                        }
                    }
                }
            },
        );
    });
    out
}
