//! [`Ops`] on shapes: the list of parameters, and the multiply-accumulate operations, of a network for one image.

use std::collections::{BTreeMap, BTreeSet};

use super::{
    Activation, BatchNorm, Conv2d, ConvTranspose2d, Embedding, GroupNorm, Linear, Ops, Pool,
    TimestepEmbedding, denoise, discriminator,
};
use crate::config::ModelConfig;
use crate::{Error, Result};

/// What a network is made of.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Summary {
    /// Shape of every tensor of a checkpoint, by name: parameters and statistics.
    pub parameters: BTreeMap<String, Vec<usize>>,
    /// Names of those that training never changes: statistics, fixed tables, and what the network never looks at.
    pub frozen: BTreeSet<String>,
    /// Names of the statistics among them, which nobody counts.
    pub statistics: BTreeSet<String>,
    /// Multiply-accumulate operations per image, by layer, in order.
    pub macs: Vec<(String, u64)>,
    /// Values per image of all results that a backward pass reads again.
    pub activations: u64,
}

/// Walks a denoiser once on shapes.
pub fn summarise(config: &ModelConfig) -> Result<Summary> {
    let [c, h, w] = config.image_shape();
    let class = config.class_rows().map(|_| vec![1]);
    trace(|ops| denoise(ops, config, &vec![1, c, h, w], &vec![1], class.as_ref()).map(|_| ()))
}

/// Walks any network once on shapes, which are its values: `[n, c, h, w]` or `[n, features]`.
pub fn trace(network: impl FnOnce(&mut Shapes) -> Result<()>) -> Result<Summary> {
    let mut ops = Shapes(Summary::default());
    network(&mut ops)?;
    Ok(ops.0)
}

/// Walks the critic's way to its discriminator once on shapes: only the parameters of the head are listed.
pub fn summarise_discriminator(config: &ModelConfig) -> Result<Summary> {
    let mut ops = Shapes(Summary::default());
    let [c, h, w] = config.image_shape();
    let class = config.class_rows().map(|_| vec![1]);
    let logit = discriminator::logit(&mut ops, config, &vec![1, c, h, w], &vec![1], class.as_ref())?;
    expect("discriminator", &logit, 2, 1)?;
    ops.0.parameters.retain(|name, _| name.starts_with(discriminator::PREFIX));
    Ok(ops.0)
}

impl Summary {
    /// Numbers in all parameters.
    pub fn parameter_count(&self) -> usize {
        let parameters = self.parameters.iter().filter(|(name, _)| !self.statistics.contains(*name));
        parameters.map(|(_, shape)| shape.iter().product::<usize>()).sum()
    }

    /// Multiply-accumulate operations per image.
    pub fn total_macs(&self) -> u64 {
        self.macs.iter().fold(0, |sum, (_, macs)| sum.saturating_add(*macs))
    }

    /// Compares a checkpoint's tensors with what the configuration asks for; names the first that differs.
    pub fn check<'a>(&self, tensors: impl IntoIterator<Item = (&'a str, &'a [usize])>) -> Result<()> {
        let found: BTreeMap<&str, &[usize]> = tensors.into_iter().collect();
        for (name, expected) in &self.parameters {
            match found.get(name.as_str()) {
                None => {
                    return Err(Error::Shape {
                        name: name.clone(),
                        got: vec![],
                        expected: format!("{expected:?} from config.json, but the tensor is missing"),
                    });
                }
                Some(got) if *got != expected.as_slice() => {
                    return Err(Error::Shape {
                        name: name.clone(),
                        got: got.to_vec(),
                        expected: format!("{expected:?} from config.json"),
                    });
                }
                Some(_) => {}
            }
        }
        match found.iter().find(|(name, _)| !self.parameters.contains_key(**name)) {
            None => Ok(()),
            Some((name, got)) => Err(Error::Shape {
                name: (*name).to_owned(),
                got: got.to_vec(),
                expected: "no such tensor: config.json describes a network without it".into(),
            }),
        }
    }
}

/// [`Ops`] on shapes; made by [`trace`].
pub struct Shapes(Summary);

impl Shapes {
    /// Counts a result of this shape.
    fn made(&mut self, shape: Vec<usize>) -> Vec<usize> {
        self.0.activations += shape.iter().product::<usize>() as u64;
        shape
    }

    fn parameter(&mut self, name: &str, suffix: &str, shape: &[usize]) {
        self.0.parameters.insert(format!("{name}.{suffix}"), shape.to_vec());
    }

    fn affine(&mut self, name: &str, weight: &[usize], macs: usize) {
        self.parameter(name, "weight", weight);
        self.parameter(name, "bias", &weight[..1]);
        self.0.macs.push((name.to_owned(), macs as u64));
    }
}

