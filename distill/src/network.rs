//! A denoiser with its weights on a device: frozen or trainable.

use std::collections::BTreeMap;

use candle_core::{DType, Device, Tensor, Var};
use dmd_core::config::ModelConfig;
use dmd_core::net::{OneStep, celeba_unet, denoise, one_step, shapes};

use crate::cpu;
use crate::error::Result;
use crate::ops::CandleOps;
use crate::random::{Purpose, Random};
use crate::statistics::BatchStatistics;

/// Tensors by checkpoint name.
pub type Tensors = BTreeMap<String, Tensor>;

/// A denoiser and its weights.
pub struct Network {
    /// What the weights describe.
    pub config: ModelConfig,
    parameters: Tensors,
    variables: Vec<(String, Var)>,
    device: Device,
    /// What predictions are computed in.
    dtype: DType,
    /// Present while BatchNorm normalises by its own batch.
    statistics: Option<BatchStatistics>,
}

impl Network {
    /// Weights that never change and never get a gradient.
    pub fn frozen(config: &ModelConfig, tensors: &Tensors, device: &Device) -> Result<Self> {
        let mut parameters = Tensors::new();
        for (name, tensor) in tensors {
            parameters.insert(name.clone(), tensor.to_device(device)?.detach());
        }
        Ok(Self {
            config: config.clone(),
            parameters,
            variables: Vec::new(),
            device: device.clone(),
            dtype: DType::F32,
            statistics: None,
        })
    }

    /// A copy of the weights as variables, in the order of their names; statistics and fixed tables stay as they are.
    pub fn trainable(config: &ModelConfig, tensors: &Tensors, device: &Device) -> Result<Self> {
        let frozen = shapes::summarise(config)?.frozen;
        let (mut parameters, mut variables) = (Tensors::new(), Vec::new());
        for (name, tensor) in tensors {
            if frozen.contains(name) {
                parameters.insert(name.clone(), tensor.to_device(device)?.detach());
                continue;
            }
            let var = Var::from_tensor(&tensor.to_device(device)?)?;
            parameters.insert(name.clone(), var.as_tensor().clone());
            variables.push((name.clone(), var));
        }
        let (config, device) = (config.clone(), device.clone());
        Ok(Self { config, parameters, variables, device, dtype: DType::F32, statistics: None })
    }

    /// While a base is trained, BatchNorm normalises by the statistics of its own batch, and [`Self::update_statistics`] moves the
    /// running ones. Without this, as in distillation and sampling, they are fixed: one function for training and use.
    pub fn training_statistics(self) -> Self {
        Self { statistics: Some(BatchStatistics::default()), ..self }
    }

    /// Moves the running statistics a tenth of the way to those of the last prediction, as PyTorch does.
    pub fn update_statistics(&mut self) -> Result<()> {
        if let Some(statistics) = &self.statistics {
            statistics.apply(&mut self.parameters)?;
        }
        Ok(())
    }

    /// The same weights, following every later update, without gradients: nothing is kept for a backward pass.
    pub fn without_gradient(&self) -> Self {
        let parameters = self.parameters.iter().map(|(name, t)| (name.clone(), t.detach())).collect();
        let (config, device, dtype) = (self.config.clone(), self.device.clone(), self.dtype);
        Self { config, parameters, variables: Vec::new(), device, dtype, statistics: None }
    }

    /// Predicts noise in bf16 on a GPU, half the time and memory; the weights it follows stay f32. For networks whose
    /// prediction gets no gradient. f16 is not offered: its range is too small for these networks. On the CPU
    /// nothing changes.
    pub fn in_bf16_on_gpu(self) -> Self {
        let dtype = if self.device.is_cuda() { DType::BF16 } else { self.dtype };
        Self { dtype, ..self }
    }

