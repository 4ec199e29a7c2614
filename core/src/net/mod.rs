//! Networks, each described once as a function over [`Ops`].
//!
//! distill runs a description on candle tensors, export on "constant, per-class table or graph value", and
//! [`shapes`] on shapes alone. A description never names a tensor library.

pub mod celeba_unet;
pub mod context_unet;
pub mod discriminator;
pub mod shapes;
pub mod unet2d;

use crate::config::ModelConfig;
use crate::schedule::Prediction;

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

/// Transposed convolution, the gradient of a convolution as a layer; weight `NAME.weight` `[in, out, kernel, kernel]`,
/// bias `NAME.bias` `[out]`. An image of side `h` becomes one of side `(h − 1)·stride − 2·padding + kernel`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConvTranspose2d {
    /// Input channels.
    pub in_channels: usize,
    /// Output channels.
    pub out_channels: usize,
    /// Side of the kernel.
    pub kernel: usize,
    /// Step of the kernel in the output.
    pub stride: usize,
    /// Pixels cut off on each side of the output.
    pub padding: usize,
}

impl ConvTranspose2d {
    /// Side of the output for an input of side `h`; none if the padding cuts all of it off.
    pub fn output(&self, h: usize) -> Option<usize> {
        ((h.checked_sub(1)? * self.stride) + self.kernel)
            .checked_sub(2 * self.padding)
            .filter(|side| *side > 0)
    }

    /// The convolution whose gradient this is.
    pub fn convolution(&self) -> Conv2d {
        Conv2d {
            in_channels: self.out_channels,
            out_channels: self.in_channels,
            kernel: self.kernel,
            stride: self.stride,
            padding: [self.padding; 4],
        }
    }
}

/// Normalisation of each channel with fixed statistics: `(x − mean)/sqrt(var + eps)·weight + bias`. Parameters
/// `NAME.weight`, `NAME.bias`, statistics `NAME.running_mean`, `NAME.running_var`, all `[channels]`.
/// Ioffe and Szegedy 2015 (arXiv:1502.03167) at inference.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct BatchNorm {
    /// Channels.
    pub channels: usize,
    /// Added to the variance.
    pub eps: f64,
}

/// A function of single values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// `x·sigmoid(x)`.
    Silu,
    /// `x·Φ(x)` with the normal distribution's `Φ(x) = (1 + erf(x/√2))/2`.
    Gelu,
    /// `max(x, 0)`; its gradient at 0 is 0.
    Relu,
    /// `x·tanh(ln(1 + exp(x)))`.
    Mish,
}

/// What becomes of the pixels of a square.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pool {
    /// The largest; the gradient goes to the first of equal ones.
    Max,
    /// Their mean.
    Average,
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
    /// The table is fixed: no training changes it.
    pub frozen: bool,
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
    /// A parameter that the checkpoint has and the network never looks at.
    fn unused(&mut self, _name: &str, _shape: &[usize]) {}
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
    /// `[n, in, h, w]` to `[n, out, h', w']`.
    fn conv_transpose2d(
        &mut self,
        x: &Self::Value,
        name: &str,
        spec: ConvTranspose2d,
    ) -> Result<Self::Value, Self::Error>;
    /// Same shape.
    fn batch_norm(
        &mut self,
        x: &Self::Value,
        name: &str,
        spec: BatchNorm,
    ) -> Result<Self::Value, Self::Error>;
    /// Value by value, same shape.
    fn activate(&mut self, x: &Self::Value, activation: Activation) -> Result<Self::Value, Self::Error>;
    /// Each square of `size` by `size` pixels becomes one; what is left over at the right and bottom is not looked at.
    fn pool(&mut self, x: &Self::Value, pool: Pool, size: usize) -> Result<Self::Value, Self::Error>;
    /// `index` `[n]` to `[n, rows]`: 1 at the index, else 0; all 0 for the index `rows`.
    fn one_hot(&mut self, index: &Self::Value, rows: usize) -> Result<Self::Value, Self::Error>;
    /// `x` `[n]` as one feature, times a factor: `[n, 1]`.
    fn feature(&mut self, x: &Self::Value, factor: f64) -> Result<Self::Value, Self::Error>;
    /// `count` channels of `[n, c, h, w]`, or features of `[n, c]`, from `first` on.
    fn narrow(&mut self, x: &Self::Value, first: usize, count: usize) -> Result<Self::Value, Self::Error>;
    /// `x` `[n, c, h, w]` times `factor` `[n, c]` at every pixel.
    fn scale_channels(&mut self, x: &Self::Value, factor: &Self::Value) -> Result<Self::Value, Self::Error>;
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