fn expect(name: &str, got: &[usize], axis: usize, want: usize) -> Result<()> {
    if got.get(axis) == Some(&want) {
        return Ok(());
    }
    Err(Error::Shape { name: name.to_owned(), got: got.to_vec(), expected: format!("{want} on axis {axis}") })
}

impl Ops for Shapes {
    type Value = Vec<usize>;
    type Error = Error;

    fn timestep(&mut self, _t: f64) -> Result<Vec<usize>> {
        Ok(vec![1])
    }

    fn timestep_embedding(&mut self, t: &Vec<usize>, spec: TimestepEmbedding) -> Result<Vec<usize>> {
        Ok(vec![t[0], spec.features])
    }

    fn embedding(&mut self, index: &Vec<usize>, name: &str, spec: Embedding) -> Result<Vec<usize>> {
        self.parameter(name, "weight", &[spec.rows, spec.features]);
        if spec.frozen {
            self.0.frozen.insert(format!("{name}.weight"));
        }
        Ok(vec![index[0], spec.features])
    }

    fn unused(&mut self, name: &str, shape: &[usize]) {
        self.0.parameters.insert(name.to_owned(), shape.to_vec());
        self.0.frozen.insert(name.to_owned());
    }

    fn linear(&mut self, x: &Vec<usize>, name: &str, spec: Linear) -> Result<Vec<usize>> {
        expect(name, x, 1, spec.in_features)?;
        self.affine(name, &[spec.out_features, spec.in_features], spec.in_features * spec.out_features);
        Ok(vec![x[0], spec.out_features])
    }

    fn pointwise(&mut self, x: &Vec<usize>, name: &str, spec: Linear) -> Result<Vec<usize>> {
        expect(name, x, 1, spec.in_features)?;
        let macs = spec.in_features * spec.out_features * x[2] * x[3];
        self.affine(name, &[spec.out_features, spec.in_features], macs);
        Ok(self.made(vec![x[0], spec.out_features, x[2], x[3]]))
    }

    fn conv2d(&mut self, x: &Vec<usize>, name: &str, spec: Conv2d) -> Result<Vec<usize>> {
        expect(name, x, 1, spec.in_channels)?;
        let [top, left, bottom, right] = spec.padding;
        let size = |n: usize, before: usize, after: usize| {
            (n + before + after).checked_sub(spec.kernel).map(|room| room / spec.stride + 1).ok_or_else(
                || {
                    let expected = format!("an image at least {} high and wide", spec.kernel);
                    Error::Shape { name: name.to_owned(), got: x.clone(), expected }
                },
            )
        };
        let (h, w) = (size(x[2], top, bottom)?, size(x[3], left, right)?);
        let weight = [spec.out_channels, spec.in_channels, spec.kernel, spec.kernel];
        self.affine(name, &weight, weight.iter().product::<usize>() * h * w);
        Ok(self.made(vec![x[0], spec.out_channels, h, w]))
    }

    fn group_norm(&mut self, x: &Vec<usize>, name: &str, spec: GroupNorm) -> Result<Vec<usize>> {
        expect(name, x, 1, spec.channels)?;
        self.parameter(name, "weight", &[spec.channels]);
        self.parameter(name, "bias", &[spec.channels]);
        Ok(self.made(x.clone()))
    }

    fn conv_transpose2d(&mut self, x: &Vec<usize>, name: &str, spec: ConvTranspose2d) -> Result<Vec<usize>> {
        expect(name, x, 1, spec.in_channels)?;
        let side = |side: usize| {
            let expected = format!("an image that is larger than the padding {}", spec.padding);
            spec.output(side).ok_or_else(|| Error::Shape { name: name.to_owned(), got: x.clone(), expected })
        };
        let weight = [spec.in_channels, spec.out_channels, spec.kernel, spec.kernel];
        self.parameter(name, "weight", &weight);
        self.parameter(name, "bias", &weight[1..2]);
        self.0.macs.push((name.to_owned(), (weight.iter().product::<usize>() * x[2] * x[3]) as u64));
        Ok(self.made(vec![x[0], spec.out_channels, side(x[2])?, side(x[3])?]))
    }

    fn batch_norm(&mut self, x: &Vec<usize>, name: &str, spec: BatchNorm) -> Result<Vec<usize>> {
        expect(name, x, 1, spec.channels)?;
        for suffix in ["weight", "bias", "running_mean", "running_var"] {
            self.parameter(name, suffix, &[spec.channels]);
        }
        let statistics = ["running_mean", "running_var"].map(|suffix| format!("{name}.{suffix}"));
        self.0.frozen.extend(statistics.clone());
        self.0.statistics.extend(statistics);
        Ok(self.made(x.clone()))
    }

