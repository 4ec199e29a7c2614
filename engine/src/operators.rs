//! The steps of a network: operators with sizes, weights and how they run. Which node becomes which step is in `build`.

use crate::kernels::conv::{Conv, ConvTranspose};
use crate::kernels::gemm::{self, Left, Product};
use crate::kernels::norm::{GroupNorm, scale_channels, softmax};
use crate::kernels::pointwise::{Binary, Repeat, Unary, combine};
use crate::kernels::shape::{Pool, broadcast, concat, enlarge, slice, transpose};
use crate::kernels::simd::{sum, vectorised};
use crate::parallel;

/// An operator that can run. Sizes are those of one call.
pub enum Operator {
    /// A function of one value.
    Unary(Unary),
    /// A function of two; the second operand is repeated.
    Binary(Binary, Repeat),
    /// Images one by one: sizes of one image before and after.
    Conv(Box<Conv>, [usize; 2]),
    /// The same for a transposed convolution.
    ConvTranspose(Box<ConvTranspose>, [usize; 2]),
    /// `x·weightᵀ + bias`, rows of `weight` in turn.
    Linear {
        /// `[out, in]`.
        weight: Vec<f32>,
        /// Per output.
        bias: Vec<f32>,
    },
    /// Products of matrices `[rows, depth]` and `[depth, columns]`.
    MatMul {
        /// Rows, depth, columns.
        sizes: [usize; 3],
    },
    /// Normalisation over groups, perhaps with SiLU.
    GroupNorm(Box<GroupNorm>),
    /// `x·scale + shift` per channel, perhaps with SiLU.
    Affine {
        /// Factors.
        scale: Vec<f32>,
        /// Summands.
        shift: Vec<f32>,
        /// Values per channel.
        pixels: usize,
        /// Whether SiLU follows.
        silu: bool,
    },
    /// Softmax over rows of this width.
    Softmax(usize),
    /// Transposition: shape before, order of the axes.
    Transpose(Vec<usize>, Vec<usize>),
    /// Concatenation: of each operand so many values in turn.
    Concat(Vec<usize>),
    /// A part of every block: size of a block, first value, count.
    Slice([usize; 3]),
    /// Rows of the first operand, chosen by the second: size of a row.
    Gather(usize),
    /// Enlarging: width, factors.
    Enlarge(usize, [usize; 2]),
    /// A pool.
    Pool(Pool),
    /// Repeating along axes: shape before and after.
    Broadcast(Vec<usize>, Vec<usize>),
}

impl Operator {
    /// Whether the output may lie where the first operand is.
    pub fn in_place(&self) -> bool {
        matches!(
            self,
            Self::Unary(_) | Self::Binary(..) | Self::GroupNorm(_) | Self::Affine { .. } | Self::Softmax(_)
        )
    }

    /// Floats of scratch memory.
    pub fn scratch(&self) -> usize {
        match self {
            Self::Conv(conv, _) => conv.scratch(),
            Self::ConvTranspose(conv, _) => conv.scratch(),
            Self::MatMul { sizes: [_, depth, columns] } => (depth + 1).saturating_mul(gemm::padded(*columns)),
            _ => 0,
        }
    }

    /// Runs an operator that works in place; `others` are its operands after the first.
    pub fn run_in_place(&self, x: &mut [f32], others: &[&[f32]]) {
        match self {
            Self::Unary(f) => f.run(x),
            Self::Binary(f, repeat) => combine(*f, x, others[0], *repeat),
            Self::GroupNorm(norm) => norm.run(x),
            Self::Affine { scale, shift, pixels, silu } => scale_channels(x, scale, shift, *pixels, *silu),
            Self::Softmax(width) => softmax(x, *width),
            _ => {}
        }
    }

