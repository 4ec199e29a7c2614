//! AdamW with saved moments (Loshchilov and Hutter 2019, arXiv:1711.05101), clipping by global norm, warm-up, EMA.

use candle_core::backprop::GradStore;
use candle_core::{Tensor, Var};

use crate::error::{Error, Result};
use crate::network::Tensors;

/// Settings of [`AdamW`].
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct AdamWConfig {
    /// Learning rate after warm-up.
    pub lr: f64,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// Updates during which the learning rate grows linearly.
    pub warmup: u64,
    /// Largest global L2 norm of the gradients.
    pub clip: f64,
}

impl AdamWConfig {
    /// DMD's settings at a learning rate.
    pub fn new(lr: f64, warmup: u64) -> Self {
        Self { lr, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.01, warmup, clip: 10.0 }
    }
}

/// How a learning rate changes over a training, after warm-up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum LrSchedule {
    /// Not at all.
    Constant,
    /// To a tenth, along half a cosine.
    Cosine,
    /// To nothing, evenly.
    Linear,
}

impl LrSchedule {
    /// Factor on the learning rate at update `step` of `total`.
    pub fn factor(self, step: u64, total: u64) -> f64 {
        let done = (step as f64 / total.max(1) as f64).min(1.0);
        match self {
            Self::Constant => 1.0,
            Self::Cosine => 0.55 + 0.45 * (std::f64::consts::PI * done).cos(),
            Self::Linear => 1.0 - done,
        }
    }
}

/// The optimiser of one network.
pub struct AdamW {
    /// Settings.
    pub config: AdamWConfig,
    updates: u64,
    first: Vec<Tensor>,
    second: Vec<Tensor>,
}

impl AdamW {
    /// Fresh moments for these variables.
    pub fn new(config: AdamWConfig, variables: &[(String, Var)]) -> Result<Self> {
        let zeros = || variables.iter().map(|(_, v)| v.zeros_like()).collect::<candle_core::Result<Vec<_>>>();
        Ok(Self { config, updates: 0, first: zeros()?, second: zeros()? })
    }

    /// One update of all variables; returns the gradients' global norm before clipping.
    ///
    /// # Errors
    /// If a variable has no gradient, or the norm is not finite (then nothing is changed).
    pub fn step(&mut self, variables: &[(String, Var)], grads: &GradStore) -> Result<f64> {
        let mut square = 0.0;
        let mut found = Vec::with_capacity(variables.len());
        for (name, var) in variables {
            let grad = grads
                .get(var)
                .ok_or_else(|| Error::Diverged(format!("parameter `{name}` got no gradient")))?;
            square += f64::from(grad.sqr()?.sum_all()?.to_scalar::<f32>()?);
            found.push(grad);
        }
        let norm = square.sqrt();
        if !norm.is_finite() {
            return Err(Error::Diverged(format!("the gradients' norm is {norm}")));
        }
        let c = self.config;
        let scale = (c.clip / (norm + 1e-6)).min(1.0);
        self.updates += 1;
        let lr = c.lr * (self.updates as f64 / c.warmup.max(1) as f64).min(1.0);
        let t = self.updates as f64;
        let (correct1, correct2) = (1.0 - c.beta1.powf(t), 1.0 - c.beta2.powf(t));
        for (i, ((_, var), grad)) in variables.iter().zip(found).enumerate() {
            let grad = (grad * scale)?;
            self.first[i] = ((&self.first[i] * c.beta1)? + (&grad * (1.0 - c.beta1))?)?;
            self.second[i] = ((&self.second[i] * c.beta2)? + (grad.sqr()? * (1.0 - c.beta2))?)?;
            let denominator = ((&self.second[i] / correct2)?.sqrt()? + c.eps)?;
            let update = ((&self.first[i] / denominator)? * (lr / correct1))?;
            let decayed = (var.as_tensor() * (1.0 - lr * c.weight_decay))?;
            var.set(&(decayed - update)?)?;
        }
        Ok(norm)
    }

    /// Moments and update count under `prefix`, for a state file.
    pub fn save(&self, prefix: &str, variables: &[(String, Var)], to: &mut Tensors) -> Result<()> {
        for (i, (name, _)) in variables.iter().enumerate() {
            to.insert(format!("{prefix}.first.{name}"), self.first[i].clone());
            to.insert(format!("{prefix}.second.{name}"), self.second[i].clone());
        }
        let updates = Tensor::new(&[self.updates as f32], &candle_core::Device::Cpu)?;
        to.insert(format!("{prefix}.updates"), updates);
        Ok(())
    }

    /// Restores what [`save`](Self::save) wrote.
    pub fn load(&mut self, prefix: &str, variables: &[(String, Var)], from: &Tensors) -> Result<()> {
        for (i, (name, var)) in variables.iter().enumerate() {
            let get = |what: &str| state(from, &format!("{prefix}.{what}.{name}"));
            self.first[i] = get("first")?.to_device(var.device())?;
            self.second[i] = get("second")?.to_device(var.device())?;
        }
        self.updates = state(from, &format!("{prefix}.updates"))?.to_vec1::<f32>()?[0] as u64;
        Ok(())
    }
}

/// A tensor of a state file.
pub fn state<'a>(from: &'a Tensors, name: &str) -> Result<&'a Tensor> {
    from.get(name).ok_or_else(|| Error::Request(format!("the saved state lacks tensor `{name}`")))
}

/// Exponential moving average of weights; the decay grows as `(1 + n)/(10 + n)` up to its value.
pub struct Ema {
    decay: f64,
    updates: u64,
    /// The averaged weights.
    pub tensors: Tensors,
}

impl Ema {
    /// Starts at the given weights, with `updates` updates behind it.
    pub fn new(decay: f64, updates: u64, tensors: Tensors) -> Self {
        Self { decay, updates, tensors }
    }

    /// Moves towards the variables.
    pub fn update(&mut self, variables: &[(String, Var)]) -> Result<()> {
        self.update_to(variables.iter().map(|(name, var)| (name, var.as_tensor())))
    }

    /// Moves towards tensors by name, variables or running statistics.
    pub fn update_to<'a>(&mut self, tensors: impl Iterator<Item = (&'a String, &'a Tensor)>) -> Result<()> {
        let n = self.updates as f64;
        let decay = self.decay.min((1.0 + n) / (10.0 + n));
        self.updates += 1;
        for (name, tensor) in tensors {
            if let Some(average) = self.tensors.get_mut(name) {
                let before = average.to_device(tensor.device())?; // read from a file, it is in the CPU's memory
                *average = ((before * decay)? + (tensor.detach() * (1.0 - decay))?)?;
            }
        }
        Ok(())
    }
}