    fn activate(&mut self, x: &Vec<usize>, _activation: Activation) -> Result<Vec<usize>> {
        Ok(self.made(x.clone()))
    }

    fn pool(&mut self, x: &Vec<usize>, _pool: Pool, size: usize) -> Result<Vec<usize>> {
        if x[2] < size || x[3] < size {
            let expected = format!("an image of at least {size} by {size}");
            return Err(Error::Shape { name: "pool".into(), got: x.clone(), expected });
        }
        Ok(self.made(vec![x[0], x[1], x[2] / size, x[3] / size]))
    }

    fn one_hot(&mut self, index: &Vec<usize>, rows: usize) -> Result<Vec<usize>> {
        Ok(vec![index[0], rows])
    }

    fn feature(&mut self, x: &Vec<usize>, _factor: f64) -> Result<Vec<usize>> {
        Ok(vec![x[0], 1])
    }

    fn narrow(&mut self, x: &Vec<usize>, first: usize, count: usize) -> Result<Vec<usize>> {
        if first + count <= x[1] {
            return Ok(self.made([&[x[0], count], &x[2..]].concat()));
        }
        let expected = format!("at least {} channels", first + count);
        Err(Error::Shape { name: "narrow".into(), got: x.clone(), expected })
    }

    fn scale_channels(&mut self, x: &Vec<usize>, factor: &Vec<usize>) -> Result<Vec<usize>> {
        expect("scale_channels", factor, 1, x[1])?;
        Ok(self.made(x.clone()))
    }

    fn add(&mut self, a: &Vec<usize>, b: &Vec<usize>) -> Result<Vec<usize>> {
        if a[1..] == b[1..] {
            return Ok(self.made(a.clone()));
        }
        Err(Error::Shape { name: "add".into(), got: b.clone(), expected: format!("{a:?}") })
    }

    fn add_bias(&mut self, x: &Vec<usize>, bias: &Vec<usize>) -> Result<Vec<usize>> {
        expect("add_bias", bias, 1, x[1])?;
        Ok(self.made(x.clone()))
    }

    fn scale(&mut self, x: &Vec<usize>, _factor: f64) -> Result<Vec<usize>> {
        Ok(self.made(x.clone()))
    }

    fn concat(&mut self, a: &Vec<usize>, b: &Vec<usize>) -> Result<Vec<usize>> {
        if a[2..] == b[2..] {
            return Ok(self.made(vec![a[0], a[1] + b[1], a[2], a[3]]));
        }
        Err(Error::Shape { name: "concat".into(), got: b.clone(), expected: format!("the size of {a:?}") })
    }

    fn upsample_nearest2x(&mut self, x: &Vec<usize>) -> Result<Vec<usize>> {
        Ok(self.made(vec![x[0], x[1], 2 * x[2], 2 * x[3]]))
    }

