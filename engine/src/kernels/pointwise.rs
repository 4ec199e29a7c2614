//! Functions of one value and of two, number by number.

use super::simd::{erf, exp, sigmoid, vectorised};
use crate::parallel;

/// Multiply-adds in the time of a function of one value, and of two.
const COST: [usize; 2] = [12, 4];

/// A function of one value.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Unary {
    /// `1/(1 + exp(−x))`.
    Sigmoid,
    /// `x·sigmoid(x)`.
    Silu,
    /// `max(x, 0)`.
    Relu,
    /// `tanh(x)`.
    Tanh,
    /// `ln(1 + exp(x))`.
    Softplus,
    /// The error function.
    Erf,
    /// The sine.
    Sin,
    /// The cosine.
    Cos,
    /// `−x`.
    Neg,
    /// The largest whole number not above.
    Floor,
    /// The whole number towards zero.
    Truncate,
    /// The nearest value between two bounds.
    Clip(f32, f32),
}

impl Unary {
    /// In place.
    pub fn run(self, x: &mut [f32]) {
        let parts = parallel::parts(COST[0] * x.len());
        let len = x.len().div_ceil(parts).max(1);
        parallel::each(parts, x.chunks_mut(len), |x| self.part(x));
    }

    fn part(self, x: &mut [f32]) {
        match self {
            Self::Sigmoid => each(x, sigmoid),
            Self::Silu => each(
                x,
                #[inline(always)]
                |x| x * sigmoid(x),
            ),
            Self::Relu => each(
                x,
                #[inline(always)]
                |x| if x < 0.0 { 0.0 } else { x },
            ),
            Self::Tanh => x.iter_mut().for_each(|x| *x = libm::tanhf(*x)),
            Self::Softplus => each(x, softplus),
            Self::Erf => each(x, erf),
            Self::Sin => x.iter_mut().for_each(|x| *x = libm::sinf(*x)),
            Self::Cos => x.iter_mut().for_each(|x| *x = libm::cosf(*x)),
            Self::Neg => each(
                x,
                #[inline(always)]
                |x| -x,
            ),
            Self::Floor => each(
                x,
                #[inline(always)]
                |x| x.floor(),
            ),
            Self::Truncate => each(
                x,
                #[inline(always)]
                |x| x.trunc(),
            ),
            Self::Clip(low, high) => each(
                x,
                #[inline(always)]
                move |x| {
                    let x = if x < low { low } else { x };
                    if x > high { high } else { x }
                },
            ),
        }
    }
}

#[inline(always)]
fn each(x: &mut [f32], f: impl Fn(f32) -> f32) {
    vectorised(
        #[inline(always)]
        || x.iter_mut().for_each(|x| *x = f(*x)),
    );
}

#[inline(always)]
fn softplus(x: f32) -> f32 {
    x.max(0.0) + libm::log1pf(exp(-x.abs()))
}

/// A function of two values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Binary {
    /// `a + b`.
    Add,
    /// `a − b`.
    Sub,
    /// `b − a`.
    SubFrom,
    /// `a·b`.
    Mul,
    /// `a/b`.
    Div,
    /// `b/a`.
    DivInto,
}

impl Binary {
    /// The function with its sides swapped.
    pub fn swapped(self) -> Self {
        match self {
            Self::Add | Self::Mul => self,
            Self::Sub => Self::SubFrom,
            Self::SubFrom => Self::Sub,
            Self::Div => Self::DivInto,
            Self::DivInto => Self::Div,
        }
    }

    /// `a = f(a, b)`, with the one value `b` repeated for each of the `repeat` values in a row of `a`, or, if `repeat` is 0, value
    /// by value.
    #[inline(always)]
    fn rows(self, a: &mut [f32], b: &[f32], repeat: usize) {
        #[inline(always)]
        fn go(a: &mut [f32], b: &[f32], repeat: usize, f: impl Fn(f32, f32) -> f32) {
            if repeat == 0 {
                a.iter_mut().zip(b).for_each(|(a, b)| *a = f(*a, *b));
            } else {
                for (a, b) in a.chunks_exact_mut(repeat).zip(b) {
                    a.iter_mut().for_each(|a| *a = f(*a, *b));
                }
            }
        }
        match self {
            Self::Add => go(
                a,
                b,
                repeat,
                #[inline(always)]
                |a, b| a + b,
            ),
            Self::Sub => go(
                a,
                b,
                repeat,
                #[inline(always)]
                |a, b| a - b,
            ),
            Self::SubFrom => go(
                a,
                b,
                repeat,
                #[inline(always)]
                |a, b| b - a,
            ),
            Self::Mul => go(
                a,
                b,
                repeat,
                #[inline(always)]
                |a, b| a * b,
            ),
            Self::Div => go(
                a,
                b,
                repeat,
                #[inline(always)]
                |a, b| a / b,
            ),
            Self::DivInto => go(
                a,
                b,
                repeat,
                #[inline(always)]
                |a, b| b / a,
            ),
        }
    }
}

/// How a smaller operand is repeated along a larger one: each of its values for some neighbours, and all of it again and again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Repeat {
    /// Neighbours that share a value.
    pub neighbours: usize,
}

/// `a = f(a, b)` in place. `b` holds one value for every `neighbours` of `a`, and starts again where it ends.
pub fn combine(f: Binary, a: &mut [f32], b: &[f32], Repeat { neighbours }: Repeat) {
    let parts = parallel::parts(COST[1] * a.len());
    let whole = |a: &mut [f32], b: &[f32]| {
        vectorised(
            #[inline(always)]
            || {
                for a in a.chunks_exact_mut((b.len() * neighbours).max(1)) {
                    f.rows(a, b, if neighbours == 1 { 0 } else { neighbours });
                }
            },
        );
    };
    let block = b.len() * neighbours;
    if block > 0 && a.len() > block {
        let each = (a.len() / block).div_ceil(parts) * block;
        parallel::each(parts, a.chunks_mut(each), |a| whole(a, b));
    } else {
        let each = b.len().div_ceil(parts).max(1);
        parallel::each(parts, a.chunks_mut(each * neighbours).zip(b.chunks(each)), |(a, b)| whole(a, b));
    }
}
