//! What all kernels share: the number of lanes of the processor found at run time (`pulp`), and the exponential.

use pulp::{Arch, Simd, WithSimd};

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
    Arch::new().dispatch(Lanes)
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
    Arch::new().dispatch(Loops(f))
}

/// `to += from`.
#[inline(always)]
pub fn add_to(to: &mut [f32], from: &[f32]) {
    to.iter_mut().zip(from).for_each(|(to, from)| *to += from);
}

/// `exp(x)` to about two units in the last place, for loops that the compiler turns into SIMD.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    const ROUND: f32 = 12_582_912.0;
    let x = x.clamp(-87.0, 87.0);
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = (x - n * 0.693_359_4) + n * 2.121_944_4e-4;
    let p = 1.0 / 720.0 + r * (1.0 / 5040.0);
    let p = 1.0 / 24.0 + r * (1.0 / 120.0 + r * p);
    let p = 1.0 + r * (1.0 + r * (0.5 + r * (1.0 / 6.0 + r * p)));
    p * f32::from_bits((shifted.to_bits().wrapping_add(127)) << 23)
}

/// `1 / (1 + exp(−x))`.
#[inline(always)]
pub fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// Derivative of `x·sigmoid(x)`.
#[inline(always)]
pub fn silu_slope(x: f32) -> f32 {
    let s = sigmoid(x);
    s * (1.0 + x * (1.0 - s))
}

#[cfg(test)]
mod tests {
    use super::*;

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
