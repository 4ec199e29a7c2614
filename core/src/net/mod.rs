//! Networks, each described once as a function over [`Ops`].
//!
//! distill runs a description on candle tensors, export on "constant, per-class table or graph value", and
//! [`shapes`] on shapes alone. A description never names a tensor library.

pub mod shapes;
pub mod unet2d;

use crate::config::ModelConfig;

/// Convolution over `[n, c, h, w]`; weight `NAME.weight` `[out, in, kernel, kernel]`, bias `NAME.bias` `[out]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Conv2d {
    /// Input channels.
    pub in_channels: usize,
    /// Output channels.
    pub out_channels: usize,
    /// Side of the kernel.
    pub kernel: usize,
    /// Step of the kernel.
    pub stride: usize,
    /// Zeros around the image: `[top, left, bottom, right]`.
    pub padding: [usize; 4],
}

/// Affine map of the last axis or of the channels; weight `NAME.weight` `[out, in]`, bias `NAME.bias` `[out]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Linear {
    /// Input features.
    pub in_features: usize,
    /// Output features.
    pub out_features: usize,
}

/// Normalisation over groups of channels, followed by SiLU if asked; `NAME.weight` and `NAME.bias` `[channels]`.
/// Wu and He 2018 (arXiv:1803.08494).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct GroupNorm {
    /// Channels.
    pub channels: usize,
    /// Groups; divides `channels`.
    pub groups: usize,
    /// Added to the variance.
    pub eps: f64,
    /// Apply `x·sigmoid(x)` to the result.
    pub silu: bool,
}

/// Lookup of rows; weight `NAME.weight` `[rows, features]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Embedding {
    /// Rows of the table.
    pub rows: usize,
    /// Features per row.
    pub features: usize,
}

/// Sinusoidal embedding of the step: `[sin(t·f_k), cos(t·f_k)]` with `f_k = 10000^(−k / (features/2 − freq_shift))`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TimestepEmbedding {
    /// Features, even.
    pub features: usize,
    /// Cosines first.
    pub flip_sin_to_cos: bool,
    /// See the formula.
    pub freq_shift: f64,
}

impl TimestepEmbedding {
    /// The frequencies `f_k`, half as many as features.
    pub fn frequencies(&self) -> Vec<f64> {
        let half = self.features / 2;
        let step = -libm::log(10_000.0) / (half as f64 - self.freq_shift);
        (0..half).map(|k| libm::exp(step * k as f64)).collect()
    }
}

/// The vocabulary the denoisers are written in. A batch of one stands for every batch: values that depend neither
/// on the image nor on the class have `n = 1` and broadcast where they meet one that does.
pub trait Ops {
    /// A candle tensor, an ONNX value or a shape.
    type Value: Clone;
    /// What can go wrong.
    type Error: From<crate::Error>;

    /// The step `t`, the same for every image: `[1]`.
    fn timestep(&mut self, t: f64) -> Result<Self::Value, Self::Error>;
    /// `t` `[n]` to `[n, features]`.
    fn timestep_embedding(
        &mut self,
        t: &Self::Value,
        spec: TimestepEmbedding,
    ) -> Result<Self::Value, Self::Error>;
    /// `index` `[n]` to `[n, features]`.
    fn embedding(
        &mut self,
        index: &Self::Value,
        name: &str,
        spec: Embedding,
    ) -> Result<Self::Value, Self::Error>;
    /// `[n, in]` to `[n, out]`.
    fn linear(&mut self, x: &Self::Value, name: &str, spec: Linear) -> Result<Self::Value, Self::Error>;
    /// A linear map of the channels at every pixel: `[n, in, h, w]` to `[n, out, h, w]`.
    fn pointwise(&mut self, x: &Self::Value, name: &str, spec: Linear) -> Result<Self::Value, Self::Error>;
    /// `[n, in, h, w]` to `[n, out, h', w']`.
    fn conv2d(&mut self, x: &Self::Value, name: &str, spec: Conv2d) -> Result<Self::Value, Self::Error>;
    /// Same shape.
    fn group_norm(
        &mut self,
        x: &Self::Value,
        name: &str,
        spec: GroupNorm,
    ) -> Result<Self::Value, Self::Error>;
    /// `x·sigmoid(x)`, same shape.
    fn silu(&mut self, x: &Self::Value) -> Result<Self::Value, Self::Error>;
    /// Sum; `n` broadcasts.
    fn add(&mut self, a: &Self::Value, b: &Self::Value) -> Result<Self::Value, Self::Error>;
    /// `x` `[n, c, h, w]` plus `bias` `[n, c]` at every pixel.
    fn add_bias(&mut self, x: &Self::Value, bias: &Self::Value) -> Result<Self::Value, Self::Error>;
    /// `x·factor`.
    fn scale(&mut self, x: &Self::Value, factor: f64) -> Result<Self::Value, Self::Error>;
    /// Channels of `a`, then channels of `b`.
    fn concat(&mut self, a: &Self::Value, b: &Self::Value) -> Result<Self::Value, Self::Error>;
    /// Each pixel becomes a 2 by 2 square.
    fn upsample_nearest2x(&mut self, x: &Self::Value) -> Result<Self::Value, Self::Error>;
    /// Attention among pixels: `softmax(qᵀ·k / sqrt(c / heads))` applied to `v`; all `[n, c, h, w]`, head `i` takes
    /// the channels from `i·c/heads`.
    fn attention(
        &mut self,
        q: &Self::Value,
        k: &Self::Value,
        v: &Self::Value,
        heads: usize,
    ) -> Result<Self::Value, Self::Error>;
}

