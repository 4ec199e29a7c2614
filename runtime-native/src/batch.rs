//! Inputs of a network evaluation, and how any number of images goes through a model that takes a fixed number.

use crate::Result;

/// Inputs of one network evaluation; those the model does not have are not read.
#[derive(Clone, Copy, Debug)]
pub struct Batch<'a> {
    /// Number of images.
    pub n: usize,
    /// `[n, c, h, w]`.
    pub x: &'a [f32],
    /// `[n]`.
    pub t: &'a [f32],
    /// `[n]`.
    pub class: &'a [i64],
}

impl Batch<'_> {
    /// Runs the images `size` at a time. The last part is filled up with the first image, and its result cut.
    pub(crate) fn in_parts(
        &self,
        size: usize,
        mut run: impl FnMut(&Batch) -> Result<Vec<f32>>,
    ) -> Result<Vec<f32>> {
        if self.n == size {
            return run(self);
        }
        let mut all = Vec::with_capacity(self.x.len());
        for start in (0..self.n).step_by(size) {
            all.extend(self.part(start, size, &mut run)?);
        }
        Ok(all)
    }

    /// Runs `size` images from `start` on.
    pub(crate) fn part(
        &self,
        start: usize,
        size: usize,
        run: &mut impl FnMut(&Batch) -> Result<Vec<f32>>,
    ) -> Result<Vec<f32>> {
        let x = filled(self.x, self.n, start, size);
        let (t, class) = (filled(self.t, self.n, start, size), filled(self.class, self.n, start, size));
        let mut part = run(&Batch { n: size, x: &x, t: &t, class: &class })?;
        part.truncate(part.len() / size * size.min(self.n - start));
        Ok(part)
    }
}

/// The values of images `start .. start + size` out of `n`, those of the first image where there are no more.
fn filled<T: Copy>(values: &[T], n: usize, start: usize, size: usize) -> Vec<T> {
    let len = values.len() / n;
    let image = |k: usize| &values[if k < n { k * len } else { 0 }..][..len];
    (start..start + size).flat_map(image).copied().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_image_is_run_once_and_the_last_part_is_filled_up() {
        let x: Vec<f32> = (0..10).map(|v| v as f32).collect();
        let batch = Batch { n: 5, x: &x, t: &[], class: &[5, 6, 7, 8, 9] };
        for size in 1..7 {
            let mut seen = Vec::new();
            let got = batch.in_parts(size, |part| {
                assert_eq!((part.n, part.x.len(), part.t.len()), (size, 2 * size, 0));
                seen.extend_from_slice(part.class);
                Ok(part.x.to_vec())
            });
            assert_eq!(got.unwrap(), x);
            let filling = seen.split_off(5);
            assert_eq!((seen.as_slice(), filling), (batch.class, vec![5; 5usize.next_multiple_of(size) - 5]));
        }
    }
}
