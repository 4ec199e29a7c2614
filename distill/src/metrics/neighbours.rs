//! Whether two sets of features lie in each other's neighbourhoods: improved precision and recall (Kynkäänniemi et al.
//! 2019, arXiv:1904.06991), density and coverage (Naeem et al. 2020, arXiv:2002.09797).

use nalgebra::DMatrix;
use rayon::prelude::*;

use super::Features;
use crate::error::Result;

/// Neighbours that make a radius for precision and recall.
const NEAR: usize = 3;
/// Neighbours that make a radius for density and coverage.
const WIDE: usize = 5;
/// Images whose distances to all others are computed at once.
const BLOCK: usize = 64;

/// Shares of images inside the other set's balls.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Neighbours {
    /// Generated images inside the ball of any real one: how real they look.
    pub precision: f64,
    /// Real images inside the ball of any generated one: how much of the real set is reached.
    pub recall: f64,
    /// Mean number of real balls a generated image lies in, over k; 1 for equal distributions, and may exceed it.
    pub density: f64,
    /// Real images whose ball holds a generated one.
    pub coverage: f64,
}

/// Precision and recall with k = 3, density and coverage with k = 5; a ball reaches to the k-th nearest image of its own
/// set, Euclidean. Sets of equal size are meant; other sizes bias the figures.
///
/// # Errors
/// If a set has no more than five images.
pub fn neighbours(real: &Features, generated: &Features) -> Result<Neighbours> {
    real.same_dimension(generated)?;
    real.at_least(WIDE + 1)?;
    generated.at_least(WIDE + 1)?;
    let (real, generated) = (Points::new(real), Points::new(generated));
    let (real_balls, generated_balls) = (real.balls(), generated.balls());
    // Each block is a number of real images against all generated ones.
    let blocks: Vec<Block> = real
        .blocks()
        .map(|first| {
            let distances = real.distances(first, &generated);
            let mut found = Block::new(generated.count());
            for (column, balls) in distances.column_iter().zip(&real_balls[first..]) {
                let [near, wide] = *balls;
                let (mut recalled, mut covered) = (false, false);
                for (j, distance) in column.iter().enumerate() {
                    found.precise[j] |= *distance <= near;
                    recalled |= *distance <= generated_balls[j][0];
                    covered |= *distance <= wide;
                    found.inside += u64::from(*distance <= wide);
                }
                found.recalled += u64::from(recalled);
                found.covered += u64::from(covered);
            }
            found
        })
        .collect();
    let all = blocks.into_iter().fold(Block::new(generated.count()), Block::join);
    let (n, m) = (real.count() as f64, generated.count() as f64);
    Ok(Neighbours {
        precision: all.precise.iter().filter(|precise| **precise).count() as f64 / m,
        recall: all.recalled as f64 / n,
        density: all.inside as f64 / (WIDE as f64 * m),
        coverage: all.covered as f64 / n,
    })
}

/// What a number of real images see of the generated ones.
struct Block {
    /// Per generated image.
    precise: Vec<bool>,
    recalled: u64,
    covered: u64,
    inside: u64,
}

impl Block {
    fn new(count: usize) -> Self {
        Self { precise: vec![false; count], recalled: 0, covered: 0, inside: 0 }
    }

    fn join(mut self, other: Self) -> Self {
        self.precise.iter_mut().zip(other.precise).for_each(|(all, precise)| *all |= precise);
        self.recalled += other.recalled;
        self.covered += other.covered;
        self.inside += other.inside;
        self
    }
}

/// Images, one per row for products, and their squared lengths.
struct Points<'a> {
    columns: &'a DMatrix<f64>,
    rows: DMatrix<f64>,
    squares: Vec<f64>,
}

impl<'a> Points<'a> {
    fn new(features: &'a Features) -> Self {
        let columns = features.columns();
        let squares = columns.column_iter().map(|column| column.norm_squared()).collect();
        Self { columns, rows: columns.transpose(), squares }
    }

    fn count(&self) -> usize {
        self.squares.len()
    }

    fn blocks(&self) -> impl IndexedParallelIterator<Item = usize> + use<> {
        (0..self.count()).into_par_iter().step_by(BLOCK)
    }

    /// Squared distances from all of `others` (rows) to the images from `first` on (columns).
    fn distances(&self, first: usize, others: &Self) -> DMatrix<f64> {
        let count = BLOCK.min(self.count() - first);
        let mut products = &others.rows * self.columns.columns(first, count);
        for (mut column, square) in products.column_iter_mut().zip(&self.squares[first..]) {
            for (product, other) in column.iter_mut().zip(&others.squares) {
                *product = (square + other - 2.0 * *product).max(0.0);
            }
        }
        products
    }

    /// Squared distances from each image to its third and fifth nearest.
    fn balls(&self) -> Vec<[f64; 2]> {
        let of_block = |first: usize| -> Vec<[f64; 2]> {
            let mut distances = self.distances(first, self);
            let balls = distances.column_iter_mut().enumerate().map(|(i, mut column)| {
                let column = column.as_mut_slice();
                column[first + i] = f64::INFINITY;
                let (nearer, wide, _) = column.select_nth_unstable_by(WIDE - 1, f64::total_cmp);
                let wide = *wide;
                nearer.sort_unstable_by(f64::total_cmp);
                [nearer[NEAR - 1], wide]
            });
            balls.collect()
        };
        self.blocks().map(of_block).collect::<Vec<_>>().concat()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(places: impl Iterator<Item = f32>) -> Features {
        Features::new(1, &places.collect::<Vec<_>>()).unwrap()
    }

    #[test]
    fn equal_sets_agree_and_distant_ones_do_not() {
        let here = || line((0..200).map(|i| (i * i * i) as f32));
        let found = neighbours(&here(), &here()).unwrap();
        assert_eq!((found.precision, found.recall, found.coverage), (1.0, 1.0, 1.0));
        // No cube lies in the middle of two others, so no two neighbours are equally far.
        assert!((found.density - 1.2).abs() < 1e-9, "{found:?}: every ball holds its centre and k others");
        let far = neighbours(&here(), &line((0..200).map(|i| -1e8 - 100.0 * i as f32))).unwrap();
        assert_eq!((far.precision, far.recall, far.density, far.coverage), (0.0, 0.0, 0.0, 0.0));
    }

    #[test]
    fn a_part_of_the_real_set_is_precise_but_recalls_a_part() {
        let found =
            neighbours(&line((0..200).map(|i| i as f32)), &line((0..200).map(|i| i as f32 / 4.0))).unwrap();
        assert!(found.precision == 1.0 && found.recall < 0.3 && found.coverage < 0.3, "{found:?}");
    }

    #[test]
    fn too_few_images_are_refused() {
        assert!(neighbours(&line((0..5).map(|i| i as f32)), &line((0..9).map(|i| i as f32))).is_err());
    }
}
