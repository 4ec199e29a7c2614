//! Fréchet distance between normal distributions fitted to features (Heusel et al. 2017, arXiv:1706.08500). Called FID
//! only where the features are those of Inception-v3 in the TF-FID weights.

use nalgebra::{DMatrix, DVector, SymmetricEigen};

use super::Features;
use crate::error::{Error, Result};

/// Relative size below which an off-diagonal value counts as 0 in an eigendecomposition.
const CONVERGED: f64 = 1e-15;

/// Mean and unbiased covariance (divided by n − 1) of features.
#[derive(Clone, Debug)]
pub struct Gaussian {
    mean: DVector<f64>,
    covariance: DMatrix<f64>,
}

impl Gaussian {
    /// Of at least two images.
    pub fn of(features: &Features) -> Result<Self> {
        features.at_least(2)?;
        let mean = features.columns().column_mean();
        let mut centred = features.columns().clone();
        centred.column_iter_mut().for_each(|mut column| column -= &mean);
        let covariance = &centred * centred.transpose() / (features.count() as f64 - 1.0);
        Ok(Self { mean, covariance: symmetric(&covariance) })
    }

    /// `|μ₁ − μ₂|² + tr(Σ₁ + Σ₂ − 2·(Σ₁Σ₂)^½)`.
    ///
    /// The trace of the root is the sum of the roots of the eigenvalues of `A·Σ₂·A` with the symmetric root `A` of `Σ₁`: two
    /// symmetric eigendecompositions, no complex numbers, and stable where a covariance is singular.
    pub fn distance(&self, other: &Self) -> Result<f64> {
        if self.mean.len() != other.mean.len() {
            let (got, expected) = (other.mean.len(), self.mean.len());
            return Err(Error::Request(format!("got {got} features, expected {expected}")));
        }
        let SymmetricEigen { eigenvectors, eigenvalues } = eigen(self.covariance.clone())?;
        let mut scaled = eigenvectors.clone();
        scaled
            .column_iter_mut()
            .zip(eigenvalues.iter())
            .for_each(|(mut column, value)| column *= value.max(0.0).sqrt());
        let root = scaled * eigenvectors.transpose();
        let product = symmetric(&(&root * &other.covariance * &root));
        let shared: f64 = eigen(product)?.eigenvalues.iter().map(|value| value.max(0.0).sqrt()).sum();
        let apart = (&self.mean - &other.mean).norm_squared();
        Ok(apart + self.covariance.trace() + other.covariance.trace() - 2.0 * shared)
    }
}

fn symmetric(matrix: &DMatrix<f64>) -> DMatrix<f64> {
    (matrix + matrix.transpose()) * 0.5
}

fn eigen(matrix: DMatrix<f64>) -> Result<SymmetricEigen<f64, nalgebra::Dyn>> {
    let most = 100 * matrix.nrows().max(10);
    SymmetricEigen::try_new(matrix, CONVERGED, most)
        .ok_or_else(|| Error::Diverged("the eigenvalues of a covariance did not converge".into()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::{Purpose, Random};

    fn normal(dimension: usize, count: usize, seed: u32) -> Features {
        Features::new(dimension, &Random::new(seed, Purpose::Metrics, 0).normal(dimension * count)).unwrap()
    }

    #[test]
    fn a_set_is_at_no_distance_from_itself_even_with_dead_features() {
        let mut features = normal(12, 300, 0);
        features.0.row_mut(3).fill(0.0);
        let copy = features.0.row(4).clone_owned();
        features.0.row_mut(5).copy_from(&copy);
        let gaussian = Gaussian::of(&features).unwrap();
        assert!(gaussian.distance(&gaussian).unwrap().abs() < 1e-6);
        let zero = Gaussian::of(&Features::new(12, &[0.5; 240]).unwrap()).unwrap();
        assert!(zero.distance(&zero).unwrap().abs() < 1e-12);
        let few = Gaussian::of(&normal(12, 5, 1)).unwrap();
        assert!(few.distance(&few).unwrap().abs() < 1e-6, "a covariance of rank 4");
    }

    #[test]
    fn it_is_that_of_the_formula_for_independent_features() {
        let features = normal(4, 50_000, 2);
        let moved = Features(features.0.map(|v| 3.0 * v + 1.0));
        let (a, b) = (Gaussian::of(&features).unwrap(), Gaussian::of(&moved).unwrap());
        let (there, back) = (a.distance(&b).unwrap(), b.distance(&a).unwrap());
        assert!((there - (4.0 + 4.0 * 4.0)).abs() < 0.3, "{there}");
        assert!((there - back).abs() < 1e-9);
    }
}
