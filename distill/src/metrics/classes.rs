//! What a classifier makes of a set of images: which classes there are, whether they are those that were asked for,
//! how sure it is.

use crate::error::{Error, Result};

/// Predictions of a classifier for a set of images.
#[derive(Clone, Debug, PartialEq)]
pub struct Predictions {
    /// The most probable class of each image.
    pub classes: Vec<usize>,
    /// Share of each class among them.
    pub histogram: Vec<f64>,
    /// Mean of `−Σ p·ln p` over the images, in nats.
    pub entropy: f64,
}

impl Predictions {
    /// From rows of `count` logits, image by image.
    ///
    /// # Errors
    /// If the rows are not whole, there are none, or a value is not finite.
    pub fn new(count: usize, logits: &[f32]) -> Result<Self> {
        if count == 0 || logits.is_empty() || !logits.len().is_multiple_of(count) {
            return Err(Error::Request(format!("got {} logits, expected rows of {count}", logits.len())));
        }
        if logits.iter().any(|v| !v.is_finite()) {
            return Err(Error::Request("a logit is not finite".into()));
        }
        let images = logits.len() / count;
        let (mut classes, mut histogram, mut entropy) = (Vec::with_capacity(images), vec![0.0; count], 0.0);
        for row in logits.chunks_exact(count) {
            let first = |best: usize, i: usize| if row[i] > row[best] { i } else { best };
            let class = (0..count).fold(0, first);
            let shifted: Vec<f64> = row.iter().map(|v| f64::from(*v) - f64::from(row[class])).collect();
            let sum: f64 = shifted.iter().map(|v| v.exp()).sum();
            entropy += sum.ln() - shifted.iter().map(|v| v * v.exp()).sum::<f64>() / sum;
            histogram[class] += 1.0 / images as f64;
            classes.push(class);
        }
        Ok(Self { classes, histogram, entropy: entropy / images as f64 })
    }

    /// Share of images whose class is the one that was asked for.
    pub fn agreement(&self, asked: &[u32]) -> f64 {
        let right =
            self.classes.iter().zip(asked).filter(|(found, asked)| **found == **asked as usize).count();
        right as f64 / self.classes.len() as f64
    }
}

/// Half the sum of the differences of two histograms: the share of images that would have to change their class.
pub fn total_variation(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).sum::<f64>() / 2.0
}
