//! The small CelebA network of the reference experiments (github.com/GrishKate/diffusion_distillation), with the
//! checkpoint's own parameter names and peculiarities: a frozen table of the steps, residual blocks without a residual
//! sum, skips that hold the time bias of the block they feed, an attention that never uses its normalisation.
//! Must not contain anything that is not in that network.

use super::{Activation, Conv2d, ConvTranspose2d, Embedding, GroupNorm, Linear, Ops};
use crate::Error;
use crate::config::CelebaUnetConfig;

/// Prediction of a `CelebaUNet`; see [`super::denoise`].
pub fn celeba_unet<O: Ops>(
    ops: &mut O,
    config: &CelebaUnetConfig,
    x_t: &O::Value,
    t: &O::Value,
    class: Option<&O::Value>,
) -> Result<O::Value, O::Error> {
    let c = config.channels;
    let mut net = Net::new(ops, config, t, class)?;
    let [conv1, down0, down1, down2, down3, down4, x] = net.down(config, x_t)?;

    let x = net.up(&x, &down4, "up.0", 8 * c, 4 * c)?;
    let x = net.attention(&x, "up.0.attn", 4 * c)?;
    let x = net.up(&x, &down3, "up.1", 6 * c, 2 * c)?;
    let x = net.attention(&x, "up.1.attn", 2 * c)?;
    let x = net.ops.conv_transpose2d(&x, "up.2", doubled(2 * c))?;
    let x = net.up(&x, &down2, "up.3", 4 * c, 2 * c)?;
    let x = net.up(&x, &down1, "up.4", 3 * c, c)?;
    let x = net.ops.conv_transpose2d(&x, "up.5", doubled(c))?;
    let x = net.up(&x, &down0, "up.6", 2 * c, c)?;
    let x = net.up(&x, &conv1, "up.7", 2 * c, c)?;
    let x = net.ops.group_norm(&x, "norm", norm(c))?;
    net.ops.conv2d(&x, "last", conv3x3(c, config.in_channels, 1))
}

/// What the middle makes of an image, `[n, 4·channels, h/4, w/4]`; see [`super::bottleneck`].
pub fn bottleneck<O: Ops>(
    ops: &mut O,
    config: &CelebaUnetConfig,
    x_t: &O::Value,
    t: &O::Value,
    class: Option<&O::Value>,
) -> Result<O::Value, O::Error> {
    let [.., x] = Net::new(ops, config, t, class)?.down(config, x_t)?;
    Ok(x)
}

/// The frozen table of the steps, `[n_steps, features]`: sines of the first half of the frequencies
/// `10000^(−2j/features)`, cosines of the second.
pub fn time_table(config: &CelebaUnetConfig) -> Vec<f32> {
    let features = 4 * config.channels;
    let value = |step: usize, j: usize| {
        let angle = step as f64 * libm::pow(10_000.0, -2.0 * j as f64 / features as f64);
        (if j < features / 2 { libm::sin(angle) } else { libm::cos(angle) }) as f32
    };
    (0..config.n_steps * features).map(|i| value(i / features, i % features)).collect()
}

fn conv3x3(in_channels: usize, out_channels: usize, stride: usize) -> Conv2d {
    Conv2d { in_channels, out_channels, kernel: 3, stride, padding: [1; 4] }
}

fn doubled(channels: usize) -> ConvTranspose2d {
    ConvTranspose2d { in_channels: channels, out_channels: channels, kernel: 4, stride: 2, padding: 1 }
}

fn norm(channels: usize) -> GroupNorm {
    GroupNorm { channels, groups: 8, eps: 1e-5, silu: true }
}

struct Net<'a, O: Ops> {
    ops: &'a mut O,
    /// SiLU of the step's row.
    time: O::Value,
    features: usize,
}

impl<'a, O: Ops> Net<'a, O> {
    fn new(
        ops: &'a mut O,
        config: &CelebaUnetConfig,
        t: &O::Value,
        class: Option<&O::Value>,
    ) -> Result<Self, O::Error> {
        if class.is_some() {
            return Err(Error::Request("the model takes no class and got one".into()).into());
        }
        let features = 4 * config.channels;
        let table = Embedding { rows: config.n_steps, features, frozen: true };
        let time = ops.embedding(t, "time_embed", table)?;
        let time = ops.activate(&time, Activation::Silu)?;
        Ok(Self { ops, time, features })
    }

