//! Convolution and its transpose, of one image at a time, as products of matrices.

use std::ops::Range;

use super::gemm::{self, Left, Product};
use super::winograd::Winograd;
use crate::parallel;

/// Sizes of a convolution.
#[derive(Clone, Copy, Debug)]
pub struct Geometry {
    /// Channels of the larger side's image (`x` of a convolution, the output of a transposed one).
    pub channels: usize,
    /// Its height and width.
    pub image: [usize; 2],
    /// Height and width of the other side's image: one position of the kernel for each pixel.
    pub places: [usize; 2],
    /// Height and width of the kernel.
    pub kernel: [usize; 2],
    /// Steps between positions.
    pub stride: [usize; 2],
    /// Margin above and on the left.
    pub margin: [usize; 2],
}

impl Geometry {
    /// Values that one position of the kernel covers.
    pub fn taps(&self) -> usize {
        self.channels * self.kernel[0] * self.kernel[1]
    }

    /// Positions.
    pub fn positions(&self) -> usize {
        self.places[0].saturating_mul(self.places[1])
    }

    /// Calls `f` with each row of these positions that lies within the image for a tap: place in the image, number of the first
    /// of these positions, and count; steps in the image are `stride[1]`.
    fn rows(&self, tap: usize, positions: Range<usize>, mut f: impl FnMut(usize, usize, usize)) {
        let [kh, kw] = self.kernel;
        let (channel, ky, kx) = (tap / (kh * kw), tap / kw % kh, tap % kw);
        let ([h, w], [rows, columns]) = (self.image, self.places);
        let first = self.margin[1].saturating_sub(kx).div_ceil(self.stride[1]);
        let end = columns.min((w + self.margin[1]).saturating_sub(kx).div_ceil(self.stride[1]));
        if first >= end {
            return;
        }
        for row in positions.start / columns..rows.min(positions.end.div_ceil(columns)) {
            let y = row * self.stride[0] + ky;
            let from = positions.start.max(row * columns + first);
            let to = positions.end.min(row * columns + end);
            if y >= self.margin[0] && y - self.margin[0] < h && from < to {
                let x = (from - row * columns) * self.stride[1] + kx - self.margin[1];
                f((channel * h + y - self.margin[0]) * w + x, from - positions.start, to - from);
            }
        }
    }

    fn plain(&self) -> bool {
        self.kernel == [1, 1] && self.stride == [1, 1] && self.margin == [0, 0] && self.image == self.places
    }
}

enum Method {
    Columns(Left),
    Winograd(Winograd),
}

/// A convolution with its weights.
pub struct Conv {
    geometry: Geometry,
    bias: Vec<f32>,
    method: Method,
}

impl Conv {
    /// Takes weights `[out, channels, kernel]` and a bias per output channel.
    pub fn new(geometry: Geometry, weights: &[f32], bias: Vec<f32>) -> Self {
        let out = bias.len();
        let cost =
            (geometry.kernel[0] * geometry.kernel[1]).saturating_mul(gemm::padded(geometry.positions()));
        let same = geometry.kernel == [3, 3]
            && geometry.stride == [1, 1]
            && geometry.margin == [1, 1]
            && geometry.image == geometry.places;
        // The transforms cost as much as some channels.
        let few = out < 8 || geometry.channels < 8;
        let method = if same && !few && 4 * Winograd::cost(geometry.image) < cost.saturating_mul(3) {
            Method::Winograd(Winograd::new(weights, [out, geometry.channels], geometry.image))
        } else {
            Method::Columns(Left::pack(out, geometry.taps(), weights))
        };
        Self { geometry, bias, method }
    }

    /// Floats of scratch memory.
    pub fn scratch(&self) -> usize {
        match &self.method {
            Method::Winograd(winograd) => winograd.scratch(),
            Method::Columns(left) => {
                (left.depth() + 1).saturating_mul(gemm::padded(self.geometry.positions()))
            }
        }
    }