    fn attention(
        &mut self,
        q: &Vec<usize>,
        _k: &Vec<usize>,
        _v: &Vec<usize>,
        _heads: usize,
    ) -> Result<Vec<usize>> {
        let pixels = q[2] * q[3];
        let macs = [2, pixels, pixels, q[1]].iter().fold(1u64, |n, size| n.saturating_mul(*size as u64));
        self.0.macs.push(("attention".into(), macs));
        Ok(self.made(q.clone()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::net::{bottleneck, bottleneck_shape};

    const CIFAR10: &str = r#"{"_class_name":"UNet2DModel","_diffusers_version":"0.0.4","act_fn":"silu",
        "attention_head_dim":null,"block_out_channels":[128,256,256,256],"center_input_sample":false,
        "down_block_types":["DownBlock2D","AttnDownBlock2D","DownBlock2D","DownBlock2D"],"downsample_padding":0,
        "flip_sin_to_cos":false,"freq_shift":1,"in_channels":3,"layers_per_block":2,"mid_block_scale_factor":1,
        "norm_eps":1e-06,"norm_num_groups":32,"out_channels":3,"sample_size":32,"time_embedding_type":"positional",
        "up_block_types":["UpBlock2D","UpBlock2D","AttnUpBlock2D","UpBlock2D"]}"#;

    #[test]
    fn ddpm_cifar10_has_its_published_size() {
        let summary = summarise(&ModelConfig::from_json(CIFAR10).unwrap()).unwrap();
        assert_eq!(summary.parameter_count(), 35_746_307);
        assert_eq!(summary.parameters.len(), 328);
        let giga = summary.total_macs() as f64 / 1e9;
        assert!((giga - 6.22).abs() < 0.01, "{giga} GMAC, expected 6.054 + 0.168");
    }

    #[test]
    fn every_network_has_a_bottleneck_and_a_discriminator() {
        let unet = |side: usize, channels: &str| {
            let kinds = |name: &'static str| vec![name; channels.matches(',').count() + 1];
            ModelConfig::from_json(&format!(
                r#"{{"_class_name":"UNet2DModel","sample_size":{side},"in_channels":1,"out_channels":1,"block_out_channels":{channels},"down_block_types":{:?},"up_block_types":{:?},"norm_num_groups":8}}"#,
                kinds("DownBlock2D"),
                kinds("UpBlock2D")
            ))
            .unwrap()
        };
        let others = [r#"{"_class_name":"ContextUnet","n_feat":16}"#, r#"{"_class_name":"CelebaUNet"}"#];
        let mut configs = others.map(|text| ModelConfig::from_json(text).unwrap()).to_vec();
        configs.extend([
            unet(28, "[16, 32, 64]"),
            unet(32, "[8, 8, 8, 8]"),
            unet(64, "[8, 16]"),
            unet(12, "[8]"),
        ]);
        for config in configs {
            let shape = bottleneck_shape(&config);
            let [c, h, w] = config.image_shape();
            let class = config.class_rows().map(|_| vec![1]);
            let mut ops = Shapes(Summary::default());
            let got = bottleneck(&mut ops, &config, &vec![1, c, h, w], &vec![1], class.as_ref()).unwrap();
            assert_eq!(got[1..], shape, "{config:?}");
            let head = summarise_discriminator(&config).unwrap();
            assert_eq!(head.parameters["discriminator.logit.weight"], [1, shape[0], 1, 1]);
        }
    }

    #[test]
    fn the_reference_networks_have_their_published_sizes() {
        let context = r#"{"_class_name":"ContextUnet","n_feat":128}"#;
        let celeba = r#"{"_class_name":"CelebaUNet"}"#;
        for (text, count) in [(context, 6_585_601), (celeba, 426_691)] {
            let config = ModelConfig::from_json(text).unwrap();
            let summary = summarise(&config).unwrap();
            assert_eq!(summary.parameter_count(), count, "{text}");
            let again = ModelConfig::from_json(&serde_json::to_string(&config).unwrap()).unwrap();
            assert_eq!(again, config);
        }
        let frozen = summarise(&ModelConfig::from_json(celeba).unwrap()).unwrap().frozen;
        let unused = frozen.iter().filter(|name| name.contains(".attn.norm.")).count();
        assert_eq!((frozen.len(), unused), (9, 8), "the table of steps and what nobody looks at: {frozen:?}");
    }

    #[test]
    fn config_round_trips_and_refuses_what_it_lacks() {
        let config = ModelConfig::from_json(CIFAR10).unwrap();
        let text = serde_json::to_string(&config).unwrap();
        assert_eq!(ModelConfig::from_json(&text).unwrap(), config);
        for (from, to, key) in [
            ("\"silu\"", "\"tanh\"", "act_fn"),
            ("\"freq_shift\":1", "\"freq_shift\":64", "freq_shift"),
            ("\"in_channels\":3", "\"in_channels\":4", "out_channels"),
            ("\"AttnUpBlock2D\"", "\"SkipUpBlock2D\"", "up_block_types"),
            ("\"sample_size\":32", "\"sample_size\":30", "sample_size"),
            ("\"norm_num_groups\":32", "\"norm_num_groups\":48", "block_out_channels"),
            ("\"act_fn\"", "\"encoder_hid_dim\":4,\"act_fn\"", "encoder_hid_dim"),
        ] {
            let err = ModelConfig::from_json(&CIFAR10.replacen(from, to, 1)).unwrap_err().to_string();
            assert!(err.contains(&format!("`{key}`")), "{from} to {to}: {err}");
        }
    }

    #[test]
    fn a_checkpoint_that_disagrees_is_named() {
        let summary = summarise(&ModelConfig::from_json(CIFAR10).unwrap()).unwrap();
        let all = |skip: &str| -> Vec<(&str, &[usize])> {
            summary
                .parameters
                .iter()
                .filter(|(n, _)| *n != skip)
                .map(|(n, s)| (n.as_str(), s.as_slice()))
                .collect()
        };
        assert!(summary.check(all("")).is_ok());
        assert!(summary.check(all("conv_in.weight")).unwrap_err().to_string().contains("missing"));
        let mut wrong = all("conv_in.weight");
        wrong.push(("conv_in.weight", &[64, 3, 3, 3]));
        assert!(summary.check(wrong).unwrap_err().to_string().contains("[64, 3, 3, 3]"));
        let mut extra = all("");
        extra.push(("ema.decay", &[1]));
        assert!(summary.check(extra).unwrap_err().to_string().contains("ema.decay"));
    }
}