/// The network's prediction (noise, image or velocity, see [`Prediction`]): `x_t` `[n, c, h, w]`, `t` `[n]` (or `[1]` for
/// all), `class` `[n]` to `[n, c, h, w]`.
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
        ModelConfig::ContextUnet(c) => context_unet::context_unet(ops, c, x_t, t, class),
        ModelConfig::CelebaUnet(c) => celeba_unet::celeba_unet(ops, c, x_t, t, class),
    }
}

/// The features in the middle of the network, `[n, c, h, w]` of shape [`bottleneck_shape`]; arguments as [`denoise`].
pub fn bottleneck<O: Ops>(
    ops: &mut O,
    config: &ModelConfig,
    x_t: &O::Value,
    t: &O::Value,
    class: Option<&O::Value>,
) -> Result<O::Value, O::Error> {
    match config {
        ModelConfig::UNet2D(c) => unet2d::bottleneck(ops, c, x_t, t, class),
        ModelConfig::ContextUnet(c) => context_unet::bottleneck(ops, c, x_t),
        ModelConfig::CelebaUnet(c) => celeba_unet::bottleneck(ops, c, x_t, t, class),
    }
}

/// `[channels, height, width]` of [`bottleneck`].
pub fn bottleneck_shape(config: &ModelConfig) -> [usize; 3] {
    let [_, h, w] = config.image_shape();
    let (channels, halvings) = match config {
        ModelConfig::UNet2D(c) => (unet2d::bottleneck_channels(c), c.block_out_channels.len() - 1),
        ModelConfig::ContextUnet(c) => (2 * c.n_feat, 2),
        ModelConfig::CelebaUnet(c) => (4 * c.channels, 2),
    };
    [channels, h.div_ceil(1 << halvings), w.div_ceil(1 << halvings)]
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
    /// What the network predicts.
    pub prediction: Prediction,
}

/// The one-step generator: the image that the prediction at `(z·s, t_gen)` implies, for a base that predicts noise
/// `x_gen = (z·s − sigma_t·eps_pred(z·s, t_gen)) / alpha_t`.
///
/// Yin et al. 2024 (arXiv:2311.18828), section 3.2; `t_gen` is a property of the model instead of T − 1. The division
/// comes last, so that rounding is not magnified twice.
pub fn one_step<O: Ops>(
    ops: &mut O,
    config: &ModelConfig,
    generator: &OneStep,
    z: &O::Value,
    class: Option<&O::Value>,
) -> Result<O::Value, O::Error> {
    let x_t = if generator.input_scale == 1.0 { z.clone() } else { ops.scale(z, generator.input_scale)? };
    let t = ops.timestep(generator.t_gen as f64)?;
    let prediction = denoise(ops, config, &x_t, &t, class)?;
    match generator.prediction {
        Prediction::Sample => Ok(prediction),
        Prediction::Epsilon => {
            let noise = ops.scale(&prediction, -generator.sigma_t)?;
            let image = ops.add(&x_t, &noise)?;
            ops.scale(&image, 1.0 / generator.alpha_t)
        }
        Prediction::Velocity => {
            let kept = ops.scale(&x_t, generator.alpha_t)?;
            let rest = ops.scale(&prediction, -generator.sigma_t)?;
            ops.add(&kept, &rest)
        }
    }
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
            prediction: schedule.prediction,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frequencies_fall_from_1_to_a_ten_thousandth() {
        let spec = |freq_shift: f64| TimestepEmbedding { features: 6, flip_sin_to_cos: false, freq_shift };
        for (shift, expected) in
            [(1.0, [1.0, 1e-2, 1e-4]), (0.0, [1.0, 1e4f64.powf(-1.0 / 3.0), 1e4f64.powf(-2.0 / 3.0)])]
        {
            let got = spec(shift).frequencies();
            assert_eq!(got.len(), 3);
            assert!(got.iter().zip(expected).all(|(got, want)| (got / want - 1.0).abs() < 1e-12), "{got:?}");
        }
    }
}
