//! A denoiser with its weights on a device: frozen or trainable.

use std::collections::BTreeMap;

use candle_core::{DType, Device, Tensor, Var};
use dmd_core::card::Classes;
use dmd_core::config::ModelConfig;
use dmd_core::net::{OneStep, celeba_unet, denoise, discriminator, one_step, shapes};

use crate::cpu;
use crate::error::{Error, Result};
use crate::ops::CandleOps;
use crate::parallel::Team;
use crate::random::{Purpose, Random};
use crate::statistics::BatchStatistics;

/// Tensors by checkpoint name.
pub type Tensors = BTreeMap<String, Tensor>;

/// What runs a network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Engine {
    /// [`crate::cpu`]: the project's own kernels, in the CPU's memory.
    Kernels,
    /// [`crate::ops`]: compositions of candle's operations, on every device.
    Compositions,
}

impl Engine {
    /// The one that is meant for a device.
    pub fn of(device: &Device) -> Self {
        if device.is_cpu() { Self::Kernels } else { Self::Compositions }
    }
}

/// A denoiser and its weights.
pub struct Network {
    /// What the weights describe.
    pub config: ModelConfig,
    /// The device's own, unless it is changed: tests run what GPUs use on the CPU.
    pub engine: Engine,
    parameters: Tensors,
    variables: Vec<(String, Var)>,
    device: Device,
    /// What predictions are computed in.
    dtype: DType,
    /// Present while BatchNorm normalises by its own batch.
    statistics: Option<BatchStatistics>,
}

/// Classifier-free guidance of a base that was trained with dropped labels.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Guidance {
    /// Strength; 1 is the class alone.
    pub scale: f64,
    /// The class that stands for none.
    pub none: u32,
}

impl Guidance {
    /// Of strength `scale` for a base with these classes; none for 1.
    ///
    /// # Errors
    /// If the base knows no class that stands for none.
    pub fn new(scale: f64, classes: Option<&Classes>) -> Result<Option<Self>> {
        match classes.and_then(|classes| classes.none) {
            _ if scale == 1.0 => Ok(None),
            Some(none) if scale.is_finite() => Ok(Some(Self { scale, none: none as u32 })),
            Some(_) => Err(Error::Request(format!("got `--guidance {scale}`, expected a finite number"))),
            None => Err(Error::Request(format!(
                "got `--guidance {scale}`, expected 1: the base was not trained with a class that stands for none"
            ))),
        }
    }
}

impl Network {
    /// Weights that never change and never get a gradient.
    pub fn frozen(config: &ModelConfig, tensors: &Tensors, device: &Device) -> Result<Self> {
        let mut parameters = Tensors::new();
        for (name, tensor) in tensors {
            parameters.insert(name.clone(), tensor.to_device(device)?.detach());
        }
        Ok(Self::new(config.clone(), parameters, Vec::new(), device))
    }

    fn new(config: ModelConfig, parameters: Tensors, variables: Vec<(String, Var)>, device: &Device) -> Self {
        let (engine, device) = (Engine::of(device), device.clone());
        Self { config, engine, parameters, variables, device, dtype: DType::F32, statistics: None }
    }

