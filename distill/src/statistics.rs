//! The statistics that BatchNorm sees while a base is trained (Ioffe and Szegedy 2015, arXiv:1502.03167), on their way from
//! the layers of a pass to the running statistics of a checkpoint.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{Result, Tensor};

/// Share of a new batch in the running statistics: PyTorch's `momentum`.
const MOMENTUM: f64 = 0.1;

/// Mean and unbiased variance per channel, by the name of the layer, of passes that nobody has looked at yet. Copies share
/// their content.
#[derive(Clone, Debug, Default)]
pub struct BatchStatistics(Arc<Mutex<BTreeMap<String, [Tensor; 2]>>>);

impl BatchStatistics {
    /// What a layer saw.
    pub fn record(&self, layer: &str, mean: Tensor, unbiased_variance: Tensor) {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.insert(layer.to_owned(), [mean, unbiased_variance]);
    }

    /// Moves `running_mean` and `running_var` of the layers a tenth of the way to what they saw, and forgets it.
    pub fn apply(&self, parameters: &mut BTreeMap<String, Tensor>) -> Result<()> {
        let seen = std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner));
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
