//! The two inner loops of convolution, as small register tiles over vectors of images.
//! Must not know about images, padding or threads.

use pulp::{Arch, Simd, WithSimd};

/// Output channels in a tile.
pub const ROWS: usize = 4;
/// Pixels in a tile, or kernel taps in a tile of weight gradients.
const COLUMNS: usize = 3;

/// A matrix `[rows, depth]`, stored in blocks of [`ROWS`] rows, depth by depth, then the rows that are left.
pub struct Packed {
    rows: usize,
    depth: usize,
    blocks: Vec<[f32; ROWS]>,
    rest: Vec<[f32; 1]>,
}

impl Packed {
    /// Packs `value(row, k)`.
    pub fn new(rows: usize, depth: usize, value: impl Fn(usize, usize) -> f32) -> Self {
        let mut blocks = Vec::with_capacity(rows / ROWS * depth);
        for first in (0..rows / ROWS * ROWS).step_by(ROWS) {
            for k in 0..depth {
                blocks.push(std::array::from_fn(|i| value(first + i, k)));
            }
        }
        let rest = (rows / ROWS * ROWS..rows).flat_map(|row| (0..depth).map(move |k| (row, k)));
        Self { rows, depth, blocks, rest: rest.map(|(row, k)| [value(row, k)]).collect() }
    }
}

/// Consecutive vectors that an output pixel reads, from its own start on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// First vector.
    pub start: usize,
    /// Vectors.
    pub len: usize,
}

/// Where the pixels of a rectangle lie, in vectors.
#[derive(Clone, Copy, Debug)]
pub struct Grid {
    /// Rows of the rectangle.
    pub rows: usize,
    /// Columns of the rectangle.
    pub columns: usize,
    /// First pixel, step to the next row and to the next column where values are read.
    pub from: [usize; 3],
    /// The same where they are written.
    pub to: [usize; 3],
}

impl Grid {
    fn at(&self, pixel: usize, [first, row, column]: [usize; 3]) -> usize {
        first + pixel / self.columns * row + pixel % self.columns * column
    }
}

/// `out[p][r] = bias[r] + Σ_k a[r][k]·x[p][k]` for every pixel `p`, where `x[p]` are the segments' vectors in order.
pub fn multiply(
    a: &Packed,
    x: &[f32],
    segments: &[Segment],
    bias: Option<&[f32]>,
    grid: Grid,
    out: &mut [f32],
) {
    assert_eq!(segments.iter().map(|s| s.len).sum::<usize>(), a.depth);
    Arch::new().dispatch(Multiply { a, x, segments, bias, grid, out });
}

struct Multiply<'a> {
    a: &'a Packed,
    x: &'a [f32],
    segments: &'a [Segment],
    bias: Option<&'a [f32]>,
    grid: Grid,
    out: &'a mut [f32],
}

impl WithSimd for Multiply<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let pixels = self.grid.rows * self.grid.columns;
        let (x, (out, _)) = (S::as_simd_f32s(self.x).0, S::as_mut_simd_f32s(self.out));
        let work = Pixels { a: self.a, segments: self.segments, bias: self.bias };
        let mut pixel = 0;
        while pixel < pixels {
            if pixels < COLUMNS {
                let at = |place| [self.grid.at(pixel, place)];
                work.run::<S, 1>(simd, x, at(self.grid.from), at(self.grid.to), out);
                pixel += 1;
                continue;
            }
            let first = pixel.min(pixels - COLUMNS);
            let at = |place| std::array::from_fn(|i| self.grid.at(first + i, place));
            work.run::<S, COLUMNS>(simd, x, at(self.grid.from), at(self.grid.to), out);
            pixel += COLUMNS;
        }
    }
}

struct Pixels<'a> {
    a: &'a Packed,
    segments: &'a [Segment],
    bias: Option<&'a [f32]>,
}

impl Pixels<'_> {
    /// All output channels of `P` pixels.
    #[inline(always)]
    fn run<S: Simd, const P: usize>(
        &self,
        simd: S,
        x: &[S::f32s],
        from: [usize; P],
        to: [usize; P],
        out: &mut [S::f32s],
    ) {
        let depth = self.a.depth;
        for row in (0..self.a.rows / ROWS * ROWS).step_by(ROWS) {
            let weights = &self.a.blocks[row / ROWS * depth..][..depth];
            self.tile(simd, x, from, to, row, weights, out);
        }
        let first = self.a.rows / ROWS * ROWS;
        for row in first..self.a.rows {
            let weights = &self.a.rest[(row - first) * depth..][..depth];
            self.tile(simd, x, from, to, row, weights, out);
        }
    }

    #[inline(always)]
    #[expect(clippy::too_many_arguments, reason = "one place to keep the tile in registers")]
    fn tile<S: Simd, const P: usize, const R: usize>(
        &self,
        simd: S,
        x: &[S::f32s],
        from: [usize; P],
        to: [usize; P],
        row: usize,
        mut weights: &[[f32; R]],
        out: &mut [S::f32s],
    ) {
        let mut tile = [[simd.splat_f32s(0.0); P]; R];
        if let Some(bias) = self.bias {
            for (tile, bias) in tile.iter_mut().zip(&bias[row..row + R]) {
                *tile = [simd.splat_f32s(*bias); P];
            }
        }
        for segment in self.segments {
            let (now, later) = weights.split_at(segment.len);
            weights = later;
            let mut inputs = [&x[..0]; P];
            for (input, from) in inputs.iter_mut().zip(from) {
                *input = &x[from + segment.start..][..now.len()];
            }
            for (k, weights) in now.iter().enumerate() {
                let mut values = [simd.splat_f32s(0.0); P];
                for (value, input) in values.iter_mut().zip(inputs) {
                    *value = input[k];
                }
                for (tile, weight) in tile.iter_mut().zip(weights) {
                    let weight = simd.splat_f32s(*weight);
                    for (sum, value) in tile.iter_mut().zip(values) {
                        *sum = simd.mul_add_e_f32s(weight, value, *sum);
                    }
                }
            }
        }
        for (p, to) in to.into_iter().enumerate() {
            for (to, tile) in out[to + row..][..R].iter_mut().zip(&tile) {
                *to = tile[p];
            }
        }
    }
}

