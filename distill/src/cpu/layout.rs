//! Operations without parameters that move values about or work value by value.

use dmd_core::net::{Activation, Pool};
use rayon::prelude::*;

use super::images::Images;
use super::simd::{
    add_to, gelu_slope, lanes, mish_share, mish_slope, normal_share, sigmoid, silu_slope, vectorised,
};

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

/// The activation of every value.
pub fn activate(x: &Images, activation: Activation) -> Images {
    let mut y = x.copy();
    y.data.par_chunks_mut(TASK).for_each(|y| {
        vectorised(
            #[inline(always)]
            || match activation {
                Activation::Silu => y.iter_mut().for_each(|y| *y *= sigmoid(*y)),
                Activation::Gelu => y.iter_mut().for_each(|y| *y *= normal_share(*y)),
                Activation::Relu => y.iter_mut().for_each(|y| *y = if *y < 0.0 { 0.0 } else { *y }),
                Activation::Mish => y.iter_mut().for_each(|y| *y *= mish_share(*y)),
            },
        );
    });
    y
}

/// Multiplies the gradient by the activation's derivative at `x`.
pub fn activate_backward(x: &Images, activation: Activation, gradient: &mut Images) {
    gradient.data.par_chunks_mut(TASK).zip(x.data.par_chunks(TASK)).for_each(|(gradient, x)| {
        vectorised(
            #[inline(always)]
            || match activation {
                Activation::Silu => gradient.iter_mut().zip(x).for_each(|(d, x)| *d *= silu_slope(*x)),
                Activation::Gelu => gradient.iter_mut().zip(x).for_each(|(d, x)| *d *= gelu_slope(*x)),
                Activation::Relu => gradient.iter_mut().zip(x).for_each(|(d, x)| *d *= f32::from(*x > 0.0)),
                Activation::Mish => gradient.iter_mut().zip(x).for_each(|(d, x)| *d *= mish_slope(*x)),
            },
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

/// `x` times the one-pixel image `factor` at every pixel.
pub fn scale_channels(x: &Images, factor: &Images) -> Images {
    let (mut out, pixel) = (x.like(), x.pixel());
    let inputs = x.data.par_chunks(x.group()).zip(factor.data.par_chunks(pixel));
    out.data.par_chunks_mut(x.group()).zip(inputs).for_each(|(out, (x, factor))| {
        vectorised(
            #[inline(always)]
            || {
                for (out, x) in out.chunks_exact_mut(pixel).zip(x.chunks_exact(pixel)) {
                    out.iter_mut().zip(x).zip(factor).for_each(|((out, x), factor)| *out = x * factor);
                }
            },
        );
    });
    out
}

/// `a·b`, value by value.
pub fn multiply(a: &Images, b: &Images) -> Images {
    let mut out = a.copy();
    out.data.par_chunks_mut(TASK).zip(b.data.par_chunks(TASK)).for_each(|(out, b)| {
        vectorised(
            #[inline(always)]
            || out.iter_mut().zip(b).for_each(|(out, b)| *out *= b),
        );
    });
    out
}

/// Where the taps of the square of output pixel `pixel` start, in vectors of one value per lane and channel.
fn square(pixel: usize, size: usize, out_width: usize, width: usize) -> impl Iterator<Item = usize> {
    let (y, x) = (pixel / out_width * size, pixel % out_width * size);
    (0..size * size).map(move |tap| (y + tap / size) * width + x + tap % size)
}

/// Each square of `size` by `size` pixels becomes one.
pub fn pool(x: &Images, pool: Pool, size: usize) -> Images {
    let (mut out, pixel) = (Images::stale(x.n, x.c, x.h / size, x.w / size), x.pixel());
    let (group, width) = (out.group(), out.w);
    out.data.par_chunks_mut(group).zip(x.data.par_chunks(x.group())).for_each(|(out, values)| {
        vectorised(
            #[inline(always)]
            || {
                for (i, out) in out.chunks_exact_mut(pixel).enumerate() {
                    out.fill(if pool == Pool::Max { f32::NEG_INFINITY } else { 0.0 });
                    for tap in square(i, size, width, x.w) {
                        let values = &values[tap * pixel..][..pixel];
                        match pool {
                            Pool::Max => out.iter_mut().zip(values).for_each(|(out, v)| {
                                // NaN stays.
                                *out = if *v > *out || v.is_nan() { *v } else { *out };
                            }),
                            Pool::Average => add_to(out, values),
                        }
                    }
                    if pool == Pool::Average {
                        out.iter_mut().for_each(|out| *out /= (size * size) as f32);
                    }
                }
            },
        );
    });
    out
}

/// Gradient of [`pool`] with respect to `x`, of which `y` is the result.
pub fn pool_backward(x: &Images, y: &Images, pool: Pool, size: usize, gradient: &Images) -> Images {
    let (mut out, pixel) = (x.like(), x.pixel());
    let inputs = x.data.par_chunks(x.group()).zip(y.data.par_chunks(y.group()));
    let inputs = inputs.zip(gradient.data.par_chunks(y.group()));
    out.data.par_chunks_mut(x.group()).zip(inputs).for_each(|(out, ((values, y_values), gradient))| {
        out.fill(0.0);
        let mut rest = vec![0.0; pixel];
        vectorised(
            #[inline(always)]
            || {
                let pixels = gradient.chunks_exact(pixel).zip(y_values.chunks_exact(pixel));
                for (i, (gradient, y_values)) in pixels.enumerate() {
                    rest.copy_from_slice(gradient);
                    for tap in square(i, size, y.w, x.w) {
                        let (out, values) =
                            (&mut out[tap * pixel..][..pixel], &values[tap * pixel..][..pixel]);
                        match pool {
                            Pool::Average => {
                                let each = 1.0 / (size * size) as f32;
                                out.iter_mut().zip(gradient).for_each(|(out, d)| *out = d * each);
                            }
                            // The first of equal values takes the gradient and leaves none for the others.
                            Pool::Max => {
                                let pairs = values.iter().zip(y_values).zip(&mut rest);
                                for (out, ((value, top), rest)) in out.iter_mut().zip(pairs) {
                                    let d = if value == top { *rest } else { 0.0 };
                                    *out = d;
                                    *rest = if value == top { 0.0 } else { *rest };
                                }
                            }
                        }
                    }
                }
            },
        );
    });
    out
}

/// The gradient of [`narrow`]: zeros around the channels from `first` on.
pub fn widen(gradient: &Images, first: usize, channels: usize) -> Images {
    let mut out = Images::stale(gradient.n, channels, gradient.h, gradient.w);
    out.data.fill(0.0);
    let (pixel, start, wide) = (gradient.pixel(), first * lanes(), out.pixel());
    let group = out.group();
    out.data.par_chunks_mut(group).zip(gradient.data.par_chunks(gradient.group())).for_each(
        |(out, group)| {
            for (out, d) in out.chunks_exact_mut(wide).zip(group.chunks_exact(pixel)) {
                out[start..start + pixel].copy_from_slice(d);
            }
        },
    );
    out
}
