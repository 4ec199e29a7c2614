//! Products of matrices, in tiles of registers: the left one packed in blocks of rows, the right one in panels of two
//! vectors' width.

use std::ops::Range;

use pulp::{Simd, WithSimd};

use super::simd::{dispatch, lanes};
use crate::parallel;

/// Bytes of panels that are gone through together while the left matrix streams by.
const GROUP: usize = 64 << 10;
/// Multiply-adds in the time of moving one value.
pub const MOVING: usize = 8;
/// Rows of the largest tile. Without fused multiplication and addition a product needs a register of its own.
const ROWS: usize =
    if cfg!(all(target_family = "wasm", not(target_feature = "relaxed-simd"))) { 4 } else { 6 };

/// A matrix `[rows, depth]`, in blocks of rows, and in each block depth by depth.
pub struct Left {
    rows: usize,
    depth: usize,
    data: Vec<f32>,
}

impl Left {
    /// Packs a matrix whose value `(row, k)` is at `row·depth + k`.
    pub fn pack(rows: usize, depth: usize, values: &[f32]) -> Self {
        let mut left = Self { rows, depth, data: Vec::new() };
        left.repack(values);
        left
    }

    /// Packs other values of the same size into the same memory.
    pub fn repack(&mut self, values: &[f32]) {
        let (rows, depth) = (self.rows, self.depth);
        self.data.resize(rows * depth, 0.0);
        let parts = parallel::parts(MOVING * rows * depth);
        let tasks = shares(rows, parts, &mut self.data, depth);
        parallel::each(parts, tasks, |(share, data)| {
            for (first, count) in blocks(rows).filter(|(row, _)| share.contains(row)) {
                let rows = &values[first * depth..(first + count) * depth];
                let block = &mut data[(first - share.start) * depth..][..count * depth];
                for (r, row) in rows.chunks_exact(depth.max(1)).enumerate() {
                    block.iter_mut().skip(r).step_by(count).zip(row).for_each(|(to, from)| *to = *from);
                }
            }
        });
    }

    /// Rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Columns, which are the right matrix's rows.
    pub fn depth(&self) -> usize {
        self.depth
    }
}

/// First row and size of the blocks of rows.
fn blocks(rows: usize) -> impl Iterator<Item = (usize, usize)> {
    let mut first = 0;
    std::iter::from_fn(move || {
        let size = match rows - first {
            0 => return None,
            1 => 1,
            2 | 3 => 2,
            4 | 5 | 8 | 9 => 4,
            _ => ROWS,
        };
        first += size;
        Some((first - size, size))
    })
}

/// Runs of whole blocks of rows, of about the same size, each with its part of `values`, where a row takes `stride`.
fn shares(
    rows: usize,
    parts: usize,
    mut values: &mut [f32],
    stride: usize,
) -> impl Iterator<Item = (Range<usize>, &mut [f32])> {
    let (mut blocks, mut end) = (blocks(rows), 0);
    (1..=parts).filter_map(move |part| {
        let first = end;
        while end < rows * part / parts {
            end += blocks.next()?.1;
        }
        let len = ((end - first) * stride).min(values.len());
        (end > first).then(|| (first..end, values.split_off_mut(..len).unwrap_or_default()))
    })
}

/// Columns of a panel.
pub fn width() -> usize {
    2 * lanes()
}

/// Columns with those that fill the last panel.
pub fn padded(columns: usize) -> usize {
    columns.checked_next_multiple_of(width()).unwrap_or(columns)
}

/// Packs a right matrix into panels. `fill` writes a range of columns of row `k`, to memory that is zero in the first call and else
/// holds what it wrote before; `row` has room for `padded(columns)`.
pub fn pack(
    [depth, columns]: [usize; 2],
    panels: &mut [f32],
    row: &mut [f32],
    fill: impl Fn(usize, Range<usize>, &mut [f32]) + Send + Sync,
) {
    let parts = parallel::parts(MOVING * depth * columns);
    let each = padded(columns.div_ceil(parts)).max(1);
    let tasks = panels.chunks_mut((each * depth).max(1)).zip(row[..padded(columns)].chunks_mut(each));
    parallel::each(parts, tasks.enumerate(), |(i, (panels, row))| {
        let first = i * each;
        row.fill(0.0);
        for k in 0..depth {
            fill(k, first..columns.min(first + each), row);
            pack_row(row, k, depth, panels);
        }
    });
}

