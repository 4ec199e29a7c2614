//! A small classifier of images, whose features the metrics compare: described once over [`Ops`], trained by
//! `dmd-distill classifier`, one of it inside this program.
//! Two blocks per scale at three scales, the mean over the pixels, a layer of features, a layer of classes.
//! Must not know about metrics.

mod train;

use std::path::Path;

use candle_core::{Device, Tensor, Var};
use dmd_assets::CLASSIFIER_FASHION;
use dmd_cli::files::temporary_folder;
use dmd_core::net::shapes::{Summary, trace};
use dmd_core::net::{Activation, Conv2d, GroupNorm, Linear, Ops, Pool};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::checkpoint::{Source, write_json, write_tensors};
use crate::cpu;
use crate::error::{Error, Result};
use crate::network::Tensors;
use crate::ops::CandleOps;
use crate::weights;

pub use train::{ClassifierArgs, cross_entropy, run};

/// The classifier inside this program.
const BUNDLED: Source = Source::Bundled("classifier-fashion", CLASSIFIER_FASHION);
/// `_class_name` in `config.json`.
const CLASS_NAME: &str = "FeatureClassifier";
/// Values of black and white at the input, whatever the range of the model that is judged.
pub const RANGE: [f32; 2] = [-1.0, 1.0];
/// Added to the variance by every normalisation.
const EPS: f64 = 1e-5;

/// What `config.json` says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ClassifierConfig {
    /// `FeatureClassifier`.
    #[serde(rename = "_class_name")]
    pub class_name: String,
    /// Image side; a multiple of 4.
    pub sample_size: usize,
    /// Channels of the image.
    pub in_channels: usize,
    /// Channels at full, half and quarter size; each a multiple of `norm_num_groups`.
    pub block_out_channels: [usize; 3],
    /// Groups of every normalisation.
    pub norm_num_groups: usize,
    /// Size of the penultimate layer.
    pub features: usize,
    /// Classes.
    pub num_classes: usize,
}

/// What `card.json` says.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ClassifierCard {
    /// First part of the features' name.
    pub name: String,
    /// Names of the classes, in order.
    pub classes: Vec<String>,
    /// Data, steps, seed, ….
    pub training: Map<String, Value>,
    /// Accuracy on the test images.
    pub metrics: Map<String, Value>,
}

/// A classifier with its weights on a device.
pub struct Classifier {
    /// Architecture.
    pub config: ClassifierConfig,
    /// Where it came from.
    pub card: ClassifierCard,
    /// SHA-256 of the weights file; empty if never written.
    pub sha256: String,
    parameters: Tensors,
    device: Device,
}

/// Features `[n, features, 1, 1]` of images `[n, c, h, w]` in [`RANGE`]: the penultimate layer after ReLU.
pub fn features<O: Ops>(
    ops: &mut O,
    config: &ClassifierConfig,
    x: &O::Value,
) -> std::result::Result<O::Value, O::Error> {
    let mut x = x.clone();
    for i in 0..config.block_out_channels.len() {
        x = scale(ops, config, i, &x)?;
    }
    let linear = Linear { in_features: config.block_out_channels[2], out_features: config.features };
    let mean = ops.pool(&x, Pool::Average, config.sample_size / 4)?;
    let mapped = ops.pointwise(&mean, "features", linear)?;
    ops.activate(&mapped, Activation::Relu)
}

/// The blocks of one scale, on what the scale before left.
fn scale<O: Ops>(
    ops: &mut O,
    config: &ClassifierConfig,
    i: usize,
    x: &O::Value,
) -> std::result::Result<O::Value, O::Error> {
    let out = config.block_out_channels[i];
    let (mut x, mut channels) = match i {
        0 => (x.clone(), config.in_channels),
        _ => (ops.pool(x, Pool::Max, 2)?, config.block_out_channels[i - 1]),
    };
    for j in 0..2 {
        let conv = Conv2d { in_channels: channels, out_channels: out, kernel: 3, stride: 1, padding: [1; 4] };
        let norm = GroupNorm { channels: out, groups: config.norm_num_groups, eps: EPS, silu: true };
        x = ops.conv2d(&x, &format!("blocks.{i}.conv{j}"), conv)?;
        x = ops.group_norm(&x, &format!("blocks.{i}.norm{j}"), norm)?;
        channels = out;
    }
    Ok(x)
}

impl ClassifierConfig {
    /// The architecture for images of a shape.
    pub fn new([channels, height, width]: [usize; 3], classes: usize) -> Result<Self> {
        let config = Self {
            class_name: CLASS_NAME.to_owned(),
            sample_size: height,
            in_channels: channels,
            block_out_channels: [16, 32, 64],
            norm_num_groups: 8,
            features: 64,
            num_classes: classes,
        };
        match height == width {
            true => config.check(),
            false => Err(Error::Request(format!("images are {height}x{width}, expected squares"))),
        }
    }