    /// Runs the operator.
    ///
    /// # Errors
    /// An index that is out of range; all else was checked when the network was built.
    pub fn run(&self, inputs: &[&[f32]], out: &mut [f32], scratch: &mut [f32]) -> Result<(), String> {
        let x = inputs[0];
        match self {
            Self::Conv(conv, [before, after]) => {
                for (x, out) in x.chunks_exact(*before).zip(out.chunks_exact_mut(*after)) {
                    conv.run(x, out, scratch);
                }
            }
            Self::ConvTranspose(conv, [before, after]) => {
                for (x, out) in x.chunks_exact(*before).zip(out.chunks_exact_mut(*after)) {
                    conv.run(x, out, scratch);
                }
            }
            Self::Linear { weight, bias } => linear(x, weight, bias, out),
            Self::MatMul { sizes } => matmul(*sizes, x, inputs[1], out, scratch),
            Self::Transpose(shape, order) => transpose(x, shape, order, out),
            Self::Concat(widths) => {
                let parts: Vec<_> = inputs.iter().copied().zip(widths.iter().copied()).collect();
                concat(&parts, out);
            }
            Self::Slice([block, first, count]) => slice(x, *block, *first, *count, out),
            Self::Gather(width) => return gather(x, inputs[1], *width, out),
            Self::Enlarge(width, factors) => enlarge(x, *width, *factors, out),
            Self::Pool(pool) => pool.run(x, out),
            Self::Broadcast(shape, wide) => broadcast(x, shape, wide, out),
            _ => {
                out.copy_from_slice(x);
                self.run_in_place(out, &inputs[1..]);
            }
        }
        Ok(())
    }
}

fn linear(x: &[f32], weight: &[f32], bias: &[f32], out: &mut [f32]) {
    let depth = weight.len() / bias.len().max(1);
    let parts = parallel::parts(weight.len());
    let each = bias.len().div_ceil(parts).max(1);
    for (x, out) in x.chunks_exact(depth).zip(out.chunks_exact_mut(bias.len())) {
        let tasks = out.chunks_mut(each).zip(weight.chunks(each * depth)).zip(bias.chunks(each));
        parallel::each(parts, tasks, |((out, weight), bias)| {
            vectorised(
                #[inline(always)]
                || {
                    for ((out, weight), bias) in out.iter_mut().zip(weight.chunks_exact(depth)).zip(bias) {
                        *out = bias + dot(x, weight);
                    }
                },
            );
        });
    }
}

#[inline(always)]
fn dot(a: &[f32], b: &[f32]) -> f32 {
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<16>(), b.as_chunks::<16>());
    let mut sums = [0.0; 16];
    for (a, b) in a.iter().zip(b) {
        for (sum, (a, b)) in sums.iter_mut().zip(a.iter().zip(b)) {
            *sum += a * b;
        }
    }
    sum(&sums, |x| x) + a_rest.iter().zip(b_rest).map(|(a, b)| a * b).sum::<f32>()
}

fn matmul([rows, depth, columns]: [usize; 3], a: &[f32], b: &[f32], out: &mut [f32], scratch: &mut [f32]) {
    let (row, panels) = scratch.split_at_mut(gemm::padded(columns));
    let mut left: Option<Left> = None;
    for (i, out) in out.chunks_exact_mut(rows * columns).enumerate() {
        let a = &a[i * rows * depth..][..rows * depth];
        match &mut left {
            Some(left) => left.repack(a),
            None => left = Some(Left::pack(rows, depth, a)),
        }
        let b = &b[i * depth * columns..][..depth * columns];
        gemm::pack([depth, columns], panels, row, |k, places, row| {
            row[..places.len()].copy_from_slice(&b[k * columns..][places]);
        });
        if let Some(left) = &left {
            gemm::multiply(left, panels, None, Product { out, stride: columns, columns });
        }
    }
}

fn gather(table: &[f32], indices: &[f32], width: usize, out: &mut [f32]) -> Result<(), String> {
    let rows = table.len() / width.max(1);
    for (out, &index) in out.chunks_exact_mut(width).zip(indices) {
        let from_start = if index < 0.0 { index + rows as f32 } else { index };
        if !(0.0..rows as f32).contains(&from_start) {
            return Err(format!("got index {index}, expected 0 to {}", rows - 1));
        }
        out.copy_from_slice(&table[from_start as usize * width..][..width]);
    }
    Ok(())
}
