//! Running loops with the processor's vector instructions (crate `pulp`), and functions that such loops need.

pub use dmd_core::activation::{exp, sigmoid};
#[cfg(not(target_family = "wasm"))]
use pulp::Arch;
#[cfg(all(target_family = "wasm", feature = "relaxed-simd"))]
use pulp::wasm::RelaxedSimd as Vectors;
#[cfg(all(target_family = "wasm", not(feature = "relaxed-simd")))]
use pulp::wasm::Simd128 as Vectors;
use pulp::{Simd, WithSimd};

/// Runs a kernel with the best instructions of this processor.
#[cfg(not(target_family = "wasm"))]
#[inline(always)]
pub fn dispatch<K: WithSimd>(kernel: K) -> K::Output {
    Arch::new().dispatch(kernel)
}

/// Runs a kernel with the instructions that this module is built with: without them it could not have been loaded.
#[cfg(target_family = "wasm")]
#[inline(always)]
pub fn dispatch<K: WithSimd>(kernel: K) -> K::Output {
    match Vectors::try_new() {
        Some(simd) => Simd::vectorize(simd, kernel),
        None => unreachable!("a module without its own instructions"),
    }
}

/// Floats in one vector.
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

/// Runs plain loops with the processor's vector instructions; the closure must be `#[inline(always)]`.
pub fn vectorised<R>(f: impl FnOnce() -> R) -> R {
    struct Loops<F>(F);
    impl<R, F: FnOnce() -> R> WithSimd for Loops<F> {
        type Output = R;

        #[inline(always)]
        fn with_simd<S: Simd>(self, _: S) -> R {
            (self.0)()
        }
    }
    dispatch(Loops(f))
}

/// The instructions that kernels use here, for `info`.
pub fn instructions() -> &'static str {
    if cfg!(target_feature = "relaxed-simd") {
        "relaxed-simd"
    } else if cfg!(target_family = "wasm") {
        "simd128"
    } else {
        match lanes() {
            8 => "avx2",
            4 if cfg!(target_arch = "aarch64") => "neon",
            _ => "scalar",
        }
    }
}

/// The vector at `at`.
#[inline(always)]
pub fn load<S: Simd>(from: &[f32], at: usize) -> S::f32s {
    S::as_simd_f32s(&from[at..at + S::F32_LANES]).0[0]
}

/// Writes a vector to `at`.
#[inline(always)]
pub fn store<S: Simd>(to: &mut [f32], at: usize, vector: S::f32s) {
    S::as_mut_simd_f32s(&mut to[at..at + S::F32_LANES]).0[0] = vector;
}

/// The error function; Abramowitz and Stegun 1964, 7.1.26, off by at most 1.5e-7.
#[inline(always)]
pub fn erf(x: f32) -> f32 {
    let z = x.abs();
    let t = 1.0 / (1.0 + 0.327_591_1 * z);
    let p = 0.254_829_6 + t * (-0.284_496_74 + t * (1.421_413_8 + t * (-1.453_152 + t * 1.061_405_4)));
    (1.0 - p * t * exp(-z * z)).copysign(x)
}

/// The sum, by sixteen partial sums.
#[inline(always)]
pub fn sum(x: &[f32], f: impl Fn(f32) -> f32) -> f32 {
    let (blocks, rest) = x.as_chunks::<16>();
    let mut sums = [0.0; 16];
    for block in blocks {
        for (sum, &x) in sums.iter_mut().zip(block) {
            *sum += f(x);
        }
    }
    sums.iter().sum::<f32>() + rest.iter().map(|&x| f(x)).sum::<f32>()
}
