//! Convolution on the CPU with its gradients, as a candle operation.
//!
//! An image is copied once into a buffer with its padding; for a stride `s` the buffer holds `s·s` phases, so that
//! every kernel tap reads consecutive floats. The gradient of the input is the same convolution with the kernel
//! flipped and the output's gradient spread out by the stride. Sums over images are made in a fixed order, whatever
//! the number of threads.

use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Tensor};
use dmd_core::net::Conv2d;
use rayon::prelude::*;

use super::cpu::{read, slice};
use super::gemm::{Packed, correlate, multiply, row_length};

/// Images per parallel task and per partial sum.
const GROUP: usize = 4;

/// `y = conv2d(x, weight) + bias`; gradients only where an argument is tracked.
pub struct ConvOp(pub Conv2d);

/// Sizes of one convolution.
#[derive(Clone, Copy)]
struct Geometry {
    input: [usize; 3],
    output: [usize; 3],
    kernel: usize,
    stride: usize,
    padding: [usize; 4],
}

impl Geometry {
    fn new(spec: &Conv2d, height: usize, width: usize) -> Self {
        let [top, left, bottom, right] = spec.padding;
        let out = |size: usize| (size - spec.kernel) / spec.stride + 1;
        Self {
            input: [spec.in_channels, height, width],
            output: [spec.out_channels, out(height + top + bottom), out(width + left + right)],
            kernel: spec.kernel,
            stride: spec.stride,
            padding: spec.padding,
        }
    }

    /// Rows and columns of one phase of the padded image.
    fn phase(&self) -> [usize; 2] {
        let [top, left, bottom, right] = self.padding;
        [
            (self.input[1] + top + bottom).div_ceil(self.stride),
            (self.input[2] + left + right).div_ceil(self.stride),
        ]
    }

    /// A buffer of zeros for one image, with room to read `row_length(pixels)` floats after its end.
    fn buffer(&self) -> Vec<f32> {
        let [rows, columns] = self.phase();
        let phases = self.input[0] * self.stride * self.stride;
        vec![0.0; phases * rows * columns + row_length(self.pixels())]
    }

    /// Where each channel and tap starts in the buffer.
    fn offsets(&self) -> Vec<usize> {
        let ([rows, columns], s, k) = (self.phase(), self.stride, self.kernel);
        let tap =
            |c: usize, y: usize, x: usize| (((c * s + y % s) * s + x % s) * rows + y / s) * columns + x / s;
        (0..self.input[0] * k * k).map(|i| tap(i / (k * k), i / k % k, i % k)).collect()
    }

    /// Pixels of the output when its rows are as long as the buffer's.
    fn pixels(&self) -> usize {
        (self.output[1] - 1) * self.phase()[1] + self.output[2]
    }

    /// Copies one image into the buffer; what is outside the image must be zero already.
    fn fill(&self, image: &[f32], buffer: &mut [f32]) {
        let ([channels, height, width], [rows, columns], s) = (self.input, self.phase(), self.stride);
        let [top, left, ..] = self.padding;
        for c in 0..channels {
            for y in 0..height {
                let from = &image[(c * height + y) * width..][..width];
                let (py, row) = ((y + top) % s, (y + top) / s);
                if s == 1 {
                    buffer[(c * rows + row) * columns + left..][..width].copy_from_slice(from);
                    continue;
                }
                for (x, &value) in from.iter().enumerate() {
                    let (px, column) = ((x + left) % s, (x + left) / s);
                    buffer[(((c * s + py) * s + px) * rows + row) * columns + column] = value;
                }
            }
        }
    }
}

fn convolve(g: &Geometry, batch: &[f32], weights: &Packed, bias: Option<&[f32]>) -> Vec<f32> {
    let [channels, height, width] = g.output;
    let (size_in, size_out) = (g.input.iter().product::<usize>(), channels * height * width);
    let (offsets, pixels, columns) = (g.offsets(), g.pixels(), g.phase()[1]);
    let pitch = row_length(pixels);
    let mut out = vec![0.0; batch.len() / size_in * size_out];
    out.par_chunks_mut(GROUP * size_out).zip(batch.par_chunks(GROUP * size_in)).for_each(|(out, images)| {
        let mut buffer = g.buffer();
        let mut rows = vec![0.0; channels * pitch];
        for (out, image) in out.chunks_exact_mut(size_out).zip(images.chunks_exact(size_in)) {
            g.fill(image, &mut buffer);
            multiply(weights, &buffer, &offsets, bias, pixels, &mut rows);
            for (plane, row) in out.chunks_exact_mut(height * width).zip(rows.chunks_exact(pitch)) {
                for (to, from) in plane.chunks_exact_mut(width).zip(row.chunks(columns)) {
                    to.copy_from_slice(&from[..width]);
                }
            }
        }
    });
    out
}

