//! Convolution with a 3x3 kernel, stride 1 and a margin of 1 by Winograd's F(2x2, 3x3): 16 products for 4 outputs instead
//! of 36 (Lavin and Gray 2016, arXiv:1509.09308). Tiles are numbered row by row.

use pulp::{Simd, WithSimd};

use super::gemm::{self, Left, Product};
use super::simd::{dispatch, lanes, load, store};
use crate::parallel;

/// Positions in a transformed tile.
const POSITIONS: usize = 16;
/// Multiply-adds in the time of making a tile's pixels of its products.
const RESTORING: usize = 64;

/// Transformed weights, one matrix `[out, in]` per position.
pub struct Winograd {
    weights: Vec<Left>,
    channels: [usize; 2],
    image: [usize; 2],
}

/// Sizes in floats of the parts of the scratch memory.
struct Parts {
    panels: usize,
    products: usize,
    row: usize,
    tiles: usize,
}

impl Winograd {
    /// Multiplications per input and output channel for images of this size.
    pub fn cost([h, w]: [usize; 2]) -> usize {
        POSITIONS * gemm::padded(h.div_ceil(2) * w.div_ceil(2))
    }

    /// Transforms weights `[out, in, 3, 3]`.
    pub fn new(weights: &[f32], [out, input]: [usize; 2], image: [usize; 2]) -> Self {
        let mut one = vec![0.0; out * input];
        let weights = (0..POSITIONS)
            .map(|position| {
                let (up, across) = (row_of(position / 4), row_of(position % 4));
                for (to, g) in one.iter_mut().zip(weights.as_chunks::<9>().0) {
                    *to = (0..3).map(|y| up[y] * (0..3).map(|x| across[x] * g[3 * y + x]).sum::<f32>()).sum();
                }
                Left::pack(out, input, &one)
            })
            .collect();
        Self { weights, channels: [out, input], image }
    }

    fn grid(&self) -> [usize; 2] {
        self.image.map(|side| side.div_ceil(2))
    }

    fn parts(&self) -> Parts {
        let [out, input] = self.channels;
        let [rows, columns] = self.grid();
        let tiles = gemm::padded(rows * columns);
        // Vectors are written over the end of a row of tiles, and read over the end of a row of pixels.
        let row = columns + 1 + lanes();
        Parts { panels: POSITIONS * input * tiles, products: POSITIONS * out * tiles, row, tiles }
    }

    /// Floats of scratch memory.
    pub fn scratch(&self) -> usize {
        let Parts { panels, products, row, tiles } = self.parts();
        let [planes, pixels] = [4 * (tiles + lanes()), 2 * row * (2 * self.grid()[0] + 2)];
        let before = pixels + POSITIONS * (tiles + lanes());
        panels + products + (before * parallel::MOST.min(4)).max(planes * parallel::MOST)
    }

    /// One image.
    pub fn run(&self, x: &[f32], bias: &[f32], out: &mut [f32], scratch: &mut [f32]) {
        let Parts { panels, products, row, tiles } = self.parts();
        let ([outputs, input], grid, [h, w]) = (self.channels, self.grid(), self.image);
        let (panels, rest) = scratch.split_at_mut(panels);
        let (products, rest) = rest.split_at_mut(products);

        // Each part makes one, two or all four of the rows of positions.
        let parts = match parallel::parts(POSITIONS * outputs * input * tiles) {
            1 => 1,
            2 => 2,
            _ => 4,
        };
        let positions = POSITIONS / parts;
        let pixels = 2 * row * (2 * grid[0] + 2);
        let tasks = panels
            .chunks_exact_mut(positions * input * tiles)
            .zip(products.chunks_exact_mut(positions * outputs * tiles))
            .zip(rest.chunks_exact_mut(pixels + POSITIONS * (tiles + lanes())));
        parallel::each(parts, tasks.enumerate(), |(i, ((panels, products), memory))| {
            let (pixels, values) = memory.split_at_mut(pixels);
            let values = &mut values[..positions * (tiles + lanes())];
            pixels.fill(0.0);
            values.fill(0.0);
            for (channel, x) in x.chunks_exact(h * w).enumerate() {
                split(x, w, row, pixels);
                dispatch(Transform { pixels, row, grid, part: [i, parts], positions: values, tiles });
                let panels = panels.chunks_exact_mut(input * tiles);
                for (values, panels) in values.chunks_exact(tiles + lanes()).zip(panels) {
                    gemm::pack_row(&values[..tiles], channel, input, panels);
                }
            }
            let panels = panels.chunks_exact(input * tiles);
            let products = products.chunks_exact_mut(outputs * tiles).zip(panels);
            for (weights, (out, panels)) in self.weights[i * positions..].iter().zip(products) {
                gemm::multiply(weights, panels, None, Product { out, stride: tiles, columns: tiles });
            }
        });

        let parts = parallel::parts(RESTORING * outputs * tiles);
        let channels = outputs.div_ceil(parts);
        let stride = tiles + lanes();
        let tasks = out
            .chunks_mut(channels * h * w)
            .zip(bias.chunks(channels))
            .zip(rest.chunks_exact_mut(4 * stride));
        parallel::each(parts, tasks.enumerate(), |(i, ((out, bias), planes))| {
            for (channel, (out, bias)) in out.chunks_exact_mut(h * w).zip(bias).enumerate() {
                let products = &products[(i * channels + channel) * tiles..];
                dispatch(Restore { products, each: outputs * tiles, tiles, bias: *bias, planes, stride });
                join(planes, stride, grid[1], w, out);
            }
        });
    }
}

/// A row of the matrix that weights are transformed with.
fn row_of(position: usize) -> [f32; 3] {
    [[1.0, 0.0, 0.0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0.0, 0.0, 1.0]][position]
}

