//! The two inner loops of convolution, as small register tiles over vectors of images.
//! Must not know about images, padding or threads.

use pulp::{Simd, WithSimd};

use super::memory::Buffer;
use super::simd::{dispatch, lanes};

/// Pixels in a tile.
const PIXELS: usize = 2;
/// Channels in a tile of sums.
const CHANNELS: usize = 4;
/// Kernel taps in a tile of sums.
const TAPS: usize = 3;
/// Pixels that are packed at a time for sums: with [`SUM_TILES`] they fit the first cache.
const SUM_PIXELS: usize = 64;
/// Tiles of taps that are packed at a time for sums.
const SUM_TILES: usize = 2;

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
    dispatch(Multiply { a, x, segments, bias, grid, out });
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

/// A product of two matrices of vectors, vector by vector: sums over pixels of the products of every gradient channel
/// with every kernel tap.
pub struct Sums {
    channels: usize,
    taps: usize,
    /// Tile by tile: `[channels / CHANNELS, taps / TAPS, CHANNELS, TAPS]` vectors.
    data: Buffer,
}

/// A matrix `[pixels, channels]` of vectors.
#[derive(Clone, Copy)]
pub struct Matrix<'a> {
    /// Where the vectors are.
    pub data: &'a [f32],
    /// First vector, step to the next row of pixels, to the next pixel and to the next channel, in vectors.
    pub place: [usize; 4],
}

impl Matrix<'_> {
    fn at(&self, pixel: usize, columns: usize) -> usize {
        self.place[0] + pixel / columns * self.place[1] + pixel % columns * self.place[2]
    }
}

impl Sums {
    /// Zeros for `channels` channels and `taps` taps.
    pub fn new(channels: usize, taps: usize) -> Self {
        let tiles = channels.div_ceil(CHANNELS) * taps.div_ceil(TAPS);
        Self { channels, taps, data: Buffer::zeros(tiles * CHANNELS * TAPS * lanes()) }
    }

    /// `sum[r][k] += Σ_p gradient[p][r]·x[p][k]` over `rows` rows of `columns` pixels.
    pub fn correlate(&mut self, gradient: Matrix, x: Matrix, [rows, columns]: [usize; 2]) {
        let (channels, taps) = (self.channels.div_ceil(CHANNELS), self.taps.div_ceil(TAPS).min(SUM_TILES));
        let packed_gradient = &mut Buffer::zeros(channels * CHANNELS * SUM_PIXELS * lanes());
        let packed_x = &mut Buffer::zeros(taps * TAPS * SUM_PIXELS * lanes());
        let pixels = rows * columns;
        dispatch(Correlate { sums: self, gradient, x, pixels, columns, packed_gradient, packed_x });
    }

    /// `out[first + r·pitch + k] = factor·sum[r][k]`, vector by vector.
    pub fn store(&self, factor: f32, out: &mut [f32], first: usize, pitch: usize) {
        let (lanes, tiles) = (lanes(), self.taps.div_ceil(TAPS));
        for (i, row) in self.data.chunks_exact(TAPS * lanes).enumerate() {
            let (tile, channel) = (i / CHANNELS, i % CHANNELS);
            let (r, k) = (tile / tiles * CHANNELS + channel, tile % tiles * TAPS);
            if r < self.channels {
                let width = (self.taps - k).min(TAPS);
                let out = &mut out[(first + r * pitch + k) * lanes..][..width * lanes];
                out.iter_mut().zip(row).for_each(|(out, sum)| *out = factor * sum);
            }
        }
    }

    /// All sums over images too, `[channels, taps]`.
    pub fn total(&self) -> Vec<f32> {
        let (lanes, tiles) = (lanes(), self.taps.div_ceil(TAPS));
        let sum = |channel: usize, tap: usize| -> f32 {
            let tile = channel / CHANNELS * tiles + tap / TAPS;
            let vector = (tile * CHANNELS + channel % CHANNELS) * TAPS + tap % TAPS;
            self.data[vector * lanes..][..lanes].iter().sum()
        };
        (0..self.channels * self.taps).map(|i| sum(i / self.taps, i % self.taps)).collect()
    }
}