    fn check(self) -> Result<Self> {
        let Self { sample_size, norm_num_groups: groups, block_out_channels: channels, .. } = &self;
        let rules = [
            (self.class_name == CLASS_NAME, "`_class_name` is not `FeatureClassifier`"),
            (*sample_size > 0 && sample_size.is_multiple_of(4), "`sample_size` is not a multiple of 4"),
            (
                *groups > 0 && channels.iter().all(|c| *c > 0 && c.is_multiple_of(*groups)),
                "`block_out_channels` are not multiples of `norm_num_groups`",
            ),
            (
                self.features > 0 && self.num_classes > 1 && self.in_channels > 0,
                "`features`, `num_classes` or `in_channels` is too small",
            ),
        ];
        match rules.into_iter().find(|(holds, _)| !holds) {
            Some((_, rule)) => Err(Error::Request(rule.to_owned())),
            None => Ok(self),
        }
    }

    /// `[channels, height, width]`.
    pub fn image_shape(&self) -> [usize; 3] {
        [self.in_channels, self.sample_size, self.sample_size]
    }

    /// Parameters and cost.
    pub fn summary(&self) -> Result<Summary> {
        let [c, h, w] = self.image_shape();
        Ok(trace(|ops| {
            let linear = Linear { in_features: self.features, out_features: self.num_classes };
            let found = features(ops, self, &vec![1, c, h, w])?;
            ops.linear(&found, "classes", linear).map(|_| ())
        })?)
    }
}

impl Classifier {
    /// The one inside this program: Fashion-MNIST.
    pub fn bundled(device: &Device) -> Result<Self> {
        Self::load(&BUNDLED, device)
    }

    /// Reads and checks a folder that `dmd-distill classifier` wrote.
    pub fn load(source: &Source, device: &Device) -> Result<Self> {
        let path = source.path();
        let json = |name: &str| {
            source.read(name)?.ok_or_else(|| {
                Error::content(
                    &path,
                    format!(
                        "there is no `{name}`\n\nhint: `dmd-distill classifier --out DIR` writes such folders"
                    ),
                )
            })
        };
        let (config_path, bytes) = json("config.json")?;
        let config: ClassifierConfig =
            serde_json::from_slice(&bytes).map_err(|e| Error::content(&config_path, e))?;
        let config = config.check().map_err(|e| Error::content(&config_path, e))?;
        let (card_path, bytes) = json("card.json")?;
        let card = serde_json::from_slice(&bytes).map_err(|e| Error::content(&card_path, e))?;
        let found = weights::read(source)?;
        let shapes = found.tensors.iter().map(|(name, tensor)| (name.as_str(), tensor.dims()));
        config.summary()?.check(shapes).map_err(|e| Error::content(&found.path, e))?;
        let mut classifier = Self::new(config, card, &found.tensors, device)?;
        classifier.sha256 = found.sha256;
        Ok(classifier)
    }

    /// With weights that get no gradient.
    pub fn new(
        config: ClassifierConfig,
        card: ClassifierCard,
        weights: &Tensors,
        device: &Device,
    ) -> Result<Self> {
        let mut parameters = Tensors::new();
        for (name, tensor) in weights {
            parameters.insert(name.clone(), tensor.to_device(device)?.detach());
        }
        Ok(Self { config, card, sha256: String::new(), parameters, device: device.clone() })
    }

    /// What the features are called: network, size, first digits of the weights' hash.
    pub fn name(&self) -> String {
        let hash = self.sha256.get(..8).unwrap_or("unsaved");
        format!("{}-{} ({hash})", self.card.name, self.config.features)
    }

    /// Features and logits of images in [`RANGE`].
    ///
    /// # Shapes
    /// `x`: `[n, c, h, w]`; returns `[n, features]` and `[n, classes]`.
    pub fn classify(&self, x: &Tensor) -> Result<(Tensor, Tensor)> {
        forward(&self.config, &self.parameters, &x.to_device(&self.device)?)
    }