/// Predicted noise: `x_t` `[n, c, h, w]`, `t` `[n]` (or `[1]` for all), `class` `[n]` to `eps_pred` `[n, c, h, w]`.
///
/// `class` must be given exactly where the model is conditional.
pub fn denoise<O: Ops>(
    ops: &mut O,
    config: &ModelConfig,
    x_t: &O::Value,
    t: &O::Value,
    class: Option<&O::Value>,
) -> Result<O::Value, O::Error> {
    match config {
        ModelConfig::UNet2D(c) => unet2d::unet2d(ops, c, x_t, t, class),
    }
}

/// The constants of a one-step generator.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct OneStep {
    /// Fixed step at which the network is asked.
    pub t_gen: usize,
    /// Factor on `z` before the network.
    pub input_scale: f64,
    /// `alpha_t` at `t_gen`.
    pub alpha_t: f64,
    /// `sigma_t` at `t_gen`.
    pub sigma_t: f64,
}

/// The one-step generator `x_gen = (z·s − sigma_t·eps_pred(z·s, t_gen)) / alpha_t`.
///
/// Yin et al. 2024 (arXiv:2311.18828), section 3.2, for a base that predicts noise; `t_gen` is a property of the
/// model instead of T − 1. The division comes last, so that rounding is not magnified twice.
pub fn one_step<O: Ops>(
    ops: &mut O,
    config: &ModelConfig,
    generator: &OneStep,
    z: &O::Value,
    class: Option<&O::Value>,
) -> Result<O::Value, O::Error> {
    let x_t = if generator.input_scale == 1.0 { z.clone() } else { ops.scale(z, generator.input_scale)? };
    let t = ops.timestep(generator.t_gen as f64)?;
    let eps_pred = denoise(ops, config, &x_t, &t, class)?;
    let noise = ops.scale(&eps_pred, -generator.sigma_t)?;
    let image = ops.add(&x_t, &noise)?;
    ops.scale(&image, 1.0 / generator.alpha_t)
}

impl OneStep {
    /// Joins `generator.json` with the schedule it refers to.
    pub fn new(
        config: &crate::card::GeneratorConfig,
        schedule: &crate::schedule::Schedule,
    ) -> crate::Result<Self> {
        let (t_gen, total) = (config.t_gen, schedule.num_train_timesteps());
        if t_gen >= total {
            return Err(crate::Error::config("t_gen", format!("got {t_gen}, expected 0 to {}", total - 1)));
        }
        if !(config.input_scale.is_finite() && config.input_scale > 0.0) {
            let got = config.input_scale;
            return Err(crate::Error::config(
                "input_scale",
                format!("got {got}, expected a positive number"),
            ));
        }
        Ok(Self {
            t_gen,
            input_scale: config.input_scale,
            alpha_t: schedule.alpha_t(t_gen),
            sigma_t: schedule.sigma_t(t_gen),
        })
    }
}