struct Correlate<'a> {
    sums: &'a mut Sums,
    gradient: Matrix<'a>,
    x: Matrix<'a>,
    pixels: usize,
    columns: usize,
    packed_gradient: &'a mut [f32],
    packed_x: &'a mut [f32],
}

impl WithSimd for Correlate<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let (gradient, x) = (S::as_simd_f32s(self.gradient.data).0, S::as_simd_f32s(self.x.data).0);
        let packed_gradient = S::as_mut_simd_f32s(self.packed_gradient).0.as_chunks_mut::<CHANNELS>().0;
        let packed_x = S::as_mut_simd_f32s(self.packed_x).0.as_chunks_mut::<TAPS>().0;
        let (channels, taps) = (self.sums.channels, self.sums.taps);
        let (rows, _) = S::as_mut_simd_f32s(&mut self.sums.data).0.as_chunks_mut::<TAPS>();
        let (tiles, _) = rows.as_chunks_mut::<CHANNELS>();
        for first in (0..self.pixels).step_by(SUM_PIXELS) {
            let pixels = first..self.pixels.min(first + SUM_PIXELS);
            let count = pixels.len();
            let from = pixels.clone().map(|pixel| self.gradient.at(pixel, self.columns));
            pack(gradient, from, channels, self.gradient.place[3], packed_gradient);
            for tap in (0..taps).step_by(TAPS * SUM_TILES) {
                let width = (taps - tap).min(TAPS * SUM_TILES);
                let part = tap / TAPS..(tap + width).div_ceil(TAPS);
                let step = self.x.place[3];
                let from = pixels.clone().map(|pixel| self.x.at(pixel, self.columns) + tap * step);
                pack(x, from, width, step, packed_x);
                for (row, gradient) in
                    tiles.chunks_exact_mut(taps.div_ceil(TAPS)).zip(packed_gradient.chunks_exact(count))
                {
                    for (tile, x) in row[part.clone()].iter_mut().zip(packed_x.chunks_exact(count)) {
                        correlate_tile(simd, tile, gradient, x);
                    }
                }
            }
        }
    }
}

/// Copies `width` vectors per pixel, at distance `step`, into blocks of `B`, and in each block pixel by pixel.
#[inline(always)]
fn pack<V: Copy, const B: usize>(
    x: &[V],
    from: impl ExactSizeIterator<Item = usize>,
    width: usize,
    step: usize,
    out: &mut [[V; B]],
) {
    let pixels = from.len();
    for (pixel, from) in from.enumerate() {
        if step == 1 {
            let (whole, rest) = x[from..][..width].as_chunks::<B>();
            for (block, vectors) in whole.iter().enumerate() {
                out[block * pixels + pixel] = *vectors;
            }
            if !rest.is_empty() {
                out[whole.len() * pixels + pixel][..rest.len()].copy_from_slice(rest);
            }
        } else {
            for i in 0..width {
                out[i / B * pixels + pixel][i % B] = x[from + i * step];
            }
        }
    }
}

/// `tile[r][t] += Σ_p gradient[p][r]·x[p][t]`.
#[inline(always)]
fn correlate_tile<S: Simd>(
    simd: S,
    tile: &mut [[S::f32s; TAPS]; CHANNELS],
    gradient: &[[S::f32s; CHANNELS]],
    x: &[[S::f32s; TAPS]],
) {
    let mut sums = *tile;
    for (gradient, x) in gradient.iter().zip(x) {
        for (row, gradient) in sums.iter_mut().zip(gradient) {
            for (sum, x) in row.iter_mut().zip(x) {
                *sum = simd.mul_add_e_f32s(*gradient, *x, *sum);
            }
        }
    }
    *tile = sums;
}
