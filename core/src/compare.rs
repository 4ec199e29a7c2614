//! The one way numbers are compared in tests and in `verify`.

use std::fmt;

/// Largest difference allowed: `abs + rel·|expected|`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Tolerance {
    /// Absolute part.
    pub abs: f32,
    /// Part proportional to the expected value.
    pub rel: f32,
}

impl Tolerance {
    /// The same bits.
    pub const EXACT: Self = Self { abs: 0.0, rel: 0.0 };
    /// One layer or a few.
    pub const LAYER: Self = Self { abs: 1e-5, rel: 1e-4 };
    /// A whole network.
    pub const MODEL: Self = Self { abs: 1e-3, rel: 1e-3 };
}

/// Where and how far two arrays differ.
#[derive(Clone, Debug, PartialEq)]
pub struct Mismatch {
    /// Elements outside the tolerance.
    pub count: usize,
    /// Elements compared.
    pub total: usize,
    /// Index of the worst one.
    pub index: usize,
    /// Value that arrived there.
    pub got: f32,
    /// Value expected there.
    pub expected: f32,
}

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { count, total, index, got, expected } = self;
        write!(f, "{count} of {total} elements differ; worst at {index}: got {got:e}, expected {expected:e}")
    }
}

impl std::error::Error for Mismatch {}

/// Largest absolute difference; infinite where one side is NaN.
pub fn max_abs_diff(got: &[f32], expected: &[f32]) -> f32 {
    got.iter().zip(expected).map(|(g, e)| difference(*g, *e)).fold(0.0, f32::max)
}

/// Checks that every element is within the tolerance. NaN never matches; lengths must agree.
pub fn close(got: &[f32], expected: &[f32], tolerance: Tolerance) -> Result<(), Mismatch> {
    if got.len() != expected.len() {
        let (count, total) = (got.len().abs_diff(expected.len()), expected.len());
        return Err(Mismatch {
            count,
            total,
            index: got.len().min(total),
            got: f32::NAN,
            expected: f32::NAN,
        });
    }
    let mut found: Option<(Mismatch, f32)> = None;
    for (index, (&g, &e)) in got.iter().zip(expected).enumerate() {
        let excess = difference(g, e) - (tolerance.abs + tolerance.rel * e.abs());
        if excess <= 0.0 {
            continue;
        }
        let count = found.as_ref().map_or(0, |(m, _)| m.count) + 1;
        match &mut found {
            Some((m, worst)) if excess <= *worst => m.count = count,
            _ => found = Some((Mismatch { count, total: got.len(), index, got: g, expected: e }, excess)),
        }
    }
    found.map_or(Ok(()), |(mismatch, _)| Err(mismatch))
}

fn difference(got: f32, expected: f32) -> f32 {
    let d = (got - expected).abs();
    if d.is_nan() { f32::INFINITY } else { d }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_worst_element_is_named() {
        let m = close(&[0.0, 1.0, 5.0, 2.0], &[0.0, 1.1, 2.0, 2.5], Tolerance::LAYER).unwrap_err();
        assert_eq!((m.count, m.index, m.got, m.expected), (3, 2, 5.0, 2.0));
        assert_eq!(m.to_string(), "3 of 4 elements differ; worst at 2: got 5e0, expected 2e0");
        assert!(close(&[1.00001], &[1.0], Tolerance::LAYER).is_ok());
    }

    #[test]
    fn nan_infinity_and_length_never_match() {
        assert!(close(&[f32::NAN], &[f32::NAN], Tolerance::MODEL).is_err());
        assert!(close(&[1.0], &[f32::NAN], Tolerance::MODEL).is_err());
        assert!(close(&[1.0], &[], Tolerance::MODEL).is_err());
        assert!(max_abs_diff(&[f32::NAN], &[0.0]).is_infinite());
    }
}