    /// One image: `x` is `[channels, image]`, `out` `[out, places]`.
    pub fn run(&self, x: &[f32], out: &mut [f32], scratch: &mut [f32]) {
        match &self.method {
            Method::Winograd(winograd) => winograd.run(x, &self.bias, out, scratch),
            Method::Columns(left) => {
                let columns = self.geometry.positions();
                let (row, panels) = scratch.split_at_mut(gemm::padded(columns));
                gemm::pack([left.depth(), columns], panels, row, |tap, positions, row| {
                    gather(&self.geometry, x, tap, positions, row);
                });
                let product = Product { out, stride: columns, columns };
                gemm::multiply(left, panels, Some(&self.bias), product);
            }
        }
    }
}

/// The values under a tap at these positions.
fn gather(geometry: &Geometry, x: &[f32], tap: usize, positions: Range<usize>, row: &mut [f32]) {
    if geometry.plain() {
        let count = positions.len();
        return row[..count].copy_from_slice(&x[tap * geometry.positions() + positions.start..][..count]);
    }
    let step = geometry.stride[1];
    row.fill(0.0);
    geometry.rows(tap, positions, |from, to, count| {
        let to = &mut row[to..to + count];
        if step == 1 {
            to.iter_mut().zip(&x[from..]).for_each(|(to, x)| *to = *x);
        } else {
            to.iter_mut().zip(x[from..].iter().step_by(step)).for_each(|(to, x)| *to = *x);
        }
    });
}

/// A transposed convolution with its weights.
pub struct ConvTranspose {
    geometry: Geometry,
    bias: Vec<f32>,
    left: Left,
}

impl ConvTranspose {
    /// Takes weights `[input, channels, kernel]` and a bias per output channel (`geometry.channels` of them).
    pub fn new(geometry: Geometry, weights: &[f32], bias: Vec<f32>) -> Self {
        let taps = geometry.taps();
        let input = weights.len() / taps.max(1);
        let mut turned = vec![0.0; weights.len()];
        for (i, row) in weights.chunks_exact(taps).enumerate() {
            turned.iter_mut().skip(i).step_by(input).zip(row).for_each(|(to, from)| *to = *from);
        }
        Self { geometry, bias, left: Left::pack(taps, input, &turned) }
    }

    /// Floats of scratch memory.
    pub fn scratch(&self) -> usize {
        let rows = self.left.depth() + 1 + self.left.rows();
        rows.saturating_mul(gemm::padded(self.geometry.positions()))
    }

    /// One image: `x` is `[input, places]`, `out` `[channels, image]`.
    pub fn run(&self, x: &[f32], out: &mut [f32], scratch: &mut [f32]) {
        let (geometry, columns) = (&self.geometry, self.geometry.positions());
        let padded = gemm::padded(columns);
        let (row, rest) = scratch.split_at_mut(padded);
        let (panels, products) = rest.split_at_mut(self.left.depth() * padded);
        gemm::pack([self.left.depth(), columns], panels, row, |k, positions, row| {
            row[..positions.len()].copy_from_slice(&x[k * columns..][positions]);
        });
        gemm::multiply(&self.left, panels, None, Product { out: products, stride: padded, columns });
        let (pixels, taps) = (geometry.image[0] * geometry.image[1], geometry.kernel[0] * geometry.kernel[1]);
        let parts = parallel::parts(gemm::MOVING * self.left.rows() * padded);
        let tasks = out.chunks_exact_mut(pixels).zip(products.chunks(taps * padded)).zip(&self.bias);
        parallel::each(parts, tasks, |((out, products), bias)| {
            out.fill(*bias);
            for (tap, products) in products.chunks_exact(padded).enumerate() {
                geometry.rows(tap, 0..columns, |to, from, count| {
                    let to = out[to..].iter_mut().step_by(geometry.stride[1]);
                    to.zip(&products[from..from + count]).for_each(|(to, from)| *to += *from);
                });
            }
        });
    }
}