/// Splits an image, with a margin of 1, into its even and its odd columns: per row of pixels `row` values of each.
fn split(x: &[f32], w: usize, row: usize, pixels: &mut [f32]) {
    for (x, pixels) in x.chunks_exact(w).zip(pixels[2 * row..].chunks_exact_mut(2 * row)) {
        let (even, odd) = pixels.split_at_mut(row);
        let (pairs, last) = x.as_chunks::<2>();
        for ((pair, even), odd) in pairs.iter().zip(&mut even[1..]).zip(odd.iter_mut()) {
            (*odd, *even) = (pair[0], pair[1]);
        }
        if let [last] = last {
            odd[pairs.len()] = *last;
        }
    }
}

/// Four vectors at equal distances.
#[inline(always)]
fn four<S: Simd>(from: &[f32], at: usize, step: usize) -> [S::f32s; 4] {
    [
        load::<S>(from, at),
        load::<S>(from, at + step),
        load::<S>(from, at + 2 * step),
        load::<S>(from, at + 3 * step),
    ]
}

/// One side of the transformation of a tile.
#[inline(always)]
fn transform<S: Simd>(simd: S, [a, b, c, d]: [S::f32s; 4]) -> [S::f32s; 4] {
    [simd.sub_f32s(a, c), simd.add_f32s(b, c), simd.sub_f32s(c, b), simd.sub_f32s(b, d)]
}

struct Transform<'a> {
    pixels: &'a [f32],
    row: usize,
    grid: [usize; 2],
    /// Which part of the positions, and of how many: whole rows of them.
    part: [usize; 2],
    positions: &'a mut [f32],
    tiles: usize,
}

impl WithSimd for Transform<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        match self.part {
            #[cfg(feature = "threads")]
            [0, 2] => self.rows::<S, 0, 2>(simd),
            #[cfg(feature = "threads")]
            [1, 2] => self.rows::<S, 2, 2>(simd),
            #[cfg(feature = "threads")]
            [0, 4] => self.rows::<S, 0, 1>(simd),
            #[cfg(feature = "threads")]
            [1, 4] => self.rows::<S, 1, 1>(simd),
            #[cfg(feature = "threads")]
            [2, 4] => self.rows::<S, 2, 1>(simd),
            #[cfg(feature = "threads")]
            [3, 4] => self.rows::<S, 3, 1>(simd),
            _ => self.rows::<S, 0, 4>(simd),
        }
    }
}

impl Transform<'_> {
    /// `COUNT` rows of positions.
    #[inline(always)]
    fn rows<S: Simd, const FIRST: usize, const COUNT: usize>(self, simd: S) {
        let ([rows, columns], stride) = (self.grid, self.tiles + S::F32_LANES);
        for row in 0..rows {
            let pixels = &self.pixels[4 * row * self.row..][..8 * self.row];
            for column in (0..columns).step_by(S::F32_LANES) {
                // Even, odd, even and odd columns of pixels.
                let first = transform(simd, four::<S>(pixels, column, 2 * self.row));
                let second = transform(simd, four::<S>(pixels, self.row + column, 2 * self.row));
                let third = transform(simd, four::<S>(pixels, column + 1, 2 * self.row));
                let fourth = transform(simd, four::<S>(pixels, self.row + column + 1, 2 * self.row));
                for i in 0..COUNT {
                    let at = FIRST + i;
                    let across = transform(simd, [first[at], second[at], third[at], fourth[at]]);
                    for (j, value) in across.into_iter().enumerate() {
                        store::<S>(self.positions, (4 * i + j) * stride + row * columns + column, value);
                    }
                }
            }
        }
    }
}

struct Restore<'a> {
    products: &'a [f32],
    each: usize,
    tiles: usize,
    bias: f32,
    planes: &'a mut [f32],
    stride: usize,
}

impl WithSimd for Restore<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let bias = simd.splat_f32s(self.bias);
        for tile in (0..self.tiles).step_by(S::F32_LANES) {
            let mut rows = [[bias; 2]; 4];
            for (i, row) in rows.iter_mut().enumerate() {
                let [a, b, c, d] = four::<S>(self.products, 4 * i * self.each + tile, self.each);
                let (sum, difference) = (simd.add_f32s(b, c), simd.sub_f32s(b, c));
                *row = [simd.add_f32s(a, sum), simd.sub_f32s(difference, d)];
            }
            let [a, b, c, d] = rows;
            let columns = [[a[0], b[0], c[0], d[0]], [a[1], b[1], c[1], d[1]]];
            for (side, [a, b, c, d]) in columns.into_iter().enumerate() {
                let (sum, difference) = (simd.add_f32s(b, c), simd.sub_f32s(b, c));
                let upper = simd.add_f32s(simd.add_f32s(a, sum), bias);
                let lower = simd.add_f32s(simd.sub_f32s(difference, d), bias);
                store::<S>(self.planes, side * self.stride + tile, upper);
                store::<S>(self.planes, (2 + side) * self.stride + tile, lower);
            }
        }
    }
}

/// Puts the four planes of pixels of the tiles back into an image.
fn join(planes: &[f32], stride: usize, columns: usize, w: usize, out: &mut [f32]) {
    for (y, out) in out.chunks_exact_mut(w).enumerate() {
        let at = 2 * (y % 2) * stride + y / 2 * columns;
        let (even, odd) = (&planes[at..at + columns], &planes[at + stride..at + stride + columns]);
        let (pairs, last) = out.as_chunks_mut::<2>();
        for ((pair, even), odd) in pairs.iter_mut().zip(even).zip(odd) {
            *pair = [*even, *odd];
        }
        if let [last] = last {
            *last = even[columns - 1];
        }
    }
}