    /// What the blocks of each scale make of images in [`RANGE`], differentiable in the images.
    ///
    /// # Shapes
    /// `x`: `[n, c, h, w]`; returns `[n, c', h, w]`, and half and quarter of the size.
    pub fn scales(&self, x: &Tensor) -> Result<Vec<Tensor>> {
        let (mut x, mut all) = (x.to_device(&self.device)?, Vec::new());
        for i in 0..self.config.block_out_channels.len() {
            x = if x.device().is_cpu() {
                let (config, prefix) = (self.config.clone(), format!("blocks.{i}."));
                let own = self.parameters.iter().filter(|(name, _)| name.starts_with(&prefix));
                let own = own.map(|(name, tensor)| (name.clone(), tensor.clone())).collect();
                cpu::apply(&[x], &own, move |ops, x| scale(ops, &config, i, &x[0]))?
            } else {
                scale(&mut CandleOps::new(&self.parameters, x.device()), &self.config, i, &x)?
            };
            all.push(x.clone());
        }
        Ok(all)
    }

    /// The weights by name.
    pub fn parameters(&self) -> &Tensors {
        &self.parameters
    }

    /// Writes a new folder, complete or not at all.
    pub fn save(&self, folder: &Path) -> Result<()> {
        let partial = temporary_folder(folder).map_err(Error::file("create", folder))?;
        write_json(&partial.path().join("config.json"), &self.config)?;
        write_json(&partial.path().join("card.json"), &self.card)?;
        write_tensors(&partial.path().join(weights::NAMES[0]), &self.parameters, &[])?;
        std::fs::rename(partial.path(), folder).map_err(Error::file("write", folder))
    }
}

/// Features and logits, differentiable in every parameter that is a variable.
fn forward(config: &ClassifierConfig, parameters: &Tensors, x: &Tensor) -> Result<(Tensor, Tensor)> {
    let found = if x.device().is_cpu() {
        let config = config.clone();
        cpu::apply(std::slice::from_ref(x), parameters, move |ops, x| features(ops, &config, &x[0]))?
    } else {
        features(&mut CandleOps::new(parameters, x.device()), config, x)?
    };
    let found = found.flatten_from(1)?;
    let missing = |name: &str| {
        let tensor = parameters.get(name).cloned();
        tensor.ok_or_else(|| Error::Request(format!("the classifier lacks tensor `{name}`")))
    };
    let (weight, bias) = (missing("classes.weight")?, missing("classes.bias")?);
    let logits = found.matmul(&weight.t()?)?.broadcast_add(&bias)?;
    Ok((found, logits))
}

/// Weights as variables: a view by name for [`forward`], and the list for an optimiser.
fn trainable(weights: &Tensors, device: &Device) -> Result<(Tensors, Vec<(String, Var)>)> {
    let (mut parameters, mut variables) = (Tensors::new(), Vec::new());
    for (name, tensor) in weights {
        let var = Var::from_tensor(&tensor.to_device(device)?)?;
        parameters.insert(name.clone(), var.as_tensor().clone());
        variables.push((name.clone(), var));
    }
    Ok((parameters, variables))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::{Purpose, Random};

    #[test]
    fn the_bundled_one_is_complete_and_small() {
        let classifier = Classifier::bundled(&Device::Cpu).unwrap();
        let summary = classifier.config.summary().unwrap();
        assert_eq!(classifier.config, ClassifierConfig::new([1, 28, 28], 10).unwrap());
        assert!((50_000..150_000).contains(&summary.parameter_count()), "{}", summary.parameter_count());
        assert_eq!(classifier.card.classes.len(), 10);
        let accuracy = classifier.card.metrics["test_accuracy"].as_f64().unwrap();
        assert!(accuracy > 0.91, "{accuracy}");
    }

    /// The CPU engine and candle's operations see the same network; every parameter gets a gradient.
    #[test]
    fn both_engines_agree() {
        let classifier = Classifier::bundled(&Device::Cpu).unwrap();
        let x = Random::new(0, Purpose::Metrics, 0).normal_tensor(&[5, 1, 28, 28], &Device::Cpu).unwrap();
        let (found, _) = classifier.classify(&x).unwrap();
        let mut ops = CandleOps::new(classifier.parameters(), &Device::Cpu);
        let expected = features(&mut ops, &classifier.config, &x).unwrap().flatten_from(1).unwrap();
        let error =
            (found - &expected).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
        let largest = expected.max_all().unwrap().to_scalar::<f32>().unwrap();
        assert!(error < 1e-4 * largest && largest > 0.0, "{error} of {largest}");

        let (parameters, variables) = trainable(classifier.parameters(), &Device::Cpu).unwrap();
        let (_, logits) = forward(&classifier.config, &parameters, &x).unwrap();
        let grads = cross_entropy(&logits, &[0, 1, 2, 3, 4]).unwrap().backward().unwrap();
        for (name, var) in &variables {
            let grad = grads.get(var).unwrap().abs().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap();
            assert!(grad > 0.0, "no gradient for {name}");
        }
    }
}
