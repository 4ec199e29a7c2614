//! Functions of activations in f32, the same in training and in the browser, for loops that the compiler turns into SIMD.

/// `exp(x)` to about two units in the last place (degree 6, Cody and Waite's reduction).
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn they_are_those_of_f64_to_two_units_in_the_last_place() {
        for i in -8_600..=8_600 {
            let x = i as f32 / 100.0;
            for (got, exact) in
                [(exp(x), f64::from(x).exp()), (sigmoid(x), 1.0 / (1.0 + (-f64::from(x)).exp()))]
            {
                let error = (f64::from(got) / exact - 1.0).abs();
                assert!(error < 3.0 * f64::from(f32::EPSILON), "{got} at {x}, expected {exact}");
            }
        }
    }
}
