//! Attention among the pixels of an image, lane by lane, with its gradients.
//! Vaswani et al. 2017 (arXiv:1706.03762), Eq. 1, softmax composed so that its gradient is exact.

use rayon::prelude::*;

use super::images::Images;
use super::memory::Buffer;
use super::simd::{add_to, exp, lanes, vectorised};
use super::tile::{Matrix, Sums};

/// Rows of a product that are made at a time, so that they stay in the second cache.
const ROWS: usize = 48;

/// A matrix of vectors: element `(i, j)` is vector `first + i·row + j·column`.
#[derive(Clone, Copy)]
struct Operand<'a> {
    data: &'a [f32],
    first: usize,
    row: usize,
    column: usize,
}

impl<'a> Operand<'a> {
    fn transposed(self) -> Self {
        Self { row: self.column, column: self.row, ..self }
    }

    /// From row `i` on.
    fn skip_rows(self, i: usize) -> Self {
        Self { first: self.first + i * self.row, ..self }
    }

    /// As sums see it: what they run over comes first.
    fn summed_over_rows(self) -> Matrix<'a> {
        Matrix { data: self.data, place: [self.first, 0, self.row, self.column] }
    }
}

/// A window of a matrix of vectors that is written, with `pitch` vectors from one row to the next.
struct Window<'a> {
    data: &'a mut [f32],
    first: usize,
    pitch: usize,
}

/// `out[i][j] = factor·Σ_k a[i][k]·b[k][j]`, lane by lane; `size` is that of `i`, `k` and `j`.
fn product(a: Operand, b: Operand, size: [usize; 3], factor: f32, out: Window) {
    let [rows, depth, columns] = size;
    for i in (0..rows).step_by(ROWS) {
        let mut sums = Sums::new((rows - i).min(ROWS), columns);
        let a = a.skip_rows(i).transposed();
        sums.correlate(a.summed_over_rows(), b.summed_over_rows(), [1, depth]);
        sums.store(factor, out.data, out.first + i * out.pitch, out.pitch);
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
    fn of<'a>(&self, data: &'a [f32]) -> Operand<'a> {
        Operand { data, first: self.at, row: self.channels, column: 1 }
    }

    /// Pixels by pixels.
    fn square<'a>(&self, data: &'a [f32]) -> Operand<'a> {
        Operand { data, first: 0, row: self.pixels, column: 1 }
    }

    fn scale(&self) -> f32 {
        (self.size as f32).powf(-0.5)
    }

    /// Writes `a·bᵀ`, pixels by pixels; both are pixels by channels of this head.
    fn scores(&self, a: &[f32], b: &[f32], factor: f32, out: &mut [f32]) {
        let out = Window { data: out, first: 0, pitch: self.pixels };
        let size = [self.pixels, self.size, self.pixels];
        product(self.of(a), self.of(b).transposed(), size, factor, out);
    }

    /// `softmax(q·kᵀ·scale)`.
    fn weights(&self, q: &[f32], k: &[f32], out: &mut [f32]) {
        self.scores(q, k, self.scale(), out);
        softmax(out, self.pixels);
    }

    /// Writes `a·b`, pixels by channels of this head; `a` is pixels by pixels.
    fn mix(&self, a: Operand, b: &[f32], factor: f32, out: &mut [f32]) {
        let out = Window { data: out, first: self.at, pitch: self.channels };
        product(a, self.of(b), [self.pixels, self.pixels, self.size], factor, out);
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
            head.mix(head.square(&weights), v, 1.0, out);
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
            head.mix(head.square(&weights).transposed(), gradient, 1.0, dv);
            head.scores(gradient, v, 1.0, &mut scores);
            softmax_backward(&weights, &mut scores, head.pixels);
            head.mix(head.square(&scores), k, head.scale(), dq);
            head.mix(head.square(&scores).transposed(), q_data, head.scale(), dk);
        }
    });
    out
}