fn forward(g: &Geometry, batch: &[f32], weight: &[f32], bias: &[f32]) -> Vec<f32> {
    let depth = g.input[0] * g.kernel * g.kernel;
    convolve(g, batch, &Packed::new(g.output[0], depth, |r, k| weight[r * depth + k]), Some(bias))
}

/// Gradient with respect to the input.
fn backward_input(g: &Geometry, grad: &[f32], weight: &[f32]) -> Vec<f32> {
    let ([channels, height, width], [out_channels, rows, columns], k) = (g.input, g.output, g.kernel);
    let [top, left, bottom, right] = g.padding;
    let taps = k * k;
    let flipped = Packed::new(channels, out_channels * taps, |r, i| {
        weight[(i / taps * channels + r) * taps + taps - 1 - i % taps]
    });
    let spread = [out_channels, height + top + bottom - k + 1, width + left + right - k + 1];
    let transposed = Geometry {
        input: spread,
        output: g.input,
        kernel: k,
        stride: 1,
        padding: [k - 1 - top, k - 1 - left, k - 1 - bottom, k - 1 - right],
    };
    if g.stride == 1 {
        return convolve(&transposed, grad, &flipped, None);
    }
    let planes = grad.len() / (rows * columns);
    let mut apart = vec![0.0; planes * spread[1] * spread[2]];
    for (to, from) in apart.chunks_exact_mut(spread[1] * spread[2]).zip(grad.chunks_exact(rows * columns)) {
        for (i, &value) in from.iter().enumerate() {
            to[i / columns * g.stride * spread[2] + i % columns * g.stride] = value;
        }
    }
    convolve(&transposed, &apart, &flipped, None)
}

/// Gradients with respect to weight and bias.
fn backward_weight(g: &Geometry, batch: &[f32], grad: &[f32]) -> (Vec<f32>, Vec<f32>) {
    let [channels, height, width] = g.output;
    let (size_in, size_out) = (g.input.iter().product::<usize>(), channels * height * width);
    let (offsets, columns) = (g.offsets(), g.phase()[1]);
    let pitch = g.pixels().next_multiple_of(16);
    let partial: Vec<(Vec<f32>, Vec<f32>)> = batch
        .par_chunks(GROUP * size_in)
        .zip(grad.par_chunks(GROUP * size_out))
        .map(|(images, grads)| {
            let mut buffer = g.buffer();
            let mut rows = vec![0.0; channels * pitch];
            let (mut weight, mut bias) = (vec![0.0; channels * offsets.len()], vec![0.0; channels]);
            for (image, grad) in images.chunks_exact(size_in).zip(grads.chunks_exact(size_out)) {
                g.fill(image, &mut buffer);
                for (c, plane) in grad.chunks_exact(height * width).enumerate() {
                    bias[c] += super::cpu::sum(plane);
                    for (to, from) in rows[c * pitch..].chunks_mut(columns).zip(plane.chunks_exact(width)) {
                        to[..width].copy_from_slice(from);
                    }
                }
                correlate(&rows, pitch, &buffer, &offsets, &mut weight);
            }
            (weight, bias)
        })
        .collect();
    let mut weight = vec![0.0; channels * offsets.len()];
    let mut bias = vec![0.0; channels];
    for (w, b) in &partial {
        super::cpu::add_to(&mut weight, w);
        super::cpu::add_to(&mut bias, b);
    }
    (weight, bias)
}

impl CustomOp3 for ConvOp {
    fn name(&self) -> &'static str {
        "conv2d"
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
        let (n, _, h, w) = x_layout.shape().dims4()?;
        let g = Geometry::new(&self.0, h, w);
        let (x, weight, bias) =
            (slice(x, x_layout)?, slice(weight, weight_layout)?, slice(bias, bias_layout)?);
        let [c, h, w] = g.output;
        Ok((CpuStorage::F32(forward(&g, x, weight, bias)), Shape::from((n, c, h, w))))
    }

    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        bias: &Tensor,
        _y: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let (_, _, h, w) = x.dims4()?;
        let g = Geometry::new(&self.0, h, w);
        let device = x.device();
        read(grad, |grad| {
            let input = match x.track_op() {
                true => Some(read(weight, |weight| {
                    Tensor::from_vec(backward_input(&g, grad, weight), x.shape(), device)
                })?),
                false => None,
            };
            if !weight.track_op() {
                return Ok((input, None, None));
            }
            let (d_weight, d_bias) = read(x, |x| Ok(backward_weight(&g, x, grad)))?;
            let d_weight = Tensor::from_vec(d_weight, weight.shape(), device)?;
            Ok((input, Some(d_weight), Some(Tensor::from_vec(d_bias, bias.shape(), device)?)))
        })
    }
}
