//! What all kernels share: the number of lanes of the processor found at run time (`pulp`), and functions of activations.
//!
//! AVX-512 (the feature `x86-v4` of `pulp`, detected at run time) is off: groups of 16 images would leave the threads little to
//! share at the usual batches, and there was no such processor to measure it on.

pub use dmd_core::activation::{exp, sigmoid};
#[cfg(not(test))]
use pulp::Arch;
use pulp::{Simd, WithSimd};

/// Runs a kernel with the best instructions of this processor.
#[cfg(not(test))]
#[inline(always)]
pub fn dispatch<K: WithSimd>(kernel: K) -> K::Output {
    Arch::new().dispatch(kernel)
}

#[cfg(test)]
pub use portable::dispatch;

/// Floats in one SIMD vector of this processor, and so images in one group.
pub fn lanes() -> usize {
    struct Lanes;
    impl WithSimd for Lanes {
        type Output = usize;

        #[inline(always)]
        fn with_simd<S: Simd>(self, _: S) -> usize {
            S::F32_LANES
        }
    }
    dispatch(Lanes)
}

/// Runs plain loops with the processor's SIMD instructions; the closure must be `#[inline(always)]`.
pub fn vectorised<R>(f: impl FnMut() -> R) -> R {
    struct Loops<F>(F);
    impl<R, F: FnMut() -> R> WithSimd for Loops<F> {
        type Output = R;

        #[inline(always)]
        fn with_simd<S: Simd>(mut self, _: S) -> R {
            (self.0)()
        }
    }
    dispatch(Loops(f))
}

/// `to += from`.
#[inline(always)]
pub fn add_to(to: &mut [f32], from: &[f32]) {
    to.iter_mut().zip(from).for_each(|(to, from)| *to += from);
}

/// Derivative of `x·sigmoid(x)`.
#[inline(always)]
pub fn silu_slope(x: f32) -> f32 {
    let s = sigmoid(x);
    s * (1.0 + x * (1.0 - s))
}

/// `Φ(x) = (1 + erf(x/√2))/2`; Abramowitz and Stegun 1964, 7.1.26, off by at most 1e-7.
#[inline(always)]
pub fn normal_share(x: f32) -> f32 {
    let z = x.abs() * std::f32::consts::FRAC_1_SQRT_2;
    let t = 1.0 / (1.0 + 0.327_591_1 * z);
    let p = 0.254_829_6 + t * (-0.284_496_74 + t * (1.421_413_8 + t * (-1.453_152 + t * 1.061_405_4)));
    let tail = 0.5 * p * t * exp(-z * z);
    if x < 0.0 { tail } else { 1.0 - tail }
}

/// Derivative of `x·Φ(x)`.
#[inline(always)]
pub fn gelu_slope(x: f32) -> f32 {
    const DENSITY: f32 = 0.398_942_3;
    normal_share(x) + x * DENSITY * exp(-0.5 * x * x)
}

/// `tanh(ln(1 + exp(x)))`.
#[inline(always)]
pub fn mish_share(x: f32) -> f32 {
    let e = exp(x.min(20.0));
    let above = e * e + 2.0 * e;
    above / (above + 2.0)
}

/// Derivative of `x·tanh(ln(1 + exp(x)))`.
#[inline(always)]
pub fn mish_slope(x: f32) -> f32 {
    let e = exp(x.min(20.0));
    let above = e * e + 2.0 * e;
    let below = above + 2.0;
    above / below + x * (4.0 * e * (e + 1.0) / below) / below
}

/// Tests run kernels with vectors of other processors: 1 number (no SIMD), 4 (NEON), 16 (AVX-512).
#[cfg(test)]
pub mod portable {
    use std::cell::Cell;

    use pulp::{Arch, Scalar, Scalar128b, Scalar512b, Simd, WithSimd};

    thread_local! {
        static LANES: Cell<usize> = const { Cell::new(0) };
    }

    /// Runs `work` on threads whose kernels have vectors of `lanes` numbers; 0 is this processor's own.
    pub fn with_lanes<R: Send>(lanes: usize, work: impl FnOnce() -> R + Send) -> R {
        let threads = rayon::ThreadPoolBuilder::new().num_threads(2);
        threads.start_handler(move |_| LANES.set(lanes)).build().unwrap().install(work)
    }

    pub fn dispatch<K: WithSimd>(kernel: K) -> K::Output {
        match LANES.get() {
            0 => Arch::new().dispatch(kernel),
            1 => Scalar.vectorize(kernel),
            4 => Scalar128b.vectorize(kernel),
            16 => Scalar512b.vectorize(kernel),
            other => panic!("no vectors of {other} numbers"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vectors_have_the_width_that_a_test_asks_for() {
        for width in [1, 4, 16] {
            assert_eq!(portable::with_lanes(width, || rayon::join(lanes, lanes)), (width, width));
        }
        assert_eq!(portable::with_lanes(0, lanes), lanes());
    }

    #[test]
    fn the_sigmoid_is_exact_to_rounding() {
        for i in -2000..2000 {
            let x = i as f32 * 0.05;
            let expected = (1.0 / (1.0 + (-f64::from(x)).exp())) as f32;
            let got = sigmoid(x);
            assert!((got - expected).abs() <= 2e-7 * expected.max(1e-30) + 1e-37, "{x}: {got} {expected}");
        }
    }
}
