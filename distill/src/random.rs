//! Every random number of a run, as a function of (seed, purpose, step): a resumed run needs no generator state.

use std::ops::Range;

use candle_core::{Device, Tensor};
use dmd_core::noise;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::Rng;

use crate::error::Result;

/// What numbers are for. Purpose 0 is the public noise contract, so none of these collides with it.
#[derive(Clone, Copy, Debug)]
pub enum Purpose {
    /// Initial weights.
    Weights = 1,
    /// Order of the training images.
    Order = 2,
    /// Base training: steps, noise, dropped labels.
    Base = 3,
    /// Generator updates.
    Generator = 4,
    /// Critic updates.
    Critic = 5,
    /// Initial weights of the discriminator's head.
    Discriminator = 8,
    /// The generator's side of the adversarial loss.
    Adversarial = 9,
    /// The discriminator's side of it: real images, steps, noise.
    Real = 10,
    /// Which real images a metric looks at, and its subsets.
    Metrics = 6,
    /// Shifts of the images a classifier is trained on.
    Augmentation = 7,
}

/// A stream of random numbers.
pub struct Random(ChaCha8Rng);

impl Random {
    /// The stream of `purpose` number `step` in a run with seed `seed`.
    pub fn new(seed: u32, purpose: Purpose, step: u64) -> Self {
        Self(noise::stream((purpose as u64) << 32 | u64::from(seed), step))
    }

    /// Uniform in `0..bound`, by multiplication (bias below `bound / 2^32`).
    pub fn below(&mut self, bound: usize) -> usize {
        ((u64::from(self.0.next_u32()) * bound as u64) >> 32) as usize
    }

    /// Uniform in `[0, 1)`.
    pub fn unit(&mut self) -> f64 {
        f64::from(self.0.next_u32()) / 4_294_967_296.0
    }

    /// Standard normal values.
    pub fn normal(&mut self, count: usize) -> Vec<f32> {
        let mut out = vec![0.0; count];
        noise::normal(&mut self.0, &mut out);
        out
    }

    /// Standard normal tensor.
    pub fn normal_tensor(&mut self, shape: &[usize], device: &Device) -> Result<Tensor> {
        Ok(Tensor::from_vec(self.normal(shape.iter().product()), shape, device)?)
    }

    /// Rows of a standard normal tensor `[count, ..]` with `size` values per row: the numbers that it has there, without
    /// making the others. Afterwards the stream is where it is after the whole tensor.
    pub fn normal_rows(&mut self, count: usize, size: usize, rows: &[Range<usize>]) -> Vec<f32> {
        let begin = self.0.get_word_pos();
        let mut out = Vec::new();
        for rows in rows {
            // Two words make two values.
            let (start, end) = (rows.start * size, rows.end * size);
            let even = start - start % 2;
            self.0.set_word_pos(begin + even as u128);
            let values = self.normal(end - even);
            out.extend_from_slice(&values[start - even..]);
        }
        self.0.set_word_pos(begin + (count * size).next_multiple_of(2) as u128);
        out
    }

    /// A permutation of `0..count` (Fisher and Yates).
    pub fn permutation(&mut self, count: usize) -> Vec<u32> {
        let mut order: Vec<u32> = (0..count as u32).collect();
        for i in (1..count).rev() {
            order.swap(i, self.below(i + 1));
        }
        order
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_those_of_the_whole_tensor() {
        for (count, size) in [(5, 3), (4, 4), (1, 1), (6, 7)] {
            let mut random = Random::new(3, Purpose::Critic, 9);
            random.below(7);
            let whole = random.normal(count * size);
            let after = random.below(1 << 20);
            let some = [0..count / 2, count / 2..count, count - 1..count];
            for rows in [&some[..1], &some[1..2], &some[..2], &some[1..]] {
                let mut random = Random::new(3, Purpose::Critic, 9);
                random.below(7);
                let got = random.normal_rows(count, size, rows);
                let expected: Vec<f32> =
                    rows.iter().flat_map(|rows| whole[rows.start * size..rows.end * size].to_vec()).collect();
                assert_eq!(got, expected, "{count} by {size}, {rows:?}");
                assert_eq!(random.below(1 << 20), after, "{count} by {size}, {rows:?}");
            }
        }
    }
}
