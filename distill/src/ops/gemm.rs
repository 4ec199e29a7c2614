//! The inner loops of convolution: small register tiles over a padded image, by SIMD found at run time (`pulp`).
//!
//! Both read the image through a table of offsets, one per input channel and kernel tap, so that no `im2col` copy is
//! made. Must not know about tensors or threads.

use pulp::{Arch, Simd, WithSimd};

/// Rows of output channels in a tile.
const ROWS: usize = 6;
/// Vectors of pixels in a forward tile.
const COLUMNS: usize = 2;
/// Rows of output channels in a tile of weight gradients.
const GRADIENT_ROWS: usize = 4;
/// Kernel taps in a tile of weight gradients.
const TAPS: usize = 3;
/// Floats in the widest tile: 16 lanes.
const WIDEST: usize = COLUMNS * 16;

/// A matrix `[rows, depth]` stored in blocks of [`ROWS`] rows, depth by depth.
pub struct Packed {
    rows: usize,
    depth: usize,
    data: Vec<f32>,
}

impl Packed {
    /// Packs `value(row, k)`.
    pub fn new(rows: usize, depth: usize, value: impl Fn(usize, usize) -> f32) -> Self {
        let mut data = vec![0.0; rows.div_ceil(ROWS) * ROWS * depth];
        for (block, chunk) in data.chunks_exact_mut(ROWS * depth).enumerate() {
            for (k, column) in chunk.chunks_exact_mut(ROWS).enumerate() {
                for (i, v) in column.iter_mut().enumerate() {
                    let row = block * ROWS + i;
                    if row < rows {
                        *v = value(row, k);
                    }
                }
            }
        }
        Self { rows, depth, data }
    }
}

/// Length of a row of the buffer that [`multiply`] fills, for `pixels` pixels.
pub fn row_length(pixels: usize) -> usize {
    pixels.next_multiple_of(WIDEST)
}

/// `out[r][j] = bias[r] + Σ_k a[r][k]·image[offsets[k] + j]` for `j < pixels`; `out` has rows of
/// [`row_length`]`(pixels)`, and `image` at least [`row_length`] floats after every offset.
pub fn multiply(
    a: &Packed,
    image: &[f32],
    offsets: &[usize],
    bias: Option<&[f32]>,
    pixels: usize,
    out: &mut [f32],
) {
    assert_eq!(offsets.len(), a.depth);
    Arch::new().dispatch(Multiply { a, image, offsets, bias, pixels, out });
}

struct Multiply<'a> {
    a: &'a Packed,
    image: &'a [f32],
    offsets: &'a [usize],
    bias: Option<&'a [f32]>,
    pixels: usize,
    out: &'a mut [f32],
}

impl WithSimd for Multiply<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { a, image, offsets, bias, pixels, out } = self;
        let width = COLUMNS * S::F32_LANES;
        let pitch = row_length(pixels);
        for j in (0..pixels).step_by(width) {
            for (block, weights) in a.data.chunks_exact(ROWS * a.depth).enumerate() {
                let first = block * ROWS;
                let mut tile = [[simd.splat_f32s(0.0); COLUMNS]; ROWS];
                if let Some(bias) = bias {
                    for (row, tile) in tile.iter_mut().enumerate() {
                        *tile = [simd.splat_f32s(bias.get(first + row).copied().unwrap_or(0.0)); COLUMNS];
                    }
                }
                for (column, &offset) in weights.chunks_exact(ROWS).zip(offsets) {
                    let (x, _) = S::as_simd_f32s(&image[offset + j..offset + j + width]);
                    let x = [x[0], x[1]];
                    for (tile, &weight) in tile.iter_mut().zip(column) {
                        let weight = simd.splat_f32s(weight);
                        for (sum, x) in tile.iter_mut().zip(x) {
                            *sum = simd.mul_add_f32s(weight, x, *sum);
                        }
                    }
                }
                for (row, tile) in tile.iter().enumerate().take(a.rows - first) {
                    let start = (first + row) * pitch + j;
                    let (to, _) = S::as_mut_simd_f32s(&mut out[start..start + width]);
                    to.copy_from_slice(tile);
                }
            }
        }
    }
}

/// `sum[r·offsets + k] += Σ_j a[r·pitch + j]·image[offsets[k] + j]` for `j < pitch`, with `pitch` a multiple of 16.
pub fn correlate(a: &[f32], pitch: usize, image: &[f32], offsets: &[usize], sum: &mut [f32]) {
    assert_eq!(pitch % 16, 0);
    Arch::new().dispatch(Correlate { a, pitch, image, offsets, sum });
}

struct Correlate<'a> {
    a: &'a [f32],
    pitch: usize,
    image: &'a [f32],
    offsets: &'a [usize],
    sum: &'a mut [f32],
}

impl WithSimd for Correlate<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { a, pitch, image, offsets, sum } = self;
        let rows = a.len() / pitch;
        let row = |r: usize| S::as_simd_f32s(&a[r.min(rows - 1) * pitch..][..pitch]).0;
        for first in (0..rows).step_by(GRADIENT_ROWS) {
            let g = [row(first), row(first + 1), row(first + 2), row(first + 3)];
            for (block, taps) in offsets.chunks(TAPS).enumerate() {
                let tap = |k: usize| S::as_simd_f32s(&image[taps[k.min(taps.len() - 1)]..][..pitch]).0;
                let x = [tap(0), tap(1), tap(2)];
                let mut tile = [[simd.splat_f32s(0.0); TAPS]; GRADIENT_ROWS];
                let (g0, g1, g2, g3, x0, x1, x2) = (g[0], g[1], g[2], g[3], x[0], x[1], x[2]);
                for ((((((g0, g1), g2), g3), x0), x1), x2) in
                    g0.iter().zip(g1).zip(g2).zip(g3).zip(x0).zip(x1).zip(x2)
                {
                    for (tile, g) in tile.iter_mut().zip([g0, g1, g2, g3]) {
                        for (sum, x) in tile.iter_mut().zip([x0, x1, x2]) {
                            *sum = simd.mul_add_f32s(*g, *x, *sum);
                        }
                    }
                }
                for (r, tile) in tile.iter().enumerate().take(rows - first) {
                    for (k, value) in tile.iter().enumerate().take(taps.len()) {
                        sum[(first + r) * offsets.len() + block * TAPS + k] += simd.reduce_sum_f32s(*value);
                    }
                }
            }
        }
    }
}