    /// Predicted noise.
    ///
    /// # Shapes
    /// `x_t` `[n, c, h, w]`, `t` `[n]` or `[1]` f32, `class` `[n]` u32; returns `[n, c, h, w]`.
    pub fn eps_pred(&self, x_t: &Tensor, t: &Tensor, class: Option<&Tensor>) -> Result<Tensor> {
        if !self.device.is_cpu() {
            let mut ops = CandleOps::new(&self.parameters, &self.device).in_type(self.dtype);
            if let Some(statistics) = &self.statistics {
                ops.use_batch_statistics(statistics.clone());
            }
            let eps_pred = denoise(&mut ops, &self.config, &x_t.to_dtype(self.dtype)?, t, class)?;
            return Ok(eps_pred.to_dtype(DType::F32)?);
        }
        let (config, class) = (self.config.clone(), numbers(class)?);
        let (t, statistics) = (t.to_vec1::<f32>()?, self.statistics.clone());
        Ok(cpu::apply(std::slice::from_ref(x_t), &self.parameters, move |ops, x| {
            if let Some(statistics) = statistics {
                ops.use_batch_statistics(statistics);
            }
            let (t, class) = (ops.numbers(&t), class.map(|class| ops.numbers(&class)));
            denoise(ops, &config, &x[0], &t, class.as_ref())
        })?)
    }

    /// The image of the one-step generator that these weights make.
    ///
    /// # Shapes
    /// `z` `[n, c, h, w]` standard normal, `class` `[n]` u32; returns `[n, c, h, w]` in the model's range.
    pub fn one_step(&self, generator: &OneStep, z: &Tensor, class: Option<&Tensor>) -> Result<Tensor> {
        if !self.device.is_cpu() {
            let mut ops = CandleOps::new(&self.parameters, &self.device);
            return Ok(one_step(&mut ops, &self.config, generator, z, class)?);
        }
        let (config, generator, class) = (self.config.clone(), *generator, numbers(class)?);
        Ok(cpu::apply(std::slice::from_ref(z), &self.parameters, move |ops, z| {
            let class = class.map(|class| ops.numbers(&class));
            one_step(ops, &config, &generator, &z[0], class.as_ref())
        })?)
    }

    /// All weights by name.
    pub fn parameters(&self) -> &Tensors {
        &self.parameters
    }

    /// The trainable weights, sorted by name; empty if frozen.
    pub fn variables(&self) -> &[(String, Var)] {
        &self.variables
    }

    /// Where the weights are.
    pub fn device(&self) -> &Device {
        &self.device
    }
}

/// Classes as the CPU engine takes them.
fn numbers(class: Option<&Tensor>) -> Result<Option<Vec<f32>>> {
    let classes = class.map(Tensor::to_vec1::<u32>).transpose()?;
    Ok(classes.map(|classes| classes.iter().map(|class| *class as f32).collect()))
}

/// Initial weights as PyTorch makes them: uniform in ±1/sqrt(fan in) for layers, 1 and 0 for norms, standard normal
/// for embeddings.
pub fn initial_weights(config: &ModelConfig, seed: u32) -> Result<Tensors> {
    let summary = shapes::summarise(config)?;
    let mut tensors = Tensors::new();
    for (i, (name, shape)) in summary.parameters.iter().enumerate() {
        let mut random = Random::new(seed, Purpose::Weights, i as u64);
        let count = shape.iter().product::<usize>();
        let layer = name.strip_suffix(".weight").or(name.strip_suffix(".bias")).unwrap_or(name);
        let fan_in = |weight: &Vec<usize>| weight[1..].iter().product::<usize>();
        let fan_in = summary.parameters.get(&format!("{layer}.weight")).filter(|w| w.len() > 1).map(fan_in);
        let values = match (config, fan_in) {
            (ModelConfig::CelebaUnet(config), _) if summary.frozen.contains(name) => {
                celeba_unet::time_table(config)
            }
            (_, Some(_)) if layer.ends_with("class_embedding") => random.normal(count),
            (_, Some(fan_in)) => {
                let bound = 1.0 / (fan_in as f64).sqrt();
                (0..count).map(|_| ((random.unit() * 2.0 - 1.0) * bound) as f32).collect()
            }
            (_, None) => {
                let one = name.ends_with(".weight") || name.ends_with(".running_var");
                vec![f32::from(one); count]
            }
        };
        tensors.insert(name.clone(), Tensor::from_vec(values, shape.as_slice(), &Device::Cpu)?);
    }
    Ok(tensors)
}
