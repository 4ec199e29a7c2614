//! Attention among the pixels of an image, lane by lane, with its gradients.
//! Vaswani et al. 2017 (arXiv:1706.03762), Eq. 1, softmax composed so that its gradient is exact.

use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use super::images::Images;
use super::memory::Buffer;
use super::simd::{add_to, exp, lanes, vectorised};

/// A matrix of vectors: element `(i, j)` is vector `first + i·row + j·column`.
#[derive(Clone, Copy)]
struct Matrix<'a> {
    data: &'a [f32],
    first: usize,
    row: usize,
    column: usize,
}

impl Matrix<'_> {
    fn transposed(self) -> Self {
        Self { row: self.column, column: self.row, ..self }
    }
}

/// `out[i][j] (+)= factor·Σ_k a[i][k]·b[k][j]`, lane by lane; `out` is a window of `rows` rows at distance `pitch`.
struct Product<'a> {
    a: Matrix<'a>,
    b: Matrix<'a>,
    size: [usize; 3],
    factor: f32,
    out: &'a mut [f32],
    first: usize,
    pitch: usize,
}

impl WithSimd for Product<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let (a, b) = (S::as_simd_f32s(self.a.data).0, S::as_simd_f32s(self.b.data).0);
        let (out, _) = S::as_mut_simd_f32s(self.out);
        let [rows, depth, columns] = self.size;
        let factor = simd.splat_f32s(self.factor);
        for i in 0..rows {
            for first in (0..columns).step_by(4) {
                let mut sums = [simd.splat_f32s(0.0); 4];
                let starts: [usize; 4] =
                    std::array::from_fn(|j| self.b.first + (first + j).min(columns - 1) * self.b.column);
                for k in 0..depth {
                    let a = a[self.a.first + i * self.a.row + k * self.a.column];
                    for (sum, start) in sums.iter_mut().zip(starts) {
                        *sum = simd.mul_add_e_f32s(a, b[start + k * self.b.row], *sum);
                    }
                }
                let row = &mut out[self.first + i * self.pitch + first..][..(columns - first).min(4)];
                row.iter_mut().zip(sums).for_each(|(out, sum)| *out = simd.mul_f32s(sum, factor));
            }
        }
    }
}

/// One head of one group of images.
struct Head {
    pixels: usize,
    channels: usize,
    size: usize,
    at: usize,
}

impl Head {
    /// Pixels by channels of this head.
    fn of<'a>(&self, data: &'a [f32]) -> Matrix<'a> {
        Matrix { data, first: self.at, row: self.channels, column: 1 }
    }

    /// Pixels by pixels.
    fn square<'a>(&self, data: &'a [f32]) -> Matrix<'a> {
        Matrix { data, first: 0, row: self.pixels, column: 1 }
    }

    fn scale(&self) -> f32 {
        (self.size as f32).powf(-0.5)
    }

    /// `softmax(q·kᵀ·scale)`.
    fn weights(&self, q: &[f32], k: &[f32], out: &mut [f32]) {
        let size = [self.pixels, self.size, self.pixels];
        let (a, b) = (self.of(q), self.of(k).transposed());
        Arch::new().dispatch(Product { a, b, size, factor: self.scale(), out, first: 0, pitch: self.pixels });
        softmax(out, self.pixels);
    }

    /// Writes `a·b`, pixels by channels of this head.
    fn product(&self, a: Matrix, b: Matrix, factor: f32, out: &mut [f32]) {
        let size = [self.pixels, self.pixels, self.size];
        Arch::new().dispatch(Product { a, b, size, factor, out, first: self.at, pitch: self.channels });
    }
}

fn heads(x: &Images, heads: usize) -> impl Iterator<Item = Head> {
    let (pixels, channels, size) = (x.h * x.w, x.c, x.c / heads);
    (0..heads).map(move |i| Head { pixels, channels, size, at: i * size })
}