    /// The way down and the middle: the six skips and its result.
    fn down(&mut self, config: &CelebaUnetConfig, x_t: &O::Value) -> Result<[O::Value; 7], O::Error> {
        let c = config.channels;
        let conv1 = self.ops.conv2d(x_t, "conv1", conv3x3(config.in_channels, c, 1))?;
        let (conv1, down0) = self.residual(&conv1, "down.0.res", c, c)?;
        let x = self.ops.conv2d(&down0, "down.1", conv3x3(c, c, 2))?;
        let (down1, down2) = self.residual(&x, "down.2.res", c, 2 * c)?;
        let x = self.ops.conv2d(&down2, "down.3", conv3x3(2 * c, 2 * c, 2))?;
        let (down3, x) = self.residual(&x, "down.4.res", 2 * c, 4 * c)?;
        let x = self.attention(&x, "down.4.attn", 4 * c)?;

        let (down4, x) = self.residual(&x, "middle.res1", 4 * c, 4 * c)?;
        let x = self.attention(&x, "middle.attn", 4 * c)?;
        let (_, x) = self.residual(&x, "middle.res2", 4 * c, 4 * c)?;
        Ok([conv1, down0, down1, down2, down3, down4, x])
    }

    /// The input with the time bias added, which is what a skip sees, and `conv1(silu(norm1(that)))`.
    fn residual(
        &mut self,
        x: &O::Value,
        path: &str,
        input: usize,
        output: usize,
    ) -> Result<(O::Value, O::Value), O::Error> {
        let spec = Linear { in_features: self.features, out_features: input };
        let bias = self.ops.linear(&self.time, &format!("{path}.time_fc"), spec)?;
        let x = self.ops.add_bias(x, &bias)?;
        let y = self.ops.group_norm(&x, &format!("{path}.norm1"), norm(input))?;
        let y = self.ops.conv2d(&y, &format!("{path}.conv1"), conv3x3(input, output, 1))?;
        Ok((x, y))
    }

    fn up(
        &mut self,
        x: &O::Value,
        skip: &O::Value,
        path: &str,
        input: usize,
        output: usize,
    ) -> Result<O::Value, O::Error> {
        let x = self.ops.concat(x, skip)?;
        Ok(self.residual(&x, &format!("{path}.res_blk"), input, output)?.1)
    }

    /// `x + last_fc(attention(fc(x)))`.
    fn attention(&mut self, x: &O::Value, path: &str, channels: usize) -> Result<O::Value, O::Error> {
        for suffix in ["weight", "bias"] {
            self.ops.unused(&format!("{path}.norm.{suffix}"), &[channels]);
        }
        let three = Linear { in_features: channels, out_features: 3 * channels };
        let y = self.ops.pointwise(x, &format!("{path}.fc"), three)?;
        let q = self.ops.narrow(&y, 0, channels)?;
        let k = self.ops.narrow(&y, channels, channels)?;
        let v = self.ops.narrow(&y, 2 * channels, channels)?;
        let y = self.ops.attention(&q, &k, &v, 1)?;
        let one = Linear { in_features: channels, out_features: channels };
        let y = self.ops.pointwise(&y, &format!("{path}.last_fc"), one)?;
        self.ops.add(x, &y)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_of_steps_has_sines_then_cosines() {
        let config = CelebaUnetConfig { channels: 2, n_steps: 4, ..CelebaUnetConfig::default() };
        let table = time_table(&config);
        assert_eq!(table.len(), 4 * 8);
        assert_eq!(table[..8], [0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0]);
        let angles = [3.0, 0.3, 0.03, 0.003, 3e-4, 3e-5, 3e-6, 3e-7f64];
        for (j, angle) in angles.into_iter().enumerate() {
            let expected = if j < 4 { angle.sin() } else { angle.cos() };
            assert!((f64::from(table[3 * 8 + j]) - expected).abs() < 1e-7, "{j}: {}", table[3 * 8 + j]);
        }
    }
}
