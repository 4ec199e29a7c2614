//! Distances between two sets of images as pure functions of their features; `docs/metrics.md` says what they mean.
//! Must not know about networks, files, or where features come from.

pub mod classes;
pub mod frechet;
pub mod kid;
pub mod neighbours;

use nalgebra::DMatrix;

use crate::error::{Error, Result};

/// Features of a set of images.
#[derive(Clone, Debug)]
pub struct Features(DMatrix<f64>);

impl Features {
    /// From rows of `dimension` features, image by image.
    ///
    /// # Errors
    /// If the rows are not whole, or a value is not finite.
    pub fn new(dimension: usize, values: &[f32]) -> Result<Self> {
        Self::from_f64(dimension, values.iter().map(|v| f64::from(*v)).collect())
    }

    /// As [`new`](Self::new), without rounding.
    pub fn from_f64(dimension: usize, values: Vec<f64>) -> Result<Self> {
        if dimension == 0 || !values.len().is_multiple_of(dimension) {
            return Err(Error::Request(format!(
                "got {} values, expected rows of {dimension} features",
                values.len()
            )));
        }
        if let Some(place) = values.iter().position(|v| !v.is_finite()) {
            let (image, feature) = (place / dimension, place % dimension);
            return Err(Error::Request(format!("feature {feature} of image {image} is not finite")));
        }
        Ok(Self(DMatrix::from_vec(dimension, values.len() / dimension, values)))
    }

    /// Number of images.
    pub fn count(&self) -> usize {
        self.0.ncols()
    }

    /// Number of features of each.
    pub fn dimension(&self) -> usize {
        self.0.nrows()
    }

    /// One column per image.
    fn columns(&self) -> &DMatrix<f64> {
        &self.0
    }

    fn same_dimension(&self, other: &Self) -> Result<()> {
        match self.dimension() == other.dimension() {
            true => Ok(()),
            false => Err(Error::Request(format!(
                "got {} features, expected {} as in the other set",
                other.dimension(),
                self.dimension()
            ))),
        }
    }

    fn at_least(&self, count: usize) -> Result<()> {
        match self.count() >= count {
            true => Ok(()),
            false => Err(Error::Request(format!("got {} images, expected at least {count}", self.count()))),
        }
    }
}
