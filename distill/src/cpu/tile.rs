//! The two inner loops of convolution, as small register tiles over vectors of images.
//! Must not know about images, padding or threads.

use pulp::{Arch, Simd, WithSimd};

/// Pixels in a tile.
const PIXELS: usize = 2;
/// Output channels in a tile of weight gradients.
pub const CHANNELS: usize = 4;
/// Kernel taps in a tile of weight gradients.
const TAPS: usize = 3;

/// A matrix `[rows, depth]`, stored in blocks of rows, and in each block depth by depth.
pub struct Packed {
    rows: usize,
    depth: usize,
    data: Vec<f32>,
}

impl Packed {
    /// Packs `value(row, k)`.
    pub fn new(rows: usize, depth: usize, value: impl Fn(usize, usize) -> f32) -> Self {
        let mut data = Vec::with_capacity(rows * depth);
        for (first, count) in blocks(rows) {
            for k in 0..depth {
                data.extend((first..first + count).map(|row| value(row, k)));
            }
        }
        Self { rows, depth, data }
    }
}

/// First row and size of the blocks of rows: 6, then 4, which keep the processor's registers full, then 1.
fn blocks(rows: usize) -> impl Iterator<Item = (usize, usize)> {
    let mut first = 0;
    std::iter::from_fn(move || {
        let size = match rows - first {
            0 => return None,
            1..=3 => 1,
            4 | 5 | 8 => 4,
            _ => 6,
        };
        first += size;
        Some((first - size, size))
    })
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
        for first in (0..pixels).step_by(PIXELS) {
            let at = |place| std::array::from_fn(|i| self.grid.at((first + i).min(pixels - 1), place));
            work.run(simd, x, at(self.grid.from), at(self.grid.to), out);
        }
    }
}

struct Pixels<'a> {
    a: &'a Packed,
    segments: &'a [Segment],
    bias: Option<&'a [f32]>,
}

impl Pixels<'_> {
    /// All output channels of some pixels.
    #[inline(always)]
    fn run<S: Simd>(
        &self,
        simd: S,
        x: &[S::f32s],
        from: [usize; PIXELS],
        to: [usize; PIXELS],
        out: &mut [S::f32s],
    ) {
        for (row, count) in blocks(self.a.rows) {
            match count {
                6 => self.tile::<S, 6>(simd, x, from, to, row, out),
                4 => self.tile::<S, 4>(simd, x, from, to, row, out),
                _ => self.tile::<S, 1>(simd, x, from, to, row, out),
            }
        }
    }

    #[inline(always)]
    fn tile<S: Simd, const R: usize>(
        &self,
        simd: S,
        x: &[S::f32s],
        from: [usize; PIXELS],
        to: [usize; PIXELS],
        row: usize,
        out: &mut [S::f32s],
    ) {
        let depth = self.a.depth;
        let (mut weights, _) = self.a.data[row * depth..(row + R) * depth].as_chunks::<R>();
        let mut tile = [[simd.splat_f32s(0.0); PIXELS]; R];
        if let Some(bias) = self.bias {
            for (tile, bias) in tile.iter_mut().zip(&bias[row..row + R]) {
                *tile = [simd.splat_f32s(*bias); PIXELS];
            }
        }
        for segment in self.segments {
            let (now, later) = weights.split_at(segment.len);
            weights = later;
            let [first, second] = from.map(|from| &x[from + segment.start..][..segment.len]);
            for ((weights, first), second) in now.iter().zip(first).zip(second) {
                for (tile, weight) in tile.iter_mut().zip(weights) {
                    let weight = simd.splat_f32s(*weight);
                    tile[0] = simd.mul_add_e_f32s(weight, *first, tile[0]);
                    tile[1] = simd.mul_add_e_f32s(weight, *second, tile[1]);
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
            for (i, channel) in self.channels.clone().enumerate().step_by(CHANNELS) {
                let sum = &mut sum[i * depth + first..];
                if self.channels.end - channel >= CHANNELS {
                    work.run::<S, CHANNELS>(simd, channel, *segment, sum);
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
    fn run<S: Simd<f32s = V>, const R: usize>(
        &self,
        simd: S,
        channel: usize,
        segment: Segment,
        sum: &mut [V],
    ) {
        let mut k = 0;
        while k + TAPS <= segment.len {
            self.tile::<S, R, TAPS>(simd, channel, segment.start + k, &mut sum[k..]);
            k += TAPS;
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
        let [gradient_step, input_step] = [self.rows.gradient_step, self.rows.input_step];
        for row in self.rows.rows {
            let (gradient, x) = (&self.gradient[row.gradient + channel..], &self.x[row.input + tap..]);
            if gradient_step >= R && input_step >= T {
                let before = self.rows.columns - 1;
                let pixels = gradient[..before * gradient_step].chunks_exact(gradient_step);
                for (gradient, x) in pixels.zip(x[..before * input_step].chunks_exact(input_step)) {
                    accumulate(simd, &mut tile, &gradient[..R], &x[..T]);
                }
                accumulate(
                    simd,
                    &mut tile,
                    &gradient[before * gradient_step..][..R],
                    &x[before * input_step..][..T],
                );
            } else {
                for column in 0..self.rows.columns {
                    let (gradient, x) = (&gradient[column * gradient_step..], &x[column * input_step..]);
                    accumulate(simd, &mut tile, &gradient[..R], &x[..T]);
                }
            }
        }
        for (r, tile) in tile.iter().enumerate() {
            sum[r * self.depth..][..T].copy_from_slice(tile);
        }
    }
}

/// `tile[r][t] += gradient[r]·x[t]`.
#[inline(always)]
fn accumulate<S: Simd, const R: usize, const T: usize>(
    simd: S,
    tile: &mut [[S::f32s; T]; R],
    gradient: &[S::f32s],
    x: &[S::f32s],
) {
    for (tile, gradient) in tile.iter_mut().zip(gradient) {
        for (sum, x) in tile.iter_mut().zip(x) {
            *sum = simd.mul_add_e_f32s(*gradient, *x, *sum);
        }
    }
}