    /// A copy of the weights as variables, in the order of their names; what training never changes stays as it is.
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
        Ok(Self::new(config.clone(), parameters, variables, device))
    }

    /// While a base is trained, BatchNorm normalises by the statistics of its own batch, and [`Self::update_statistics`] moves the
    /// running ones. Without this, as in distillation and sampling, they are fixed: one function for training and use.
    pub fn training_statistics(self) -> Self {
        self.shared_statistics(&Team::alone(), 1.0)
    }

    /// The same with the statistics of a batch that ranks share; `weight` is the share of this one's images.
    pub fn shared_statistics(self, team: &Team, weight: f64) -> Self {
        Self { statistics: Some(BatchStatistics::new(team, weight)), ..self }
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
        let (engine, dtype) = (self.engine, self.dtype);
        Self { engine, dtype, ..Self::new(self.config.clone(), parameters, Vec::new(), &self.device) }
    }

    /// Predicts noise in bf16 on a GPU, half the time and memory; the weights it follows stay f32. For networks whose
    /// prediction gets no gradient. f16 is not offered: its range is too small for these networks. On the CPU
    /// nothing changes.
    pub fn in_bf16_on_gpu(self) -> Self {
        let dtype = if self.device.is_cuda() { DType::BF16 } else { self.dtype };
        Self { dtype, ..self }
    }

    /// What the network predicts: noise, image or velocity; [`crate::losses::NoiseLevels`] knows what that means.
    ///
    /// # Shapes
    /// `x_t` `[n, c, h, w]`, `t` `[n]` or `[1]` f32, `class` `[n]` u32; returns `[n, c, h, w]`.
    pub fn predict(&self, x_t: &Tensor, t: &Tensor, class: Option<&Tensor>) -> Result<Tensor> {
        if self.engine == Engine::Compositions {
            let mut ops = CandleOps::new(&self.parameters, &self.device).in_type(self.dtype);
            if let Some(statistics) = &self.statistics {
                ops.use_batch_statistics(statistics.clone());
            }
            let prediction = denoise(&mut ops, &self.config, &x_t.to_dtype(self.dtype)?, t, class)?;
            return Ok(prediction.to_dtype(DType::F32)?);
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

    /// The prediction with classifier-free guidance, `none + scale·(class − none)`, in one pass over both.
    /// Ho and Salimans 2022 (arXiv:2207.12598), Eq. 6 with `scale = 1 + w`.
    ///
    /// # Shapes
    /// As [`Self::predict`].
    pub fn predict_guided(
        &self,
        x_t: &Tensor,
        t: &Tensor,
        class: Option<&Tensor>,
        guidance: Option<Guidance>,
    ) -> Result<Tensor> {
        let (Some(class), Some(Guidance { scale, none })) = (class, guidance) else {
            return self.predict(x_t, t, class);
        };
        let n = x_t.dims()[0];
        let twice = |x: &Tensor| Tensor::cat(&[x, x], 0);
        let t = if t.dims()[0] == 1 { t.clone() } else { twice(t)? };
        let classes = Tensor::cat(&[class, &Tensor::full(none, n, class.device())?], 0)?;
        let both = self.predict(&twice(x_t)?, &t, Some(&classes))?;
        let (with, without) = (both.narrow(0, 0, n)?, both.narrow(0, n, n)?);
        Ok(((with - &without)?.affine(scale, 0.0)? + without)?)
    }

    /// How real the critic's head takes noisy images to be, as logits; see [`discriminator`].
    ///
    /// # Shapes
    /// Arguments as [`Self::predict`]; returns `[n, 1, 1, 1]`.
    pub fn logit(&self, x_t: &Tensor, t: &Tensor, class: Option<&Tensor>) -> Result<Tensor> {
        if self.engine == Engine::Compositions {
            let mut ops = CandleOps::new(&self.parameters, &self.device);
            return Ok(discriminator::logit(&mut ops, &self.config, x_t, t, class)?);
        }
        let (config, class, t) = (self.config.clone(), numbers(class)?, t.to_vec1::<f32>()?);
        Ok(cpu::apply(std::slice::from_ref(x_t), &self.parameters, move |ops, x| {
            let (t, class) = (ops.numbers(&t), class.map(|class| ops.numbers(&class)));
            discriminator::logit(ops, &config, &x[0], &t, class.as_ref())
        })?)
    }

    /// The image of the one-step generator that these weights make.
    ///
    /// # Shapes
    /// `z` `[n, c, h, w]` standard normal, `class` `[n]` u32; returns `[n, c, h, w]` in the model's range.
    pub fn one_step(&self, generator: &OneStep, z: &Tensor, class: Option<&Tensor>) -> Result<Tensor> {
        if self.engine == Engine::Compositions {
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

/// Initial weights of a network.
pub fn initial_weights(config: &ModelConfig, seed: u32) -> Result<Tensors> {
    let mut tensors = initialise(&shapes::summarise(config)?, seed, Purpose::Weights)?;
    if let ModelConfig::CelebaUnet(config) = config {
        for (name, table) in tensors.iter_mut().filter(|(name, _)| *name == "time_embed.weight") {
            *table = Tensor::from_vec(celeba_unet::time_table(config), table.shape(), &Device::Cpu)
                .map_err(|e| e.context(name.clone()))?;
        }
    }
    Ok(tensors)
}

/// Initial weights of the head that tells real images from generated ones.
pub fn initial_discriminator(config: &ModelConfig, seed: u32) -> Result<Tensors> {
    initialise(&shapes::summarise_discriminator(config)?, seed, Purpose::Discriminator)
}

/// As PyTorch does it: uniform in ±1/sqrt(fan in) for layers, 1 and 0 for norms, standard normal for embeddings.
fn initialise(summary: &shapes::Summary, seed: u32, purpose: Purpose) -> Result<Tensors> {
    let mut tensors = Tensors::new();
    for (i, (name, shape)) in summary.parameters.iter().enumerate() {
        let mut random = Random::new(seed, purpose, i as u64);
        let count = shape.iter().product::<usize>();
        let layer = name.strip_suffix(".weight").or(name.strip_suffix(".bias")).unwrap_or(name);
        let fan_in = |weight: &Vec<usize>| weight[1..].iter().product::<usize>();
        let fan_in = summary.parameters.get(&format!("{layer}.weight")).filter(|w| w.len() > 1).map(fan_in);
        let values = match fan_in {
            Some(_) if layer.ends_with("class_embedding") => random.normal(count),
            Some(fan_in) => {
                let bound = 1.0 / (fan_in as f64).sqrt();
                (0..count).map(|_| ((random.unit() * 2.0 - 1.0) * bound) as f32).collect()
            }
            None => {
                let one = name.ends_with(".weight") || name.ends_with(".running_var");
                vec![f32::from(one); count]
            }
        };
        tensors.insert(name.clone(), Tensor::from_vec(values, shape.as_slice(), &Device::Cpu)?);
    }
    Ok(tensors)
}