/// Writes row `k` of the right matrix, filled up to `padded(columns)`, into its panels.
pub fn pack_row(row: &[f32], k: usize, depth: usize, panels: &mut [f32]) {
    struct Pack<'a>(&'a [f32], usize, usize, &'a mut [f32]);
    impl WithSimd for Pack<'_> {
        type Output = ();

        #[inline(always)]
        fn with_simd<S: Simd>(self, _: S) {
            let Self(row, k, depth, panels) = self;
            let row = S::as_simd_f32s(row).0.as_chunks::<2>().0;
            let panels = S::as_mut_simd_f32s(panels).0.as_chunks_mut::<2>().0;
            for (to, from) in panels.iter_mut().skip(k).step_by(depth).zip(row) {
                *to = *from;
            }
        }
    }
    dispatch(Pack(row, k, depth, panels));
}

/// Where a product goes: row `r` at `r·stride`.
pub struct Product<'a> {
    /// The values.
    pub out: &'a mut [f32],
    /// Distance of two rows.
    pub stride: usize,
    /// Columns.
    pub columns: usize,
}

/// `out = a·b (+ bias per row)`, with `b` in panels.
pub fn multiply(a: &Left, b: &[f32], bias: Option<&[f32]>, product: Product) {
    let Product { out, stride, columns } = product;
    let parts = parallel::parts(a.rows * a.depth * columns);
    parallel::each(parts, shares(a.rows, parts, out, stride), |(rows, out)| {
        dispatch(Multiply { a, b, bias, rows, product: Product { out, stride, columns } });
    });
}

struct Multiply<'a> {
    a: &'a Left,
    b: &'a [f32],
    bias: Option<&'a [f32]>,
    /// Of the left matrix; `product` begins with the first of them.
    rows: Range<usize>,
    product: Product<'a>,
}

impl WithSimd for Multiply<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, simd: S) {
        let panels = self.product.columns.div_ceil(2 * S::F32_LANES);
        let group = (GROUP / (self.a.depth * 2 * S::F32_LANES * 4).max(1)).max(1);
        for first in (0..panels).step_by(group) {
            let rows = self.rows.clone();
            for (row, count) in blocks(self.a.rows).filter(|(row, _)| rows.contains(row)) {
                for panel in first..panels.min(first + group) {
                    match count {
                        6 => self.tile::<S, 6>(simd, row, panel),
                        4 => self.tile::<S, 4>(simd, row, panel),
                        2 => self.tile::<S, 2>(simd, row, panel),
                        _ => self.tile::<S, 1>(simd, row, panel),
                    }
                }
            }
        }
    }
}

impl Multiply<'_> {
    #[inline(always)]
    fn tile<S: Simd, const R: usize>(&mut self, simd: S, row: usize, panel: usize) {
        let (depth, width) = (self.a.depth, 2 * S::F32_LANES);
        let weights = self.a.data[row * depth..(row + R) * depth].as_chunks::<R>().0;
        let b =
            S::as_simd_f32s(&self.b[panel * depth * width..(panel + 1) * depth * width]).0.as_chunks::<2>().0;
        let mut tile = [[simd.splat_f32s(0.0); 2]; R];
        if let Some(bias) = self.bias {
            for (tile, bias) in tile.iter_mut().zip(&bias[row..row + R]) {
                *tile = [simd.splat_f32s(*bias); 2];
            }
        }
        for (weights, b) in weights.iter().zip(b) {
            for (tile, weight) in tile.iter_mut().zip(weights) {
                let weight = simd.splat_f32s(*weight);
                tile[0] = simd.mul_add_e_f32s(weight, b[0], tile[0]);
                tile[1] = simd.mul_add_e_f32s(weight, b[1], tile[1]);
            }
        }
        let Product { out, stride, columns } = &mut self.product;
        let count = (*columns - panel * width).min(width);
        for (r, tile) in tile.iter().enumerate() {
            let out = &mut out[(row - self.rows.start + r) * *stride + panel * width..][..count];
            if count == width {
                S::as_mut_simd_f32s(out).0.copy_from_slice(tile);
            } else {
                let values: &[f32] = pulp::bytemuck::cast_slice(tile);
                out.iter_mut().zip(values).for_each(|(to, from)| *to = *from);
            }
        }
    }
}
