//! The single operations of `tests/golden/ops.safetensors`, for any implementation of [`Ops`].
//! Must not compare anything.

use anyhow::{Context, Result};
use dmd_core::net::{
    Activation, BatchNorm, Conv2d, ConvTranspose2d, Embedding, GroupNorm, Linear, Ops, Pool,
    TimestepEmbedding,
};
use serde_json::Value as Json;

use crate::Golden;

/// One case of the file.
#[derive(Clone, Debug)]
pub struct Operation {
    /// Its name.
    pub case: String,
    /// Names of its inputs, in the order of [`Operation::run`].
    pub inputs: Vec<&'static str>,
    /// Names of its parameters; the layer is called `layer`.
    pub parameters: Vec<&'static str>,
    /// What it is called with that is no image: steps, or rows of a table.
    pub numbers: Vec<f32>,
    about: Json,
    x: Vec<usize>,
    weight: Vec<usize>,
}

impl Operation {
    /// All cases.
    ///
    /// # Errors
    /// If the file is missing or does not describe them.
    pub fn all(golden: &Golden) -> Result<Vec<Self>> {
        let cases = golden.cases()?.as_object().context("the header lists the cases")?;
        cases.iter().map(|(case, about)| Self::read(golden, case, about)).collect()
    }

    fn read(golden: &Golden, case: &str, about: &Json) -> Result<Self> {
        let operation = about["op"].as_str().context("op")?;
        let inputs = match operation {
            "add" | "concat" => vec!["a", "b"],
            "add_bias" => vec!["x", "bias"],
            "scale_channels" => vec!["x", "b"],
            "attention" => vec!["q", "k", "v"],
            "timestep_embedding" | "embedding" => vec![],
            _ => vec!["x"],
        };
        let has = |name: &&str| golden.has(&format!("{case}.{name}"));
        let mut parameters: Vec<&str> =
            ["weight", "bias", "running_mean", "running_var"].into_iter().filter(has).collect();
        parameters.retain(|name| !inputs.contains(name));
        let numbers = match operation {
            "timestep_embedding" => golden.f32(&format!("{case}.t"))?,
            "embedding" => serde_json::from_value(about["index"].clone())?,
            _ => vec![],
        };
        let shape = |name: &str| golden.shape(&format!("{case}.{name}")).map(<[usize]>::to_vec);
        Ok(Self {
            case: case.to_owned(),
            x: inputs.first().map(|name| shape(name)).transpose()?.unwrap_or_default(),
            weight: if parameters.contains(&"weight") { shape("weight")? } else { vec![] },
            inputs,
            parameters,
            numbers,
            about: about.clone(),
        })
    }

    /// Which operation it is.
    pub fn name(&self) -> &str {
        self.about["op"].as_str().unwrap_or_default()
    }

    fn number(&self, key: &str) -> usize {
        let value = self.about[key].as_u64().and_then(|v| usize::try_from(v).ok());
        value.unwrap_or_else(|| panic!("`{key}` in {}", self.about))
    }

    fn float(&self, key: &str) -> f64 {
        self.about[key].as_f64().unwrap_or_else(|| panic!("`{key}` in {}", self.about))
    }

    /// Whether the case uses its input a second time.
    fn again(&self) -> bool {
        !self.about["then"].is_null()
    }

    /// Runs it.
    ///
    /// # Errors
    /// What the implementation cannot do.
    ///
    /// # Panics
    /// If the case is none of those that this function knows.
    pub fn run<O: Ops>(&self, ops: &mut O, x: &[O::Value], numbers: &O::Value) -> Result<O::Value, O::Error> {
        let linear = || Linear { in_features: self.weight[1], out_features: self.weight[0] };
        match self.name() {
            "conv2d" => {
                let (out_channels, in_channels, kernel) = (self.weight[0], self.weight[1], self.weight[2]);
                let padding =
                    std::array::from_fn(|i| self.about["padding"][i].as_u64().unwrap_or(0) as usize);
                let stride = self.number("stride");
                ops.conv2d(&x[0], "layer", Conv2d { in_channels, out_channels, kernel, stride, padding })
            }
            "conv_transpose2d" => {
                let (in_channels, out_channels, kernel) = (self.weight[0], self.weight[1], self.weight[2]);
                let (stride, padding) = (self.number("stride"), self.number("padding"));
                let spec = ConvTranspose2d { in_channels, out_channels, kernel, stride, padding };
                ops.conv_transpose2d(&x[0], "layer", spec)
            }
            "group_norm" => {
                let (channels, groups, eps) = (self.x[1], self.number("groups"), self.float("eps"));
                let silu = self.about["silu"] == true;
                ops.group_norm(&x[0], "layer", GroupNorm { channels, groups, eps, silu })
            }
            "batch_norm" => {
                ops.batch_norm(&x[0], "layer", BatchNorm { channels: self.x[1], eps: self.float("eps") })
            }
            "pool" => {
                let pool = if self.about["pool"] == "max" { Pool::Max } else { Pool::Average };
                let y = ops.pool(&x[0], pool, self.number("size"))?;
                if !self.again() {
                    return Ok(y);
                }
                let again = ops.activate(&x[0], Activation::Relu)?;
                let again = ops.pool(&again, pool, self.number("size"))?;
                ops.concat(&y, &again)
            }
            "upsample_nearest2x" => {
                let y = ops.upsample_nearest2x(&x[0])?;
                if !self.again() {
                    return Ok(y);
                }
                let again = ops.activate(&x[0], Activation::Silu)?;
                let again = ops.upsample_nearest2x(&again)?;
                ops.add(&y, &again)
            }
            "silu" => ops.activate(&x[0], Activation::Silu),
            "gelu" => ops.activate(&x[0], Activation::Gelu),
            "relu" => ops.activate(&x[0], Activation::Relu),
            "mish" => ops.activate(&x[0], Activation::Mish),
            "linear" => ops.linear(&x[0], "layer", linear()),
            "pointwise" => ops.pointwise(&x[0], "layer", linear()),
            "attention" => ops.attention(&x[0], &x[1], &x[2], self.number("heads")),
            "concat" => ops.concat(&x[0], &x[1]),
            "add" => ops.add(&x[0], &x[1]),
            "add_bias" => ops.add_bias(&x[0], &x[1]),
            "scale" => ops.scale(&x[0], self.float("factor")),
            "narrow" => ops.narrow(&x[0], self.number("first"), self.number("count")),
            "scale_channels" => ops.scale_channels(&x[0], &x[1]),
            "embedding" => {
                let (rows, features) = (self.weight[0], self.weight[1]);
                ops.embedding(numbers, "layer", Embedding { rows, features, frozen: false })
            }
            "timestep_embedding" => {
                let spec = TimestepEmbedding {
                    features: self.number("features"),
                    flip_sin_to_cos: self.about["flip"] == true,
                    freq_shift: self.float("freq_shift"),
                };
                ops.timestep_embedding(numbers, spec)
            }
            other => panic!("operation `{other}` is not tested here"),
        }
    }
}
