//! The transport of a build without MPI: one rank, for which every sum is its own.

/// Sums `from` over ranks into `to`.
pub fn sum(from: &[f32], to: &mut [f32]) {
    to.copy_from_slice(from);
}

/// Sums over ranks.
pub fn sum_numbers(_: &mut [f64]) {}

/// The largest over ranks.
pub fn largest(_: &mut [f64]) {}

/// What rank 0 has.
pub fn broadcast(_: &mut Vec<u8>) {}