/// Pixels of one row: where its gradient and the input that belongs to it start, in vectors.
#[derive(Clone, Copy, Debug)]
pub struct Row {
    /// Gradient of the output.
    pub gradient: usize,
    /// Input.
    pub input: usize,
}

/// Rows of pixels and the steps from one pixel to the next, in vectors.
#[derive(Clone, Copy)]
pub struct Rows<'a> {
    /// The rows.
    pub rows: &'a [Row],
    /// Pixels per row.
    pub columns: usize,
    /// Step in the gradient.
    pub gradient_step: usize,
    /// Step in the input.
    pub input_step: usize,
}

/// `sum[r][k] += Σ_p gradient[p][r]·x[p][k]`, vector by vector, for the channels `r` of `channels` and the taps `k`
/// of `segments`; `sum` is `[channels, taps]`.
pub fn correlate(
    gradient: &[f32],
    x: &[f32],
    channels: std::ops::Range<usize>,
    segments: &[Segment],
    rows: Rows,
    sum: &mut [f32],
) {
    Arch::new().dispatch(Correlate { gradient, x, channels, segments, rows, sum });
}

struct Correlate<'a> {
    gradient: &'a [f32],
    x: &'a [f32],
    channels: std::ops::Range<usize>,
    segments: &'a [Segment],
    rows: Rows<'a>,
    sum: &'a mut [f32],
}

impl WithSimd for Correlate<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let (gradient, x) = (S::as_simd_f32s(self.gradient).0, S::as_simd_f32s(self.x).0);
        let (sum, _) = S::as_mut_simd_f32s(self.sum);
        let depth: usize = self.segments.iter().map(|s| s.len).sum();
        let work = Taps { gradient, x, rows: self.rows, depth };
        let mut first = 0;
        for segment in self.segments {
            for (i, channel) in self.channels.clone().enumerate().step_by(ROWS) {
                let sum = &mut sum[i * depth + first..];
                if self.channels.end - channel >= ROWS {
                    work.run::<S, ROWS>(simd, channel, *segment, sum);
                } else {
                    for (row, channel) in (channel..self.channels.end).enumerate() {
                        work.run::<S, 1>(simd, channel, *segment, &mut sum[row * depth..]);
                    }
                }
            }
            first += segment.len;
        }
    }
}

struct Taps<'a, V> {
    gradient: &'a [V],
    x: &'a [V],
    rows: Rows<'a>,
    depth: usize,
}

impl<V: Copy> Taps<'_, V> {
    #[inline(always)]
    fn run<S: Simd<f32s = V>, const R: usize>(&self, simd: S, channel: usize, segment: Segment, sum: &mut [V]) {
        let mut k = 0;
        while k + COLUMNS <= segment.len {
            self.tile::<S, R, COLUMNS>(simd, channel, segment.start + k, &mut sum[k..]);
            k += COLUMNS;
        }
        while k < segment.len {
            self.tile::<S, R, 1>(simd, channel, segment.start + k, &mut sum[k..]);
            k += 1;
        }
    }

    #[inline(always)]
    fn tile<S: Simd<f32s = V>, const R: usize, const T: usize>(
        &self,
        simd: S,
        channel: usize,
        tap: usize,
        sum: &mut [V],
    ) {
        let mut tile = [[simd.splat_f32s(0.0); T]; R];
        for (r, tile) in tile.iter_mut().enumerate() {
            tile.copy_from_slice(&sum[r * self.depth..][..T]);
        }
        for row in self.rows.rows {
            let (mut gradient_at, mut x_at) = (row.gradient + channel, row.input + tap);
            for _ in 0..self.rows.columns {
                let (gradient, x) = (&self.gradient[gradient_at..][..R], &self.x[x_at..][..T]);
                gradient_at += self.rows.gradient_step;
                x_at += self.rows.input_step;
                for (tile, gradient) in tile.iter_mut().zip(gradient) {
                    for (sum, x) in tile.iter_mut().zip(x) {
                        *sum = simd.mul_add_e_f32s(*gradient, *x, *sum);
                    }
                }
            }
        }
        for (r, tile) in tile.iter().enumerate() {
            sum[r * self.depth..][..T].copy_from_slice(tile);
        }
    }
}
