//! The statistics that BatchNorm sees while a base is trained (Ioffe and Szegedy 2015, arXiv:1502.03167), on their way from
//! the layers of a pass to the running statistics of a checkpoint.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{Result, Tensor};

use crate::parallel::Team;

/// Share of a new batch in the running statistics: PyTorch's `momentum`.
const MOMENTUM: f64 = 0.1;

/// Mean and unbiased variance per channel, by the name of the layer, of passes that nobody has looked at yet. Copies share
/// their content.
#[derive(Clone)]
pub struct BatchStatistics {
    seen: Arc<Mutex<BTreeMap<String, [Tensor; 2]>>>,
    team: Team,
    weight: f64,
}

impl Default for BatchStatistics {
    fn default() -> Self {
        Self::new(&Team::alone(), 1.0)
    }
}

impl BatchStatistics {
    /// Of a batch that ranks share; `weight` is the share of this one's images.
    pub fn new(team: &Team, weight: f64) -> Self {
        Self { seen: Arc::default(), team: team.clone(), weight }
    }

    /// Replaces sums over this rank's images by those over all images of the batch.
    pub fn sum(&self, sums: &mut [f64]) {
        self.team.sum(sums);
    }

    /// Whether there are images on other ranks.
    pub fn is_shared(&self) -> bool {
        self.team.size() > 1
    }

    /// The share of this rank's images in the batch: 1 for all.
    pub fn weight(&self) -> f64 {
        self.weight
    }

    /// What a layer saw.
    pub fn record(&self, layer: &str, mean: Tensor, unbiased_variance: Tensor) {
        let mut all = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        all.insert(layer.to_owned(), [mean, unbiased_variance]);
    }

    /// Moves `running_mean` and `running_var` of the layers a tenth of the way to what they saw, and forgets it.
    pub fn apply(&self, parameters: &mut BTreeMap<String, Tensor>) -> Result<()> {
        let seen = std::mem::take(&mut *self.seen.lock().unwrap_or_else(PoisonError::into_inner));
        for (layer, moments) in seen {
            for (suffix, seen) in ["running_mean", "running_var"].into_iter().zip(moments) {
                if let Some(running) = parameters.get_mut(&format!("{layer}.{suffix}")) {
                    *running = ((&*running * (1.0 - MOMENTUM))? + (seen * MOMENTUM)?)?.detach();
                }
            }
        }
        Ok(())
    }
}