/// Softmax over each row of `columns` vectors.
fn softmax(scores: &mut [f32], columns: usize) {
    let lanes = lanes();
    vectorised(
        #[inline(always)]
        || {
            for row in scores.chunks_exact_mut(columns * lanes) {
                let mut top = row[..lanes].to_vec();
                for vector in row.chunks_exact(lanes) {
                    top.iter_mut().zip(vector).for_each(|(top, v)| *top = top.max(*v));
                }
                let mut sum = vec![0.0; lanes];
                for vector in row.chunks_exact_mut(lanes) {
                    vector.iter_mut().zip(&top).for_each(|(v, top)| *v = exp(*v - top));
                    add_to(&mut sum, vector);
                }
                for vector in row.chunks_exact_mut(lanes) {
                    vector.iter_mut().zip(&sum).for_each(|(v, sum)| *v /= sum);
                }
            }
        },
    );
}

/// Turns the gradient of the weights into that of the scores: `w·(d − Σ w·d)`.
fn softmax_backward(weights: &[f32], gradient: &mut [f32], columns: usize) {
    let lanes = lanes();
    vectorised(
        #[inline(always)]
        || {
            let rows = gradient.chunks_exact_mut(columns * lanes).zip(weights.chunks_exact(columns * lanes));
            for (gradient, weights) in rows {
                let mut sum = vec![0.0; lanes];
                for (d, w) in gradient.chunks_exact(lanes).zip(weights.chunks_exact(lanes)) {
                    sum.iter_mut().zip(d).zip(w).for_each(|((sum, d), w)| *sum += d * w);
                }
                for (d, w) in gradient.chunks_exact_mut(lanes).zip(weights.chunks_exact(lanes)) {
                    d.iter_mut().zip(w).zip(&sum).for_each(|((d, w), sum)| *d = w * (*d - sum));
                }
            }
        },
    );
}

/// See [`dmd_core::net::Ops::attention`].
pub fn forward(q: &Images, k: &Images, v: &Images, count: usize) -> Images {
    let mut out = q.like();
    let inputs =
        q.data.par_chunks(q.group()).zip(k.data.par_chunks(q.group())).zip(v.data.par_chunks(q.group()));
    out.data.par_chunks_mut(q.group()).zip(inputs).for_each(|(out, ((q_data, k), v))| {
        let mut weights = Buffer::stale(q.h * q.w * q.h * q.w * lanes());
        for head in heads(q, count) {
            head.weights(q_data, k, &mut weights);
            head.product(head.square(&weights), head.of(v), 1.0, out);
        }
    });
    out
}

/// Gradients with respect to `q`, `k` and `v`.
pub fn backward(q: &Images, k: &Images, v: &Images, count: usize, gradient: &Images) -> [Images; 3] {
    let mut out = [q.like(), q.like(), q.like()];
    let [dq, dk, dv] = &mut out;
    let group = q.group();
    let outputs =
        dq.data.par_chunks_mut(group).zip(dk.data.par_chunks_mut(group)).zip(dv.data.par_chunks_mut(group));
    let inputs = q.data.par_chunks(group).zip(k.data.par_chunks(group)).zip(v.data.par_chunks(group));
    let inputs = inputs.zip(gradient.data.par_chunks(group));
    outputs.zip(inputs).for_each(|(((dq, dk), dv), (((q_data, k), v), gradient))| {
        let square = q.h * q.w * q.h * q.w * lanes();
        let (mut weights, mut scores) = (Buffer::stale(square), Buffer::stale(square));
        for head in heads(q, count) {
            head.weights(q_data, k, &mut weights);
            head.product(head.square(&weights).transposed(), head.of(gradient), 1.0, dv);
            let size = [head.pixels, head.size, head.pixels];
            let (a, b) = (head.of(gradient), head.of(v).transposed());
            let out = &mut scores[..];
            Arch::new().dispatch(Product { a, b, size, factor: 1.0, out, first: 0, pitch: head.pixels });
            softmax_backward(&weights, &mut scores, head.pixels);
            head.product(head.square(&scores), head.of(k), head.scale(), dq);
            head.product(head.square(&scores).transposed(), head.of(q_data), head.scale(), dk);
        }
    });
    out
}
